"""
Masked binarization on a GPU: the operators of `weights.py` and `activations.py`, each in one pass over its elements.
Imported only where Triton is installed.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .weights import SURROGATES


__all__ = ["masked_activation", "masked_activation_grad", "masked_weight", "masked_weight_grad"]

_ELEMENTS = 1024

# A tile of an activation: rows x bytes of bits, eight features each.
_ROWS, _BYTES = 4, 32

_ROW_SPLITS = 32
"""Pieces of the rows that are summed apart, so that there is work for a whole GPU. Fixed, so that sums repeat."""


@triton.jit
def _passes(frozen, inside, rule: tl.constexpr):
    # The numbers of [`~hf_stompp.ops.weights.SURROGATES`].
    if rule == 0:
        return inside & (frozen == 0)
    elif rule == 1:
        return inside | frozen
    else:
        return inside


@triton.jit
def _weight_kernel(weight, mask, scale, output, clip, size, columns, block: tl.constexpr):
    index = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    live = index < size
    w = tl.load(weight + index, mask=live, other=0.0).to(tl.float32)
    frozen = tl.load(mask + index, mask=live, other=0) != 0
    s = tl.load(scale + index // columns, mask=live, other=0.0)
    bound = clip * s
    soft = tl.where(w > bound, bound, tl.where(w < -bound, -bound, w))
    value = tl.where(frozen, tl.where(w >= 0, s, -s), soft)
    tl.store(output + index, value.to(output.dtype.element_ty), mask=live)


@triton.jit
def _weight_grad_kernel(
    grad, weight, mask, scale, output, clip, window, size, columns, rule: tl.constexpr, block: tl.constexpr
):
    index = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    live = index < size
    w = tl.load(weight + index, mask=live, other=0.0).to(tl.float32)
    g = tl.load(grad + index, mask=live, other=0.0).to(tl.float32)
    frozen = tl.load(mask + index, mask=live, other=0) != 0
    bound = tl.where(frozen, window, clip) * tl.load(scale + index // columns, mask=live, other=0.0)
    passes = _passes(frozen, (w <= bound) & (w >= -bound), rule)
    tl.store(output + index, tl.where(passes, g, 0.0).to(output.dtype.element_ty), mask=live)


@triton.jit
def _activation_kernel(
    value,
    pre_activation,
    mask,
    threshold,
    offset,
    amplitude,
    center,
    bound,
    window,
    output,
    passes_bits,
    upper_bits,
    rows,
    features,
    row_bytes,
    rule: tl.constexpr,
    block_rows: tl.constexpr,
    block_bytes: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * block_rows + tl.arange(0, block_rows)
    byte = tl.program_id(1) * block_bytes + tl.arange(0, block_bytes)
    bit = tl.arange(0, 8)
    feature = byte[:, None] * 8 + bit[None, :]
    is_feature = feature < features
    frozen = (tl.load(mask + feature, mask=is_feature, other=0) != 0)[None, :, :]
    t = tl.load(threshold + feature, mask=is_feature, other=0.0)[None, :, :]
    o = tl.load(offset + feature, mask=is_feature, other=0.0)[None, :, :]
    c = tl.load(center + feature, mask=is_feature, other=0.0)[None, :, :]
    a, b = tl.load(amplitude), tl.where(frozen, tl.load(window), tl.load(bound))
    index = row[:, None, None] * features + feature[None, :, :]
    live = (row < rows)[:, None, None] & is_feature[None, :, :]
    v = tl.load(value + index, mask=live, other=0.0).to(tl.float32)
    p = tl.load(pre_activation + index, mask=live, other=0.0).to(tl.float32)
    low, high = c - b, c + b
    above = p >= t
    soft = tl.where(v > high, high, tl.where(v < low, low, v))
    result = tl.where(frozen, tl.where(above, o + a, o - a), soft)
    tl.store(output + index, result.to(output.dtype.element_ty), mask=live)
    passes = _passes(frozen, (v >= low) & (v <= high), rule) & live
    upper = tl.where(frozen, above, v > c) & live
    place = (row[:, None] * row_bytes + byte[None, :]).to(tl.int64)
    in_row = (row < rows)[:, None] & (byte < row_bytes)[None, :]
    tl.store(passes_bits + place, tl.sum(passes.to(tl.int32) << bit[None, None, :], axis=2).to(tl.uint8), mask=in_row)
    tl.store(upper_bits + place, tl.sum(upper.to(tl.int32) << bit[None, None, :], axis=2).to(tl.uint8), mask=in_row)


@triton.jit
def _activation_grad_kernel(
    grad,
    passes_bits,
    upper_bits,
    mask,
    output,
    sums,
    rows,
    rows_per_split,
    features,
    row_bytes,
    block_rows: tl.constexpr,
    block_bytes: tl.constexpr,
):
    byte = tl.program_id(0) * block_bytes + tl.arange(0, block_bytes)
    bit = tl.arange(0, 8)
    feature = byte[:, None] * 8 + bit[None, :]
    is_feature = feature < features
    frozen = (tl.load(mask + feature, mask=is_feature, other=0) != 0)[None, :, :]
    passed_sum = tl.zeros((block_bytes, 8), tl.float64)
    held_sum = tl.zeros((block_bytes, 8), tl.float64)
    upper_sum = tl.zeros((block_bytes, 8), tl.float64)
    split = tl.program_id(1)
    begin = split * rows_per_split
    end = tl.minimum(begin + rows_per_split, rows)
    for first in range(begin, end, block_rows):
        row = (first + tl.arange(0, block_rows)).to(tl.int64)
        in_row = (row < end)[:, None] & (byte < row_bytes)[None, :]
        place = row[:, None] * row_bytes + byte[None, :]
        passes = tl.load(passes_bits + place, mask=in_row, other=0).to(tl.int32)
        upper = tl.load(upper_bits + place, mask=in_row, other=0).to(tl.int32)
        is_passed = ((passes[:, :, None] >> bit[None, None, :]) & 1) != 0
        is_upper = ((upper[:, :, None] >> bit[None, None, :]) & 1) != 0
        index = row[:, None, None] * features + feature[None, :, :]
        live = (row < end)[:, None, None] & is_feature[None, :, :]
        g = tl.load(grad + index, mask=live, other=0.0).to(tl.float32)
        passed = tl.where(is_passed, g, 0.0)
        held = tl.where(frozen | (is_passed == 0), g, 0.0)
        tl.store(output + index, passed.to(output.dtype.element_ty), mask=live)
        passed_sum += tl.sum(passed.to(tl.float64), axis=0)
        held_sum += tl.sum(held.to(tl.float64), axis=0)
        upper_sum += tl.sum(tl.where(is_upper, held, 0.0).to(tl.float64), axis=0)
    target = sums + split.to(tl.int64) * 3 * features + feature
    tl.store(target, passed_sum, mask=is_feature)
    tl.store(target + features, held_sum, mask=is_feature)
    tl.store(target + 2 * features, upper_sum, mask=is_feature)


# What [`~hf_stompp.ops.operators.declare`] registers: each fills its first argument, the result, and returns it; sums
# over pieces come in a tensor of their own.


def masked_weight(
    output: Tensor, weight: Tensor, mask: Tensor, scale: Tensor, clip: float, dtype: torch.dtype
) -> Tensor:
    weight, mask, scale = weight.contiguous(), mask.contiguous(), scale.contiguous()
    size = weight.numel()
    if size:
        grid = (triton.cdiv(size, _ELEMENTS),)
        _weight_kernel[grid](weight, mask, scale, output, clip, size, weight.shape[-1], block=_ELEMENTS)
    return output


def masked_weight_grad(
    output: Tensor, grad: Tensor, weight: Tensor, mask: Tensor, scale: Tensor, *rule: Any
) -> Tensor:
    clip, surrogate, window = rule
    grad, weight, mask, scale = grad.contiguous(), weight.contiguous(), mask.contiguous(), scale.contiguous()
    size, number = weight.numel(), SURROGATES[surrogate].number
    if size:
        _weight_grad_kernel[(triton.cdiv(size, _ELEMENTS),)](
            grad, weight, mask, scale, output, clip, window, size, weight.shape[-1], rule=number, block=_ELEMENTS
        )
    return output


def masked_activation(result: tuple[Tensor, ...], *arguments: Any) -> tuple[Tensor, ...]:
    value, pre_activation, mask, threshold, offset, amplitude, center, bound, surrogate, window = arguments
    features, rows, row_bytes = value.shape[-1], value.shape[:-1].numel(), result[1].shape[-1]
    if rows:
        threshold, offset, center = (t.float().expand(features).contiguous() for t in (threshold, offset, center))
        _activation_kernel[(triton.cdiv(rows, _ROWS), triton.cdiv(row_bytes, _BYTES))](
            *(value.contiguous(), pre_activation.contiguous(), mask.contiguous(), threshold, offset),
            *(amplitude.float(), center, bound.float(), window.float(), *result, rows, features, row_bytes),
            rule=SURROGATES[surrogate].number,
            block_rows=_ROWS,
            block_bytes=_BYTES,
        )
    return result


def masked_activation_grad(
    result: tuple[Tensor, Tensor], grad: Tensor, passes: Tensor, upper: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor]:
    output, sums = result
    features, rows, row_bytes = grad.shape[-1], grad.shape[:-1].numel(), passes.shape[-1]
    pieces = grad.new_zeros((_ROW_SPLITS, *sums.shape), dtype=sums.dtype)
    if rows:
        _activation_grad_kernel[(triton.cdiv(row_bytes, _BYTES), _ROW_SPLITS)](
            *(grad.contiguous(), passes.contiguous(), upper.contiguous(), mask.contiguous(), output, pieces),
            *(rows, triton.cdiv(rows, _ROW_SPLITS), features, row_bytes),
            block_rows=_ROWS,
            block_bytes=_BYTES,
        )
    return output, pieces.sum(dim=0)
