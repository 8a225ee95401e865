"""
What happens inside while a classifier becomes binary: gradient and sign flips of every layer, for several methods.

    python benchmarks/mechanism.py FLOAT_MODEL --dataset_dir DIR --output mechanism.json --plot mechanism.png
    python benchmarks/mechanism.py --show mechanism.json --plot mechanism.png

Every method takes the same steps from the same fine-tuned model, which is its teacher. After each step are noted, for
the weights of each layer's binary linears: the norm of the gradient before clipping, and the share of signs that
differ from the step before. The end is the fully binary network on the development set.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    TrainerCallback,
    set_seed,
)

from hf_stompp import StoMPPTrainingArguments, binarize
from hf_stompp.cli.training import compute_metrics
from hf_stompp.machine import command_line, surroundings
from hf_stompp.model.modules import config_of, unit_modules
from hf_stompp.training.methods import RecipeArguments
from hf_stompp.training.recipe import Recipe, Results
from hf_stompp.training.stages import train_binary


WIDE = {"weight_clip": 3.0, "activation_clip": 10.0}
"""Clip ranges that keep much of what a pretrained model knows."""

METHODS: dict[str, dict[str, Any]] = {
    "STE, weights": {"method": "ste", "mode": "bwn"},
    "STE, both": {"method": "ste"},
    "StoMPP+STE, forward": {"method": "stompp_ste", **WIDE, "surrogate": "ste"},
    "StoMPP+STE, reverse": {"method": "stompp_ste", **WIDE, "surrogate": "ste", "progression_order": "reverse"},
    "StoMPP+STE, global": {"method": "stompp_ste", **WIDE, "surrogate": "ste", "progression_order": "global"},
    "StoMPP, forward": {"method": "stompp", **WIDE},
}
"""Name in the figure -> method, and what it is asked for beside."""


class Watch(TrainerCallback):
    """Notes gradient norms and sign flips of each unit of a latent model, once a step."""

    def __init__(self, model: Any) -> None:
        units = unit_modules(model, config_of(model))
        self.weights = {
            unit: [module.weight for module in modules.values() if hasattr(module, "weight")]
            for unit, modules in units.items()
        }
        self.signs = self._read_signs()
        self.gradients: dict[str, list[float]] = {unit: [] for unit in units}
        self.flips: dict[str, list[float]] = {unit: [] for unit in units}

    def _read_signs(self) -> dict[str, torch.Tensor]:
        return {
            unit: torch.cat([weight.detach().ge(0).flatten() for weight in weights])
            for unit, weights in self.weights.items()
        }

    def noted(self) -> dict[str, dict[str, list[float]]]:
        """All of it by quantity and unit, in four digits."""
        return {
            quantity: {unit: [float(f"{value:.4g}") for value in values] for unit, values in units.items()}
            for quantity, units in (("gradient_norm", self.gradients), ("flips", self.flips))
        }

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Gradients are there, and not yet clipped only with `max_grad_norm=0`."""
        for unit, weights in self.weights.items():
            gradients = [weight.grad for weight in weights if weight.grad is not None]
            norms = [gradient.norm().item() for gradient in gradients]
            self.gradients[unit].append(sum(norm**2 for norm in norms) ** 0.5)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The optimizer has moved the weights."""
        before, self.signs = self.signs, self._read_signs()
        for unit, signs in self.signs.items():
            self.flips[unit].append((signs != before[unit]).float().mean().item())


def train(name: str, model: Any, data: Mapping[str, Any], arguments: argparse.Namespace) -> dict[str, Any]:
    """One method: what was noted, and how well its binary network does."""
    options = dict(METHODS[name])
    progression = {key: options.pop(key) for key in list(options) if key.startswith("progression_")}
    asked = RecipeArguments(**options, dropout=0.0)
    set_seed(arguments.seed)
    student = binarize(copy.deepcopy(model), asked.config())
    watch, results = Watch(student), Results()
    with tempfile.TemporaryDirectory() as folder:
        given = {
            "max_steps": arguments.steps,
            "learning_rate": arguments.learning_rate,
            "per_device_train_batch_size": arguments.batch_size,
            # What is noted is the gradient itself. Adam's steps do not depend on its length.
            "max_grad_norm": 0.0,
            "seed": arguments.seed,
            **progression,
        }
        args = StoMPPTrainingArguments(
            folder, eval_strategy="no", save_strategy="no", report_to="none", use_cpu=True, eval_mixed=False, **given
        )
        asked.complete(args, given)
        recipe = Recipe(
            asked,
            args,
            output_dir=Path(folder),
            tokenizer=data["tokenizer"],
            train_dataset=data["train"],
            eval_datasets={"eval": data["validation"]},
            data_collator=DataCollatorWithPadding(data["tokenizer"]),
            compute_metrics=partial(compute_metrics, problem_type="single_label_classification"),
            prepare=lambda trainer: trainer.add_callback(watch),
        )
        train_binary(recipe, student, model, results)
    found = 100 * (results.metrics["binary_final"] or {})["eval_accuracy"]
    print(f"{name}: {found:.1f}", flush=True)
    return {"options": METHODS[name], "accuracy": round(found, 2), **watch.noted()}


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """All methods, one after the other."""
    datasets.disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForSequenceClassification.from_pretrained(arguments.model).eval()
    data: dict[str, Any] = {"tokenizer": tokenizer}
    for split in ("train", "validation"):
        table = datasets.Dataset.from_parquet(
            str(arguments.dataset_dir / "sst2" / f"{split}.parquet"), keep_in_memory=True
        )
        if split == "train":
            table = table.shuffle(seed=arguments.seed).select(
                range(min(len(table), arguments.steps * arguments.batch_size))
            )
        encoded = tokenizer(table["sentence"][:], truncation=True, max_length=64)
        data[split] = datasets.Dataset.from_dict({**encoded, "labels": table["label"][:]})
    found = {name: train(name, model, data, arguments) for name in arguments.methods}
    return {
        "dataset": "sst2",
        "steps": arguments.steps,
        "batch_size": arguments.batch_size,
        "learning_rate": arguments.learning_rate,
        "seed": arguments.seed,
        "methods": found,
        **surroundings(),
        "command": command_line(["python", "benchmarks/mechanism.py", *arguments.words]),
    }


def plot(result: Mapping[str, Any], file: Path) -> None:
    """A row a method: gradient norm and sign flips, layers from input (bottom) to output, steps from left to right."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.colors import LogNorm

    methods = result["methods"]
    quantities = (
        ("gradient_norm", "gradient norm", "viridis"),
        ("flips", "share of signs that flip in a step", "magma"),
    )
    figure, axes = pyplot.subplots(
        len(methods), 2, figsize=(10, 0.6 + 1.25 * len(methods)), sharex=True, layout="constrained", squeeze=False
    )
    for column, (key, title, colors) in enumerate(quantities):
        values = [
            value for method in methods.values() for series in method[key].values() for value in series if value > 0
        ]
        # A decade more would be a few first steps.
        ordered = sorted(values)
        scale = LogNorm(ordered[len(ordered) // 100], ordered[-1 - len(ordered) // 100])
        for row, (name, method) in enumerate(methods.items()):
            axis = axes[row][column]
            grid = torch.tensor(list(method[key].values())).clamp(min=scale.vmin).numpy()
            extent = (0, grid.shape[1], 0.5, grid.shape[0] + 0.5)
            image = axis.imshow(
                grid, aspect="auto", origin="lower", norm=scale, cmap=colors, interpolation="nearest", extent=extent
            )
            # At most eight: more would overlap.
            axis.set_yticks(range(1, grid.shape[0] + 1, -(-grid.shape[0] // 8)))
            axis.tick_params(labelsize=7)
            if column == 0:
                axis.set_ylabel("layer", fontsize=8)
                axis.set_title(f"{name}: {method['accuracy']:.1f} %", loc="left", fontsize=9)
        figure.colorbar(image, ax=axes[:, column], location="bottom", label=title, shrink=0.8, pad=0.02)
        axes[-1][column].set_xlabel("step", fontsize=8)
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


def main(argv: list[str] | None = None) -> None:
    """Measures or reads, and draws."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("model", nargs="?", help="a float classifier that was fine-tuned on SST-2")
    parser.add_argument("--dataset_dir", type=Path, help="holds sst2/{train,validation}.parquet")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--learning_rate", type=float, default=5e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="gets the result, as JSON")
    parser.add_argument("--show", type=Path, help="a result to draw; nothing is measured")
    parser.add_argument("--plot", type=Path, help="gets the figure")
    arguments = parser.parse_args(argv)
    arguments.words = sys.argv[1:] if argv is None else argv
    if arguments.show is None:
        if arguments.model is None or arguments.dataset_dir is None:
            parser.error("name a float classifier and --dataset_dir")
        result = measure(arguments)
        if arguments.output is not None:
            arguments.output.write_text(json.dumps(result) + "\n", encoding="utf-8")
    else:
        result = json.loads(arguments.show.read_text(encoding="utf-8"))
    if arguments.plot is not None:
        plot(result, arguments.plot)


if __name__ == "__main__":
    main()
