"""
The operators on NVIDIA GPUs: finds or builds the library of CUDA kernels, chooses what multiplies on which device, and
implements the operators with it. Masked binarization is in Triton (`triton.py`).

Products of bits run in one-bit tensor-core instructions on compute capability 8.x and 9.0, and elsewhere, or where the
kernels cannot be compiled, as 8-bit products of +-1 (`eight_bit.py`).
"""

from __future__ import annotations

import ctypes
import logging
import os
import struct
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import build, eight_bit, reference
from .native import check_origin, open_or_build
from .schema import empty_output, empty_output_bits, empty_packing, register


logger = logging.getLogger(__name__)

ABI_VERSION = 1

# enum hf_stompp_cuda_kernel.
KERNELS = ("mma_64x64", "mma_128x128", "wgmma_64x64", "wgmma_64x128")

_AUTO = -1

# enum hf_stompp_cuda_dtype.
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

# enum hf_stompp_cuda_signs.
_SIGNS = {torch.int8: 0, torch.float8_e4m3fn: 1}

# The records of hf_stompp_cuda.h: fields of 64 bits, pointers as numbers, NULL as 0.
_packing = struct.Struct("9q").pack
_unpacking = struct.Struct("7q").pack
_product = struct.Struct("14q").pack
_layer_norm = struct.Struct("8qd5q").pack
_vector_product = struct.Struct("8q").pack
_folding = struct.Struct("12q").pack

_LARGEST_LAYER_NORM = 4096

_VARIABLE = "HF_STOMPP_CUDA"

INSTALLED = Path(__file__).parent / build.CUDA_LIBRARY_NAME
"""Where the package's installation puts the library, if it is told to."""


class CudaError(RuntimeError):
    """A CUDA kernel could not be launched."""


def open_library(path: Path) -> ctypes.CDLL:
    """
    Loads a native library and declares its functions.

    Args:
        path (`Path`).

    Returns:
        `ctypes.CDLL`.

    Raises:
        OSError: it cannot be loaded, or was built from other sources than those of this package.
    """
    native = ctypes.CDLL(str(path))
    check_origin(native, "hf_stompp_cuda", ABI_VERSION, build.cuda_source_hash())
    native.hf_stompp_cuda_message.restype = ctypes.c_char_p
    native.hf_stompp_cuda_check.argtypes = [ctypes.c_int64]
    native.hf_stompp_cuda_has_kernel.argtypes = [ctypes.c_int64] * 2
    native.hf_stompp_cuda_chosen.argtypes = [ctypes.c_int64] * 4
    for name in ("pack_sign", "unpack_signs", "binary_linear", "layer_norm_sign", "sign_product", "fold"):
        getattr(native, f"hf_stompp_cuda_{name}").argtypes = [ctypes.c_char_p]
    return native


def architecture(capability: tuple[int, int]) -> str:
    """What the kernels are compiled for on a device: its compute capability, with Hopper's own instructions on 9.0."""
    return "90a" if capability == (9, 0) else "{}{}".format(*capability)


def find_or_build(capability: tuple[int, int]) -> ctypes.CDLL:
    """
    The installed library if it fits the sources, or one from the cache, built there where it is missing.

    Args:
        capability (`tuple[int, int]`): compute capability of the device.

    Raises:
        OSError or build.BuildError: there is none and none can be built.
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


def _aligned(tensor: Tensor) -> Tensor:
    """Dense, from a multiple of 16 bytes on."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


def _pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


class NativeKernels:
    """
    The loaded library on one device.

    Args:
        native (`ctypes.CDLL`): from [`open_library`].
        index (`int`): of the device.
        kernel (`str`, *optional*): one of `KERNELS`; chosen call by call when not given.
        stream (`Callable`, *optional*): the stream to work on, as a number, of the device of a tensor.

    Raises:
        CudaError: the library has no code for the device, or the kernel cannot run there.
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
        self._kernel = _AUTO if kernel is None else KERNELS.index(kernel)
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

    def _check(self, status: int) -> None:
        if status != 0:
            raise CudaError(self.native.hf_stompp_cuda_message(status).decode())

    def pack_sign(self, input: Tensor, threshold: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """See [`~hf_stompp.ops.reference.pack_sign`]; arguments have been checked."""
        input, threshold = input.contiguous(), None if threshold is None else threshold.contiguous()
        bits, popcounts = empty_packing(input)
        record = _packing(
            *(self.index, self._stream(input.device), input.data_ptr(), _DTYPES[input.dtype], _pointer(threshold)),
            *(popcounts.numel(), input.shape[-1], bits.data_ptr(), popcounts.data_ptr()),
        )
        self._check(self.native.hf_stompp_cuda_pack_sign(record))
        return bits, popcounts

    def unpack(self, bits: Tensor, features: int, dtype: torch.dtype) -> Tensor:
        """See [`~hf_stompp.ops.eight_bit.unpack`]: int8 or float8."""
        bits = bits.contiguous()
        signs = bits.new_empty((bits.shape[0], 8 * bits.shape[1]), dtype=dtype)
        record = _unpacking(
            *(self.index, self._stream(bits.device), bits.data_ptr(), bits.shape[0], features),
            *(signs.data_ptr(), _SIGNS[dtype]),
        )
        self._check(self.native.hf_stompp_cuda_unpack_signs(record))
        return signs

    def binary_linear(self, bits: Tensor, packed_weight: Tensor, *layer: Any) -> Tensor:
        """See [`~hf_stompp.ops.reference.binary_linear`], on packed bits; arguments have been checked."""
        output = empty_output(bits, packed_weight, layer[-1])
        self._multiply(output.data_ptr(), 0, bits, packed_weight, *layer)
        return output

    def binary_linear_sign(self, bits: Tensor, packed_weight: Tensor, *layer: Any) -> Tensor:
        """See [`~hf_stompp.ops.reference.binary_linear_sign`], on packed bits; arguments have been checked."""
        output_bits = empty_output_bits(bits, packed_weight)
        self._multiply(0, output_bits.data_ptr(), bits, packed_weight, *layer)
        return output_bits

    def _multiply(
        self,
        output: int,
        output_bits: int,
        bits: Tensor,
        packed_weight: Tensor,
        in_features: int,
        scale: Tensor,
        bias: Tensor | None,
        dtype: torch.dtype,
        output_threshold: Tensor | None = None,
    ) -> None:
        # Names, so that a copy made here lives until the call returns.
        bits, packed_weight, scale = _aligned(bits), _aligned(packed_weight), scale.contiguous()
        bias = None if bias is None else bias.contiguous()
        output_threshold = None if output_threshold is None else output_threshold.contiguous()
        record = _product(
            *(self.index, self._stream(bits.device), self._kernel, bits.data_ptr(), packed_weight.data_ptr()),
            *(scale.data_ptr(), _pointer(bias), bits.shape[:-1].numel(), in_features, packed_weight.shape[0]),
            *(output, _DTYPES[dtype], output_bits, _pointer(output_threshold)),
        )
        self._check(self.native.hf_stompp_cuda_binary_linear(record))

    def takes_layer_norm(self, input: Tensor) -> bool:
        """Whether [`layer_norm_sign`] has a kernel for rows of this width."""
        return input.shape[-1] % 8 == 0 and input.shape[-1] <= _LARGEST_LAYER_NORM

    def layer_norm_sign(
        self,
        input: Tensor,
        residual: Tensor | None,
        weight: Tensor,
        bias: Tensor,
        epsilon: float,
        threshold: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """See [`~hf_stompp.ops.reference.layer_norm_sign`]; arguments have been checked."""
        input, weight, bias = _aligned(input), _aligned(weight), _aligned(bias)
        residual = None if residual is None else _aligned(residual)
        threshold = None if threshold is None else _aligned(threshold)
        output, bits = input.new_empty(input.shape), empty_packing(input)[0]
        record = _layer_norm(
            *(self.index, self._stream(input.device), input.data_ptr(), _pointer(residual), _DTYPES[input.dtype]),
            *(weight.data_ptr(), bias.data_ptr(), _DTYPES[weight.dtype], epsilon, _pointer(threshold)),
            *(input.shape[:-1].numel(), input.shape[-1], output.data_ptr(), bits.data_ptr()),
        )
        self._check(self.native.hf_stompp_cuda_layer_norm_sign(record))
        return output, bits

    def sign_product(self, packed_weight: Tensor, in_features: int, vector: Tensor, transposed: bool) -> Tensor:
        """See [`~hf_stompp.ops.reference.sign_product`]; arguments have been checked."""
        packed_weight, vector = packed_weight.contiguous(), vector.contiguous()
        out_features = packed_weight.shape[0]
        output = vector.new_empty(in_features if transposed else out_features)
        record = _vector_product(
            *(self.index, self._stream(vector.device), packed_weight.data_ptr(), out_features, in_features),
            *(transposed, vector.data_ptr(), output.data_ptr()),
        )
        self._check(self.native.hf_stompp_cuda_sign_product(record))
        return output

    def fold(
        self,
        packed_weight: Tensor,
        row_scale: Tensor,
        offset: Tensor,
        amplitude: Tensor,
        bias: Tensor | None,
        in_features: int,
    ) -> tuple[Tensor, Tensor]:
        """See [`~hf_stompp.ops.reference.fold`]; arguments have been checked, floats are float32 or narrower."""
        # Names, so that a copy made here lives until the call returns.
        packed_weight, amplitude = packed_weight.contiguous(), amplitude.float()
        row_scale, offset = (tensor.float().contiguous() for tensor in (row_scale, offset))
        bias = None if bias is None else bias.float().contiguous()
        rows = packed_weight.shape[0]
        scale, constant = (row_scale.new_empty(rows) for _ in range(2))
        record = _folding(
            *(self.index, self._stream(packed_weight.device), packed_weight.data_ptr(), rows, in_features),
            *(row_scale.data_ptr(), offset.data_ptr(), offset.dim(), amplitude.data_ptr(), _pointer(bias)),
            *(scale.data_ptr(), constant.data_ptr()),
        )
        self._check(self.native.hf_stompp_cuda_fold(record))
        return scale, constant


class Device:
    """
    What runs the operators on one device.

    Args:
        native (`NativeKernels`, *optional*): None where there are none.
        product (`str`): what multiplies: `"bits"` (kernels of `native`), a key of [`eight_bit.PRODUCTS`], or
            `"float32"`.
        why_not (`str`, *optional*): why `native` is missing.
        forced (`bool`, *optional*, defaults to `False`): asked for by name: its errors are not passed over.
    """

    def __init__(
        self, native: NativeKernels | None, product: str, why_not: str | None = None, forced: bool = False
    ) -> None:
        self.native, self.product, self.why_not, self.forced = native, product, why_not, forced

    def attempt(self, kernel: Callable[[NativeKernels], Any], otherwise: Callable[[], Any]) -> Any:
        """`kernel(native)`, or `otherwise()` where there is no library, or from now on if a launch fails."""
        if self.native is not None:
            try:
                return kernel(self.native)
            except CudaError as error:
                if self.forced:
                    raise
                self.native, self.why_not = None, str(error)
                if self.product == "bits":
                    self.product = "int8"
                warnings.warn(
                    f"hf_stompp goes on without its CUDA kernels, which takes longer: {error}",
                    RuntimeWarning,
                    stacklevel=2,
                )
        return otherwise()


class Operators:
    """The functions of [`~hf_stompp.ops.reference`] for tensors on any NVIDIA GPU; arguments have been checked."""

    def pack_sign(self, input: Tensor, threshold: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return device(input.device).attempt(
            lambda native: native.pack_sign(input, threshold), lambda: reference.pack_sign(input, threshold)
        )

    def _bits(self, input: Tensor, threshold: Tensor | None) -> Tensor:
        return input if input.dtype == torch.uint8 else self.pack_sign(input, threshold)[0]

    def binary_linear(self, input: Tensor, threshold: Tensor | None, *layer: Any) -> Tensor:
        bits, on = self._bits(input, threshold), device(input.device)
        if on.product == "bits":
            return on.attempt(lambda native: native.binary_linear(bits, *layer), lambda: self._multiply(bits, *layer))
        return self._multiply(bits, *layer)

    def _unpack(self, packed: Tensor, features: int, dtype: torch.dtype) -> Tensor:
        return device(packed.device).attempt(
            lambda native: native.unpack(packed, features, dtype), lambda: eight_bit.unpack(packed, features, dtype)
        )

    def _multiply(self, bits: Tensor, *layer: Any) -> Tensor:
        """`binary_linear` in a product of PyTorch."""
        on = device(bits.device)
        if on.product == "float32":
            return reference.binary_linear(bits, None, *layer)
        return eight_bit.binary_linear(on.product, self._unpack, bits, *layer)

    def byte_linear(self, input: Tensor, *layer: Any) -> Tensor:
        if device(input.device).product == "float32":
            return reference.byte_linear(input, *layer)
        return eight_bit.byte_linear(self._unpack, input, *layer)

    def binary_linear_sign(self, input: Tensor, threshold: Tensor | None, *layer: Any) -> Tensor:
        bits, on = self._bits(input, threshold), device(input.device)

        def in_two_steps() -> Tensor:
            return self.pack_sign(self._multiply(bits, *layer[:-1]), layer[-1])[0]

        if on.product == "bits":
            return on.attempt(lambda native: native.binary_linear_sign(bits, *layer), in_two_steps)
        return in_two_steps()

    @torch.no_grad()
    def layer_norm_sign(self, input: Tensor, *settings: Any) -> tuple[Tensor, Tensor]:
        on = device(input.device)

        def in_two_steps() -> tuple[Tensor, Tensor]:
            output = reference.residual_layer_norm(input, *settings[:-1])
            return output, self.pack_sign(output, settings[-1])[0]

        if on.native is None or not on.native.takes_layer_norm(input):
            return in_two_steps()
        return on.attempt(lambda native: native.layer_norm_sign(input, *settings), in_two_steps)

    def sign_product(self, packed_weight: Tensor, in_features: int, vector: Tensor, transposed: bool) -> Tensor:
        arguments = packed_weight, in_features, vector, transposed
        return device(vector.device).attempt(
            lambda native: native.sign_product(*arguments), lambda: reference.sign_product(*arguments)
        )

    def fold(
        self,
        packed_weight: Tensor,
        row_scale: Tensor,
        offset: Tensor,
        amplitude: Tensor,
        bias: Tensor | None,
        in_features: int,
    ) -> tuple[Tensor, Tensor]:
        arguments = packed_weight, row_scale, offset, amplitude, bias, in_features

        def in_parts() -> tuple[Tensor, Tensor]:
            return reference.fold(*arguments, self.sign_product)

        if any(isinstance(argument, Tensor) and argument.dtype == torch.float64 for argument in arguments):
            # The kernel reads float32.
            return in_parts()
        return device(packed_weight.device).attempt(lambda native: native.fold(*arguments), in_parts)

    def masked_weight(self, *arguments: Any) -> Tensor:
        return masked_kernels().masked_weight(*arguments)

    def masked_weight_grad(self, *arguments: Any) -> Tensor:
        return masked_kernels().masked_weight_grad(*arguments)

    def masked_activation(self, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        return masked_kernels().masked_activation(*arguments)

    def masked_activation_grad(self, *arguments: Any) -> tuple[Tensor, Tensor]:
        return masked_kernels().masked_activation_grad(*arguments)


_lock = threading.Lock()

_devices: dict[int, Device] = {}

_masked: Any = None


def device(of: torch.device) -> Device:
    """
    What runs the operators on a GPU, loaded or built on first use; with one warning where that cannot be done.

    The environment variable `HF_STOMPP_CUDA` names a kernel of `KERNELS`, `int8`, `float8`, or `reference`.

    Args:
        of (`torch.device`): of type `cuda`.

    Raises:
        ValueError: the variable holds another name.
        RuntimeError: what it names cannot run there.
    """
    index = torch.cuda.current_device() if of.index is None else of.index
    found = _devices.get(index)
    if found is None:
        with _lock:
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
    What binarizes under masks on a GPU: [`~hf_stompp.ops.triton`], tried out on first use, or the reference with one
    warning that says why.
    """
    global _masked
    if _masked is None:
        with _lock:
            if _masked is None:
                _masked = _load_triton()
    return _masked


def _load_triton() -> Any:
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


_operators = Operators()

register("CUDA", lambda: _operators)
