"""`hf-stompp sensitivity`."""

from __future__ import annotations

import argparse
import math
import random
import shlex
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..benchmark import layer_seconds, model_seconds, packed_copy
from ..config import CHOICES
from ..machine import command_line, surroundings
from ..model.sensitivity import (
    DETAILS,
    Cost,
    as_options,
    binarized_alone,
    cost_of,
    header_bytes,
    layer_bytes,
    linear_names,
    parts_of,
    suggest_modes,
)
from ..reports.drawing import can_draw, short_names
from .conversion import output_file
from .errors import CommandError
from .evaluation import load_classifier
from .models import megabytes, state_of


CALIBRATION_EXAMPLES = 32
"""So many examples give activations their first scales and thresholds; they are not measured with."""


BUDGETS = ("keep", "bytes", "milliseconds")
"""What a suggestion may be limited by: number of layers in another mode, size of the file, time of one text."""


@dataclass(frozen=True)
class Budget:
    """
    What a model may cost, by one of [`BUDGETS`]: `limit` for the whole. Everything but the linear layers costs `rest`;
    what each of those costs is in `prices`: layer -> mode -> price.
    """

    name: str
    limit: float
    rest: float
    prices: dict[str, dict[str, float]]


def budget_of(
    arguments: argparse.Namespace, name: str, model: PreTrainedModel, linears: Iterable[str], max_length: int
) -> Budget:
    """
    The budget that was asked for, `name` of [`BUDGETS`]. Times are for a text of `max_length` tokens. Refuses a budget
    that no choice of modes keeps within, or that the float model keeps within too, and times on a GPU.
    """
    limit = float(getattr(arguments, name))
    if name == "keep":
        return Budget(name, limit, 0.0, {layer: {"bnn": 0.0, arguments.keep_as: 1.0} for layer in linears})
    if name == "bytes":
        prices = layer_bytes(model, linears)
        tensors = model.state_dict().items()
        whole = sum(tensor.numel() * tensor.element_size() + header_bytes(key) for key, tensor in tensors)
        unit = "bytes"
    else:
        if model.device.type != "cpu":
            raise CommandError("--milliseconds measures on the CPU: add --device cpu")
        layers: dict[str, Any] = {layer: model.get_submodule(layer) for layer in linears}
        seconds = layer_seconds(layers, max_length)
        prices = {layer: {mode: 1e3 * value for mode, value in times.items()} for layer, times in seconds.items()}
        whole = 1e3 * model_seconds({"float": model}, max_length)["float"]
        unit = f"ms for a text of {max_length} tokens"
    rest = max(0.0, whole - sum(options["float"] for options in prices.values()))
    least = rest + sum(min(options.values()) for options in prices.values())
    # Rounded up: what is printed is enough.
    shown = {
        key: f"{math.ceil(value):,}" if name == "bytes" else f"{value:.4g}"
        for key, value in {"limit": limit, "least": least, "whole": whole}.items()
    }
    if least > limit:
        raise CommandError(
            f"--{name} {shown['limit']}: with every layer in its cheapest mode it is {shown['least']} {unit}"
        )
    if whole <= limit:
        raise CommandError(f"--{name} {shown['limit']} is enough for the float model, {shown['whole']} {unit}")
    return Budget(name, limit, rest, prices)


def suggestion_for(budget: Budget, model: PreTrainedModel, listed: Sequence[Cost], max_length: int) -> dict[str, Any]:
    """
    Modes within a budget, as `mode` and `modes`, and the `cost` of the model with them. `listed` must hold the single
    layers in every mode that has a price; times are for a text of `max_length` tokens.
    """
    modes = suggest_modes(listed, budget.prices, budget.limit - budget.rest)
    options = as_options(modes)
    cost: dict[str, float] = {
        budget.name: budget.rest + sum(budget.prices[layer][mode] for layer, mode in modes.items())
    }
    if budget.name == "milliseconds":
        seconds = model_seconds({"float": model, "packed": packed_copy(model, **options)}, max_length)
        cost |= {f"measured_{name}": 1e3 * value for name, value in seconds.items()}
    return options | {"cost": cost}


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """What `hf-stompp sensitivity` tells of a float classifier of texts."""
    modes = tuple(arguments.mode or CHOICES["mode"])
    details = tuple(arguments.detail or DETAILS)
    wanted = next((name for name in BUDGETS if getattr(arguments, name) is not None), None)
    if wanted is not None and not ("module" in details and set(modes) == set(CHOICES["mode"])):
        raise CommandError(
            f"--{wanted} needs the costs of single layers in both modes: add module to --detail, and leave out --mode"
        )
    classifier = load_classifier(arguments)
    model, state = classifier.model, state_of(classifier.model.config, arguments.model)
    if state != "float":
        raise CommandError(f"{arguments.model} is {state}, binary already: name the float model that it was made from")
    if classifier.problem_type != "single_label_classification":
        raise CommandError(
            f"{arguments.model} is for {classifier.problem_type}, and costs are measured by answers of one class a "
            "text: name such a classifier"
        )
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
    budget = None if wanted is None else budget_of(arguments, wanted, model, linears, classifier.max_length)
    cases = [(part, mode) for part in parts_of(linears) if part.detail in details for mode in modes]
    listed = []
    for part, mode in tqdm(cases, desc="parts", unit="part", delay=1, leave=False, disable=None):
        logits = classifier.answers(binarized_alone(model, part, mode, linears, inputs), measured)
        listed.append(cost_of(part, mode, logits, float_logits, labels))
    suggestion = None if budget is None else suggestion_for(budget, model, listed, classifier.max_length)
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
        "suggestion": suggestion,
        "seed": arguments.seed,
        **surroundings(),
        "command": command_line(["hf-stompp", *arguments.words]),
    }


def run(arguments: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Runs `hf-stompp sensitivity`."""
    # What cannot be drawn shows before minutes of measuring.
    with nullcontext() if arguments.plot is None else _picture(arguments.plot) as file:
        result = measure(arguments)
        if file is not None:
            plot(result, file)
    paragraphs = [
        f"{arguments.model}: accuracy {result['accuracy']:.4f} as it is, {result['examples']:,} examples",
        _table(result["parts"]),
    ]
    if result["suggestion"] is not None:
        paragraphs.append(_told(result["suggestion"]))
    if arguments.plot is not None:
        paragraphs.append(f"picture: {arguments.plot}")
    return result, "\n\n".join(paragraphs)


@contextmanager
def _picture(file: Path) -> Iterator[Path]:
    """The file of `--plot`, to be drawn within the block."""
    if not can_draw():
        raise CommandError('--plot needs matplotlib, which is not installed: pip install "hf_stompp[plot]"')
    from matplotlib.figure import Figure

    # As matplotlib would call it.
    file = file if file.suffix else file.with_suffix(".png")
    kinds = Figure().canvas.get_supported_filetypes()
    if file.suffix[1:].lower() not in kinds:
        raise CommandError(f"--plot {file} ends in no kind of picture: name one that ends in .{', .'.join(kinds)}")
    with output_file(file, force=True) as partial:
        yield partial


def _told(suggestion: dict[str, Any]) -> str:
    """A suggestion as the other commands take it, and its cost."""
    words = [f"{pattern}={mode}" for pattern, mode in suggestion["modes"].items()]
    line = shlex.join(["--mode", suggestion["mode"], *(["--modes", *words] if words else [])])
    cost = suggestion["cost"]
    if "bytes" in cost:
        return f"{line}\nfile: at most {megabytes(cost['bytes'])}"
    if "milliseconds" in cost:
        return (
            f"{line}\none text: {cost['milliseconds']:.2f} ms by the sum of its layers, "
            f"{cost['measured_packed']:.2f} ms measured; float {cost['measured_float']:.2f} ms"
        )
    return line


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
