"""
Interrupts a training run at random, starts it again, and compares what it ends with: a program of its own, since it
forks before any thread is there. The run is killed at some time, or finds no room for a file of some size.

    python tests/interrupted/run.py FOLDER KILLS FULL_DISKS
"""

from __future__ import annotations

import json
import logging
import os
import random
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, BertConfig, DataCollatorWithPadding

from hf_stompp import StoMPPTrainingArguments
from hf_stompp.training.methods import RecipeArguments
from hf_stompp.training.recipe import Recipe
from hf_stompp.training.stages import run_recipe


PARTS = ("float", ".", "packed")
"""Where a run leaves a model: of the float stage, latent, packed."""


def examples(count: int) -> list[dict[str, Any]]:
    draw = random.Random(0)
    return [
        {"input_ids": [2, *(draw.randrange(5, 64) for _ in range(draw.randrange(3, 9)))], "label": draw.randrange(2)}
        for _ in range(count)
    ]


def train(folder: Path) -> None:
    """All stages of the recipe, float, binary, packed; evaluates and saves at every second step."""
    (folder.parent / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"] + ["x"] * 59))
    tokenizer = transformers.BertTokenizer(vocab=str(folder.parent / "vocab.txt"))
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    model = AutoModelForSequenceClassification.from_config(BertConfig(vocab_size=64, **sizes))
    asked = RecipeArguments("stompp_ste", float_num_train_epochs=1.0)
    args = StoMPPTrainingArguments(
        output_dir=str(folder),
        max_steps=12,
        per_device_train_batch_size=4,
        eval_strategy="steps",
        eval_steps=2,
        save_steps=2,
        save_total_limit=2,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
    )
    asked.complete(args, ())
    rows = examples(24)
    collator = DataCollatorWithPadding(tokenizer)
    run_recipe(Recipe(asked, args, folder, tokenizer, rows, {"eval": rows[:8]}, collator, None), model)


def forked(work: Callable[[], None], seconds: float | None = None) -> int:
    """Runs `work` in a child, killed after so many seconds; its exit status, negative that of a signal."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            # Nothing of the parent's is to be cleaned up.
            os._exit(status)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def without_room(work: Callable[[], None], size: int) -> Callable[[], None]:
    """`work` on a disk that takes no file of more bytes."""

    def limited() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        work()

    return limited


def difference(first: Path, second: Path) -> str | None:
    """The first tensor that differs between two finished runs."""
    for part in PARTS:
        one, other = (load_file(folder / part / "model.safetensors") for folder in (first, second))
        for name in one.keys() | other.keys():
            if name not in one or name not in other or not torch.equal(one[name], other[name]):
                return f"{part}: {name}"
    return None


def main() -> None:
    folder, kills, full_disks = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    logging.disable()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    start = time.monotonic()
    assert forked(lambda: train(folder / "whole")) == 0
    whole = time.monotonic() - start
    draw, run = random.Random(0), folder / "interrupted"
    sizes = sorted({path.stat().st_size for path in (folder / "whole").rglob("*") if path.is_file()})
    for number in range(kills + full_disks):
        shutil.rmtree(run, ignore_errors=True)
        if number < kills:
            kind, status = "kill", forked(lambda: train(run), draw.uniform(0, whole))
        else:
            kind, status = "full disk", forked(without_room(lambda: train(run), draw.choice(sizes[:-1]) - 1))
        left = sorted(str(path.relative_to(run)) for path in run.rglob("*") if path.is_dir())
        again = forked(lambda: train(run))
        found = {"kind": kind, "interrupted": status != 0, "left": left, "again": again}
        print(json.dumps({**found, "difference": None if again else difference(folder / "whole", run)}), flush=True)


if __name__ == "__main__":
    main()
