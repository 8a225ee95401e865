"""The native CPU kernels against an independent computation, and how their library is found, built and loaded."""

from __future__ import annotations

import functools
import itertools
import json
import math
import os
import random
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from programs import write_program
from torch import Tensor

from hf_stompp.ops import build, cpu, pack_bits
from hf_stompp.ops.build import LIBRARY_NAME, BuildError, find_compiler, source_hash


DTYPES = [torch.float32, torch.bfloat16, torch.float16]
HALVES = [torch.bfloat16, torch.float16]

ROWS = [0, 1, 2, 7, 8, 9, 11, 12, 13, 31, 130, 1100]
IN_FEATURES = [1, 7, 63, 64, 65, 255, 256, 257, 768, 1000, 3072]
OUT_FEATURES = [1, 3, 15, 16, 17, 33, 63, 64, 65, 130, 770]

SUBNORMAL = 1e-40
SPECIAL_INPUTS = [-0.0, 0.0, math.inf, -math.inf, math.nan, SUBNORMAL, -SUBNORMAL, 6e-8, -6e-8]
SPECIAL_SCALES = [0.0, -0.0, math.inf, -math.inf, math.nan, SUBNORMAL, -SUBNORMAL, 3e38, -1e-38, 1e-7, 9e3]


# ----- The independent computation -----


def expected_signs(input: Tensor, threshold: Tensor | None) -> np.ndarray:
    limit = np.float32(0) if threshold is None else threshold.numpy()
    return input.float().numpy() >= limit


def expected_bits(signs: np.ndarray) -> Tensor:
    *shape, features = signs.shape
    padded = np.zeros((*shape, 256 * math.ceil(features / 256)), dtype=bool)
    padded[..., :features] = signs
    return torch.from_numpy(np.packbits(padded, axis=-1, bitorder="little"))


def expected_linear(
    signs: np.ndarray, weight: np.ndarray, scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    # float64 holds every integer below 2^53, and no sum is rounded on the way.
    integers = (2.0 * signs - 1) @ (2.0 * weight - 1).T
    with np.errstate(all="ignore"):
        output = integers.astype(np.float32) * scale.numpy()
        if bias is not None:
            output = output + bias.numpy()
    return torch.from_numpy(output).to(dtype)


def same(actual: Tensor, expected: Tensor) -> bool:
    """Equal dtypes, shapes and bits; any NaN equals any other, whose bits PyTorch itself leaves open."""
    if actual.dtype != expected.dtype or actual.shape != expected.shape:
        return False
    if not actual.dtype.is_floating_point:
        return torch.equal(actual, expected)
    as_bits = torch.int32 if actual.dtype == torch.float32 else torch.int16
    actual_bits, expected_bits = actual.contiguous().view(as_bits), expected.contiguous().view(as_bits)
    return bool(((actual_bits == expected_bits) | (actual.isnan() & expected.isnan())).all())


# ----- Kernels -----


@pytest.fixture(scope="module")
def shared_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder for all tests that do not care where the library is."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def native(shared_cache: Path) -> Iterator[cpu.NativeKernels]:
    """The library of this process, which another test may have loaded before."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_STOMPP_CACHE", str(shared_cache))
        kernels = cpu.native_kernels()
    if kernels is None:
        pytest.skip(f"no native kernels: {cpu.why_reference()}")
    yield kernels
    draw.cache_clear()


@pytest.fixture
def garbage() -> Iterator[None]:
    """New tensors hold NaN or the largest integer, so that an output which was not written shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


# ----- Exactness over shapes -----


@dataclass(frozen=True)
class Case:
    rows: int
    in_features: int
    out_features: int
    input_dtype: torch.dtype = torch.float32
    output_dtype: torch.dtype = torch.float32
    thresholds: bool = True
    bias: bool = True

    def __str__(self) -> str:
        names = [str(dtype).removeprefix("torch.") for dtype in (self.input_dtype, self.output_dtype)]
        options = "-thresholds" * self.thresholds + "-bias" * self.bias
        return f"{self.rows}x{self.in_features}x{self.out_features}-{names[0]}-to-{names[1]}{options}"


def draw_cases() -> list[Case]:
    """Every two of rows, in_features and out_features meet; the options are dealt out evenly, in random order."""
    options = list(itertools.product(DTYPES, DTYPES, [False, True], [False, True]))
    cases: list[Case] = []
    for i, j in itertools.product(range(len(IN_FEATURES)), range(len(ROWS))):
        if len(cases) % len(options) == 0:
            random.Random(len(cases)).shuffle(options)
        n = OUT_FEATURES[(i + j) % len(OUT_FEATURES)]
        cases.append(Case(ROWS[j], IN_FEATURES[i], n, *options[len(cases) % len(options)]))
    # Sums that no 16-bit accumulator holds.
    cases += [
        Case(9, 40_000, 17, torch.bfloat16),
        Case(2, 70_000, 5),
        Case(12, 150_001, 3, output_dtype=torch.float16),
    ]
    return cases


def draw_scale(generator: np.random.Generator, size: int) -> Tensor:
    scale = generator.standard_normal(size, dtype=np.float32) * np.exp2(generator.integers(-6, 6, size))
    special = generator.random(size) < 0.1
    scale[special] = generator.choice(SPECIAL_SCALES, size)[special]
    return torch.from_numpy(scale.astype(np.float32))


@dataclass(frozen=True)
class Drawn:
    """The arguments of all three operators, and what they should give."""

    input: Tensor
    threshold: Tensor | None
    packed_weight: Tensor
    scale: Tensor
    bias: Tensor | None
    output_threshold: Tensor | None
    bits: Tensor
    popcounts: Tensor
    output: Tensor
    output_bits: Tensor


@functools.cache
def draw(case: Case) -> Drawn:
    """The same for every kernel. Kept until the last test of this file."""
    generator = np.random.default_rng([case.rows, case.in_features, case.out_features])
    # Quarters are exact in every dtype, so that many values equal their threshold.
    values = np.round(4 * generator.standard_normal((case.rows, case.in_features))) / 4
    special = generator.random(values.shape) < 0.05
    values[special] = generator.choice(SPECIAL_INPUTS, values.shape)[special]
    # A row of one sign, so that the largest sums come about.
    values[: case.rows // 8] = 1
    input = torch.from_numpy(values).to(case.input_dtype)
    threshold = None
    if case.thresholds:
        limits = np.round(4 * generator.standard_normal(case.in_features)) / 4
        threshold = torch.from_numpy(limits.astype(np.float32))
    weight = generator.random((case.out_features, case.in_features)) < 0.5
    weight[: case.out_features // 8] = True
    scale = draw_scale(generator, case.out_features)
    bias = draw_scale(generator, case.out_features) if case.bias else None

    signs = expected_signs(input, threshold)
    output = expected_linear(signs, weight, scale, bias, case.output_dtype)
    output_threshold = None
    if case.thresholds:
        limits = draw_scale(generator, case.out_features)
        if case.rows:
            # The output of one of the rows, where it must be at or above the threshold.
            limits[::2] = output[generator.integers(case.rows), ::2].float()
        output_threshold = limits
    return Drawn(
        input=input,
        threshold=threshold,
        packed_weight=expected_bits(weight),
        scale=scale,
        bias=bias,
        output_threshold=output_threshold,
        bits=expected_bits(signs),
        popcounts=torch.from_numpy(signs.sum(-1, dtype=np.int32)),
        output=output,
        output_bits=expected_bits(expected_signs(output, output_threshold)),
    )


@pytest.mark.parametrize("case", draw_cases(), ids=str)
def test_kernel_is_bit_exact(kernels: SimpleNamespace, case: Case, garbage: None) -> None:
    drawn = draw(case)
    bits, popcounts = kernels.pack_sign(drawn.input, drawn.threshold)
    assert same(bits, drawn.bits)
    assert same(popcounts, drawn.popcounts)
    weight = (drawn.packed_weight, case.in_features, drawn.scale, drawn.bias, case.output_dtype)
    for source in [(drawn.input, drawn.threshold), (drawn.bits, None)]:
        assert same(kernels.binary_linear(*source, *weight), drawn.output)
        assert same(kernels.binary_linear_sign(*source, *weight, drawn.output_threshold), drawn.output_bits)


def test_cases_hold_every_pair_of_sizes() -> None:
    sizes = [(case.rows, case.in_features, case.out_features) for case in draw_cases()]
    for a, b in itertools.combinations([0, 1, 2], 2):
        wanted = itertools.product((ROWS, IN_FEATURES, OUT_FEATURES)[a], (ROWS, IN_FEATURES, OUT_FEATURES)[b])
        assert {(size[a], size[b]) for size in sizes} >= set(wanted)


# ----- Comparison with the threshold -----


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_every_half_precision_value_is_compared_in_float32(
    kernels: SimpleNamespace, dtype: torch.dtype, garbage: None
) -> None:
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    input = patterns.view(dtype).view(256, 256)
    thresholds: list[Tensor | None] = [None]
    for row in [0, 1, 100, 127, 128, 129, 200, 255]:
        equal = input[row].float()
        # Its neighbours are no half-precision values: rounded to one, they would be equal too.
        thresholds += [equal, equal.nextafter(torch.tensor(math.inf)), equal.nextafter(torch.tensor(-math.inf))]
    for threshold in thresholds:
        signs = expected_signs(input, threshold)
        bits, popcounts = kernels.pack_sign(input, threshold)
        assert same(bits, expected_bits(signs))
        assert popcounts.tolist() == signs.sum(-1).tolist()


def test_float32_special_values_are_compared_as_numbers(kernels: SimpleNamespace, garbage: None) -> None:
    tiny, smallest = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).smallest_subnormal)
    numbers = [0.0, smallest, 2 * smallest, SUBNORMAL, tiny, 1.0, 1 + 2**-23, 3.4e38, math.inf]
    edges = torch.tensor([*numbers, *(-number for number in numbers), math.nan, -math.nan])
    # Padded with copies, so that whole vectors are compared and not only a tail.
    threshold = edges.repeat(5)
    input = edges[:, None].expand(-1, len(threshold)).contiguous()
    for limit in [threshold, None]:
        signs = expected_signs(input, limit)
        bits, popcounts = kernels.pack_sign(input, limit)
        assert same(bits, expected_bits(signs))
        assert popcounts.tolist() == signs.sum(-1).tolist()
        # The signs of an input that is multiplied are taken elsewhere than those that are packed.
        weight = np.eye(len(threshold), dtype=bool)
        ones = torch.ones(len(threshold))
        product = kernels.binary_linear(input, limit, expected_bits(weight), len(threshold), ones, None, torch.float32)
        assert same(product, expected_linear(signs, weight, ones, None, torch.float32))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_is_clear_and_minus_zero_is_set(kernels: SimpleNamespace, dtype: torch.dtype) -> None:
    input = torch.tensor([math.nan, -0.0, 0.0, -1.0, math.inf, -math.inf, -math.nan], dtype=dtype)
    bits, popcounts = kernels.pack_sign(input)
    assert bits.tolist() == [0b0010110, *[0] * 31]
    assert popcounts.item() == 3


@pytest.mark.parametrize("in_features", [1, 8, 63, 256, 257, 3072])
def test_rows_of_one_value_give_the_largest_sums(kernels: SimpleNamespace, in_features: int, garbage: None) -> None:
    input = torch.tensor([[1.0], [-1.0], [math.nan], [-0.0]]).expand(-1, in_features)
    weight = expected_bits(np.array([[True], [False]]).repeat(in_features, axis=1))
    output = kernels.binary_linear(input, None, weight, in_features, torch.ones(2), None, torch.float32)
    assert output.tolist() == [[k, -k] for k in (in_features, -in_features, -in_features, in_features)]


# ----- Rounding of the output -----


def one_feature_outputs(kernels: SimpleNamespace, values: Tensor, dtype: torch.dtype) -> Tensor:
    """The layer of one feature whose scales are `values`: rounds each of them to `dtype`."""
    weight = expected_bits(np.ones((len(values), 1), dtype=bool))
    return kernels.binary_linear(torch.ones(1, 1), None, weight, 1, values, None, dtype)[0]


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_half_precision_output_is_rounded_to_nearest_even(
    kernels: SimpleNamespace, dtype: torch.dtype, garbage: None
) -> None:
    # All finite values, from the subnormals to the largest, and infinity as the number that would follow.
    count = int(torch.tensor(math.inf, dtype=dtype).view(torch.int16)) + 1
    grid = torch.arange(count, dtype=torch.int16).view(dtype).double()
    grid[-1] = 2 * grid[-2] - grid[-3]
    ties = ((grid[:-1] + grid[1:]) / 2).float()
    up, down = ties.nextafter(torch.tensor(math.inf)), ties.nextafter(torch.tensor(0.0))
    for values in (ties, up, down, grid[:-1].float()):
        both_signs = torch.cat([values, -values])
        assert same(one_feature_outputs(kernels, both_signs, dtype), both_signs.to(dtype))
    # The tie between two numbers goes to the one whose last bit is 0.
    rounded = one_feature_outputs(kernels, ties, dtype).view(torch.int16)
    lower = torch.arange(count - 1, dtype=torch.int16)
    assert torch.equal(rounded, lower + (lower & 1))


def test_float16_output_overflows_to_infinity_and_underflows_to_zero(kernels: SimpleNamespace) -> None:
    values = torch.tensor([65519.99, 65520.0, -65520.0, 1e38, 2.0**-25, 2.0**-24, -(2.0**-26), SUBNORMAL])
    output = one_feature_outputs(kernels, values, torch.float16)
    assert output.tolist() == [65504.0, math.inf, -math.inf, math.inf, 0.0, 2.0**-24, -0.0, 0.0]
    assert output.signbit().tolist() == [False, False, True, False, False, False, True, False]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_float32_bits_are_a_scale_and_a_bias(kernels: SimpleNamespace, dtype: torch.dtype, garbage: None) -> None:
    generator = np.random.default_rng(0)
    size = 4001
    scale, bias = (
        torch.from_numpy(generator.integers(0, 2**32, size, dtype=np.uint32).view(np.float32)) for _ in range(2)
    )
    # Half of them of one magnitude, as the larger number would hide the other.
    bias[::2] = scale[::2] * torch.from_numpy(generator.standard_normal(len(bias[::2]), dtype=np.float32))
    signs, weight = generator.random((5, 9)) < 0.5, generator.random((size, 9)) < 0.5
    for constant in (bias, None):
        output = kernels.binary_linear(expected_bits(signs), None, expected_bits(weight), 9, scale, constant, dtype)
        assert same(output, expected_linear(signs, weight, scale, constant, dtype))


def test_product_is_rounded_before_the_bias_is_added(kernels: SimpleNamespace) -> None:
    # float32(1 / 3) * 3 is 1 + 2^-25: rounded to 1, of which nothing is left, where a fused operation leaves 2^-25.
    third, minus_one = torch.full((17,), 1 / 3), torch.full((17,), -1.0)
    assert third[0].item() * 3 - 1 == 2**-25
    weight = expected_bits(np.ones((17, 3), dtype=bool))
    output = kernels.binary_linear(torch.ones(13, 3), None, weight, 3, third, minus_one, torch.float32)
    assert torch.equal(output, torch.zeros(13, 17))


@pytest.mark.parametrize(
    ("dtype", "value", "limit", "expected"),
    [
        (torch.float32, 1 + 2**-9, 1 + 2**-9, True),
        (torch.bfloat16, 1 + 2**-9, 1 + 2**-9, False),
        (torch.bfloat16, 1 + 2**-9, 1.0, True),
        (torch.float16, 1 + 2**-11, 1 + 2**-11, False),
        (torch.float16, 65520.0, 3e38, True),
        (torch.float16, -(2.0**-26), 0.0, True),
        (torch.float32, -(2.0**-26), 0.0, False),
        (torch.float32, -SUBNORMAL, 0.0, False),
        (torch.bfloat16, math.nan, -math.inf, False),
        (torch.float32, math.inf, math.inf, True),
        (torch.float32, 1.0, math.nan, False),
        (torch.float32, -0.0, None, True),
    ],
    ids=str,
)
def test_output_bit_is_the_sign_of_the_rounded_output(
    kernels: SimpleNamespace, dtype: torch.dtype, value: float, limit: float | None, expected: bool
) -> None:
    size = 70
    weight = expected_bits(np.ones((size, 1), dtype=bool))
    limits = None if limit is None else torch.full((size,), limit)
    scale = torch.full((size,), value)
    bits = kernels.binary_linear_sign(torch.ones(13, 1), None, weight, 1, scale, None, dtype, limits)
    assert same(bits, expected_bits(np.full((13, size), expected)))


# ----- Memory layout, threads -----


CASE = Case(33, 300, 70, torch.float32, torch.float32)


def all_outputs(kernels: SimpleNamespace, drawn: Drawn, in_features: int, dtype: torch.dtype) -> list[Tensor]:
    weight = (drawn.packed_weight, in_features, drawn.scale, drawn.bias, dtype)
    return [
        *kernels.pack_sign(drawn.input, drawn.threshold),
        kernels.binary_linear(drawn.input, drawn.threshold, *weight),
        kernels.binary_linear(drawn.bits, None, *weight),
        kernels.binary_linear_sign(drawn.input, drawn.threshold, *weight, drawn.output_threshold),
        kernels.binary_linear_sign(drawn.bits, None, *weight, drawn.output_threshold),
    ]


def assert_as_drawn(kernels: SimpleNamespace, arguments: Drawn, case: Case) -> None:
    drawn = draw(case)
    expected = [drawn.bits, drawn.popcounts, *[drawn.output] * 2, *[drawn.output_bits] * 2]
    for actual, wanted in zip(
        all_outputs(kernels, arguments, case.in_features, case.output_dtype), expected, strict=True
    ):
        assert same(actual, wanted)


def rearranged(drawn: Drawn, rearrange: Callable[[Tensor], Tensor]) -> Drawn:
    """The same values in other memory."""
    tensors = {name: None if value is None else rearrange(value) for name, value in vars(drawn).items()}
    for name, value in tensors.items():
        assert value is None or same(value, getattr(drawn, name))
    return Drawn(**tensors)


def every_second(tensor: Tensor) -> Tensor:
    return torch.stack([tensor, torch.ones_like(tensor)], dim=-1)[..., 0]


def column_major(tensor: Tensor) -> Tensor:
    return tensor.T.contiguous().T if tensor.dim() == 2 else every_second(tensor)


def window(tensor: Tensor) -> Tensor:
    """The middle of a larger tensor."""
    larger = torch.ones([size + 3 for size in tensor.shape], dtype=tensor.dtype)
    for dim, size in enumerate(tensor.shape):
        larger = larger.narrow(dim, 1, size)
    return larger.copy_(tensor)


@pytest.mark.parametrize("rearrange", [every_second, column_major, window])
def test_arguments_need_not_be_contiguous(kernels: SimpleNamespace, rearrange: Callable[[Tensor], Tensor]) -> None:
    assert_as_drawn(kernels, rearranged(draw(CASE), rearrange), CASE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("elements", [1, 3])
def test_arguments_need_not_be_aligned(kernels: SimpleNamespace, elements: int, dtype: torch.dtype) -> None:
    def shifted(tensor: Tensor) -> Tensor:
        return torch.cat([tensor.new_ones(elements), tensor.flatten()])[elements:].view(tensor.shape)

    case = Case(13, 257, 33, dtype, dtype)
    arguments = rearranged(draw(case), shifted)
    assert arguments.packed_weight.data_ptr() % 2 == 1
    assert_as_drawn(kernels, arguments, case)


def test_arguments_are_left_as_they_were(kernels: SimpleNamespace) -> None:
    arguments = rearranged(draw(CASE), Tensor.clone)
    all_outputs(kernels, arguments, CASE.in_features, CASE.output_dtype)
    for name, value in vars(arguments).items():
        assert same(value, getattr(draw(CASE), name)), name


@pytest.mark.parametrize("shape", [(), (1,), (2, 3, 5), (2, 0, 3), (0,)], ids=str)
def test_any_leading_dimensions_are_kept(kernels: SimpleNamespace, shape: tuple[int, ...]) -> None:
    count = math.prod(shape)
    drawn = draw(CASE)
    input, bits = drawn.input[:count].view(*shape, 300), drawn.bits[:count].view(*shape, 64)
    weight = (drawn.packed_weight, 300, drawn.scale, drawn.bias, torch.bfloat16)
    packed, popcounts = kernels.pack_sign(input, drawn.threshold)
    assert same(packed, bits)
    assert same(popcounts, drawn.popcounts[:count].view(shape))
    output = drawn.output[:count].to(torch.bfloat16).view(*shape, 70)
    output_bits = expected_bits(expected_signs(output, None))
    for source in [(input, drawn.threshold), (bits, None)]:
        assert same(kernels.binary_linear(*source, *weight), output)
        assert same(kernels.binary_linear_sign(*source, *weight, None), output_bits)


@pytest.mark.parametrize("threads", [1, 2, 5])
# The large ones are divided among threads: rows, columns, or both.
@pytest.mark.parametrize("sizes", [(2, 65, 130), (3000, 3072, 17), (1100, 257, 770), (12, 3072, 3500)], ids=str)
def test_result_does_not_depend_on_the_number_of_threads(
    kernels: SimpleNamespace, sizes: tuple[int, int, int], threads: int, restore_threads: None, garbage: None
) -> None:
    torch.set_num_threads(threads)
    case = Case(*sizes, torch.bfloat16, torch.float16)
    assert_as_drawn(kernels, draw(case), case)


@pytest.mark.parametrize("rows", [4095, 6001])
def test_output_of_many_megabytes_is_whole(kernels: SimpleNamespace, rows: int) -> None:
    # From 16 MB on the memory of the output is treated otherwise.
    signs, weight = torch.randn(rows, 9), torch.randn(1025, 9)
    scale, bias = torch.rand(1025), torch.randn(1025)
    expected = torch.where(signs >= 0, 1.0, -1.0) @ torch.where(weight >= 0, 1.0, -1.0).T * scale + bias
    output = kernels.binary_linear(signs, None, pack_bits(weight), 9, scale, bias, torch.float32)
    assert output.nbytes > 16 * 2**20 and torch.equal(output, expected)


def test_python_threads_may_run_the_kernels_at_once(kernels: SimpleNamespace, restore_threads: None) -> None:
    torch.set_num_threads(2)
    cases = [Case(9 + i, 500 + i, 65 + i, DTYPES[i % 3], DTYPES[i // 3]) for i in range(8)]
    for case in cases:
        draw(case)
    with ThreadPoolExecutor(8) as pool:
        for _ in pool.map(lambda case: assert_as_drawn(kernels, draw(case), case), cases * 8):
            pass


# ----- Choosing a kernel -----


def test_each_kernel_runs_or_has_a_reason_not_to(native: cpu.NativeKernels) -> None:
    reasons = {name: native.unavailable(name) for name in cpu.KERNELS}
    assert list(reasons) == ["amx", "avx512", "avx2", "neon", "scalar"]
    assert reasons["scalar"] is None
    # No processor has both.
    assert reasons["avx2"] or reasons["neon"]
    for name, reason in reasons.items():
        if reason is None:
            assert cpu.NativeKernels(native.native, kernel=name).kernel == name
        else:
            with pytest.raises(RuntimeError) as raised:
                cpu.NativeKernels(native.native, kernel=name)
            assert reason in str(raised.value)
            assert name in str(raised.value)


def test_a_library_without_a_kernel_for_this_processor_leaves_the_work_to_the_reference(
    compiler: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "KERNEL_FILES", {name: {} for name in build.KERNEL_FILES})
    monkeypatch.setattr(cpu, "INSTALLED", build.build(tmp_path / LIBRARY_NAME))
    with pytest.warns(RuntimeWarning, match="no kernel that this processor can run: set CC to another compiler"):
        kernels, reason = cpu._load(None)
    assert kernels is None and str(tmp_path / LIBRARY_NAME) in reason
    with pytest.raises(RuntimeError, match="scalar"):
        cpu._load("scalar")


# ----- The library in fresh processes -----

# Forks a process for each request: importing Transformers anew would take some seconds each time. Nothing native is
# loaded before the fork.
SERVER = """
import json, os, signal, sys, tempfile, traceback, warnings
from pathlib import Path

import torch

from hf_stompp import ops
from hf_stompp.ops import cpu
from hf_stompp.ops.operators import on_kernels

reference = on_kernels("cpu", None)
cpu.INSTALLED = Path("/nonexistent")

def start(code, environment):
    output = tempfile.TemporaryFile("w+")
    pid = os.fork()
    if pid == 0:
        signal.alarm(300)
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
        os.environ.clear()
        os.environ.update(environment)
        status = 1
        try:
            exec(code, dict(globals()))
            status = 0
        except BaseException as error:
            print(*traceback.format_exception_only(error), sep="")
        finally:
            sys.stdout.flush()
            os._exit(status)
    return pid, output

for line in sys.stdin:
    started = [start(code, environment) for code, environment in json.loads(line)]
    answers = []
    for pid, output in started:
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        output.seek(0)
        answers.append([status, output.read()])
    print(json.dumps(answers), flush=True)
"""

# What a process says about its kernels and its results.
REPORT = """
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    input = torch.arange(-300, 301).float().view(1, -1) + torch.arange(5)[:, None]
    weight = ops.pack_bits(torch.sin(torch.arange(7 * 601.0)).view(7, 601))
    arguments = (input, None, weight, 601, torch.linspace(-1, 1, 7), torch.ones(7), torch.float32)
    outputs = [*ops.pack_sign(input), ops.binary_linear(*arguments), ops.binary_linear_sign(*arguments, None)]
    outputs = [*outputs, ops.binary_linear(*arguments)]
expected = [*reference.pack_sign(input), reference.binary_linear(*arguments)]
expected = [*expected, reference.binary_linear_sign(*arguments, None), expected[2]]
native = cpu.native_kernels()
print(json.dumps({
    "path": native and str(native.path),
    "kernel": native and native.kernel,
    "available": native and [name for name in cpu.KERNELS if native.unavailable(name) is None],
    "equal": all(map(torch.equal, outputs, expected)),
    "warnings": [[warning.category.__name__, str(warning.message)] for warning in caught],
    "why_reference": cpu.why_reference(),
}))
"""


@dataclass(frozen=True)
class Outcome:
    status: int
    output: str

    @property
    def report(self) -> dict[str, Any]:
        assert self.status == 0, f"exit status {self.status}\n{self.output}"
        return json.loads(self.output.splitlines()[-1])


class Processes:
    """Runs code in processes that have imported the package and used nothing of it."""

    def __init__(self) -> None:
        self.base = {name: value for name, value in os.environ.items() if not name.startswith("HF_STOMPP_")}
        self.base.pop("CC", None)
        self.base |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.server = subprocess.Popen([sys.executable, "-c", SERVER], env=self.base, **pipes)

    def run_at_once(self, count: int, code: str, **environment: str) -> list[Outcome]:
        assert self.server.stdin is not None and self.server.stdout is not None
        print(json.dumps([[code, self.base | environment]] * count), file=self.server.stdin, flush=True)
        return [Outcome(*answer) for answer in json.loads(self.server.stdout.readline())]

    def run(self, code: str = REPORT, **environment: str) -> Outcome:
        return self.run_at_once(1, code, **environment)[0]


@pytest.fixture(scope="module")
def processes() -> Iterator[Processes]:
    processes = Processes()
    yield processes
    processes.server.stdin.close()
    processes.server.wait(timeout=60)


@pytest.fixture(scope="module")
def compiler() -> str:
    try:
        return shlex.join(find_compiler())
    except BuildError as error:
        pytest.skip(str(error))


@dataclass(frozen=True)
class OldCompiler:
    """One without vector instructions, which makes it quick, and that keeps a list of what it was asked."""

    path: Path
    log: Path

    @property
    def links(self) -> int:
        """How many libraries it has made."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        return sum("-shared" in line and LIBRARY_NAME in line for line in lines)


@pytest.fixture
def old_compiler(compiler: str, tmp_path: Path) -> OldCompiler:
    log = tmp_path / "log"
    script = f'echo "$@" >> {log}\ncase "$*" in *-mavx*) exit 1;; esac\nexec {compiler} "$@" -O0'
    return OldCompiler(write_program(tmp_path / "old-cc", script), log)


def installed(native: cpu.NativeKernels) -> str:
    """Code for a process of `processes`: its installed library is the one of this process."""
    return f"cpu.INSTALLED = Path({str(native.path)!r})\n"


def cached_libraries(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.so"))


@pytest.mark.slow
def test_kernels_of_a_process_of_its_own_are_native(compiler: str, shared_cache: Path) -> None:
    # Without the fork of the other tests, and through the package's ordinary import.
    code = (
        "import json, warnings, torch\nfrom hf_stompp import ops\nfrom hf_stompp.ops import cpu\n"
        f"reference = ops.operators.on_kernels('cpu', None)\n{REPORT}"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_STOMPP_")}
    environment |= {"HF_STOMPP_CACHE": str(shared_cache), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    report = Outcome(result.returncode, result.stdout or result.stderr).report
    assert report["path"] is not None
    assert report["kernel"] is None
    assert report["equal"]
    assert report["warnings"] == []
    assert report["why_reference"] is None


@pytest.mark.slow
def test_first_use_builds_a_library_that_the_next_process_loads(
    processes: Processes, old_compiler: OldCompiler, tmp_path: Path
) -> None:
    cache = tmp_path / "not" / "yet" / "there"
    environment = {"HF_STOMPP_CACHE": str(cache), "CC": str(old_compiler.path)}
    first = processes.run(**environment).report
    [library] = cached_libraries(cache)
    assert first["path"] == str(library)
    assert first["equal"] and first["warnings"] == []
    assert library.parent.parent == cache
    before = library.stat()
    second = processes.run(**environment).report
    assert second == first
    assert (library.stat().st_mtime_ns, library.stat().st_ino) == (before.st_mtime_ns, before.st_ino)
    assert old_compiler.links == 1


@pytest.mark.slow
def test_each_compiler_has_a_folder_of_its_own(
    processes: Processes, old_compiler: OldCompiler, tmp_path: Path
) -> None:
    paths = [
        processes.run(HF_STOMPP_CACHE=str(tmp_path / "cache"), CC=command).report["path"]
        for command in (f"{old_compiler.path}", f"{old_compiler.path} -DSOMETHING")
    ]
    assert {*map(Path, paths)} == {*cached_libraries(tmp_path / "cache")}
    assert len({Path(path).parent for path in paths}) == 2


@pytest.mark.slow
def test_kernels_that_the_compiler_does_not_know_are_left_out(
    processes: Processes, old_compiler: OldCompiler, tmp_path: Path, native: cpu.NativeKernels
) -> None:
    if native.unavailable("avx2") is not None:
        pytest.skip("the processor has no AVX2")
    environment = {"HF_STOMPP_CACHE": str(tmp_path / "cache"), "CC": str(old_compiler.path)}
    assert processes.run(**environment).report["available"] == ["scalar"]
    forced = processes.run(**environment, HF_STOMPP_CPU="avx2")
    assert forced.status == 1
    assert forced.output.startswith("RuntimeError: ")
    assert "avx2" in forced.output and "not built" in forced.output


def test_nothing_is_built_for_processors_whose_words_begin_with_the_highest_byte(
    compiler: str, tmp_path: Path
) -> None:
    with pytest.raises(build.BuildError, match="little-endian"):
        build.build(tmp_path / LIBRARY_NAME, ["-D__BYTE_ORDER__=__ORDER_BIG_ENDIAN__"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_processes_that_start_at_once_build_once(
    processes: Processes, old_compiler: OldCompiler, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    outcomes = processes.run_at_once(6, REPORT, HF_STOMPP_CACHE=str(cache), CC=str(old_compiler.path))
    [library] = cached_libraries(cache)
    for outcome in outcomes:
        assert outcome.report["path"] == str(library)
        assert outcome.report["equal"] and outcome.report["warnings"] == []
    assert old_compiler.links == 1
    # Nothing is left of the build.
    assert [path for path in library.parent.iterdir() if path.is_dir()] == []


@pytest.mark.slow
def test_threads_that_start_at_once_build_once(
    processes: Processes, old_compiler: OldCompiler, tmp_path: Path
) -> None:
    code = """
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

barrier = Barrier(8)
input = torch.arange(-300, 300).float()

def use(_):
    barrier.wait()
    return ops.pack_sign(input)[0]

with ThreadPoolExecutor(8) as pool:
    results = list(pool.map(use, range(8)))
assert all(torch.equal(result, reference.pack_sign(input)[0]) for result in results)
assert cpu.native_kernels() is not None
"""
    outcome = processes.run(code, HF_STOMPP_CACHE=str(tmp_path / "cache"), CC=str(old_compiler.path))
    assert outcome.status == 0, outcome.output
    assert old_compiler.links == 1


def another_library(library: bytes) -> bytes:
    """One that loads, and has none of the functions."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / LIBRARY_NAME
        subprocess.run([*find_compiler(), "-shared", "-x", "c", os.devnull, "-o", str(path)], check=True)
        return path.read_bytes()


def of_other_sources(library: bytes) -> bytes:
    """The library with another name of its sources, as left by an upgrade of the package."""
    name = source_hash().encode()
    assert name in library
    return library.replace(name, b"0" * len(name))


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda library: b"",
    "text": lambda library: b"no library\n" * 1000,
    "only the first page": lambda library: library[:4096],
    "first half": lambda library: library[: len(library) // 2],
    "second half of zeros": lambda library: library[: len(library) // 2] + bytes(len(library) - len(library) // 2),
    "another library": another_library,
    "of other sources": of_other_sources,
}


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_cached_library_that_is_damaged_or_does_not_fit_is_rebuilt(
    processes: Processes, old_compiler: OldCompiler, tmp_path: Path, damage: Callable[[bytes], bytes]
) -> None:
    cache = tmp_path / "cache"
    environment = {"HF_STOMPP_CACHE": str(cache), "CC": str(old_compiler.path)}
    whole = processes.run(**environment).report
    [library] = cached_libraries(cache)
    library.write_bytes(damage(library.read_bytes()))
    # The process that finds it must work, and so must the next.
    for _ in range(2):
        assert processes.run(**environment).report == whole
    assert old_compiler.links == 2


@pytest.mark.slow
@pytest.mark.parametrize("fits", [True, False], ids=["of these sources", "of other sources"])
def test_installed_library_is_used_where_it_fits_the_sources(
    processes: Processes, old_compiler: OldCompiler, tmp_path: Path, fits: bool
) -> None:
    cache, installed = tmp_path / "cache", tmp_path / "installed" / LIBRARY_NAME
    environment = {"HF_STOMPP_CACHE": str(cache), "CC": str(old_compiler.path)}
    assert processes.run(**environment).report["equal"]
    [library] = cached_libraries(cache)
    installed.parent.mkdir()
    content = library.read_bytes()
    installed.write_bytes(content if fits else of_other_sources(content))
    code = f"cpu.INSTALLED = Path({str(installed)!r})\n{REPORT}"
    # With a fitting one no compiler is needed.
    environment |= {"CC": "/nonexistent"} if fits else {}
    report = processes.run(code, **environment).report
    assert report["path"] == str(installed if fits else library)
    assert report["equal"] and report["warnings"] == []


NO_COMPILER = {
    "CC of a path that is not there": ({"CC": "/nonexistent"}, "/nonexistent"),
    "CC of a name that is not there": ({"CC": "no-such-compiler -O2"}, "no-such-compiler"),
    "CC that is no command": ({"CC": '"gcc'}, "CC"),
    "CC that fails": ({"CC": shutil.which("false") or "/bin/false"}, "false"),
    "empty PATH": ({"PATH": ""}, "no C compiler"),
}


@pytest.mark.slow
@pytest.mark.parametrize(("environment", "reason"), NO_COMPILER.values(), ids=NO_COMPILER.keys())
def test_without_a_compiler_the_reference_runs_and_one_warning_says_why(
    processes: Processes, tmp_path: Path, environment: dict[str, str], reason: str
) -> None:
    report = processes.run(**{"HF_STOMPP_CACHE": str(tmp_path / "cache"), **environment}).report
    assert report["path"] is None
    assert report["equal"]
    [[category, message]] = report["warnings"]
    assert category == "RuntimeWarning"
    assert reason in message
    assert reason in report["why_reference"]
    assert cached_libraries(tmp_path) == []


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["avx2", "scalar"])
def test_without_a_compiler_a_kernel_that_is_asked_for_raises(
    processes: Processes, tmp_path: Path, kernel: str
) -> None:
    outcome = processes.run(HF_STOMPP_CACHE=str(tmp_path), CC="/nonexistent", HF_STOMPP_CPU=kernel)
    assert outcome.status == 1
    assert outcome.output.startswith("RuntimeError: ")
    assert kernel in outcome.output and "/nonexistent" in outcome.output


@pytest.mark.slow
def test_cache_that_cannot_be_written_is_warned_of(processes: Processes, compiler: str, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    report = processes.run(HF_STOMPP_CACHE=str(file)).report
    assert report["path"] is None and report["equal"]
    [[category, message]] = report["warnings"]
    assert category == "RuntimeWarning" and str(file) in message


@pytest.mark.slow
def test_variable_chooses_the_kernel(processes: Processes, native: cpu.NativeKernels) -> None:
    for name in cpu.KERNELS:
        outcome = processes.run(installed(native) + REPORT, HF_STOMPP_CPU=name)
        reason = native.unavailable(name)
        if reason is None:
            assert outcome.report["kernel"] == name
            assert outcome.report["equal"] and outcome.report["warnings"] == []
        else:
            assert outcome.status == 1
            assert outcome.output.startswith("RuntimeError: ")
            assert name in outcome.output and reason in outcome.output


@pytest.mark.slow
def test_variable_chooses_the_reference_without_a_warning(processes: Processes, tmp_path: Path) -> None:
    report = processes.run(HF_STOMPP_CACHE=str(tmp_path), CC="/nonexistent", HF_STOMPP_CPU="reference").report
    assert report["path"] is None and report["equal"]
    assert report["warnings"] == []
    assert "HF_STOMPP_CPU" in report["why_reference"]


@pytest.mark.slow
@pytest.mark.parametrize("value", ["sse", "AVX2", "avx2,scalar", " "])
def test_variable_with_another_name_is_refused(processes: Processes, tmp_path: Path, value: str) -> None:
    for code in [REPORT, "cpu.native_kernels()"]:
        outcome = processes.run(code, HF_STOMPP_CACHE=str(tmp_path), HF_STOMPP_CPU=value)
        assert outcome.status == 1
        assert outcome.output.startswith("ValueError: ")
        for allowed in [*cpu.KERNELS, "reference", "HF_STOMPP_CPU", repr(value)]:
            assert allowed in outcome.output


@pytest.mark.slow
def test_importing_the_operators_loads_nothing(processes: Processes, tmp_path: Path) -> None:
    outcome = processes.run("from hf_stompp.ops import operators", HF_STOMPP_CACHE=str(tmp_path), HF_STOMPP_CPU="sse")
    assert outcome.status == 0, outcome.output
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
def test_kernels_take_as_many_threads_as_pytorch(processes: Processes, native: cpu.NativeKernels) -> None:
    if not native.has_threads:
        pytest.skip("the library was built without OpenMP")
    code = """
input, weight, scale = torch.randn(1100, 3072), ops.pack_bits(torch.randn(770, 3072)), torch.randn(770)
counts = []
for threads in (1, 3, 5):
    torch.set_num_threads(threads)
    ops.binary_linear(input, None, weight, 3072, scale, None, torch.float32)
    counts.append(len(os.listdir("/proc/self/task")))
print(json.dumps(counts))
"""
    # OpenMP keeps the threads of a call for the next one.
    one, three, five = processes.run(installed(native) + code).report
    assert (three - one, five - one) == (2, 4)


# Every argument and every output ends where the process may touch nothing further, or begins where it may touch
# nothing before.
AT_THE_EDGE = """
import ctypes, itertools, mmap

from torch.overrides import TorchFunctionMode

protect = ctypes.CDLL(None, use_errno=True).mprotect
protect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
kept, edges = [], set()

def at_edge(tensor, at_end):
    if tensor is None or tensor.numel() == 0:
        return tensor
    page = mmap.PAGESIZE
    size = tensor.numel() * tensor.element_size()
    inner = -(-size // page) * page
    memory = mmap.mmap(-1, inner + 2 * page)
    kept.append(memory)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    offset = page + (inner - size if at_end else 0)
    moved = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=offset).view(tensor.shape)
    moved.copy_(tensor)
    edges.add(moved.data_ptr())
    for address in (start, start + page + inner):
        assert protect(address, page, 0) == 0
    return moved

class OutputsAtEdge(TorchFunctionMode):
    def __init__(self, at_end):
        self.at_end = at_end

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        return at_edge(result, self.at_end) if func is torch.Tensor.new_empty else result

native = cpu.native_kernels()
assert native is not None
names = [name for name in cpu.KERNELS if native.unavailable(name) is None]
floats = [torch.float32, torch.bfloat16, torch.float16]
sizes = [1, 7, 16, 63, 65, 130, 257, 300]
rows = (1, 2, 3, 9, 13, 17, 33)
cases = [(rows[i % 7], *pair) for i, pair in enumerate(itertools.product(sizes, sizes))]
# Large enough to be divided among threads.
cases += [(3000, 3072, 65), (131, 1000, 770), (12, 3072, 3500)]
for i, (m, k, n) in enumerate(cases):
    dtype = floats[i % 3]
    torch.set_num_threads(1 if m * k * n < 1e7 else 3)
    x = torch.randn(m, k).to(dtype)
    weight = ops.pack_bits(torch.randn(n, k))
    threshold, scale, bias, limits = torch.randn(k), torch.randn(n), torch.randn(n), torch.randn(n)
    bits = reference.pack_sign(x, threshold)
    linear = reference.binary_linear(x, threshold, weight, k, scale, bias, dtype)
    sign = reference.binary_linear_sign(x, threshold, weight, k, scale, bias, dtype, limits)
    for at_end in (True, False):
        edge = [at_edge(tensor, at_end) for tensor in (x, bits[0], threshold, weight, scale, bias, limits)]
        x_, bits_, threshold_, weight_, scale_, bias_, limits_ = edge
        for name in names:
            kernels = on_kernels("cpu", cpu.NativeKernels(native.native, name))
            with OutputsAtEdge(at_end):
                outputs = [*kernels.pack_sign(x_, threshold_)]
                for source in ((x_, threshold_), (bits_, None)):
                    arguments = (*source, weight_, k, scale_, bias_, dtype)
                    outputs += [kernels.binary_linear(*arguments), kernels.binary_linear_sign(*arguments, limits_)]
            assert all(map(torch.equal, outputs, [*bits, linear, sign, linear, sign]))
            assert all(output.numel() == 0 or output.data_ptr() in edges for output in outputs)
print(json.dumps(names))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="mprotect of the C library")
def test_kernels_touch_nothing_beside_their_arguments_and_outputs(
    processes: Processes, native: cpu.NativeKernels
) -> None:
    outcome = processes.run(installed(native) + AT_THE_EDGE)
    assert outcome.report == [name for name in cpu.KERNELS if native.unavailable(name) is None]


@pytest.mark.slow
def test_outputs_are_on_the_cpu_whatever_the_default_device(processes: Processes, native: cpu.NativeKernels) -> None:
    code = """
input, weight, scale = torch.randn(3, 10), ops.pack_bits(torch.randn(5, 10)), torch.randn(5)
arguments = (input, None, weight, 10, scale, None, torch.float32)
native = on_kernels("cpu", cpu.native_kernels())
outputs = []
for run in (reference, ops, native):
    torch.set_default_device("cpu" if run is reference else "meta")
    outputs.append([*run.pack_sign(input), run.binary_linear(*arguments), run.binary_linear_sign(*arguments, None)])
torch.set_default_device("cpu")
for others in outputs[1:]:
    assert all(map(torch.equal, outputs[0], others))
"""
    outcome = processes.run(installed(native) + code)
    assert outcome.status == 0, f"exit status {outcome.status}\n{outcome.output}"
