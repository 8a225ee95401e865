"""
What LoRA adapters learn over a 1-bit base: on the packed model itself, and on what `unpack` makes of it.

    python benchmarks/adapters.py --output benchmarks/results/adapters.json

The base is a tiny random BERT, binary without training. Of eight random tokens, the classifier tells the fourth one's
class, or the greater of the classes of the fourth and the sixth; there are eight classes. Each adapter is evaluated
over the packed base, whatever it was trained on.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from torch import Tensor

from hf_stompp import StoMPPConfig, binarize, commit, pack, register_lora, unpack
from hf_stompp.machine import command_line, surroundings


VOCABULARY, LENGTH, CLASSES, BATCH, EVALUATED = 24, 8, 8, 64, 2000

TARGETS: dict[str, Any] = {"none": [], "query, value": ["query", "value"], "all-linear": "all-linear"}

BASES = "packed", "unpacked", "float"
"""What an adapter is trained on; `float` is the model that the base was made from."""

TASKS = "one token", "greater of two"


def examples(task: str, number: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Random tokens and their labels."""
    ids = torch.randint(0, VOCABULARY, (number, LENGTH), generator=generator)
    classes = ids * CLASSES // VOCABULARY
    labels = classes[:, 3] if task == "one token" else torch.maximum(classes[:, 3], classes[:, 5])
    return {"input_ids": ids, "labels": labels}


def float_model(seed: int) -> Any:
    """A random BERT whose weights are large enough for tokens to matter."""
    torch.manual_seed(seed)
    config = transformers.BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=LENGTH,
        num_labels=CLASSES,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.1,
    )
    return transformers.BertForSequenceClassification(config).eval()


def packed_model(mode: str, seed: int) -> Any:
    """The same, binary."""
    model = binarize(float_model(seed), StoMPPConfig(mode=mode))
    with torch.no_grad():
        model(**examples(TASKS[0], BATCH, torch.Generator().manual_seed(seed)))
    return pack(commit(model))


def adapted(model: Any, target: str) -> Any:
    """A model whose classifier is trained, and adapters with it."""
    if target == "none":
        model.requires_grad_(False).classifier.requires_grad_(True)
        return model
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS[target], modules_to_save=["classifier"])
    return peft.get_peft_model(model, config)


def trained(mode: str, base: str, target: str, task: str, seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Trains one adapter. Returns its accuracy over the packed base, and how many matrices had no gradient."""
    packed = packed_model(mode, seed)
    start = {"packed": packed, "unpacked": unpack(packed, surrogate="ste"), "float": float_model(seed)}[base]
    model = adapted(start, target).train()
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    optimizer = torch.optim.AdamW(parameters.values(), lr=arguments.learning_rate)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, arguments.steps)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(arguments.steps):
        optimizer.zero_grad()
        model(**examples(task, BATCH, generator)).loss.backward()
        optimizer.step()
        schedule.step()
    silent = sum(parameter.grad is None or not parameter.grad.any() for parameter in parameters.values())
    served = model
    if base == "unpacked":
        served = adapted(packed, target)
        served.load_state_dict(
            {name: value for name, value in model.state_dict().items() if name in parameters}, False
        )
    test = examples(task, EVALUATED, torch.Generator().manual_seed(10**6))
    with torch.no_grad():
        right = (served.eval()(test["input_ids"]).logits.argmax(-1) == test["labels"]).float().mean().item()
    return {
        "accuracy": round(100 * right, 1),
        "trained": len(parameters),
        "without_gradient": silent,
    }


def main() -> None:
    """Trains every adapter, and writes what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--learning_rate", type=float, default=5e-3)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    register_lora()
    rows = []
    for mode, task, base, target in [
        (mode, task, base, target)
        for mode in ("bnn", "bwn")
        for task in TASKS
        for base in BASES
        for target in TARGETS
        # Of the float model once, as what there is to reach; without adapters, one base is as good as the other.
        if (base != "float" or (mode, target) == ("bnn", "all-linear")) and (base, target) != ("unpacked", "none")
    ]:
        found = [trained(mode, base, target, task, seed, arguments) for seed in range(arguments.seeds)]
        row = {"mode": mode, "task": task, "base": base, "targets": target, "seeds": found}
        print(row["mode"], "|", task, "|", base, "|", target, "|", [each["accuracy"] for each in found], flush=True)
        rows.append(row)
    command = command_line(["python", "benchmarks/adapters.py", *sys.argv[1:]])
    result: dict[str, Any] = {"command": command, "seed": list(range(arguments.seeds)), **surroundings(), "rows": rows}
    result["versions"]["peft"] = peft.__version__
    arguments.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
