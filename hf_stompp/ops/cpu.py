"""The native CPU kernels: finds or builds the library, and chooses the kernel."""

from __future__ import annotations

import ctypes
import os
import platform
import struct
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from . import build
from .native import call, check_origin, loading_lock, open_or_build


# enum hf_stompp_kernel, in the order in which they are preferred.
KERNELS = ("amx", "avx512", "avx2", "neon", "scalar")

_AUTO = -1

_NO_MEMORY = 1

_VARIABLE = "HF_STOMPP_CPU"

INSTALLED = Path(__file__).parent / build.LIBRARY_NAME
"""Where the package's installation puts the library."""


def open_library(path: Path, handle: int | None = None) -> ctypes.CDLL:
    """
    Loads a native library and declares its functions. `handle` is its own, if it is loaded already. Raises an OSError
    if it cannot be loaded, or was built from other sources than those of this package.
    """
    native = ctypes.CDLL(str(path), handle=handle)
    check_origin(native, "hf_stompp", build.source_hash())
    # The others take a record, and bytes are passed as a pointer.
    native.hf_stompp_unavailable.restype = ctypes.c_char_p
    native.hf_stompp_chosen.argtypes = [ctypes.c_int, ctypes.c_int64]
    native.hf_stompp_limit.argtypes = [ctypes.c_int, ctypes.c_int64]
    native.hf_stompp_limit.restype = ctypes.c_int64
    return native


def _find_or_build() -> ctypes.CDLL:
    """
    The installed library if it fits the sources, or one from the cache, built there where it is missing. Raises an
    OSError or a BuildError.
    """
    try:
        return open_library(INSTALLED)
    except OSError:
        # Not installed, or the sources have changed since.
        pass
    compiler = build.find_compiler()
    key = " ".join([build.source_hash(), platform.machine(), *compiler, build.compiler_version(compiler)])
    return open_or_build("cpu", key, build.LIBRARY_NAME, open_library, build.build)


class NativeKernels:
    """
    The loaded library and the kernel of `KERNELS` that is to be used; the best that runs here, call by call, when none
    is given. Raises a RuntimeError that says why if the kernel cannot run here, and a BuildError if none can.
    """

    def __init__(self, native: ctypes.CDLL, kernel: str | None = None) -> None:
        self.native = native
        self.path = Path(native._name)
        self.kernel = kernel
        reason = None if kernel is None else self.unavailable(kernel)
        if reason is not None:
            raise RuntimeError(
                f"the {kernel} kernel cannot run here: {reason}. Unset {_VARIABLE} to use the best one that can, see "
                "`hf-stompp info`"
            )
        self.number = _AUTO if kernel is None else KERNELS.index(kernel)
        if native.hf_stompp_chosen(self.number, 1) < 0:
            raise build.BuildError(
                f"{self.path} has no kernel that this processor can run: set CC to another compiler, and install "
                "hf_stompp again"
            )

    def unavailable(self, kernel: str) -> str | None:
        """Why a kernel cannot run here; None if it can."""
        reason = self.native.hf_stompp_unavailable(KERNELS.index(kernel))
        return None if reason is None else reason.decode()

    def chosen(self, rows: int) -> str:
        """The kernel that multiplies `rows` rows."""
        return KERNELS[self.native.hf_stompp_chosen(self.number, rows)]

    def run_limit(self, kernel: str, steps: int) -> int:
        """
        Runs the inner instructions of a kernel on registers alone. Returns the pairs of bits that they would have
        multiplied; 0 where that cannot be measured.
        """
        return self.native.hf_stompp_limit(KERNELS.index(kernel), steps)

    @property
    def has_threads(self) -> bool:
        """Whether the library was built with OpenMP."""
        return bool(self.native.hf_stompp_has_threads())

    def call(self, function: Callable[[bytes], int], layout: struct.Struct, *fields: Any) -> None:
        """Calls a function of the library on kernel, threads, and these fields, see [`~hf_stompp.ops.native.call`]."""
        check_status(call(function, layout, (self.number, torch.get_num_threads(), *fields)))


def check_status(status: int) -> None:
    if status == _NO_MEMORY:
        raise MemoryError("hf_stompp: no memory for the working space of a binary product")
    if status != 0:
        raise RuntimeError(f"hf_stompp: the native kernel returned status {status}")


_loaded: tuple[NativeKernels | None, str | None] | None = None


def native_kernels() -> NativeKernels | None:
    """
    The kernels that run the operators on the CPU, loaded or built on first use; None where the reference runs them.

    The environment variable `HF_STOMPP_CPU` names a kernel of `KERNELS`, or `reference`. Another name raises a
    ValueError, and a kernel that cannot run here a RuntimeError.
    """
    global _loaded
    if _loaded is None:
        with loading_lock():
            if _loaded is None:
                _loaded = _load(os.environ.get(_VARIABLE) or None)
    return _loaded[0]


def why_reference() -> str | None:
    """Why the reference runs the operators on the CPU; None where native kernels do."""
    native_kernels()
    return None if _loaded is None else _loaded[1]


def _load(kernel: str | None) -> tuple[NativeKernels | None, str | None]:
    if kernel not in (None, "reference", *KERNELS):
        raise ValueError(f"{_VARIABLE} must be one of {', '.join(KERNELS)} or reference, got {kernel!r}")
    if kernel == "reference":
        return None, f"{_VARIABLE}=reference"
    try:
        return NativeKernels(_find_or_build(), kernel), None
    except (OSError, build.BuildError) as error:
        if kernel is not None:
            raise RuntimeError(f"{_VARIABLE}={kernel}: the native CPU kernels are not there: {error}") from error
        warnings.warn(
            f"hf_stompp runs binary layers in plain PyTorch, many times slower than its native kernels: {error}",
            RuntimeWarning,
            stacklevel=2,
        )
        return None, str(error)
