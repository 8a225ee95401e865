"""Operators on a GPU: calls of the library, and what is done without; on the emulated device of emulated_cuda.h."""

from __future__ import annotations

import ctypes
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hf_stompp.ops import build, cuda, eight_bit, pack_bits, products
from hf_stompp.ops.operators import on_kernels


DTYPES = [torch.float32, torch.bfloat16, torch.float16]
reference = on_kernels("cpu", None)

# enum hf_stompp_cuda_status
TOO_LARGE = -2


@pytest.fixture(scope="module")
def native(emulated_cuda: Path) -> cuda.NativeKernels:
    return emulated(emulated_cuda)


@pytest.fixture(scope="module")
def kernels(native: cuda.NativeKernels) -> SimpleNamespace:
    return on_library(native)


def on_library(native: cuda.NativeKernels) -> SimpleNamespace:
    """The operators on a library, whose errors are not passed over."""
    return on_kernels("cuda", cuda.Device(native, "bits", forced=True))


def emulated(path: Path, kernel: str | None = None, stream: int = 0) -> cuda.NativeKernels:
    return cuda.NativeKernels(cuda.open_library(path), 0, kernel, stream=lambda device: stream)


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def draw_layer(in_features: int, out_features: int, bias: bool = True) -> tuple[Any, ...]:
    weight = pack_bits(draw(out_features, in_features))
    return weight, in_features, draw(out_features).abs(), draw(out_features) if bias else None


class Names(TorchDispatchMode):
    """Notes what operators of PyTorch are called."""

    def __init__(self) -> None:
        super().__init__()
        self.called: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.called.add(func.name())
        return func(*args, **(kwargs or {}))


class TestCallsOfTheLibrary:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("shape", [(5,), (3, 7), (2, 3, 264)], ids=str)
    def test_pack_sign(self, kernels: SimpleNamespace, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        input, threshold = draw(*shape, dtype=dtype), draw(shape[-1])
        for bound in (None, threshold):
            found, expected = kernels.pack_sign(input, bound), reference.pack_sign(input, bound)
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("kernel", [None, *cuda.KERNELS])
    @pytest.mark.parametrize("bias", [False, True])
    def test_products(self, emulated_cuda: Path, dtype: torch.dtype, kernel: str | None, bias: bool) -> None:
        kernels = on_library(emulated(emulated_cuda, kernel))
        bits, layer, threshold = pack_bits(draw(9, 300)).view(3, 3, -1), draw_layer(300, 41, bias), draw(41)
        assert torch.equal(
            kernels.binary_linear(bits, None, *layer, dtype), reference.binary_linear(bits, None, *layer, dtype)
        )
        for bound in (None, threshold):
            found = kernels.binary_linear_sign(bits, None, *layer, dtype, bound)
            assert torch.equal(found, reference.binary_linear_sign(bits, None, *layer, dtype, bound))

    @pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
    def test_unpack(self, native: cuda.NativeKernels, dtype: torch.dtype) -> None:
        bits = pack_bits(draw(5, 300))
        found = products.unpack_on_cuda(cuda.Device(native, "bits", forced=True), bits, 300, dtype)
        expected = eight_bit.unpack(bits, 300, dtype)
        assert torch.equal(found.float(), expected.float())

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_layer_norm_sign(self, kernels: SimpleNamespace, dtype: torch.dtype) -> None:
        input, residual = draw(2, 3, 264, dtype=dtype), draw(3, 2, 264, dtype=dtype).view(2, 3, 264)
        weight, bias, threshold = (draw(264 + i)[:264].clone() for i in range(3))
        for parameters in ((weight, bias), (weight.to(dtype), bias.to(dtype))):
            for other, bound in ((residual, threshold), (None, None)):
                output, bits = kernels.layer_norm_sign(input, other, *parameters, 1e-5, bound)
                expected, _ = reference.layer_norm_sign(input, other, *parameters, 1e-5, bound)
                torch.testing.assert_close(output, expected)
                assert torch.equal(bits, reference.pack_sign(output, bound)[0])

    @pytest.mark.parametrize("transposed", [False, True])
    def test_sign_product(self, kernels: SimpleNamespace, transposed: bool) -> None:
        weight, vector = pack_bits(draw(70, 300)), draw(70 if transposed else 300).double()
        found = kernels.sign_product(weight, 300, vector, transposed)
        torch.testing.assert_close(found, reference.sign_product(weight, 300, vector, transposed))

    @pytest.mark.parametrize("in_features", [1, 7, 300, 1024])
    @pytest.mark.parametrize("bias", [None, torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("one_offset", [False, True])
    def test_fold(
        self, kernels: SimpleNamespace, in_features: int, bias: torch.dtype | None, one_offset: bool
    ) -> None:
        weight, row_scale = pack_bits(draw(41, in_features)), draw(41, 1).abs()
        offset = torch.tensor(0.3) if one_offset else draw(in_features)
        given = None if bias is None else draw(41, dtype=bias)
        arguments = weight, row_scale, offset, torch.tensor(0.7), given, in_features
        found, expected = kernels.fold(*arguments), reference.fold(*arguments)
        assert torch.equal(found[0], expected[0])
        # Sums of doubles in another order, rounded to float32.
        torch.testing.assert_close(found[1], expected[1], rtol=2**-23, atol=1e-12)

    def test_tensors_that_are_not_dense_or_begin_anywhere_are_copied(self, kernels: SimpleNamespace) -> None:
        layer = draw_layer(300, 41)
        bits = pack_bits(draw(9, 300))
        scattered = bits.repeat(1, 2)[:, : bits.shape[1]]
        shifted = torch.cat([torch.zeros(1, dtype=torch.uint8), bits.flatten()])[1:].view(bits.shape)
        expected = reference.binary_linear(bits, None, *layer, torch.float32)
        for input in (scattered, shifted):
            assert torch.equal(kernels.binary_linear(input, None, *layer, torch.float32), expected)
        values = draw(300, 9)
        assert torch.equal(kernels.pack_sign(values.T)[0], reference.pack_sign(values.T)[0])

    def test_work_is_enqueued_on_the_stream_of_the_tensors_device(self, emulated_cuda: Path) -> None:
        native = emulated(emulated_cuda, stream=0x1234)
        asked = native.native.emulated_cuda_launch_stream
        asked.restype = ctypes.c_void_p
        on_library(native).pack_sign(draw(2, 3))
        assert asked() == 0x1234

    def test_the_kernel_of_a_product_can_be_asked_for(self, native: cuda.NativeKernels, emulated_cuda: Path) -> None:
        assert native.chosen(1, 768, 64) == "mma_64x64" and native.chosen(4096, 768, 3072) == "wgmma_64x128"
        assert emulated(emulated_cuda, "mma_128x128").chosen(1, 768, 64) == "mma_128x128"


class TestDevices:
    @pytest.fixture
    def capability(self, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
        return lambda value: monkeypatch.setenv("HF_STOMPP_EMULATED_CAPABILITY", value)

    def test_kernel_that_a_device_lacks_is_refused_by_name(
        self, emulated_cuda: Path, capability: Callable[[str], None]
    ) -> None:
        capability("8.6")
        assert emulated(emulated_cuda).multiplies_bits
        with pytest.raises(cuda.CudaError, match="wgmma_64x128 cannot run on device 0"):
            emulated(emulated_cuda, "wgmma_64x128")

    def test_device_with_emulated_bit_products_has_none_of_its_own(
        self, emulated_cuda: Path, capability: Callable[[str], None]
    ) -> None:
        capability("10.0")
        native = emulated(emulated_cuda)
        assert not native.multiplies_bits and native.chosen(64, 64, 64) is None


class TestOperators:
    @pytest.fixture(params=["bits", "int8", "float8", "int8 without library", "float32 without library"])
    def device(self, request: pytest.FixtureRequest, native: cuda.NativeKernels) -> cuda.Device:
        product, _, without = request.param.partition(" ")
        return cuda.Device(None if without else native, product)

    @pytest.fixture
    def operators(self, device: cuda.Device) -> SimpleNamespace:
        return on_kernels("cuda", device)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_products_of_every_kind_are_the_reference(self, operators: SimpleNamespace, dtype: torch.dtype) -> None:
        input, threshold, layer = draw(3, 300, dtype=dtype), draw(300), draw_layer(300, 41)
        bits, bound = reference.pack_sign(input, threshold)[0], draw(41)
        expected = reference.binary_linear(bits, None, *layer, dtype)
        assert torch.equal(operators.binary_linear(input, threshold, *layer, dtype), expected)
        assert torch.equal(operators.binary_linear(bits, None, *layer, dtype), expected)
        expected = reference.binary_linear_sign(bits, None, *layer, dtype, bound)
        assert torch.equal(operators.binary_linear_sign(input, threshold, *layer, dtype, bound), expected)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_bytes_are_multiplied_as_integers_where_the_device_can(
        self, device: cuda.Device, operators: SimpleNamespace, dtype: torch.dtype
    ) -> None:
        input, layer = draw(3, 300, dtype=dtype), (*draw_layer(300, 41), dtype)
        with Names() as names:
            found = operators.byte_linear(input, *layer)
        assert torch.equal(found, reference.byte_linear(input, *layer))
        assert ("aten::_int_mm" in names.called) == (device.product != "float32")

    def test_the_rest_too(self, operators: SimpleNamespace) -> None:
        input, weight = draw(4, 300), pack_bits(draw(7, 300))
        assert torch.equal(operators.pack_sign(input)[1], reference.pack_sign(input)[1])
        vector = draw(300).double()
        found, expected = (o.sign_product(weight, 300, vector, False) for o in (operators, reference))
        torch.testing.assert_close(found, expected)
        for dtype in (torch.float32, torch.float64):
            levels = draw(7, 1).abs(), draw(300).to(dtype), torch.tensor(0.7), None
            found, expected = (o.fold(weight, *levels, 300) for o in (operators, reference))
            assert torch.equal(found[0], expected[0])
            torch.testing.assert_close(found[1], expected[1])

    @pytest.mark.parametrize("features", [264, 300, 4104])
    def test_layer_norm_of_any_width(self, operators: SimpleNamespace, features: int) -> None:
        # Neither a multiple of 8 nor above 4096 has a kernel.
        arguments = draw(2, features), draw(2, features), draw(features), draw(features + 1)[1:].clone(), 1e-5, None
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            output, bits = operators.layer_norm_sign(*arguments)
        torch.testing.assert_close(output, reference.layer_norm_sign(*arguments)[0])
        assert torch.equal(bits, reference.pack_sign(output)[0])


class TestFailures:
    @pytest.fixture
    def without_code(self, emulated_cuda: Path, monkeypatch: pytest.MonkeyPatch) -> cuda.NativeKernels:
        """Loaded, and then its device is one that it has no code for."""
        native = emulated(emulated_cuda)
        monkeypatch.setenv("HF_STOMPP_EMULATED_CAPABILITY", "7.5")
        return native

    def test_code_that_is_missing_is_one_warning_and_the_right_result(self, without_code: cuda.NativeKernels) -> None:
        device, layer = cuda.Device(without_code, "bits"), draw_layer(300, 41)
        operators, input = on_kernels("cuda", device), draw(3, 300)
        with pytest.warns(RuntimeWarning, match="goes on without its CUDA kernels") as caught:
            found = operators.binary_linear(input, None, *layer, torch.float32)
        assert len(caught) == 1
        expected = reference.binary_linear(input, None, *layer, torch.float32)
        assert torch.equal(found, expected)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert torch.equal(operators.binary_linear(input, None, *layer, torch.float32), expected)
        assert device.native is None and device.product == "int8" and device.why_not

    def test_code_that_is_missing_is_an_error_if_the_kernel_was_asked_for_by_name(
        self, without_code: cuda.NativeKernels
    ) -> None:
        with pytest.raises(cuda.CudaError):
            on_library(without_code).pack_sign(draw(2, 3))

    def test_another_error_of_the_device_is_raised_and_the_kernels_stay(self, emulated_cuda: Path) -> None:
        native = emulated(emulated_cuda)
        native.index = 99
        device = cuda.Device(native, "bits")
        with pytest.raises(cuda.CudaError, match="invalid device"):
            on_kernels("cuda", device).pack_sign(draw(2, 3))
        assert device.native is native

    def test_what_is_too_large_for_a_kernel_is_done_without_it_this_once(self, emulated_cuda: Path) -> None:
        device = cuda.Device(emulated(emulated_cuda), "bits")

        def fail(native: cuda.NativeKernels) -> None:
            native._check(TOO_LARGE)

        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert device.attempt(fail, lambda: "in PyTorch") == "in PyTorch"
        assert device.attempt(lambda native: "in a kernel", lambda: "in PyTorch") == "in a kernel"


class TestLoading:
    """What is chosen on a machine whose GPU only PyTorch is told of."""

    @pytest.fixture(autouse=True)
    def gpu(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        monkeypatch.setattr(eight_bit, "choose", lambda device: "int8")
        yield

    @pytest.fixture
    def library(self, monkeypatch: pytest.MonkeyPatch, emulated_cuda: Path) -> None:
        monkeypatch.setattr(cuda, "find_or_build", lambda capability: cuda.open_library(emulated_cuda))

    @pytest.fixture
    def no_library(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(capability: tuple[int, int]) -> None:
            raise build.BuildError("there is no nvcc")

        monkeypatch.setattr(cuda, "find_or_build", fail)

    def test_kernels_multiply_bits_where_the_device_does(self, library: None) -> None:
        device = cuda._load(0, None)
        assert device.product == "bits" and device.native is not None and not device.forced

    def test_eight_bit_product_where_the_device_emulates_bits(
        self, library: None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("HF_STOMPP_EMULATED_CAPABILITY", "10.0")
        device = cuda._load(0, None)
        assert device.product == "int8" and device.native is not None and device.why_not is None

    def test_kernel_is_forced_by_name(self, library: None) -> None:
        device = cuda._load(0, "mma_64x64")
        assert device.native is not None and device.native.kernel == "mma_64x64" and device.forced

    def test_eight_bit_product_is_forced_by_name(self, library: None, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(eight_bit, "why_not", lambda product, device: None)
        assert cuda._load(0, "float8").product == "float8"
        monkeypatch.setattr(eight_bit, "why_not", lambda product, device: "no such tensor cores")
        with pytest.raises(RuntimeError, match="HF_STOMPP_CUDA=float8 cannot run on cuda:0: no such tensor cores"):
            cuda._load(0, "float8")

    def test_reference_is_forced_by_name(self) -> None:
        device = cuda._load(0, "reference")
        assert device.product == "float32" and device.native is None

    def test_without_compiler_there_is_one_warning_that_says_why(self, no_library: None) -> None:
        with pytest.warns(RuntimeWarning, match="cuda:0 without CUDA kernels .*there is no nvcc"):
            device = cuda._load(0, None)
        assert device.product == "int8" and device.native is None and device.why_not == "there is no nvcc"

    def test_without_compiler_a_kernel_asked_for_by_name_is_an_error(self, no_library: None) -> None:
        with pytest.raises(RuntimeError, match="HF_STOMPP_CUDA=mma_64x64: there is no nvcc"):
            cuda._load(0, "mma_64x64")

    def test_another_name_is_an_error_that_lists_them(self) -> None:
        with pytest.raises(ValueError, match="one of mma_64x64, .*, int8, float8 or reference, got 'xor'"):
            cuda._load(0, "xor")
