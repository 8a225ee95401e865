"""Binary layers, packed: 1-bit weights, inference only."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..ops import binary_linear, packed_bytes, unpack_signs
from .functional import plus_minus_one
from .module import BinaryInputModule


class PackedBinaryActivation(nn.Module):
    """
    The sign of a tensor minus a threshold. In the place of a feed-forward activation function it replaces that too.

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

    def forward(self, input: Tensor) -> Tensor:
        return plus_minus_one(input >= self.threshold, input.dtype)

    def extra_repr(self) -> str:
        return f"{self.features}"


class PackedBinaryLinear(BinaryInputModule):
    """
    A linear layer with 1-bit weights: `scale * integer_product + bias` on binary inputs, or a product with `+-scale`
    on float inputs.

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

    def forward(self, input: Tensor) -> Tensor:
        signs = unpack_signs(self.packed_weight, self.in_features)
        if self.binary_input:
            input = self.input_activation(input) if self.binarizes_input else input
            return binary_linear(input, signs, self.scale, self.bias)
        weight = (signs * self.scale.float().unsqueeze(-1)).to(input.dtype)
        return F.linear(input, weight, None if self.bias is None else self.bias.to(input.dtype))

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
