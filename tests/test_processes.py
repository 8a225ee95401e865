"""Packed models in other processes: spawned ones that are given the model, and children of one that has loaded it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from hf_stompp import StoMPPConfig


def answer(rank: int, models: dict[str, PreTrainedModel], inputs: dict[str, Tensor], folder: Path) -> None:
    with torch.no_grad():
        given = {mode: model(**inputs).logits for mode, model in models.items()}
        loaded = {
            mode: AutoModelForSequenceClassification.from_pretrained(folder / mode)(**inputs).logits for mode in models
        }
    torch.save((given, loaded), folder / f"{rank}.pt")


@pytest.mark.slow
def test_spawned_processes_give_the_answers_of_their_parent(
    tiny_packed: Callable, tiny_inputs: Callable, logits: Callable, tmp_path: Path
) -> None:
    models = {mode: tiny_packed("bert", StoMPPConfig(mode=mode)) for mode in ("bnn", "bwn")}
    for mode, model in models.items():
        model.save_pretrained(tmp_path / mode)
    expected = {mode: logits(model) for mode, model in models.items()}

    # The models travel with their tensors in shared memory.
    torch.multiprocessing.spawn(answer, (models, tiny_inputs("bert"), tmp_path), nprocs=2)

    for rank in (0, 1):
        for found in torch.load(tmp_path / f"{rank}.pt"):
            assert all(torch.equal(found[mode], expected[mode]) for mode in models)


FORK_AFTER_LOADING = """
import os, signal, sys, torch
import hf_stompp
from transformers import AutoModelForSequenceClassification

model = AutoModelForSequenceClassification.from_pretrained(sys.argv[1])
inputs = torch.load(sys.argv[2])
with torch.no_grad():
    expected = model(**inputs).logits
children = []
for _ in range(3):
    children.append(os.fork())
    if children[-1] == 0:
        # A child that hangs, as one with two threads would, ends here too.
        signal.alarm(60)
        with torch.no_grad():
            os._exit(0 if torch.equal(model(**inputs).logits, expected) else 1)
print([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children])
torch.save(expected, sys.argv[3])
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are not forked here")
@pytest.mark.parametrize("mode", ["bnn", "bwn"])
def test_children_that_are_forked_after_loading_answer_on_one_thread(
    tiny_packed: Callable, tiny_inputs: Callable, logits: Callable, tmp_path: Path, mode: str
) -> None:
    model = tiny_packed("bert", StoMPPConfig(mode=mode))
    model.save_pretrained(tmp_path / "packed")
    # Enough for a second thread, if it were allowed one.
    inputs = {"batch": 32, "length": 40}
    torch.save(tiny_inputs("bert", **inputs), tmp_path / "inputs.pt")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    files = [str(tmp_path / name) for name in ("packed", "inputs.pt", "logits.pt")]

    ran = subprocess.run(
        [sys.executable, "-c", FORK_AFTER_LOADING, *files], env=environment, capture_output=True, text=True
    )

    assert ran.stdout == "[0, 0, 0]\n", ran.stdout + ran.stderr
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), logits(model, **inputs))
