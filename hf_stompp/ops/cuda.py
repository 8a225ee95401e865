"""
NVIDIA GPUs: finds or builds the library of CUDA kernels, and chooses what multiplies on which device. Masked
binarization is in Triton (`triton.py`).

Products of bits run in one-bit tensor-core instructions on compute capability 8.x and 9.0, and elsewhere, or where the
kernels cannot be compiled, as 8-bit products of +-1 (`eight_bit.py`).
"""

from __future__ import annotations

import ctypes
import logging
import os
import struct
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import build, eight_bit
from .native import call, check_origin, loading_lock, open_or_build


logger = logging.getLogger(__name__)

# enum hf_stompp_cuda_kernel.
KERNELS = ("mma_64x64", "mma_128x128", "wgmma_64x64", "wgmma_64x128")

_AUTO = -1

_VARIABLE = "HF_STOMPP_CUDA"

INSTALLED = Path(__file__).parent / build.CUDA_LIBRARY_NAME
"""Where the package's installation puts the library, if it is told to."""


# enum hf_stompp_cuda_status, and cudaErrorNoKernelImageForDevice.
_TOO_LARGE = -2
_NO_CODE = (-1, 209)


class CudaError(RuntimeError):
    """A CUDA kernel could not be launched; `status` is what the library said."""

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


def open_library(path: Path, handle: int | None = None) -> ctypes.CDLL:
    """See [`~hf_stompp.ops.cpu.open_library`]."""
    native = ctypes.CDLL(str(path), handle=handle)
    check_origin(native, "hf_stompp_cuda", build.cuda_source_hash())
    # The others take a record, and bytes are passed as a pointer.
    native.hf_stompp_cuda_message.restype = ctypes.c_char_p
    native.hf_stompp_cuda_check.argtypes = [ctypes.c_int64]
    native.hf_stompp_cuda_has_kernel.argtypes = [ctypes.c_int64] * 2
    native.hf_stompp_cuda_chosen.argtypes = [ctypes.c_int64] * 4
    return native


def architecture(capability: tuple[int, int]) -> str:
    """What the kernels are compiled for on a device: its compute capability, with Hopper's own instructions on 9.0."""
    return "90a" if capability == (9, 0) else "{}{}".format(*capability)


def find_or_build(capability: tuple[int, int]) -> ctypes.CDLL:
    """
    The installed library if it fits the sources, or one from the cache, built there for the device's compute
    capability where it is missing. Raises an OSError or a BuildError where there is none and none can be built.
    """
    if capability < (8, 0):
        raise build.BuildError(f"compute capability {capability[0]}.{capability[1]} is below 8.0")
    try:
        return open_library(INSTALLED)
    except OSError:
        # Not installed, or the sources have changed since.
        pass
    nvcc, target = build.find_nvcc(), architecture(capability)
    key = " ".join([build.cuda_source_hash(), target, nvcc, build.nvcc_version(nvcc)])

    def compile_kernels(path: Path) -> None:
        # Half a minute without a word would look like a hang.
        logger.warning("compiling the CUDA kernels for compute capability %s.%s with nvcc, this once", *capability)
        build.build_cuda(path, [target])

    return open_or_build("cuda", key, build.CUDA_LIBRARY_NAME, open_library, compile_kernels)


def _current_stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream


def aligned(tensor: Tensor | None) -> Tensor | None:
    """Dense, from a multiple of 16 bytes on."""
    if tensor is None:
        return None
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


class NativeKernels:
    """
    The loaded library on one device, with one kernel of `KERNELS`, or one chosen call by call when none is given.
    `stream` gives, as a number, the stream to work on for a tensor's device.

    Raises a CudaError if the library has no code for the device, or the kernel cannot run there.
    """

    def __init__(
        self,
        native: ctypes.CDLL,
        index: int,
        kernel: str | None = None,
        stream: Callable[[torch.device], int] = _current_stream,
    ) -> None:
        self.native, self.index, self.kernel = native, index, kernel
        self.path = Path(native._name)
        self._stream = stream
        self._check(native.hf_stompp_cuda_check(index))
        self.number = _AUTO if kernel is None else KERNELS.index(kernel)
        if kernel is not None and not self.has_kernel(kernel):
            raise CudaError(f"the kernel {kernel} cannot run on device {index}")

    def has_kernel(self, kernel: str) -> bool:
        """Whether a kernel runs on the device in one-bit instructions of its own."""
        return bool(self.native.hf_stompp_cuda_has_kernel(self.index, KERNELS.index(kernel)))

    @property
    def multiplies_bits(self) -> bool:
        """Whether any does."""
        return any(map(self.has_kernel, KERNELS))

    def chosen(self, rows: int, in_features: int, out_features: int) -> str | None:
        """The kernel that multiplies matrices of this size; None if there is none."""
        if self.kernel is not None:
            return self.kernel
        index = self.native.hf_stompp_cuda_chosen(self.index, rows, in_features, out_features)
        return None if index < 0 else KERNELS[index]

    def call(self, function: Callable[[bytes], int], layout: struct.Struct, place: torch.device, *fields: Any) -> None:
        """Calls a function of the library on device, stream, and these fields, see [`~hf_stompp.ops.native.call`]."""
        self._check(call(function, layout, (self.index, self._stream(place), *fields)))

    def _check(self, status: int) -> None:
        if status != 0:
            raise CudaError(self.native.hf_stompp_cuda_message(status).decode(), status)


class Device:
    """
    What runs the operators on one device. `product` is what multiplies: `"bits"` (kernels of `native`), a key of
    [`eight_bit.PRODUCTS`], or `"float32"`.

    `native` is None where there are no kernels, and `why_not` says why. With `forced` it was asked for by name: its
    errors are not passed over.
    """

    def __init__(
        self, native: NativeKernels | None, product: str, why_not: str | None = None, forced: bool = False
    ) -> None:
        self.native, self.product, self.why_not, self.forced = native, product, why_not, forced

    def attempt(
        self, kernel: Callable[[NativeKernels], Any], otherwise: Callable[[], Any], is_taken: bool = True
    ) -> Any:
        """
        `kernel(native)`; or `otherwise()`, where it does not take these arguments, where there is no library, and from
        now on if that has no code for the device. Raises a CudaError if a launch failed in another way, such as for
        want of memory or after an error of other code.
        """
        if self.native is not None and is_taken:
            try:
                return kernel(self.native)
            except CudaError as error:
                if self.forced or error.status not in (_TOO_LARGE, *_NO_CODE):
                    raise
                if error.status == _TOO_LARGE:
                    return otherwise()
                self.native, self.why_not = None, str(error)
                if self.product == "bits":
                    self.product = "int8"
                warnings.warn(
                    f"hf_stompp goes on without its CUDA kernels, which takes longer: {error}",
                    RuntimeWarning,
                    stacklevel=2,
                )
        return otherwise()


_devices: dict[int, Device] = {}

_masked: tuple[Any] | None = None


def device(of: torch.device) -> Device:
    """
    What runs the operators on a GPU, loaded or built on first use; with one warning where that cannot be done.

    The environment variable `HF_STOMPP_CUDA` names a kernel of `KERNELS`, `int8`, `float8`, or `reference`. Another
    name raises a ValueError, and one that cannot run there a RuntimeError.
    """
    index = torch.cuda.current_device() if of.index is None else of.index
    found = _devices.get(index)
    if found is None:
        with loading_lock():
            found = _devices.get(index)
            if found is None:
                found = _devices[index] = _load(index, os.environ.get(_VARIABLE) or None)
    return found


def _load(index: int, name: str | None) -> Device:
    if name not in (None, "reference", *KERNELS, *eight_bit.PRODUCTS):
        raise ValueError(
            f"{_VARIABLE} must be one of {', '.join((*KERNELS, *eight_bit.PRODUCTS))} or reference, got {name!r}"
        )
    if name == "reference":
        return Device(None, "float32", f"{_VARIABLE}=reference", forced=True)
    kernel = name if name in KERNELS else None
    target = torch.device("cuda", index)
    native, why_not = None, None
    try:
        native = NativeKernels(find_or_build(torch.cuda.get_device_capability(index)), index, kernel)
    except (OSError, build.BuildError, CudaError) as error:
        if kernel is not None:
            raise RuntimeError(f"{_VARIABLE}={kernel}: {error}. Unset it to use what can run there") from error
        why_not = str(error)
        warnings.warn(
            f"hf_stompp multiplies bits on {target} without CUDA kernels of its own, which takes longer: {error}",
            RuntimeWarning,
            stacklevel=2,
        )
    if name in eight_bit.PRODUCTS:
        reason = eight_bit.why_not(name, target)
        if reason is not None:
            raise RuntimeError(f"{_VARIABLE}={name} cannot run on {target}: {reason}. Unset it to use what can")
        return Device(native, name, why_not, forced=True)
    if native is not None and native.multiplies_bits:
        return Device(native, "bits", None, forced=kernel is not None)
    # While a graph is captured nothing can be timed.
    capturing = torch.cuda.is_current_stream_capturing()
    return Device(native, "int8" if capturing else eight_bit.choose(target) or "float32", why_not)


def masked_kernels() -> Any:
    """
    What binarizes under masks on a GPU: [`~hf_stompp.ops.triton`], tried out on first use; None, with one warning that
    says why, where it does not run.
    """
    global _masked
    if _masked is None:
        with loading_lock():
            if _masked is None:
                _masked = (_load_triton(),)
    return _masked[0]


def _load_triton() -> Any:
    try:
        from . import triton

        weight = torch.ones(1, 8, device="cuda")
        triton.masked_weight(weight.clone(), weight, weight > 0, weight[:, :1], 1.0, torch.float32)
        return triton
    # Triton compiles on the machine: what may fail there is not known beforehand, and plain PyTorch does as well.
    except Exception as error:
        warnings.warn(
            "hf_stompp binarizes on this GPU in plain PyTorch, several passes instead of one: Triton does not run "
            f"here ({type(error).__name__}: {error})",
            RuntimeWarning,
            stacklevel=2,
        )
        return None
