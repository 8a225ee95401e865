"""LayerNorm whose output is packed too: `layer_norm_sign`."""

from __future__ import annotations

import struct
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from . import cuda, signs
from .bits import empty_bits
from .operators import check_place, check_rows, check_vector, declare
from .signs import pack_sign


SCHEMA = (
    "layer_norm_sign(Tensor input, Tensor? residual, Tensor weight, Tensor bias, float epsilon, Tensor? threshold) -> "
    "(Tensor output, Tensor bits)"
)

_LARGEST_KERNEL = 4096


def _meta(
    input: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, epsilon: float, threshold: Tensor | None
) -> tuple[Tensor, Tensor]:
    op, dtype, device, features = "layer_norm_sign", input.dtype, input.device, input.shape[-1:]
    check_rows(op, input)
    if residual is not None:
        if residual.dtype != dtype:
            raise TypeError(
                f"hf_stompp::{op}: residual must be of the dtype of the input, {dtype}, got {residual.dtype}"
            )
        check_place(op, "residual", residual, input.shape, device)
    if weight.dtype not in (torch.float32, dtype):
        raise TypeError(
            f"hf_stompp::{op}: weight must be float32 or of the dtype of the input, {dtype}, got {weight.dtype}"
        )
    if bias.dtype != weight.dtype:
        raise TypeError(f"hf_stompp::{op}: bias must be of the dtype of weight, {weight.dtype}, got {bias.dtype}")
    check_place(op, "weight", weight, features, device)
    check_place(op, "bias", bias, features, device)
    if not epsilon > 0:
        raise ValueError(f"hf_stompp::{op}: epsilon must be positive, got {epsilon}")
    check_vector(op, "threshold", threshold, features[0], device)
    return input.new_empty(input.shape), empty_bits(input, features[0])


@torch.no_grad()
def layer_norm_sign(
    input: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    epsilon: float,
    threshold: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """
    LayerNorm over the last dimension of a sum, and the packed signs of what it puts out. Has no gradient.

    Args:
        input (`Tensor` of shape `(..., features)`): float32, bfloat16 or float16.
        residual (`Tensor`, *optional*): is added to the input, of its shape and dtype. The sum is rounded to that
            dtype, as `+` does.
        weight, bias (`Tensor` of shape `(features,)`): both float32, or both of the dtype of the input.
        epsilon (`float`): is added to the variance.
        threshold (`Tensor` of shape `(features,)`, *optional*): float32, of the signs; 0 when not given.

    Returns:
        `tuple(Tensor, Tensor)`: what [`~torch.nn.functional.layer_norm`] returns, in the dtype of the input: computed
            in float32 and rounded once where weight and bias are wider; and its bits from [`pack_sign`].
    """
    output = residual_layer_norm(input, residual, weight, bias, epsilon)
    return output, pack_sign(output, threshold)[0]


def residual_layer_norm(
    input: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, epsilon: float
) -> Tensor:
    """The first of what [`layer_norm_sign`] returns."""
    total = input if residual is None else input + residual
    # Mixed dtypes are not taken by layer_norm on every device. Half precision alone is, and on a CPU sums in another
    # order than float32 does: what a model computes is what it gives then.
    wide = total.to(weight.dtype)
    # Autocast would put out float32.
    with torch.autocast(input.device.type, enabled=False):
        return F.layer_norm(wide, weight.shape, weight, bias, epsilon).to(input.dtype)


# Without kernels for a CPU: there, LayerNorm and packing take little of the time that the products take.

_CUDA_RECORD = struct.Struct("8qd5q")  # struct hf_stompp_cuda_layer_norm


@torch.no_grad()
def _on_cuda(on: cuda.Device, result: tuple[Tensor, Tensor], input: Tensor, *settings: Any) -> tuple[Tensor, Tensor]:
    residual, weight, bias, epsilon, threshold = settings
    rows, features = input.shape[:-1].numel(), input.shape[-1]

    def launch(native: cuda.NativeKernels) -> tuple[Tensor, Tensor]:
        inputs = cuda.aligned(input), cuda.aligned(residual), input.dtype
        parameters = cuda.aligned(weight), cuda.aligned(bias), weight.dtype, epsilon, cuda.aligned(threshold)
        record = *inputs, *parameters, rows, features, *result
        native.call(native.native.hf_stompp_cuda_layer_norm_sign, _CUDA_RECORD, input.device, *record)
        return result

    def in_two_steps() -> tuple[Tensor, Tensor]:
        output = residual_layer_norm(input, residual, weight, bias, epsilon)
        return output, signs.on_cuda(on, signs.empty_packing(output), output, threshold)[0]

    return on.attempt(launch, in_two_steps, features % 8 == 0 and features <= _LARGEST_KERNEL)


declare(SCHEMA, _meta, layer_norm_sign, cuda=_on_cuda)
