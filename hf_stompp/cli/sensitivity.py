"""`hf-stompp sensitivity`."""

from __future__ import annotations

import argparse
import json
import random
import shlex
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from ..config import CHOICES
from ..drawing import can_draw, short_names
from ..sensitivity import DETAILS, binarized_alone, cost_of, linear_names, parts_of, suggest_modes
from ..summary import surroundings
from .errors import CommandError
from .evaluation import load_classifier
from .models import state_of


CALIBRATION_EXAMPLES = 32
"""So many examples give activations their first scales and thresholds; they are not measured with."""


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """
    What `hf-stompp sensitivity` tells.

    Raises:
        CommandError: the model is no float text classifier, or the examples cannot be used.
        ValueError: its encoder layers cannot be found.
    """
    if arguments.plot is not None and not can_draw():
        raise CommandError('--plot needs matplotlib, which is not installed: pip install "hf_stompp[plot]"')
    modes = tuple(arguments.mode or CHOICES["mode"])
    details = tuple(arguments.detail or DETAILS)
    if arguments.keep is not None and not ("module" in details and "bnn" in modes):
        raise CommandError("--keep needs the costs of single layers: take --detail module and --mode bnn, too")
    classifier = load_classifier(arguments)
    model, state = classifier.model, state_of(classifier.model.config, arguments.model)
    if state != "float":
        raise CommandError(f"{arguments.model} is {state}, binary already: name the float model that it was made from")
    rows = list(range(len(classifier.labels)))
    random.Random(arguments.seed).shuffle(rows)
    calibration, measured = rows[:CALIBRATION_EXAMPLES], rows[CALIBRATION_EXAMPLES:][: arguments.max_examples]
    if not measured:
        raise CommandError(
            f"{classifier.examples.source} has {len(rows)} examples: more than {CALIBRATION_EXAMPLES} are needed, the "
            "first scales of activations come from that many"
        )
    inputs = classifier.encode(calibration).to(model.device)
    labels = torch.tensor([classifier.labels[row] for row in measured])
    linears, float_logits = linear_names(model, inputs), classifier.answers(model, measured)
    cases = [(part, mode) for part in parts_of(linears) if part.detail in details for mode in modes]
    listed = []
    for part, mode in tqdm(cases, desc="parts", unit="part", delay=1, leave=False, disable=None):
        logits = classifier.answers(binarized_alone(model, part, mode, linears, inputs), measured)
        listed.append(cost_of(part, mode, logits, float_logits, labels))
    suggestion = None if arguments.keep is None else suggest_modes(listed, arguments.keep, arguments.keep_as)
    return {
        "model": arguments.model,
        "source": classifier.examples.source,
        "examples": len(measured),
        "accuracy": (float_logits.argmax(-1) == labels).float().mean().item(),
        "largest_class": max(Counter(labels.tolist()).values()) / len(measured),
        "parts": [
            {
                "detail": cost.part.detail,
                "name": cost.part.name,
                "mode": cost.mode,
                "divergence": cost.divergence,
                "accuracy": cost.accuracy,
            }
            for cost in listed
        ],
        "modes": suggestion,
        "seed": arguments.seed,
        **surroundings(),
        "command": shlex.join(["hf-stompp", *arguments.words]),
    }


def run(arguments: argparse.Namespace) -> None:
    """Runs `hf-stompp sensitivity`."""
    result = measure(arguments)
    if arguments.plot is not None:
        plot(result, arguments.plot)
    if arguments.json:
        print(json.dumps(result, indent=2))
        return
    print(f"{arguments.model}: accuracy {result['accuracy']:.4f} as it is, {result['examples']:,} examples\n")
    print(_table(result["parts"]))
    if result["modes"] is not None:
        words = [f"{pattern}={mode}" for pattern, mode in result["modes"].items()]
        print(f"\n--modes {shlex.join(words)}")
    if arguments.plot is not None:
        print(f"\npicture: {arguments.plot}")


def _table(parts: Sequence[dict[str, Any]]) -> str:
    """The costs of each level of detail, most expensive first, a column a mode."""
    modes = list(dict.fromkeys(part["mode"] for part in parts))
    lines: list[str] = []
    for detail in dict.fromkeys(part["detail"] for part in parts):
        by_name: dict[str, dict[str, dict[str, Any]]] = {}
        for part in parts:
            if part["detail"] == detail:
                by_name.setdefault(part["name"], {})[part["mode"]] = part
        names = sorted(by_name, key=lambda name: -by_name[name][modes[0]]["divergence"])
        shown = dict(zip(names, _shown(detail, names), strict=True))
        width = max(len(text) for text in (detail, *shown.values()))
        head = "".join(f"{f'{mode}: divergence':>18}{'accuracy':>10}" for mode in modes)
        lines += ([""] if lines else []) + [f"{detail:{width}}{head}"]
        for name in names:
            row = "".join(
                f"{by_name[name][mode]['divergence']:>18.4f}{by_name[name][mode]['accuracy']:>10.4f}" for mode in modes
            )
            lines.append(f"{shown[name]:{width}}{row}")
    return "\n".join(lines)


def _shown(detail: str, names: Sequence[str]) -> list[str]:
    return list(names) if detail == "kind" else short_names(names)


def plot(result: dict[str, Any], file: Path) -> None:
    """A panel a level of detail: a point for each part and mode, from input (top) to output."""
    from matplotlib.figure import Figure

    parts = result["parts"]
    details = list(dict.fromkeys(part["detail"] for part in parts))
    modes = list(dict.fromkeys(part["mode"] for part in parts))
    counts = [len({part["name"] for part in parts if part["detail"] == detail}) for detail in details]
    figure = Figure(figsize=(7.5, 0.8 + 0.24 * sum(counts)), layout="constrained")
    axes = figure.subplots(len(details), 1, sharex=True, squeeze=False, height_ratios=counts)[:, 0]
    colors = {"bnn": "#0b5cad", "bwn": "#d9730d"}
    for axis, detail in zip(axes, details, strict=True):
        for mode in modes:
            chosen = [part for part in parts if part["detail"] == detail and part["mode"] == mode]
            names = [part["name"] for part in chosen]
            values = [part["divergence"] for part in chosen]
            axis.plot(values, range(len(values)), "o", color=colors[mode], label=mode, markersize=5)
            axis.set_yticks(range(len(names)), _shown(detail, names), fontsize=7)
        axis.invert_yaxis()
        axis.set_xlim(left=0)
        axis.set_title(f"one {detail} binary, the rest float", loc="left", fontsize=9)
        axis.grid(axis="x", alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False, fontsize=8)
    axes[-1].set_xlabel("divergence from the float model's answers, nats")
    figure.savefig(file, dpi=110)
