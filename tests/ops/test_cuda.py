"""
The operators on a GPU: against the definition, computed on the CPU, and as parts of streams, graphs, compiled programs
and models. Run by `make gpu-check`.
"""

from __future__ import annotations

import copy
import functools
import itertools
import math
import os
import struct
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hf_stompp import StoMPPConfig
from hf_stompp.nn import activation as activation_module
from hf_stompp.nn import residual_norm
from hf_stompp.ops import SURROGATES, cuda, eight_bit, products
from hf_stompp.ops.operators import on_kernels


pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")]

DEVICE = torch.device("cuda")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
INTEGERS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}

# Around the edges of a fragment (16 rows, 8 columns, 256 features), of the tiles, and of the stages of a product.
ROWS = [1, 2, 7, 15, 16, 17, 63, 64, 65, 130, 1100]
IN_FEATURES = [1, 7, 63, 64, 65, 100, 128, 255, 256, 257, 768, 1000, 1280, 3072]
OUT_FEATURES = [1, 3, 15, 16, 17, 31, 33, 65, 129, 257, 770]

SUBNORMAL = 1e-40
SPECIAL = [-0.0, 0.0, math.nan, math.inf, -math.inf, SUBNORMAL, -SUBNORMAL, 6e-8, -6e-8, 1.0, -1.0]

MULTIPLIERS = ["automatic", *cuda.KERNELS, *eight_bit.PRODUCTS]

ops = torch.ops.hf_stompp
reference = on_kernels("cpu", None)


# ----- The definition -----


def packed(signs: Tensor) -> Tensor:
    *shape, features = signs.shape
    padded = np.zeros((*shape, 256 * math.ceil(features / 256)), dtype=bool)
    padded[..., :features] = signs.numpy()
    return torch.from_numpy(np.packbits(padded, axis=-1, bitorder="little"))


def above(values: Tensor, threshold: Tensor | None) -> Tensor:
    return values.double() >= (0.0 if threshold is None else threshold.double())


def linear(
    signs: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The layer on boolean matrices: an exact sum, then one rounding after the other."""
    output = ((2.0 * signs.double() - 1) @ (2.0 * weight.double() - 1).T).float() * scale
    return (output if bias is None else output + bias).to(dtype)


def same(actual: Tensor, expected: Tensor) -> bool:
    """Equal dtypes, shapes and bits; any NaN equals any other, whose bits PyTorch itself leaves open."""
    actual = actual.cpu()
    if actual.dtype != expected.dtype or actual.shape != expected.shape:
        return False
    if not actual.dtype.is_floating_point:
        return torch.equal(actual, expected)
    integers = INTEGERS[actual.dtype]
    one, other = actual.contiguous().view(integers), expected.contiguous().view(integers)
    return bool(((one == other) | (actual.isnan() & expected.isnan())).all())


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape).to(dtype)


def sprinkled(values: Tensor) -> Tensor:
    """With what a comparison may stumble over at every third place."""
    places = values.view(-1)[::3]
    places.copy_(torch.tensor([SPECIAL[i % len(SPECIAL)] for i in range(len(places))]).to(values.dtype))
    return values


def misaligned(tensor: Tensor) -> Tensor:
    """A dense copy on the GPU that begins one element behind a multiple of 16 bytes."""
    memory = torch.empty(tensor.numel() + 1, dtype=tensor.dtype, device=DEVICE)
    return memory[1:].view(tensor.shape).copy_(tensor)


def strided(tensor: Tensor) -> Tensor:
    """A copy on the GPU with gaps between its elements."""
    memory = torch.empty((*tensor.shape, 2), dtype=tensor.dtype, device=DEVICE)
    return memory[..., 0].copy_(tensor)


def on_gpu(*arguments: Any) -> list[Any]:
    return [argument.to(DEVICE) if isinstance(argument, Tensor) else argument for argument in arguments]


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "dense": lambda tensor: tensor.to(DEVICE),
    "misaligned": misaligned,
    "strided": strided,
}


# ----- The kernels -----


@pytest.fixture(scope="module")
def native() -> cuda.NativeKernels:
    found = cuda.device(DEVICE).native
    assert found is not None, cuda.device(DEVICE).why_not
    return found


def operators_on(native: cuda.NativeKernels) -> SimpleNamespace:
    """The operators on a library, whose errors are not passed over."""
    return on_kernels("cuda", cuda.Device(native, "bits", forced=True))


def kernel(native: cuda.NativeKernels, name: str) -> cuda.NativeKernels:
    """The library with one kernel forced, or none."""
    if name == "automatic":
        if not native.multiplies_bits:
            pytest.skip("no kernel multiplies bits on this device")
        return cuda.NativeKernels(native.native, native.index)
    if not native.has_kernel(name):
        pytest.skip(f"{name} does not run on this device")
    return cuda.NativeKernels(native.native, native.index, name)


@functools.cache
def why_not(product: str) -> str | None:
    return eight_bit.why_not(product, DEVICE)


@pytest.fixture(params=MULTIPLIERS)
def multiply(native: cuda.NativeKernels, request: pytest.FixtureRequest) -> Callable[..., Tensor]:
    """What multiplies bits: the choice among the kernels, each of them, and the products of PyTorch."""
    name = request.param
    if name not in eight_bit.PRODUCTS:
        forced = operators_on(kernel(native, name))
        return lambda bits, *layer: forced.binary_linear(bits, None, *layer)
    reason = why_not(name)
    if reason is not None:
        pytest.skip(f"{name}: {reason}")
    unpack = functools.partial(products.unpack_on_cuda, cuda.Device(native, name, forced=True))
    return functools.partial(eight_bit.binary_linear, name, unpack)


@pytest.fixture(params=["automatic", *cuda.KERNELS])
def forced(native: cuda.NativeKernels, request: pytest.FixtureRequest) -> cuda.NativeKernels:
    """The choice among the kernels, and each of them."""
    return kernel(native, request.param)


def test_kernels_are_built_and_multiply_bits_here(native: cuda.NativeKernels) -> None:
    major, minor = torch.cuda.get_device_capability()
    assert native.multiplies_bits == (major == 8 or (major, minor) == (9, 0))
    assert native.has_kernel("wgmma_64x128") == ((major, minor) == (9, 0))
    if native.multiplies_bits:
        assert cuda.device(DEVICE).product == "bits"


# ----- Packing -----


@pytest.mark.parametrize("thresholds", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packed_bits_are_exact(dtype: torch.dtype, thresholds: bool) -> None:
    for i, features in enumerate(IN_FEATURES):
        x = sprinkled(draw(ROWS[i % len(ROWS)], features, dtype=dtype))
        threshold = None
        if thresholds:
            threshold = draw(features)
            # Also at the very values, and at those of which nothing but an infinity is not below.
            threshold[::2] = x[0, ::2].float().nan_to_num(0.5, math.inf, -math.inf)
            threshold[1::7], threshold[2::7] = math.inf, math.nan
        signs = above(x, threshold)
        bits, popcounts = ops.pack_sign(*on_gpu(x, threshold))
        assert same(bits, packed(signs)), x.shape
        assert same(popcounts, signs.sum(-1, dtype=torch.int32)), x.shape


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(0, 5), (3, 0, 8), (9,), (2, 3, 100), (5, 64), (4, 257), (7, 768)], ids=str)
def test_input_of_any_shape_and_layout_is_packed(shape: tuple[int, ...], layout: str) -> None:
    for dtype in DTYPES:
        x, threshold = sprinkled(draw(*shape, dtype=dtype)), draw(shape[-1])
        signs = above(x, threshold)
        bits, popcounts = ops.pack_sign(LAYOUTS[layout](x), LAYOUTS[layout](threshold))
        assert same(bits, packed(signs)) and same(popcounts, signs.sum(-1, dtype=torch.int32))


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
def test_unpacked_signs_are_those_of_plain_pytorch(native: cuda.NativeKernels, dtype: torch.dtype) -> None:
    for rows, features in itertools.product([1, 65], IN_FEATURES):
        bits = packed(draw(rows, features) >= 0)
        there = cuda.Device(native, "bits", forced=True)
        found = products.unpack_on_cuda(there, bits.to(DEVICE), features, dtype).cpu().view(torch.uint8)
        assert torch.equal(found, eight_bit.unpack(bits, features, dtype).view(torch.uint8)), (rows, features)


# ----- Products -----


def product_cases(in_features: int) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor | None, torch.dtype]]:
    """Signs, weight, scale, bias and dtype; each number of rows with each of columns over all of them."""
    start = IN_FEATURES.index(in_features)
    for j, columns in enumerate(OUT_FEATURES):
        signs = draw(ROWS[(start + j) % len(ROWS)], in_features) >= 0
        weight = draw(columns, in_features) >= 0
        # The largest sums.
        for matrix in (signs, weight):
            matrix[0], matrix[-1] = True, len(matrix) == 1
        bias = draw(columns) if (start + j) % 3 else None
        yield signs, weight, draw(columns), bias, DTYPES[(start + 2 * j) % 3]


@pytest.mark.parametrize("in_features", IN_FEATURES)
def test_product_is_bit_exact(multiply: Callable[..., Tensor], in_features: int) -> None:
    for signs, weight, scale, bias, dtype in product_cases(in_features):
        found = multiply(*on_gpu(packed(signs), packed(weight), in_features, scale, bias, dtype))
        assert same(found, linear(signs, weight, scale, bias, dtype)), (signs.shape, weight.shape, dtype)


@pytest.mark.parametrize("in_features", IN_FEATURES)
def test_bits_out_are_those_of_the_rounded_product(forced: cuda.NativeKernels, in_features: int) -> None:
    for signs, weight, scale, bias, dtype in product_cases(in_features):
        output = linear(signs, weight, scale, bias, dtype)
        threshold = 10 * draw(len(weight))
        # At the very value of a result, of which rounding to the dtype decides.
        threshold[::2] = output[-1, ::2].float()
        threshold[1::5] = math.nan
        for bounds in (None, threshold):
            found = operators_on(forced).binary_linear_sign(
                *on_gpu(packed(signs), None, packed(weight), in_features, scale, bias, dtype, bounds)
            )
            assert same(found, packed(above(output, bounds))), (signs.shape, weight.shape, dtype)


def test_product_of_special_scales_is_that_of_the_definition(multiply: Callable[..., Tensor]) -> None:
    signs, weight = draw(33, 130) >= 0, draw(22, 130) >= 0
    scales = [0.0, -0.0, math.inf, -math.inf, math.nan, SUBNORMAL, -SUBNORMAL, 3e38, -1e-38, 1e-7, 9e3]
    scale, bias = torch.tensor(2 * scales), torch.tensor(11 * [0.5] + scales)
    for dtype in DTYPES:
        found = multiply(*on_gpu(packed(signs), packed(weight), 130, scale, bias, dtype))
        assert same(found, linear(signs, weight, scale, bias, dtype)), dtype


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("input_dtype", [*DTYPES, torch.uint8], ids=str)
def test_operators_take_floats_and_bits_of_any_layout(input_dtype: torch.dtype, layout: str) -> None:
    place = LAYOUTS[layout]
    for shape, features, columns in [((65,), 300, 70), ((2, 17), 768, 136), ((0,), 64, 8), ((3,), 7, 1)]:
        is_bits = input_dtype == torch.uint8
        x = sprinkled(draw(*shape, features, dtype=torch.float32 if is_bits else input_dtype))
        threshold = None if is_bits else draw(features)
        signs, weight = above(x, threshold), draw(columns, features) >= 0
        scale, bias, output_threshold = draw(columns), draw(columns), 10 * draw(columns)
        source = packed(signs) if is_bits else x
        tensors = [None if t is None else place(t) for t in (source, threshold, packed(weight), scale, bias)]
        for dtype in DTYPES:
            layer = *tensors[:3], features, *tensors[3:], dtype
            output = linear(signs.reshape(-1, features), weight, scale, bias, dtype).view(*shape, columns)
            assert same(ops.binary_linear(*layer), output)
            found = ops.binary_linear_sign(*layer, place(output_threshold))
            assert same(found, packed(above(output, output_threshold)))


def large_memory() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_properties(0).total_memory > 24e9


@pytest.mark.skipif(not large_memory(), reason="takes 16 GB of the GPU")
def test_matrices_of_more_than_2_to_the_31_elements_are_addressed() -> None:
    rows, features, columns, tail = 2**20 + 3, 2056, 2056, 5
    x = torch.randn(rows, features, device=DEVICE, dtype=torch.bfloat16)
    bits, _ = ops.pack_sign(x)
    last = x[-tail:].cpu() >= 0
    del x
    assert same(bits[-tail:], packed(last))
    weight, scale = draw(columns, features) >= 0, draw(columns)
    layer = None, *on_gpu(packed(weight), features, scale), None, torch.bfloat16
    expected = linear(last, weight, scale, None, torch.bfloat16)
    assert same(ops.binary_linear(bits, *layer)[-tail:], expected)
    assert same(ops.binary_linear_sign(bits, *layer, None)[-tail:], packed(expected >= 0))


# ----- LayerNorm, and the product with a vector -----


@pytest.mark.parametrize("float_parameters", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layer_norm_and_its_bits_are_those_of_the_definition(dtype: torch.dtype, float_parameters: bool) -> None:
    # 36 and 4104 are sizes that the kernel does not take.
    for i, features in enumerate([8, 36, 64, 264, 384, 768, 1024, 1032, 3072, 4096, 4104]):
        rows, epsilon = ROWS[i % len(ROWS)], 1e-5
        parameter_dtype = torch.float32 if float_parameters else dtype
        x, residual = draw(rows, features, dtype=dtype) + 3, draw(rows, features, dtype=dtype) if i % 2 else None
        weight, bias = (draw(features, dtype=parameter_dtype) for _ in range(2))
        weight[0] = bias[0] = 0.0
        weight[1], bias[1] = 0.0, -0.0
        threshold = draw(features) if i % 3 else None
        total = (x if residual is None else x + residual).double()
        mean, variance = total.mean(1, keepdim=True), total.var(1, correction=0, keepdim=True)
        expected = (total - mean) / (variance + epsilon).sqrt() * weight.double() + bias.double()

        output, bits = ops.layer_norm_sign(*on_gpu(x, residual, weight, bias, epsilon, threshold))
        step = torch.finfo(dtype).eps
        torch.testing.assert_close(output.cpu().double(), expected, rtol=step, atol=4e-6)
        assert same(bits, packed(above(output.cpu(), threshold))), features


def test_layer_norm_of_nan_is_nan_with_clear_bits() -> None:
    x = draw(5, 768)
    x[1, 7], x[3, 0] = math.nan, math.inf
    output, bits = ops.layer_norm_sign(*on_gpu(x, None, torch.ones(768), torch.zeros(768), 1e-5, None))
    is_nan = output.isnan().all(1).cpu()
    assert is_nan.tolist() == [False, True, False, True, False]
    assert not bits.cpu()[is_nan].any() and bits.cpu()[~is_nan].any(1).all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layer_norm_takes_any_layout(layout: str) -> None:
    x, residual, weight, bias, threshold = (draw(*shape) for shape in [(2, 9, 384)] * 2 + [(384,)] * 3)
    place = LAYOUTS[layout]
    expected = ops.layer_norm_sign(*on_gpu(x, residual, weight, bias, 1e-5, threshold))
    found = ops.layer_norm_sign(*map(place, (x, residual, weight, bias)), 1e-5, place(threshold))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("transposed", [False, True])
def test_product_with_a_vector_is_exact(transposed: bool) -> None:
    for rows, features in itertools.product([1, 9, 130], IN_FEATURES):
        weight = draw(rows, features) >= 0
        matrix = 2.0 * weight.double() - 1
        # Whole numbers, of which every order of additions gives the same sum.
        vector = torch.randint(-(2**40), 2**40, (rows if transposed else features,)).double()
        found = ops.sign_product(*on_gpu(packed(weight), features, vector, transposed))
        assert torch.equal(found.cpu(), vector @ matrix if transposed else matrix @ vector), (rows, features)


@pytest.mark.parametrize("with_bias", [False, True])
def test_folded_levels_are_exact(with_bias: bool) -> None:
    for rows, features in itertools.product([1, 9, 130], IN_FEATURES):
        weight = draw(rows, features) >= 0
        # Whole numbers, of which every order of additions gives the same sum.
        offset, bias = torch.randint(-1000, 1000, (features,)).float(), torch.randint(-1000, 1000, (rows,)).float()
        for levels in (offset, torch.tensor(3.0)):
            given = packed(weight), torch.full((rows, 1), 0.5), levels, torch.tensor(0.7), bias if with_bias else None
            scale, constant = ops.fold(*on_gpu(*given), features)
            expected = 0.5 * ((2.0 * weight - 1) @ levels.expand(features)) + (bias if with_bias else 0)
            assert torch.equal(constant.cpu(), expected), (rows, features)
            assert torch.equal(scale.cpu(), torch.full((rows,), 0.5) * torch.tensor(0.7))


# ----- Nothing is written beside the outputs -----

UNTOUCHED, GUARD = 0x5A, 4096


class Output:
    """Memory for a result, none of whose bytes is there by chance, between others that must stay as they are."""

    def __init__(self, *shape: int, dtype: torch.dtype, misalignment: int = 0) -> None:
        size = math.prod(shape) * dtype.itemsize
        self.memory = torch.full((2 * GUARD + misalignment + size,), UNTOUCHED, dtype=torch.uint8, device=DEVICE)
        self.begin, self.end = GUARD + misalignment, GUARD + misalignment + size
        self.pointer = self.memory.data_ptr() + self.begin
        self.shape, self.dtype = shape, dtype

    def value(self) -> Tensor:
        memory = self.memory.cpu()
        assert (memory[: self.begin] == UNTOUCHED).all(), "wrote before the output"
        assert (memory[self.end :] == UNTOUCHED).all(), "wrote behind the output"
        return memory[self.begin : self.end].clone().view(self.dtype).view(self.shape)


def stream_number() -> int:
    return torch.cuda.current_stream().cuda_stream if DEVICE.type == "cuda" else 0


@pytest.mark.parametrize("rows", [1, 65, 130])
def test_product_writes_its_output_and_nothing_else(forced: cuda.NativeKernels, rows: int) -> None:
    number = -1 if forced.kernel is None else cuda.KERNELS.index(forced.kernel)
    for (in_features, columns), (code, dtype) in itertools.product(
        [(1, 1), (64, 33), (257, 129), (768, 264)], enumerate(DTYPES)
    ):
        signs, weight, scale = draw(rows, in_features) >= 0, draw(columns, in_features) >= 0, draw(columns)
        source, packed_weight, scales = on_gpu(packed(signs), packed(weight), scale)
        expected = linear(signs, weight, scale, None, dtype)
        for bits in (False, True):
            shape = rows, packed(expected >= 0).shape[1] if bits else columns
            # Only bits must begin at a multiple of 4 bytes.
            output = Output(*shape, dtype=torch.uint8 if bits else dtype, misalignment=0 if bits else dtype.itemsize)
            record = struct.pack(
                "14q",
                *(forced.index, stream_number(), number, source.data_ptr(), packed_weight.data_ptr()),
                *(scales.data_ptr(), 0, rows, in_features, columns),
                *(0 if bits else output.pointer, code, output.pointer if bits else 0, 0),
            )
            assert forced.native.hf_stompp_cuda_binary_linear(record) == 0
            assert same(output.value(), packed(expected >= 0) if bits else expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_other_kernels_write_their_outputs_and_nothing_else(native: cuda.NativeKernels, dtype: torch.dtype) -> None:
    library, code = native.native, DTYPES.index(dtype)
    here = native.index, stream_number()
    for rows, features in [(1, 7), (9, 64), (33, 264), (17, 1032)]:
        x = draw(rows, features, dtype=dtype)
        signs, source = x >= 0, x.to(DEVICE)
        expected = packed(signs)
        bits, popcounts = Output(*expected.shape, dtype=torch.uint8), Output(rows, dtype=torch.int32, misalignment=4)
        record = struct.pack("9q", *here, source.data_ptr(), code, 0, rows, features, bits.pointer, popcounts.pointer)
        assert library.hf_stompp_cuda_pack_sign(record) == 0
        assert same(bits.value(), expected) and same(popcounts.value(), signs.sum(1, dtype=torch.int32))

        bits_there = expected.to(DEVICE)
        unpacked = Output(rows, 8 * expected.shape[1], dtype=torch.int8, misalignment=8)
        record = struct.pack("7q", *here, bits_there.data_ptr(), rows, features, unpacked.pointer, 0)
        assert library.hf_stompp_cuda_unpack_signs(record) == 0
        assert same(unpacked.value(), eight_bit.unpack(expected, features, torch.int8))

        vector = torch.randint(-9, 9, (features,)).double()
        vector_there, sums = vector.to(DEVICE), Output(rows, dtype=torch.float64, misalignment=8)
        record = struct.pack(
            "8q", *here, bits_there.data_ptr(), rows, features, 0, vector_there.data_ptr(), sums.pointer
        )
        assert library.hf_stompp_cuda_sign_product(record) == 0
        assert torch.equal(sums.value(), (2.0 * signs.double() - 1) @ vector)

        if features % 8:
            continue
        weight, bias = on_gpu(draw(features, dtype=dtype), draw(features, dtype=dtype))
        wanted = [t.cpu() for t in operators_on(native).layer_norm_sign(source, None, weight, bias, 1e-5, None)]
        output, bits = Output(rows, features, dtype=dtype), Output(*expected.shape, dtype=torch.uint8)
        record = struct.pack(
            "8qd5q",
            *(*here, source.data_ptr(), 0, code, weight.data_ptr(), bias.data_ptr(), code),
            *(1e-5, 0, rows, features, output.pointer, bits.pointer),
        )
        assert library.hf_stompp_cuda_layer_norm_sign(record) == 0
        assert same(output.value(), wanted[0]) and same(bits.value(), wanted[1])


# ----- PyTorch's own check of operators -----


def simple_arguments() -> dict[str, tuple[Any, ...]]:
    """Small arguments for every operator."""
    x, bits, weight = draw(5, 300), packed(draw(5, 300) >= 0), packed(draw(70, 300) >= 0)
    scale, bias, threshold = draw(70), draw(70), draw(300)
    layer = weight, 300, scale, bias, torch.bfloat16
    norm = draw(5, 64), draw(5, 64), draw(64), draw(64), 1e-5, draw(64)
    mask, flags = torch.rand(300) < 0.5, packed(draw(5, 300) >= 0)
    masked = x, draw(5, 300) >= 0, draw(5, 1).abs(), 1.3
    vectors = draw(300), draw(300), torch.tensor(0.7), draw(300), torch.tensor(1.1)
    return {
        "pack_sign": (x, threshold),
        "binary_linear": (x, threshold, *layer),
        "binary_linear_sign": (bits, None, *layer, bias),
        "layer_norm_sign": norm,
        "sign_product": (weight, 300, draw(300).double(), False),
        "fold": (weight, draw(70, 1).abs(), draw(300), torch.tensor(0.7), bias, 300),
        "masked_weight": (*masked, torch.float32),
        "masked_weight_grad": (draw(5, 300), *masked, "none", 1.3),
        "masked_activation": (x, x, mask, *vectors, "none", torch.tensor(0.9)),
        "masked_activation_grad": (x, flags, flags, mask),
    }


@pytest.mark.parametrize("op", list(simple_arguments()))
def test_opcheck_passes(op: str) -> None:
    arguments = tuple(on_gpu(*simple_arguments()[op]))
    result = torch.library.opcheck(getattr(ops, op).default, arguments)
    assert set(result.values()) == {"SUCCESS"}


# ----- Streams and graphs -----

Call = Callable[..., Any]

OPERATORS: dict[str, tuple[Call, tuple[int, ...]]] = {
    "pack_sign": (lambda x, other: ops.pack_sign(x)[0], (65, 768)),
    "binary_linear": (
        lambda x, other: ops.binary_linear(x, None, other, 768, *other.new_ones(2, 300).float(), torch.float32),
        (65, 768),
    ),
    "binary_linear_sign": (
        lambda x, other: ops.binary_linear_sign(
            x, None, other, 768, *other.new_ones(2, 300).float(), torch.bfloat16, None
        ),
        (65, 768),
    ),
    "layer_norm_sign": (
        lambda x, other: ops.layer_norm_sign(x, x, torch.ones_like(x[0]), torch.zeros_like(x[0]), 1e-5, None)[0],
        (65, 768),
    ),
    "sign_product": (lambda x, other: ops.sign_product(other, 768, x.double(), False), (768,)),
    "fold": (
        lambda x, other: ops.fold(other, other.new_ones(300, 1).float(), x, x.new_ones(()), None, 768)[1],
        (768,),
    ),
}
"""Each with an input and a packed weight, and the shape of the input."""


@pytest.mark.parametrize("op", OPERATORS)
def test_work_waits_for_what_its_stream_has_before_it(op: str) -> None:
    function, shape = OPERATORS[op]
    x, weight = draw(*shape).to(DEVICE), packed(draw(300, 768) >= 0).to(DEVICE)
    expected = function(x, weight)
    late = -x
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        # A tenth of a second or so: what does not wait reads the negated input.
        torch.cuda._sleep(100_000_000)
        late.copy_(x)
        found = function(late, weight)
    side.synchronize()
    assert torch.equal(found, expected)


@pytest.mark.parametrize("op", OPERATORS)
def test_captured_operator_computes_anew_from_changed_inputs(op: str) -> None:
    function, shape = OPERATORS[op]
    x, weight = draw(*shape).to(DEVICE), packed(draw(300, 768) >= 0).to(DEVICE)
    function(x, weight)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = function(x, weight)
    for _ in range(3):
        x.copy_(draw(*shape))
        weight.copy_(packed(draw(300, 768) >= 0))
        found.zero_()
        graph.replay()
        assert torch.equal(found, function(x, weight))


# ----- Devices -----


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is no second CUDA device")
def test_tensors_on_another_device_are_worked_on_there() -> None:
    x, weight, scale = draw(65, 768), draw(300, 768) >= 0, draw(300)
    there = torch.device("cuda", 1)
    assert torch.cuda.current_device() == 0
    layer = packed(weight).to(there), 768, scale.to(there), None, torch.bfloat16
    found = ops.binary_linear(x.to(there), None, *layer)
    assert found.device == there and torch.cuda.current_device() == 0
    assert same(found, linear(x >= 0, weight, scale, None, torch.bfloat16))


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Devices are loaded anew, and forgotten again."""
    monkeypatch.setattr(cuda, "_devices", {})
    return monkeypatch


def assert_multiplies_exactly() -> None:
    x, weight, scale, bias = draw(65, 257), draw(130, 257) >= 0, draw(130), draw(130)
    found = ops.binary_linear(*on_gpu(x, None, packed(weight), 257, scale, bias, torch.bfloat16))
    assert same(found, linear(x >= 0, weight, scale, bias, torch.bfloat16))
    bits = ops.binary_linear_sign(*on_gpu(x, None, packed(weight), 257, scale, bias, torch.bfloat16, None))
    assert same(bits, packed(found.cpu() >= 0))


@pytest.mark.parametrize("name", [*cuda.KERNELS, *eight_bit.PRODUCTS, "reference"])
def test_named_product_is_the_one_that_is_used(
    native: cuda.NativeKernels, fresh: pytest.MonkeyPatch, name: str
) -> None:
    fresh.setenv("HF_STOMPP_CUDA", name)
    unavailable = name in cuda.KERNELS and not native.has_kernel(name)
    if unavailable or (name in eight_bit.PRODUCTS and why_not(name) is not None):
        with pytest.raises(RuntimeError, match=name):
            cuda.device(DEVICE)
        return
    on = cuda.device(DEVICE)
    assert (on.native.kernel if name in cuda.KERNELS and on.native else on.product) in (name, "float32")
    assert_multiplies_exactly()


def test_name_of_no_product_is_an_error_that_lists_them(fresh: pytest.MonkeyPatch) -> None:
    fresh.setenv("HF_STOMPP_CUDA", "wgmma_9x9")
    with pytest.raises(ValueError, match=r"HF_STOMPP_CUDA.*mma_64x64.*int8.*'wgmma_9x9'"):
        cuda.device(DEVICE)


def test_without_a_compiler_there_is_one_warning_and_the_results_are_right(
    fresh: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fresh.setattr(cuda, "INSTALLED", tmp_path / "not installed")
    fresh.setenv("HF_STOMPP_CACHE", str(tmp_path / "cache"))
    fresh.setenv("PATH", str(tmp_path))
    for variable in ("CUDA_HOME", "CUDA_PATH", "HF_STOMPP_CUDA"):
        fresh.delenv(variable, raising=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            assert_multiplies_exactly()
    ours = [str(warning.message) for warning in caught if "hf_stompp" in str(warning.message)]
    assert len(ours) == 1 and "nvcc" in ours[0]
    assert cuda.device(DEVICE).native is None


FORCED = """
import torch
from hf_stompp.ops import binary_linear, cuda, pack_sign
x, weight = (torch.randn(n, 300, device="cuda") for n in (65, 40))
one = torch.ones(40, device="cuda")
found = binary_linear(x, None, pack_sign(weight)[0], 300, one, None, torch.float32)
signs = [torch.where(t >= 0, 1.0, -1.0).double() for t in (x, weight)]
print(cuda.device(x.device).native.kernel, torch.equal(found.double(), signs[0] @ signs[1].T))
"""


def test_kernel_that_the_environment_names_is_used_by_a_process(native: cuda.NativeKernels) -> None:
    if not native.multiplies_bits:
        pytest.skip("no kernel multiplies bits on this device")
    environment = {**os.environ, "HF_STOMPP_CUDA": "mma_64x64"}
    result = subprocess.run([sys.executable, "-c", FORCED], env=environment, capture_output=True, text=True)
    assert result.stdout.split()[-2:] == ["mma_64x64", "True"], result.stderr


# ----- Models -----

FUSED_SIZES = {"hidden_size": 64, "intermediate_size": 128}
"""Those that LayerNorm's kernel takes."""


def calls_of(monkeypatch: pytest.MonkeyPatch, name: str) -> list[str]:
    """Counts the calls of a kernel."""
    calls: list[str] = []
    call = cuda.NativeKernels.call

    def counted(self: cuda.NativeKernels, function: Any, *record: Any) -> None:
        calls.extend([name] if function.__name__ == f"hf_stompp_cuda_{name}" else [])
        call(self, function, *record)

    monkeypatch.setattr(cuda.NativeKernels, "call", counted)
    return calls


def moved(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.to(DEVICE) for name, value in inputs.items()}


@pytest.mark.parametrize("sizes", [{}, FUSED_SIZES], ids=["narrow", "fused"])
@torch.no_grad()
def test_packed_logits_are_those_of_the_cpu_within_rounding(
    tiny_packed: Callable, tiny_inputs: Callable, monkeypatch: pytest.MonkeyPatch, sizes: dict[str, int]
) -> None:
    norms, products = calls_of(monkeypatch, "layer_norm_sign"), calls_of(monkeypatch, "binary_linear")
    model, inputs = tiny_packed("bert", **sizes), tiny_inputs("bert")
    expected = model(**inputs).logits
    found = model.to(DEVICE)(**moved(inputs)).logits.cpu()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert bool(norms) == bool(sizes)
    assert products or not cuda.device(DEVICE).product == "bits"


@torch.no_grad()
def test_fused_layer_norm_gives_the_logits_of_separate_operations_within_rounding(
    tiny_packed: Callable, tiny_inputs: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs = tiny_packed("bert", **FUSED_SIZES).to(DEVICE), moved(tiny_inputs("bert"))
    fused = model(**inputs).logits
    monkeypatch.setattr(residual_norm, "fuses_layer_norm", lambda device: False)
    norms = calls_of(monkeypatch, "layer_norm_sign")
    separate = model(**inputs).logits
    assert not norms
    torch.testing.assert_close(fused, separate, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_captured_model_computes_what_eager_does_bit_for_bit(tiny_packed: Callable, tiny_inputs: Callable) -> None:
    model = tiny_packed("bert", **FUSED_SIZES).to(DEVICE)
    ids = moved(tiny_inputs("bert"))["input_ids"]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            model(input_ids=ids)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = model(input_ids=ids).logits
    for seed in range(3):
        ids.copy_(tiny_inputs("bert", seed=seed)["input_ids"])
        graph.replay()
        assert torch.equal(found, model(input_ids=ids).logits)


# Graphs of PyTorch's own kernels round as eager does; Inductor's LayerNorm and the like sum in another order.
@pytest.mark.parametrize(
    ("options", "tolerance"),
    [({"backend": "cudagraphs"}, 0.0), ({"mode": "reduce-overhead"}, 1e-4)],
    ids=["cudagraphs", "reduce-overhead"],
)
@torch.no_grad()
def test_compiled_model_in_graphs_computes_what_eager_does(
    tiny_packed: Callable, tiny_inputs: Callable, options: dict[str, Any], tolerance: float
) -> None:
    torch._dynamo.reset()
    model = tiny_packed("bert", **FUSED_SIZES).to(DEVICE)
    compiled: Any = torch.compile(model, **options)
    # The first call runs, the second records a graph, and the others replay it.
    for seed in range(5):
        inputs = moved(tiny_inputs("bert", seed=seed))
        torch.compiler.cudagraph_mark_step_begin()
        found = compiled(**inputs).logits.clone()
        torch.testing.assert_close(found, model(**inputs).logits, rtol=tolerance, atol=tolerance)


def test_training_step_on_bits_is_that_of_float_products_within_rounding(
    tiny_committed: Callable, tiny_inputs: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    on_bits = tiny_committed("bert", StoMPPConfig(surrogate="none"), **dropout).train().to(DEVICE)
    on_floats, inputs = copy.deepcopy(on_bits), moved(tiny_inputs("bert", batch=4))
    labels = torch.tensor([0, 1, 2, 0], device=DEVICE)
    products = calls_of(monkeypatch, "binary_linear")

    loss = on_bits(**inputs, labels=labels).loss
    loss.backward()
    count = len(products)
    monkeypatch.setattr(activation_module, "has_native_kernels", lambda device: False)
    expected = on_floats(**inputs, labels=labels).loss
    expected.backward()

    assert len(products) == count
    assert count > 0 or cuda.device(DEVICE).product != "bits"
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    for (name, one), (_, other) in zip(on_bits.named_parameters(), on_floats.named_parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None), name
        if one.grad is not None:
            scale = other.grad.abs().max().item()
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-3, atol=1e-3 * scale + 1e-7, msg=name)


# ----- Masked binarization, in Triton -----

SHAPES = [(0, 5), (1, 1), (3, 7), (9, 65), (17, 770), (2, 3, 100), (2048, 768)]


def test_triton_runs_on_this_gpu() -> None:
    assert cuda.masked_kernels() is not None


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("surrogate", SURROGATES)
def test_weight_and_its_gradient_equal_the_reference(shape: Any, dtype: torch.dtype, surrogate: str) -> None:
    weight, grad, mask = draw(*shape, dtype=dtype), draw(*shape, dtype=dtype), torch.rand(shape) < 0.5
    scale = weight.float().abs().mean(-1, keepdim=True)

    value = torch.ops.hf_stompp.masked_weight(*on_gpu(weight, mask, scale, 1.3, dtype))
    assert torch.equal(value.cpu(), reference.masked_weight(weight, mask, scale, 1.3, dtype))
    arguments = grad, weight, mask, scale, 1.3, surrogate, 0.9
    passed = torch.ops.hf_stompp.masked_weight_grad(*on_gpu(*arguments))
    assert torch.equal(passed.cpu(), reference.masked_weight_grad(*arguments))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("surrogate", SURROGATES)
def test_activation_and_its_gradient_equal_the_reference(shape: Any, dtype: torch.dtype, surrogate: str) -> None:
    value, pre, grad = (draw(*shape, dtype=dtype) for _ in range(3))
    mask, (threshold, offset, center) = torch.rand(shape[-1]) < 0.5, (0.1 * draw(shape[-1]) for _ in range(3))
    amplitude, bound, window = torch.tensor(0.7), torch.tensor(1.1), torch.tensor(0.9)
    arguments = value, pre, mask, threshold, offset, amplitude, center, bound, surrogate, window

    expected = reference.masked_activation(*arguments)
    found = torch.ops.hf_stompp.masked_activation(*on_gpu(*arguments))
    assert all(torch.equal(a.cpu(), b) for a, b in zip(found, expected, strict=True))

    passed, sums = torch.ops.hf_stompp.masked_activation_grad(*on_gpu(grad, *expected[1:], mask))
    expected_passed, expected_sums = reference.masked_activation_grad(grad, *expected[1:], mask)
    assert torch.equal(passed.cpu(), expected_passed)
    torch.testing.assert_close(sums.cpu(), expected_sums, rtol=1e-10, atol=1e-10)
