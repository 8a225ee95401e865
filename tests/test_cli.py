from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hf_stompp import __version__, cli
from hf_stompp.ops import cpu


native_only = pytest.mark.skipif(cpu.native_kernels() is None, reason="there are no native kernels")


def test_info_names_the_versions_and_the_kernel_that_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info"]) == 0

    output = capsys.readouterr().out
    native = cpu.native_kernels()
    assert f"hf_stompp {__version__}" in output
    assert f"CPU kernel: {'reference' if native is None else native.chosen(1)}" in output


@native_only
def test_info_says_of_every_kernel_that_it_runs_or_why_it_does_not(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["info", "--json"])

    info = json.loads(capsys.readouterr().out)["cpu"]
    native = cpu.native_kernels()
    for kernel in cpu.KERNELS:
        reason = native.unavailable(kernel) or "can run here, but another is preferred"
        runs = kernel in (native.chosen(1), native.chosen(1 << 20))
        assert info["why_not"].get(kernel) == (None if runs else reason)
    assert info["runs"] and info["why_reference"] is None and Path(info["library"]).is_file()


def test_info_tells_of_cuda_devices_and_the_compiler(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["info", "--json"])
    info = json.loads(capsys.readouterr().out)["cuda"]
    cli.main(["info"])
    printed = capsys.readouterr().out

    assert len(info["devices"]) == torch.cuda.device_count()
    assert info["nvcc"] in printed
    assert ("CUDA: no device" in printed) == (not info["devices"])
    for device in info["devices"]:
        assert device["product"] in ("bits", "int8", "float8", "float32")
        assert f"{device['name']} ({device['capability']}), products of {device['product']}" in printed


@native_only
def test_bench_prints_tables_and_writes_what_it_printed_from(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    output = tmp_path / "results" / "cpu.json"

    assert cli.main(["bench", "--quick", "--level", "op", "--kernels", "scalar", "--output", str(output)]) == 0

    printed, result = capsys.readouterr().out, json.loads(output.read_text(encoding="utf-8"))
    assert result["command"] == "hf-stompp bench --quick --level op --kernels scalar --output cpu.json"
    assert result["seed"] == 0 and result["machine"]["processor"]["name"] and result["versions"]["torch"]
    case = result["linear"][0]
    packed = {"packed_fp32", "packed_bf16", "packed_bwn", "packed_scalar"}
    assert set(case["seconds"]) == {"fp32", "bf16", "int8", *packed}
    assert f"{case['seconds']['packed_fp32']['median'] * 1e6:.1f}" in printed
    assert str(tmp_path) not in output.read_text(encoding="utf-8")


@pytest.mark.slow
def test_quick_benchmark_has_layers_and_a_model_and_loads_nothing(tmp_path: Path) -> None:
    assert cli.main(["bench", "--quick", "--output", str(tmp_path / "cpu.json")]) == 0
    result = json.loads((tmp_path / "cpu.json").read_text(encoding="utf-8"))
    assert result["linear"] and "models" in result and "loading" not in result


@pytest.mark.slow
def test_forced_kernel_that_cannot_run_is_an_error_with_the_reason() -> None:
    missing = next((kernel for kernel in ("neon", "amx") if cpu.native_kernels().unavailable(kernel)), None)
    if missing is None:
        pytest.skip("every kernel runs here")
    result = subprocess.run(
        [sys.executable, "-c", "import sys; from hf_stompp.cli import main; sys.exit(main())", "info"],
        env={**os.environ, "HF_STOMPP_CPU": missing},
        capture_output=True,
        text=True,
    )

    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert f"hf-stompp: the {missing} kernel cannot run here: " in result.stderr
    assert cpu.native_kernels().unavailable(missing) in result.stderr


@pytest.mark.parametrize("words", [["bench", "--threads", "0"], ["bench", "--kernels", "sse"], []])
def test_bad_arguments_are_refused_with_the_usage(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        cli.main(words)

    assert exit.value.code == 2 and "usage: hf-stompp" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["file/result.json", "file/deep/result.json"])
def test_output_that_cannot_be_written_is_refused_before_anything_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    (tmp_path / "file").write_text("")

    # All levels, which take ten minutes.
    assert cli.main(["bench", "--output", str(tmp_path / name)]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("hf-stompp: ") and "Traceback" not in printed.err and printed.out == ""
