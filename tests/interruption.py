"""An `hf-stompp` command that is interrupted once it has a checkpoint, and the comparison of what two runs wrote."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file


RUN = "import sys; from hf_stompp.cli import main; sys.exit(main())"


def interrupted(words: list[str], folder: Path) -> list[str]:
    """Runs a command, presses Ctrl-C at the first checkpoint in a folder; the words of the command that goes on."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [sys.executable, "-c", RUN, *words]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    while process.poll() is None and not list(folder.glob("checkpoint-*")):
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    assert process.returncode == 130, errors
    assert "writing a checkpoint after this step" in errors
    again = next(line.strip() for line in errors.splitlines() if line.strip().startswith(f"hf-stompp {words[0]}"))
    assert again.endswith("--resume")
    return shlex.split(again)[1:]


def assert_same_tensors(first: Path, second: Path) -> None:
    expected, found = (load_file(folder / "model.safetensors") for folder in (first, second))
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
