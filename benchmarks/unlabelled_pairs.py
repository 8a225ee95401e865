"""
Writes pairs of texts like those of a GLUE task, without labels: for a teacher to answer, and a student to learn from.

    python benchmarks/unlabelled_pairs.py OUTPUT.csv --dataset_dir DIR --task stsb --model MODEL

They are made of the task's training set. Each text comes with texts of the other column that mean nearly the same,
drawn from the nearest by their embeddings, and with copies of itself and of its partner that lack some words.
"""

from __future__ import annotations

import argparse
import csv
import random
from pathlib import Path

import pyarrow.parquet
import torch
from torch.nn import functional as F
from transformers import AutoModel, AutoTokenizer

from hf_stompp.sentence_encoder import embed


NEAREST, DRAWN = 20, 3
"""Of so many of the nearest texts, so many are drawn."""

KEPT = (0.5, 0.95)
"""Which share of the words a copy keeps."""


def main() -> None:
    """Writes the file, and says how many pairs are in it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--dataset_dir", type=Path, required=True, help="folders of GLUE tasks, with train.parquet")
    parser.add_argument("--task", required=True, help="one whose examples are pairs")
    parser.add_argument("--model", required=True, help="the encoder whose mean embeddings say what is near")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    table = pyarrow.parquet.read_table(arguments.dataset_dir / arguments.task / "train.parquet")
    names = [name for name in table.column_names if str(table.schema.field(name).type).endswith("string")]
    first, second = (table[name].to_pylist() for name in names)
    model, tokenizer = AutoModel.from_pretrained(arguments.model), AutoTokenizer.from_pretrained(arguments.model)
    embeddings = [F.normalize(embed(model, tokenizer, texts)) for texts in (first, second)]
    given = set(zip(first, second, strict=True))
    made = dict.fromkeys(make_pairs(first, second, *embeddings, random.Random(arguments.seed)))
    pairs = [pair for pair in made if pair not in given]
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    with arguments.output.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([names, *pairs])
    print(f"{arguments.output}: {len(pairs):,} pairs")


def make_pairs(
    first: list[str],
    second: list[str],
    first_embeddings: torch.Tensor,
    second_embeddings: torch.Tensor,
    generator: random.Random,
) -> list[tuple[str, str]]:
    """
    New pairs of the texts of two columns.

    Args:
        first, second (`list[str]`): of equal length.
        first_embeddings, second_embeddings (`Tensor` of shape `(texts, hidden_size)`): float, of length 1.
        generator (`random.Random`).
    """
    nearest = min(NEAREST, len(first))
    near_first = (first_embeddings @ second_embeddings.T).topk(nearest).indices.tolist()
    near_second = (second_embeddings @ first_embeddings.T).topk(nearest).indices.tolist()
    pairs = []
    for row, (text, partner) in enumerate(zip(first, second, strict=True)):
        pairs += [(text, second[other]) for other in generator.sample(near_first[row], min(DRAWN, nearest))]
        pairs += [(first[other], partner) for other in generator.sample(near_second[row], min(DRAWN, nearest))]
        pairs += [(text, _without_words(text, generator)), (text, _without_words(partner, generator))]
    return pairs


def _without_words(text: str, generator: random.Random) -> str:
    kept = generator.uniform(*KEPT)
    words = text.split()
    return " ".join([word for word in words if generator.random() < kept] or words[:1])


if __name__ == "__main__":
    main()
