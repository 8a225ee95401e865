"""Binary linear layers and word embeddings, latent."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..ops import binary_linear, binary_linear_sign, byte_linear, fold, pack_sign, quantize_rows
from ..ops.operators import FLOATS
from .functional import (
    WEIGHT_CENTERS,
    PackedLinear,
    compute_dtype,
    masked_binary_linear,
    masked_binary_weight,
    weight_scale,
)
from .module import BinaryInputModule, MaskedBinaryModule, as_bits, as_integers, identity


class MaskedBinaryLinear(MaskedBinaryModule, BinaryInputModule):
    """
    A linear layer whose weight is masked-binarized, and whose input may be: `(..., in_features)` to `(...,
    out_features)`.

    A layer whose weight and input are committed runs on bits, like its packed counterpart:

    - in evaluation mode without gradients, in the same arithmetic: the packed model's logits are those of the
      committed model, bit for bit;
    - in STE-free training, where weight and input get no gradient any more and neither is kept for the backward pass.
      Bias, activation scale and shift go on learning.

    With float inputs and `activation_bits`, a committed layer runs on integers in evaluation mode without gradients,
    like its packed counterpart. Training takes the floats as they are.

    The arguments are those of [`~torch.nn.Linear`], and as in [`StoMPPConfig`], `scale`, `center`, `clip` and `window`
    being those of its weights.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        scale: str = "row",
        center: str = "none",
        clip: float = 1.0,
        surrogate: str = "clipped_ste",
        window: float | None = None,
        activation_bits: int | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__((out_features, in_features), surrogate, device)
        self.in_features = in_features
        self.out_features = out_features
        self.scale = scale
        self.center = center
        self.clip = clip
        self.window = window
        self.activation_bits = activation_bits
        self.weight = nn.Parameter(torch.empty(out_features, in_features, device=device, dtype=dtype))
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)
        self.register_module("input_activation", None)
        self.binarizes_input = False
        self._packed: tuple[tuple[Any, ...], tuple[Tensor, Tensor]] | None = None

    def weight_rows(self) -> Tensor:
        """The latent weight, of shape `(out_features, in_features)`."""
        return self.weight

    def centered_weight(self) -> Tensor:
        """
        What signs and scales are taken of: the latent weight, less its mean where that is asked for, of shape
        `(out_features, in_features)`.
        """
        return WEIGHT_CENTERS[self.center](self.weight_rows())

    def rows_to_pack(self) -> Tensor:
        """[`centered_weight`] in the order in which a packed layer reads its input."""
        return self.centered_weight()

    def input_levels(self) -> tuple[Tensor, Tensor]:
        """Offset and amplitude of a binary input, see [`MaskedBinaryActivation.two_levels`]."""
        return self.input_activation.two_levels()

    def row_scale(self) -> Tensor:
        """Scale of the hard level of each row, float32 of shape `(out_features, 1)`."""
        return weight_scale(self.centered_weight(), self.scale)

    def packed(self) -> tuple[Tensor, Tensor]:
        """
        Packed signs of the weight, uint8 of shape `(out_features, packed_bytes(in_features))`, and [`row_scale`]. Kept
        while the weight passes no gradient and the mask is not written to: that a fused optimizer has changed a
        weight, nothing tells.
        """
        if not self.blocks_gradient or torch.compiler.is_compiling():
            return self._pack()
        key = identity(self.weight)
        # Read once: another thread may be running the same model.
        kept = self._packed
        if kept is None or kept[0] != key:
            # What inference mode creates can never be used in training.
            with torch.inference_mode(False):
                kept = self._packed = key, self._pack()
        return kept[1]

    @torch.no_grad()
    def _pack(self) -> tuple[Tensor, Tensor]:
        return pack_sign(self.rows_to_pack().detach())[0], self.row_scale()

    def _set_committed(self, committed: bool) -> None:
        super()._set_committed(committed)
        self._packed = None

    def folded(self, packed: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Any]:
        """
        Scale and bias of the integer product, float32 of shape `(out_features,)`: with binary inputs those of
        [`~hf_stompp.ops.fold`], else the row's own, and None for a bias that is not there. `packed` is what
        [`packed`] returned, where that was called already.
        """
        packed_weight, row_scale = self.packed() if packed is None else packed
        if self.input_activation is None:
            # The rounding of a forward pass in training, which takes the scale in the weight's dtype.
            scale = row_scale.to(self.weight.dtype).flatten().float()
            return scale, None if self.bias is None else self.bias.float()
        offset, amplitude = self.input_levels()
        return fold(packed_weight, row_scale, offset, amplitude, self.bias, self.in_features)

    def forward(self, input: Tensor) -> Tensor:
        if self._runs_on_bits(input):
            return self._multiply_bits(input)
        if self.binarizes_input:
            input = self.input_activation.shared_output(input, self)
        elif self._runs_on_bytes(input):
            packed = self.packed()
            return byte_linear(input, packed[0], self.in_features, *self.folded(packed), input.dtype)
        weight = self.centered_weight()
        scale = weight_scale(weight, self.scale)
        if self.blocks_gradient:
            # No gradient, not even 0: an optimizer leaves the weight alone.
            weight = weight.detach()
        return masked_binary_linear(
            input, weight, self.freeze_mask, scale, self.bias, self.clip, self.surrogate, self.window
        )

    def _runs_on_bytes(self, input: Tensor) -> bool:
        if self.activation_bits is None or self.training or torch.is_grad_enabled():
            return False
        return input.dtype in FLOATS and self.weight.dtype in FLOATS and self.committed

    def _runs_on_bits(self, input: Tensor) -> bool:
        if not self.binarizes_input:
            # Bits from the feed-forward activation function, which has looked at the layers that read it.
            return not input.is_floating_point()
        return self.input_activation.gives_signs(input) and self.committed

    def _multiply_bits(self, input: Tensor) -> Tensor:
        activation, following = self.input_activation, self.output_activation
        if input.is_floating_point():
            if not activation.initialized:
                # By calling it, since a hook on it may sum the statistics of all ranks.
                activation(input)
            bits, dtype = activation.shared_bits(input, self), compute_dtype(input) if self.training else input.dtype
        else:
            bits, dtype = as_bits(input)
        packed_weight, row_scale = self.packed()
        scale, bias = self.folded((packed_weight, row_scale))
        if following is not None and following.emits_bits():
            layer: tuple[Any, ...] = packed_weight, self.in_features, scale.detach(), bias.detach(), dtype
            return as_integers(binary_linear_sign(bits, None, *layer, following.threshold.detach().float()), dtype)
        if torch.is_grad_enabled():
            return PackedLinear.apply(scale, bias, bits, packed_weight, self.in_features, dtype)
        return binary_linear(bits, None, packed_weight, self.in_features, scale, bias, dtype)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_packed": None}

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"scale={self.scale!r}, center={self.center!r}, clip={self.clip}, surrogate={self.surrogate!r}, "
            f"activation_bits={self.activation_bits}"
        )


class RoundedEmbedding(nn.Embedding):
    """
    A word embedding table whose rows are rounded to 8 bits, see [`~hf_stompp.ops.quantize_rows`]. The gradient passes
    straight through.
    """

    @classmethod
    def of(cls, embedding: nn.Embedding) -> RoundedEmbedding:
        """The same table, rounded. Its weight is kept, not copied."""
        rounded = cls(
            embedding.num_embeddings, embedding.embedding_dim, embedding.padding_idx, _weight=embedding.weight
        )
        rounded.weight = embedding.weight
        return rounded

    def forward(self, input: Tensor) -> Tensor:
        rows = super().forward(input)
        codes, scale = quantize_rows(rows)
        rounded = codes.to(rows.dtype) * scale.to(rows.dtype)
        # The difference is 0.
        return rounded + (rows - rows.detach()) if rows.requires_grad else rounded


class MaskedBinaryEmbedding(MaskedBinaryModule):
    """
    A word embedding table whose rows are masked-binarized, each with a scale of its own. Only the rows that a batch
    looks up are computed; that of `padding_idx` gets no gradient.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        clip: float = 1.0,
        surrogate: str = "clipped_ste",
        window: float | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__((num_embeddings, embedding_dim), surrogate, device)
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        self.padding_idx = padding_idx
        self.clip = clip
        self.window = window
        self.weight = nn.Parameter(torch.empty(num_embeddings, embedding_dim, device=device, dtype=dtype))

    def row_scale(self) -> Tensor:
        """Scale of the hard level of each row, float32 of shape `(num_embeddings, 1)`."""
        return weight_scale(self.weight, "row")

    def forward(self, input: Tensor) -> Tensor:
        weight = self.weight.detach() if self.blocks_gradient else self.weight
        rows = F.embedding(input, weight, self.padding_idx)
        mask = F.embedding(input, self.freeze_mask)
        return masked_binary_weight(rows, mask, weight_scale(rows, "row"), self.clip, self.surrogate, self.window)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, clip={self.clip}, surrogate={self.surrogate!r}"
