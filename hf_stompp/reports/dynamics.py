"""Training dynamics: what a run logged, as series over optimizer steps."""

from __future__ import annotations

import json
import math
import re
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


STATE_FILE = "trainer_state.json"

CALLBACK = "ProgressionCallback"
"""Under this name a Trainer's state keeps the progression."""

FRACTION_PREFIX = "frozen_fraction/"
"""Logged before the name of a unit, and before [`ALL_UNITS`]."""

ALL_UNITS = "all"
"""Stands for a unit's name where the share of all binary entries is logged."""

MOST_STEPS = 2**53
"""More steps than this no run has, and a float does not hold all of them."""

# What an evaluation logs beside the measures of the model.
NO_MEASURES = ("runtime", "samples", "samples_per_second", "steps_per_second", "model_preparation_time")

MODELS = {
    "float": "float",
    "mixed": "mixed, last evaluation",
    "binary": "fully binary",
    "binary_final": "fully binary, last step",
    "binary_best": "fully binary, best step",
    "packed": "packed",
}
"""How the models in a `summary.json` are called for people, in the order of a table."""


def _is_number(value: Any) -> bool:
    """Whether `float` takes a value: a whole number may be too large."""
    return isinstance(value, float) or (isinstance(value, int) and abs(value) <= sys.float_info.max)


@dataclass(frozen=True)
class Series:
    """Values over optimizer steps that were done, in ascending order, all of them finite."""

    steps: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.steps)

    @classmethod
    def of(cls, pairs: Iterable[tuple[int, Any]]) -> Series:
        """Of pairs of step and value; of several with the same step the last counts, and only finite ones."""
        # JSON of other programs has None or "NaN" where there was no number.
        kept = {step: float(value) for step, value in pairs if _is_number(value) and math.isfinite(value)}
        steps = sorted(kept)
        return cls(steps, [kept[step] for step in steps])


@dataclass(frozen=True)
class UnitDynamics:
    """A unit of the progression: its frozen fraction, and after how many optimizer steps it was committed, if ever."""

    name: str
    frozen: Series
    committed_step: int | None


@dataclass(frozen=True)
class Dynamics:
    """
    What a run logged, up to the optimizer step `steps`.

    `units` are in order from input to output, and empty for a run without a progression. With `is_exact` the steps at
    which they were committed are those of the progression; otherwise they are the first steps in the log that show it,
    which may be up to a logging interval late.

    `metric`, None without an evaluation, names the measure in `fully_binary`, `mixed` and `float_value`.
    `fully_binary` is that of the model itself where there was no progression; `mixed` is that of the model as it is in
    training, until it is committed. `results` holds measures of each model, by the names in [`MODELS`].
    """

    name: str
    source: str
    steps: int
    units: list[UnitDynamics]
    is_exact: bool
    metric: str | None
    fully_binary: Series
    mixed: Series
    float_value: float | None
    loss: Series
    grad_norm: Series
    learning_rate: Series
    progression: dict[str, Any]
    results: dict[str, dict[str, float]]

    @property
    def committed_step(self) -> int | None:
        """Optimizer steps after which every unit was committed; None if that never was, or there is no unit."""
        steps = [unit.committed_step for unit in self.units]
        reached = [step for step in steps if step is not None]
        return max(reached) if reached and len(reached) == len(steps) else None


# --- reading ---------------------------------------------------------------------------------------------------------


def find_log(run: Path) -> Path:
    """
    The file with the log of a run, a folder or such a file: its `trainer_state.json`, that of its last checkpoint, or
    a JSON file with a `log_history`. Raises a ValueError where there is none.
    """
    if run.is_file():
        return run
    if not run.is_dir():
        raise ValueError(f"there is no run {run}: name the output_dir of a run, or a JSON file with its log_history")
    checkpoints = [path for path in run.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    checkpoints.sort(key=lambda path: int(path.name.removeprefix("checkpoint-")), reverse=True)
    for folder in [run, *checkpoints]:
        if (folder / STATE_FILE).is_file():
            return folder / STATE_FILE
    for path in sorted(run.glob("*.json")):
        # Another file of the folder, whatever is wrong with it, is not what was asked for.
        if '"log_history"' in path.read_text(encoding="utf-8", errors="replace"):
            return path
    raise ValueError(
        f"{run} holds no {STATE_FILE}, neither itself nor in a checkpoint: name the output_dir of a run; "
        "trainer.save_state() writes the file into it"
    )


def read_dynamics(run: Path, metric: str | None = None) -> Dynamics:
    """
    Reads what a run logged, from its folder or a JSON file with a `log_history`. From a folder, the `summary.json` of
    the recipe is read as well, if it is there. `metric` is the measure to draw, by default the one that was evaluated
    most often. Raises a ValueError where there is no log, it is empty or cannot be read, or has no such measure.
    """
    file = find_log(run)
    state = _read_object(file)
    summary_file = run / "summary.json"
    summary = _read_object(summary_file) if run.is_dir() and summary_file.is_file() and summary_file != file else state
    name = (run if run.is_dir() else run.with_suffix("")).resolve().name
    return dynamics_of(state, name, summary=summary, source=str(file), metric=metric)


def _read_object(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{file} is no valid JSON ({error}): the run may have been stopped while it was written; name another "
            "checkpoint of the run"
        ) from error
    if not isinstance(found, dict):
        raise ValueError(f"{file} holds no JSON object: name a {STATE_FILE}, or the folder of a run")
    return found


def dynamics_of(
    state: Mapping[str, Any],
    name: str,
    summary: Mapping[str, Any] | None = None,
    source: str = STATE_FILE,
    metric: str | None = None,
) -> Dynamics:
    """
    The dynamics in a Trainer's state, as in `trainer_state.json`: `log_history`, and with a progression
    `stateful_callbacks`. `summary` is from [`~hf_stompp.training.summary.summarize`]; its `metrics` and `progression`
    count. `source` is where the state is from, for messages. `metric` and errors are as in [`read_dynamics`].
    """
    log = state.get("log_history")
    if not isinstance(log, list) or not all(isinstance(entry, dict) and _is_step(entry.get("step")) for entry in log):
        raise ValueError(
            f"{source} holds no log_history of a Trainer, entries that each have a step: name a {STATE_FILE}, or the "
            "folder of a run"
        )
    training = [entry for entry in log if "loss" in entry]
    evaluations = [entry for entry in log if measures_of(entry, "eval_") or measures_of(entry, "eval_mixed_")]
    if not training and not evaluations:
        raise ValueError(
            f"the log in {source} is empty: nothing was logged before the run ended; set logging_steps below the "
            "number of its steps"
        )
    summary = summary or {}
    saved = _saved_progression(state, source)
    steps = max(entry["step"] for entry in log)
    chosen = _choose_metric(evaluations, metric, source)

    def series(entries: Sequence[Mapping[str, Any]], key: str) -> Series:
        return Series.of((entry["step"], entry.get(key)) for entry in entries)

    summary_source = f"the summary of {source}"
    results = _results(evaluations, _part(summary, "metrics", summary_source), summary_source)
    return Dynamics(
        name=name,
        source=source,
        steps=steps,
        units=_units(training, saved, steps),
        is_exact=bool(saved),
        metric=chosen,
        fully_binary=series(evaluations, f"eval_{chosen}"),
        mixed=series(evaluations, f"eval_mixed_{chosen}"),
        float_value=results.get("float", {}).get(str(chosen)),
        loss=series(training, "loss"),
        grad_norm=series(training, "grad_norm"),
        learning_rate=series(training, "learning_rate"),
        progression=_settings(saved, _part(summary, "progression", summary_source)),
        results=results,
    )


def _is_step(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MOST_STEPS


def _part(whole: Mapping[str, Any], name: str, source: str) -> Mapping[str, Any]:
    """An object within one of JSON; empty where there is none."""
    part = whole.get(name)
    if part is not None and not isinstance(part, Mapping):
        raise ValueError(f"{source} is damaged: its {name} is no JSON object; name another checkpoint of the run")
    return part or {}


def _saved_progression(state: Mapping[str, Any], source: str) -> Mapping[str, Any]:
    """The progression that a Trainer's state keeps, empty where there is none; a damaged one raises a ValueError."""
    saved = state
    for name in ("stateful_callbacks", CALLBACK, "attributes", "progression"):
        saved = _part(saved, name, source)
    if not saved:
        return {}
    units, windows = saved.get("units"), saved.get("windows")
    right = {
        "units": isinstance(units, list) and bool(units) and all(isinstance(unit, str) for unit in units),
        "windows": isinstance(windows, list)
        and all(isinstance(window, list) and len(window) == 2 and all(map(_is_step, window)) for window in windows)
        and isinstance(units, list)
        and len(windows) == len(units),
        "total_steps": _is_step(saved.get("total_steps")),
        **{name: name in saved for name in ("order", "schedule", "refresh_period", "seed")},
    }
    wrong = [name for name, is_right in right.items() if not is_right]
    if wrong:
        raise ValueError(
            f"{source} is damaged: {wrong[0]} of the progression in its stateful_callbacks is missing, or not as a "
            "Trainer writes it; name another checkpoint of the run"
        )
    return saved


def measures_of(entry: Mapping[str, Any], prefix: str) -> dict[str, float]:
    """The measures in what an evaluation logged, the loss among them: `prefix` of their names is cut off."""
    found = {key.removeprefix(prefix): value for key, value in entry.items() if key.startswith(prefix)}
    return {
        name: float(value)
        for name, value in found.items()
        if name not in NO_MEASURES and not name.startswith("mixed_") and _is_number(value)
    }


def _choose_metric(evaluations: Sequence[Mapping[str, Any]], wanted: str | None, source: str) -> str | None:
    counts = Counter(name for entry in evaluations for name in measures_of(entry, "eval_"))
    wanted = wanted.removeprefix("eval_") if wanted else None
    if wanted is not None and wanted not in counts:
        has = f"it has {', '.join(counts)}" if counts else "the run was never evaluated (eval_strategy)"
        raise ValueError(f"{source} has no measure {wanted!r}: {has}")
    # max() takes the first of equals.
    return wanted or max(counts, key=lambda name: (not name.endswith("loss"), counts[name]), default=None)


def _natural(name: str) -> list[Any]:
    """Sorts `layer.2` before `layer.10`: JSON with sorted keys has lost the order of the units."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _units(training: Sequence[Mapping[str, Any]], saved: Mapping[str, Any], steps: int) -> list[UnitDynamics]:
    logged = {
        key.removeprefix(FRACTION_PREFIX) for entry in training for key in entry if key.startswith(FRACTION_PREFIX)
    }
    names = saved.get("units") or sorted(logged - {ALL_UNITS}, key=_natural)
    windows = dict(zip(names, saved.get("windows", []), strict=False))
    units = []
    for name in names:
        frozen = Series.of((entry["step"], entry.get(FRACTION_PREFIX + name)) for entry in training)
        if name in windows:
            start, end = windows[name]
            # As in Progression.committed_step: before this step its masks are full.
            full = [step for step in [max(end - 1, start)] if step < steps]
        else:
            full = [step for step, value in zip(frozen.steps, frozen.values, strict=True) if value >= 1.0]
        units.append(UnitDynamics(name, frozen, full[0] if full else None))
    return units


def _settings(saved: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Settings by the names that `StoMPPTrainingArguments` has for them."""
    if not saved:
        return dict(given)
    windows = saved["windows"]
    settings = {
        "progression_order": saved["order"],
        "progression_schedule": saved["schedule"],
        "refresh_period": saved["refresh_period"],
        "mask_seed": saved["seed"],
    }
    return {**given, **settings} | {
        "units": len(saved["units"]),
        "optimizer steps": saved["total_steps"],
        "steps before the first window": min(start for start, _ in windows),
        "steps after the last window": saved["total_steps"] - max(end for _, end in windows),
    }


def _results(
    evaluations: Sequence[Mapping[str, Any]], metrics: Mapping[str, Any], source: str
) -> dict[str, dict[str, float]]:
    found = {name: measures_of(_part(metrics, name, source), "eval_") for name in MODELS if name in metrics}
    if "binary_final" not in found and "binary" not in found:
        own = [measures for entry in evaluations if (measures := measures_of(entry, "eval_"))]
        found["binary"] = own[-1] if own else {}
    mixed = [measures for entry in evaluations if (measures := measures_of(entry, "eval_mixed_"))]
    found["mixed"] = mixed[-1] if mixed else {}
    return {name: found[name] for name in MODELS if found.get(name)}


def final_evaluation(log_history: Sequence[Mapping[str, Any]], step: int, best_step: int | None) -> dict[str, Any]:
    """
    What a Trainer logged of the evaluation of the model that it holds now, after `step` optimizer steps or, if the
    weights of `best_step` were loaded at the end of training, of that step; empty if that was never evaluated.
    """
    ends = [index for index, entry in enumerate(log_history) if "train_runtime" in entry]
    evaluations = [(index, entry) for index, entry in enumerate(log_history) if "eval_loss" in entry]
    if ends and evaluations and evaluations[-1][0] > ends[-1]:
        return dict(evaluations[-1][1])
    wanted = step if best_step is None else best_step
    return next((dict(entry) for _, entry in reversed(evaluations) if entry.get("step") == wanted), {})
