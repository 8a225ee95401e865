"""
Writes a text file of sentences without labels, a sentence a line, for `hf-stompp distill`.

    python benchmarks/unlabelled_text.py OUTPUT.txt --reviews REVIEWS.parquet --reviews_sentences 60000 \\
        --dataset_dir DIR --tasks cola mrpc stsb rte
    python benchmarks/unlabelled_text.py OUTPUT.jsonl --dataset_dir DIR --tasks mrpc stsb rte

Takes sentences of film reviews, drawn at random, and every sentence of the training sets of the tasks named: those of
3 to 40 words, each once. Without reviews it writes the tasks' pairs of texts as they are, each once, in random order.
What shares a text with a development set of any task in DIR is left out, compared by letters and digits, and counted:
STS-B's training set has pairs of MRPC's development set.
"""

from __future__ import annotations

import argparse
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
    parser.add_argument("--columns", nargs=2, default=["a", "b"], help="names of the two columns of pairs")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.reviews is None:
        write_pairs(arguments)
        return
    reviews = read_texts([arguments.reviews])
    random.Random(arguments.seed).shuffle(reviews)
    # A review has ten sentences: twice as many as needed, since short and long ones are dropped.
    sentences = [line for text in reviews[: arguments.reviews_sentences // 5] for line in split_sentences(text)]
    random.Random(arguments.seed).shuffle(sentences)
    found = dict.fromkeys(_short(sentences)[: arguments.reviews_sentences])
    for task in arguments.tasks:
        texts = [text for column in texts_of(arguments.dataset_dir, task).values() for text in column]
        found.update(dict.fromkeys(_short([line for text in texts for line in split_sentences(text)])))
    kept = [sentence for (sentence,) in without_development_texts([(line,) for line in found], arguments.dataset_dir)]
    arguments.output.write_text("\n".join(kept) + "\n", encoding="utf-8")
    print(f"{arguments.output}: {len(kept):,} sentences")


def write_pairs(arguments: argparse.Namespace) -> None:
    """Writes the pairs of texts of tasks."""
    tables = [list(texts_of(arguments.dataset_dir, task).values()) for task in arguments.tasks]
    single = [task for task, columns in zip(arguments.tasks, tables, strict=True) if len(columns) != 2]
    if single:
        raise SystemExit(f"{single[0]} has no pairs of texts: name other --tasks, or --reviews for sentences")
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


def without_development_texts(texts: Iterable[tuple[str, ...]], folder: Path) -> list[tuple[str, ...]]:
    """Texts, or pairs of them, that share none with a development set in a folder; prints how many rows of each do."""
    rows: dict[str, list[set[str]]] = {}
    for file in sorted(folder.glob("*/validation.parquet")):
        columns = texts_of(folder, file.parent.name, "validation").values()
        rows[file.parent.name] = [
            {letters(part) for text in row for part in (text, *split_sentences(text))}
            for row in zip(*columns, strict=True)
        ]
    known = {text for sets in rows.values() for row in sets for text in row}
    kept, shared, left_out = [], set(), 0
    for text in texts:
        found = known.intersection(map(letters, text))
        shared |= found
        if found:
            left_out += 1
        else:
            kept.append(text)
    print(f"left out: {left_out:,} that share a text with a development set, with so many of its rows:")
    for task, sets in rows.items():
        print(f"  {task}: {sum(not shared.isdisjoint(row) for row in sets):,} of {len(sets):,}")
    return kept


def letters(text: str) -> str:
    """What two spellings of a text have in common."""
    return "".join(character for character in text.lower() if character.isalnum())


def _short(sentences: list[str]) -> list[str]:
    return [line for line in (" ".join(item.split()) for item in sentences) if len(line.split()) in WORDS]


if __name__ == "__main__":
    main()
