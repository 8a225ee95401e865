"""Scale and bias of a product of bits that equals a layer on levels: `fold`, and `sign_product`, which it needs."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import cuda
from .bits import unpack_signs
from .cpu import NativeKernels
from .operators import check_device, check_dtype, check_floating, check_packed_weight, check_place, declare, library


SIGN_PRODUCT = "sign_product(Tensor packed_weight, int in_features, Tensor vector, bool transposed) -> Tensor"

FOLD = (
    "fold(Tensor packed_weight, Tensor row_scale, Tensor offset, Tensor amplitude, Tensor? bias, int in_features) -> "
    "(Tensor scale, Tensor constant)"
)


def _sign_product_meta(packed_weight: Tensor, in_features: int, vector: Tensor, transposed: bool) -> Tensor:
    check_packed_weight("sign_product", packed_weight, in_features)
    check_dtype("sign_product", "vector", vector, torch.float64)
    rows = packed_weight.shape[0]
    read, written = (rows, in_features) if transposed else (in_features, rows)
    check_place("sign_product", "vector", vector, (read,), packed_weight.device)
    return vector.new_empty(written)


def sign_product(packed_weight: Tensor, in_features: int, vector: Tensor, transposed: bool) -> Tensor:
    """
    Product of a packed weight with one vector, `signs @ vector`, or `vector @ signs`.

    Args:
        packed_weight (`Tensor` of shape `(out_features, packed_bytes(in_features))`): uint8.
        in_features (`int`).
        vector (`Tensor` of shape `(in_features,)`, or `(out_features,)` if transposed): float64.
        transposed (`bool`).

    Returns:
        `Tensor` of shape `(out_features,)`, or `(in_features,)` if transposed: float64, summed in whatever order.
    """
    signs = unpack_signs(packed_weight, in_features).double()
    return vector @ signs if transposed else signs @ vector


def _keep_weight(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    packed_weight, ctx.in_features, _, ctx.transposed = inputs
    ctx.save_for_backward(packed_weight)


def _sign_product_grad(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (packed_weight,) = ctx.saved_tensors
    product = torch.ops.hf_stompp.sign_product
    return None, None, product(packed_weight, ctx.in_features, grad.contiguous(), not ctx.transposed), None


_CPU_RECORD = struct.Struct("8q")  # struct hf_stompp_sign_product


def _sign_product_on_cpu(
    kernels: NativeKernels, output: Tensor, packed_weight: Tensor, in_features: int, vector: Tensor, transposed: bool
) -> Tensor:
    record = packed_weight, packed_weight.shape[0], in_features, transposed, vector, output
    kernels.call(kernels.native.hf_stompp_sign_product, _CPU_RECORD, *record)
    return output


_CUDA_PRODUCT = struct.Struct("8q")  # struct hf_stompp_cuda_vector_product


def _sign_product_on_cuda(on: cuda.Device, output: Tensor, *arguments: Any) -> Tensor:
    packed_weight, in_features, vector, transposed = arguments

    def launch(native: cuda.NativeKernels) -> Tensor:
        record = packed_weight, packed_weight.shape[0], in_features, transposed, vector, output
        native.call(native.native.hf_stompp_cuda_sign_product, _CUDA_PRODUCT, vector.device, *record)
        return output

    return on.attempt(launch, lambda: sign_product(*arguments))


declare(SIGN_PRODUCT, _sign_product_meta, sign_product, cpu=_sign_product_on_cpu, cuda=_sign_product_on_cuda)
torch.library.register_autograd("hf_stompp::sign_product", _sign_product_grad, setup_context=_keep_weight, lib=library)


def _fold_meta(
    packed_weight: Tensor, row_scale: Tensor, offset: Tensor, amplitude: Tensor, bias: Tensor | None, in_features: int
) -> tuple[Tensor, Tensor]:
    check_packed_weight("fold", packed_weight, in_features)
    rows = packed_weight.shape[0]
    shapes: dict[str, tuple[Tensor | None, list[tuple[int, ...]]]] = {
        "row_scale": (row_scale, [(rows, 1)]),
        "offset": (offset, [(), (in_features,)]),
        "amplitude": (amplitude, [()]),
        "bias": (bias, [(rows,)]),
    }
    for name, (tensor, allowed) in shapes.items():
        if tensor is None:
            continue
        check_floating("fold", name, tensor)
        if tensor.shape not in allowed:
            raise ValueError(
                f"hf_stompp::fold: {name} must have shape {' or '.join(map(str, allowed))}, got {tuple(tensor.shape)}"
            )
        check_device("fold", name, tensor, packed_weight.device)
    return packed_weight.new_empty(rows, dtype=torch.float32), packed_weight.new_empty(rows, dtype=torch.float32)


def fold(
    packed_weight: Tensor,
    row_scale: Tensor,
    offset: Tensor,
    amplitude: Tensor,
    bias: Tensor | None,
    in_features: int,
    product: Callable[[Tensor, int, Tensor, bool], Tensor] = sign_product,
) -> tuple[Tensor, Tensor]:
    """
    Scale and bias of the integer product that equals a linear layer on two-level inputs and two-level weights.

    With inputs `offset + amplitude * s` (`s` = +-1), `sum_k row_scale * v_k * (offset_k + amplitude * s_k) + bias` is
    `(row_scale * amplitude) * sum_k v_k s_k + (bias + row_scale * sum_k v_k offset_k)`. Sums are in float64 and
    rounded once. As an operator differentiable in offset, amplitude and bias.

    Args:
        packed_weight (`Tensor` of shape `(out_features, packed_bytes(in_features))`): uint8, the bits of `v`.
        row_scale (`Tensor` of shape `(out_features, 1)`): floating.
        offset (`Tensor` of shape `(in_features,)` or `()`): floating.
        amplitude (`Tensor` of shape `()`): floating.
        bias (`Tensor` of shape `(out_features,)`, *optional*): floating.
        in_features (`int`).
        product (`Callable`, *optional*): [`sign_product`], or a kernel for it. No argument of the operator.

    Returns:
        `tuple(Tensor, Tensor)`: scale and bias, both float32 of shape `(out_features,)`.
    """
    row_scale = row_scale.double().flatten()
    offset = offset.double().expand(in_features).contiguous()
    constant = row_scale * product(packed_weight, in_features, offset, False)
    if bias is not None:
        constant = constant + bias.double()
    return (row_scale * amplitude.double()).float(), constant.float()


def _keep_levels(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    packed_weight, row_scale, offset, amplitude, bias, ctx.in_features = inputs
    ctx.save_for_backward(packed_weight, row_scale)
    ctx.offset_shape = offset.shape
    ctx.dtypes = offset.dtype, amplitude.dtype, None if bias is None else bias.dtype


def _fold_grad(ctx: Any, grad_scale: Tensor, grad_constant: Tensor) -> tuple[Tensor | None, ...]:
    packed_weight, row_scale = ctx.saved_tensors
    offset_dtype, amplitude_dtype, bias_dtype = ctx.dtypes
    row_scale = row_scale.double().flatten()
    grad_offset = grad_amplitude = grad_bias = None
    if ctx.needs_input_grad[2]:
        product = torch.ops.hf_stompp.sign_product
        grad_offset = product(packed_weight, ctx.in_features, grad_constant.double() * row_scale, True)
        grad_offset = grad_offset.sum_to_size(ctx.offset_shape).to(offset_dtype)
    if ctx.needs_input_grad[3]:
        grad_amplitude = (grad_scale.double() * row_scale).sum().to(amplitude_dtype)
    if ctx.needs_input_grad[4]:
        grad_bias = grad_constant.to(bias_dtype)
    return None, None, grad_offset, grad_amplitude, grad_bias, None


def _fold_on_cpu(kernels: NativeKernels, result: tuple[Tensor, Tensor], *levels: Any) -> tuple[Tensor, Tensor]:
    def product(*arguments: Any) -> Tensor:
        return _sign_product_on_cpu(kernels, _sign_product_meta(*arguments), *arguments)

    packed_weight, row_scale, offset, amplitude, bias, in_features = levels
    return fold(packed_weight, row_scale, offset, amplitude, bias, in_features, product)


_CUDA_FOLDING = struct.Struct("12q")  # struct hf_stompp_cuda_folding


def _fold_on_cuda(on: cuda.Device, result: tuple[Tensor, Tensor], *levels: Any) -> tuple[Tensor, Tensor]:
    packed_weight, row_scale, offset, amplitude, bias, in_features = levels

    def launch(native: cuda.NativeKernels) -> tuple[Tensor, Tensor]:
        floats = [None if level is None else level.float() for level in (row_scale, offset, amplitude, bias)]
        sizes = packed_weight.shape[0], in_features
        record = packed_weight, *sizes, *floats[:2], offset.dim(), *floats[2:], *result
        native.call(native.native.hf_stompp_cuda_fold, _CUDA_FOLDING, packed_weight.device, *record)
        return result

    def product(*arguments: Any) -> Tensor:
        return _sign_product_on_cuda(on, _sign_product_meta(*arguments), *arguments)

    is_narrow = all(level is None or level.dtype != torch.float64 for level in (row_scale, offset, amplitude, bias))

    def in_parts() -> tuple[Tensor, Tensor]:
        return fold(packed_weight, row_scale, offset, amplitude, bias, in_features, product)

    return on.attempt(launch, in_parts, is_narrow)


declare(FOLD, _fold_meta, fold, cpu=_fold_on_cpu, cuda=_fold_on_cuda)
torch.library.register_autograd("hf_stompp::fold", _fold_grad, setup_context=_keep_levels, lib=library)
