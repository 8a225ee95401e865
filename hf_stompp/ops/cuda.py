"""The operators on NVIDIA GPUs: fused masked binarization in Triton; the rest in plain PyTorch, for now."""

from __future__ import annotations

import threading
import warnings
from typing import Any

import torch

from . import reference
from .schema import register


_lock = threading.Lock()

_loaded: Any = None


def kernels() -> Any:
    """
    What runs the operators on a GPU: [`~hf_stompp.ops.triton`], tried out on first use, or the reference with one
    warning that says why.
    """
    global _loaded
    if _loaded is None:
        with _lock:
            if _loaded is None:
                _loaded = _load()
    return _loaded


def _load() -> Any:
    try:
        from . import triton

        weight = torch.ones(1, 8, device="cuda")
        triton.masked_weight(weight, weight > 0, weight[:, :1], 1.0, torch.float32)
        return triton
    # Triton compiles on the machine: what may fail there is not known beforehand, and plain PyTorch does as well.
    except Exception as error:
        warnings.warn(
            "hf_stompp binarizes on this GPU in plain PyTorch, several passes instead of one: Triton does not run "
            f"here ({type(error).__name__}: {error})",
            RuntimeWarning,
            stacklevel=2,
        )
        return reference


register("CUDA", kernels)
