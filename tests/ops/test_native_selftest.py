"""Compiles native_selftest.c with the CPU kernels and runs it: on this machine, and for Arm under an emulator."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from hf_stompp.ops import build, cpu


SELFTEST = Path(__file__).with_name("native_selftest.c")
# Optimized fully, the unrolled kernels take a sanitizing compiler a minute.
SANITIZERS = ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
THREAD_SANITIZER = ["-O1", "-g", "-fsanitize=thread"]
OPENMP = SELFTEST.with_name("openmp_on_pthreads.c")
ARM_COMPILER = "aarch64-linux-gnu-gcc"
ARM_EMULATORS = ("qemu-aarch64", "qemu-aarch64-static")


def run(command: list[str | Path]) -> str:
    result = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=600)
    assert result.returncode == 0, f"{command}\n{result.stdout}{result.stderr}"
    return result.stdout


def compiles(compiler: list[str], flags: list[str], folder: Path) -> bool:
    source = folder / "empty.c"
    source.write_text("int main(void) { return 0; }\n")
    command = [*compiler, *flags, str(source), "-o", str(folder / "empty")]
    return subprocess.run(command, capture_output=True).returncode == 0


def kernels_run(output: str) -> list[str]:
    return re.findall(r"^(\w+): \d+ products", output, re.MULTILINE)


@pytest.fixture
def compiler() -> list[str]:
    try:
        return build.find_compiler()
    except build.BuildError as error:
        pytest.skip(str(error))


def library_with(flags: list[str], folder: Path) -> Path:
    """The installed library where it is of these sources and nothing else is asked for, or one that is built."""
    if not flags:
        try:
            cpu.open_library(cpu.INSTALLED)
            return cpu.INSTALLED
        except OSError:
            pass
    return build.build(folder / build.LIBRARY_NAME, extra_flags=flags)


@pytest.mark.slow
@pytest.mark.parametrize("flags", [[], SANITIZERS], ids=["as_shipped", "sanitized"])
def test_every_kernel_equals_plain_loops(flags: list[str], compiler: list[str], tmp_path: Path) -> None:
    if not compiles(compiler, flags, tmp_path):
        pytest.skip("the compiler has no sanitizers")
    library, program = library_with(flags, tmp_path), tmp_path / "selftest"
    sources = [SELFTEST, library, f"-I{build.SOURCES}", f"-Wl,-rpath,{library.parent}", "-lm", "-pthread"]
    run([*compiler, *build.COMMON_FLAGS, *flags, *sources, "-o", program])

    output = run([program])

    assert "scalar" in kernels_run(output)
    # A kernel that does not compile is left out of the library without a word.
    architecture = build.ARCHITECTURES.get(platform.machine().lower(), "other")
    for name, kernel_flags in build.KERNEL_FILES[architecture].items():
        if (build.SOURCES / name).exists() and compiles(compiler, [*flags, *kernel_flags], tmp_path):
            assert f"{Path(name).stem}: not run: not built" not in output


@pytest.mark.slow
def test_no_kernel_has_a_race_between_its_threads_or_its_callers(compiler: list[str], tmp_path: Path) -> None:
    if not compiles(compiler, THREAD_SANITIZER, tmp_path) or subprocess.run([tmp_path / "empty"]).returncode != 0:
        pytest.skip("the compiler has no thread sanitizer, or it does not run here")
    library = build.build(tmp_path / build.LIBRARY_NAME, extra_flags=THREAD_SANITIZER)
    if b"GOMP_parallel" not in library.read_bytes():
        pytest.skip("the compiler has an OpenMP of its own")
    program, loops = tmp_path / "selftest", tmp_path / "selftest.o"
    # Its plain loops run on one thread, and would take minutes.
    run([*compiler, *build.COMMON_FLAGS, f"-I{build.SOURCES}", "-c", SELFTEST, "-o", loops])
    # Exported, so that the library calls the program's OpenMP.
    flags = [*THREAD_SANITIZER, "-rdynamic", f"-Wl,-rpath,{tmp_path}", "-lm", "-pthread"]
    run([*compiler, OPENMP, loops, library, *flags, "-o", program])

    assert "scalar" in kernels_run(run([program]))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processor", "instructions"),
    [("cortex-a72", []), ("max", ["-march=armv8.2-a+dotprod"])],
    ids=["without_sdot", "with_sdot"],
)
def test_neon_equals_plain_loops(processor: str, instructions: list[str], tmp_path: Path) -> None:
    emulator = next(filter(None, map(shutil.which, ARM_EMULATORS)), None)
    if emulator is None or shutil.which(ARM_COMPILER) is None:
        pytest.skip("no aarch64 cross-compiler or qemu")
    kernels = build.KERNEL_FILES["aarch64"]
    defines = [f"-DHF_STOMPP_WITH_{Path(name).stem.upper()}" for name in kernels]
    # Compiled for SDOT the kernel does not ask whether the processor has it.
    flags = [*build.COMMON_FLAGS, *instructions, "-fopenmp", *defines, '-DHF_STOMPP_SOURCE_HASH=""']
    objects = []
    for source, kernel_flags in [
        (SELFTEST, []),
        (build.SOURCES / "dispatch.c", []),
        *((build.SOURCES / name, kernel_flags) for name, kernel_flags in kernels.items()),
    ]:
        objects.append(tmp_path / f"{source.stem}.o")
        run([ARM_COMPILER, *flags, f"-I{build.SOURCES}", *kernel_flags, "-c", source, "-o", objects[-1]])
    program = tmp_path / "selftest"
    run([ARM_COMPILER, "-static", "-fopenmp", *objects, "-lm", "-o", program])

    # On an Arm machine the other test runs this kernel without an emulator.
    assert kernels_run(run([emulator, "-cpu", processor, program])) == ["neon", "scalar"]
