"""
Masked binarization and its gradient rules: pure functions on tensors.

The forward rule is the paper's (arXiv 2606.27759), `u' = M * hard(u) + (1 - M) * soft(u)`: frozen entries (`M = 1`)
take one of two levels, the others keep the clipped value. The backward rule of the frozen entries is the *surrogate*
(`SURROGATES`). The arithmetic is in the operators (`hf_stompp/ops/weights.py`, `activations.py`), which write it out
once, in plain PyTorch, and have fused kernels; here it meets autograd.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..ops import (
    SURROGATES,
    binary_linear,
    masked_activation,
    masked_activation_grad,
    masked_weight,
    masked_weight_grad,
)


def _row_scale(weight: Tensor) -> Tensor:
    return torch.linalg.vector_norm(weight, 1, dim=-1, keepdim=True, dtype=torch.float64) / weight.shape[-1]


WEIGHT_SCALES: dict[str, Callable[[Tensor], Tensor]] = {
    "row": _row_scale,
    "tensor": lambda weight: _row_scale(weight).mean().expand(*weight.shape[:-1], 1),
    "none": lambda weight: weight.new_ones((*weight.shape[:-1], 1), dtype=torch.float64),
}
"""
Weight scale by name: `weight (rows, in_features) -> scale (rows, 1)` in float64.

- `row`: mean |w| of each row (XNOR-Net, arXiv 1603.05279, eq. 6; BiBERT).
- `tensor`: mean |w| of the whole tensor (BiT, arXiv 2205.13016).
- `none`: 1, the bare sign.
"""

WEIGHT_CENTERS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda weight: weight,
    "row": lambda weight: weight - weight.mean(dim=-1, keepdim=True),
    "tensor": lambda weight: weight - weight.mean(),
}
"""
What the sign of a weight is taken of, by name: `weight (rows, in_features) -> weight less its mean (rows,
in_features)`, differentiable.

- `none`: the weight itself (paper).
- `row`: less the mean of its row (BiBERT, arXiv 2203.06390).
- `tensor`: less the mean of the whole tensor (BiT, arXiv 2205.13016).
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


def compute_dtype(input: Tensor) -> torch.dtype:
    """The dtype that a linear layer computes in: autocast's where that is on, else that of its input."""
    device = input.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else input.dtype


def weight_scale(weight: Tensor, kind: str) -> Tensor:
    """
    Scale of the hard level of each row of a latent weight `(rows, in_features)` of any floating dtype: float32 of
    shape `(rows, 1)`, a constant of the forward pass, into which no gradient flows. `kind` is a key of
    [`WEIGHT_SCALES`].

    The mean is taken in float64: the mean of `in_features` equal float32 numbers is then that number, so that packing
    a model that was unpacked gives the same bits back.
    """
    return WEIGHT_SCALES[kind](weight.detach()).to(torch.float32)


def _frozen_slope(slope: Callable[[Tensor], Tensor], mask: Tensor, distance: Tensor, window: Tensor) -> Tensor:
    """What a gradient is multiplied by: the slope where an entry is frozen, else 1."""
    # Beyond its window, and where a value is NaN, a gradient is 0 already.
    part = (distance / window.clamp_min(torch.finfo(window.dtype).tiny)).clamp(max=1).nan_to_num(1.0)
    return torch.where(mask, slope(part), 1.0)


def _weight_gradient(
    grad: Tensor, weight: Tensor, mask: Tensor, scale: Tensor, clip: float, surrogate: str, window: float
) -> Tensor:
    passed = masked_weight_grad(grad, weight, mask, scale, clip, surrogate, window)
    slope = SURROGATES[surrogate].slope
    if slope is None:
        return passed
    return (passed * _frozen_slope(slope, mask, weight.abs(), window * scale)).to(passed.dtype)


class _MaskedBinaryWeight(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, mask: Tensor, scale: Tensor, clip: float, surrogate: str, window: float
    ) -> Tensor:
        ctx.save_for_backward(weight, mask, scale)
        ctx.settings = clip, surrogate, window
        return masked_weight(weight, mask, scale, clip, weight.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _weight_gradient(grad, *ctx.saved_tensors, *ctx.settings), None, None, None, None, None


def masked_binary_weight(
    weight: Tensor, mask: Tensor, scale: Tensor, clip: float, surrogate: str, window: float | None = None
) -> Tensor:
    """
    Masked binarization of a weight: `M * scale * sign(w) + (1 - M) * clip(w, -clip * scale, clip * scale)`.

    The latent weight and the freeze mask `M`, bool, have shape `(rows, in_features)`, and so has the result, in the
    dtype of the weight; the scale `(rows, 1)` is that of [`weight_scale`]. `surrogate`, a key of [`SURROGATES`], is
    the gradient of the frozen entries; `clipped_ste` and `polynomial` pass it within `window` scales, the clip range
    when not given.
    """
    return _MaskedBinaryWeight.apply(weight, mask, scale, clip, surrogate, clip if window is None else window)


class _MaskedBinaryLinear(torch.autograd.Function):
    """Keeps its arguments for the backward pass, not the binarized weight: to make that again costs one pass."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        mask: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        clip: float,
        surrogate: str,
        window: float,
    ) -> Tensor:
        ctx.save_for_backward(input, weight, mask, scale)
        ctx.settings = clip, surrogate, window
        return F.linear(input, masked_weight(weight, mask, scale, clip, input.dtype), bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        input, weight, mask, scale = ctx.saved_tensors
        clip, surrogate, window = ctx.settings
        grad_input = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_input = grad @ masked_weight(weight, mask, scale, clip, grad.dtype)
        if ctx.needs_input_grad[1]:
            grad_weight = _weight_gradient(grad.T @ input, weight, mask, scale, clip, surrogate, window)
        if ctx.needs_input_grad[4]:
            grad_bias = grad.sum(dim=0)
        return grad_input, grad_weight, None, None, grad_bias, None, None, None


def masked_binary_linear(
    input: Tensor,
    weight: Tensor,
    mask: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    clip: float,
    surrogate: str,
    window: float | None = None,
) -> Tensor:
    """
    A linear layer whose weight is binarized by [`masked_binary_weight`]: `(..., in_features)` to `(...,
    out_features)`, in the dtype of [`compute_dtype`].
    """
    dtype = compute_dtype(input)
    bias = None if bias is None else bias.to(dtype)
    window = clip if window is None else window
    rows = input.to(dtype).reshape(-1, input.shape[-1])
    output = _MaskedBinaryLinear.apply(rows, weight, mask, scale, bias, clip, surrogate, window)
    # Here, not in the function: what that puts out as a view cannot be changed in place, and Longformer does so.
    return output.reshape(*input.shape[:-1], weight.shape[0])


class PackedLinear(torch.autograd.Function):
    """
    [`~hf_stompp.ops.binary_linear`] on packed bits, differentiable in scale and bias, float32 of shape
    `(out_features,)`: a committed layer in STE-free training, whose weight and input get no gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        scale: Tensor,
        bias: Tensor,
        bits: Tensor,
        packed_weight: Tensor,
        in_features: int,
        dtype: torch.dtype,
    ) -> Tensor:
        ctx.save_for_backward(bits, packed_weight)
        ctx.in_features = in_features
        return binary_linear(bits, None, packed_weight, in_features, scale, bias, dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        bits, packed_weight = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1])
        grad_scale = grad_bias = None
        if ctx.needs_input_grad[0]:
            # The integers again: on bits that costs less than having kept them.
            one = torch.ones(rows.shape[-1], device=rows.device)
            product = binary_linear(bits, None, packed_weight, ctx.in_features, one, None, torch.float32)
            grad_scale = product.reshape(rows.shape).mul_(rows).sum(dim=0)
        if ctx.needs_input_grad[1]:
            grad_bias = rows.sum(dim=0, dtype=torch.float32)
        return grad_scale, grad_bias, None, None, None, None


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
        window: Tensor,
    ) -> Tensor:
        output, passes, upper = masked_activation(
            value, pre_activation, mask, threshold, offset, amplitude, center, bound, surrogate, window
        )
        ctx.slope = SURROGATES[surrogate].slope
        ctx.save_for_backward(mask, passes, upper, *(() if ctx.slope is None else (value, center, window)))
        ctx.like = [(t.shape, t.dtype) for t in (threshold, offset, amplitude, center, bound)]
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        mask, passes, upper, *sloped = ctx.saved_tensors
        grad_value, (passed, held, held_upper) = masked_activation_grad(grad, passes, upper, mask)
        if sloped:
            value, center, window = sloped
            distance = (value.to(torch.promote_types(value.dtype, torch.float32)) - center).abs()
            exact = grad_value * _frozen_slope(ctx.slope, mask, distance, window)
            passed = exact.reshape(-1, exact.shape[-1]).sum(dim=0, dtype=passed.dtype)
            grad_value = exact.to(grad_value.dtype)
        by_level = 2 * held_upper - held
        # The mask is constant down a column: its sums belong either to the two levels or to the clip range.
        terms = [-passed * mask, held * mask, by_level * mask, held * ~mask, by_level * ~mask]
        grads = [term.sum_to_size(shape).to(dtype) for term, (shape, dtype) in zip(terms, ctx.like, strict=True)]
        return grad_value, None, None, *grads, None, None


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
    window: float | None = None,
    blocked: bool = False,
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
        window (`float`, *optional*): within how many scales of its centre `clipped_ste` and `polynomial` pass the
            gradient of a frozen value; the clip range when not given.
        blocked (`bool`, *optional*, defaults to `False`): the mask is full and the surrogate `none`: value and
            threshold get no gradient, not even 0, nor does anything that reaches the loss through them alone.

    Returns:
        `Tensor` of shape `(..., features)`: dtype of `value`.
    """
    offset, amplitude, center = LEVELS[levels](scale, shift)
    # torch.compile takes no tensor twice: where levels or value and pre-activation coincide, these are other objects.
    amplitude, center, pre_activation = amplitude.view_as(amplitude), center.view_as(center), pre_activation.detach()
    if blocked:
        value, threshold = value.detach(), threshold.detach()
    reach = (clip if window is None else window) * scale.detach()
    return _MaskedBinaryActivation.apply(
        value, pre_activation, mask, threshold, offset, amplitude, center, clip * scale, surrogate, reach
    )
