from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file


SCRIPT = Path(__file__).with_name("train.py")
ROOT = SCRIPT.parents[2]
TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
# --cpu would want MPI; without it the processes are started as for two GPUs, and use_cpu makes them talk by gloo.
ACCELERATE = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
ACCELERATE += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
LAUNCHERS = {"torchrun": TORCHRUN, "accelerate": ACCELERATE}

pytestmark = pytest.mark.slow


def run(launcher: list[str], *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *(["-m", *launcher] if launcher else []), str(SCRIPT), *arguments]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
    }
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert not check or result.returncode == 0, result.stderr[-4000:]
    return result


def logs_of(folder: Path) -> list[dict[str, float]]:
    return [entry for entry in json.loads((folder / "logs.json").read_text())["history"] if "loss" in entry]


@pytest.mark.parametrize(("launcher", "schedule"), [("torchrun", "cubic"), ("accelerate", "immediate")])
def test_two_processes_equal_one_on_the_same_global_batch(tmp_path: Path, launcher: str, schedule: str) -> None:
    one_process, tmp_path = tmp_path / "one", tmp_path / "two"
    run([], str(one_process), "--batch", "8", "--schedule", schedule)
    run(LAUNCHERS[launcher], str(tmp_path), "--batch", "4", "--schedule", schedule)

    one, two = (load_file(folder / "final.safetensors") for folder in (one_process, tmp_path))
    assert one.keys() == two.keys()
    for name in one:
        if one[name].dtype == torch.bool:
            assert torch.equal(one[name], two[name]), name
        else:
            torch.testing.assert_close(two[name], one[name], rtol=1e-4, atol=1e-6)
    # Loss and gradient norm tell a wrong loss scale, which the weights alone would hide behind a learning rate.
    for first, second in zip(logs_of(one_process), logs_of(tmp_path), strict=True):
        assert second["loss"] == pytest.approx(first["loss"], rel=1e-4)
        assert second["grad_norm"] == pytest.approx(first["grad_norm"], rel=1e-3)


def test_ranks_with_different_masks_are_told_at_the_next_boundary(tmp_path: Path) -> None:
    result = run(TORCHRUN, str(tmp_path), "--batch", "4", "--break_mask", check=False)
    assert result.returncode != 0
    assert "the ranks hold different freeze masks, bert.encoder.layer.0." in result.stderr


@pytest.mark.parametrize("surrogate", ["none", "ste"])
def test_a_killed_run_resumes_to_the_same_bits(tmp_path: Path, surrogate: str) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    # The argument makes both runs use dropout, whose random state must be restored too.
    run([], str(whole), "--surrogate", surrogate, "--kill_after", "99")
    result = run([], str(killed), "--surrogate", surrogate, "--kill_after", "7", check=False)
    assert result.returncode == -signal.SIGKILL
    assert not (killed / "final.safetensors").exists()
    run([], str(killed), "--surrogate", surrogate, "--resume", str(killed / "checkpoint-4"))

    expected, found = (load_file(folder / "final.safetensors") for folder in (whole, killed))
    assert expected.keys() == found.keys()
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []
