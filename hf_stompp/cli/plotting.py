"""`hf-stompp plot`."""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..output import replacing
from ..reports.drawing import can_draw, png, report
from ..reports.dynamics import MODELS, Dynamics, read_dynamics
from .errors import CommandError


def _files(arguments: argparse.Namespace) -> dict[str, Path]:
    """The files to write, none of which is there without `--force`."""
    source: Path = arguments.run_folder
    folder: Path = arguments.output or (source if source.is_dir() else source.parent)
    if folder.exists() and not folder.is_dir():
        raise CommandError(f"{folder} is a file: name a folder with --output")
    files = {"picture": folder / "dynamics.png", "report": folder / "dynamics.html"}
    there = [path for path in files.values() if os.path.lexists(path)]
    if there and not arguments.force:
        raise CommandError(
            f"{there[0]} is there already: choose another folder with --output, or replace it with --force"
        )
    return files


def _result(dynamics: Dynamics, files: dict[str, Path]) -> dict[str, Any]:
    found = asdict(dynamics)
    return {
        "run": found.pop("name"),
        **found,
        "committed_step": dynamics.committed_step,
        **{kind: str(path) for kind, path in files.items()},
    }


def _lines(dynamics: Dynamics, files: dict[str, Path]) -> Iterator[str]:
    yield f"{dynamics.source}: {dynamics.steps} optimizer steps"
    if dynamics.units:
        committed = [unit for unit in dynamics.units if unit.committed_step is not None]
        done = dynamics.committed_step
        state = "not fully binary yet" if done is None else f"fully binary after step {done}"
        yield f"units: {len(dynamics.units)}, {len(committed)} committed, {state}"
    else:
        yield "units: none, this run had no progression"
    calls = MODELS if dynamics.units else MODELS | {"binary": "model"}
    for model, measures in dynamics.results.items():
        if dynamics.metric in measures:
            yield f"{dynamics.metric}: {measures[dynamics.metric]:.4f} {calls[model]}"
    for kind, path in files.items():
        yield f"{kind}: {path}"


def run(arguments: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Runs `hf-stompp plot`."""
    # It tells that it builds its cache of fonts, which is no error.
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    if not can_draw():
        raise CommandError(
            'plot draws with the package matplotlib, which is not installed: pip install "hf_stompp[plot]"'
        )
    dynamics = read_dynamics(arguments.run_folder, arguments.metric)
    files = _files(arguments)
    picture, page = png(dynamics), report(dynamics)
    files["picture"].parent.mkdir(parents=True, exist_ok=True)
    with replacing(files["picture"]) as partial:
        partial.write_bytes(picture)
    with replacing(files["report"]) as partial:
        partial.write_text(page, encoding="utf-8")
    return _result(dynamics, files), "\n".join(_lines(dynamics, files))
