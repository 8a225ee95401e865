"""Training in several processes, as `accelerate launch` starts them with the files that we ship."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.other import get_free_port
from programs import load
from safetensors.torch import load_file
from torch.distributed.elastic.rendezvous import RendezvousParameters
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler


SCRIPT = Path(__file__).with_name("train.py")
ROOT = SCRIPT.parents[2]
CONFIGS = ROOT / "examples" / "accelerate"
TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"]

program = load(SCRIPT)
Run = program.Run

DROPOUT = {"batch": 4, "dropout": 0.1, "optim": "adamw_torch"}


def accelerate(config: str, *options: str) -> list[str]:
    return ["accelerate.commands.launch", "--config_file", str(CONFIGS / config), *options]


def start(launcher: list[str], *runs: Any) -> subprocess.Popen[str]:
    module = ["-m", *launcher] if launcher else []
    command = [sys.executable, *module, str(SCRIPT), *(json.dumps(asdict(run)) for run in runs)]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str]) -> subprocess.CompletedProcess[str]:
    try:
        out, err = process.communicate(timeout=300)
    finally:
        process.kill()
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def launch(launcher: list[str], *runs: Any) -> None:
    result = finish(start(launcher, *runs))
    assert result.returncode == 0, result.stderr[-4000:]


def final(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "final.safetensors")


def logs_of(folder: Path) -> list[dict[str, float]]:
    return [entry for entry in json.loads((folder / "logs.json").read_text())["history"] if "loss" in entry]


def masks_of(folder: Path, rank: int) -> list[str]:
    return json.loads((folder / f"masks-{rank}.json").read_text())


def assert_equals_one(folder: Path, processes: int, **settings: Any) -> None:
    """Trains in this process on the same batches, and compares."""
    one_process = folder.parent / "one"
    program.train(Run(str(one_process), **settings))
    one, several = final(one_process), final(folder)
    assert one.keys() == several.keys()
    for name in one:
        if one[name].dtype == torch.bool:
            assert torch.equal(one[name], several[name]), name
        else:
            torch.testing.assert_close(several[name], one[name], rtol=1e-4, atol=1e-6)
    # Loss and gradient norm tell a wrong loss scale, which the weights alone would hide behind a learning rate.
    for first, second in zip(logs_of(one_process), logs_of(folder), strict=True):
        assert second["loss"] == pytest.approx(first["loss"], rel=1e-4)
        assert second["grad_norm"] == pytest.approx(first["grad_norm"], rel=1e-3)
    masks = masks_of(one_process, 0)
    # They grow, and one step of ten is not another's.
    assert len(masks) == 10 and len(set(masks)) > 5
    assert [masks_of(folder, rank) for rank in range(processes)] == [masks] * processes


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """Several trainings in one start of two processes, in the last of which one is killed."""
    folder = tmp_path_factory.mktemp("two")
    process = start(
        accelerate("cpu_2.yaml"),
        Run(str(folder / "equal"), batch=4, accumulation=2, examples=27, teacher=True, optim="adamw_torch"),
        Run(str(folder / "shuffled"), batch=4, order="random"),
        Run(str(folder / "nan"), batch=4, wrong="nan", at=5),
        Run(str(folder / "mask"), batch=4, wrong="mask", at=1),
        Run(str(folder / "whole"), **DROPOUT),
        Run(str(folder / "killed"), **DROPOUT, wrong="killed", at=6),
    )
    return folder, finish(process)


def test_two_processes_with_a_teacher_equal_one_on_the_same_global_batches(two: Any) -> None:
    # Of 27 examples the last batch has three, all of one rank's; one process gets it filled up as they do.
    settings = {"accumulation": 2, "examples": 27, "filled_up": 32, "teacher": True, "optim": "adamw_torch"}
    assert_equals_one(two[0] / "equal", 2, **settings)


def test_two_processes_equal_one_on_shuffled_examples(two: Any) -> None:
    # Ten steps of 8 of 64 examples: the second epoch has an order of its own.
    assert_equals_one(two[0] / "shuffled", 2, order="random")


def test_nan_on_one_rank_alone_stops_all_of_them_at_the_same_step(two: Any) -> None:
    errors = [(two[0] / "nan" / f"error-{rank}.txt").read_text() for rank in range(2)]
    assert "after step 5 bert.encoder.layer.0.output.LayerNorm.weight holds NaN" in errors[1]
    assert "after step 5 a tensor of another rank holds NaN" in errors[0]
    assert (two[0] / "nan" / "checkpoint-4").is_dir()


def test_ranks_with_different_masks_are_told_at_the_next_boundary(two: Any) -> None:
    for rank in range(2):
        error = (two[0] / "mask" / f"error-{rank}.txt").read_text()
        assert "the ranks hold different freeze masks, bert.encoder.layer.0." in error


def test_a_killed_rank_ends_the_job(two: Any) -> None:
    folder, result = two
    assert result.returncode == 1 and "SIGKILL" in result.stderr
    assert (folder / "killed" / "checkpoint-4").is_dir() and not (folder / "killed" / "final.safetensors").exists()


@pytest.fixture(scope="module")
def of_torchrun(two: Any) -> Path:
    """One start by torchrun: goes on with the training of `two` that was killed, and begins another one."""
    resumed = Run(str(two[0] / "killed"), **DROPOUT, resume=True)
    launch(TORCHRUN, resumed, Run(str(two[0] / "torchrun"), batch=4, surrogate="none"))
    return two[0]


@pytest.mark.slow
def test_two_processes_of_which_one_was_killed_resume_to_the_same_bits(of_torchrun: Path) -> None:
    whole, killed = of_torchrun / "whole", of_torchrun / "killed"
    expected, found = final(whole), final(killed)
    assert expected.keys() == found.keys()
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []


@pytest.mark.slow
def test_two_processes_of_torchrun_equal_one(of_torchrun: Path) -> None:
    assert_equals_one(of_torchrun / "torchrun", 2, surrogate="none")


def test_one_process_does_not_go_on_with_what_two_began(two: Any) -> None:
    with pytest.raises(ValueError, match=r"Saved -> now: world_size: 2 -> 1; per_device_train_batch_size: 4 -> 8"):
        program.train(Run(str(two[0] / "whole"), **{**DROPOUT, "batch": 8}, resume=True))


@pytest.mark.parametrize("config", ["cpu_2.yaml", "cpu_4.yaml", "gpus.yaml", "two_machines.yaml"])
def test_accelerate_takes_every_file_and_starts_processes_with_it(config: str) -> None:
    # Which several GPUs have no number of their own in.
    options = ["--num_processes", "2"] if config == "gpus.yaml" else []
    words = ["--config_file", str(CONFIGS / config), *options, "train.py"]
    arguments, _, _ = _validate_launch_command(launch_command_parser().parse_args(words))
    machines = 2 if config == "two_machines.yaml" else 1
    assert (arguments.multi_gpu, arguments.num_machines, arguments.mixed_precision) == (True, machines, "no")
    assert arguments.num_processes == {"cpu_2.yaml": 2, "cpu_4.yaml": 4, "gpus.yaml": 2}.get(config, 8)


@pytest.mark.parametrize("file", sorted(CONFIGS.iterdir()), ids=lambda file: file.name)
def test_accelerate_and_torch_know_every_key_and_value_of_a_file(file: Path) -> None:
    read, types = load_config_from_file(str(file)), get_type_hints(ClusterConfig)
    options = {option.dest: option for option in launch_command_parser()._actions}
    for key in yaml.safe_load(file.read_text(encoding="utf-8")):
        value = getattr(read, key)
        assert isinstance(value, types[key]), key
        assert key not in options or options[key].choices is None or value in options[key].choices, key
    # These two are texts to accelerate.
    assert read.gpu_ids in (None, "all") or all(number.isdecimal() for number in read.gpu_ids.split(","))
    where = RendezvousParameters(read.rdzv_backend, "127.0.0.1:29500", "run", min_nodes=1, max_nodes=1, rank=0)
    assert get_rendezvous_handler(where).get_backend() == read.rdzv_backend


@pytest.mark.slow
def test_four_processes_without_a_surrogate_equal_one_on_the_same_global_batches(tmp_path: Path) -> None:
    settings = {"accumulation": 2, "examples": 27, "teacher": True, "surrogate": "none", "optim": "adamw_torch"}
    launch(accelerate("cpu_4.yaml"), Run(str(tmp_path / "four"), batch=2, **settings))
    assert_equals_one(tmp_path / "four", 4, filled_up=32, **settings)


@pytest.mark.slow
def test_two_machines_equal_one(tmp_path: Path) -> None:
    port = str(get_free_port())
    options = ["--num_processes", "2", "--main_process_ip", "127.0.0.1", "--main_process_port", port, "--machine_rank"]
    run = Run(str(tmp_path / "two"), batch=4, schedule="linear")
    machines = [start(accelerate("two_machines.yaml", *options, rank), run) for rank in "01"]
    for result in [finish(machine) for machine in machines]:
        assert result.returncode == 0, result.stderr[-4000:]
    assert_equals_one(tmp_path / "two", 2, schedule="linear")


@pytest.mark.slow
@pytest.mark.parametrize("surrogate", ["none", "ste"])
def test_a_killed_run_resumes_to_the_same_bits(tmp_path: Path, surrogate: str) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    settings = {"surrogate": surrogate, "dropout": 0.1}
    program.train(Run(str(whole), **settings))
    result = finish(start([], Run(str(killed), **settings, wrong="killed", at=7)))
    assert result.returncode == -signal.SIGKILL
    assert not (killed / "final.safetensors").exists()
    program.train(Run(str(killed), **settings, resume=True))

    expected, found = final(whole), final(killed)
    assert expected.keys() == found.keys()
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []
