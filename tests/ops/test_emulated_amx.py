"""
The AMX kernel's own source on any processor with AVX-512: its tile instructions are replaced by emulated_amx.h.

Run as a program, with the path of such a library, it compares the small shapes without pytest: a library with
sanitizers needs a process that has loaded their runtime before everything else.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import math
import mmap
import os
import platform
import random
import struct
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor


# As a program it needs the library alone, and to import transformers under a sanitizer takes ten seconds.
if __name__ != "__main__":
    from hf_stompp.ops.build import COMMON_FLAGS, KERNEL_FILES, SOURCES, BuildError, find_compiler
    from hf_stompp.ops.cpu import NativeKernels
    from hf_stompp.ops.operators import on_kernels

HEADER = Path(__file__).resolve().parent / "emulated_amx.h"
EMULATED = f'-DHF_STOMPP_EMULATED_AMX="{HEADER}"'
VECTOR_FLAGS = {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512vbmi"}

AMX = 0
BITS = 3
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

# Around the edges of a tile (16 rows, 16 columns, 64 features), a pair of tiles, and a block of expanded rows.
ROWS = [1, 2, 7, 15, 16, 17, 31, 32, 33, 130, 1100]
IN_FEATURES = [1, 7, 63, 64, 65, 255, 256, 257, 768, 1000, 3072]
OUT_FEATURES = [1, 3, 15, 16, 17, 31, 32, 33, 65, 770]


@dataclass(frozen=True)
class Case:
    rows: int
    in_features: int
    out_features: int
    input_dtype: torch.dtype
    input_bits: bool
    output_dtype: torch.dtype
    output_bits: bool
    thresholds: bool
    bias: bool
    threads: int
    activation_bits: int = 1

    def __str__(self) -> str:
        names = [str(dtype).removeprefix("torch.") for dtype in (self.input_dtype, self.output_dtype)]
        source = "bits" if self.input_bits else names[0]
        target = names[1] + ("-bits" if self.output_bits else "")
        shape = f"{self.rows}x{self.in_features}x{self.out_features}"
        options = "-thresholds" * self.thresholds + "-bias" * self.bias
        rounded = "-8-bits" * (self.activation_bits == 8)
        return f"{shape}-{source}{rounded}-to-{target}{options}-{self.threads}-threads"


def draw_cases() -> list[Case]:
    """Each in_features with each out_features and, over them, each number of rows; the rest in random order."""
    sources = [*((dtype, False) for dtype in DTYPES), (torch.float32, True)]
    targets = list(itertools.product(DTYPES, [False, True]))
    options = list(itertools.product(sources, targets, [False, True], [False, True]))
    random.Random(0).shuffle(options)
    cases = []
    for (i, k), (j, n) in itertools.product(enumerate(IN_FEATURES), enumerate(OUT_FEATURES)):
        (input_dtype, input_bits), (output_dtype, output_bits), thresholds, bias = options[len(cases) % len(options)]
        rows = ROWS[(i + j) % len(ROWS)]
        target = (output_dtype, output_bits)
        cases += [Case(rows, k, n, input_dtype, input_bits, *target, thresholds, bias, 1 + len(cases) % 2)]
    # Large enough to be split: over rows, over columns, over blocks of rows and of columns in each thread.
    for rows, k, n in [(130, 1000, 770), (33, 3072, 770), (1100, 768, 770), (1100, 3072, 65)]:
        cases += [Case(rows, k, n, torch.bfloat16, False, torch.bfloat16, False, False, True, 2)]
        cases += [Case(rows, k, n, torch.float32, True, torch.float16, True, True, False, 2)]
    # Floats that are rounded to bytes: every third case again.
    return cases + [
        replace(case, input_bits=False, output_bits=False, thresholds=False, activation_bits=8) for case in cases[::3]
    ]


CASES = draw_cases()
SMALL_CASES = [case for case in CASES if case.rows * case.in_features * case.out_features < 1_000_000]


def packed_bytes(features: int) -> int:
    return 32 * math.ceil(features / 256)


def pack(signs: Tensor) -> Tensor:
    """Boolean rows to bits in the format of the library, of which this is another description."""
    rows, features = signs.shape
    padded = torch.zeros(rows, 8 * packed_bytes(features), dtype=torch.int32)
    padded[:, :features] = signs
    return (padded.view(rows, -1, 8) << torch.arange(8)).sum(-1).to(torch.uint8)


def before_forbidden_page(tensor: Tensor | None) -> Tensor | None:
    """A copy with which the process ends when anything behind it is read: no sanitizer sees what masked loads read."""
    if tensor is None:
        return None
    count = tensor.numel() * tensor.element_size()
    size = math.ceil(count / mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, size + mmap.PAGESIZE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    forbid = ctypes.CDLL(None).mprotect
    assert forbid(ctypes.c_void_p(address + size), ctypes.c_size_t(mmap.PAGESIZE), ctypes.c_int(0)) == 0
    copy = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=size - count)
    return copy.view(tensor.shape).copy_(tensor)


def pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def load(path: Path | str) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    library.hf_stompp_unavailable.restype = ctypes.c_char_p
    return library


def check(library: ctypes.CDLL, case: Case) -> None:
    """The kernel's output, bit for bit that of the definition, and nothing written beside it."""
    generator = torch.Generator().manual_seed(case.rows * 7919 + case.in_features * 31 + case.out_features)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    x = draw(case.rows, case.in_features).to(case.input_dtype)
    x[0, 0], x[-1, -1] = -0.0, math.nan
    threshold = draw(case.in_features) if case.thresholds and not case.input_bits else None
    if threshold is not None:
        threshold[0] = 0.0
    weight = draw(case.out_features, case.in_features) >= 0
    scale, bias = draw(case.out_features), draw(case.out_features) if case.bias else None
    output_threshold = draw(case.out_features) if case.thresholds and case.output_bits else None

    if case.activation_bits == 8:
        values = x.float()
        largest = values.abs().amax(-1, keepdim=True)
        codes = (values * (torch.full_like(largest, 127.0) / largest)).round()
        # The last row holds NaN.
        sums = codes.nan_to_num().double() @ (2.0 * weight.double() - 1).T
        # An integer has no -0.0.
        y = sums.long().float() * (largest / 127.0) * scale
    else:
        signs = x.float() >= (0.0 if threshold is None else threshold)
        sums = (2.0 * signs.double() - 1) @ (2.0 * weight.double() - 1).T
        y = sums.float() * scale
    if bias is not None:
        y = y + bias
    y = y.to(case.output_dtype)

    source = before_forbidden_page(pack(signs) if case.input_bits else x)
    packed_weight = before_forbidden_page(pack(weight))
    threshold, output_threshold = before_forbidden_page(threshold), before_forbidden_page(output_threshold)
    scale, bias = before_forbidden_page(scale), before_forbidden_page(bias)
    width = packed_bytes(case.out_features) if case.output_bits else case.out_features * y.element_size()
    guard = 256
    memory = torch.full((guard + case.rows * width + guard,), 0x5A, dtype=torch.uint8)
    output = memory[guard:-guard]
    record = struct.pack(
        "16q",
        AMX,
        case.threads,
        pointer(source),
        BITS if case.input_bits else DTYPES[case.input_dtype],
        pointer(threshold),
        pointer(packed_weight),
        pointer(scale),
        pointer(bias),
        case.rows,
        case.in_features,
        case.out_features,
        pointer(None if case.output_bits else output),
        DTYPES[case.output_dtype],
        pointer(output if case.output_bits else None),
        pointer(output_threshold),
        case.activation_bits,
    )
    status = library.hf_stompp_binary_linear(record)
    assert status == 0
    if case.output_bits:
        expected = pack(y.float() >= (0.0 if output_threshold is None else output_threshold))
    else:
        # Whose bits say nothing.
        found = output.view(y.dtype).view(y.shape)
        found[found.isnan()] = y[y.isnan()] = 0.0
        expected = y.view(torch.uint8)
    assert torch.equal(output.view(case.rows, width), expected), f"wrong output: {case}"
    assert (memory[:guard] == 0x5A).all() and (memory[-guard:] == 0x5A).all(), f"wrote beside the output: {case}"


def cpu_flags() -> set[str]:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((set(line.split()) for line in lines if line.startswith("flags")), set())


def run_compiler(*command: str | Path) -> None:
    result = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.fixture(scope="module")
def amx_flags() -> list[str]:
    return [*COMMON_FLAGS, *KERNEL_FILES["x86_64"]["amx.c"]]


@pytest.fixture(scope="module")
def compiler(amx_flags: list[str]) -> list[str]:
    """One for this processor that knows the instructions."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        pytest.skip("AMX is of x86-64")
    try:
        command = find_compiler()
    except BuildError as error:
        pytest.skip(str(error))
    probe = [*command, *amx_flags, "-x", "c", "-fsyntax-only", os.devnull]
    if subprocess.run(probe, capture_output=True).returncode:
        pytest.skip(f"{command[0]} does not know AMX")
    return command


@pytest.fixture(scope="module")
def assemble(
    compiler: list[str], amx_flags: list[str], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """`assemble(*flags)`: the kernel's assembly, compiled once; a warning is an error."""

    @functools.cache
    def make(*flags: str) -> Path:
        path = tmp_path_factory.mktemp("assembly") / "amx.s"
        run_compiler(*compiler, *amx_flags, *flags, "-Werror", "-fopenmp", "-S", SOURCES / "amx.c", "-o", path)
        return path

    return make


@pytest.fixture(scope="module")
def make_library(
    compiler: list[str], assemble: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """
    `make_library(*flags)`: of this kernel, and of others by the names of their files; skips where its vector
    instructions are missing.
    """
    missing = VECTOR_FLAGS - cpu_flags()
    if missing:
        pytest.skip(f"the processor has no {', '.join(sorted(missing))}")

    def make(*flags: str, others: Sequence[str] = ()) -> Path:
        folder = tmp_path_factory.mktemp("library")
        files = {name: [*COMMON_FLAGS, *KERNEL_FILES["x86_64"][name]] for name in others}
        defines = [f"-DHF_STOMPP_WITH_{Path(name).stem.upper()}" for name in ("amx.c", *files)]
        files["dispatch.c"] = [*COMMON_FLAGS, '-DHF_STOMPP_SOURCE_HASH="none"', *defines]
        common, objects = [*flags, "-fopenmp", "-c"], [folder / f"{name}.o" for name in ("amx.c", *files)]
        run_compiler(*compiler, *common, assemble(*flags), "-o", objects[0])
        for (name, own), output in zip(files.items(), objects[1:], strict=True):
            run_compiler(*compiler, *own, *common, SOURCES / name, "-o", output)
        run_compiler(*compiler, *flags, "-fopenmp", "-shared", *objects, "-o", folder / "library.so")
        return folder / "library.so"

    return make


@pytest.fixture(scope="module")
def emulated(make_library: Callable[..., Path]) -> ctypes.CDLL:
    library = load(make_library(EMULATED))
    assert library.hf_stompp_unavailable(AMX) is None
    return library


@pytest.fixture(scope="module")
def real(make_library: Callable[..., Path]) -> ctypes.CDLL:
    return load(make_library())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_emulated_kernel_is_bit_exact(emulated: ctypes.CDLL, case: Case) -> None:
    check(emulated, case)


def test_what_is_no_product_runs_on_another_kernel(make_library: Callable[..., Path]) -> None:
    kernels = on_kernels("cpu", NativeKernels(load(make_library(EMULATED, others=["scalar.c"])), "amx"))
    reference = on_kernels("cpu", None)
    x, vector = torch.randn(5, 70), torch.randn(70, dtype=torch.float64)
    weight, mask, scale = pack(torch.randn(9, 70) >= 0), torch.rand(5, 70) < 0.5, torch.rand(5, 1)

    assert torch.equal(kernels.pack_sign(x, None)[0], reference.pack_sign(x, None)[0])
    torch.testing.assert_close(
        kernels.sign_product(weight, 70, vector, False), reference.sign_product(weight, 70, vector, False)
    )
    arguments = x, mask, scale, 1.3, torch.float32
    assert torch.equal(kernels.masked_weight(*arguments), reference.masked_weight(*arguments))


def test_kernel_is_bit_exact_on_the_processor(real: ctypes.CDLL) -> None:
    reason = real.hf_stompp_unavailable(AMX)
    if reason:
        pytest.skip(reason.decode())
    for case in CASES:
        check(real, case)


def test_kernel_without_amx_says_what_is_missing(real: ctypes.CDLL) -> None:
    if "amx_int8" in cpu_flags():
        pytest.skip("the processor has AMX")
    first, again = real.hf_stompp_unavailable(AMX), real.hf_stompp_unavailable(AMX)
    assert first == again == b"the processor has no AMX (TILE, INT8)"


def test_emulated_kernel_is_clean_under_sanitizers(compiler: list[str], make_library: Callable[..., Path]) -> None:
    found = subprocess.run([*compiler, "-print-file-name=libasan.so"], capture_output=True, text=True)
    runtime = Path(found.stdout.strip())
    if not runtime.is_absolute():
        pytest.skip(f"{compiler[0]} has no libasan.so")
    library = make_library(EMULATED, "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-O1")
    environment = {
        **os.environ,
        "LD_PRELOAD": str(runtime),
        "ASAN_OPTIONS": "detect_leaks=0",
    }
    command = [sys.executable, __file__, str(library)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.split() == ["checked", str(len(SMALL_CASES))]


@pytest.mark.parametrize("flags", [[], [EMULATED]], ids=["real", "emulated"])
def test_kernel_compiles_without_warnings(assemble: Callable[..., Path], flags: list[str]) -> None:
    assert ("tdpbssd" in assemble(*flags).read_text()) == (not flags)


MISUSE = {
    "request_tiles(); _tile_zero(0);": "no tiles are configured",
    "request_tiles(); _tile_loadconfig(&whole); _tile_release(); _tile_zero(0);": "no tiles are configured",
    "request_tiles(); _tile_loadconfig(&one); _tile_zero(1);": "the tile is not configured",
    "request_tiles(); _tile_loadconfig(&short_right); _tile_dpbssd(0, 1, 2);": "the shapes of a product do not match",
    "request_tiles(); _tile_loadconfig(&whole); _tile_dpbssd(0, 1, 1);": "a product needs three different tiles",
    "_tile_loadconfig(&whole);": "this thread has not asked for the tiles",
}


@pytest.mark.parametrize(("statements", "reason"), MISUSE.items())
def test_emulation_ends_the_program_where_the_processor_would_fault(
    compiler: list[str], statements: str, reason: str, tmp_path: Path
) -> None:
    program = f"""
        #include "{HEADER}"
        struct shapes {{ uint8_t palette, reserved[15]; uint16_t row_bytes[16]; uint8_t rows[16]; }};
        int main(void) {{
            struct shapes one = {{1, {{0}}, {{64}}, {{16}}}};
            struct shapes whole = {{1, {{0}}, {{64, 64, 64}}, {{16, 16, 16}}}};
            struct shapes short_right = {{1, {{0}}, {{64, 64, 64}}, {{16, 16, 8}}}};
            (void)one, (void)whole, (void)short_right;
            {statements}
            return 0;
        }}
    """
    path = tmp_path / "program"
    subprocess.run([*compiler, "-x", "c", "-", "-o", str(path)], input=program, text=True, check=True)
    result = subprocess.run([str(path)], capture_output=True, text=True)
    assert result.returncode < 0
    assert reason in result.stderr


if __name__ == "__main__":
    sanitized = load(sys.argv[1])
    for small in SMALL_CASES:
        check(sanitized, small)
    print("checked", len(SMALL_CASES))
