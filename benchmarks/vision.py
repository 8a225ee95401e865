"""
The papers' finding, from scratch: residual networks of three depths and MobileNetV2 on CIFAR-10, with and without
growing masks.

    python benchmarks/vision.py WORK --train_file train.parquet --validation_file test.parquet
    python benchmarks/vision.py --show benchmarks/results/vision.jsonl --plot vision.png

Every run is a command line of `examples/image_classification/run_image_classification.py`, which its line in the
results file holds. Finished runs are skipped; one that was stopped goes on from its last checkpoint.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accuracy import append_line, read_lines

from hf_stompp.machine import command_line


SCRIPT = Path(__file__).resolve().parent.parent / "examples" / "image_classification" / "run_image_classification.py"
RESULTS = Path(__file__).resolve().parent / "results" / "vision.jsonl"

WIDTH = 16
"""Channels of the first stage, of basic blocks; the papers have 64. Bottleneck blocks put out four times as many."""

RESNET = {"embedding_size": WIDTH, "hidden_sizes": [WIDTH * 2**stage for stage in range(4)], "layer_type": "basic"}

BOTTLENECK = {**RESNET, "hidden_sizes": [4 * WIDTH * 2**stage for stage in range(4)], "layer_type": "bottleneck"}


class Network(NamedTuple):
    """A network of the papers: its name, the type of its model, and fields of its config."""

    name: str
    model_type: str
    config: dict[str, Any]


DEPTHS = {
    18: Network("ResNet-18", "resnet", {**RESNET, "depths": [2, 2, 2, 2]}),
    34: Network("ResNet-34", "resnet", {**RESNET, "depths": [3, 4, 6, 3]}),
    50: Network("ResNet-50", "resnet", {**BOTTLENECK, "depths": [3, 4, 6, 3]}),
    # Half of the papers' channels.
    53: Network("MobileNetV2", "mobilenet_v2", {"depth_multiplier": 0.5, "classifier_dropout_prob": 0.0}),
}
"""The networks, by their layers."""

SIGNS = {"activation_functions": "sign", "weight_scale": "none"}
"""The papers' networks: signs in the place of activation functions, weights of +-1."""

WEIGHTS = {"mode": "bwn", "activation_bits": "none", "weight_scale": "none"}
"""Their networks of binary weights alone, which keep the activation functions."""

CLIPPED = {"surrogate": "clipped_ste", "weight_window": 1.0, "activation_window": 1.0}
"""The straight-through estimator that learns: the gradient of the clipped identity."""

BIREAL = "bireal_resnet"

POLYNOMIAL = {**CLIPPED, "surrogate": "polynomial"}

CELLS: dict[str, dict[str, Any]] = {
    "float": {"method": "float"},
    "ste": {"method": "ste", **SIGNS, **CLIPPED},
    "ste-slow": {"method": "ste", **SIGNS, **CLIPPED, "learning_rate": 0.01},
    "ste-identity": {"method": "ste", **SIGNS, "surrogate": "ste"},
    "ste-polynomial": {"method": "ste", **SIGNS, **POLYNOMIAL},
    "stompp": {"method": "stompp", **SIGNS},
    "stompp_ste": {"method": "stompp_ste", **SIGNS, **CLIPPED},
    "stompp_ste-polynomial": {"method": "stompp_ste", **SIGNS, **POLYNOMIAL},
    "stompp-global": {"method": "stompp", **SIGNS, "progression_order": "global"},
    "stompp-reverse": {"method": "stompp", **SIGNS, "progression_order": "reverse"},
    "bwn-stompp": {"method": "stompp", **WEIGHTS},
    "bwn-stompp-reverse": {"method": "stompp", **WEIGHTS, "progression_order": "reverse"},
    "kept-ste": {"method": "ste", **CLIPPED},
    "kept-stompp": {"method": "stompp"},
    "kept-stompp_ste": {"method": "stompp_ste", **CLIPPED},
    "kept-stompp-reverse": {"method": "stompp", "progression_order": "reverse"},
    "bireal-ste": {"model_type": BIREAL, "method": "ste", **CLIPPED},
    "bireal-stompp": {"model_type": BIREAL, "method": "stompp"},
    "bireal-stompp_ste": {"model_type": BIREAL, "method": "stompp_ste", **CLIPPED},
}
"""
What is compared. `kept`: activation functions stay, and shortcuts are float. `bireal`: a float shortcut around every
convolution, and no activation functions.
"""


def exists(cell: str, depth: int) -> bool:
    """Whether there is such a network: Bi-Real ones have basic blocks."""
    return CELLS[cell].get("model_type") != BIREAL or DEPTHS[depth].config.get("layer_type") == "basic"


def command_of(cell: str, depth: int, seed: int, folder: Path, arguments: argparse.Namespace) -> list[str]:
    """The command line of a run, without the program's name and how long it trains."""
    asked = {
        "model_type": DEPTHS[depth].model_type,
        "config_overrides": json.dumps(DEPTHS[depth].config),
        "train_file": arguments.train_file,
        "validation_file": arguments.validation_file,
        "image_size": arguments.image_size,
        "output_dir": str(folder),
        "do_train": True,
        "do_eval": True,
        **CELLS[cell],
        "per_device_train_batch_size": arguments.batch_size,
        "seed": seed,
        "bf16": True,
        "use_cpu": not torch.cuda.is_available(),
        "save_strategy": "epoch",
        "save_total_limit": 1,
        "logging_steps": 20,
        "report_to": "none",
        "disable_tqdm": True,
    }
    words = []
    for name, value in asked.items():
        words += [f"--{name}"] if value is True and name.startswith("do_") else [f"--{name}", str(value)]
    return words


def run(cell: str, depth: int, seed: int, arguments: argparse.Namespace) -> None:
    """Does a run, unless its line is there, and appends that."""
    folder = arguments.work / f"{cell}-{depth}-seed{seed}"
    key = {"cell": cell, "depth": depth, "seed": seed, "epochs": arguments.epochs, "batch_size": arguments.batch_size}
    if any(key.items() <= line.items() for line in read_lines(arguments.results)):
        return
    folder.mkdir(parents=True, exist_ok=True)
    command = [*command_of(cell, depth, seed, folder, arguments), "--num_train_epochs", str(arguments.epochs)]
    print(shlex.join([SCRIPT.name, *command]), flush=True)
    with open(f"{folder}.log", "a", encoding="utf-8") as log:
        done = subprocess.run([sys.executable, str(SCRIPT), *command], stdout=log, stderr=subprocess.STDOUT)
    if done.returncode:
        print(f"failed: {folder}.log", flush=True)
        return
    append_line(arguments.results, {**key, **line_of(folder)})
    for checkpoint in folder.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)


def line_of(folder: Path) -> dict[str, Any]:
    """What a finished run is remembered by."""
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    log = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    kind = "float" if summary["method"] == "float" else "packed"
    return {
        "task": "cifar10",
        "method": summary["method"],
        "mode": summary["mode"],
        "accuracy": round(100 * summary["metrics"][kind]["eval_accuracy"], 2),
        "losses": [round(entry["loss"], 4) for entry in log if "loss" in entry],
        "steps": summary["steps"],
        "bytes": summary["bytes"][kind],
        "seconds": summary["seconds"],
        "machine": {**summary["machine"], **summary["versions"]},
        # Where the images lie is no part of the experiment.
        "command": command_line(shlex.split(summary["command"])),
    }


def table_of(lines: Iterable[dict[str, Any]]) -> str:
    """Accuracy by cell and depth, the mean over seeds, in Markdown."""
    found: dict[tuple[str, int], list[float]] = {}
    for line in lines:
        found.setdefault((line["cell"], line["depth"]), []).append(line["accuracy"])
    run = [depth for depth in DEPTHS if any(depth == other for _, other in found)]
    rows = ["| | " + " | ".join(DEPTHS[depth].name for depth in run) + " |", "|---|" + "---|" * len(run)]
    for cell in CELLS:
        values = [found.get((cell, depth)) for depth in run]
        if any(values):
            shown = ("-" if value is None else f"{statistics.mean(value):.1f}" for value in values)
            rows.append(f"| `{cell}` | " + " | ".join(shown) + " |")
    return "\n".join(rows)


SHOWN = {
    "ste": ("STE", "#d9730d", "-"),
    "stompp": ("StoMPP", "#0b5cad", "-"),
    "stompp_ste": ("StoMPP+STE", "#1a7f37", "-"),
    "stompp-reverse": ("StoMPP, reverse", "#0b5cad", ":"),
    "kept-ste": ("STE, ReLU kept", "#d9730d", "--"),
    "kept-stompp": ("StoMPP, ReLU kept", "#0b5cad", "--"),
}
"""Cells of the figure: label, colour, line."""


def plot(lines: list[dict[str, Any]], file: Path) -> None:
    """Accuracy against depth, and the loss in training at the largest depth."""
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    residual = [depth for depth, network in DEPTHS.items() if network.model_type == "resnet"]
    deepest = max(residual)
    for cell, (label, color, style) in SHOWN.items():
        found = [line for line in lines if line["cell"] == cell and line["depth"] in residual]
        depths = sorted({line["depth"] for line in found})
        means = [statistics.mean(line["accuracy"] for line in found if line["depth"] == depth) for depth in depths]
        # Hollow squares: another kind of network.
        marker = {"marker": "s", "fillstyle": "none"} if cell.startswith("kept") else {"marker": "o"}
        left.plot(depths, means, style, color=color, label=label, **marker)
        for line in found:
            if line["depth"] == deepest and line["seed"] == 0 and not cell.startswith("kept"):
                steps = [20 * (index + 1) for index in range(len(line["losses"]))]
                right.plot(steps, line["losses"], style, color=color, linewidth=1)
    left.axhline(10, color="#656d76", linewidth=0.8)
    left.annotate(
        "chance", (min(residual), 10), textcoords="offset points", xytext=(0, 3), color="#656d76", fontsize=8
    )
    left.set(xlabel="layers", ylabel="accuracy, %", xticks=residual, ylim=(0, None))
    left.legend(fontsize=8, frameon=False)
    right.set(xlabel="step", ylabel="loss in training", title=DEPTHS[deepest].name)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, nargs="?", help="folder of the runs")
    parser.add_argument("--train_file", help="CIFAR-10 as a Parquet file of images and classes")
    parser.add_argument("--validation_file", help="the same of its test set")
    parser.add_argument("--show", type=Path, help="run nothing, and print the table of this results file")
    parser.add_argument("--plot", type=Path, help="gets the figure")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--depth", type=int, nargs="+", choices=DEPTHS, default=list(DEPTHS))
    parser.add_argument("--cell", nargs="+", choices=CELLS, default=list(CELLS))
    parser.add_argument("--seed", type=int, nargs="+", default=[0])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--image_size", type=int, default=64)
    arguments = parser.parse_args(argv)
    if arguments.show is None and None in (arguments.work, arguments.train_file, arguments.validation_file):
        parser.error("name a folder, --train_file and --validation_file, or --show a results file")
    return arguments


def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    for seed in arguments.seed if arguments.show is None else ():
        for depth in arguments.depth:
            for cell in arguments.cell:
                if exists(cell, depth):
                    run(cell, depth, seed, arguments)
    lines = read_lines(arguments.show or arguments.results)
    print(table_of(lines))
    if arguments.plot is not None:
        plot(lines, arguments.plot)


if __name__ == "__main__":
    main()
