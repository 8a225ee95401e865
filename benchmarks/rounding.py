"""
What rounding to 8 bits costs a packed model, on SST-2's development set: of the inputs of layers with binary weights
alone, and of word embeddings that are float.

    python benchmarks/rounding.py PACKED_MODEL --dataset_dir DIR --output benchmarks/results/rounding_sst2.json
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from hf_stompp.machine import command_line, surroundings
from hf_stompp.nn import PackedBinaryLinear, RoundedEmbedding


def logits_of(model: Any, tokenizer: Any, sentences: list[str], activation_bits: int | None) -> torch.Tensor:
    """Logits of all sentences, with float inputs of linear layers rounded to so many bits."""
    for module in model.modules():
        if isinstance(module, PackedBinaryLinear) and not module.binary_input:
            module.activation_bits = activation_bits
    found = []
    with torch.inference_mode():
        for begin in range(0, len(sentences), 64):
            inputs = tokenizer(sentences[begin : begin + 64], padding=True, return_tensors="pt")
            found.append(model(**inputs).logits)
    return torch.cat(found)


def main(argv: list[str] | None = None) -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").strip().split("\n\n")[0])
    parser.add_argument("model", help="a packed classifier")
    parser.add_argument("--dataset_dir", type=Path, required=True, help="holds sst2/validation.parquet")
    parser.add_argument("--output", type=Path, help="gets the result, as JSON")
    arguments = parser.parse_args(argv)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForSequenceClassification.from_pretrained(arguments.model).eval()
    data = Dataset.from_parquet(str(arguments.dataset_dir / "sst2" / "validation.parquet"), keep_in_memory=True)
    labels = torch.tensor(data["label"][:])
    sentences = data["sentence"][:]
    logits = {
        "float inputs": logits_of(model, tokenizer, sentences, None),
        "8 bits": logits_of(model, tokenizer, sentences, 8),
    }
    table = model.get_input_embeddings()
    if isinstance(table, torch.nn.Embedding):
        model.set_input_embeddings(RoundedEmbedding.of(table))
        logits["8 bits, int8 word embeddings"] = logits_of(model, tokenizer, sentences, 8)
    answers = {kind: values.argmax(-1) for kind, values in logits.items()}
    first = "float inputs"
    result = {
        "dataset": "sst2 validation",
        "examples": len(labels),
        "accuracy": {kind: round(100 * (found == labels).float().mean().item(), 3) for kind, found in answers.items()},
        # Nothing is drawn.
        "seed": 0,
        "answers_changed": {
            kind: int((found != answers[first]).sum()) for kind, found in answers.items() if kind != first
        },
        "largest_change_of_a_logit": {
            kind: float(f"{(values - logits[first]).abs().max().item():.3g}")
            for kind, values in logits.items()
            if kind != first
        },
        **surroundings(),
        "command": command_line(["python", "benchmarks/rounding.py", *(sys.argv[1:] if argv is None else argv)]),
    }
    print(json.dumps(result, indent=2))
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
