"""
Gradient and sign flips of every block while a residual network learns to classify images from scratch.

    python benchmarks/vision_gradients.py WORK --train_file train.parquet --validation_file test.parquet \\
        --output vision_gradients.json --plot vision_gradients.png
    python benchmarks/vision_gradients.py --show vision_gradients.json --plot vision_gradients.png

Networks and methods are those of `vision.py`; what is noted, and the figure, are those of `mechanism.py`. The accuracy
is that of the packed model after these few steps, on a part of the test set.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from mechanism import Watch, plot
from vision import CELLS, DEPTHS, SCRIPT, command_of

from hf_stompp.machine import command_line, surroundings
from hf_stompp.model.modules import masked_modules


TITLES = {
    "ste": "STE",
    "stompp_ste": "StoMPP+STE",
    "stompp": "StoMPP",
    "stompp-reverse": "StoMPP, reverse",
}
"""Cells of `vision.py` -> title in the figure."""


def watched(cell: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """One method: what was noted, and how well its binary network does."""
    sys.path.insert(0, str(SCRIPT.parent))
    from run_image_classification import main as run_image_classification

    found: list[Watch] = []

    def prepare(trainer: Any) -> None:
        if masked_modules(trainer.model):
            found.append(Watch(trainer.model))
            trainer.add_callback(found[-1])

    command = command_of(cell, arguments.depth, arguments.seed, arguments.work / f"{cell}-gradients", arguments)
    limits = ["--max_steps", str(arguments.steps), "--max_eval_samples", "2000", "--save_strategy", "no"]
    summary = run_image_classification([*command, *limits], prepare=prepare)
    (watch,) = found
    return {
        "options": CELLS[cell],
        "accuracy": round(100 * summary["metrics"]["packed"]["eval_accuracy"], 2),
        **watch.noted(),
    }


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, nargs="?", help="folder of the runs")
    parser.add_argument("--train_file", help="CIFAR-10 as a Parquet file of images and classes")
    parser.add_argument("--validation_file", help="the same of its test set")
    parser.add_argument("--cell", nargs="+", choices=TITLES, default=list(TITLES))
    parser.add_argument("--depth", type=int, choices=DEPTHS, default=50)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--image_size", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="gets the result, as JSON")
    parser.add_argument("--show", type=Path, help="a result to draw; nothing is measured")
    parser.add_argument("--plot", type=Path, help="gets the figure")
    arguments = parser.parse_args(argv)
    if arguments.show is None and None in (arguments.work, arguments.train_file, arguments.validation_file):
        parser.error("name a folder, --train_file and --validation_file, or --show a result")
    arguments.words = sys.argv[1:] if argv is None else argv
    return arguments


def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    if arguments.show is not None:
        result = json.loads(arguments.show.read_text(encoding="utf-8"))
    else:
        result = {
            "dataset": "cifar10",
            "depth": arguments.depth,
            "steps": arguments.steps,
            "batch_size": arguments.batch_size,
            "seed": arguments.seed,
            "methods": {TITLES[cell]: watched(cell, arguments) for cell in arguments.cell},
            **surroundings(),
            "command": command_line(["python", "benchmarks/vision_gradients.py", *arguments.words]),
        }
        if arguments.output is not None:
            arguments.output.write_text(json.dumps(result) + "\n", encoding="utf-8")
    if arguments.plot is not None:
        plot(result, arguments.plot)


if __name__ == "__main__":
    main()
