"""Binary linear layers and word embeddings, latent."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..ops import fold, integer_linear
from .functional import masked_binary_weight, sign, weight_scale
from .module import BinaryInputModule, MaskedBinaryModule


class MaskedBinaryLinear(MaskedBinaryModule, BinaryInputModule):
    """
    A linear layer whose weight is masked-binarized, and whose input may be.

    In evaluation mode without gradients, a layer whose weight and input are committed computes what its packed
    counterpart computes, in the same arithmetic: the packed model's logits are then those of the committed model, bit
    for bit.

    Args:
        in_features (`int`).
        out_features (`int`).
        bias (`bool`, *optional*, defaults to `True`).
        scale (`str`, *optional*, defaults to `"row"`): a key of [`~hf_stompp.nn.functional.WEIGHT_SCALES`].
        clip (`float`, *optional*, defaults to 3.0): clip range of the weight as a multiple of its scale.
        surrogate (`str`, *optional*, defaults to `"ste"`): a key of [`~hf_stompp.nn.functional.SURROGATES`].
        device (`torch.device`, *optional*).
        dtype (`torch.dtype`, *optional*): of weight and bias.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        scale: str = "row",
        clip: float = 3.0,
        surrogate: str = "ste",
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__((out_features, in_features), device)
        self.in_features = in_features
        self.out_features = out_features
        self.scale = scale
        self.clip = clip
        self.surrogate = surrogate
        self.weight = nn.Parameter(torch.empty(out_features, in_features, device=device, dtype=dtype))
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)
        self.register_module("input_activation", None)
        self.binarizes_input = False

    def set_input_activation(self, activation: nn.Module, owned: bool, upstream: bool = False) -> None:
        super().set_input_activation(activation, owned, upstream)
        if upstream:
            self.input_activation.readers.append(self)

    def row_scale(self) -> Tensor:
        """Scale of the hard level of each row, float32 of shape `(out_features, 1)`."""
        return weight_scale(self.weight, self.scale)

    def folded(self) -> tuple[Tensor, Tensor]:
        """Scale and bias of the integer product, see [`~hf_stompp.ops.fold`]."""
        offset, amplitude = self.input_activation.two_levels()
        return fold(sign(self.weight), self.row_scale(), offset, amplitude, self.bias)

    def _is_committed_inference(self) -> bool:
        activation = self.input_activation
        if activation is None:
            return False
        if not self.binarizes_input:
            return bool(activation.emits_signs())
        return not self.training and not torch.is_grad_enabled() and self.committed and bool(activation.committed)

    def forward(self, input: Tensor) -> Tensor:
        activation = self.input_activation
        if self._is_committed_inference():
            if self.binarizes_input:
                if not activation.initialized:
                    # By calling it, since a hook on it may sum the statistics of all ranks.
                    activation(input)
                input = activation.signs(input)
            return integer_linear(input, sign(self.weight), *self.folded())
        if self.binarizes_input:
            input = activation(input)
        weight = masked_binary_weight(self.weight, self.freeze_mask, self.row_scale(), self.clip, self.surrogate)
        return F.linear(input, weight.to(input.dtype), None if self.bias is None else self.bias.to(input.dtype))

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"scale={self.scale!r}, clip={self.clip}, surrogate={self.surrogate!r}"
        )


class MaskedBinaryEmbedding(MaskedBinaryModule):
    """
    A word embedding table whose rows are masked-binarized. Only the rows that a batch looks up are computed.

    Args:
        num_embeddings (`int`).
        embedding_dim (`int`).
        padding_idx (`int`, *optional*): this row gets no gradient.
        clip (`float`), surrogate (`str`): as in [`MaskedBinaryLinear`]; the scale is always that of a row.
        device (`torch.device`, *optional*).
        dtype (`torch.dtype`, *optional*).
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        clip: float = 3.0,
        surrogate: str = "ste",
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__((num_embeddings, embedding_dim), device)
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        self.padding_idx = padding_idx
        self.clip = clip
        self.surrogate = surrogate
        self.weight = nn.Parameter(torch.empty(num_embeddings, embedding_dim, device=device, dtype=dtype))

    def row_scale(self) -> Tensor:
        """Scale of the hard level of each row, float32 of shape `(num_embeddings, 1)`."""
        return weight_scale(self.weight, "row")

    def forward(self, input: Tensor) -> Tensor:
        rows = F.embedding(input, self.weight, self.padding_idx)
        mask = F.embedding(input, self.freeze_mask)
        return masked_binary_weight(rows, mask, weight_scale(rows, "row"), self.clip, self.surrogate)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, clip={self.clip}, surrogate={self.surrogate!r}"
