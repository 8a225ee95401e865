"""`hf-stompp eval`."""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES

from .errors import CommandError, hub_errors
from .examples import class_ids, read_examples
from .models import frozen_fractions, load, model_class, read_config, state_of


def evaluate(arguments: argparse.Namespace) -> dict[str, Any]:
    """
    What `hf-stompp eval` tells.

    Raises:
        CommandError: the model is no text classifier or lacks weights, or the examples cannot be used.
    """
    config: Any = read_config(arguments.model)
    state = state_of(config, arguments.model)
    name = model_class(config, arguments.model).__name__
    if name not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.values():
        raise CommandError(
            f"{arguments.model} is a {name}, and eval measures text classifiers: name a ...ForSequenceClassification"
        )
    if config.num_labels == 1:
        raise CommandError(
            f"{arguments.model} is a regression, which has no accuracy: measure it with examples/glue/run_glue.py"
        )
    examples = read_examples(arguments.file, arguments)
    labels = class_ids(examples, config)
    with hub_errors("model", arguments.model):
        tokenizer = read_tokenizer(arguments.model)
    model: Any = load(arguments.model, config)
    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    model.to(device)
    length = min(
        arguments.max_length,
        tokenizer.model_max_length,
        getattr(config, "max_position_embeddings", arguments.max_length),
    )
    # Texts of like length share a batch, which wastes no time on padding.
    order = sorted(range(len(labels)), key=lambda row: -sum(len(column[row]) for column in examples.texts))
    correct, start = 0, time.perf_counter()
    with (
        torch.inference_mode(),
        tqdm(total=len(order), desc="examples", unit="example", delay=1, leave=False, disable=None) as bar,
    ):
        for first in range(0, len(order), arguments.batch_size):
            rows = order[first : first + arguments.batch_size]
            batch = [[column[row] for row in rows] for column in examples.texts]
            inputs = tokenizer(*batch, truncation=True, max_length=length, padding=True, return_tensors="pt")
            predicted = model(**inputs.to(device)).logits.argmax(-1).cpu()
            correct += int((predicted == torch.tensor([labels[row] for row in rows])).sum())
            bar.update(len(rows))
    seconds = time.perf_counter() - start
    fractions = frozen_fractions(model)
    return {
        "model": arguments.model,
        "class": name,
        "state": state,
        "committed": all(fraction == 1.0 for fraction in fractions.values()) if state == "latent" else None,
        "source": examples.source,
        "text_columns": list(examples.columns),
        "examples": len(order),
        "correct": correct,
        "accuracy": correct / len(order),
        "largest_class": max(Counter(labels).values()) / len(order),
        "seconds": seconds,
        "examples_per_second": len(order) / seconds,
        "batch_size": arguments.batch_size,
        "max_length": length,
        "device": str(device),
    }


def read_tokenizer(model: str) -> Any:
    """
    A model's tokenizer.

    Raises:
        CommandError: its folder has none.
    """
    folder = Path(model).expanduser()
    is_local = folder.is_dir()
    if is_local and not any(folder.glob("tokenizer*")) and not any(folder.glob("vocab.*")):
        # Transformers would make one that knows no words.
        raise CommandError(
            f"{model} has no tokenizer: copy tokenizer.json and tokenizer_config.json of its base model"
        )
    return AutoTokenizer.from_pretrained(folder if is_local else model)


def run(arguments: argparse.Namespace) -> None:
    """Runs `hf-stompp eval`."""
    result = evaluate(arguments)
    if arguments.json:
        print(json.dumps(result, indent=2))
        return
    print(f"{result['model']}: {result['class']}, {result['state']}")
    if result["committed"] is False:
        print("not committed yet: this is the accuracy of a mixed network, not of the binary one")
    print(
        f"accuracy {result['accuracy']:.4f}, {result['correct']:,} of {result['examples']:,} right "
        f"(always the largest class: {result['largest_class']:.4f})"
    )
    print(
        f"{result['seconds']:.1f} s, {result['examples_per_second']:,.0f} examples/s in batches of "
        f"{result['batch_size']} on {result['device']}, tokenizer included"
    )
    print(
        f"text from {', '.join(result['text_columns'])} of {result['source']}, at most {result['max_length']} tokens"
    )
