"""The CUDA library as nvcc compiles it, on any machine that has nvcc: no GPU is needed to look at machine code."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from programs import write_program

from hf_stompp.ops import build, cuda, native


REPOSITORY = Path(__file__).resolve().parent.parent.parent

INSTRUCTIONS = build.CUDA_SOURCES / "instructions.cuh"

# Warnings of the front end and of the assembler (such as wgmma that are serialized) as errors, and spills as warnings.
STRICT = ["-Werror", "all-warnings", "-Xptxas", "-warn-spills,-warn-lmem-usage,--warning-as-error"]


def has_nvcc() -> bool:
    try:
        return bool(build.find_nvcc())
    except build.BuildError:
        return False


needs_nvcc = pytest.mark.skipif(not has_nvcc(), reason="there is no nvcc")


def find_disassembler() -> Path | None:
    """That of the CUDA toolkit, or those of PyPI where `make .venv/installed` puts them."""
    bundled = Path(sys.prefix, "cuda", "nvidia", "cu13", "bin", "cuobjdump")
    found = shutil.which("cuobjdump")
    return bundled if bundled.exists() else Path(found) if found else None


@pytest.fixture(scope="module")
def release_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("release") / build.CUDA_LIBRARY_NAME
    return build.build_cuda(target, build.RELEASE_ARCHITECTURES, STRICT)


def disassemble(library: Path, *options: str) -> str:
    program = find_disassembler()
    if program is None:
        pytest.skip("there is no cuobjdump; pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm")
    # cuobjdump calls nvdisasm.
    environment = {"PATH": f"{program.parent}:/usr/local/bin:/usr/bin:/bin"}
    command = [str(program), *options, str(library)]
    return subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout


@pytest.fixture(scope="module")
def instructions(release_library: Path) -> dict[str, dict[str, str]]:
    """Machine code by architecture and kernel."""
    found: dict[str, dict[str, str]] = {}
    for part in re.split(r"^Fatbin elf code:", disassemble(release_library, "-sass"), flags=re.MULTILINE)[1:]:
        architecture = re.search(r"^arch = (\w+)", part, flags=re.MULTILINE)
        assert architecture is not None
        kernels = re.split(r"^\s*Function : ", part, flags=re.MULTILINE)[1:]
        of_this = found.setdefault(architecture.group(1), {})
        of_this.update({kernel.splitlines()[0].strip(): kernel for kernel in kernels})
    return found


@needs_nvcc
@pytest.mark.slow
class TestRelease:
    def test_compiles_for_every_architecture_without_warnings_or_spills(self, release_library: Path) -> None:
        assert release_library.stat().st_size > 0

    def test_holds_machine_code_for_each_architecture_and_ptx_for_later_ones(self, release_library: Path) -> None:
        machine_code, ptx = disassemble(release_library, "--list-elf"), disassemble(release_library, "--list-ptx")
        assert set(re.findall(r"sm_\w+(?=\.cubin)", machine_code)) == {"sm_80", "sm_86", "sm_89", "sm_90a"}
        assert set(re.findall(r"sm_\w+(?=\.ptx)", ptx)) == {"sm_80"}

    @pytest.mark.parametrize("architecture", ["sm_80", "sm_86", "sm_89", "sm_90a"])
    def test_mma_multiplies_bits_in_the_tensor_cores(
        self, instructions: dict[str, dict[str, str]], architecture: str
    ) -> None:
        kernels = {name: code for name, code in instructions[architecture].items() if "multiply_mma" in name}
        assert len(kernels) == 8
        for code in kernels.values():
            products = re.findall(r"BMMA\.168256\.AND\.POPC|BMMA\.16\w*\.AND\.POPC", code)
            # Of 32 or 64 rows and 32 columns of a warp, 16 x 8 each.
            assert len(products) in (8, 16)

    def test_wgmma_multiplies_bits_in_the_tensor_cores(self, instructions: dict[str, dict[str, str]]) -> None:
        kernels = {name: code for name, code in instructions["sm_90a"].items() if "multiply_wgmma" in name}
        assert len(kernels) == 16
        for name, code in kernels.items():
            columns, _ = re.search(r"Li(64|128)ELi(\d)E", name).groups()  # type: ignore[union-attr]
            products = re.findall(rf"BGMMA\.64x{columns}x256\.AND\.POPC", code)
            # One for each 256 of 1024 bits: the compiler has neither serialized nor repeated them.
            assert len(products) == 4

    def test_wgmma_is_empty_where_there_is_none(self, instructions: dict[str, dict[str, str]]) -> None:
        kernels = [code for name, code in instructions["sm_80"].items() if "multiply_wgmma" in name]
        assert kernels and not any("BGMMA" in code or "BMMA" in code for code in kernels)

    def test_kernels_declare_no_more_shared_memory_than_launches_allow_for(self, release_library: Path) -> None:
        # From 9.0 on a KiB of it is the system's.
        usage = re.findall(r"Function (\w+):\s*\n.*?SHARED:(\d+)", disassemble(release_library, "-res-usage"))
        launched = {name: int(size) for name, size in usage if "multiply_mma" in name or "multiply_wgmma" in name}
        limit = re.search(r"MOST_STATIC_SHARED_BYTES = (\d+) \* 1024;", INSTRUCTIONS.read_text(encoding="utf-8"))
        assert limit is not None and launched and max(launched.values()) <= int(limit.group(1)) * 1024

    def test_nothing_goes_through_local_memory(self, instructions: dict[str, dict[str, str]]) -> None:
        for kernels in instructions.values():
            for name, code in kernels.items():
                assert not re.search(r"\b(LDL|STL)\b", code), name

    def test_loads_without_a_gpu_and_says_what_hinders_it(self, release_library: Path) -> None:
        library = cuda.open_library(release_library)
        if torch.cuda.is_available():
            pytest.skip("there is a GPU")
        with pytest.raises(cuda.CudaError, match="CUDA"):
            cuda.NativeKernels(library, 0)

    def test_of_other_sources_is_refused(self, release_library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(build, "CUDA_FLAGS", [*build.CUDA_FLAGS, "-DOTHER"])
        with pytest.raises(OSError, match="other sources"):
            cuda.open_library(release_library)


@needs_nvcc
@pytest.mark.slow
def test_spilled_registers_would_be_an_error(tmp_path: Path) -> None:
    sums = ", ".join(f"s[{i}] += a[{i}] * x" for i in range(128))
    (tmp_path / "spills.cu").write_text(
        "__global__ void __launch_bounds__(1024) spills(float *a, int n) {"
        f" float s[128] = {{}}; for (int k = 0; k < n; k++) {{ float x = a[k * 3]; {sums}; }}"
        " for (int i = 0; i < 128; i++) a[threadIdx.x * 128 + i] = s[i]; }"
    )
    command = [build.find_nvcc(), *build.architecture_flags(["80"]), *STRICT, "-cubin", "spills.cu"]
    compiled = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert compiled.returncode != 0 and re.search("spill", compiled.stderr, flags=re.IGNORECASE)


def test_device_too_old_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(build.BuildError, match=r"7\.5 is below 8\.0"):
        cuda.find_or_build((7, 5))


def test_missing_compiler_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(variable, raising=False)
    with pytest.raises(build.BuildError, match="no nvcc"):
        build.build_cuda(tmp_path / "library.so", ["80"])


def test_compiler_of_cuda_home_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_HOME", install_compiler(tmp_path, "")["CUDA_HOME"])
    assert build.find_nvcc() == str(tmp_path / "bin" / "nvcc")


def test_complaint_of_the_compiler_is_passed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = install_compiler(tmp_path / "cuda", "echo 'unsupported GNU version' >&2; exit 1")["CUDA_HOME"]
    monkeypatch.setenv("CUDA_HOME", home)
    with pytest.raises(build.BuildError, match="for 90a: unsupported GNU version"):
        build.build_cuda(tmp_path / "library.so", ["90a"])


# The last argument is the file to write.
WRITES_ITS_OUTPUT = 'while [ "$1" != "-o" ]; do shift; done; touch "$2"'


def install_compiler(folder: Path, script: str) -> dict[str, str]:
    """Puts a program in nvcc's place that notes what it is told; the environment to find it with."""
    (folder / "bin").mkdir(parents=True)
    write_program(folder / "bin" / "nvcc", f'echo "$@" >> {folder}/told\n{script}')
    return {**os.environ, "CUDA_HOME": str(folder)}


@needs_nvcc
@pytest.mark.slow
def test_is_built_on_first_use_into_the_cache_and_found_there(
    release_library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cache = tmp_path / "cache"
    # Half a minute of nvcc would make the library that is there.
    script = f'case "$*" in --version) echo 13.0; exit;; *-shared*) made={release_library};; *) made=/dev/null;; esac'
    script += '\nwhile [ "$1" != "-o" ]; do shift; done; cp "$made" "$2"'
    monkeypatch.setenv("CUDA_HOME", install_compiler(tmp_path / "cuda", script)["CUDA_HOME"])
    monkeypatch.setenv("HF_STOMPP_CACHE", str(cache))
    monkeypatch.setattr(cuda, "INSTALLED", tmp_path / "nothing")
    first = Path(cuda.find_or_build((8, 0))._name)
    assert first.parent.parent == cache
    written = first.stat().st_mtime_ns
    assert Path(cuda.find_or_build((8, 0))._name) == first and first.stat().st_mtime_ns == written
    assert [path.name for path in cache.iterdir()] == [first.parent.name]
    told = (tmp_path / "cuda" / "told").read_text().splitlines()
    assert sum("-shared" in line for line in told) == 1
    assert sum("arch=compute_80,code=sm_80" in line for line in told) == len(build.CUDA_FILES) + 1
    assert [record.getMessage() for record in caplog.records if record.name == "hf_stompp.ops.cuda"] == [
        "compiling the CUDA kernels for compute capability 8.0 with nvcc, this once"
    ]


def build_extensions(
    environment: dict[str, str], target: Path, wanted: str | None
) -> subprocess.CompletedProcess[str]:
    """Builds what an installation does, with the CUDA library as wanted, and with a stand-in for the C compiler."""
    command = [
        sys.executable,
        "setup.py",
        "build_ext",
        "--build-lib",
        str(target),
        "--build-temp",
        str(target / "work"),
    ]
    target.mkdir(exist_ok=True)
    environment = {**environment, "CC": str(write_program(target / "cc", WRITES_ITS_OUTPUT))}
    environment.pop("HF_STOMPP_BUILD_CUDA", None)
    if wanted is not None:
        environment["HF_STOMPP_BUILD_CUDA"] = wanted
    return subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)


def test_installation_compiles_the_release_if_it_is_told_to(tmp_path: Path) -> None:
    environment = install_compiler(tmp_path / "cuda", WRITES_ITS_OUTPUT)
    built = build_extensions(environment, tmp_path / "built", "1")
    assert built.returncode == 0, built.stderr
    names = {path.name for path in (tmp_path / "built" / "hf_stompp" / "ops").iterdir()}
    assert names == {build.LIBRARY_NAME, build.CUDA_LIBRARY_NAME}
    *compiled, linked = (tmp_path / "cuda" / "told").read_text().splitlines()
    assert len(compiled) == len(build.CUDA_FILES) and "-shared" in linked
    assert all(" ".join(build.architecture_flags(build.RELEASE_ARCHITECTURES)) in line for line in compiled)


def test_installation_without_the_library_it_was_told_to_compile_fails(tmp_path: Path) -> None:
    environment = install_compiler(tmp_path / "cuda", "echo 'unsupported GNU version' >&2; exit 1")
    built = build_extensions(environment, tmp_path / "built", "1")
    assert built.returncode != 0 and "unsupported GNU version" in built.stderr


@pytest.mark.parametrize("wanted", [None, "0"])
def test_installation_compiles_for_no_gpu_unless_it_is_told_to(tmp_path: Path, wanted: str | None) -> None:
    environment = install_compiler(tmp_path / "cuda", "exit 1")
    built = build_extensions(environment, tmp_path / "built", wanted)
    assert built.returncode == 0, built.stderr
    assert not (tmp_path / "cuda" / "told").exists()
    names = {path.name for path in (tmp_path / "built" / "hf_stompp" / "ops").iterdir()}
    assert names == {build.LIBRARY_NAME}
    refused = build_extensions(environment, tmp_path / "built", "yes")
    assert refused.returncode != 0 and "HF_STOMPP_BUILD_CUDA must be 0 or 1, got 'yes'" in refused.stderr


@pytest.mark.parametrize(
    ("capability", "architecture"),
    [((8, 0), "80"), ((8, 9), "89"), ((9, 0), "90a"), ((10, 0), "100"), ((12, 1), "121")],
)
def test_architecture_is_that_of_the_device(capability: tuple[int, int], architecture: str) -> None:
    assert cuda.architecture(capability) == architecture


def test_machine_code_and_ptx_are_asked_for() -> None:
    flags = build.architecture_flags(["90a", "80+PTX"])
    assert flags == ["-gencode", "arch=compute_90a,code=sm_90a", "-gencode", "arch=compute_80,code=compute_80"]


def test_cache_of_both_libraries_is_one_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_STOMPP_CACHE", str(tmp_path))
    assert native.cache_folder() == tmp_path
