"""
What a compiled graph need not pack twice.

Where a graph of operators is traced (by AOTAutograd, for every backend that torch.compile compiles with), the bits of
a tensor are found again by the tensor: in-place writes make another one of it there, or count up its version. Layers
that read one tensor share its bits so, and take them from the LayerNorm that put it out.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.proxy_tensor import ProxyTorchDispatchMode

from .operators import library


@dataclass(frozen=True)
class _PackedSigns:
    """Bits of a tensor relative to a threshold, in one trace."""

    trace: weakref.ref[ProxyTorchDispatchMode]
    threshold: Tensor | None
    versions: list[int]
    bits: Tensor


def _versions(*tensors: Tensor | None) -> list[int] | None:
    """How often tensors of a trace were written in place; None where that is not counted, or one is a real tensor."""
    given = [tensor for tensor in tensors if tensor is not None]
    if not all(isinstance(tensor, FakeTensor) and not tensor.is_inference() for tensor in given):
        return None
    return [tensor._version for tensor in given]


def _remember(mode: ProxyTorchDispatchMode, input: Tensor, threshold: Tensor | None, bits: Tensor) -> None:
    versions = _versions(input, threshold)
    if versions is None:
        return
    # On the tensor, so that it ends with it.
    holder: Any = input
    known = getattr(holder, "_hf_stompp_packed", ())
    holder._hf_stompp_packed = (*known, _PackedSigns(weakref.ref(mode), threshold, versions, bits))


def _recall(mode: ProxyTorchDispatchMode, input: Tensor, threshold: Tensor | None) -> Tensor | None:
    versions = _versions(input, threshold)
    for known in getattr(input, "_hf_stompp_packed", ()):
        if known.trace() is mode and known.threshold is threshold and known.versions == versions:
            return known.bits
    return None


def _pack_sign(mode: Any, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
    input, threshold = args if len(args) == 2 else (args[0], None)
    result = mode.__torch_dispatch__(func, types, args, kwargs)
    if result is NotImplemented:
        # A tensor subclass is to be asked first.
        return result
    bits, popcounts = result
    known = _recall(mode, input, threshold)
    if known is not None:
        # Where nothing reads the popcounts, the operator is dropped from the graph.
        return known, popcounts
    _remember(mode, input, threshold, bits)
    return bits, popcounts


def _layer_norm_sign(mode: Any, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
    result = mode.__torch_dispatch__(func, types, args, kwargs)
    if result is not NotImplemented:
        output, bits = result
        _remember(mode, output, args[5], bits)
    return result


def _binary_linear(mode: Any, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
    input, threshold, *layer = args
    known = _recall(mode, input, threshold)
    if known is not None:
        args = (known, None, *layer)
    return mode.__torch_dispatch__(func, types, args, kwargs)


for _name, _rule in {
    "pack_sign": _pack_sign,
    "layer_norm_sign": _layer_norm_sign,
    "binary_linear": _binary_linear,
    "binary_linear_sign": _binary_linear,
}.items():
    torch.library.register_torch_dispatch(f"hf_stompp::{_name}", ProxyTorchDispatchMode, _rule, lib=library)
