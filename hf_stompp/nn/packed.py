"""Binary layers, packed: 1-bit weights, inference only."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..ops import binary_linear, binary_linear_sign, pack_sign, packed_bytes, plus_minus_one, unpack_signs
from .module import BinaryInputModule, refer


_INTEGERS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.uint16}

_FLOATS = {integer: dtype for dtype, integer in _INTEGERS.items()}


def _as_integers(bits: Tensor, dtype: torch.dtype) -> Tensor:
    """
    Bits on their way through a model's own code: viewed as integers of the type that tells which float type they stand
    for, so that the layer that reads them knows what to put out.
    """
    return bits.view(_INTEGERS[dtype])


def _as_bits(integers: Tensor) -> tuple[Tensor, torch.dtype]:
    return integers.view(torch.uint8), _FLOATS[integers.dtype]


def _version(tensor: Tensor) -> int | None:
    """How often a tensor was written in place; None for one of inference mode, where nothing counts that."""
    return None if tensor.is_inference() else tensor._version


class PackedBinaryActivation(nn.Module):
    """
    The sign of a tensor minus a threshold. In the place of a feed-forward activation function it replaces that too:
    what it puts out are bits, which the linear layer behind it reads.

    Args:
        features (`int`): size of the last dimension.
        activation (`nn.Module`, *optional*): the activation function that is replaced. It is not called;
            [`~hf_stompp.unpack`] gives it back.
        device (`torch.device`, *optional*).
    """

    threshold: Tensor

    def __init__(self, features: int, activation: nn.Module | None = None, device: torch.device | None = None) -> None:
        super().__init__()
        self.features = features
        self.activation = activation
        self.register_buffer("threshold", torch.zeros(features, dtype=torch.float32, device=device))
        self.shared = False
        # The tensor that was signed last, its version, its bits, and who has had them.
        self._last: tuple[weakref.ref[Tensor], int | None, Tensor, set[int]] | None = None

    def forward(self, input: Tensor) -> Tensor:
        if not input.is_floating_point():
            # The layer in front has done it, see [`PackedBinaryLinear.put_out_signs_of`].
            return input
        if self.training:
            # Dropout may follow, which takes no bits.
            return plus_minus_one(input >= self.threshold, input.dtype)
        return _as_integers(pack_sign(input.detach(), self.threshold.float())[0], input.dtype)

    def shared_bits(self, input: Tensor, reader: nn.Module) -> Tensor:
        """
        The packed signs of a tensor, computed once for all the linear layers that read it.

        A layer that comes again begins anew: in inference mode nothing tells that a tensor was written in place since.

        Args:
            input (`Tensor` of shape `(..., features)`): float32, bfloat16 or float16.
            reader (`nn.Module`): the linear layer that asks.

        Returns:
            `Tensor` of shape `(..., packed_bytes(features))`: uint8.
        """
        if torch.compiler.is_compiling():
            return pack_sign(input.detach(), self.threshold.float())[0]
        # Read once: another thread may be running the same model.
        last, version = self._last, _version(input)
        if last is not None and last[0]() is input and last[1] == version and id(reader) not in last[3]:
            last[3].add(id(reader))
            return last[2]
        bits = pack_sign(input.detach(), self.threshold.float())[0]
        self._last = weakref.ref(input), version, bits, {id(reader)}
        return bits

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_last": None}

    def extra_repr(self) -> str:
        return f"{self.features}"


class PackedBinaryLinear(BinaryInputModule):
    """
    A linear layer with 1-bit weights: `scale * integer_product + bias` on binary inputs, or a product with `+-scale`
    on float inputs. No gradient passes through it on binary inputs.

    Args:
        in_features (`int`).
        out_features (`int`).
        bias (`bool`, *optional*, defaults to `True`).
        binary_input (`bool`, *optional*, defaults to `True`): mode `bnn`; otherwise `bwn`.
        device (`torch.device`, *optional*).
    """

    packed_weight: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        binary_input: bool = True,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.binary_input = binary_input
        self.binarizes_input = False
        shape = (out_features, packed_bytes(in_features))
        self.register_buffer("packed_weight", torch.zeros(shape, dtype=torch.uint8, device=device))
        self.register_buffer("scale", torch.zeros(out_features, dtype=torch.float32, device=device))
        # Folding the offset of the input levels needs a bias even where the float layer had none.
        has_bias = bias or binary_input
        self.register_buffer(
            "bias", torch.zeros(out_features, dtype=torch.float32, device=device) if has_bias else None
        )
        self.register_module("input_activation", None)
        self.output_activation: Any = None
        self._float_weight: tuple[tuple[Any, ...], Tensor] | None = None

    def set_input_activation(self, activation: nn.Module, owned: bool, upstream: bool = False) -> None:
        super().set_input_activation(activation, owned, upstream)
        if not owned and not upstream:
            self.input_activation.shared = True

    def put_out_signs_of(self, activation: PackedBinaryActivation) -> None:
        """
        Makes the layer put out the bits that `activation` would compute from its output, and nothing else reads. The
        float output is then never written.
        """
        refer(self, "output_activation", activation)

    def forward(self, input: Tensor) -> Tensor:
        if not self.binary_input:
            weight = self.float_weight(input.dtype)
            return F.linear(input, weight, None if self.bias is None else self.bias.to(input.dtype))
        bits_or_floats, threshold, dtype = self._signed_input(input)
        bias = self.bias
        layer = self.packed_weight, self.in_features, self.scale.float(), None if bias is None else bias.float()
        following = self.output_activation
        if following is None or following.training:
            return binary_linear(bits_or_floats, threshold, *layer, dtype)
        bits = binary_linear_sign(bits_or_floats, threshold, *layer, dtype, following.threshold.float())
        return _as_integers(bits, dtype)

    def _signed_input(self, input: Tensor) -> tuple[Tensor, Tensor | None, torch.dtype]:
        """What the operators take: bits, or floats and the threshold of their signs; and the dtype to put out."""
        if not input.is_floating_point():
            bits, dtype = _as_bits(input)
            return bits, None, dtype
        activation = self.input_activation
        if self.binarizes_input and activation.shared:
            return activation.shared_bits(input, self), None, input.dtype
        # The sign has no gradient.
        input = input.detach() if input.requires_grad else input
        return input, activation.threshold.float() if self.binarizes_input else None, input.dtype

    def float_weight(self, dtype: torch.dtype) -> Tensor:
        """
        The weight `+-scale`, kept between calls.

        Args:
            dtype (`torch.dtype`).

        Returns:
            `Tensor` of shape `(out_features, in_features)`.
        """
        if torch.compiler.is_compiling():
            return self._unpacked(dtype)
        tensors = self.packed_weight, self.scale
        key = dtype, *((tensor.device, tensor.data_ptr(), _version(tensor)) for tensor in tensors)
        # Read once: another thread may be running the same model.
        kept = self._float_weight
        if kept is not None and kept[0] == key:
            return kept[1]
        # What inference mode creates can never be used in training.
        with torch.inference_mode(False):
            weight = self._unpacked(dtype)
        self._float_weight = key, weight
        return weight

    def _unpacked(self, dtype: torch.dtype) -> Tensor:
        signs = unpack_signs(self.packed_weight, self.in_features)
        return (signs * self.scale.float().unsqueeze(-1)).to(dtype)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_float_weight": None}

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"binary_input={self.binary_input}"
        )


class PackedBinaryEmbedding(nn.Module):
    """
    A word embedding table with 1-bit entries and a scale a row, in the dtype of the scale.

    Args:
        num_embeddings (`int`).
        embedding_dim (`int`).
        padding_idx (`int`, *optional*): not used; [`~hf_stompp.unpack`] gives it back.
        device (`torch.device`, *optional*).
        dtype (`torch.dtype`, *optional*): of the scale, hence of the output.
    """

    packed_weight: Tensor
    scale: Tensor

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        self.padding_idx = padding_idx
        shape = (num_embeddings, packed_bytes(embedding_dim))
        self.register_buffer("packed_weight", torch.zeros(shape, dtype=torch.uint8, device=device))
        self.register_buffer("scale", torch.zeros(num_embeddings, device=device, dtype=dtype))

    def forward(self, input: Tensor) -> Tensor:
        signs = unpack_signs(self.packed_weight[input], self.embedding_dim)
        return signs.to(self.scale.dtype) * self.scale[input].unsqueeze(-1)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}"
