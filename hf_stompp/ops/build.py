"""Compiles the native CPU library with the C compiler at hand. Standard library only: setup.py runs it on its own."""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path


SOURCES = Path(__file__).resolve().parent.parent / "csrc" / "cpu"

LIBRARY_NAME = "libhf_stompp_cpu.so"

# Products and sums are rounded one after the other, as in the reference: a fused multiply-add would round once.
COMMON_FLAGS = ["-O3", "-std=gnu11", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-Wall", "-Wextra"]

# The kernels of each architecture: file -> flags. Each runs only where the processor has the instructions.
KERNEL_FILES: dict[str, dict[str, list[str]]] = {
    "x86_64": {
        "scalar.c": ["-mpopcnt"],
        "avx2.c": ["-mavx2", "-mf16c", "-mpopcnt"],
        "avx512.c": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vpopcntdq", "-mpopcnt"],
        "amx.c": [
            *("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vbmi", "-mpopcnt"),
            *("-mamx-tile", "-mamx-int8"),
        ],
    },
    "aarch64": {"scalar.c": [], "neon.c": []},
    "other": {"scalar.c": []},
}

ARCHITECTURES = {"amd64": "x86_64", "x86_64": "x86_64", "arm64": "aarch64", "aarch64": "aarch64"}


class BuildError(RuntimeError):
    """The library could not be compiled; the message says what is missing."""


def source_hash() -> str:
    """SHA-256 over names and contents of all sources and the flags: what a library must have been built from."""
    digest = hashlib.sha256(repr((COMMON_FLAGS, KERNEL_FILES)).encode())
    for path in sorted(SOURCES.glob("*.[ch]")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def find_compiler() -> list[str]:
    """
    The C compiler: `CC` of the environment, the one that Python was built with, or `cc`, `gcc`, `clang`.

    Raises:
        BuildError: there is none.
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


def compiler_version(compiler: list[str]) -> str:
    """What the compiler calls itself, one line."""
    output = subprocess.run([*compiler, "--version"], capture_output=True, text=True, errors="replace")
    return (output.stdout or output.stderr).splitlines()[0] if output.stdout or output.stderr else "unknown"


def _run(command: list[str]) -> str | None:
    """Runs a compiler; what it complained of, or None if it succeeded."""
    result = subprocess.run(command, capture_output=True, text=True, errors="replace")
    return None if result.returncode == 0 else (result.stderr or result.stdout).strip() or "failed without a message"


def build(target: Path, extra_flags: list[str] | None = None, architecture: str | None = None) -> Path:
    """
    Compiles the library.

    A kernel whose instructions the compiler does not know is left out, OpenMP likewise.

    Args:
        target (`Path`): the file to write. It appears whole or not at all.
        extra_flags (`list[str]`, *optional*): for every file and the link, such as `-fsanitize=address`.
        architecture (`str`, *optional*): a key of `KERNEL_FILES`, for a cross-compiler; that of this machine when not
            given.

    Returns:
        `Path`: `target`.

    Raises:
        BuildError: no compiler, or it fails; says what it complained of.
    """
    compiler, extra = find_compiler(), extra_flags or []
    architecture = architecture or ARCHITECTURES.get(platform.machine().lower(), "other")
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
        files = KERNEL_FILES[architecture]
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
