"""
The operators `torch.ops.hf_stompp.*`: their schemas, what they refuse, the shapes they return, and the reference as
their default implementation. Devices register faster ones against these.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import reference
from .reference import packed_bytes


FLOATS = (torch.float32, torch.bfloat16, torch.float16)

library = torch.library.Library("hf_stompp", "DEF")

SCHEMAS = (
    "pack_sign(Tensor input, Tensor? threshold=None) -> (Tensor bits, Tensor popcounts)",
    "binary_linear(Tensor input, Tensor? threshold, Tensor packed_weight, int in_features, Tensor scale, "
    "Tensor? bias, ScalarType dtype) -> Tensor",
    "binary_linear_sign(Tensor input, Tensor? threshold, Tensor packed_weight, int in_features, Tensor scale, "
    "Tensor? bias, ScalarType dtype, Tensor? output_threshold) -> Tensor",
    "byte_linear(Tensor input, Tensor packed_weight, int in_features, Tensor scale, Tensor? bias, ScalarType dtype) "
    "-> Tensor",
    "layer_norm_sign(Tensor input, Tensor? residual, Tensor weight, Tensor bias, float epsilon, Tensor? threshold) -> "
    "(Tensor output, Tensor bits)",
    "sign_product(Tensor packed_weight, int in_features, Tensor vector, bool transposed) -> Tensor",
    "fold(Tensor packed_weight, Tensor row_scale, Tensor offset, Tensor amplitude, Tensor? bias, int in_features) -> "
    "(Tensor scale, Tensor constant)",
    "masked_weight(Tensor weight, Tensor mask, Tensor scale, float clip, ScalarType dtype) -> Tensor",
    "masked_weight_grad(Tensor grad, Tensor weight, Tensor mask, Tensor scale, float clip, str surrogate, "
    "float window) -> Tensor",
    "masked_activation(Tensor value, Tensor pre_activation, Tensor mask, Tensor threshold, Tensor offset, "
    "Tensor amplitude, Tensor center, Tensor bound, str surrogate, Tensor window) -> "
    "(Tensor output, Tensor passes, Tensor upper)",
    "masked_activation_grad(Tensor grad, Tensor passes, Tensor upper, Tensor mask) -> "
    "(Tensor grad_value, Tensor sums)",
)

for _schema in SCHEMAS:
    library.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))


def _check_vector(op: str, name: str, vector: Tensor | None, size: int, input: Tensor) -> None:
    if vector is None:
        return
    if vector.dtype != torch.float32:
        raise TypeError(f"hf_stompp::{op}: {name} must be float32, got {vector.dtype}")
    if vector.shape != (size,):
        raise ValueError(f"hf_stompp::{op}: {name} must have shape ({size},), got {tuple(vector.shape)}")
    _check_device(op, name, vector, input)


def _check_device(op: str, name: str, tensor: Tensor, input: Tensor) -> None:
    if tensor.device != input.device:
        raise ValueError(f"hf_stompp::{op}: {name} is on {tensor.device}, the input on {input.device}")


def check_pack_sign(input: Tensor, threshold: Tensor | None) -> None:
    """
    Checks the arguments of `pack_sign`.

    Raises:
        TypeError: a dtype is not among those allowed.
        ValueError: a shape does not fit, or tensors are on different devices.
    """
    if input.dtype not in FLOATS:
        raise TypeError(f"hf_stompp::pack_sign: input must be float32, bfloat16 or float16, got {input.dtype}")
    shape = input.shape
    if not shape or shape[-1] < 1:
        raise ValueError(
            f"hf_stompp::pack_sign: input must have a last dimension of at least one feature, got shape {tuple(shape)}"
        )
    _check_vector("pack_sign", "threshold", threshold, shape[-1], input)


def check_binary_linear(
    op: str,
    input: Tensor,
    threshold: Tensor | None,
    packed_weight: Tensor,
    in_features: int,
    scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    output_threshold: Tensor | None = None,
) -> None:
    """
    Checks the arguments of `binary_linear` and `binary_linear_sign`.

    Raises:
        TypeError: a dtype is not among those allowed.
        ValueError: a shape does not fit, or tensors are on different devices.
    """
    is_bits = input.dtype == torch.uint8
    if not is_bits and input.dtype not in FLOATS:
        raise TypeError(
            f"hf_stompp::{op}: input must be float32, bfloat16, float16, or uint8 bits of pack_sign, got {input.dtype}"
        )
    if dtype not in FLOATS:
        raise TypeError(f"hf_stompp::{op}: dtype must be float32, bfloat16 or float16, got {dtype}")
    if packed_weight.dtype != torch.uint8:
        raise TypeError(f"hf_stompp::{op}: packed_weight must be uint8, got {packed_weight.dtype}")
    if in_features < 1:
        raise ValueError(f"hf_stompp::{op}: in_features must be at least 1, got {in_features}")
    if is_bits and threshold is not None:
        raise ValueError(f"hf_stompp::{op}: a threshold was given for an input that is bits already")
    row_bytes = packed_bytes(in_features)
    last, shape, weight_shape = row_bytes if is_bits else in_features, input.shape, packed_weight.shape
    if not shape or shape[-1] != last:
        raise ValueError(
            f"hf_stompp::{op}: the last dimension of the input must be {last} "
            f"({'bytes' if is_bits else 'in_features'}), got shape {tuple(shape)}"
        )
    if len(weight_shape) != 2 or weight_shape[1] != row_bytes:
        raise ValueError(
            f"hf_stompp::{op}: packed_weight must have shape (out_features, {row_bytes}) for in_features="
            f"{in_features}, got {tuple(weight_shape)}"
        )
    _check_device(op, "packed_weight", packed_weight, input)
    _check_vector(op, "threshold", threshold, in_features, input)
    _check_vector(op, "scale", scale, weight_shape[0], input)
    _check_vector(op, "bias", bias, weight_shape[0], input)
    _check_vector(op, "output_threshold", output_threshold, weight_shape[0], input)


MAX_BYTE_FEATURES = (2**31 - 1) // 254
"""More features than this could give a sum of bytes of which int32 does not hold the double, which kernels form."""


def check_byte_linear(input: Tensor, packed_weight: Tensor, in_features: int, *layer: Any) -> None:
    """
    Checks the arguments of `byte_linear`.

    Raises:
        TypeError: a dtype is not among those allowed.
        ValueError: a shape does not fit, in_features is so large that int32 would not hold the sums, or tensors are on
            different devices.
    """
    if input.dtype not in FLOATS:
        raise TypeError(f"hf_stompp::byte_linear: input must be float32, bfloat16 or float16, got {input.dtype}")
    if in_features > MAX_BYTE_FEATURES:
        raise ValueError(
            f"hf_stompp::byte_linear: in_features must be at most {MAX_BYTE_FEATURES}, or sums may exceed int32; got "
            f"{in_features}"
        )
    check_binary_linear("byte_linear", input, None, packed_weight, in_features, *layer)


def check_layer_norm_sign(
    input: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    epsilon: float,
    threshold: Tensor | None,
) -> None:
    """
    Checks the arguments of `layer_norm_sign`.

    Raises:
        TypeError: a dtype is not among those allowed.
        ValueError: a shape does not fit, epsilon is no positive number, or tensors are on different devices.
    """
    op = "layer_norm_sign"
    if input.dtype not in FLOATS:
        raise TypeError(f"hf_stompp::{op}: input must be float32, bfloat16 or float16, got {input.dtype}")
    shape = input.shape
    if not shape or shape[-1] < 1:
        raise ValueError(
            f"hf_stompp::{op}: input must have a last dimension of at least one feature, got shape {tuple(shape)}"
        )
    if residual is not None:
        if residual.dtype != input.dtype:
            raise TypeError(
                f"hf_stompp::{op}: residual must be of the dtype of the input, {input.dtype}, got {residual.dtype}"
            )
        if residual.shape != shape:
            raise ValueError(f"hf_stompp::{op}: residual must have shape {tuple(shape)}, got {tuple(residual.shape)}")
        _check_device(op, "residual", residual, input)
    if weight.dtype not in (torch.float32, input.dtype):
        raise TypeError(
            f"hf_stompp::{op}: weight must be float32 or of the dtype of the input, {input.dtype}, got {weight.dtype}"
        )
    if bias.dtype != weight.dtype:
        raise TypeError(f"hf_stompp::{op}: bias must be of the dtype of weight, {weight.dtype}, got {bias.dtype}")
    for name, vector in (("weight", weight), ("bias", bias)):
        if vector.shape != shape[-1:]:
            raise ValueError(f"hf_stompp::{op}: {name} must have shape ({shape[-1]},), got {tuple(vector.shape)}")
        _check_device(op, name, vector, input)
    if not epsilon > 0:
        raise ValueError(f"hf_stompp::{op}: epsilon must be positive, got {epsilon}")
    _check_vector(op, "threshold", threshold, shape[-1], input)


def _check_packed_weight(op: str, packed_weight: Tensor, in_features: int) -> None:
    if packed_weight.dtype != torch.uint8:
        raise TypeError(f"hf_stompp::{op}: packed_weight must be uint8, got {packed_weight.dtype}")
    shape = packed_weight.shape
    if in_features < 1 or len(shape) != 2 or shape[1] != packed_bytes(in_features):
        raise ValueError(
            f"hf_stompp::{op}: packed_weight must have shape (out_features, packed bytes of in_features="
            f"{in_features}), got {tuple(shape)}"
        )


def check_sign_product(packed_weight: Tensor, in_features: int, vector: Tensor, transposed: bool) -> None:
    """
    Checks the arguments of `sign_product`.

    Raises:
        TypeError: a dtype is not among those allowed.
        ValueError: a shape does not fit, or tensors are on different devices.
    """
    _check_packed_weight("sign_product", packed_weight, in_features)
    if vector.dtype != torch.float64:
        raise TypeError(f"hf_stompp::sign_product: vector must be float64, got {vector.dtype}")
    shape = packed_weight.shape
    expected = shape[0] if transposed else in_features
    if vector.shape != (expected,):
        raise ValueError(f"hf_stompp::sign_product: vector must have shape ({expected},), got {tuple(vector.shape)}")
    _check_device("sign_product", "vector", vector, packed_weight)


def check_fold(
    packed_weight: Tensor, row_scale: Tensor, offset: Tensor, amplitude: Tensor, bias: Tensor | None, in_features: int
) -> None:
    """
    Checks the arguments of `fold`.

    Raises:
        TypeError: a dtype is not among those allowed.
        ValueError: a shape does not fit, or tensors are on different devices.
    """
    _check_packed_weight("fold", packed_weight, in_features)
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
        if not tensor.is_floating_point():
            raise TypeError(f"hf_stompp::fold: {name} must be floating, got {tensor.dtype}")
        if tensor.shape not in allowed:
            raise ValueError(
                f"hf_stompp::fold: {name} must have shape {' or '.join(map(str, allowed))}, got {tuple(tensor.shape)}"
            )
        _check_device("fold", name, tensor, packed_weight)


def check_masked_weight(
    op: str,
    weight: Tensor,
    mask: Tensor,
    scale: Tensor,
    clip: float,
    grad: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> None:
    """
    Checks the arguments of `masked_weight` and `masked_weight_grad`.

    Raises:
        TypeError: a dtype is not among those allowed.
        ValueError: a shape does not fit, the clip range is no positive number, or tensors are on different devices.
    """
    floats = [("weight", weight)] + ([] if grad is None else [("grad", grad)])
    for name, tensor in floats:
        if not tensor.is_floating_point():
            raise TypeError(f"hf_stompp::{op}: {name} must be floating, got {tensor.dtype}")
    if not dtype.is_floating_point:
        raise TypeError(f"hf_stompp::{op}: dtype must be floating, got {dtype}")
    if mask.dtype != torch.bool:
        raise TypeError(f"hf_stompp::{op}: mask must be bool, got {mask.dtype}")
    if not scale.is_floating_point():
        raise TypeError(f"hf_stompp::{op}: scale must be floating, got {scale.dtype}")
    if not weight.shape:
        raise ValueError(f"hf_stompp::{op}: weight must have at least one dimension")
    expected = {"mask": weight.shape, "scale": (*weight.shape[:-1], 1), "grad": weight.shape}
    for name, other in [("mask", mask), ("scale", scale)] + ([] if grad is None else [("grad", grad)]):
        if other.shape != expected[name]:
            raise ValueError(
                f"hf_stompp::{op}: {name} must have shape {tuple(expected[name])}, got {tuple(other.shape)}"
            )
        _check_device(op, name, other, weight)
    if not clip > 0:
        raise ValueError(f"hf_stompp::{op}: clip must be positive, got {clip}")


def _check_surrogate(op: str, surrogate: str) -> None:
    if surrogate not in reference.SURROGATES:
        raise ValueError(f"hf_stompp::{op}: surrogate must be one of {list(reference.SURROGATES)}, got {surrogate!r}")


def check_masked_activation(
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
) -> None:
    """
    Checks the arguments of `masked_activation`.

    Raises:
        TypeError: a dtype is not among those allowed.
        ValueError: a shape does not fit, tensors are on different devices, or there is no such surrogate.
    """
    op = "masked_activation"
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
    _check_device(op, "pre_activation", pre_activation, value)
    _check_feature_mask(op, mask, value)
    features = value.shape[-1]
    vectors = {"threshold": threshold, "offset": offset, "center": center}
    for name, tensor in {**vectors, "amplitude": amplitude, "bound": bound, "window": window}.items():
        if not tensor.is_floating_point():
            raise TypeError(f"hf_stompp::{op}: {name} must be floating, got {tensor.dtype}")
        if tensor.shape != () and (name not in vectors or tensor.shape != (features,)):
            allowed = f"() or ({features},)" if name in vectors else "()"
            raise ValueError(f"hf_stompp::{op}: {name} must have shape {allowed}, got {tuple(tensor.shape)}")
        _check_device(op, name, tensor, value)
    _check_surrogate(op, surrogate)


def _check_feature_mask(op: str, mask: Tensor, input: Tensor) -> None:
    if mask.dtype != torch.bool:
        raise TypeError(f"hf_stompp::{op}: mask must be bool, got {mask.dtype}")
    if mask.shape != input.shape[-1:]:
        raise ValueError(f"hf_stompp::{op}: mask must have shape {tuple(input.shape[-1:])}, got {tuple(mask.shape)}")
    _check_device(op, "mask", mask, input)


def check_masked_activation_grad(grad: Tensor, passes: Tensor, upper: Tensor, mask: Tensor) -> None:
    """
    Checks the arguments of `masked_activation_grad`.

    Raises:
        TypeError: a dtype is not among those allowed.
        ValueError: a shape does not fit, or tensors are on different devices.
    """
    op = "masked_activation_grad"
    if not grad.is_floating_point():
        raise TypeError(f"hf_stompp::{op}: grad must be floating, got {grad.dtype}")
    if not grad.shape:
        raise ValueError(f"hf_stompp::{op}: grad must have at least one dimension")
    _check_feature_mask(op, mask, grad)
    shape = (*grad.shape[:-1], packed_bytes(grad.shape[-1]))
    for name, bits in (("passes", passes), ("upper", upper)):
        if bits.dtype != torch.uint8:
            raise TypeError(f"hf_stompp::{op}: {name} must be uint8, got {bits.dtype}")
        if bits.shape != shape:
            raise ValueError(f"hf_stompp::{op}: {name} must have shape {shape}, got {tuple(bits.shape)}")
        _check_device(op, name, bits, grad)


def empty_packing(input: Tensor, threshold: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """What `pack_sign` returns, without values."""
    bits = input.new_empty((*input.shape[:-1], packed_bytes(input.shape[-1])), dtype=torch.uint8)
    return bits, input.new_empty(input.shape[:-1], dtype=torch.int32)


def empty_output(input: Tensor, packed_weight: Tensor, dtype: torch.dtype) -> Tensor:
    """What `binary_linear` returns, without values."""
    return input.new_empty((*input.shape[:-1], packed_weight.shape[0]), dtype=dtype)


def empty_output_bits(input: Tensor, packed_weight: Tensor) -> Tensor:
    """What `binary_linear_sign` returns, without values."""
    return input.new_empty((*input.shape[:-1], packed_bytes(packed_weight.shape[0])), dtype=torch.uint8)


class _Shapes:
    """The operators, of whose results only shape and dtype are right."""

    pack_sign = staticmethod(empty_packing)

    @staticmethod
    def binary_linear(*layer: Any) -> Tensor:
        return empty_output(layer[0], layer[2], layer[6])

    @staticmethod
    def binary_linear_sign(*layer: Any) -> Tensor:
        return empty_output_bits(layer[0], layer[2])

    @staticmethod
    def byte_linear(*layer: Any) -> Tensor:
        return empty_output(layer[0], layer[1], layer[5])

    @staticmethod
    def layer_norm_sign(input: Tensor, *layer: Any) -> tuple[Tensor, Tensor]:
        return input.new_empty(input.shape), empty_packing(input)[0]

    @staticmethod
    def sign_product(packed_weight: Tensor, in_features: int, vector: Tensor, transposed: bool) -> Tensor:
        return vector.new_empty(in_features if transposed else packed_weight.shape[0])

    @staticmethod
    def fold(packed_weight: Tensor, *levels: Any) -> tuple[Tensor, Tensor]:
        rows = packed_weight.shape[0]
        return packed_weight.new_empty(rows, dtype=torch.float32), packed_weight.new_empty(rows, dtype=torch.float32)

    @staticmethod
    def masked_weight(weight: Tensor, mask: Tensor, scale: Tensor, clip: float, dtype: torch.dtype) -> Tensor:
        return weight.new_empty(weight.shape, dtype=dtype)

    @staticmethod
    def masked_weight_grad(grad: Tensor, weight: Tensor, *settings: Any) -> Tensor:
        return weight.new_empty(weight.shape)

    @staticmethod
    def masked_activation(value: Tensor, *settings: Any) -> tuple[Tensor, Tensor, Tensor]:
        passes, upper = (empty_packing(value)[0] for _ in range(2))
        return value.new_empty(value.shape), passes, upper

    @staticmethod
    def masked_activation_grad(grad: Tensor, *bits: Tensor) -> tuple[Tensor, Tensor]:
        return grad.new_empty(grad.shape), grad.new_empty((3, grad.shape[-1]), dtype=torch.float64)


def _checked(implementation: Callable[[], Any]) -> dict[str, Callable]:
    """The operators of an implementation, by name, with a check of their arguments before them."""

    def pack_sign(input: Tensor, threshold: Tensor | None = None) -> tuple[Tensor, Tensor]:
        check_pack_sign(input, threshold)
        return implementation().pack_sign(input, threshold)

    def binary_linear(*layer: Any) -> Tensor:
        check_binary_linear("binary_linear", *layer)
        return implementation().binary_linear(*layer)

    def binary_linear_sign(*layer: Any) -> Tensor:
        check_binary_linear("binary_linear_sign", *layer)
        return implementation().binary_linear_sign(*layer)

    def byte_linear(*layer: Any) -> Tensor:
        check_byte_linear(*layer)
        return implementation().byte_linear(*layer)

    def layer_norm_sign(*layer: Any) -> tuple[Tensor, Tensor]:
        check_layer_norm_sign(*layer)
        return implementation().layer_norm_sign(*layer)

    def sign_product(*arguments: Any) -> Tensor:
        check_sign_product(*arguments)
        return implementation().sign_product(*arguments)

    def fold(*arguments: Any) -> tuple[Tensor, Tensor]:
        check_fold(*arguments)
        return implementation().fold(*arguments)

    def masked_weight(weight: Tensor, mask: Tensor, scale: Tensor, clip: float, dtype: torch.dtype) -> Tensor:
        check_masked_weight("masked_weight", weight, mask, scale, clip, dtype=dtype)
        return implementation().masked_weight(weight, mask, scale, clip, dtype)

    def masked_weight_grad(
        grad: Tensor, weight: Tensor, mask: Tensor, scale: Tensor, clip: float, surrogate: str, window: float
    ) -> Tensor:
        check_masked_weight("masked_weight_grad", weight, mask, scale, clip, grad)
        _check_surrogate("masked_weight_grad", surrogate)
        if not window > 0:
            raise ValueError(f"hf_stompp::masked_weight_grad: window must be positive, got {window}")
        return implementation().masked_weight_grad(grad, weight, mask, scale, clip, surrogate, window)

    def masked_activation(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        check_masked_activation(*arguments)
        return implementation().masked_activation(*arguments)

    def masked_activation_grad(*arguments: Tensor) -> tuple[Tensor, Tensor]:
        check_masked_activation_grad(*arguments)
        return implementation().masked_activation_grad(*arguments)

    functions: list[Callable] = [pack_sign, binary_linear, binary_linear_sign, byte_linear, layer_norm_sign]
    functions += [sign_product, fold, masked_weight, masked_weight_grad, masked_activation, masked_activation_grad]
    return {function.__name__: function for function in functions}


def register(key: str, implementation: Callable[[], Any]) -> None:
    """
    Registers what computes the operators.

    Args:
        key (`str`): a dispatch key, such as `"CPU"`.
        implementation (`Callable`): called on every use; returns what has the functions of
            [`~hf_stompp.ops.reference`], which get arguments that have been checked.
    """
    for name, function in _checked(implementation).items():
        library.impl(name, function, key)


register("CompositeExplicitAutograd", lambda: reference)
for _name, _function in _checked(lambda: _Shapes).items():
    torch.library.register_fake(f"hf_stompp::{_name}", _function, lib=library)


def _keep_weight(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    packed_weight, ctx.in_features, _, ctx.transposed = inputs
    ctx.save_for_backward(packed_weight)


def _sign_product_grad(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (packed_weight,) = ctx.saved_tensors
    product = torch.ops.hf_stompp.sign_product
    return None, None, product(packed_weight, ctx.in_features, grad.contiguous(), not ctx.transposed), None


torch.library.register_autograd("hf_stompp::sign_product", _sign_product_grad, setup_context=_keep_weight, lib=library)


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


torch.library.register_autograd("hf_stompp::fold", _fold_grad, setup_context=_keep_levels, lib=library)
