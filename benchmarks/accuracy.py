"""
Accuracy of binary models on GLUE: runs a grid of tasks, methods and seeds, a JSON line a finished run.

    python benchmarks/accuracy.py benchmarks/accuracy.yaml --dataset_dir DIR
    python benchmarks/accuracy.py --report OUTPUT_FOLDER benchmarks/results/accuracy*.jsonl

Every run is a command line of `examples/glue/run_glue.py`, which its result line holds. Finished runs are skipped, and
one that was stopped goes on, so that a grid can be stopped, moved to another machine and continued. `docs/accuracy.md`
has the rest.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import io
import itertools
import json
import os
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout


ROOT = Path(__file__).resolve().parent.parent
GLUE = ROOT / "examples" / "glue"
SECTIONS = ("all", "float", "binary")
BASELINES = ("majority", "tfidf")
START = "model_name_or_path"
HARNESS_SETS = (
    "load_best_model_at_end",
    "output_dir",
    "seed",
    "do_train",
    "do_eval",
    "task_name",
    "dataset_dir",
    "disable_tqdm",
)

MEASURES = {
    "cola": ("matthews_correlation",),
    "mrpc": ("accuracy", "f1"),
    "qqp": ("accuracy", "f1"),
    "stsb": ("spearmanr", "pearson"),
}
"""Measures of a task, the main one first; accuracy where none are named."""


class GridError(ValueError):
    """The grid asks for something that does not exist."""


# --- the grid --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Cell:
    """
    One run of the grid.

    Args:
        task (`str`): a GLUE task.
        name (`str`): of the cell; `float` is the model that the others start from, and their teacher.
        seed (`int`).
        options (`dict`): what the cell sets beside what all cells of its kind share.
        flags (`dict`): all arguments of `run_glue.py` but those that the harness sets.
        float_flags (`dict`): the same of the float run that it starts from.
        layers (`int`, *optional*): encoder layers of the pretrained model that are left; all where not given.
    """

    task: str
    name: str
    seed: int
    options: dict[str, Any]
    flags: dict[str, Any]
    float_flags: dict[str, Any]
    layers: int | None = None

    def folder(self, split: str) -> str:
        """Where the run works, within the work folder: another one for other flags."""
        asked = json.dumps([self.flags, self.float_flags], sort_keys=True)
        short = hashlib.sha256(asked.encode()).hexdigest()[:8]
        return "-".join([split, self.task, cut_name(self.name, self.layers), f"seed{self.seed}", short])

    @property
    def start(self) -> Cell:
        """The float run that it starts from; of a float run that itself."""
        return Cell(self.task, "float", self.seed, {}, self.float_flags, self.float_flags, self.layers)


def cut_name(name: str, layers: int | None) -> str:
    """Name of a model, or of a cell, of which so many layers are left."""
    return name if layers is None else f"{name}-{layers}-layers"


def known_flags() -> set[str]:
    """Names of the arguments of `run_glue.py` that a grid may set."""
    sys.path.insert(0, str(GLUE))
    import run_glue

    from hf_stompp import StoMPPTrainingArguments
    from hf_stompp.training.methods import RecipeArguments

    kinds = (run_glue.ModelArguments, run_glue.DataTrainingArguments, RecipeArguments, StoMPPTrainingArguments)
    return {item.name for kind in kinds for item in dataclasses.fields(kind)} - set(HARNESS_SETS)


def read_grid(file: Path, known: set[str]) -> dict[str, Any]:
    """
    Reads a grid.

    Raises:
        GridError: it is no YAML, lacks something, or has a key or an option that does not exist.
    """
    try:
        grid = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise GridError(f"{file} cannot be read: {error}") from error
    keys = ("model", "layers", "seeds", "tasks", "cells", "baselines", *SECTIONS)
    _check_keys(file, "the grid", grid, keys)
    for key, kind in (("model", str), ("seeds", list), ("tasks", dict), ("cells", dict)):
        if not isinstance(grid.get(key), kind) or not grid[key]:
            raise GridError(f"{file}: {key} is missing, or no {kind.__name__} with something in it")
    for section in SECTIONS:
        _check_keys(file, section, grid.setdefault(section, {}) or {}, known)
    for task, sections in grid["tasks"].items():
        _check_keys(file, f"tasks: {task}", sections or {}, SECTIONS)
        for section, flags in (sections or {}).items():
            _check_keys(file, f"tasks: {task}: {section}", flags or {}, known)
    for name, flags in grid["cells"].items():
        if name in ("float", *BASELINES):
            raise GridError(f"{file}: a cell cannot be named {name}, which every task has: choose another name")
        _check_keys(file, f"cells: {name}", flags or {}, known)
        if not isinstance((flags or {}).get(START, ""), str):
            raise GridError(f"{file}: cells: {name}: {START} must be a name or folder, got {flags[START]!r}")
    layers = grid.setdefault("layers", [None])
    if (
        not isinstance(layers, list)
        or not layers
        or not all(item is None or item in range(1, 1000) for item in layers)
    ):
        raise GridError(f"{file}: layers must be a list of whole numbers from 1, got {layers!r}")
    unknown = set(grid.setdefault("baselines", [])) - set(BASELINES)
    if unknown:
        raise GridError(f"{file}: baselines: {sorted(unknown)} do not exist, only {list(BASELINES)}")
    return grid


def _check_keys(file: Path, where: str, found: Any, allowed: Any) -> None:
    if not isinstance(found, dict):
        raise GridError(f"{file}: {where} must be a mapping, got {found!r}")
    unknown = sorted(str(key) for key in found if key not in allowed)
    if unknown:
        shown = f"arguments of run_glue.py but {', '.join(HARNESS_SETS)}" if len(allowed) > 20 else ", ".join(allowed)
        raise GridError(f"{file}: {where} has {', '.join(unknown)}; there may be {shown}")


def cells_of(grid: Mapping[str, Any]) -> list[Cell]:
    """All runs of a grid, each task, seed and depth with its float model first."""
    cells = []
    for task, seed, layers in itertools.product(grid["tasks"], grid["seeds"], grid["layers"]):
        sections = grid["tasks"][task] or {}

        def flags(kind: str, sections: Any = sections) -> dict[str, Any]:
            parts = [grid["all"], sections.get("all"), grid[kind], sections.get(kind)]
            return {name: value for part in parts for name, value in (part or {}).items()}

        start = {**flags("float"), "method": "float"}
        cells.append(Cell(task, "float", seed, {}, start, start, layers))
        for name, options in grid["cells"].items():
            cells.append(Cell(task, name, seed, options or {}, {**flags("binary"), **(options or {})}, start, layers))
    return cells


def command_of(cell: Cell, split: str, model: str) -> list[str]:
    """Arguments of `run_glue.py` for a cell, with names relative to the work folder."""
    fine_tuned = cell.start.folder(split)
    set_here = {
        "task_name": cell.task,
        "dataset_dir": "glue" if split == "validation" else split,
        START: cut_name(model, cell.layers) if cell.name == "float" else fine_tuned,
        "do_train": True,
        "do_eval": True,
        "seed": cell.seed,
        "output_dir": cell.folder(split),
        "disable_tqdm": True,
    }
    if START in cell.flags and cell.name != "float":
        set_here["teacher"] = fine_tuned
    words = []
    for name, value in {**set_here, **cell.flags}.items():
        text = json.dumps(value) if isinstance(value, dict | list) else str(value).replace("{task}", cell.task)
        words += [f"--{name}"] if value is True and name.startswith("do_") else [f"--{name}", text]
    return words


def check_values(cells: list[Cell], model: str) -> None:
    """
    Checks that `run_glue.py` would take the arguments of every cell.

    Raises:
        GridError: it would not; says what it says.
    """
    import run_glue

    for cell in cells:
        said = io.StringIO()
        try:
            with contextlib.redirect_stderr(said):
                run_glue.parse_arguments(command_of(cell, "validation", model))
        except (SystemExit, ValueError) as error:
            reason = said.getvalue().strip().splitlines()[-1:] or [str(error)]
            raise GridError(f"{cell.task}, {cell.name}: {reason[0]}") from error


# --- results ---------------------------------------------------------------------------------------------------------


def read_lines(file: Path) -> list[dict[str, Any]]:
    """The lines of a results file; what is left of one that was cut off is no line."""
    if not file.is_file():
        return []
    with FileLock(f"{file}.lock"):
        _mend(file)
        return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def _mend(file: Path) -> None:
    """Moves a last line that was cut off to `<file>.cut`, with a warning."""
    content = file.read_bytes() if file.is_file() else b""
    whole = content[: content.rfind(b"\n") + 1]
    if whole != content:
        print(f"{file}: the last line was cut off; it is moved to {file}.cut, its run is done again", flush=True)
        with open(f"{file}.cut", "ab") as cut:
            cut.write(content[len(whole) :] + b"\n")
        os.truncate(file, len(whole))


def append_line(file: Path, line: Mapping[str, Any]) -> None:
    """
    Appends a line, whole or not at all.

    Raises:
        OSError: it cannot be written; the file is as it was.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{file}.lock"):
        _mend(file)
        before = file.stat().st_size if file.is_file() else 0
        try:
            with open(file, "ab") as stream:
                stream.write(json.dumps(line).encode() + b"\n")
                stream.flush()
                os.fsync(stream.fileno())
        except OSError:
            if file.is_file():
                os.truncate(file, before)
            raise


def key_of(line: Mapping[str, Any]) -> tuple[Any, ...]:
    """What makes two lines those of one run: all that was asked for."""
    flags = line["flags"], line["float_flags"]
    asked = json.dumps(flags, sort_keys=True)
    return line["split"], line["task"], line["cell"], line.get("layers"), line["seed"], asked


def line_of(cell: Cell, split: str, folder: Path, model: str) -> dict[str, Any]:
    """The result line of a finished run, from its `summary.json` and the Trainer's log."""
    from hf_stompp import StoMPPConfig

    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    measures = MEASURES.get(cell.task, ("accuracy",))
    metrics, config = summary["metrics"], summary["config"] or {}
    log = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    evaluations = [entry for entry in log if f"eval_{measures[0]}" in entry]
    best = max(evaluations, key=lambda entry: entry[f"eval_{measures[0]}"], default=None)
    return {
        "split": split,
        "task": cell.task,
        "cell": cell.name,
        "model": model,
        "layers": cell.layers,
        "method": summary["method"],
        "mode": summary["mode"],
        "teacher": summary["teacher"] is not None,
        "embeddings": StoMPPConfig(**config).word_embeddings,
        "seed": cell.seed,
        "options": cell.options,
        "flags": cell.flags,
        "float_flags": cell.float_flags,
        "examples": summary["examples"],
        "steps": summary["steps"],
        "float": in_percent(metrics.get("float"), measures),
        "packed": in_percent(metrics.get("packed"), measures),
        "packed_best": None if cell.name == "float" else in_percent(best, measures),
        "bytes": summary["bytes"],
        "seconds": summary["seconds"],
        "machine": {**summary["machine"], **summary["versions"]},
        "command": summary["command"],
    }


def in_percent(metrics: Mapping[str, float] | None, measures: tuple[str, ...]) -> dict[str, float] | None:
    """The measures of a task, times 100."""
    return None if metrics is None else {name: round(100 * metrics[f"eval_{name}"], 3) for name in measures}


# --- data and baselines ----------------------------------------------------------------------------------------------


def hold_out(work: Path, tasks: list[str], count: int) -> None:
    """Writes `held_out/<task>/{train,validation}.parquet` into the work folder, from the training sets."""
    import pyarrow.parquet
    from held_out import split

    for task in tasks:
        folder = work / "held_out" / task
        if (folder / "validation.parquet").is_file():
            continue
        table = pyarrow.parquet.read_table(work / "glue" / task / "train.parquet")
        columns = [name for name in ("sentence", "sentence1", "sentence2") if name in table.column_names]
        texts = list(zip(*(table[name].to_pylist() for name in columns), strict=True))
        found = split(texts, min(count, len(texts) // 5))
        folder.mkdir(parents=True, exist_ok=True)
        for name, rows in (("train", found.train), ("validation", found.held_out)):
            # Whole or not at all: the last one tells that both are there.
            pyarrow.parquet.write_table(table.take(rows), folder / f"{name}.part")
            (folder / f"{name}.part").replace(folder / f"{name}.parquet")


def baseline_line(name: str, task: str, split: str, data: Path, limits: dict[str, int]) -> dict[str, Any]:
    """The result line of the majority class, or of a bag of words with a linear model."""
    import datasets
    import numpy as np
    from bag_of_words import linear_model, vectorizer

    sys.path.insert(0, str(GLUE))
    from glue_metric import GlueMetric

    from hf_stompp.machine import surroundings

    around = surroundings()
    start = time.perf_counter()
    files = {part: str(data / f"{part}.parquet") for part in ("train", "validation")}
    train, validation = (datasets.Dataset.from_parquet(file, keep_in_memory=True) for file in files.values())
    train = train.select(range(min(len(train), limits.get("max_train_samples", len(train)))))
    validation = validation.select(range(min(len(validation), limits.get("max_eval_samples", len(validation)))))
    columns = [column for column in ("sentence", "sentence1", "sentence2") if column in train.column_names]
    labels = np.array(train["label"][:])
    if name == "majority":
        typical = labels.mean() if task == "stsb" else np.bincount(labels).argmax()
        predicted = np.full(len(validation), typical)
    else:
        bag = vectorizer()
        bag.fit([text for column in columns for text in train[column]])

        def features(part: Any) -> Any:
            import scipy.sparse

            sides = [bag.transform(part[column][:]) for column in columns]
            if len(sides) == 1:
                return sides[0]
            # A pair: what the sides have in common, and how their bags differ.
            common = sides[0].multiply(sides[1])
            return scipy.sparse.hstack([common, abs(sides[0] - sides[1]), common.sum(axis=1)]).tocsr()

        predicted = linear_model(task == "stsb").fit(features(train), labels).predict(features(validation))
    metric = GlueMetric(task, keep_in_memory=True)
    found = metric.compute(predictions=predicted, references=validation["label"][:])
    measures = MEASURES.get(task, ("accuracy",))
    return {
        "split": split,
        "task": task,
        "cell": name,
        "model": None,
        "layers": None,
        "method": name,
        "mode": None,
        "teacher": False,
        "embeddings": None,
        "seed": 0,
        "options": {},
        "flags": limits,
        "float_flags": {},
        "examples": {"train": len(train), "validation": len(validation)},
        "steps": {},
        "float": in_percent({f"eval_{key}": value for key, value in found.items()}, measures),
        "packed": None,
        "packed_best": None,
        "bytes": {},
        "seconds": {"total": round(time.perf_counter() - start, 3)},
        "machine": {**around["machine"], **around["versions"]},
        "command": f"accuracy.py, {name}",
    }


# --- running ---------------------------------------------------------------------------------------------------------


class Grid:
    """
    Runs cells side by side, each a process of its own, and notes what they found.

    Args:
        work (`Path`): where the runs work.
        results (`Path`): the file that gets a line a finished run.
        split (`str`): `"validation"` or `"held_out"`, what is reported on.
        model (`str`): name or folder of the pretrained model, as seen from the work folder.
        jobs (`int`): so many at a time.
        threads (`int`): of each.
        until (`float`): no run is started that would, by those before it, end after this time (`time.monotonic`).
    """

    def __init__(
        self, work: Path, results: Path, split: str, model: str, jobs: int, threads: int, until: float
    ) -> None:
        self.work, self.results, self.split, self.model = work, results, split, model
        self.jobs, self.threads, self.until = jobs, threads, until
        self.seconds: dict[str, list[float]] = {}
        self.running: dict[Cell, tuple[subprocess.Popen[bytes], FileLock]] = {}
        self.failed: list[Cell] = []

    def run(self, cells: list[Cell]) -> None:
        """
        Runs what is not finished.

        Raises:
            OSError: a line cannot be written.
        """
        done = self._finished()
        waiting = [cell for cell in cells if self._key(cell) not in done]
        # A float model whose line came from elsewhere is made again where a run needs it.
        needed = {cell.start.folder(self.split) for cell in waiting}
        waiting += [
            cell
            for cell in cells
            if cell.name == "float" and self._key(cell) in done and cell.folder(self.split) in needed
            if not (self.work / cell.folder(self.split) / "summary.json").is_file()
        ]
        total = len(waiting)
        try:
            while waiting or self.running:
                self._collect(total - len(waiting) - len(self.running), total, waiting)
                for cell in [cell for cell in waiting if self._is_ready(cell)][: self.jobs - len(self.running)]:
                    waiting.remove(cell)
                    self._start(cell)
                if not self.running:
                    for cell in waiting:
                        print(f"left out: {cell.folder(self.split)}", flush=True)
                    return
                time.sleep(0.5)
        finally:
            # A run that is stopped goes on from its last checkpoint.
            for process, lock in self.running.values():
                process.terminate()
                process.wait()
                lock.release()

    def _finished(self) -> set[tuple[Any, ...]]:
        return {key_of(line) for line in read_lines(self.results)}

    def _key(self, cell: Cell) -> tuple[Any, ...]:
        return key_of({**vars(cell), "split": self.split, "cell": cell.name})

    def _is_ready(self, cell: Cell) -> bool:
        start = self.work / cell.start.folder(self.split)
        expected = statistics.mean(self.seconds.get(cell.task, [0.0]))
        if cell.name != "float" and not (start / "summary.json").is_file():
            return False
        return time.monotonic() + expected < self.until

    def _start(self, cell: Cell) -> None:
        folder = self.work / cell.folder(self.split)
        lock = FileLock(f"{folder}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            print(f"{folder.name}: another process is at it; left to that", flush=True)
            return
        if cell.name != "float" and self._key(cell) in self._finished():
            lock.release()
            return
        words = [sys.executable, str(GLUE / "run_glue.py"), *command_of(cell, self.split, self.model)]
        environment = {**os.environ, "OMP_NUM_THREADS": str(self.threads)}
        if (self.work / cut_name(self.model, cell.layers)).is_dir():
            environment["HF_HUB_OFFLINE"] = "1"
        with open(f"{folder}.log", "ab") as log:
            log.write(f"\n$ {shlex.join(words)}\n".encode())
            log.flush()
            process = subprocess.Popen(words, cwd=self.work, env=environment, stdout=log, stderr=subprocess.STDOUT)
        self.running[cell] = process, lock

    def _collect(self, finished: int, total: int, waiting: list[Cell]) -> None:
        for cell, (process, lock) in list(self.running.items()):
            if process.poll() is None:
                continue
            del self.running[cell]
            folder = self.work / cell.folder(self.split)
            if process.returncode != 0:
                self.failed.append(cell)
                print(f"{folder.name}: failed with status {process.returncode}, see {folder}.log", flush=True)
                lock.release()
                continue
            line = line_of(cell, self.split, folder, self.model)
            if self._key(cell) not in self._finished():
                append_line(self.results, line)
            for checkpoint in folder.glob("checkpoint-*"):
                shutil.rmtree(checkpoint)
            lock.release()
            finished += 1
            self.seconds.setdefault(cell.task, []).append(line["seconds"]["total"])
            left = sum(statistics.mean(self.seconds.get(c.task, [0.0])) for c in [*waiting, *self.running]) / self.jobs
            found = line["float"] if cell.name == "float" else line["packed"]
            print(f"[{finished}/{total}, about {left / 60:.0f} min left] {folder.name}: {found}", flush=True)


def prepare(work: Path, dataset_dir: Path, model: str) -> None:
    """Makes the work folder: the data and the model under relative names, so that commands hold no folder of ours."""
    work.mkdir(parents=True, exist_ok=True)
    if not (work / "glue").exists():
        (work / "glue").symlink_to(dataset_dir.resolve())
    if model == "minilm" and not (work / model).is_dir():
        subprocess.run(
            [sys.executable, str(ROOT / "examples" / "demo" / "fetch_model.py"), str(work / model)], check=True
        )


def cut(work: Path, model: str, layers: int) -> None:
    """
    Writes the pretrained model with its first layers alone, where it is not there yet.

    Raises:
        GridError: it has fewer.
    """
    from transformers import AutoConfig, AutoModel, AutoTokenizer

    folder = work / cut_name(model, layers)
    if folder.is_dir():
        return
    source = work / model if (work / model).is_dir() else model
    if AutoConfig.from_pretrained(source).num_hidden_layers < layers:
        raise GridError(f"layers: {model} has fewer than {layers}")
    # Whole or not at all.
    part = folder.with_name(f"{folder.name}.part")
    AutoModel.from_pretrained(source, num_hidden_layers=layers).save_pretrained(part)
    AutoTokenizer.from_pretrained(source).save_pretrained(part)
    part.replace(folder)


def picked(cells: list[Cell], arguments: argparse.Namespace) -> list[Cell]:
    """The cells that the command line picks, with the float models that they need."""
    wanted = [
        cell
        for cell in cells
        if (not arguments.task or cell.task in arguments.task)
        and (not arguments.layers or cell.layers in arguments.layers)
        and (not arguments.cell or cell.name in (*arguments.cell, "float"))
        and (not arguments.seed or cell.seed in arguments.seed)
    ]
    if not wanted:
        raise GridError("no cell of the grid is meant: check --task, --cell, --layers and --seed")
    return wanted


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 0, or 1 where a run failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("files", type=Path, nargs="+", help="the grid (YAML); with --report, results files")
    parser.add_argument("--dataset_dir", type=Path, help="holds <task>/{train,validation}.parquet")
    parser.add_argument("--work", type=Path, default=Path("accuracy_runs"), help="where the runs work")
    parser.add_argument("--results", type=Path, help="gets the lines; benchmarks/results/<name of the grid>.jsonl")
    parser.add_argument("--select", action="store_true", help="report on examples held out of the training set")
    parser.add_argument("--held_out", type=int, default=1000, help="so many, and at most a fifth")
    parser.add_argument("--task", nargs="+", help="only these")
    parser.add_argument("--cell", nargs="+", help="only these, and the float models that they need")
    parser.add_argument("--layers", nargs="+", type=int, help="only these depths")
    parser.add_argument("--seed", nargs="+", type=int, help="only these")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side")
    parser.add_argument("--threads", type=int, default=1, help="of each")
    parser.add_argument("--time-budget", type=float, default=float("inf"), help="seconds; starts nothing beyond")
    parser.add_argument("--report", type=Path, help="write tables and plots into this folder, and run nothing")
    arguments = parser.parse_args(argv)
    if arguments.report is not None:
        from accuracy_report import write_report

        write_report([line for file in arguments.files for line in read_lines(file)], arguments.report)
        return 0
    try:
        grid = read_grid(arguments.files[0], known_flags())
        cells = picked(cells_of(grid), arguments)
        check_values(cells, grid["model"])
        made = [cell.name for cell in cells if "unlabelled_file" in cell.flags]
        if made and arguments.select:
            raise GridError(
                f"--select: the unlabelled_file of {made[0]} holds copies of what is held out; leave it out"
            )
        if arguments.dataset_dir is None or not arguments.dataset_dir.is_dir():
            raise GridError(f"--dataset_dir {arguments.dataset_dir} is no folder: name the one that holds the tasks")
    except GridError as error:
        parser.error(str(error))
    split = "held_out" if arguments.select else "validation"
    results = arguments.results or ROOT / "benchmarks" / "results" / f"{arguments.files[0].stem}.jsonl"
    prepare(arguments.work, arguments.dataset_dir, grid["model"])
    try:
        for layers in {cell.layers for cell in cells} - {None}:
            cut(arguments.work, grid["model"], layers)
    except GridError as error:
        parser.error(str(error))
    tasks = list(dict.fromkeys(cell.task for cell in cells))
    if arguments.select:
        try:
            hold_out(arguments.work, tasks, arguments.held_out)
        except ValueError as error:
            parser.error(f"--held_out {arguments.held_out}: {error}")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    runs = Grid(
        *(arguments.work, results, split, grid["model"], arguments.jobs, arguments.threads),
        time.monotonic() + arguments.time_budget,
    )
    try:
        done = {key_of(line)[:3] for line in read_lines(results)}
        for task in tasks:
            for name in grid["baselines"]:
                if (split, task, name) not in done:
                    data = arguments.work / ("glue" if split == "validation" else split) / task
                    flags = next(cell.flags for cell in cells if cell.task == task)
                    limits = {flag: flags[flag] for flag in ("max_train_samples", "max_eval_samples") if flag in flags}
                    append_line(results, baseline_line(name, task, split, data, limits))
        runs.run(cells)
    except OSError as error:
        print(f"stopped: {error}. What is in {results} is whole; run this again to go on", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; run this again to go on", file=sys.stderr)
        return 130
    return 1 if runs.failed else 0


if __name__ == "__main__":
    sys.exit(main())
