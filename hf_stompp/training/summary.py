"""What a run of the training recipe is measured by, and the summary of it."""

from __future__ import annotations

import itertools
import json
import logging
import math
import statistics
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, Trainer

from ..machine import surroundings
from ..output import bytes_of_weights, text_columns, write_json
from ..reports.dynamics import measures_of
from .recipe import Recipe, Results


logger = logging.getLogger(__name__)


TIMED_BATCHES = 10


# --- measuring -------------------------------------------------------------------------------------------------------


def measure(recipe: Recipe, trainer: Trainer, split: str) -> dict[str, float] | None:
    """
    Evaluates on every evaluation set, and saves what the Trainer reports as `<split>_results.json`. Returns loss and
    measures, under the prefixes of the sets; `None` without a set.
    """
    if not recipe.eval_datasets:
        return None
    found: dict[str, float] = {}
    reported: dict[str, float] = {}
    for prefix, dataset in recipe.eval_datasets.items():
        reported |= trainer.evaluate(eval_dataset=dataset, metric_key_prefix=prefix)
        reported[f"{prefix}_samples"] = len(dataset)
        found |= measures(reported, prefix)
    # Only the model that the run ends with belongs in all_results.json.
    save_metrics(trainer, split, reported, combined=split == "eval")
    return found


def save_metrics(trainer: Trainer, split: str, metrics: Mapping[str, Any], combined: bool = True) -> None:
    """
    Saves metrics in `args.output_dir` as `<split>_results.json` and, with `combined`, adds them to `all_results.json`:
    as the Trainer's `save_metrics` does, but each file whole or not at all, since a run that was killed and is started
    again adds to what is there. Of several processes only the first writes. A damaged `all_results.json` is begun
    anew, with a warning.
    """
    if not trainer.is_world_process_zero():
        return
    folder = Path(trainer.args.output_dir or ".")
    write_json(folder / f"{split}_results.json", dict(sorted(metrics.items())))
    if combined:
        file = folder / "all_results.json"
        write_json(file, dict(sorted({**_saved_metrics(file), **metrics}.items())))


def _saved_metrics(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        return {**json.loads(file.read_text(encoding="utf-8"))}
    except (ValueError, TypeError, RecursionError) as error:
        # Nothing is made of it but this file: no reason to lose what was trained.
        logger.warning("%s is damaged (%s) and is begun anew.", file, error)
        return {}


def measures(reported: Mapping[str, Any], prefix: str = "eval") -> dict[str, float]:
    """Loss and measures in what a Trainer reports, without speeds and without those of the network in training."""
    return {f"{prefix}_{name}": value for name, value in measures_of(reported, f"{prefix}_").items()}


def milliseconds_per_batch(trainer: Trainer, models: Mapping[str, PreTrainedModel]) -> dict[str, float]:
    """
    Median time of each model's forward pass over the first batches of a Trainer's evaluation set; empty without one.

    The models take every batch in turn, so that other load on the machine meets them alike. They run as they were
    loaded: a Trainer leaves the models that it has evaluated under autocast.
    """
    if trainer.eval_dataset is None:
        return {}
    for model in models.values():
        trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
        model.eval().to(trainer.args.device)
    times: dict[str, list[float]] = {name: [] for name in models}
    with torch.inference_mode():
        for number, batch in enumerate(itertools.islice(trainer.get_eval_dataloader(), TIMED_BATCHES)):
            for name, model in models.items():
                # The first pass pays for what is set up once.
                for _ in range(2 if number == 0 else 1):
                    _synchronize()
                    start = time.perf_counter()
                    model(**batch)
                    _synchronize()
                    elapsed = time.perf_counter() - start
                times[name].append(elapsed * 1000)
    return {name: round(statistics.median(values), 3) for name, values in times.items()}


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def bytes_when_saved(model: PreTrainedModel, folder: Path) -> int:
    """Bytes of the safetensors files of a model in memory; it is saved for a moment within `folder`."""
    with tempfile.TemporaryDirectory(dir=folder) as name:
        model.save_pretrained(name)
        return bytes_of_weights(name)


# --- the summary -----------------------------------------------------------------------------------------------------


def summarize(recipe: Recipe, results: Results, **known: Any) -> dict[str, Any]:
    """
    What `summary.json` holds: all that is needed to compare a run with others, and to repeat it.

    Args:
        recipe (`Recipe`).
        results (`Results`).
        **known: what the caller alone knows, such as `task`, `model`, `examples` and `command`, in which dots take the
            place of the Hub token, since a summary is shared.

    Returns:
        `dict[str, Any]`: plain JSON.
    """
    args, config = recipe.args, results.config
    summary = {
        "task": None,
        "method": recipe.asked.method,
        "seed": args.seed,
        "model": None,
        "mode": None if config is None else config.mode,
        "teacher": results.teacher,
        "config": None if config is None else config.to_dict(),
        "progression": None if config is None else args.own_arguments(),
        "examples": None,
        "epochs": {
            "float": args.num_train_epochs if config is None else recipe.asked.float_num_train_epochs,
            "binary": None if config is None else args.num_train_epochs,
        },
        "max_steps": args.max_steps if args.max_steps > 0 else None,
        "learning_rate": {
            "float": args.learning_rate if config is None else recipe.asked.float_learning_rate,
            "binary": None if config is None else args.learning_rate,
        },
        "train_batch_size": args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
        "steps": results.steps,
        "metrics": results.metrics,
        "packed_weights": results.packed_weights,
        "bytes": results.bytes,
        "seconds": results.seconds,
        "milliseconds_per_batch": {
            "batch_size": args.eval_batch_size,
            "median_of_batches": TIMED_BATCHES,
            **results.milliseconds,
        },
        **surroundings(),
    }
    if args.hub_token and "command" in known:
        known["command"] = known["command"].replace(args.hub_token, "...")
    return json.loads(json.dumps(summary | known, default=str))


def summary_table(summary: Mapping[str, Any]) -> str:
    """A summary's measurements, one row for each model."""
    rows = {name: dict(found) for name, found in summary["metrics"].items() if found is not None}
    for name, size in summary["bytes"].items():
        rows.setdefault(name, {})["MiB"] = size / 2**20
    for name, row in rows.items():
        if name in summary["milliseconds_per_batch"]:
            row["ms/batch"] = summary["milliseconds_per_batch"][name]
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    lines = [["model", *columns]]
    lines.extend([name, *(_number(row.get(column)) for column in columns)] for name, row in rows.items())
    title = f"{summary['task']}, {summary['method']}, seed {summary['seed']}, {summary['model']}"
    return "\n".join(["", title, *text_columns(lines, left=len(columns) + 1), ""])


NEAR = 0.01
"""What is so near to float needs no advice: one point of accuracy."""


def compared_with_float(summary: Mapping[str, Any]) -> str:
    """
    How far a packed model is below its float model, and what helps, by a summary from [`summarize`]: one line or two,
    empty where one of the two was not measured.
    """
    found, packed = (summary["metrics"].get(name) or {} for name in ("float", "packed"))
    shared = [name for name in packed if name in found and not name.endswith(("loss", "mse", "mae"))]
    if not shared or not math.isfinite(found[shared[0]] - packed[shared[0]]):
        return ""
    name = shared[0]
    below = found[name] - packed[name]
    measure = name.partition("_")[2].replace("_", " ")
    where = "above" if below < 0 else "below"
    text = f"{measure}: {packed[name]:.4f} packed, {found[name]:.4f} float, {100 * abs(below):.1f} points {where}"
    if below <= NEAR:
        return text
    helps = ["more epochs"]
    if summary["teacher"] is None:
        helps.append("a teacher (such as the float model)")
    if summary["config"] is not None and summary["config"]["mode"] == "bnn":
        helps.append("1-bit weights alone (mode bwn), at least in attention")
    return f"{text}\nwhat helps: {'; '.join(helps)}"


def _number(value: float | None) -> str:
    return "-" if value is None or not math.isfinite(value) else f"{value:.4f}"
