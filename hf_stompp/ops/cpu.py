"""The native CPU kernels: finds or builds the library, chooses the kernel, and implements the operators with it."""

from __future__ import annotations

import ctypes
import os
import platform
import struct
import threading
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import build, reference
from .native import check_origin, open_or_build
from .schema import FLOATS, empty_output, empty_output_bits, empty_packing, register


ABI_VERSION = 4

# enum hf_stompp_kernel, in the order in which they are preferred.
KERNELS = ("amx", "avx512", "avx2", "neon", "scalar")

_AUTO = -1

# enum hf_stompp_dtype.
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.uint8: 3}

# enum hf_stompp_surrogate.
_SURROGATES = {"none": 0, "ste": 1, "clipped_ste": 2}

# The records of hf_stompp.h: fields of 64 bits, pointers as numbers, NULL as 0.
_packing = struct.Struct("9q").pack
_product = struct.Struct("16q").pack
_masked_weight = struct.Struct("6qdd6q").pack
_masked_activation = struct.Struct("20q").pack
_sign_product = struct.Struct("8q").pack

_NO_MEMORY = 1

_VARIABLE = "HF_STOMPP_CPU"

INSTALLED = Path(__file__).parent / build.LIBRARY_NAME
"""Where the package's installation puts the library."""


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
    check_origin(native, "hf_stompp", ABI_VERSION, build.source_hash())
    native.hf_stompp_unavailable.argtypes = [ctypes.c_int]
    native.hf_stompp_unavailable.restype = ctypes.c_char_p
    native.hf_stompp_chosen.argtypes = [ctypes.c_int, ctypes.c_int64]
    native.hf_stompp_limit.argtypes = [ctypes.c_int, ctypes.c_int64]
    native.hf_stompp_limit.restype = ctypes.c_int64
    for name in ("pack_sign", "binary_linear", "masked_weight", "masked_activation", "sign_product"):
        getattr(native, f"hf_stompp_{name}").argtypes = [ctypes.c_char_p]
    return native


def _find_or_build() -> ctypes.CDLL:
    """
    The installed library if it fits the sources, or one from the cache, built there where it is missing.

    Raises:
        OSError or build.BuildError: there is none and none can be built.
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
    The loaded library and the kernel that is to be used.

    Args:
        native (`ctypes.CDLL`): from [`open_library`].
        kernel (`str`, *optional*): one of `KERNELS`; the best that runs here, call by call, when not given.

    Raises:
        RuntimeError: the kernel cannot run here; says why.
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
        self._index = _AUTO if kernel is None else KERNELS.index(kernel)
        self._pack_sign, self._binary_linear = native.hf_stompp_pack_sign, native.hf_stompp_binary_linear

    def unavailable(self, kernel: str) -> str | None:
        """Why a kernel cannot run here; None if it can."""
        reason = self.native.hf_stompp_unavailable(KERNELS.index(kernel))
        return None if reason is None else reason.decode()

    def chosen(self, rows: int) -> str:
        """The kernel that multiplies `rows` rows."""
        return KERNELS[self.native.hf_stompp_chosen(self._index, rows)]

    def run_limit(self, kernel: str, steps: int) -> int:
        """
        Runs the inner instructions of a kernel on registers alone.

        Returns:
            `int`: the pairs of bits they would have multiplied; 0 where that cannot be measured.
        """
        return self.native.hf_stompp_limit(KERNELS.index(kernel), steps)

    @property
    def has_threads(self) -> bool:
        """Whether the library was built with OpenMP."""
        return bool(self.native.hf_stompp_has_threads())

    def pack_sign(self, input: Tensor, threshold: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """See [`~hf_stompp.ops.reference.pack_sign`]; arguments have been checked."""
        input, threshold = input.contiguous(), None if threshold is None else threshold.contiguous()
        bits, popcounts = empty_packing(input)
        arguments = _packing(
            self._index,
            torch.get_num_threads(),
            input.data_ptr(),
            _DTYPES[input.dtype],
            0 if threshold is None else threshold.data_ptr(),
            popcounts.numel(),
            input.shape[-1],
            bits.data_ptr(),
            popcounts.data_ptr(),
        )
        _check_status(self._pack_sign(arguments))
        return bits, popcounts

    def binary_linear(
        self,
        input: Tensor,
        threshold: Tensor | None,
        packed_weight: Tensor,
        in_features: int,
        scale: Tensor,
        bias: Tensor | None,
        dtype: torch.dtype,
    ) -> Tensor:
        """See [`~hf_stompp.ops.reference.binary_linear`]; arguments have been checked."""
        output = empty_output(input, packed_weight, dtype)
        self._multiply(input, threshold, packed_weight, in_features, scale, bias, dtype, output.data_ptr(), 0, None)
        return output

    def binary_linear_sign(
        self,
        input: Tensor,
        threshold: Tensor | None,
        packed_weight: Tensor,
        in_features: int,
        scale: Tensor,
        bias: Tensor | None,
        dtype: torch.dtype,
        output_threshold: Tensor | None,
    ) -> Tensor:
        """See [`~hf_stompp.ops.reference.binary_linear_sign`]; arguments have been checked."""
        bits = empty_output_bits(input, packed_weight)
        self._multiply(
            *(input, threshold, packed_weight, in_features, scale, bias, dtype, 0, bits.data_ptr(), output_threshold)
        )
        return bits

    def byte_linear(self, input: Tensor, packed_weight: Tensor, *layer: Any) -> Tensor:
        """See [`~hf_stompp.ops.reference.byte_linear`]; arguments have been checked."""
        in_features, scale, bias, dtype = layer
        output = empty_output(input, packed_weight, dtype)
        self._multiply(
            *(input, None, packed_weight, in_features, scale, bias, dtype, output.data_ptr(), 0, None),
            activation_bits=8,
        )
        return output

    def _multiply(
        self,
        input: Tensor,
        threshold: Tensor | None,
        packed_weight: Tensor,
        in_features: int,
        scale: Tensor,
        bias: Tensor | None,
        dtype: torch.dtype,
        output: int,
        output_bits: int,
        output_threshold: Tensor | None,
        activation_bits: int = 1,
    ) -> None:
        # Names, so that a copy made here lives until the call returns.
        input, packed_weight, scale = input.contiguous(), packed_weight.contiguous(), scale.contiguous()
        threshold = None if threshold is None else threshold.contiguous()
        bias = None if bias is None else bias.contiguous()
        output_threshold = None if output_threshold is None else output_threshold.contiguous()
        arguments = _product(
            self._index,
            torch.get_num_threads(),
            input.data_ptr(),
            _DTYPES[input.dtype],
            0 if threshold is None else threshold.data_ptr(),
            packed_weight.data_ptr(),
            scale.data_ptr(),
            0 if bias is None else bias.data_ptr(),
            input.shape[:-1].numel(),
            in_features,
            packed_weight.shape[0],
            output,
            _DTYPES[dtype],
            output_bits,
            0 if output_threshold is None else output_threshold.data_ptr(),
            activation_bits,
        )
        _check_status(self._binary_linear(arguments))

    # Plain PyTorch: on a CPU, LayerNorm and packing take little of the time that the products take.
    layer_norm_sign = staticmethod(reference.layer_norm_sign)

    def sign_product(self, packed_weight: Tensor, in_features: int, vector: Tensor, transposed: bool) -> Tensor:
        """See [`~hf_stompp.ops.reference.sign_product`]; arguments have been checked."""
        packed_weight, vector = packed_weight.contiguous(), vector.contiguous()
        out_features = packed_weight.shape[0]
        output = vector.new_empty(in_features if transposed else out_features)
        arguments = _sign_product(
            self._index,
            torch.get_num_threads(),
            packed_weight.data_ptr(),
            out_features,
            in_features,
            transposed,
            vector.data_ptr(),
            output.data_ptr(),
        )
        _check_status(self.native.hf_stompp_sign_product(arguments))
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
        """See [`~hf_stompp.ops.reference.fold`]; arguments have been checked."""
        return reference.fold(packed_weight, row_scale, offset, amplitude, bias, in_features, self.sign_product)

    def masked_weight(self, weight: Tensor, mask: Tensor, scale: Tensor, clip: float, dtype: torch.dtype) -> Tensor:
        """See [`~hf_stompp.ops.reference.masked_weight`]; arguments have been checked."""
        if not {weight.dtype, dtype} <= set(FLOATS) or scale.dtype != torch.float32:
            return reference.masked_weight(weight, mask, scale, clip, dtype)
        output = weight.new_empty(weight.shape, dtype=dtype)
        self._mask_weight(weight, mask, scale, clip, None, "none", clip, output, dtype)
        return output

    def masked_weight_grad(
        self, grad: Tensor, weight: Tensor, mask: Tensor, scale: Tensor, clip: float, surrogate: str, window: float
    ) -> Tensor:
        """See [`~hf_stompp.ops.reference.masked_weight_grad`]; arguments have been checked."""
        is_known = {weight.dtype, grad.dtype} <= set(FLOATS) and surrogate in _SURROGATES
        if not is_known or scale.dtype != torch.float32:
            return reference.masked_weight_grad(grad, weight, mask, scale, clip, surrogate, window)
        output = weight.new_empty(weight.shape)
        self._mask_weight(weight, mask, scale, clip, grad.contiguous(), surrogate, window, output, grad.dtype)
        return output

    def _mask_weight(
        self,
        weight: Tensor,
        mask: Tensor,
        scale: Tensor,
        clip: float,
        grad: Tensor | None,
        surrogate: str,
        window: float,
        output: Tensor,
        other_dtype: torch.dtype,
    ) -> None:
        weight, mask, scale = weight.contiguous(), mask.contiguous(), scale.contiguous()
        arguments = _masked_weight(
            self._index,
            torch.get_num_threads(),
            weight.data_ptr(),
            _DTYPES[weight.dtype],
            mask.data_ptr(),
            scale.data_ptr(),
            clip,
            window,
            scale.numel(),
            weight.shape[-1],
            0 if grad is None else grad.data_ptr(),
            _SURROGATES[surrogate],
            output.data_ptr(),
            _DTYPES[other_dtype],
        )
        _check_status(self.native.hf_stompp_masked_weight(arguments))

    def masked_activation(
        self,
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
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See [`~hf_stompp.ops.reference.masked_activation`]; arguments have been checked."""
        if value.dtype not in FLOATS or surrogate not in _SURROGATES:
            return reference.masked_activation(
                value, pre_activation, mask, threshold, offset, amplitude, center, bound, surrogate, window
            )
        output, passes, upper = value.new_empty(value.shape), empty_packing(value)[0], empty_packing(value)[0]
        features = value.shape[-1]
        vectors = [t.float().expand(features).contiguous() for t in (threshold, offset, center)]
        numbers = [t.float() for t in (amplitude, bound, window)]
        value, pre_activation, mask = value.contiguous(), pre_activation.contiguous(), mask.contiguous()
        arguments = _masked_activation(
            self._index,
            torch.get_num_threads(),
            value.data_ptr(),
            pre_activation.data_ptr(),
            _DTYPES[value.dtype],
            mask.data_ptr(),
            vectors[0].data_ptr(),
            vectors[1].data_ptr(),
            numbers[0].data_ptr(),
            vectors[2].data_ptr(),
            numbers[1].data_ptr(),
            numbers[2].data_ptr(),
            _SURROGATES[surrogate],
            value.shape[:-1].numel(),
            features,
            passes.data_ptr(),
            upper.data_ptr(),
            0,
            output.data_ptr(),
            0,
        )
        _check_status(self.native.hf_stompp_masked_activation(arguments))
        return output, passes, upper

    def masked_activation_grad(
        self, grad: Tensor, passes: Tensor, upper: Tensor, mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See [`~hf_stompp.ops.reference.masked_activation_grad`]; arguments have been checked."""
        if grad.dtype not in FLOATS:
            return reference.masked_activation_grad(grad, passes, upper, mask)
        output = grad.new_empty(grad.shape)
        sums = grad.new_empty((3, grad.shape[-1]), dtype=torch.float64)
        grad, passes, upper, mask = grad.contiguous(), passes.contiguous(), upper.contiguous(), mask.contiguous()
        arguments = _masked_activation(
            self._index,
            torch.get_num_threads(),
            *(0, 0, _DTYPES[grad.dtype], mask.data_ptr(), 0, 0, 0, 0, 0, 0, 0),
            grad.shape[:-1].numel(),
            grad.shape[-1],
            passes.data_ptr(),
            upper.data_ptr(),
            grad.data_ptr(),
            output.data_ptr(),
            sums.data_ptr(),
        )
        _check_status(self.native.hf_stompp_masked_activation(arguments))
        return output, sums


def _check_status(status: int) -> None:
    if status == _NO_MEMORY:
        raise MemoryError("hf_stompp: no memory for the working space of a binary product")
    if status != 0:
        raise RuntimeError(f"hf_stompp: the native kernel returned status {status}")


_lock = threading.Lock()

_loaded: tuple[NativeKernels | None, str | None] | None = None


def native_kernels() -> NativeKernels | None:
    """
    The kernels that run the operators on the CPU, loaded or built on first use; None where the reference runs them.

    The environment variable `HF_STOMPP_CPU` names a kernel of `KERNELS`, or `reference`.

    Raises:
        ValueError: the variable holds another name.
        RuntimeError: the kernel that it names cannot run here.
    """
    global _loaded
    if _loaded is None:
        with _lock:
            if _loaded is None:
                _loaded = _load(os.environ.get(_VARIABLE) or None)
    return _loaded[0]


def why_reference() -> str | None:
    """Why the reference runs the operators on the CPU; None where native kernels do."""
    return _loaded[1] if native_kernels() is None and _loaded is not None else None


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


register("CPU", lambda: native_kernels() or reference)
