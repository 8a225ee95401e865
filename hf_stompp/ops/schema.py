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

library.define(
    "pack_sign(Tensor input, Tensor? threshold=None) -> (Tensor bits, Tensor popcounts)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
library.define(
    "binary_linear(Tensor input, Tensor? threshold, Tensor packed_weight, int in_features, Tensor scale, "
    "Tensor? bias, ScalarType dtype) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
library.define(
    "binary_linear_sign(Tensor input, Tensor? threshold, Tensor packed_weight, int in_features, Tensor scale, "
    "Tensor? bias, ScalarType dtype, Tensor? output_threshold) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


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

    return {"pack_sign": pack_sign, "binary_linear": binary_linear, "binary_linear_sign": binary_linear_sign}


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
