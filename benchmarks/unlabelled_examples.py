"""
Writes examples like those of a GLUE task, without labels: for a teacher to answer, and a student to learn from.

    python benchmarks/unlabelled_examples.py OUTPUT.csv --dataset_dir DIR --task stsb --model MODEL

They are made of the task's training set. Single texts are copied without some of their words, and with words swapped.
Of pairs each text comes with texts of the other column that mean nearly the same, drawn from the nearest by their
embeddings, and with copies of itself and of its partner without some of their words.
"""

from __future__ import annotations

import argparse
import csv
import random
from pathlib import Path

import torch
from torch.nn import functional as F
from transformers import AutoModel, AutoTokenizer
from unlabelled_text import texts_of

from hf_stompp.training.sentence_encoder import embed


NEAREST, DRAWN = 20, 3
"""Of so many of the nearest texts, so many are drawn."""

COPIES = 3
"""So many copies of each kind are made of a single text."""

KEPT = (0.5, 0.95)
"""Which share of the words a copy keeps."""


def main() -> None:
    """Writes the file, and says how many examples are in it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--dataset_dir", type=Path, required=True, help="folders of GLUE tasks, with train.parquet")
    parser.add_argument("--task", required=True)
    parser.add_argument("--model", help="the encoder whose mean embeddings say what is near, for pairs")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    columns = texts_of(arguments.dataset_dir, arguments.task)
    generator = random.Random(arguments.seed)
    made: list[tuple[str, ...]]
    if len(columns) == 1:
        made = copies(*columns.values(), generator)
    elif arguments.model is None:
        parser.error(f"{arguments.task} has pairs: name an encoder with --model")
    else:
        model, tokenizer = AutoModel.from_pretrained(arguments.model), AutoTokenizer.from_pretrained(arguments.model)
        embeddings = [F.normalize(embed(model, tokenizer, texts)) for texts in columns.values()]
        made = pairs(*columns.values(), *embeddings, generator)
    given = set(zip(*columns.values(), strict=True))
    rows = [row for row in dict.fromkeys(made) if row not in given]
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    with arguments.output.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([list(columns), *rows])
    print(f"{arguments.output}: {len(rows):,} examples")


def copies(texts: list[str], generator: random.Random) -> list[tuple[str, ...]]:
    """Copies of texts without some of their words, and with two words swapped."""
    change = (_without_words, _with_words_swapped)
    return [(make(text, generator),) for text in texts for make in change for _ in range(COPIES)]


def pairs(
    first: list[str],
    second: list[str],
    first_embeddings: torch.Tensor,
    second_embeddings: torch.Tensor,
    generator: random.Random,
) -> list[tuple[str, ...]]:
    """
    New pairs of the texts of two columns, by their embeddings: float, of shape `(texts, hidden_size)` and length 1.
    """
    nearest = min(NEAREST, len(first))
    near_first = _nearest(first_embeddings, second_embeddings, nearest)
    near_second = _nearest(second_embeddings, first_embeddings, nearest)
    found = []
    for row, (text, partner) in enumerate(zip(first, second, strict=True)):
        found += [(text, second[other]) for other in generator.sample(near_first[row], min(DRAWN, nearest))]
        found += [(first[other], partner) for other in generator.sample(near_second[row], min(DRAWN, nearest))]
        found += [(text, _without_words(text, generator)), (text, _without_words(partner, generator))]
    return found


def _nearest(embeddings: torch.Tensor, others: torch.Tensor, count: int) -> list[list[int]]:
    """Rows of the nearest others, in blocks: all similarities at once may not fit into memory."""
    return [row for block in embeddings.split(1024) for row in (block @ others.T).topk(count).indices.tolist()]


def _without_words(text: str, generator: random.Random) -> str:
    kept = generator.uniform(*KEPT)
    words = text.split()
    return " ".join([word for word in words if generator.random() < kept] or words[:1])


def _with_words_swapped(text: str, generator: random.Random) -> str:
    words = text.split()
    if len(words) > 1:
        one, other = generator.sample(range(len(words)), 2)
        words[one], words[other] = words[other], words[one]
    return " ".join(words)


if __name__ == "__main__":
    main()
