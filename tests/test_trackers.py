"""The Trainer's own integrations with trackers: each run is read back with what the tracker itself reads with."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest


# A process each: trackers keep state of the process, and threads and services of their own.
PRELUDE = """
import json, os, sys
from pathlib import Path
import torch
from datasets import Dataset
from transformers import BertConfig, BertForSequenceClassification, TrainerCallback
from hf_stompp import StoMPPConfig, StoMPPTrainer, StoMPPTrainingArguments, binarize

def train(tracker, callbacks=None):
    torch.manual_seed(0)
    sizes = dict(hidden_size=36, num_hidden_layers=2, num_attention_heads=4, intermediate_size=76)
    model = BertForSequenceClassification(BertConfig(vocab_size=64, max_position_embeddings=40, **sizes))
    ids = torch.randint(5, 64, (32, 10), generator=torch.Generator().manual_seed(0))
    dataset = Dataset.from_dict({"input_ids": ids.tolist(), "labels": (ids[:, 0] > 32).long().tolist()})
    trainer = StoMPPTrainer(
        model=binarize(model, StoMPPConfig()),
        args=StoMPPTrainingArguments(
            "run", max_steps=8, per_device_train_batch_size=4, learning_rate=1e-3, use_cpu=True, save_strategy="no",
            report_to=[tracker], disable_tqdm=True, logging_steps=2, eval_strategy="steps", eval_steps=4,
        ),
        train_dataset=dataset,
        eval_dataset=dataset.select(range(16)),
        compute_metrics=lambda p: {"accuracy": float((p.predictions.argmax(-1) == p.label_ids).mean())},
        callbacks=callbacks,
    )
    trainer.train()
    return trainer.state.log_history
"""

TENSORBOARD = """
log = train("tensorboard")
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
events = EventAccumulator(str(next(Path("run/runs").iterdir()))).Reload()
found = {name: [[event.step, event.value] for event in events.Scalars(name)] for name in events.Tags()["scalars"]}
"""

MLFLOW = """
log = train("mlflow")
import mlflow
mlflow.flush_async_logging()
client = mlflow.MlflowClient()
(run,) = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
found = {
    name: [[metric.step, metric.value] for metric in client.get_metric_history(run.info.run_id, name)]
    for name in run.data.metrics
}
"""

# Offline runs have no reader: what a run knows of itself is asked for after each log.
WANDB = """
import wandb
found = {}

class Summary(TrainerCallback):
    def on_log(self, args, state, control, logs=None, **kwargs):
        summary = dict(wandb.run.summary)
        for key in logs:
            name = f"eval/{key[5:]}" if key.startswith("eval_") else f"train/{key}"
            found.setdefault(name, []).append([state.global_step, summary.get(name)])

log = train("wandb", [Summary()])
wandb.finish()
"""

TRACKIO = """
log = train("trackio")
from trackio.sqlite_storage import SQLiteStorage
(run,) = SQLiteStorage.get_runs("huggingface")
found = {}
for row in SQLiteStorage.get_logs("huggingface", run):
    for name, value in row.items():
        if name.startswith(("train/", "eval/")):
            found.setdefault(name, []).append([row["train/global_step"], value])
"""

# Package, its reader, settings from outside, and whether it calls metrics `train/...` and `eval/...`.
TRACKERS: dict[str, tuple[str, str, dict[str, str], bool]] = {
    "tensorboard": ("tensorboard", TENSORBOARD, {}, True),
    # A file a metric: the store that some names would not fit into. Newer versions have to be asked for it.
    "mlflow": ("mlflow", MLFLOW, {"MLFLOW_TRACKING_URI": "file:mlruns", "MLFLOW_ALLOW_FILE_STORE": "true"}, False),
    "wandb": ("wandb", WANDB, {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}, True),
    "trackio": ("trackio", TRACKIO, {"TRACKIO_DIR": "trackio"}, True),
}


@pytest.mark.slow
@pytest.mark.parametrize("tracker", TRACKERS)
def test_progression_reaches_the_tracker_under_names_that_it_groups(tracker: str, tmp_path: Path) -> None:
    package, reader, settings, is_grouped = TRACKERS[tracker]
    pytest.importorskip(package)
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("WANDB_", "MLFLOW_", "TRACKIO_"))
    }
    environment |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **settings}
    script = f"{PRELUDE}\n{reader}\njson.dump({{'log': log, 'found': found}}, open('result.json', 'w'))\n"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "result.json").read_text())

    expected: dict[str, list[Any]] = {}
    for entry in result["log"]:
        for name, value in entry.items():
            group, _, rest = name.partition("_") if name.startswith("eval_") else ("train", "", name)
            expected.setdefault(f"{group}/{rest}" if is_grouped else name, []).append([entry["step"], value])
    prefix = "train/" if is_grouped else ""
    names = [
        *(f"{prefix}frozen_fraction/{unit}" for unit in ("all", "bert.encoder.layer.0", "bert.encoder.layer.1")),
        *(f"{prefix}{name}" for name in ("loss", "grad_norm", "learning_rate")),
        *(("eval/accuracy", "eval/mixed_accuracy") if is_grouped else ("eval_accuracy", "eval_mixed_accuracy")),
    ]
    for name in names:
        assert len(expected[name]) > 0
        assert result["found"][name] == [[step, pytest.approx(value)] for step, value in expected[name]], name
