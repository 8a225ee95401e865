"""
Compiles the native libraries with the compilers at hand: the CPU kernels in C, the CUDA kernels with nvcc. Standard
library only: setup.py runs it on its own.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path


SOURCES = Path(__file__).resolve().parent.parent / "csrc" / "cpu"

CUDA_SOURCES = SOURCES.parent / "cuda"

LIBRARY_NAME = "libhf_stompp_cpu.so"

CUDA_LIBRARY_NAME = "libhf_stompp_cuda.so"

# Products and sums are rounded one after the other, as in the reference: a fused multiply-add would round once.
COMMON_FLAGS = ["-O3", "-std=gnu11", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-Wall", "-Wextra"]

# The kernels of each architecture: file -> flags. Each runs only where the processor has the instructions.
KERNEL_FILES: dict[str, dict[str, list[str]]] = {
    "x86_64": {
        "scalar.c": ["-mpopcnt"],
        "avx2.c": ["-mavx2", "-mf16c", "-mpopcnt"],
        "avx512.c": [
            *("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vbmi", "-mpopcnt"),
            *("-mavx512vpopcntdq", "-mavx512vnni"),
        ],
        "amx.c": [
            *("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vbmi", "-mpopcnt"),
            *("-mamx-tile", "-mamx-int8"),
        ],
    },
    "aarch64": {"scalar.c": [], "neon.c": []},
    "other": {"scalar.c": []},
}

ARCHITECTURES = {"amd64": "x86_64", "x86_64": "x86_64", "arm64": "aarch64", "aarch64": "aarch64"}


CUDA_FLAGS = [
    *("-O3", "-std=c++17", "--fmad=false", "--cudart=static"),
    *("-Xcompiler", "-fPIC,-fvisibility=hidden,-Wall"),
]

CUDA_FILES = ["pack.cu", "mma.cu", "wgmma.cu", "layer_norm.cu", "dispatch.cu"]

RELEASE_ARCHITECTURES = ["80", "86", "89", "90a", "80+PTX"]
"""Compute capabilities of the library that a release carries; the PTX is compiled by the driver of newer devices."""


class BuildError(RuntimeError):
    """The library could not be compiled; the message says what is missing."""


def _hash_of(flags: object, sources: Iterable[Path]) -> str:
    digest = hashlib.sha256(repr(flags).encode())
    for path in sorted(sources):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def source_hash() -> str:
    """SHA-256 over names and contents of all sources and the flags: what a CPU library must have been built from."""
    return _hash_of((COMMON_FLAGS, KERNEL_FILES), SOURCES.glob("*.[ch]"))


def cuda_source_hash() -> str:
    """The same of the CUDA library, for whatever architectures."""
    return _hash_of((CUDA_FLAGS, CUDA_FILES), CUDA_SOURCES.glob("*.*"))


def find_compiler() -> list[str]:
    """
    The C compiler: `CC` of the environment, the one that Python was built with, or `cc`, `gcc`, `clang`. Raises a
    BuildError if there is none.
    """
    candidates = [os.environ.get("CC"), sysconfig.get_config_var("CC"), "cc", "gcc", "clang"]
    for candidate in candidates:
        try:
            command = shlex.split(candidate or "")
        except ValueError as error:
            raise BuildError(f"CC={candidate!r} is no command ({error})") from error
        if command and shutil.which(command[0]):
            return command
        if candidate and candidate == os.environ.get("CC"):
            raise BuildError(f"CC={candidate!r} is not a program on the PATH")
    raise BuildError("there is no C compiler on the PATH (cc, gcc or clang); install one, or set CC")


def _version_lines(compiler: list[str]) -> list[str]:
    result = subprocess.run([*compiler, "--version"], capture_output=True, text=True, errors="replace")
    return (result.stdout or result.stderr).strip().splitlines() or ["unknown"]


def compiler_version(compiler: list[str]) -> str:
    """What the compiler calls itself, one line."""
    return _version_lines(compiler)[0]


def _run(command: list[str]) -> str | None:
    """Runs a compiler; what it complained of, or None if it succeeded."""
    result = subprocess.run(command, capture_output=True, text=True, errors="replace")
    return None if result.returncode == 0 else (result.stderr or result.stdout).strip() or "failed without a message"


def build(target: Path, extra_flags: list[str] | None = None) -> Path:
    """
    Compiles the library into the file `target`, which appears whole or not at all, and returns it. Raises a BuildError
    without a compiler, or with what it complained of.

    A kernel whose instructions the compiler does not know is left out, OpenMP likewise. The extra flags are for every
    file and the link, such as `-fsanitize=address`.
    """
    compiler, extra = find_compiler(), extra_flags or []
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".build-", dir=target.parent) as folder:
        work = Path(folder)
        probe = work / "probe.c"
        probe.write_text("int probe(void) { return 0; }\n")
        threads = ["-fopenmp"]
        if _run([*compiler, *extra, *threads, "-fPIC", "-shared", str(probe), "-o", str(work / "probe.so")]):
            threads = []
        flags = [*COMMON_FLAGS, *threads, *extra]
        objects, defines = [], [f'-DHF_STOMPP_SOURCE_HASH="{source_hash()}"']
        files = KERNEL_FILES[ARCHITECTURES.get(platform.machine().lower(), "other")]
        commands = [
            [*compiler, *flags, *kernel_flags, "-c", str(SOURCES / name), "-o", str(work / f"{name}.o")]
            for name, kernel_flags in files.items()
        ]
        with ThreadPoolExecutor() as executor:
            complaints = list(executor.map(_run, commands))
        for name, complaint in zip(files, complaints, strict=True):
            if complaint is None:
                objects.append(work / f"{name}.o")
                defines.append(f"-DHF_STOMPP_WITH_{Path(name).stem.upper()}")
        output = work / "dispatch.o"
        message = _run([*compiler, *flags, *defines, "-c", str(SOURCES / "dispatch.c"), "-o", str(output)])
        if message is not None:
            raise BuildError(f"{' '.join(compiler)} cannot compile {SOURCES / 'dispatch.c'}: {message}")
        objects.append(output)
        library = work / target.name
        message = _run([*compiler, *flags, "-shared", *map(str, objects), "-o", str(library)])
        if message is not None:
            raise BuildError(f"{' '.join(compiler)} cannot link the CPU kernels: {message}")
        os.replace(library, target)
    return target


def find_nvcc() -> str:
    """The CUDA compiler: that of `CUDA_HOME` or `CUDA_PATH`, or `nvcc` on the PATH; else raises a BuildError."""
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        home = os.environ.get(variable)
        if home and shutil.which(str(Path(home, "bin", "nvcc"))):
            return str(Path(home, "bin", "nvcc"))
    found = shutil.which("nvcc")
    if found is None:
        raise BuildError("there is no nvcc on the PATH nor in CUDA_HOME; install the CUDA toolkit")
    return found


def nvcc_version(nvcc: str) -> str:
    """What nvcc calls itself, its last line."""
    return _version_lines([nvcc])[-1]


def architecture_flags(architectures: Iterable[str]) -> list[str]:
    """
    What nvcc is told to compile for. An architecture is such as `"90a"`, for its machine code, or `"80+PTX"`, for what
    the drivers of that and later ones compile.
    """
    flags = []
    for architecture in architectures:
        number, _, suffix = architecture.partition("+")
        flags += ["-gencode", f"arch=compute_{number},code={'compute' if suffix else 'sm'}_{number}"]
    return flags


def build_cuda(target: Path, architectures: list[str], extra_flags: list[str] | None = None) -> Path:
    """
    Compiles the CUDA library, for architectures as in [`architecture_flags`], into the file `target`, which appears
    whole or not at all, and returns it. Raises a BuildError without nvcc, or with what it complained of.
    """
    nvcc = find_nvcc()
    target.parent.mkdir(parents=True, exist_ok=True)
    flags = [*CUDA_FLAGS, *architecture_flags(architectures), *(extra_flags or [])]
    flags.append(f'-DHF_STOMPP_SOURCE_HASH="{cuda_source_hash()}"')
    with tempfile.TemporaryDirectory(prefix=".build-", dir=target.parent) as folder:
        objects = {name: Path(folder, f"{name}.o") for name in CUDA_FILES}
        commands = [[nvcc, *flags, "-c", str(CUDA_SOURCES / name), "-o", str(path)] for name, path in objects.items()]
        with ThreadPoolExecutor() as executor:
            complaints = list(executor.map(_run, commands))
        library = Path(folder, target.name)
        complaints.append(
            None
            if any(complaints)
            else _run([nvcc, "-shared", *flags, *map(str, objects.values()), "-o", str(library)])
        )
        for complaint in complaints:
            if complaint is not None:
                raise BuildError(f"{nvcc} cannot compile the CUDA kernels for {', '.join(architectures)}: {complaint}")
        os.replace(library, target)
    return target
