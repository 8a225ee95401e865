"""Masked binarization of a weight: `masked_weight`, its gradient, and the rules of gradients."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .cpu import NativeKernels
from .operators import FLOATS, check_dtype, check_floating, check_place, declare


MASKED_WEIGHT = "masked_weight(Tensor weight, Tensor mask, Tensor scale, float clip, ScalarType dtype) -> Tensor"

MASKED_WEIGHT_GRAD = (
    "masked_weight_grad(Tensor grad, Tensor weight, Tensor mask, Tensor scale, float clip, str surrogate, "
    "float window) -> Tensor"
)


class Surrogate(NamedTuple):
    """A rule, see [`SURROGATES`]. Without a number, which kernels know it by, it runs in plain PyTorch alone."""

    passes: Callable[[Tensor, Tensor], Tensor]
    # enum hf_stompp_surrogate, and the `rule` of Triton's kernels.
    number: int | None = None
    # Operators know slope 1 alone; `hf_stompp.nn.functional` multiplies by another.
    slope: Callable[[Tensor], Tensor] | None = None


SURROGATES: dict[str, Surrogate] = {
    "none": Surrogate(lambda mask, inside: inside & ~mask, 0),
    "ste": Surrogate(lambda mask, inside: inside | mask, 1),
    "clipped_ste": Surrogate(lambda mask, inside: inside, 2),
    "polynomial": Surrogate(lambda mask, inside: inside, 2, lambda distance: 2 - 2 * distance),
}
"""
Gradient rules by name, each with a function `(mask, inside) -> passes` of booleans that broadcast against each other.
`inside` tells which entries lie within their range: a free entry's is the clip range, a frozen one's the *window*.
`passes` tells which entries the gradient passes through; it is 0 elsewhere. A frozen entry multiplies it by `slope` of
its distance from the middle of the window, in windows, where there is such a function; else the slope is 1.

- `none`: STE-free; a frozen entry passes exactly 0 (the paper).
- `ste`: StoMPP+STE; a frozen entry passes the gradient unchanged (the paper's identity surrogate).
- `clipped_ste`: a frozen entry passes the gradient unchanged within the window, and none outside (BinaryNet, arXiv
  1602.02830, eq. 4; that the window may be narrower than the clip range is ours).
- `polynomial`: the same with a slope that falls from 2 in the middle of the window to 0 at its ends (Bi-Real, arXiv
  1808.00278, eq. 6, where the window is 1).
"""


def check_surrogate(op: str, surrogate: str) -> None:
    if surrogate not in SURROGATES:
        raise ValueError(f"hf_stompp::{op}: surrogate must be one of {list(SURROGATES)}, got {surrogate!r}")


def _check(
    op: str,
    weight: Tensor,
    mask: Tensor,
    scale: Tensor,
    clip: float,
    grad: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> None:
    check_floating(op, "weight", weight)
    check_floating(op, "grad", grad)
    if not dtype.is_floating_point:
        raise TypeError(f"hf_stompp::{op}: dtype must be floating, got {dtype}")
    check_dtype(op, "mask", mask, torch.bool)
    check_floating(op, "scale", scale)
    shape, device = weight.shape, weight.device
    if not shape:
        raise ValueError(f"hf_stompp::{op}: weight must have at least one dimension")
    check_place(op, "mask", mask, shape, device)
    check_place(op, "scale", scale, (*shape[:-1], 1), device)
    if grad is not None:
        check_place(op, "grad", grad, shape, device)
    if not clip > 0:
        raise ValueError(f"hf_stompp::{op}: clip must be positive, got {clip}")


def _meta(weight: Tensor, mask: Tensor, scale: Tensor, clip: float, dtype: torch.dtype) -> Tensor:
    _check("masked_weight", weight, mask, scale, clip, dtype=dtype)
    return weight.new_empty(weight.shape, dtype=dtype)


def _grad_meta(
    grad: Tensor, weight: Tensor, mask: Tensor, scale: Tensor, clip: float, surrogate: str, window: float
) -> Tensor:
    op = "masked_weight_grad"
    _check(op, weight, mask, scale, clip, grad)
    check_surrogate(op, surrogate)
    if not window > 0:
        raise ValueError(f"hf_stompp::{op}: window must be positive, got {window}")
    return weight.new_empty(weight.shape)


def clip_between(x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """`x` where it is not beyond a bound; one that is NaN bounds nothing."""
    return torch.where(x > high, high, torch.where(x < low, low, x))


def masked_weight(weight: Tensor, mask: Tensor, scale: Tensor, clip: float, dtype: torch.dtype) -> Tensor:
    """
    Masked binarization of a weight: `M * scale * sign(w) + (1 - M) * clip(w, -clip * scale, clip * scale)`.

    Args:
        weight (`Tensor` of shape `(..., in_features)`): latent weight.
        mask (`Tensor`, bool, of the same shape): the freeze mask `M`.
        scale (`Tensor` of shape `(..., 1)`): floating.
        clip (`float`): clip range as a multiple of the scale.
        dtype (`torch.dtype`): of the result.

    Returns:
        `Tensor` of shape `(..., in_features)`: computed in float32 or wider, rounded once to `dtype`.
    """
    work = torch.promote_types(weight.dtype, torch.float32)
    weight, scale = weight.to(work), scale.to(work)
    bound = clip * scale
    hard = torch.where(weight >= 0, scale, -scale)
    return torch.where(mask, hard, clip_between(weight, -bound, bound)).to(dtype).contiguous()


def masked_weight_grad(
    grad: Tensor, weight: Tensor, mask: Tensor, scale: Tensor, clip: float, surrogate: str, window: float
) -> Tensor:
    """
    Gradient of [`masked_weight`] with respect to the weight: `grad` where it passes, 0 elsewhere.

    Args:
        grad (`Tensor` of shape `(..., in_features)`): any floating dtype.
        weight, mask, scale, clip: as in [`masked_weight`].
        surrogate (`str`): a key of [`SURROGATES`], the gradient of the frozen entries, but for a `slope`: the caller
            multiplies by that.
        window (`float`): range of a frozen weight as a multiple of the scale.

    Returns:
        `Tensor` of shape `(..., in_features)`: dtype of `weight`.
    """
    work = torch.promote_types(weight.dtype, torch.float32)
    bound = torch.where(mask, window * scale.to(work), clip * scale.to(work))
    passes = SURROGATES[surrogate].passes(mask, weight.to(work).abs() <= bound)
    return torch.where(passes, grad, 0).to(weight.dtype).contiguous()


def _take(weight: Tensor, mask: Tensor, scale: Tensor, clip: float, dtype: torch.dtype) -> bool:
    return weight.dtype in FLOATS and dtype in FLOATS and scale.dtype == torch.float32


def _take_grad(
    grad: Tensor, weight: Tensor, mask: Tensor, scale: Tensor, clip: float, surrogate: str, window: float
) -> bool:
    return SURROGATES[surrogate].number is not None and _take(weight, mask, scale, clip, grad.dtype)


_CPU_RECORD = struct.Struct("6qdd6q")  # struct hf_stompp_masked_weight


def _on_cpu(kernels: NativeKernels, output: Tensor, *arguments: Any) -> Tensor:
    weight, mask, scale, clip, dtype = arguments
    rows, columns = scale.numel(), weight.shape[-1]
    record = weight, weight.dtype, mask, scale, clip, clip, rows, columns, None, 0, output, dtype
    kernels.call(kernels.native.hf_stompp_masked_weight, _CPU_RECORD, *record)
    return output


def _grad_on_cpu(kernels: NativeKernels, output: Tensor, *arguments: Any) -> Tensor:
    grad, weight, mask, scale, clip, surrogate, window = arguments
    rows, columns, number = scale.numel(), weight.shape[-1], SURROGATES[surrogate].number
    record = weight, weight.dtype, mask, scale, clip, window, rows, columns, grad, number, output, grad.dtype
    kernels.call(kernels.native.hf_stompp_masked_weight, _CPU_RECORD, *record)
    return output


declare(MASKED_WEIGHT, _meta, masked_weight, takes=_take, cpu=_on_cpu, in_triton=True)
declare(MASKED_WEIGHT_GRAD, _grad_meta, masked_weight_grad, takes=_take_grad, cpu=_grad_on_cpu, in_triton=True)
