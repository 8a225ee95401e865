"""Masked weights and activations, value and gradient, and products of packed signs: numbers, PyTorch, refusals."""

from __future__ import annotations

import functools
import itertools
import math
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from hf_stompp.ops import SURROGATES as SURROGATES_TABLE
from hf_stompp.ops import cpu
from hf_stompp.ops.operators import on_kernels
from hf_stompp.ops.weights import Surrogate


Outputs = tuple[Tensor, ...]

HALVES = [torch.bfloat16, torch.float16]
NATIVE_DTYPES = [torch.float32, *HALVES]
DTYPES = [*NATIVE_DTYPES, torch.float64]
SURROGATES = ["none", "ste", "clipped_ste"]
OPS = ["sign_product", "masked_weight", "masked_weight_grad", "masked_activation", "masked_activation_grad"]
MASKED_OPS = OPS[1:]

FEATURES = [1, 7, 63, 64, 65, 255, 256, 257, 770, 3072]
LEADING = [(0,), (1,), (), (37,), (2, 3), (2, 0, 3)]
# From 128 thousand elements on two threads share the work: rows or columns, evenly or not.
LARGE = [(2005, 65), (43, 3072), (170, 770), (1, 130_001)]


reference = on_kernels("cpu", None)


# ----- Kernels -----


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> cpu.NativeKernels:
    """The library of this process, which another test may have loaded before."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_STOMPP_CACHE", str(tmp_path_factory.mktemp("cache")))
        kernels = cpu.native_kernels()
    if kernels is None:
        pytest.skip(f"no native kernels: {cpu.why_reference()}")
    return kernels


def kernels_named(native: cpu.NativeKernels, name: str) -> SimpleNamespace:
    if name == "best":
        return on_kernels("cpu", cpu.NativeKernels(native.native))
    reason = native.unavailable(name)
    if reason is not None:
        pytest.skip(reason)
    return on_kernels("cpu", cpu.NativeKernels(native.native, kernel=name))


@pytest.fixture(params=[*cpu.KERNELS, "best"])
def native_kernel(native: cpu.NativeKernels, request: pytest.FixtureRequest) -> SimpleNamespace:
    """The operators on each kernel that runs here, and the choice among them."""
    return kernels_named(native, request.param)


@pytest.fixture(params=[*cpu.KERNELS, "best", "reference"])
def kernels(request: pytest.FixtureRequest) -> SimpleNamespace:
    """The same, and in plain PyTorch, which needs no library."""
    if request.param == "reference":
        return reference
    return kernels_named(request.getfixturevalue("native"), request.param)


@pytest.fixture
def garbage() -> Iterator[None]:
    """New tensors hold NaN or the largest integer, so that an output which was not written shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Unless a test says otherwise: threads that wait for each other take long where others have the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# ----- Comparison -----


INTEGERS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
INTEGERS[torch.float64] = torch.int64


def same(actual: Tensor, expected: Tensor) -> bool:
    """Equal dtypes, shapes and bits; any NaN equals any other, whose bits PyTorch itself leaves open."""
    if actual.dtype != expected.dtype or actual.shape != expected.shape:
        return False
    if not actual.dtype.is_floating_point:
        return torch.equal(actual, expected)
    integers = INTEGERS[actual.dtype]
    one, other = actual.contiguous().view(integers), expected.contiguous().view(integers)
    return bool(((one == other) | (actual.isnan() & expected.isnan())).all())


def assert_sums(actual: Tensor, expected: Tensor, magnitudes: Tensor) -> None:
    """Equal but for what the order of a sum in float64 may change."""
    assert actual.dtype == torch.float64 and actual.shape == expected.shape
    # An infinite magnitude would allow anything.
    allowed = torch.where(expected.isfinite(), 1e-12 * magnitudes, 0.0)
    close = (actual == expected) | ((actual - expected).abs() <= allowed) | (actual.isnan() & expected.isnan())
    assert close.all(), (actual[~close], expected[~close])


def sum_magnitudes(op: str, arguments: dict[str, Any]) -> Tensor:
    """The sums of an operator with all terms positive. What is not finite is in no sum that is."""
    if op == "sign_product":
        return arguments["vector"].abs().sum()
    magnitudes = arguments["grad"].double().abs().nan_to_num(0.0, 0.0)
    return magnitudes.reshape(-1, magnitudes.shape[-1]).sum(0)


def in_order(op: str, arguments: dict[str, Any]) -> list[Any]:
    """The arguments of an operator as its schema orders them."""
    return [arguments[argument.name] for argument in operator(op)._schema.arguments]


def assert_as_reference(
    kernels: SimpleNamespace, op: str, arguments: dict[str, Any], expected: Outputs | None = None, threads: int = 1
) -> None:
    torch.set_num_threads(threads)
    actual = as_tuple(getattr(kernels, op)(*arguments.values()))
    torch.set_num_threads(1)
    expected = as_tuple(getattr(reference, op)(*arguments.values())) if expected is None else expected
    exact = {"sign_product": 0, "masked_activation_grad": 1}.get(op, len(expected))
    assert len(actual) == len(expected)
    for one, other in zip(actual[:exact], expected[:exact], strict=True):
        assert same(one, other)
    for one, other in zip(actual[exact:], expected[exact:], strict=True):
        assert_sums(one, other, sum_magnitudes(op, arguments))


def as_tuple(outputs: Tensor | Outputs) -> Outputs:
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


# ----- The gradient rule and the values by hand, an element at a time, in float64 -----


def expected_passes(surrogate: str, frozen: bool, inside: bool) -> bool:
    if not frozen:
        return inside
    return {"none": False, "ste": True, "clipped_ste": inside}[surrogate]


def expected_clip(value: float, low: float, high: float) -> float:
    if value < low:
        return low
    return high if value > high else value


def edges(numbers: list[float], dtype: torch.dtype) -> list[float]:
    """The numbers as a dtype rounds them, with their neighbours in it and both signs of all; infinities and NaN."""
    bits = torch.tensor(numbers).abs().to(dtype).view(INTEGERS[dtype])
    around = torch.cat([bits, bits + 1, (bits - 1).clamp_min(0)]).view(dtype).double().tolist()
    return [*around, *(-number for number in around), math.inf, -math.inf, math.nan]


def expected_bits(flags: np.ndarray) -> Tensor:
    *shape, features = flags.shape
    padded = np.zeros((*shape, 256 * math.ceil(features / 256)), dtype=bool)
    padded[..., :features] = flags
    return torch.from_numpy(np.packbits(padded, axis=-1, bitorder="little"))


def filled(values: list[Any], shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Python's floats rounded once: each is exact in float32 where the work is done in float32."""
    return torch.tensor(values, dtype=torch.float64).view(shape).to(dtype)


# Of few bits, so that their products with the clip ranges are exact; a subnormal, and no limit.
SCALES = [0.5, 1.5, 3.0, 2.0**-135, math.inf]
CLIPS = [1.0, 1.25]
GRADIENTS = [1.5, -2.25, 0.1, -0.0, 1e-40, 6e-8, -7e4, math.inf, -math.inf, math.nan]


@functools.cache
def weight_edges(dtype: torch.dtype, clip: float) -> tuple[Tensor, Tensor, Tensor]:
    """Weight, mask and scale: a row for each scale, its clip range among the values, each value free and frozen."""
    rows = [edges([0.0, scale, clip * scale, 0.3, 1e-40, 6e-8, 6e4], dtype) for scale in SCALES]
    weight = torch.tensor([row + row for row in rows], dtype=torch.float64).to(dtype)
    mask = (torch.arange(weight.shape[1]) < weight.shape[1] // 2).expand_as(weight).contiguous()
    return weight, mask, torch.tensor(SCALES)[:, None]


def weight_elements(weight: Tensor, mask: Tensor, scale: Tensor) -> list[tuple[float, bool, float]]:
    """Weight, mask, scale."""
    scales = scale.expand_as(weight).flatten().tolist()
    return list(zip(weight.flatten().tolist(), mask.flatten().tolist(), scales, strict=True))


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weight_is_frozen_or_clipped(kernels: SimpleNamespace, dtype: torch.dtype, clip: float, garbage: None) -> None:
    arguments = weight_edges(dtype, clip)
    values = []
    for w, frozen, scale in weight_elements(*arguments):
        hard = scale if w >= 0 else -scale
        values.append(hard if frozen else expected_clip(w, -clip * scale, clip * scale))
    for output_dtype in DTYPES:
        actual = kernels.masked_weight(*arguments, clip, output_dtype)
        assert same(actual, filled(values, arguments[0].shape, output_dtype)), output_dtype


@pytest.mark.parametrize("surrogate", SURROGATES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weight_gradient_passes_by_the_rule(
    kernels: SimpleNamespace, dtype: torch.dtype, surrogate: str, garbage: None
) -> None:
    # The window of frozen weights is narrower than the clip range, wider, or none.
    for clip, window, grad_dtype in itertools.product(CLIPS, [0.5, *CLIPS, math.inf], DTYPES):
        arguments = weight_edges(dtype, clip)
        drawn = itertools.islice(itertools.cycle(GRADIENTS), arguments[0].numel())
        grad = torch.tensor(list(drawn), dtype=torch.float64).view(arguments[0].shape).to(grad_dtype)
        values = []
        elements = weight_elements(*arguments)
        for (w, frozen, scale), g in zip(elements, grad.flatten().tolist(), strict=True):
            reach = (window if frozen else clip) * scale
            values.append(g if expected_passes(surrogate, frozen, -reach <= w <= reach) else 0.0)
        actual = kernels.masked_weight_grad(grad, *arguments, clip, surrogate, window)
        assert same(actual, filled(values, grad.shape, dtype)), (clip, window, grad_dtype)


def test_row_of_scale_zero_is_zero_and_passes_at_zero_alone(kernels: SimpleNamespace) -> None:
    numbers = [-1.0, -1e-40, -0.0, 0.0, 1e-40, 1.0, math.inf, math.nan]
    for dtype in DTYPES:
        weight = torch.tensor([numbers * 2], dtype=dtype)
        mask = torch.arange(16)[None] < 8
        scale = torch.zeros(1, 1)
        output = kernels.masked_weight(weight, mask, scale, 1.5, torch.float32)
        # Either zero: of two bounds that are equal PyTorch takes the one or the other.
        assert output.eq(0).tolist() == [[True] * 15 + [False]] and output[0, -1].isnan()
        grad = kernels.masked_weight_grad(torch.ones(1, 16), weight, mask, scale, 1.5, "clipped_ste", 1.5)
        assert torch.equal(grad != 0, weight == 0)


def test_scale_may_be_of_any_floating_dtype(kernels: SimpleNamespace) -> None:
    weight, mask, scale = weight_edges(torch.float32, 1.25)
    for dtype in DTYPES:
        # A change of dtype may round the scale, but nothing else.
        given, equal = scale.to(dtype), scale.to(dtype).float()
        outputs = [kernels.masked_weight(weight, mask, one, 1.25, torch.bfloat16) for one in (given, equal)]
        assert same(*outputs)
        grad = torch.ones_like(weight)
        outputs = [kernels.masked_weight_grad(grad, weight, mask, one, 1.25, "none", 1.25) for one in (given, equal)]
        assert same(*outputs)


# Free and frozen features, so that both sides of their ranges and levels are exact in every dtype.
CENTERS, OFFSETS, THRESHOLDS = [0.0, 0.5, -1.25, -0.0], [0.25, -0.5, 0.0], [0.75, -0.0, -0.125]
BOUND, WINDOW, AMPLITUDE = 1.5, 0.75, 0.375


@functools.cache
def activation_edges(dtype: torch.dtype) -> dict[str, Tensor]:
    """A column for each free and frozen combination; each value three times, each with some pre-activation."""
    generator = np.random.default_rng(0)
    columns = list(itertools.product(CENTERS, OFFSETS[:2], THRESHOLDS, [False, True]))
    columns += [(0.5, 0.0, math.inf, True), (0.5, 0.0, -math.inf, True), (0.5, 0.0, math.nan, True)]
    center, offset, threshold, mask = (list(field) for field in zip(*columns, strict=True))
    values, decisions = [], []
    for c, limit in zip(center, threshold, strict=True):
        value = edges([0.0, c, c + BOUND, c - BOUND, c + WINDOW, c - WINDOW, 1e-40, 6e-8], dtype)
        decisive = edges([0.0 if math.isnan(limit) else limit, 6e-8], dtype)
        values.append(value * 3)
        decisions.append(generator.choice(decisive, 3 * len(value)).tolist())
    vectors = {"threshold": threshold, "offset": offset, "center": center}
    return {
        "value": torch.tensor(values, dtype=torch.float64).T.to(dtype).contiguous(),
        "pre_activation": torch.tensor(decisions, dtype=torch.float64).T.to(dtype).contiguous(),
        "mask": torch.tensor(mask),
        **{name: torch.tensor(vector) for name, vector in vectors.items()},
        "amplitude": torch.tensor(AMPLITUDE),
        "bound": torch.tensor(BOUND),
        "window": torch.tensor(WINDOW),
    }


@functools.cache
def activation_case(
    dtype: torch.dtype, surrogate: str, parameter_dtype: torch.dtype = torch.float32, shared: tuple[str, ...] = ()
) -> tuple[dict[str, Any], Outputs]:
    """Arguments and what they must give; `shared` names the vectors of which only the first number is passed."""
    arguments = activation_edges(dtype) | {"surrogate": surrogate}
    for name in ("threshold", "offset", "amplitude", "center", "bound", "window"):
        number = arguments[name][0] if name in shared else arguments[name]
        arguments[name] = number.to(parameter_dtype)
    value = arguments["value"]
    names = ("mask", "threshold", "offset", "amplitude", "center", "bound", "window")
    numbers = [arguments[name].expand(value.shape[-1]).tolist() for name in names]
    output, passes, upper = [], [], []
    for row in zip(value.tolist(), arguments["pre_activation"].tolist(), strict=True):
        for v, decides, *settings in zip(*row, *numbers, strict=True):
            frozen, threshold, offset, amplitude, center, bound, window = settings
            low, high = center - bound, center + bound
            reach = window if frozen else bound
            above = decides >= threshold
            hard = offset + amplitude if above else offset - amplitude
            output.append(hard if frozen else expected_clip(v, low, high))
            passes.append(expected_passes(surrogate, frozen, center - reach <= v <= center + reach))
            upper.append(above if frozen else v > center)
    bits = (expected_bits(np.array(flags).reshape(value.shape)) for flags in (passes, upper))
    return arguments, (filled(output, value.shape, dtype), *bits)


@pytest.mark.parametrize("surrogate", SURROGATES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_activation_is_frozen_or_clipped_and_says_what_passes(
    kernels: SimpleNamespace, dtype: torch.dtype, surrogate: str, garbage: None
) -> None:
    arguments, expected = activation_case(dtype, surrogate)
    for actual, wanted in zip(
        kernels.masked_activation(*in_order("masked_activation", arguments)), expected, strict=True
    ):
        assert same(actual, wanted)


@pytest.mark.parametrize("parameter_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shared", [("threshold",), ("offset", "center")], ids=str)
def test_levels_of_an_activation_may_be_single_numbers_of_any_floating_dtype(
    kernels: SimpleNamespace, parameter_dtype: torch.dtype, shared: tuple[str, ...]
) -> None:
    for dtype in [torch.float32, torch.float16, torch.float64]:
        arguments, expected = activation_case(dtype, "clipped_ste", parameter_dtype, shared)
        for actual, wanted in zip(
            kernels.masked_activation(*in_order("masked_activation", arguments)), expected, strict=True
        ):
            assert same(actual, wanted)


@pytest.mark.parametrize("features", [3, 64, 300])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_activation_gradient_is_what_passes_and_sums_of_the_rest(
    kernels: SimpleNamespace, dtype: torch.dtype, features: int, garbage: None
) -> None:
    generator = np.random.default_rng(features)
    flags = generator.random((2, 9, features)) < 0.5
    # Every gradient, NaN and infinities too, meets every flag; some columns stay finite.
    drawn = generator.choice(GRADIENTS, (9, features))
    drawn[:, ::2] = np.nan_to_num(drawn[:, ::2], nan=1.0, posinf=2.0, neginf=0.5)
    grad = torch.from_numpy(drawn).to(dtype)
    mask = torch.from_numpy(generator.random(features) < 0.5)
    values, columns = [], [[[], [], []] for _ in range(features)]
    for row, numbers in enumerate(grad.tolist()):
        for k, g in enumerate(numbers):
            passes, upper = flags[:, row, k]
            values.append(g if passes else 0.0)
            held = bool(mask[k]) or not passes
            for terms, counts in zip(columns[k], (passes, held, held and upper), strict=True):
                if counts:
                    terms.append(g)
    sums = [[sum(terms) for terms in column] for column in columns]
    magnitudes = [[sum(map(abs, terms)) for terms in column] for column in columns]

    output, actual_sums = kernels.masked_activation_grad(grad, *map(expected_bits, flags), mask)

    assert same(output, filled(values, grad.shape, dtype))
    to_rows = functools.partial(torch.tensor, dtype=torch.float64)
    assert_sums(actual_sums, to_rows(sums).T, to_rows(magnitudes).T)


@functools.cache
def products(in_features: int) -> list[tuple[tuple[Any, ...], Tensor, Tensor]]:
    """Arguments, the product, and what it may be off by."""
    drawn = []
    for out_features, transposed in itertools.product([0, 1, 7, 64, 257], [False, True]):
        generator = np.random.default_rng([in_features, out_features])
        flags = generator.random((out_features, in_features)) < 0.5
        signs = 2.0 * (flags.T if transposed else flags) - 1
        # Sums of few bits are exact in any order; those of the others are not.
        exact = np.round(generator.standard_normal(signs.shape[1]) * 2**10) / 2**10
        inexact = generator.standard_normal(signs.shape[1]) * np.exp2(generator.integers(-30, 30, signs.shape[1]))
        for vector, magnitude in [(exact, 0.0), (inexact, np.abs(inexact).sum())]:
            arguments = (expected_bits(flags), in_features, torch.from_numpy(vector), transposed)
            drawn.append((arguments, torch.from_numpy(signs @ vector), torch.tensor(magnitude)))
    return drawn


@pytest.mark.parametrize("in_features", FEATURES)
def test_sign_product_is_that_of_the_dense_signs(kernels: SimpleNamespace, in_features: int, garbage: None) -> None:
    for arguments, expected, magnitude in products(in_features):
        assert_sums(kernels.sign_product(*arguments), expected, magnitude)


@pytest.mark.parametrize("transposed", [False, True])
def test_sign_product_of_infinity_and_nan_is_not_finite(kernels: SimpleNamespace, transposed: bool) -> None:
    weight = expected_bits(np.array([[True, False], [True, True]]))
    vector = torch.tensor([math.inf, 1.0], dtype=torch.float64)
    assert kernels.sign_product(weight, 2, vector, transposed).tolist() == [
        math.inf,
        -math.inf if transposed else math.inf,
    ]
    assert kernels.sign_product(weight, 2, vector * math.nan, transposed).isnan().all()
    infinite = kernels.sign_product(weight, 2, torch.full((2,), math.inf, dtype=torch.float64), transposed)
    assert infinite.isnan().tolist() == ([False, True] if transposed else [True, False])


# ----- Native kernels against the reference -----


@dataclass(frozen=True)
class Case:
    leading: tuple[int, ...]
    features: int
    dtype: torch.dtype
    other_dtype: torch.dtype
    surrogate: str
    shared: bool
    clip: float

    def __str__(self) -> str:
        names = [str(dtype).removeprefix("torch.") for dtype in (self.dtype, self.other_dtype)]
        shape = "x".join(map(str, (*self.leading, self.features)))
        return f"{shape}-{names[0]}-{names[1]}-{self.surrogate}-clip-{self.clip}" + "-shared" * self.shared

    @property
    def window(self) -> float:
        """Of the surrogate, no float32 either: wider than the clip range or narrower."""
        return 2.6 - self.clip


def deal(shapes: list[tuple[tuple[int, ...], int]]) -> list[Case]:
    """The options are dealt out evenly, in random order."""
    # 1.1 is no float32: the clip range is rounded.
    options = list(itertools.product(NATIVE_DTYPES, NATIVE_DTYPES, SURROGATES, [False, True], [1.5, 1.1]))
    random.Random(0).shuffle(options)
    return [Case(*shape, *options[i % len(options)]) for i, shape in enumerate(shapes)]


CASES = deal([(leading, features) for leading in LEADING for features in FEATURES] * 2)
LARGE_CASES = deal([((rows,), features) for rows, features in LARGE])

SPECIAL = [0.0, -0.0, math.inf, -math.inf, math.nan, 1e-40, -1e-40, 6e-8, 7e4]


def draw_values(generator: np.random.Generator, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    values = generator.standard_normal(shape)
    # Half of them quarters, exact in every dtype: many lie on a bound or on a threshold.
    values = np.where(generator.random(shape) < 0.5, np.round(4 * values) / 4, values)
    values = np.where(generator.random(shape) < 0.05, generator.choice(SPECIAL, shape), values)
    return torch.from_numpy(values).to(dtype)


@functools.cache
def draw(op: str, case: Case) -> dict[str, Any]:
    """The same for every kernel, by name in the order of the operator."""
    generator = np.random.default_rng([len(case.leading), math.prod(case.leading), case.features])
    shape = (*case.leading, case.features)
    values = functools.partial(draw_values, generator, shape)
    if op == "sign_product":
        weight = expected_bits(generator.random((math.prod(case.leading), case.features)) < 0.5)
        vector = torch.from_numpy(generator.standard_normal(weight.shape[0] if case.shared else case.features))
        return {"packed_weight": weight, "in_features": case.features, "vector": vector, "transposed": case.shared}
    if op == "masked_activation_grad":
        bits = [expected_bits(generator.random(shape) < 0.5) for _ in range(2)]
        mask = torch.from_numpy(generator.random(case.features) < 0.5)
        return {"grad": values(case.dtype), "passes": bits[0], "upper": bits[1], "mask": mask}
    if op == "masked_activation":
        mask = torch.from_numpy(generator.random(case.features) < 0.5)
        threshold, offset, center = (draw_values(generator, (case.features,), torch.float32) for _ in range(3))
        # A centre that is infinite leaves no range; of a range that ends at 0 the reference makes either zero.
        offset, center = offset.nan_to_num(0.5, 0.5, 0.5), center.nan_to_num(0.5, 0.5, 0.5)
        center[center.abs() == case.clip] = 0.25
        if case.shared:
            threshold, offset, center = threshold[0], offset[0], center[0]
        return {
            "value": values(case.dtype),
            "pre_activation": values(case.dtype),
            "mask": mask,
            "threshold": threshold,
            "offset": offset,
            "amplitude": torch.tensor(0.7),
            "center": center,
            "bound": torch.tensor(case.clip),
            "surrogate": case.surrogate,
            "window": torch.tensor(case.window),
        }
    scale = draw_values(generator, (*case.leading, 1), torch.float32).abs().nan_to_num(0.5, posinf=math.inf)
    # Of a range of nothing the reference makes either zero.
    scale[scale == 0] = 0.5
    mask = torch.from_numpy(generator.random(shape) < 0.5)
    arguments = {"weight": values(case.dtype), "mask": mask, "scale": scale, "clip": case.clip}
    if op == "masked_weight":
        return arguments | {"dtype": case.other_dtype}
    return {"grad": values(case.other_dtype)} | arguments | {"surrogate": case.surrogate, "window": case.window}


@functools.cache
def reference_of(op: str, case: Case) -> Outputs:
    return as_tuple(getattr(reference, op)(*draw(op, case).values()))


@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("op", OPS)
def test_native_kernel_equals_the_reference(
    native_kernel: SimpleNamespace, op: str, features: int, garbage: None
) -> None:
    for case in CASES:
        if case.features == features:
            assert_as_reference(native_kernel, op, draw(op, case), reference_of(op, case))


def test_cases_hold_every_pair_of_dtypes_with_every_surrogate() -> None:
    for leading in [(), (37,)]:
        assert {case.features for case in CASES if case.leading == leading} == set(FEATURES)
    dealt = {(case.dtype, case.other_dtype, case.surrogate) for case in CASES if math.prod(case.leading)}
    assert dealt == set(itertools.product(NATIVE_DTYPES, NATIVE_DTYPES, SURROGATES))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("case", LARGE_CASES, ids=str)
def test_native_kernel_equals_the_reference_on_any_number_of_threads(
    native_kernel: SimpleNamespace, case: Case, threads: int, garbage: None
) -> None:
    for op in OPS:
        assert_as_reference(native_kernel, op, draw(op, case), reference_of(op, case), threads)


@pytest.mark.parametrize("case", LARGE_CASES, ids=str)
def test_sums_are_the_same_bits_on_any_number_of_threads(native_kernel: SimpleNamespace, case: Case) -> None:
    arguments = draw("masked_activation_grad", case)
    outputs = []
    for threads in [1, 2, 5]:
        torch.set_num_threads(threads)
        outputs.append(native_kernel.masked_activation_grad(*arguments.values()))
    for grad, sums in outputs[1:]:
        assert same(grad, outputs[0][0]) and same(sums, outputs[0][1])


def rounded_floats(dtype: torch.dtype) -> Tensor:
    """All numbers of a half precision, or float32 numbers of which many lie midway between two of those."""
    if dtype != torch.float32:
        return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    bits = np.random.default_rng(0).integers(0, 2**32, 40_000, dtype=np.uint32)
    # Midway between two numbers of bfloat16, and of float16: a single bit behind the last that is kept.
    bits[:10_000] = bits[:10_000] & 0xFFFF0000 | 0x8000
    bits[10_000:20_000] = bits[10_000:20_000] & 0xFFFFE000 | 0x1000
    # The exponents of float16, subnormals included.
    exponents = np.random.default_rng(1).integers(0x33, 0x48, 20_000, dtype=np.uint32)
    bits[5_000:25_000] = bits[5_000:25_000] & 0x80FFFFFF | exponents << 24
    return torch.from_numpy(bits.view(np.float32))


@pytest.mark.parametrize("dtype", NATIVE_DTYPES, ids=str)
def test_every_number_is_converted_as_pytorch_converts_it(
    native_kernel: SimpleNamespace, dtype: torch.dtype, garbage: None
) -> None:
    numbers = rounded_floats(dtype)[None]
    mask, scale = torch.zeros_like(numbers, dtype=torch.bool), torch.tensor([[math.inf]])
    for other in NATIVE_DTYPES:
        assert same(native_kernel.masked_weight(numbers, mask, scale, 1.0, other), numbers.to(other))
        weight = torch.zeros_like(numbers, dtype=other)
        passed = native_kernel.masked_weight_grad(numbers, weight, mask, scale, 1.0, "none", 1.0)
        assert same(passed, numbers.to(other))


def test_clip_range_is_a_product_rounded_to_float32(kernels: SimpleNamespace) -> None:
    clip, scale = 1.1, torch.tensor([[0.7]])
    bound = np.float32(1.1) * np.float32(0.7)
    assert float(bound) != 1.1 * float(scale)
    around = [np.nextafter(bound, np.float32(-1)), bound, np.nextafter(bound, np.float32(1))]
    weight, mask = torch.tensor(np.array([around])), torch.zeros(1, 3, dtype=torch.bool)
    assert same(kernels.masked_weight(weight, mask, scale, clip, torch.float32), weight.clamp(max=float(bound)))
    grad = kernels.masked_weight_grad(torch.ones(1, 3), weight, mask, scale, clip, "none", 5.0)
    assert grad.tolist() == [[1.0, 1.0, 0.0]]
    grad = kernels.masked_weight_grad(torch.ones(1, 3), weight, ~mask, scale, 5.0, "clipped_ste", clip)
    assert grad.tolist() == [[1.0, 1.0, 0.0]]


NOT_A_NUMBER = {
    "scale of a weight": ("masked_weight", {"scale": torch.full((37, 1), math.nan)}),
    "infinite multiple of nothing": ("masked_weight", {"scale": torch.zeros(37, 1), "clip": math.inf}),
    "infinite window of nothing": ("masked_weight_grad", {"scale": torch.zeros(37, 1), "window": math.inf}),
    "bound of an activation": ("masked_activation", {"bound": torch.tensor(math.nan)}),
    "window of an activation": ("masked_activation", {"window": torch.tensor(math.nan)}),
    "centre of an activation": ("masked_activation", {"center": torch.tensor(math.nan)}),
}


@pytest.mark.parametrize(("op", "changed"), NOT_A_NUMBER.values(), ids=NOT_A_NUMBER.keys())
def test_clip_range_that_is_nan_is_as_in_the_reference(
    native_kernel: SimpleNamespace, op: str, changed: dict[str, Any]
) -> None:
    for dtype in NATIVE_DTYPES:
        case = Case((37,), 70, dtype, dtype, "ste", False, 1.5)
        assert_as_reference(native_kernel, op, draw(op, case) | changed)


@pytest.mark.parametrize("op", MASKED_OPS)
@pytest.mark.parametrize(
    ("dtype", "other"),
    [
        (torch.float64, torch.float64),
        (torch.float64, torch.float32),
        (torch.float32, torch.float64),
        (torch.float16, torch.float64),
    ],
    ids=str,
)
def test_float64_is_computed_by_the_reference(
    native_kernel: SimpleNamespace, op: str, dtype: torch.dtype, other: torch.dtype
) -> None:
    arguments = draw(op, Case((5,), 70, dtype, other, "clipped_ste", False, 1.1))
    for name in ("threshold", "offset", "center"):
        if name in arguments:
            # No float32, so that a loss of precision shows.
            arguments[name] = arguments[name].double() + 1e-12
    assert_as_reference(native_kernel, op, arguments)


# ----- Memory layout -----


def every_second(tensor: Tensor) -> Tensor:
    return torch.stack([tensor, torch.ones_like(tensor)], dim=-1)[..., 0]


def column_major(tensor: Tensor) -> Tensor:
    return tensor.mT.contiguous().mT if tensor.dim() > 1 else every_second(tensor)


def window(tensor: Tensor) -> Tensor:
    """The middle of a larger tensor."""
    larger = torch.ones([size + 3 for size in tensor.shape], dtype=tensor.dtype)
    for dim, size in enumerate(tensor.shape):
        larger = larger.narrow(dim, 1, size)
    return larger.copy_(tensor)


def misaligned(tensor: Tensor) -> Tensor:
    return torch.cat([tensor.new_ones(1), tensor.flatten()])[1:].view(tensor.shape)


LAYOUTS = [every_second, column_major, window, misaligned]


def rearranged(arguments: dict[str, Any], rearrange: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    return {name: rearrange(value) if isinstance(value, Tensor) else value for name, value in arguments.items()}


@pytest.mark.parametrize("rearrange", LAYOUTS)
@pytest.mark.parametrize("leading", [(37,), (3, 5)], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_arguments_may_lie_anywhere_and_are_left_as_they_were(
    native_kernel: SimpleNamespace, op: str, leading: tuple[int, ...], rearrange: Callable[[Tensor], Tensor]
) -> None:
    for dtype in NATIVE_DTYPES:
        arguments = draw(op, Case(leading, 300, dtype, torch.float32, "none", False, 1.5))
        other = rearranged(arguments, rearrange)
        expected, actual = (as_tuple(getattr(native_kernel, op)(*given.values())) for given in (arguments, other))
        for one, wanted in zip(actual, expected, strict=True):
            assert same(one, wanted) and one.is_contiguous()
        for name, value in arguments.items():
            assert not isinstance(value, Tensor) or same(other[name], value), name


@pytest.mark.parametrize("op", ["masked_weight_grad", "masked_activation_grad"])
def test_gradient_may_be_one_number_expanded(native_kernel: SimpleNamespace, op: str) -> None:
    # As the gradient of a sum is.
    arguments = draw(op, Case((37,), 70, torch.float32, torch.float32, "clipped_ste", False, 1.5))
    assert_as_reference(native_kernel, op, arguments | {"grad": torch.tensor(0.5).expand(37, 70)})


# ----- PyTorch -----


@pytest.fixture(autouse=True, scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> None:
    """A library that no earlier test has loaded is built in a folder of this run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_STOMPP_CACHE", str(tmp_path_factory.mktemp("cache")))
        cpu.native_kernels()


def operator(op: str) -> Any:
    return getattr(torch.ops.hf_stompp, op).default


def simple(
    op: str, leading: tuple[int, ...] = (4,), dtype: torch.dtype = torch.float32, **options: Any
) -> dict[str, Any]:
    """Arguments without special numbers, by name."""
    other_dtype = DTYPES[DTYPES.index(dtype) - 1]
    case = Case(leading, 70, dtype, other_dtype, "clipped_ste", options.get("shared", False), 1.5)
    arguments = draw(op, case)
    return {
        name: value.nan_to_num(0.5, 0.5, 0.5) if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in arguments.items()
    }


@pytest.mark.parametrize("op", OPS)
def test_op_takes_the_arguments_of_the_reference_in_their_order(op: str) -> None:
    arguments = simple(op)
    assert list(arguments) == [argument.name for argument in operator(op)._schema.arguments]
    for actual, expected in zip(
        as_tuple(operator(op)(*arguments.values())), as_tuple(getattr(reference, op)(*arguments.values())), strict=True
    ):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("leading", [(), (4,), (2, 3), (0,)], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_opcheck_passes(op: str, leading: tuple[int, ...]) -> None:
    for dtype in [DTYPES[len(leading)], torch.float64]:
        for shared in [False, True] if op == "sign_product" else [False]:
            result = torch.library.opcheck(operator(op), (), simple(op, leading, dtype, shared=shared))
            assert set(result.values()) == {"SUCCESS"}


def test_opcheck_passes_on_a_vector_that_requires_a_gradient() -> None:
    arguments = simple("sign_product")
    arguments["vector"].requires_grad_()
    assert set(torch.library.opcheck(operator("sign_product"), (), arguments).values()) == {"SUCCESS"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_opcheck_passes_on_strided_arguments(op: str, dtype: torch.dtype) -> None:
    arguments = rearranged(simple(op, (3, 5), dtype), column_major)
    assert set(torch.library.opcheck(operator(op), (), arguments).values()) == {"SUCCESS"}


@pytest.mark.parametrize("leading", [(), (4,), (2, 3), (0,)], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_shapes_are_known_without_computing(op: str, leading: tuple[int, ...]) -> None:
    for dtype in DTYPES:
        arguments = simple(op, leading, dtype)
        on_meta = rearranged(arguments, lambda tensor: tensor.to("meta"))
        for output, real in zip(as_tuple(operator(op)(**on_meta)), as_tuple(operator(op)(**arguments)), strict=True):
            assert output.device.type == "meta"
            assert (output.shape, output.dtype, output.stride()) == (real.shape, real.dtype, real.stride())


def called(op: str) -> Callable[..., Outputs]:
    """The operator between ordinary ones."""

    def function(first: Tensor, *others: Any) -> Outputs:
        # The first argument of all but the product of signs is floating.
        outputs = as_tuple(getattr(torch.ops.hf_stompp, op)(first + 0, *others))
        return tuple(output * 2 for output in outputs)

    return function


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("op", OPS)
def test_compiled_function_gives_the_same_values(op: str, fresh_compiler: None) -> None:
    compiled = torch.compile(called(op), fullgraph=True, backend="aot_eager")
    for dtype in [torch.float32, torch.bfloat16]:
        arguments = simple(op, (4,), dtype).values()
        for actual, expected in zip(compiled(*arguments), called(op)(*arguments), strict=True):
            assert same(actual, expected)


@pytest.mark.parametrize("op", OPS)
def test_compiled_function_takes_other_numbers_of_rows_without_a_recompilation(op: str, fresh_compiler: None) -> None:
    compiled = torch.compile(called(op), fullgraph=True, dynamic=True, backend="aot_eager")
    compiled(*simple(op, (5,)).values())
    with torch.compiler.set_stance("fail_on_recompile"):
        for rows in (3, 11):
            arguments = simple(op, (rows,)).values()
            for actual, expected in zip(compiled(*arguments), called(op)(*arguments), strict=True):
                assert same(actual, expected)


def product_and_grad(product: Callable[[Tensor], Tensor], vector: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    vector = vector.clone().requires_grad_()
    output = product(vector)
    output.backward(grad)
    assert vector.grad is not None
    return output.detach(), vector.grad


@pytest.mark.parametrize("compiles", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("transposed", [False, True])
def test_gradient_of_sign_product_is_that_of_the_dense_product(
    transposed: bool, compiles: bool, fresh_compiler: None
) -> None:
    weight = torch.randn(37, 300)
    packed, signs = expected_bits(weight.numpy() >= 0), torch.where(weight >= 0, 1.0, -1.0).double()
    if transposed:
        signs = signs.T
    vector = torch.randn(signs.shape[1], dtype=torch.float64)
    grad = torch.randn(2 * signs.shape[0], dtype=torch.float64)[::2]

    def sign_product(vector: Tensor) -> Tensor:
        return torch.ops.hf_stompp.sign_product(packed, 300, vector, transposed)

    if compiles:
        sign_product = torch.compile(sign_product, fullgraph=True, backend="aot_eager")
    actual = product_and_grad(sign_product, vector, grad)
    expected = product_and_grad(lambda vector: signs @ vector, vector, grad)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("transposed", [False, True])
def test_sign_product_has_derivatives_of_every_order(transposed: bool) -> None:
    packed = expected_bits(np.random.default_rng(0).random((3, 5)) < 0.5)
    vector = torch.randn(3 if transposed else 5, dtype=torch.float64, requires_grad=True)

    def square(vector: Tensor) -> Tensor:
        return torch.ops.hf_stompp.sign_product(packed, 5, vector, transposed) ** 2

    assert torch.autograd.gradcheck(square, vector)
    assert torch.autograd.gradgradcheck(square, vector)


# ----- Refusals -----


class Refusal:
    """An argument that an operator must refuse."""

    def __init__(self, argument: str, value: Any, error: type[Exception], **others: Any) -> None:
        self.argument, self.value, self.error, self.others = argument, value, error, others

    def __str__(self) -> str:
        value = self.value
        described = f"{value.dtype} of {tuple(value.shape)}" if isinstance(value, Tensor) else str(value)
        return f"{self.argument}: {described}" + "".join(f", with {name}" for name in self.others)


ROWS, COLUMNS, ROW_BYTES = 4, 70, 32
NOT_FLOATING = [torch.int8, torch.int32, torch.uint8, torch.bool, torch.complex64]


def refused(name: str, fits: tuple[int, ...], dtypes: list[torch.dtype], dtype: torch.dtype, shapes: list) -> list:
    """One argument in wrong dtypes and, of the right dtype, in wrong shapes."""
    return [
        *(Refusal(name, torch.ones(fits, dtype=wrong), TypeError) for wrong in dtypes),
        *(Refusal(name, torch.ones(shape, dtype=dtype), ValueError) for shape in shapes),
    ]


def without(*allowed: torch.dtype) -> list[torch.dtype]:
    return [dtype for dtype in [*NOT_FLOATING, *DTYPES] if dtype not in allowed]


MATRIX_SHAPES = [
    (),
    (COLUMNS,),
    (ROWS, 69),
    (ROWS, 71),
    (3, COLUMNS),
    (1, COLUMNS),
    (COLUMNS, ROWS),
    (1, ROWS, COLUMNS),
]
BYTES_SHAPES = [
    (),
    (ROW_BYTES,),
    (3, ROW_BYTES),
    (1, ROW_BYTES),
    (ROWS, 31),
    (ROWS, 64),
    (ROWS, 9),
    (1, ROWS, ROW_BYTES),
]
VECTOR_SHAPES = [(0,), (1,), (69,), (71,), (1, COLUMNS), (ROWS, COLUMNS)]
SCALE_SHAPES = [(), (1,), (ROWS,), (1, 1), (3, 1), (ROWS, COLUMNS), (ROWS, 1, 1)]
EMPTY = {
    "weight": torch.zeros(0, COLUMNS),
    "mask": torch.zeros(0, COLUMNS, dtype=torch.bool),
    "scale": torch.zeros(0, 1),
}
WEIGHT_REFUSES = [
    *refused("weight", (ROWS, COLUMNS), NOT_FLOATING, torch.float32, []),
    # Which of weight and mask is wrong cannot be told.
    *(Refusal("weight|mask|scale", None, ValueError, weight=torch.ones(shape)) for shape in MATRIX_SHAPES),
    *refused("mask", (ROWS, COLUMNS), without(torch.bool), torch.bool, MATRIX_SHAPES),
    *refused("scale", (ROWS, 1), NOT_FLOATING, torch.float32, SCALE_SHAPES),
    *(Refusal("clip", clip, ValueError) for clip in [0.0, -0.0, -1.0, math.nan, -math.inf]),
]
SURROGATE_REFUSES = [Refusal("surrogate", name, ValueError) for name in ["", "STE", "identity", "none "]]
REFUSED = {
    "sign_product": [
        *refused("packed_weight", (ROWS, ROW_BYTES), without(torch.uint8), torch.uint8, BYTES_SHAPES[:2]),
        *refused("packed_weight", (), [], torch.uint8, [(ROWS, 31), (ROWS, 64), (ROWS, 0), (1, ROWS, ROW_BYTES)]),
        *refused("vector", (COLUMNS,), without(torch.float64), torch.float64, [(), *VECTOR_SHAPES, (ROWS,)]),
        *(Refusal("vector", torch.ones(n).double(), ValueError, transposed=True) for n in (0, 1, 3, 5, COLUMNS)),
        *(Refusal("in_features", value, ValueError) for value in [0, -1, 257, 1000]),
        Refusal("vector|in_features", None, ValueError, in_features=69),
    ],
    "masked_weight": [
        *WEIGHT_REFUSES,
        # Without rows nothing would be written where such a dtype is taken for another.
        *(Refusal("dtype", dtype, TypeError, **EMPTY) for dtype in NOT_FLOATING),
    ],
    "masked_weight_grad": [
        *WEIGHT_REFUSES,
        *refused("grad", (ROWS, COLUMNS), NOT_FLOATING, torch.float32, MATRIX_SHAPES),
        *SURROGATE_REFUSES,
        *(Refusal("window", window, ValueError) for window in [0.0, -0.0, -1.0, math.nan, -math.inf]),
    ],
    "masked_activation": [
        *refused("value", (ROWS, COLUMNS), without(torch.float32), torch.float32, MATRIX_SHAPES),
        *refused("pre_activation", (ROWS, COLUMNS), without(torch.float32), torch.float32, MATRIX_SHAPES),
        *refused("mask", (COLUMNS,), without(torch.bool), torch.bool, [(), *VECTOR_SHAPES]),
        *itertools.chain.from_iterable(
            refused(name, (COLUMNS,), NOT_FLOATING, torch.float32, VECTOR_SHAPES)
            for name in ("threshold", "offset", "center")
        ),
        *itertools.chain.from_iterable(
            refused(name, (), NOT_FLOATING, torch.float32, [(0,), (1,), (COLUMNS,), (1, 1)])
            for name in ("amplitude", "bound", "window")
        ),
        *SURROGATE_REFUSES,
    ],
    "masked_activation_grad": [
        *refused("grad", (ROWS, COLUMNS), NOT_FLOATING, torch.float32, [()]),
        *(Refusal("grad|passes|mask", None, ValueError, grad=torch.ones(shape)) for shape in MATRIX_SHAPES[1:]),
        *refused("passes", (ROWS, ROW_BYTES), without(torch.uint8), torch.uint8, BYTES_SHAPES),
        *refused("upper", (ROWS, ROW_BYTES), without(torch.uint8), torch.uint8, BYTES_SHAPES),
        *refused("mask", (COLUMNS,), without(torch.bool), torch.bool, [(), *VECTOR_SHAPES]),
    ],
}


def is_named(op: str, argument: str, message: str) -> bool:
    """Whether an error says of which operator and which argument it speaks."""
    return bool(re.search(rf"\b{op}\b", message) and re.search(rf"\b({argument})\b", message))


ON_DEVICES: dict[str, Callable[[Tensor], Tensor]] = {
    "cpu": lambda tensor: tensor,
    "meta": lambda tensor: tensor.to("meta"),
    "fake": FakeTensorMode().from_tensor,
}


@pytest.mark.parametrize(("op", "case"), [(op, case) for op in OPS for case in REFUSED[op]], ids=str)
def test_argument_that_does_not_fit_is_refused_by_name(op: str, case: Refusal) -> None:
    arguments = simple(op) | case.others | ({} if case.value is None else {case.argument: case.value})
    for device, move in ON_DEVICES.items():
        with pytest.raises(case.error) as raised:
            operator(op)(**rearranged(arguments, move))
        assert is_named(op, case.argument, str(raised.value)), (device, str(raised.value))


@pytest.mark.parametrize("op", OPS)
def test_tensors_of_two_devices_are_refused(op: str) -> None:
    arguments = simple(op)
    for name, value in arguments.items():
        if not isinstance(value, Tensor):
            continue
        everything_else = rearranged(arguments, lambda tensor: tensor.to("meta")) | {name: value}
        for mixed in (arguments | {name: value.to("meta")}, everything_else):
            with pytest.raises((TypeError, ValueError)) as raised:
                operator(op)(**mixed)
            message = str(raised.value)
            assert is_named(op, "|".join(arguments), message) and "meta" in message and "cpu" in message, message


def test_bits_of_the_value_fit_its_gradient() -> None:
    arguments = simple("masked_activation", (2, 3))
    output, passes, upper = torch.ops.hf_stompp.masked_activation(**arguments)
    grad, sums = torch.ops.hf_stompp.masked_activation_grad(output, passes, upper, arguments["mask"])
    assert grad.shape == output.shape and sums.shape == (3, COLUMNS)


def test_surrogate_that_kernels_do_not_know_runs_in_plain_pytorch(
    native_kernel: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SURROGATES_TABLE, "all", Surrogate(lambda mask, inside: inside | ~inside))
    for op in ("masked_weight_grad", "masked_activation"):
        arguments = simple(op) | {"surrogate": "all"}
        outputs = as_tuple(getattr(native_kernel, op)(*arguments.values()))
        for actual, expected in zip(outputs, as_tuple(getattr(reference, op)(*arguments.values())), strict=True):
            assert same(actual, expected)
    passed = native_kernel.masked_weight_grad(*(simple("masked_weight_grad") | {"surrogate": "all"}).values())
    assert same(passed, simple("masked_weight_grad")["grad"].to(passed.dtype))


@pytest.mark.parametrize("op", MASKED_OPS)
def test_triton_runs_on_the_device_of_its_tensors(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    current = 0

    def exchange(index: int) -> int:
        nonlocal current
        previous, current = current, index if index >= 0 else current
        return previous

    for name in ("_exchange_device", "_maybe_exchange_device"):
        monkeypatch.setattr(torch.cuda, name, exchange)
    kernels = on_kernels("triton", SimpleNamespace(**{op: lambda result, *arguments: current}))
    arguments = simple(op, dtype=torch.bfloat16)
    for device, expected in [("cuda:1", 1), ("cuda:0", 0)]:
        with FakeTensorMode(allow_non_fake_inputs=True):
            moved = rearranged(arguments, lambda tensor, device=device: torch.empty_like(tensor, device=device))
            assert getattr(kernels, op)(*moved.values()) == expected
        assert current == 0
