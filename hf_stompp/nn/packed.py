"""Binary layers, packed: 1-bit weights, inference only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..ops import binary_linear, binary_linear_sign, byte_linear, pack_sign, packed_bytes, plus_minus_one, unpack_signs
from ..ops.operators import FLOATS
from .module import BinaryInputModule, SharedResult, as_bits, as_integers, identity


FEW_ELEMENTS = 2**17
"""A CPU packs fewer within every product that reads them sooner than Python has found their bits."""


class Float32Buffers(nn.Module):
    """
    A module whose float buffers stay float32 when a model is cast, as they do when it is loaded in another dtype: they
    are few, decide where a sign changes, and to widen them again would cost a call in every forward pass.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        before = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            after: Any = self._buffers[name]
            if buffer.dtype == torch.float32 != after.dtype:
                self._buffers[name] = buffer.to(after.device)
        return self


class PackedBinaryActivation(Float32Buffers):
    """
    The sign of a tensor `(..., features)` minus a threshold a feature. In the place of a feed-forward activation
    function, `activation`, it replaces that too: what it puts out are bits, which the linear layer behind it reads.
    The function is not called; [`~hf_stompp.unpack`] gives it back.
    """

    threshold: Tensor

    def __init__(self, features: int, activation: nn.Module | None = None, device: torch.device | None = None) -> None:
        super().__init__()
        self.features = features
        self.activation = activation
        self.register_buffer("threshold", torch.zeros(features, dtype=torch.float32, device=device))
        # The linear layers that read it. A list, so that they are not registered here.
        self.readers: list[nn.Module] = []
        self._bits = SharedResult()

    def forward(self, input: Tensor) -> Tensor:
        if not input.is_floating_point():
            # The layer in front has done it, see [`~hf_stompp.nn.module.BinaryInputModule.put_out_signs_of`].
            return input
        if self.training:
            # Dropout may follow, which takes no bits.
            return plus_minus_one(input >= self.threshold, input.dtype)
        return as_integers(pack_sign(input.detach(), self.threshold.float())[0], input.dtype)

    def shared_bits(self, input: Tensor, reader: nn.Module) -> Tensor:
        """
        The packed signs of a tensor `(..., features)` of float32, bfloat16 or float16, uint8 of shape `(...,
        packed_bytes(features))`, computed once for all the linear layers that read it, see [`SharedResult`].
        """
        # The sign has no gradient. Not always detached, since that would be another tensor.
        signed = input.detach() if input.requires_grad else input
        return self._bits.get(input, reader, len(self.readers), lambda: pack_sign(signed, self.threshold.float())[0])

    def kept_bits(self, input: Tensor, reader: nn.Module) -> Tensor | None:
        """What [`keep`] was given for this very tensor; None if that was another, or nothing."""
        return self._bits.take(input, reader, len(self.readers))

    def keep(self, input: Tensor, bits: Tensor) -> None:
        """
        Takes the packed signs of a tensor, relative to the threshold, from what has put it out, for the layers that
        will ask for them.
        """
        self._bits.keep(input, bits)

    def extra_repr(self) -> str:
        return f"{self.features}"


class PackedBinaryLinear(Float32Buffers, BinaryInputModule):
    """
    A linear layer with 1-bit weights, `(..., in_features)` to `(..., out_features)`.

    With `binary_input` (mode `bnn`) it computes `scale * integer_product + bias` of the signs of floats, or of the
    bits of a feed-forward activation. Otherwise (mode `bwn`), with `activation_bits` of 8, the same of float inputs
    that it rounds, see [`~hf_stompp.ops.quantize_rows`], or else a float product with `+-scale`. A gradient passes
    through float products alone.
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
        activation_bits: int | None = None,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.binary_input = binary_input
        self.activation_bits = activation_bits
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
        self._float_weight: tuple[tuple[Any, ...], Tensor] | None = None

    def forward(self, input: Tensor) -> Tensor:
        bias = self.bias
        if not self.binary_input and (self.activation_bits is None or input.dtype not in FLOATS):
            return F.linear(input, self.float_weight(input.dtype), None if bias is None else bias.to(input.dtype))
        layer = self.packed_weight, self.in_features, self.scale.float(), None if bias is None else bias.float()
        if not self.binary_input:
            # Integers have no gradient.
            return byte_linear(input.detach() if input.requires_grad else input, *layer, input.dtype)
        bits_or_floats, threshold, dtype = self._signed_input(input)
        following = self.output_activation
        if following is None or following.training:
            return binary_linear(bits_or_floats, threshold, *layer, dtype)
        bits = binary_linear_sign(bits_or_floats, threshold, *layer, dtype, following.threshold.float())
        return as_integers(bits, dtype)

    @property
    def weight(self) -> Tensor:
        """An empty tensor that tells dtype and device, which some models (T5) ask their linear layers for."""
        return self.scale.new_empty(0)

    def _signed_input(self, input: Tensor) -> tuple[Tensor, Tensor | None, torch.dtype]:
        """What the operators take: bits, or floats and the threshold of their signs; and the dtype to put out."""
        if not input.is_floating_point():
            bits, dtype = as_bits(input)
            return bits, None, dtype
        activation = self.input_activation
        if self.binarizes_input and not _is_cheap_to_pack(input):
            # A single reader signs floats within its product.
            signs = activation.shared_bits if len(activation.readers) > 1 else activation.kept_bits
            bits = signs(input, self)
            if bits is not None:
                return bits, None, input.dtype
        # The sign has no gradient.
        input = input.detach() if input.requires_grad else input
        return input, activation.threshold.float() if self.binarizes_input else None, input.dtype

    def float_weight(self, dtype: torch.dtype) -> Tensor:
        """The weight `+-scale`, of shape `(out_features, in_features)`, kept between calls."""
        if torch.compiler.is_compiling():
            return self._unpacked(dtype)
        key = dtype, *identity(self.packed_weight, self.scale)
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
            f"binary_input={self.binary_input}, activation_bits={self.activation_bits}"
        )


def _is_cheap_to_pack(input: Tensor) -> bool:
    """Whether to look for bits that were packed before takes longer than to pack them again."""
    # In a compiled graph nothing is looked for.
    return not torch.compiler.is_compiling() and input.is_cpu and input.numel() < FEW_ELEMENTS


class PackedEmbedding(nn.Module):
    """
    A word embedding table of packed rows, each with a scale: row numbers, int64 of shape `(...)`, to `(...,
    embedding_dim)` in the dtype of the scale. `padding_idx` is not used; [`~hf_stompp.unpack`] gives it back.
    """

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
        self.register_buffer("scale", torch.zeros(num_embeddings, device=device, dtype=dtype))

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}"


class PackedBinaryEmbedding(PackedEmbedding):
    """A [`PackedEmbedding`] with 1-bit entries."""

    packed_weight: Tensor

    def __init__(self, num_embeddings: int, embedding_dim: int, padding_idx: int | None = None, **place: Any) -> None:
        super().__init__(num_embeddings, embedding_dim, padding_idx, **place)
        shape = (num_embeddings, packed_bytes(embedding_dim))
        self.register_buffer("packed_weight", torch.zeros(shape, dtype=torch.uint8, device=place.get("device")))

    def forward(self, input: Tensor) -> Tensor:
        # Refuses a negative number, as in `look_up`.
        signs = unpack_signs(F.embedding(input, self.packed_weight), self.embedding_dim)
        return signs.to(self.scale.dtype) * self.scale[input].unsqueeze(-1)


class PackedInt8Embedding(PackedEmbedding):
    """A [`PackedEmbedding`] with 8-bit entries."""

    int8_weight: Tensor

    def __init__(self, num_embeddings: int, embedding_dim: int, padding_idx: int | None = None, **place: Any) -> None:
        super().__init__(num_embeddings, embedding_dim, padding_idx, **place)
        shape = (num_embeddings, embedding_dim)
        self.register_buffer("int8_weight", torch.zeros(shape, dtype=torch.int8, device=place.get("device")))

    def forward(self, input: Tensor) -> Tensor:
        return look_up(input, self.int8_weight, self.scale)


def look_up(input: Tensor, int8_weight: Tensor, scale: Tensor) -> Tensor:
    """
    Rows, by their int64 numbers, of an int8 table `(num_embeddings, embedding_dim)`, each times its scale, in the
    dtype of the scale.
    """
    # Refuses a negative number, which an index would take for one from the end.
    return F.embedding(input, int8_weight).to(scale.dtype) * scale[input].unsqueeze(-1)
