"""
Writes a text file of sentences without labels, a sentence a line, for `hf-stompp distill`.

    python benchmarks/unlabelled_text.py OUTPUT.txt --reviews REVIEWS.parquet --reviews_sentences 60000 \\
        --dataset_dir DIR --tasks cola mrpc stsb rte
    python benchmarks/unlabelled_text.py OUTPUT.jsonl --dataset_dir DIR --tasks mrpc stsb rte [--made MADE.csv]

Takes sentences of film reviews, drawn at random, and every sentence of the training sets of the tasks named: those of
3 to 40 words, each once. Without reviews it writes the tasks' pairs of texts as they are, and those of a file that
`unlabelled_examples.py` made, each once, in random order.
What shares a text, or a sentence of one, with a development set of any task in DIR is left out, compared by letters
and digits, and counted: STS-B's training set has pairs of MRPC's development set.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
from collections.abc import Iterable
from pathlib import Path

import pyarrow.parquet

from hf_stompp.data.text import read_texts, split_sentences


WORDS = range(3, 41)


def main() -> None:
    """Writes the file, and says how many sentences are in it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--reviews", type=Path, help="a table with a text column")
    parser.add_argument("--reviews_sentences", type=int, default=60_000)
    parser.add_argument("--dataset_dir", type=Path, required=True, help="folders of GLUE tasks, with train.parquet")
    parser.add_argument("--tasks", nargs="*", default=[])
    parser.add_argument("--made", type=Path, help="a table of two columns: more pairs")
    parser.add_argument("--columns", nargs=2, default=["a", "b"], help="names of the two columns of pairs")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.reviews is None:
        write_pairs(arguments)
        return
    if arguments.made is not None:
        parser.error("--made are pairs, and --reviews are sentences: drop one of them")
    reviews = read_texts([arguments.reviews])
    random.Random(arguments.seed).shuffle(reviews)
    # A review has ten sentences: twice as many as needed, since short and long ones are dropped.
    sentences = [line for text in reviews[: arguments.reviews_sentences // 5] for line in split_sentences(text)]
    random.Random(arguments.seed).shuffle(sentences)
    found = dict.fromkeys(_short(sentences)[: arguments.reviews_sentences])
    for task in arguments.tasks:
        texts = [text for column in texts_of(arguments.dataset_dir, task).values() for text in column]
        found.update(dict.fromkeys(_short([line for text in texts for line in split_sentences(text)])))
    rows = without_development_texts([(line,) for line in found], arguments.dataset_dir)
    kept = [sentence for (sentence,) in rows]
    arguments.output.write_text("\n".join(kept) + "\n", encoding="utf-8")
    print(f"{arguments.output}: {len(kept):,} sentences")


def write_pairs(arguments: argparse.Namespace) -> None:
    """Writes the pairs of texts of tasks, and those that were made."""
    tables = [list(texts_of(arguments.dataset_dir, task).values()) for task in arguments.tasks]
    single = [task for task, columns in zip(arguments.tasks, tables, strict=True) if len(columns) != 2]
    if single:
        raise SystemExit(f"{single[0]} has no pairs of texts: name other --tasks, or --reviews for sentences")
    if arguments.made is not None:
        with arguments.made.open(encoding="utf-8", newline="") as file:
            tables.append(list(zip(*list(csv.reader(file))[1:], strict=True)))
        if len(tables[-1]) != 2:
            raise SystemExit(f"{arguments.made} has no pairs of texts")
    found = dict.fromkeys(pair for columns in tables for pair in zip(*columns, strict=True))
    pairs = without_development_texts(found, arguments.dataset_dir)
    random.Random(arguments.seed).shuffle(pairs)
    lines = [json.dumps(dict(zip(arguments.columns, pair, strict=True))) for pair in pairs]
    arguments.output.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{arguments.output}: {len(lines):,} pairs")


def texts_of(folder: Path, task: str, split: str = "train") -> dict[str, list[str]]:
    """The columns of a task that hold text, by name."""
    table = pyarrow.parquet.read_table(folder / task / f"{split}.parquet")
    names = [name for name in table.column_names if str(table.schema.field(name).type).endswith("string")]
    return {name: table[name].to_pylist() for name in names}


def without_development_texts(rows: Iterable[tuple[str, ...]], folder: Path) -> list[tuple[str, ...]]:
    """The rows that share no sentence with a development set in a folder; prints how many share one."""
    held_out = {
        file.parent.name: list(
            map(sentences_of, zip(*texts_of(folder, file.parent.name, "validation").values(), strict=True))
        )
        for file in sorted(folder.glob("*/validation.parquet"))
    }
    known = {sentence for sets in held_out.values() for row in sets for sentence in row}
    shared = [(row, sentences_of(row) & known) for row in rows]
    kept = [row for row, found in shared if not found]
    leaked = {sentence for _, found in shared for sentence in found}
    print(f"left out: {len(shared) - len(kept):,} that share a sentence with so many rows of a development set:")
    for task, sets in held_out.items():
        print(f"  {task}: {sum(not leaked.isdisjoint(row) for row in sets):,} of {len(sets):,}")
    return kept


def sentences_of(row: tuple[str, ...]) -> set[str]:
    """The letters of every text of a row, and of every sentence of one."""
    return {letters(part) for text in row for part in (text, *split_sentences(text))}


def letters(text: str) -> str:
    """What two spellings of a text have in common."""
    return "".join(character for character in text.lower() if character.isalnum())


def _short(sentences: list[str]) -> list[str]:
    return [line for line in (" ".join(item.split()) for item in sentences) if len(line.split()) in WORDS]


if __name__ == "__main__":
    main()
