"""
How operators `torch.ops.hf_stompp.*` are declared, and the checks that they share.

A family of operators is one file. For each operator it holds, in this order: the schema; the meta function, which
checks the arguments and returns the result without values; the reference in plain PyTorch, which every kernel must
equal bit for bit; the gradient, where the operator has one of its own; the call of the CPU's kernels, and of a GPU's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from .bits import packed_bytes
from .cpu import native_kernels
from .cuda import device, masked_kernels


FLOATS = (torch.float32, torch.bfloat16, torch.float16)

library = torch.library.Library("hf_stompp", "DEF")


@dataclass(frozen=True)
class Operator:
    """What [`declare`] was told of an operator."""

    meta: Callable[..., Any]
    reference: Callable[..., Any]
    takes: Callable[..., bool] | None
    cpu: Callable[..., Any] | None
    cuda: Callable[..., Any] | None
    triton: Callable[..., Any] | None

    def run(self, entry: Callable[..., Any] | None, find_kernels: Callable[[Tensor], Any], *arguments: Any) -> Any:
        """Checks the arguments; then kernels are looked for, and compute the operator by `entry`, or the reference."""
        result = [self.meta(*arguments)]
        kernels = find_kernels(arguments[0])
        if kernels is None or entry is None or (self.takes is not None and not self.takes(*arguments)):
            # Its memory is free again while the reference runs.
            result.clear()
            return self.reference(*arguments)
        # Handed over: an entry that does not fill it can let go of it.
        return entry(kernels, result.pop(), *arguments)


def _run_in_triton(name: str, kernels: Any, result: Any, *arguments: Any) -> Any:
    # Triton launches on the current device, whatever its tensors are on.
    with torch.cuda.device_of(arguments[0]):
        return getattr(kernels, name)(result, *arguments)


OPERATORS: dict[str, Operator] = {}
"""All operators by name."""


def declare(
    schema: str,
    meta: Callable[..., Any],
    reference: Callable[..., Any],
    *,
    takes: Callable[..., bool] | None = None,
    cpu: Callable[..., Any] | None = None,
    cuda: Callable[..., Any] | None = None,
    in_triton: bool = False,
) -> None:
    """
    Defines an operator, and registers what computes it.

    `meta` is called with the arguments in front of every implementation, and alone for tensors without values. It
    raises a TypeError (for a dtype) or a ValueError (shapes, numbers, tensors on different devices) for what does not
    fit, and returns new dense tensors. `reference` computes the operator in plain PyTorch, where nothing else does.

    `takes` tells whether kernels compute it on these arguments; they always do when it is not given. `cpu` is called
    as `(kernels, result, *arguments) -> result` with [`~hf_stompp.ops.cpu.NativeKernels`] and what `meta` returned,
    to be filled; `cuda` likewise with the [`~hf_stompp.ops.cuda.Device`] of the first argument. With `in_triton`
    [`~hf_stompp.ops.triton`] has, in its place, a function of the operator's name, `(result, *arguments) -> result`.
    """
    name = schema.partition("(")[0]
    triton = partial(_run_in_triton, name) if in_triton else None
    operator = OPERATORS[name] = Operator(meta, reference, takes, cpu, cuda, triton)
    library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.register_fake(f"hf_stompp::{name}", meta, lib=library)
    library.impl(name, partial(operator.run, None, lambda input: None), "CompositeExplicitAutograd")
    if cpu is not None:
        library.impl(name, partial(operator.run, cpu, lambda input: native_kernels()), "CPU")
    if cuda is not None:
        library.impl(name, partial(operator.run, cuda, lambda input: device(input.device)), "CUDA")
    if triton is not None:
        library.impl(name, partial(operator.run, triton, lambda input: masked_kernels()), "CUDA")


def on_kernels(entry: str, kernels: Any) -> SimpleNamespace:
    """
    The operators by name, on kernels of one's choice, None for the reference: for measurements and tests. `entry` is
    `"cpu"`, `"cuda"` or `"triton"`, whose functions are called with the kernels.
    """
    functions = {
        name: partial(operator.run, getattr(operator, entry), lambda input: kernels)
        for name, operator in OPERATORS.items()
    }
    return SimpleNamespace(**functions)


def check_floats(op: str, input: Tensor) -> None:
    if input.dtype not in FLOATS:
        raise TypeError(f"hf_stompp::{op}: input must be float32, bfloat16 or float16, got {input.dtype}")


def check_rows(op: str, input: Tensor) -> None:
    check_floats(op, input)
    shape = input.shape
    if not shape or shape[-1] < 1:
        raise ValueError(
            f"hf_stompp::{op}: input must have a last dimension of at least one feature, got shape {tuple(shape)}"
        )


def check_floating(op: str, name: str, tensor: Tensor | None) -> None:
    if tensor is not None and not tensor.is_floating_point():
        raise TypeError(f"hf_stompp::{op}: {name} must be floating, got {tensor.dtype}")


def check_dtype(op: str, name: str, tensor: Tensor, dtype: torch.dtype) -> None:
    if tensor.dtype != dtype:
        raise TypeError(f"hf_stompp::{op}: {name} must be {str(dtype).removeprefix('torch.')}, got {tensor.dtype}")


def check_device(op: str, name: str, tensor: Tensor, device: torch.device) -> None:
    if tensor.device != device:
        raise ValueError(f"hf_stompp::{op}: {name} is on {tensor.device}, the input on {device}")


def check_place(op: str, name: str, tensor: Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    if tensor.shape != shape:
        raise ValueError(f"hf_stompp::{op}: {name} must have shape {tuple(shape)}, got {tuple(tensor.shape)}")
    check_device(op, name, tensor, device)


def check_packed_weight(op: str, packed_weight: Tensor, in_features: int) -> None:
    check_dtype(op, "packed_weight", packed_weight, torch.uint8)
    shape, row_bytes = packed_weight.shape, packed_bytes(in_features)
    if in_features < 1 or len(shape) != 2 or shape[1] != row_bytes:
        raise ValueError(
            f"hf_stompp::{op}: packed_weight must have shape (out_features, {row_bytes}) for in_features="
            f"{in_features}, got {tuple(shape)}"
        )


def check_vector(op: str, name: str, vector: Tensor | None, size: int, device: torch.device) -> None:
    if vector is None:
        return
    # At once, since every call of a layer comes here several times.
    if vector.dtype != torch.float32 or vector.shape != (size,) or vector.device != device:
        check_dtype(op, name, vector, torch.float32)
        check_place(op, name, vector, (size,), device)
