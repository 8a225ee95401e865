"""
Masked binarization and its gradient rules: pure functions on tensors.

The forward rule is the paper's (arXiv 2606.27759), `u' = M * hard(u) + (1 - M) * soft(u)`: frozen entries (`M = 1`)
take one of two levels, the others keep the clipped value. The backward rule of the frozen entries is the *surrogate*.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..ops import plus_minus_one


SURROGATES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "none": lambda mask, inside: inside & ~mask,
    "ste": lambda mask, inside: inside | mask,
    "clipped_ste": lambda mask, inside: inside,
}
"""
Gradient rule by name: `(mask, inside) -> passes`, all boolean and broadcast against each other. `inside` tells which
entries lie within the clip range; `passes` tells which entries the gradient passes through (with slope 1; it is 0
elsewhere).

- `none`: STE-free; a frozen entry passes exactly 0 (the paper).
- `ste`: StoMPP+STE; a frozen entry passes the gradient unchanged (the paper's identity surrogate).
- `clipped_ste`: a frozen entry passes the gradient of the hardtanh it replaced (BinaryNet, arXiv 1602.02830, eq. 4).
"""


def _row_scale(weight: Tensor) -> Tensor:
    return torch.linalg.vector_norm(weight, 1, dim=-1, keepdim=True, dtype=torch.float64) / weight.shape[-1]


def _tensor_scale(weight: Tensor) -> Tensor:
    return _row_scale(weight).mean().expand(*weight.shape[:-1], 1)


def _unit_scale(weight: Tensor) -> Tensor:
    return weight.new_ones((*weight.shape[:-1], 1), dtype=torch.float64)


WEIGHT_SCALES: dict[str, Callable[[Tensor], Tensor]] = {
    "row": _row_scale,
    "tensor": _tensor_scale,
    "none": _unit_scale,
}
"""
Weight scale by name: `weight (rows, in_features) -> scale (rows, 1)` in float64.

- `row`: mean |w| of each row (XNOR-Net, arXiv 1603.05279, eq. 6; BiBERT).
- `tensor`: mean |w| of the whole tensor (BiT, arXiv 2205.13016).
- `none`: 1, the bare sign.
"""

LEVELS: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]] = {
    "signed": lambda scale, shift: (shift, scale, shift),
    "zero_one": lambda scale, shift: (0.5 * scale, 0.5 * scale, torch.zeros_like(scale)),
}
"""
Two levels of a binary activation by name: `(scale, shift) -> (offset, amplitude, centre)`, the levels being `offset -
amplitude` and `offset + amplitude`, and `centre` the middle of the clip range.

- `signed`: `shift - scale` and `shift + scale`: {-a, +a} about a learned shift, added back so that the mean is kept
  (ours).
- `zero_one`: `0` and `scale`: {0, a} (BiT's set for non-negative tensors).
"""


def sign(x: Tensor) -> Tensor:
    """+1 where `x >= 0`, -1 elsewhere, in the dtype of `x`. So `-0.0` gives +1 and NaN gives -1."""
    return plus_minus_one(x >= 0, x.dtype)


def _mix(mask: Tensor, hard: Tensor, soft: Tensor) -> Tensor:
    """`M * hard + (1 - M) * soft`: exactly the one or the other, as both are finite."""
    frozen = mask.to(hard.dtype)
    return torch.addcmul(hard * frozen, soft, 1 - frozen)


def _clip(x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    return torch.minimum(torch.maximum(x, low), high)


def weight_scale(weight: Tensor, kind: str) -> Tensor:
    """
    Scale of the hard level of each row of a weight: a constant of the forward pass, no gradient flows into it.

    The mean is taken in float64: the mean of `in_features` equal float32 numbers is then that number, so that packing
    a model that was unpacked gives the same bits back.

    Args:
        weight (`Tensor` of shape `(rows, in_features)`): latent weight, any floating dtype.
        kind (`str`): a key of [`WEIGHT_SCALES`].

    Returns:
        `Tensor` of shape `(rows, 1)`: float32.
    """
    return WEIGHT_SCALES[kind](weight.detach()).to(torch.float32)


class _MaskedBinaryWeight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, mask: Tensor, scale: Tensor, clip: float, surrogate: str) -> Tensor:
        scale = scale.to(weight.dtype)
        soft = _clip(weight, -clip * scale, clip * scale)
        ctx.save_for_backward(SURROGATES[surrogate](mask, soft == weight))
        return _mix(mask, sign(weight) * scale, soft)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (passes,) = ctx.saved_tensors
        return grad * passes, None, None, None, None


def masked_binary_weight(weight: Tensor, mask: Tensor, scale: Tensor, clip: float, surrogate: str) -> Tensor:
    """
    Masked binarization of a weight: `M * scale * sign(w) + (1 - M) * clip(w, -clip * scale, clip * scale)`.

    Args:
        weight (`Tensor` of shape `(rows, in_features)`): latent weight.
        mask (`Tensor` of shape `(rows, in_features)`, bool): the freeze mask `M`.
        scale (`Tensor` of shape `(rows, 1)`): from [`weight_scale`].
        clip (`float`): clip range as a multiple of the scale.
        surrogate (`str`): a key of [`SURROGATES`], the gradient of the frozen entries.

    Returns:
        `Tensor` of shape `(rows, in_features)`: dtype of `weight`.
    """
    return _MaskedBinaryWeight.apply(weight, mask, scale, clip, surrogate)


class _MaskedBinaryActivation(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        value: Tensor,
        pre_activation: Tensor,
        mask: Tensor,
        threshold: Tensor,
        offset: Tensor,
        amplitude: Tensor,
        center: Tensor,
        bound: Tensor,
        surrogate: str,
    ) -> Tensor:
        above = pre_activation >= threshold
        soft = _clip(value, center - bound, center + bound)
        hard = offset + plus_minus_one(above, soft.dtype) * amplitude
        inside = soft == value
        upper = (above & mask) | ((value > center) & ~mask)
        ctx.save_for_backward(mask, upper, SURROGATES[surrogate](mask, inside))
        ctx.shapes = [t.shape for t in (threshold, offset, amplitude, center, bound)]
        return _mix(mask, hard, soft).to(value.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        mask, upper, passes = ctx.saved_tensors
        passed = grad * passes
        # The mask is constant down a column, and a free entry passes its gradient where it is inside the clip range:
        # so the sums over a column of the whole and of the passed gradient hold those of the frozen and of the clipped
        # entries.
        frozen = mask.to(grad.dtype)
        held = torch.addcmul(grad, passed, frozen - 1)
        whole, passed_sum, held_sum, upper_sum = (_column_sum(t) for t in (grad, passed, held, held * upper))
        by_level = 2 * upper_sum - held_sum
        threshold, offset, amplitude, center, bound = ctx.shapes
        return (
            passed,
            None,
            None,
            (-passed_sum * mask).sum_to_size(threshold),
            (whole * mask).sum_to_size(offset),
            (by_level * mask).sum_to_size(amplitude),
            (held_sum * ~mask).sum_to_size(center),
            (by_level * ~mask).sum_to_size(bound),
            None,
        )


def _column_sum(grad: Tensor) -> Tensor:
    """Sum over all dimensions but the last, in float32 or wider."""
    dtype = torch.promote_types(grad.dtype, torch.float32)
    return grad.reshape(-1, grad.shape[-1]).sum(dim=0, dtype=dtype)


def masked_binary_activation(
    value: Tensor,
    pre_activation: Tensor,
    mask: Tensor,
    threshold: Tensor,
    scale: Tensor,
    shift: Tensor,
    clip: float,
    surrogate: str,
    levels: str = "signed",
) -> Tensor:
    """
    Masked binarization of an activation: `M * hard + (1 - M) * soft`, with one freeze mask entry a feature.

    `hard = offset + amplitude * sign(pre_activation - threshold)`; `soft` is `value` clipped to `clip * scale` on
    either side of its centre. `value` is the output of the model's own activation function and `pre_activation` its
    input: the sign of a GELU's *output* is not that of its input, because GELU rounds to -0.0 far below zero. Where
    there is no activation function the two are the same tensor.

    The gradient of a frozen entry reaches `value` (hence `pre_activation` through the activation function's own
    derivative) and `threshold` as the surrogate says; that of `scale` and `shift` is exact.

    Args:
        value (`Tensor` of shape `(..., features)`): what the float model would pass on.
        pre_activation (`Tensor` of shape `(..., features)`): what decides the level.
        mask (`Tensor` of shape `(features,)`, bool): the freeze mask `M`.
        threshold (`Tensor` of shape `(features,)`): in units of `pre_activation`.
        scale (`Tensor` of shape `()`): half the distance of the levels (`signed`) or all of it (`zero_one`), in units
            of `value`.
        shift (`Tensor` of shape `(features,)`): centre of the levels and of the clip range, in units of `value`
            (`signed` only).
        clip (`float`): clip range as a multiple of the scale.
        surrogate (`str`): a key of [`SURROGATES`].
        levels (`str`, *optional*, defaults to `"signed"`): a key of [`LEVELS`].

    Returns:
        `Tensor` of shape `(..., features)`: dtype of `value`.
    """
    offset, amplitude, center = LEVELS[levels](scale, shift)
    # torch.compile takes no tensor twice: where levels or value and pre-activation coincide, these are other objects.
    amplitude, center, pre_activation = amplitude.view_as(amplitude), center.view_as(center), pre_activation.detach()
    return _MaskedBinaryActivation.apply(
        value, pre_activation, mask, threshold, offset, amplitude, center, clip * scale, surrogate
    )
