"""The CPU kernels by name, and the CUDA kernels' own sources, built to run on the processor, see emulated_cuda.h."""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from hf_stompp.ops import build, cpu
from hf_stompp.ops.operators import on_kernels


EMULATED = f'-DHF_STOMPP_EMULATED_CUDA="{Path(__file__).resolve().parent / "emulated_cuda.h"}"'
FLAGS = [
    *("-x", "c++", "-std=c++17", "-O1", "-fPIC", "-ffp-contract=off", "-Wall", "-Wextra", "-Wno-unknown-pragmas"),
    # One library's state is not another's.
    *("-fvisibility=hidden", "-fno-gnu-unique"),
    # What a kernel does not initialise is not zero by chance.
    "-ftrivial-auto-var-init=pattern",
    *(["-mpopcnt"] if platform.machine().lower() in ("x86_64", "amd64") else []),
]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What runs in an emulation takes minutes."""
    for item in items:
        if {"cxx", "make_library"} & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="module")
def native() -> cpu.NativeKernels:
    """The native library."""
    kernels = cpu.native_kernels()
    if kernels is None:
        pytest.skip(f"no native kernels: {cpu.why_reference()}")
    return kernels


@pytest.fixture(params=[*cpu.KERNELS, "best", "reference"])
def kernels(native: cpu.NativeKernels, request: pytest.FixtureRequest) -> SimpleNamespace:
    """The operators on each kernel that runs here, on the choice among them, and in plain PyTorch."""
    if request.param == "reference":
        return on_kernels("cpu", None)
    if request.param == "best":
        return on_kernels("cpu", cpu.NativeKernels(native.native))
    reason = native.unavailable(request.param)
    if reason is not None:
        pytest.skip(reason)
    return on_kernels("cpu", cpu.NativeKernels(native.native, kernel=request.param))


@pytest.fixture
def restore_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def cxx() -> list[str]:
    """A C++ compiler, and how it is called."""
    if platform.system() != "Linux":
        pytest.skip("the emulation knows the memory of Linux alone")
    candidates = [shlex.split(os.environ["CXX"])] if "CXX" in os.environ else [["g++"], ["c++"]]
    found = [command for command in candidates if command and shutil.which(command[0])]
    if not found:
        pytest.skip("there is no C++ compiler")
    command = [*found[0], *FLAGS]
    probe = subprocess.run([*command, "-fsyntax-only", os.devnull], capture_output=True, text=True)
    if probe.returncode:
        pytest.skip(f"{found[0][0]} does not take the flags: {probe.stderr}")
    return command


@pytest.fixture(scope="session")
def make_emulated_cuda(cxx: list[str], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`make_emulated_cuda(*flags)`: the library of all kernels."""

    def make(*flags: str) -> Path:
        path = tmp_path_factory.mktemp("library") / "library.so"
        defines = [f'-DHF_STOMPP_SOURCE_HASH="{build.cuda_source_hash()}"', EMULATED]
        sources = [str(build.CUDA_SOURCES / name) for name in build.CUDA_FILES]
        command = [*cxx, *flags, *defines, "-shared", *sources, "-o", str(path)]
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        return path

    return make


@pytest.fixture(scope="session")
def emulated_cuda(make_emulated_cuda: Callable[..., Path]) -> Path:
    return make_emulated_cuda("-Werror")
