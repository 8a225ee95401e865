"""Masked binarization of an activation: `masked_activation`, and its gradient."""

from __future__ import annotations

import struct
from typing import Any

import torch
from torch import Tensor

from .bits import empty_bits, pack_bools, packed_bytes, unpack_bits
from .cpu import NativeKernels
from .operators import FLOATS, check_device, check_dtype, check_floating, check_place, declare
from .weights import SURROGATES, check_surrogate, clip_between


MASKED_ACTIVATION = (
    "masked_activation(Tensor value, Tensor pre_activation, Tensor mask, Tensor threshold, Tensor offset, "
    "Tensor amplitude, Tensor center, Tensor bound, str surrogate, Tensor window) -> "
    "(Tensor output, Tensor passes, Tensor upper)"
)

MASKED_ACTIVATION_GRAD = (
    "masked_activation_grad(Tensor grad, Tensor passes, Tensor upper, Tensor mask) -> (Tensor grad_value, Tensor sums)"
)


def _check_feature_mask(op: str, mask: Tensor, input: Tensor) -> None:
    check_dtype(op, "mask", mask, torch.bool)
    check_place(op, "mask", mask, input.shape[-1:], input.device)


def _meta(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    op = "masked_activation"
    value, pre_activation, mask, threshold, offset, amplitude, center, bound, surrogate, window = arguments
    if not value.is_floating_point() or pre_activation.dtype != value.dtype:
        raise TypeError(
            f"hf_stompp::{op}: value and pre_activation must be of one floating dtype, got {value.dtype} and "
            f"{pre_activation.dtype}"
        )
    if not value.shape or pre_activation.shape != value.shape:
        raise ValueError(
            f"hf_stompp::{op}: value and pre_activation must have one shape of at least one dimension, got "
            f"{tuple(value.shape)} and {tuple(pre_activation.shape)}"
        )
    check_device(op, "pre_activation", pre_activation, value.device)
    _check_feature_mask(op, mask, value)
    features = value.shape[-1]
    vectors = {"threshold": threshold, "offset": offset, "center": center}
    for name, tensor in {**vectors, "amplitude": amplitude, "bound": bound, "window": window}.items():
        check_floating(op, name, tensor)
        if tensor.shape != () and (name not in vectors or tensor.shape != (features,)):
            allowed = f"() or ({features},)" if name in vectors else "()"
            raise ValueError(f"hf_stompp::{op}: {name} must have shape {allowed}, got {tuple(tensor.shape)}")
        check_device(op, name, tensor, value.device)
    check_surrogate(op, surrogate)
    return value.new_empty(value.shape), empty_bits(value, features), empty_bits(value, features)


def _grad_meta(grad: Tensor, passes: Tensor, upper: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    op = "masked_activation_grad"
    check_floating(op, "grad", grad)
    if not grad.shape:
        raise ValueError(f"hf_stompp::{op}: grad must have at least one dimension")
    _check_feature_mask(op, mask, grad)
    *leading, features = grad.shape
    for name, bits in (("passes", passes), ("upper", upper)):
        check_dtype(op, name, bits, torch.uint8)
        check_place(op, name, bits, (*leading, packed_bytes(features)), grad.device)
    return grad.new_empty(grad.shape), grad.new_empty((3, features), dtype=torch.float64)


def masked_activation(
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
) -> tuple[Tensor, Tensor, Tensor]:
    """
    Masked binarization of an activation: `offset +- amplitude` where `M` is set, `+` where `pre_activation >=
    threshold`; elsewhere `value` clipped to `center +- bound`.

    Args:
        value (`Tensor` of shape `(..., features)`).
        pre_activation (`Tensor` of shape `(..., features)`): of the dtype of `value`.
        mask (`Tensor` of shape `(features,)`, bool): the freeze mask `M`.
        threshold, offset, center (`Tensor` of shape `(features,)` or `()`): floating.
        amplitude, bound (`Tensor` of shape `()`): floating.
        surrogate (`str`): a key of [`SURROGATES`]; the caller multiplies by its `slope`, where it has one.
        window (`Tensor` of shape `()`): floating, range of a frozen entry on either side of the centre.

    Returns:
        `tuple(Tensor, Tensor, Tensor)`: the result in the dtype of `value`, computed in float32 or wider and rounded
            once; and two packed bits an element, uint8 of shape `(..., packed_bytes(features))`, all that the gradient
            needs: whether it passes to `value`, and whether the element is on the upper side (of the threshold where
            it is frozen, of the centre where not).
    """
    work = torch.promote_types(value.dtype, torch.float32)
    dtype = value.dtype
    value, threshold, offset, amplitude, center, bound, window = (
        t.to(work) for t in (value, threshold, offset, amplitude, center, bound, window)
    )
    low, high = center - bound, center + bound
    above = pre_activation.to(work) >= threshold
    hard = torch.where(above, offset + amplitude, offset - amplitude)
    output = torch.where(mask, hard, clip_between(value, low, high)).to(dtype).contiguous()
    reach = torch.where(mask, window, bound)
    passes = SURROGATES[surrogate].passes(mask, (value >= center - reach) & (value <= center + reach))
    return output, pack_bools(passes), pack_bools(torch.where(mask, above, value > center))


def masked_activation_grad(grad: Tensor, passes: Tensor, upper: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """
    Gradient of [`masked_activation`]: what passes to `value`, and what is needed of the rest.

    Args:
        grad (`Tensor` of shape `(..., features)`).
        passes, upper (`Tensor` of shape `(..., packed_bytes(features))`): uint8, from [`masked_activation`].
        mask (`Tensor` of shape `(features,)`, bool).

    Returns:
        `tuple(Tensor, Tensor)`: the gradient of `value`, and sums over all leading dimensions, float64 of shape `(3,
            features)`, of what passes; of what is held back or is of a frozen feature; and of the upper elements of
            the latter.
    """
    features = grad.shape[-1]
    is_passed, is_upper = unpack_bits(passes, features).bool(), unpack_bits(upper, features).bool()
    passed = torch.where(is_passed, grad, 0).contiguous()
    held = torch.where(mask | ~is_passed, grad, 0)
    rows = [t.reshape(-1, features) for t in (passed, held, torch.where(is_upper, held, 0))]
    return passed, torch.stack([t.sum(dim=0, dtype=torch.float64) for t in rows])


def _take(value: Tensor, *settings: Any) -> bool:
    return value.dtype in FLOATS and SURROGATES[settings[7]].number is not None


def _take_grad(grad: Tensor, *bits: Tensor) -> bool:
    return grad.dtype in FLOATS


_CPU_RECORD = struct.Struct("20q")  # struct hf_stompp_masked_activation


def _on_cpu(kernels: NativeKernels, result: tuple[Tensor, ...], *arguments: Any) -> Any:
    value, pre_activation, mask, threshold, offset, amplitude, center, bound, surrogate, window = arguments
    output, passes, upper = result
    rows, features = value.shape[:-1].numel(), value.shape[-1]
    threshold, offset, center = (vector.float().expand(features) for vector in (threshold, offset, center))
    amplitude, bound, window = (number.float() for number in (amplitude, bound, window))
    levels = threshold, offset, amplitude, center, bound, window
    outputs = passes, upper, None, output, None
    number = SURROGATES[surrogate].number
    record = value, pre_activation, value.dtype, mask, *levels, number, rows, features, *outputs
    kernels.call(kernels.native.hf_stompp_masked_activation, _CPU_RECORD, *record)
    return result


def _grad_on_cpu(
    kernels: NativeKernels, result: tuple[Tensor, Tensor], grad: Tensor, passes: Tensor, upper: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor]:
    rows, features = grad.shape[:-1].numel(), grad.shape[-1]
    levels = (None,) * 6
    record = None, None, grad.dtype, mask, *levels, 0, rows, features, passes, upper, grad, *result
    kernels.call(kernels.native.hf_stompp_masked_activation, _CPU_RECORD, *record)
    return result


declare(MASKED_ACTIVATION, _meta, masked_activation, takes=_take, cpu=_on_cpu, in_triton=True)
declare(MASKED_ACTIVATION_GRAD, _grad_meta, masked_activation_grad, takes=_take_grad, cpu=_grad_on_cpu, in_triton=True)
