"""
The CUDA kernels' own sources on the processor: emulated_cuda.h stands in for the language and the instructions.

Run as a program, with the path of such a library, it compares the small shapes without pytest: a library with
sanitizers needs a process that has loaded their runtime before everything else.
"""

from __future__ import annotations

import ctypes
import itertools
import math
import mmap
import os
import random
import re
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import Tensor


# As a program it needs the library alone.
if __name__ != "__main__":
    from hf_stompp.ops import build


HEADER = Path(__file__).resolve().parent / "emulated_cuda.h"
SELFTEST = HEADER.parent / "emulated_cuda_selftest.cpp"
SOURCES = Path(__file__).resolve().parents[2] / "hf_stompp" / "csrc" / "cuda"
OK, UNAVAILABLE, TOO_LARGE = 0, -1, -2
INVALID_DEVICE, NO_KERNEL_IMAGE = 101, 209
AUTO = -1
KERNELS = {"MMA_64x64": 0, "MMA_128x128": 1, "WGMMA_64x64": 2, "WGMMA_64x128": 3}
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
SIGNS = {torch.int8: 0, torch.float8_e4m3fn: 1}

# Around the edges of a fragment (16 rows, 8 columns, 256 features), of the tiles, and of the stages of a product.
ROWS = [1, 2, 7, 15, 16, 17, 63, 64, 65, 130]
IN_FEATURES = [1, 7, 63, 64, 65, 255, 256, 257, 768, 1000, 1024, 3072]
OUT_FEATURES = [1, 3, 15, 16, 17, 65, 127, 129, 257, 770]
UNTOUCHED = 0x5A
GUARD = 256


# ---- Memory ----


def packed_bytes(features: int) -> int:
    return 32 * math.ceil(features / 256)


def pack(signs: Tensor) -> Tensor:
    """Boolean rows to bits in the format of the library, of which this is another description."""
    rows, features = signs.shape
    padded = torch.zeros(rows, 8 * packed_bytes(features), dtype=torch.int32)
    padded[:, :features] = signs
    return (padded.view(rows, -1, 8) << torch.arange(8)).sum(-1).to(torch.uint8)


def before_forbidden_page(tensor: Tensor | None, slack: int = 0) -> Tensor | None:
    """A copy with which the process ends when anything later than `slack` bytes behind it is read."""
    if tensor is None:
        return None
    count = tensor.numel() * tensor.element_size()
    size = math.ceil((count + slack) / mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, size + mmap.PAGESIZE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    forbid = ctypes.CDLL(None).mprotect
    assert forbid(ctypes.c_void_p(address + size), ctypes.c_size_t(mmap.PAGESIZE), ctypes.c_int(0)) == 0
    copy = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=size - count - slack)
    return copy.view(tensor.shape).copy_(tensor)


class Output:
    """Memory for a result, none of whose bytes is there by chance, between others that must stay as they are."""

    def __init__(self, *shape: int, dtype: torch.dtype, misalignment: int = 0) -> None:
        size = math.prod(shape) * dtype.itemsize
        self.memory = torch.full((GUARD + misalignment + size + GUARD,), UNTOUCHED, dtype=torch.uint8)
        self.begin, self.end = GUARD + misalignment, GUARD + misalignment + size
        self.bytes = self.memory[self.begin : self.end]
        self.shape, self.dtype = shape, dtype

    @property
    def pointer(self) -> int:
        return self.bytes.data_ptr()

    def value(self) -> Tensor:
        """What was written; fails if anything was written beside it."""
        assert (self.memory[: self.begin] == UNTOUCHED).all(), "wrote before the output"
        assert (self.memory[self.end :] == UNTOUCHED).all(), "wrote behind the output"
        return self.bytes.clone().view(self.dtype).view(self.shape)


def pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def assert_same_bits(found: Tensor, expected: Tensor, message: object) -> None:
    assert found.shape == expected.shape and found.dtype == expected.dtype
    assert torch.equal(found.view(torch.uint8), expected.contiguous().view(torch.uint8)), f"wrong result: {message}"


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# ---- The library ----


def load(path: Path | str) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    library.hf_stompp_cuda_message.restype = ctypes.c_char_p
    library.hf_stompp_cuda_source_hash.restype = ctypes.c_char_p
    library.hf_stompp_cuda_check.argtypes = [ctypes.c_int64]
    library.hf_stompp_cuda_has_kernel.argtypes = [ctypes.c_int64] * 2
    library.hf_stompp_cuda_chosen.argtypes = [ctypes.c_int64] * 4
    library.emulated_cuda_launches.restype = ctypes.c_int64
    library.emulated_cuda_launch_stream.restype = ctypes.c_void_p
    return library


@contextmanager
def emulation(seed: int = 0, capability: str = "9.0", processors: int = 4) -> Iterator[None]:
    """What emulated_cuda.h reads at every call."""
    settings = {
        "HF_STOMPP_EMULATED_SEED": str(seed),
        "HF_STOMPP_EMULATED_CAPABILITY": capability,
        "HF_STOMPP_EMULATED_MULTIPROCESSORS": str(processors),
    }
    with mock.patch.dict(os.environ, settings):
        yield


@dataclass(frozen=True)
class Packing:
    rows: int
    features: int
    dtype: torch.dtype
    thresholds: bool
    popcounts: bool
    misaligned: bool

    def __str__(self) -> str:
        options = "-thresholds" * self.thresholds + "-popcounts" * self.popcounts + "-misaligned" * self.misaligned
        return f"{self.rows}x{self.features}-{name_of(self.dtype)}{options}"


def draw_packings() -> list[Packing]:
    options = list(itertools.product(DTYPES, [False, True], [False, True], [False, True]))
    random.Random(1).shuffle(options)
    sizes = itertools.product([1, 2, 7, 8, 9, 65], [1, 7, 8, 9, 63, 64, 255, 256, 264, 770, 3072])
    cases = []
    for i, (rows, features) in enumerate(sizes):
        dtype, *chosen = options[i % len(options)]
        cases += [Packing(rows, features, dtype, *chosen)]
    return cases


def check_packing(library: ctypes.CDLL, case: Packing, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(case.rows * 7919 + case.features)
    x = torch.randn(case.rows, case.features, generator=generator).to(case.dtype)
    tiny = torch.finfo(case.dtype).smallest_normal / 4
    special = [-0.0, 0.0, math.nan, math.inf, -math.inf, tiny, -tiny, 1.0, -1.0]
    x.view(-1)[::3] = torch.tensor([special[i % len(special)] for i in range(len(x.view(-1)[::3]))]).to(case.dtype)
    threshold = None
    if case.thresholds:
        threshold = torch.randn(case.features, generator=generator)
        # Also at the very values, and at those of which nothing but an infinity is not below.
        threshold[::2] = x[0, ::2].float().nan_to_num(0.5, math.inf, -math.inf)
        threshold[1::7] = math.inf
        threshold[2::7] = math.nan
    slack = case.dtype.itemsize if case.misaligned else 0
    source = before_forbidden_page(x, slack)
    bounds = before_forbidden_page(threshold, 4 if case.misaligned else 0)
    bits = Output(case.rows, packed_bytes(case.features), dtype=torch.uint8)
    popcounts = Output(case.rows, dtype=torch.int32, misalignment=4)
    record = struct.pack(
        "9q",
        *(0, 0, pointer(source), DTYPES[case.dtype], pointer(bounds), case.rows, case.features, bits.pointer),
        popcounts.pointer if case.popcounts else 0,
    )
    with emulation(seed):
        assert library.hf_stompp_cuda_pack_sign(record) == OK
    signs = x.double() >= (0.0 if threshold is None else threshold.double())
    assert_same_bits(bits.value(), pack(signs), case)
    untouched = torch.full((case.rows, 4), UNTOUCHED, dtype=torch.uint8).view(torch.int32).view(-1)
    assert_same_bits(popcounts.value(), signs.sum(1, dtype=torch.int32) if case.popcounts else untouched, case)


@dataclass(frozen=True)
class Product:
    kernel: int
    rows: int
    in_features: int
    out_features: int
    output_dtype: torch.dtype
    output_bits: bool
    thresholds: bool
    bias: bool
    misaligned: bool

    def __str__(self) -> str:
        kernel = next((name for name, number in KERNELS.items() if number == self.kernel), "AUTO")
        target = name_of(self.output_dtype) + "-bits" * self.output_bits
        options = "-thresholds" * self.thresholds + "-bias" * self.bias + "-misaligned" * self.misaligned
        return f"{kernel}-{self.rows}x{self.in_features}x{self.out_features}-{target}{options}"


def draw_products() -> list[Product]:
    """Each in_features with each out_features and, over them, each kernel with each size; the rest in random order."""
    options = list(itertools.product(DTYPES, [False, True], [False, True], [False, True], [False, True]))
    random.Random(0).shuffle(options)
    kernels = [AUTO, *KERNELS.values()]
    cases: list[Product] = []
    for (i, k), (j, n) in itertools.product(enumerate(IN_FEATURES), enumerate(OUT_FEATURES)):
        kernel, rows = kernels[(i + 2 * j) % len(kernels)], ROWS[(i + j) % len(ROWS)]
        cases += [Product(kernel, rows, k, n, *options[len(cases) % len(options)])]
    # Several tiles both ways, more steps than stages, and rows of a result at multiples of 16 bytes.
    for kernel, (rows, k, n) in itertools.product(kernels, [(130, 1280, 264), (257, 1024, 520), (130, 768, 129)]):
        for dtype, bits in itertools.product(DTYPES, [False, True]):
            cases += [Product(kernel, rows, k, n, dtype, bits, bits, not bits, False)]
    return cases


def check_product(
    library: ctypes.CDLL, case: Product, seed: int = 0, capability: str = "9.0", processors: int = 4
) -> None:
    """The kernel's output, bit for bit that of the definition, and nothing written beside it."""
    generator = torch.Generator().manual_seed(case.rows * 7919 + case.in_features * 31 + case.out_features)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    signs, weight = draw(case.rows, case.in_features) >= 0, draw(case.out_features, case.in_features) >= 0
    for matrix in (signs, weight):
        matrix[0], matrix[-1] = True, len(matrix) == 1
    scale, bias = draw(case.out_features), draw(case.out_features) if case.bias else None
    threshold = 10 * draw(case.out_features) if case.thresholds and case.output_bits else None
    sums = (2.0 * signs.double() - 1) @ (2.0 * weight.double() - 1).T
    y = sums.float() * scale
    if bias is not None:
        y = y + bias
    y = y.to(case.output_dtype)
    if threshold is not None:
        # At the very value of a result, of which rounding to output_dtype decides.
        threshold[::2] = y[-1, ::2].float()

    packed_input, packed_weight = before_forbidden_page(pack(signs)), before_forbidden_page(pack(weight))
    bounds = before_forbidden_page(threshold)
    scales, biases = before_forbidden_page(scale), before_forbidden_page(bias)
    shape = (case.rows, packed_bytes(case.out_features) if case.output_bits else case.out_features)
    misalignment = case.output_dtype.itemsize if case.misaligned and not case.output_bits else 0
    output = Output(*shape, dtype=torch.uint8 if case.output_bits else case.output_dtype, misalignment=misalignment)
    record = struct.pack(
        "14q",
        *(0, 0, case.kernel, pointer(packed_input), pointer(packed_weight), pointer(scales), pointer(biases)),
        *(case.rows, case.in_features, case.out_features, 0 if case.output_bits else output.pointer),
        *(DTYPES[case.output_dtype], output.pointer if case.output_bits else 0, pointer(bounds)),
    )
    with emulation(seed, capability, processors):
        assert library.hf_stompp_cuda_binary_linear(record) == OK
    expected = pack(y.double() >= (0.0 if threshold is None else threshold.double())) if case.output_bits else y
    assert_same_bits(output.value(), expected, case)


@dataclass(frozen=True)
class Norm:
    rows: int
    features: int
    dtype: torch.dtype
    float_parameters: bool
    residual: bool
    thresholds: bool
    bits: bool
    # Of the threshold, the one argument that need not begin at a multiple of 16 bytes.

    def __str__(self) -> str:
        names = ["float-parameters", "residual", "thresholds", "bits"]
        options = [self.float_parameters, self.residual, self.thresholds, self.bits]
        return f"{self.rows}x{self.features}-{name_of(self.dtype)}" + "".join(
            f"-{name}" for name, option in zip(names, options, strict=True) if option
        )


def draw_norms() -> list[Norm]:
    options = list(itertools.product(DTYPES, [False, True], [False, True], [False, True], [False, True]))
    random.Random(2).shuffle(options)
    sizes = itertools.product([1, 3, 4, 9], [8, 16, 248, 256, 264, 768, 1024, 1032, 2048, 3072, 4088, 4096])
    cases = []
    for i, (rows, features) in enumerate(sizes):
        dtype, *chosen = options[i % len(options)]
        cases += [Norm(rows, features, dtype, *chosen)]
    return cases


def check_norm(library: ctypes.CDLL, case: Norm, seed: int = 0) -> None:
    """Within rounding of the definition in double; the bits exactly those of the output as written."""
    generator = torch.Generator().manual_seed(case.rows * 7919 + case.features)

    def draw(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    parameter_dtype = torch.float32 if case.float_parameters else case.dtype
    x = draw(case.rows, case.features, dtype=case.dtype) + 3
    residual = draw(case.rows, case.features, dtype=case.dtype) if case.residual else None
    weight, bias = (draw(case.features, dtype=parameter_dtype) for _ in range(2))
    weight[0] = bias[0] = 0.0
    weight[1], bias[1] = 0.0, -0.0
    threshold = draw(case.features, dtype=torch.float32) if case.thresholds else None
    epsilon = 1e-5
    total = x if residual is None else (x.double() + residual.double()).to(case.dtype)
    mean, variance = total.double().mean(1, keepdim=True), total.double().var(1, correction=0, keepdim=True)
    expected = (total.double() - mean) / (variance + epsilon).sqrt() * weight.double() + bias.double()
    if threshold is not None:
        threshold[::3] = expected[0, ::3].to(case.dtype).float()

    source, added = before_forbidden_page(x), before_forbidden_page(residual)
    weights, biases = before_forbidden_page(weight), before_forbidden_page(bias)
    bounds = before_forbidden_page(threshold)
    output = Output(case.rows, case.features, dtype=case.dtype)
    bits = Output(case.rows, packed_bytes(case.features), dtype=torch.uint8)
    record = struct.pack(
        "8qd5q",
        *(0, 0, pointer(source), pointer(added), DTYPES[case.dtype], pointer(weights), pointer(biases)),
        *(DTYPES[parameter_dtype], epsilon, pointer(bounds), case.rows, case.features, output.pointer),
        bits.pointer if case.bits else 0,
    )
    with emulation(seed):
        assert library.hf_stompp_cuda_layer_norm_sign(record) == OK
    found = output.value()
    step = torch.finfo(case.dtype).eps
    torch.testing.assert_close(found.double(), expected, rtol=step, atol=4e-6, msg=lambda text: f"{case}: {text}")
    signs = found.double() >= (0.0 if threshold is None else threshold.double())
    assert_same_bits(bits.value(), pack(signs) if case.bits else torch.full_like(bits.value(), UNTOUCHED), case)


@dataclass(frozen=True)
class Unpacking:
    rows: int
    features: int
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.rows}x{self.features}-{name_of(self.dtype)}"


UNPACKINGS = [Unpacking(*case) for case in itertools.product([1, 3, 65], [1, 7, 64, 255, 256, 257, 770], SIGNS)]


def check_unpacking(library: ctypes.CDLL, case: Unpacking, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(case.rows * 7919 + case.features)
    bits = torch.randn(case.rows, case.features, generator=generator) >= 0
    source = before_forbidden_page(pack(bits))
    output = Output(case.rows, 8 * packed_bytes(case.features), dtype=torch.uint8, misalignment=8)
    record = struct.pack("7q", 0, 0, pointer(source), case.rows, case.features, output.pointer, SIGNS[case.dtype])
    with emulation(seed):
        assert library.hf_stompp_cuda_unpack_signs(record) == OK
    expected = torch.zeros(case.rows, 8 * packed_bytes(case.features))
    expected[:, : case.features] = 2.0 * bits - 1
    assert_same_bits(output.value(), expected.to(case.dtype).view(torch.uint8), case)


@dataclass(frozen=True)
class VectorProduct:
    out_features: int
    in_features: int
    transposed: bool

    def __str__(self) -> str:
        return f"{self.out_features}x{self.in_features}" + "-transposed" * self.transposed


VECTOR_PRODUCTS = [
    VectorProduct(*case) for case in itertools.product([1, 7, 8, 9, 130], [1, 31, 32, 33, 257, 770], [False, True])
]


def check_vector_product(library: ctypes.CDLL, case: VectorProduct, seed: int = 0) -> None:
    """With whole numbers, of which every order of additions gives the same sum."""
    generator = torch.Generator().manual_seed(case.out_features * 7919 + case.in_features)
    weight = torch.randn(case.out_features, case.in_features, generator=generator) >= 0
    matrix = (2.0 * weight.double() - 1).T if case.transposed else 2.0 * weight.double() - 1
    vector = torch.randint(-(2**40), 2**40, (matrix.shape[1],), generator=generator).double()
    source, factors = before_forbidden_page(pack(weight)), before_forbidden_page(vector)
    output = Output(matrix.shape[0], dtype=torch.float64, misalignment=8)
    record = struct.pack(
        "8q",
        *(0, 0, pointer(source), case.out_features, case.in_features, case.transposed),
        *(pointer(factors), output.pointer),
    )
    with emulation(seed):
        assert library.hf_stompp_cuda_sign_product(record) == OK
    assert torch.equal(output.value(), matrix @ vector), f"wrong result: {case}"


PACKINGS, PRODUCTS, NORMS = draw_packings(), draw_products(), draw_norms()
SMALL_PRODUCTS = [case for case in PRODUCTS if case.rows * case.in_features * case.out_features < 2_000_000]
# One of every instruction and tile, with more steps than stages and more than one block.
STAGED_PRODUCTS = [
    Product(kernel, 130, features, 264, torch.bfloat16, False, False, True, False)
    for kernel, features in itertools.product(KERNELS.values(), [2048, 1536, 1792])
]


def check_small(library: ctypes.CDLL) -> int:
    """All operators on small shapes; returns how many."""
    checks = [
        *((check_packing, case) for case in PACKINGS),
        *((check_product, case) for case in SMALL_PRODUCTS),
        *((check_norm, case) for case in NORMS),
        *((check_unpacking, case) for case in UNPACKINGS),
        *((check_vector_product, case) for case in VECTOR_PRODUCTS),
    ]
    for function, case in checks:
        function(library, case)  # type: ignore[operator]
    return len(checks)


# ---- Building ----


@pytest.fixture(scope="session")
def library(emulated_cuda: Path) -> ctypes.CDLL:
    return load(emulated_cuda)


# ---- The kernels ----


@pytest.mark.parametrize("case", PACKINGS, ids=str)
def test_packed_bits_are_exact(library: ctypes.CDLL, case: Packing) -> None:
    check_packing(library, case, seed=case.features)


@pytest.mark.parametrize("case", UNPACKINGS, ids=str)
def test_unpacked_signs_are_exact(library: ctypes.CDLL, case: Unpacking) -> None:
    check_unpacking(library, case, seed=case.features)


@pytest.mark.parametrize("case", PRODUCTS, ids=str)
def test_product_is_bit_exact(library: ctypes.CDLL, case: Product) -> None:
    check_product(library, case, seed=case.in_features)


def test_products_cover_each_kernel_with_each_size() -> None:
    for field, sizes in [("rows", ROWS), ("in_features", IN_FEATURES), ("out_features", OUT_FEATURES)]:
        drawn = {(case.kernel, getattr(case, field)) for case in PRODUCTS}
        assert drawn >= set(itertools.product([AUTO, *KERNELS.values()], sizes))


@pytest.mark.slow
@pytest.mark.parametrize("case", STAGED_PRODUCTS, ids=str)
def test_product_does_not_depend_on_the_order_of_threads(library: ctypes.CDLL, case: Product) -> None:
    for seed in range(1, 9):
        check_product(library, case, seed)


@pytest.mark.parametrize("output_bits", [False, True])
@pytest.mark.parametrize("in_features", [500, 2300])
@pytest.mark.parametrize("kernel", ["WGMMA_64x64", "WGMMA_64x128"])
def test_few_multiprocessors_share_many_tiles(
    library: ctypes.CDLL, kernel: str, in_features: int, output_bits: bool
) -> None:
    for processors, rows in itertools.product([1, 3], [64, 640, 1090]):
        case = Product(KERNELS[kernel], rows, in_features, 520, torch.bfloat16, output_bits, True, True, False)
        check_product(library, case, seed=rows, processors=processors)


def test_widest_rows_that_fit_shared_memory_are_multiplied(library: ctypes.CDLL) -> None:
    for kernel in (KERNELS["WGMMA_64x64"], KERNELS["WGMMA_64x128"]):
        check_product(library, Product(kernel, 65, 10240, 130, torch.float32, False, False, True, False))
        assert library.hf_stompp_cuda_binary_linear(product_record(kernel, 65, 10241, 130)) == TOO_LARGE
    with emulation():
        assert library.hf_stompp_cuda_chosen(0, 4096, 10240, 3072) == KERNELS["WGMMA_64x128"]
        assert library.hf_stompp_cuda_chosen(0, 4096, 10241, 3072) == KERNELS["MMA_128x128"]


@pytest.mark.parametrize("capability", ["8.0", "8.6", "8.9"])
def test_product_runs_with_what_the_device_has(library: ctypes.CDLL, capability: str) -> None:
    for kernel in (AUTO, KERNELS["MMA_64x64"], KERNELS["MMA_128x128"]):
        for dtype, bits in itertools.product(DTYPES, [False, True]):
            check_product(library, Product(kernel, 257, 257, 300, dtype, bits, bits, True, False), 0, capability)


@pytest.mark.parametrize("case", NORMS, ids=str)
def test_layer_norm_is_that_of_the_definition(library: ctypes.CDLL, case: Norm) -> None:
    check_norm(library, case, seed=case.features)


@pytest.mark.parametrize("case", VECTOR_PRODUCTS, ids=str)
def test_product_with_a_vector_is_exact(library: ctypes.CDLL, case: VectorProduct) -> None:
    check_vector_product(library, case, seed=case.in_features)


@pytest.mark.slow
def test_kernels_are_clean_under_sanitizers(cxx: list[str], make_emulated_cuda: Callable[..., Path]) -> None:
    found = subprocess.run([*cxx, "-print-file-name=libasan.so"], capture_output=True, text=True)
    runtime = Path(found.stdout.strip())
    if not runtime.is_absolute():
        pytest.skip(f"{cxx[0]} has no libasan.so")
    path = make_emulated_cuda("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    environment = {
        **os.environ,
        "LD_PRELOAD": str(runtime),
        "ASAN_OPTIONS": "detect_leaks=0",
    }
    command = [sys.executable, __file__, str(path)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.startswith("checked ")


# ---- What runs where ----


def product_record(kernel: int = AUTO, rows: int = 0, in_features: int = 256, out_features: int = 8) -> bytes:
    """Without memory: for calls that must not come to need it."""
    return struct.pack("14q", 0, 0, kernel, 0, 0, 0, 0, rows, in_features, out_features, 0, 0, 0, 0)


@pytest.mark.parametrize(
    ("capability", "native"),
    [
        ("8.0", {"MMA_64x64", "MMA_128x128"}),
        ("8.6", {"MMA_64x64", "MMA_128x128"}),
        ("8.9", {"MMA_64x64", "MMA_128x128"}),
        ("9.0", set(KERNELS)),
        ("10.0", set()),
        ("12.0", set()),
    ],
)
def test_kernels_are_those_that_the_device_runs_natively(
    library: ctypes.CDLL, capability: str, native: set[str]
) -> None:
    launches = library.emulated_cuda_launches()
    with emulation(capability=capability):
        assert library.hf_stompp_cuda_check(0) == OK
        found = {name for name, kernel in KERNELS.items() if library.hf_stompp_cuda_has_kernel(0, kernel)}
        assert found == native
        for name in set(KERNELS) - native:
            record = product_record(KERNELS[name], rows=1)
            assert library.hf_stompp_cuda_binary_linear(record) == UNAVAILABLE
        chosen = library.hf_stompp_cuda_chosen(0, 128, 768, 768)
        assert chosen in {KERNELS[name] for name in native} if native else chosen == -1
        if not native:
            assert library.hf_stompp_cuda_binary_linear(product_record(rows=1)) == UNAVAILABLE
        for kernel in (-2, len(KERNELS)):
            assert not library.hf_stompp_cuda_has_kernel(0, kernel)
            assert library.hf_stompp_cuda_binary_linear(product_record(kernel, rows=1)) == UNAVAILABLE
    assert library.emulated_cuda_launches() == launches


@pytest.mark.parametrize("capability", ["8.0", "9.0"])
def test_choice_of_a_kernel_depends_on_the_size(library: ctypes.CDLL, capability: str) -> None:
    sizes = itertools.product([1, 64, 128, 512, 4096], [768], [1, 64, 128, 256, 768, 3072])
    with emulation(capability=capability):
        chosen = {library.hf_stompp_cuda_chosen(0, *size) for size in sizes}
        assert len(chosen) > 1
        assert all(library.hf_stompp_cuda_has_kernel(0, kernel) for kernel in chosen)


def test_no_error_is_left_behind_for_a_later_call(library: ctypes.CDLL) -> None:
    record = struct.pack("9q", 7, 0, 0, 0, 0, 3, 40, 0, 0)
    with emulation(capability="7.5"):
        for call in (
            lambda: library.hf_stompp_cuda_check(0) == NO_KERNEL_IMAGE,
            lambda: library.hf_stompp_cuda_pack_sign(record) == INVALID_DEVICE,
            lambda: not library.hf_stompp_cuda_has_kernel(7, 0),
        ):
            assert call()
            assert library.emulated_cuda_last_error() == OK


def test_device_without_code_is_reported(library: ctypes.CDLL) -> None:
    with emulation(capability="7.5"):
        assert library.hf_stompp_cuda_check(0) == NO_KERNEL_IMAGE
    assert b"kernel image" in library.hf_stompp_cuda_message(NO_KERNEL_IMAGE)


def test_other_device_is_used_and_the_current_one_stays(library: ctypes.CDLL) -> None:
    x, stream = torch.randn(3, 40), 0x1230
    bits = Output(3, packed_bytes(40), dtype=torch.uint8)
    for device in (1, 0):
        record = struct.pack("9q", device, stream, x.data_ptr(), 0, 0, 3, 40, bits.pointer, 0)
        assert library.hf_stompp_cuda_pack_sign(record) == OK
        assert library.emulated_cuda_launch_device() == device
        assert library.emulated_cuda_launch_stream() == stream
        assert library.emulated_cuda_device() == 0
    assert_same_bits(bits.value(), pack(x >= 0), "on another device")


def test_device_that_is_not_there_is_refused(library: ctypes.CDLL) -> None:
    launches = library.emulated_cuda_launches()
    record = struct.pack("9q", 7, 0, 0, 0, 0, 3, 40, 0, 0)
    assert library.hf_stompp_cuda_pack_sign(record) == INVALID_DEVICE
    assert library.hf_stompp_cuda_check(7) == INVALID_DEVICE
    assert not library.hf_stompp_cuda_has_kernel(7, 0)
    assert library.emulated_cuda_device() == 0
    assert library.emulated_cuda_launches() == launches


def test_nothing_is_launched_for_no_rows(library: ctypes.CDLL) -> None:
    launches = library.emulated_cuda_launches()
    assert library.hf_stompp_cuda_pack_sign(struct.pack("9q", 0, 0, 0, 0, 0, 0, 40, 0, 0)) == OK
    assert library.hf_stompp_cuda_unpack_signs(struct.pack("7q", 0, 0, 0, 0, 40, 0, 0)) == OK
    assert library.hf_stompp_cuda_binary_linear(product_record(rows=0)) == OK
    assert library.hf_stompp_cuda_binary_linear(product_record(rows=3, out_features=0)) == OK
    norm = struct.pack("8qd5q", 0, 0, 0, 0, 0, 0, 0, 0, 1e-5, 0, 0, 40, 0, 0)
    assert library.hf_stompp_cuda_layer_norm_sign(norm) == OK
    assert library.hf_stompp_cuda_sign_product(struct.pack("8q", 0, 0, 0, 0, 40, 0, 0, 0)) == OK
    assert library.emulated_cuda_launches() == launches


def test_no_features_are_no_error(library: ctypes.CDLL) -> None:
    assert library.hf_stompp_cuda_unpack_signs(struct.pack("7q", 0, 0, 0, 3, 0, 0, 0)) == OK
    popcounts = Output(3, dtype=torch.int32)
    assert library.hf_stompp_cuda_pack_sign(struct.pack("9q", 0, 0, 0, 0, 0, 3, 0, 0, popcounts.pointer)) == OK
    assert popcounts.value().tolist() == [0, 0, 0]
    # Sums of nothing.
    for out_features, in_features, transposed in [(3, 0, 0), (0, 3, 1)]:
        sums = Output(3, dtype=torch.float64)
        record = struct.pack("8q", 0, 0, 0, out_features, in_features, transposed, 0, sums.pointer)
        assert library.hf_stompp_cuda_sign_product(record) == OK
        assert sums.value().tolist() == [0.0, 0.0, 0.0]
    assert library.hf_stompp_cuda_sign_product(struct.pack("8q", 0, 0, 0, 3, 0, 1, 0, 0)) == OK
    scale, bias = torch.randn(5), torch.randn(5)
    for kernel in KERNELS.values():
        y = Output(3, 5, dtype=torch.float32)
        pointers = (0, 0, scale.data_ptr(), bias.data_ptr(), 3, 0, 5, y.pointer, 0, 0, 0)
        assert library.hf_stompp_cuda_binary_linear(struct.pack("14q", 0, 0, kernel, *pointers)) == OK
        assert torch.equal(y.value(), bias.expand(3, 5))


def test_sizes_that_a_kernel_does_not_take_are_refused(library: ctypes.CDLL) -> None:
    launches = library.emulated_cuda_launches()
    for sizes in [(2**31, 256, 8), (8, 2**24, 8), (8, 256, 2**24)]:
        assert library.hf_stompp_cuda_binary_linear(product_record(AUTO, *sizes)) == TOO_LARGE
    for rows, features in [(2**31, 40), (8, 2**24)]:
        assert library.hf_stompp_cuda_pack_sign(struct.pack("9q", 0, 0, 0, 0, 0, rows, features, 0, 0)) == TOO_LARGE
    for features in (4104, 12):
        norm = struct.pack("8qd5q", 0, 0, 0, 0, 0, 0, 0, 0, 1e-5, 0, 3, features, 0, 0)
        assert library.hf_stompp_cuda_layer_norm_sign(norm) == TOO_LARGE
    assert library.emulated_cuda_launches() == launches
    assert all(library.hf_stompp_cuda_message(status) for status in (UNAVAILABLE, TOO_LARGE))


def test_library_says_what_it_was_built_from(library: ctypes.CDLL) -> None:
    assert library.hf_stompp_cuda_source_hash().decode() == build.cuda_source_hash()


# ---- The emulation ----

PRODUCT_OF_TILES = (
    "copy_tiles(data); fence_shared_for_wgmma(); __syncthreads(); begin_wgmma(sums); multiply_tiles(sums, A, B); "
    "multiply_tiles(sums, A, B); commit_wgmma(); wait_for_wgmma(sums);"
)
MATRIX_OF_COPIES = "copy_tiles(data); __syncthreads(); load_matrices(registers, shared + 16 * t);"
# By the warp whose wgmma it is, or one that is still to come to it.
TILE_CHANGED = "while wgmma was reading|bytes that were (copied|stored) and not fenced|a copy is under way"


def changed(statements: str, old: str, new: str = "") -> str:
    assert old in statements
    return statements.replace(old, new, 1)


# Statements of a kernel, its threads, and a pattern of what is said to be wrong with it.
MISUSE: list[tuple[str, int, str | None]] = [
    (PRODUCT_OF_TILES, 128, None),
    (PRODUCT_OF_TILES, 256, None),
    (MATRIX_OF_COPIES, 64, None),
    # Barriers and warps.
    ("if (t >= 40) return; __syncthreads();", 64, "wait for ever"),
    ("if (t < 32) __syncthreads();", 64, "wait for ever"),
    ("if (t % 2) __syncthreads(); else __syncwarp();", 32, "different instructions"),
    ("if (t % 2) {\n__syncthreads();\n} else {\n__syncthreads();\n}", 32, "different barriers"),
    ("if (t % 2) {\n__syncwarp();\n} else {\n__syncwarp();\n}", 32, "different instructions"),
    ("if (t % 2) __shfl_sync(0xffffffff, t, 0);", 32, "wait for ever|has ended"),
    ("if (t < 16) __shfl_sync(0x0000ffff, t, 20);", 32, "not in the mask"),
    ("if (t < 16) __shfl_xor_sync(0xffff0000, t, 1);", 32, "not in the mask"),
    ("__syncwarp();", 16, "lanes that the block does not have"),
    # Copies.
    (changed(MATRIX_OF_COPIES, "__syncthreads(); ", "t = 63 - t; "), 64, "another warp copied|nothing was written to"),
    ("load_matrices(registers, shared + 16 * t);", 64, "nothing was written to"),
    (changed(PRODUCT_OF_TILES, "copy_tiles(data);"), 128, "nothing was written to"),
    ("copy_async(shared + 16 * t, data, true); load_matrices(registers, shared);", 32, "a copy is under way"),
    (
        "copy_async(shared + 16 * t, data, true); wait_for_copies<0>(); load_matrices(registers, shared);",
        32,
        "a copy is under way",
    ),
    (
        "copy_async(shared + 16 * t, data, true); commit_copies(); wait_for_copies<1>(); "
        "load_matrices(registers, shared);",
        32,
        "a copy is under way",
    ),
    ("copy_async(shared + 16 * (t / 2), data, true);", 32, "two copies"),
    ("copy_async(shared + 16 * t + 8, data, true);", 32, "no multiple of 16"),
    ("copy_async(shared + 16 * t, data + 8, true);", 32, "no multiple of 16"),
    ("copy_async(shared + A_BYTES + B_BYTES, data, true);", 32, "beyond the dynamic shared memory"),
    ("load_matrices(registers, shared + A_BYTES + B_BYTES);", 32, "beyond the dynamic shared memory"),
    ("load_matrices(registers, shared + 2);", 32, "no multiple of 16"),
    ("load_matrices(registers, data);", 32, "outside of dynamic shared memory"),
    ("shared[A_BYTES + B_BYTES] ^= 1;", 1, "beyond the dynamic shared memory"),
    # wgmma.
    (changed(PRODUCT_OF_TILES, "fence_shared_for_wgmma(); "), 128, "copied and not fenced"),
    (changed(PRODUCT_OF_TILES, "__syncthreads(); "), 128, "wgmma of bytes that"),
    (
        changed(
            PRODUCT_OF_TILES,
            "fence_shared_for_wgmma(); __syncthreads();",
            "__syncthreads(); fence_shared_for_wgmma();",
        ),
        128,
        "wgmma of bytes that",
    ),
    (changed(PRODUCT_OF_TILES, "begin", "shared[16 * t]++; __syncthreads(); begin"), 128, "stored and not fenced"),
    (changed(PRODUCT_OF_TILES, "begin_wgmma(sums); "), 128, "since wgmma.fence"),
    (changed(PRODUCT_OF_TILES, "multiply", "sums[3][1]++; multiply"), 128, "since wgmma.fence"),
    (changed(PRODUCT_OF_TILES, "commit", "sums[3][1]++; commit"), 128, "while wgmma was adding"),
    (changed(PRODUCT_OF_TILES, "commit", "shared[16 * t]++; commit"), 128, TILE_CHANGED),
    (
        changed(PRODUCT_OF_TILES, "wait_for_wgmma", "copy_tiles(data + 16); wait_for_wgmma"),
        128,
        TILE_CHANGED,
    ),
    (changed(PRODUCT_OF_TILES, "commit_wgmma(); "), 128, "no group was made of"),
    (changed(PRODUCT_OF_TILES, "wait_for_wgmma(sums);"), 128, "ends with wgmma under way"),
    (changed(PRODUCT_OF_TILES, "sums, A, B", "sums, t % 2 ? A : B, B"), 128, "different matrix descriptors"),
    (changed(PRODUCT_OF_TILES, "sums, A, B", "sums, t / 32 % 2 ? A : B, B"), 128, "at different wgmma"),
    (PRODUCT_OF_TILES, 64, "fewer than four warps"),
    (PRODUCT_OF_TILES, 192, "fewer than four warps"),
    (changed(PRODUCT_OF_TILES, "begin", "if (t < 96) return; begin"), 128, "wait for ever"),
    (changed(PRODUCT_OF_TILES, "A,", "A + 128 / 16,"), 128, "base offset"),
    (changed(PRODUCT_OF_TILES, "A,", "A | 1ull << 49,"), 128, "base offset"),
    (changed(PRODUCT_OF_TILES, "A,", "A | 1ull << 46,"), 128, "no meaning"),
    (changed(PRODUCT_OF_TILES, "A,", "describe(shared, 0, 128, 3),"), 128, "base offset"),
    (changed(PRODUCT_OF_TILES, "A,", "describe(shared, 0, 1024, 3),"), 128, "beyond the dynamic shared memory"),
]


@pytest.fixture(scope="session")
def program(cxx: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library of small kernels that use the emulation, rightly and wrongly."""
    kernels = [
        f"static void statements_{i}(uint8_t *data) {{ uint8_t *const shared = dynamic_shared(); "
        "int t = threadIdx.x; int sums[16][4] = {}; uint32_t registers[4]; "
        f"(void)data, (void)shared, (void)t, (void)sums, (void)registers; {statements} }}"
        for i, (statements, _, _) in enumerate(MISUSE)
    ]
    names = ", ".join(f"statements_{i}" for i in range(len(MISUSE)))
    folder = tmp_path_factory.mktemp("program")
    (folder / "statements.h").write_text("\n".join([*kernels, f"#define KERNELS {names}\n"]))
    define = f'-DSTATEMENTS="{folder / "statements.h"}"'
    command = [*cxx, define, "-shared", str(SELFTEST), "-o", str(folder / "program.so")]
    subprocess.run(command, check=True)
    return folder / "program.so"


@pytest.fixture(scope="session")
def emulator(program: Path) -> ctypes.CDLL:
    return ctypes.CDLL(str(program))


RUN_STATEMENTS = """
import ctypes, sys
data = (ctypes.c_uint8 * 8192)(*(7 * i % 251 for i in range(8192)))
aligned = ctypes.addressof(data) + -ctypes.addressof(data) % 16
status = ctypes.CDLL(sys.argv[1]).run_statements(int(sys.argv[2]), int(sys.argv[3]), ctypes.c_void_p(aligned))
print("status", status)
"""


@pytest.mark.parametrize("number", range(len(MISUSE)))
def test_emulation_ends_the_program_where_a_device_may_fail(program: Path, number: int) -> None:
    statements, threads, reason = MISUSE[number]
    command = [sys.executable, "-S", "-c", RUN_STATEMENTS, str(program), str(number), str(threads)]
    for seed in range(3):
        environment = {**os.environ, "HF_STOMPP_EMULATED_SEED": str(seed)}
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
        if reason is None:
            assert result.stdout == "status 0\n", f"{statements}: {result.stderr}"
        else:
            assert result.returncode < 0, statements
            assert result.stderr.startswith("emulated CUDA: ") and re.search(reason, result.stderr), statements


def test_instruction_that_a_device_does_not_have_ends_the_program(program: Path) -> None:
    command = [sys.executable, "-S", "-c", RUN_STATEMENTS, str(program), "0", "128"]
    for capability in ("8.0", "10.0"):
        environment = {**os.environ, "HF_STOMPP_EMULATED_CAPABILITY": capability}
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
        assert result.returncode < 0
        assert "this device does not have" in result.stderr


def test_missing_barrier_gives_wrong_results_in_some_order(emulator: ctypes.CDLL) -> None:
    def reversed_right(synchronized: bool) -> Iterator[bool]:
        for seed in range(8):
            data = torch.arange(256, dtype=torch.int32)
            with emulation(seed):
                assert emulator.run_reverse(ctypes.c_void_p(data.data_ptr()), int(synchronized)) == OK
            yield torch.equal(data, torch.arange(256, dtype=torch.int32).flip(0))

    assert all(reversed_right(synchronized=True))
    assert not any(reversed_right(synchronized=False))


def test_missing_wait_gives_wrong_results(emulator: ctypes.CDLL) -> None:
    def copied_right(awaited: bool) -> Iterator[bool]:
        for seed in range(8):
            data = before_forbidden_page(torch.arange(128, dtype=torch.int32))
            assert data is not None
            with emulation(seed):
                assert emulator.run_copy(ctypes.c_void_p(data.data_ptr()), int(awaited)) == OK
            yield torch.equal(data[64:], data[:64])

    assert all(copied_right(awaited=True))
    assert not any(copied_right(awaited=False))


def layout(coordinates: tuple[int, ...], strides: tuple[int, ...]) -> int:
    return sum(coordinate * stride for coordinate, stride in zip(coordinates, strides, strict=True))


def bit_words(bits: Tensor) -> list[int]:
    """Rows of booleans to 32-bit words, the first bit least significant."""
    return [sum(int(bit) << i for i, bit in enumerate(row)) for row in bits.view(-1, 32).tolist()]


def test_fragments_are_laid_out_as_by_cute(emulator: ctypes.CDLL) -> None:
    """By the strides of SM80_16x8x256_S32U1U1S32_TN in CuTe: an index into the matrix is row + rows * column."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(rows, 256, generator=generator) >= 0 for rows in (16, 8))
    sums = torch.randint(-1000, 1000, (16, 8), generator=generator)
    lanes = []
    for lane in range(32):
        member, group = lane % 4, lane // 4
        registers = []
        for upper, right in itertools.product(range(2), range(2)):
            # Values (32, 2, 2), of which the first are the bits of a register and the last counts slowest.
            index = [layout((member, group, i, right, upper), (512, 1, 16, 8, 2048)) for i in range(32)]
            registers += bit_words(torch.stack([a[i % 16, i // 16] for i in index]))
        for upper in range(2):
            index = [layout((member, group, i, upper), (256, 1, 8, 1024)) for i in range(32)]
            registers += bit_words(torch.stack([b[i % 8, i // 8] for i in index]))
        # SM80_16x8_Row: lanes (4, 8), values (2, 2).
        index = [layout((member, group, i % 2, i // 2), (32, 1, 16, 8)) for i in range(4)]
        lanes += [[*registers, *(int(sums[i % 16, i // 16]) & 0xFFFFFFFF for i in index)]]
    data = torch.tensor(lanes, dtype=torch.int64).to(torch.int32)
    assert emulator.run_mma(ctypes.c_void_p(data.data_ptr())) == OK
    expected = sums + (a.double() @ b.double().T).long()
    for lane, values in enumerate(data[:, 6:].tolist()):
        index = [layout((lane % 4, lane // 4, i % 2, i // 2), (32, 1, 16, 8)) for i in range(4)]
        assert values == [int(expected[i % 16, i // 16]) for i in index]


def test_matrices_are_loaded_as_words_of_their_rows(emulator: ctypes.CDLL) -> None:
    data = before_forbidden_page(torch.arange(256, dtype=torch.int32))
    assert data is not None
    assert emulator.run_ldmatrix(ctypes.c_void_p(data.data_ptr())) == OK
    # Matrix, row, word -> lane, matrix.
    assert torch.equal(data[128:].view(32, 4), torch.arange(128, dtype=torch.int32).view(4, 32).T)


def swizzle(address: int, bits: int) -> int:
    """Swizzle<bits, 4, 3> of CuTe."""
    return address ^ (address & ((1 << bits) - 1) << 7) >> 3


def lay_out_tile(memory: Tensor, begin: int, rows: Tensor, bits: int, leading: int, stride: int) -> None:
    """Rows of 32 bytes in the canonical K-major layouts of make_gmma_desc in CuTe, in units of 16 bytes."""
    for row, content in enumerate(rows):
        for half in range(2):
            offset = layout((row % 8, row // 8, half), (1 << bits, stride // 16, leading // 16 if bits == 0 else 1))
            address = swizzle(begin + 16 * offset, bits)
            memory[address : address + 16] = content[16 * half : 16 * half + 16]


# Bits of the swizzle, mode in the descriptor, leading and stride byte offset, where in the pattern's rows it begins.
TILE_LAYOUTS = [
    (0, 0, 128, 256, 0),
    (0, 0, 4096, 128, 0),
    (1, 3, 0, 256, 0),
    (1, 3, 16, 512, 0),
    (2, 2, 0, 512, 0),
    (2, 2, 0, 512, 32),
    (3, 1, 0, 1024, 64),
    (3, 1, 0, 2048, 96),
]


def multiply_tiles(emulator: ctypes.CDLL, tile_layout: tuple[int, ...], told_stride: int, seed: int = 0) -> bool:
    """Whether wgmma gives the product of tiles laid out so, when its descriptors tell of that stride."""
    bits, mode, leading, stride, k_offset = tile_layout
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(rows, 256, generator=generator) >= 0 for rows in (64, 128))
    sums = torch.randint(-1000, 1000, (64, 128), generator=generator)
    b_offset, size = 64 * 1024, 128 * 1024
    memory = torch.randint(0, 256, (size,), dtype=torch.uint8, generator=generator)
    lay_out_tile(memory, k_offset, pack(a), bits, leading, stride)
    lay_out_tile(memory, b_offset + k_offset, pack(b), bits, leading, stride)
    image = before_forbidden_page(memory)

    # CLayout_64xN: threads (4, 8, 4), values (2, 2, N / 8); an index into the matrix is row + 64 * column.
    index = torch.tensor(
        [
            [
                layout((t % 4, t // 4 % 8, t // 32, v % 2, v // 2 % 2, v // 4), (128, 1, 16, 64, 8, 512))
                for v in range(64)
            ]
            for t in range(128)
        ]
    )
    data = sums.T.reshape(-1)[index].to(torch.int32)
    record = struct.pack("8q", size, b_offset, k_offset, leading, told_stride, mode, pointer(image), data.data_ptr())
    with emulation(seed):
        assert emulator.run_wgmma(record) == OK
    # The kernel multiplies twice.
    expected = sums + 2 * (a.double() @ b.double().T).long()
    return torch.equal(data.long(), expected.T.reshape(-1)[index])


@pytest.mark.parametrize("tile_layout", TILE_LAYOUTS, ids=str)
def test_matrix_descriptors_tell_of_the_layouts_of_cute(emulator: ctypes.CDLL, tile_layout: tuple[int, ...]) -> None:
    for seed in range(3):
        assert multiply_tiles(emulator, tile_layout, tile_layout[3], seed)


@pytest.mark.parametrize("tile_layout", TILE_LAYOUTS, ids=str)
def test_matrix_descriptor_with_another_stride_gives_another_product(
    emulator: ctypes.CDLL, tile_layout: tuple[int, ...]
) -> None:
    pattern = 128 << tile_layout[0]
    assert not multiply_tiles(emulator, tile_layout, tile_layout[3] + pattern)
    assert not multiply_tiles(emulator, tile_layout, tile_layout[3] - pattern)


def test_lanes_exchange_values_as_named(emulator: ctypes.CDLL) -> None:
    data = torch.full((7, 32), -1, dtype=torch.int32)
    values = torch.randint(-(2**20), 2**20, (32,), generator=torch.Generator().manual_seed(0)).tolist()
    data[0] = torch.tensor(values)
    assert emulator.run_exchange(ctypes.c_void_p(data.data_ptr())) == OK
    found = data.tolist()
    assert found[1] == [values[5 * lane % 32] for lane in range(32)]
    assert found[2] == [values[lane ^ 9] for lane in range(32)]
    assert found[3] == [values[lane + 3 if lane % 8 < 5 else lane] for lane in range(32)]
    assert found[4] == [sum(values)] * 32
    ballot = sum(1 << lane for lane, value in enumerate(values) if value % 2)
    assert [bits & 0xFFFFFFFF for bits in found[5]] == [ballot] * 32
    assert found[6] == [-1] * 16 + [sum(values[16:])] * 16


def test_floats_are_rounded_as_by_torch(emulator: ctypes.CDLL) -> None:
    generator = torch.Generator().manual_seed(0)
    anything = torch.randint(-(2**31), 2**31, (200_000,), generator=generator).to(torch.int32).view(torch.float32)
    # All values of f16, those halfway between them, and their neighbours.
    exact = torch.arange(0, 0x7C01, dtype=torch.int32).to(torch.int16).view(torch.float16).double()
    between = (exact[1:-1] + exact[:-2]) / 2
    between = torch.cat(
        [exact, between, between * (1 + 2**-20), between * (1 - 2**-20), torch.tensor([65519.9, 65520.0])]
    )
    source = torch.cat([anything, between.float(), -between.float()])
    source = source[~source.isnan()]
    bf16, f16 = (torch.empty(len(source), dtype=torch.int16) for _ in range(2))
    emulator.round_floats(*(ctypes.c_void_p(tensor.data_ptr()) for tensor in (source, bf16, f16)), len(source))
    assert torch.equal(bf16, source.to(torch.bfloat16).view(torch.int16))
    assert torch.equal(f16, source.to(torch.float16).view(torch.int16))

    wide = [torch.empty(65536) for _ in range(2)]
    emulator.widen_floats(*(ctypes.c_void_p(tensor.data_ptr()) for tensor in wide))
    patterns = torch.arange(65536, dtype=torch.int32).to(torch.int16)
    for found, dtype in zip(wide, (torch.bfloat16, torch.float16), strict=True):
        expected = patterns.view(dtype).float()
        assert torch.equal(found.isnan(), expected.isnan())
        numbers = ~expected.isnan()
        assert torch.equal(found[numbers].view(torch.int32), expected[numbers].view(torch.int32))


def test_launch_beyond_what_the_device_has_is_an_error(emulator: ctypes.CDLL) -> None:
    def status(*sizes: int) -> int:
        return emulator.launch_nothing(*map(ctypes.c_int64, sizes))

    assert status(1, 1, 1024, 227 * 1024) == OK
    assert status(2, 3, 32, 0) == OK
    for sizes in [(1, 1, 1056, 0), (1, 65536, 32, 0), (0, 1, 32, 0), (1, 1, 0, 0), (1, 1, 32, 227 * 1024 + 1)]:
        assert status(*sizes) > 0
    with emulation(capability="8.6"):
        assert status(1, 1, 32, 99 * 1024) == OK
        assert status(1, 1, 32, 99 * 1024 + 1) > 0


if __name__ == "__main__":
    print("checked", check_small(load(sys.argv[1])))
