"""Labelled texts from files and GLUE tasks, for the commands that train and measure."""

from __future__ import annotations

import argparse
import hashlib
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..data.tables import HUB_DATASET, import_datasets, read_hub_splits, read_table, split_files
from .errors import CommandError, hub_errors


TEXT_COLUMNS = [
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question", "sentence"),
    ("question1", "question2"),
    ("sentence",),
    ("text",),
]
"""Columns that are taken for the text where they are there, the first that fit."""

WORD_COLUMNS = [("tokens",), ("words",)]
"""The same where a text is a list of words."""

TOKENS = "token_classification"
"""The problem type of a class a word."""

PROBLEM_TYPES = ("single_label_classification", "regression", "multi_label_classification", TOKENS)
"""What labels are: Transformers' names, and [`TOKENS`]. The first where nothing is asked for."""

SEPARATOR = "|"
"""Between the classes of a text, in files that hold no lists."""


@dataclass(frozen=True)
class Examples:
    """
    Labelled texts: `texts` has a list for each of the one or two `columns`, of texts or of lists of words. `labels`
    are as `source` has them, lists of them where a text may have several or each word has one. `names` are those of
    the classes that labels are ids of, where the file knows them.
    """

    source: str
    columns: tuple[str, ...]
    texts: list[list[Any]]
    labels: list[Any]
    names: list[str] | None

    @property
    def digest(self) -> str:
        """Tells whether texts and labels are those of an earlier run."""
        content = json.dumps([self.texts, self.labels, self.names], default=str)
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    def first(self, count: int) -> Examples:
        """So many of them."""
        texts = [column[:count] for column in self.texts]
        return Examples(self.source, self.columns, texts, self.labels[:count], self.names)


def _read(file: Path | None, arguments: argparse.Namespace, split: str) -> tuple[str, Any]:
    """Where the examples come from, and the table of them."""
    import_datasets().disable_progress_bars()
    if file is not None:
        return str(file), _read_files(file, [file])
    if arguments.dataset_dir is None:
        with hub_errors("dataset", HUB_DATASET):
            return f"{HUB_DATASET}/{arguments.task}", read_hub_splits(arguments.task, [split])[split]
    folder = arguments.dataset_dir / arguments.task
    files = split_files(folder, split)
    if not files:
        raise CommandError(f"{folder} holds no {split}.parquet: check --dataset_dir and --task, or name files instead")
    return str(folder), _read_files(folder, files)


def _read_files(source: Path, files: list[Path]) -> Any:
    with tempfile.TemporaryDirectory() as cache:
        table = read_table(files, source, cache)
        # It lies in the folder that ends here.
        columns = {name: table[name][:] for name in table.column_names}
        return import_datasets().Dataset.from_dict(columns, features=table.features)


def _text_columns(
    table: Any, source: str, label_column: str, wanted: list[str] | None, of_words: bool
) -> tuple[str, ...]:
    names, most = table.column_names, 1 if of_words else 2
    if wanted and len(wanted) > most:
        takes, choose = ("one column of words", "one") if of_words else ("one or two columns", "two")
        raise CommandError(f"--text_columns takes {takes}, got {len(wanted)}: choose {choose}")
    if wanted:
        missing = [name for name in wanted if name not in names]
        if missing:
            raise CommandError(f"{source} has no column {', '.join(missing)}: it has {', '.join(names)}")
        if label_column in wanted:
            raise CommandError(
                f"{label_column} is among --text_columns: the model would read the answer; leave it out, or name "
                "another --label_column"
            )
        return tuple(wanted)
    for columns in WORD_COLUMNS if of_words else TEXT_COLUMNS:
        if all(name in names for name in columns):
            return columns
    kinds = {name: getattr(table.features[name], "dtype", None) for name in names if name != label_column}
    strings = [name for name, kind in kinds.items() if kind in ("string", "large_string")]
    if of_words or len(strings) not in (1, 2):
        raise CommandError(
            f"which columns of {source} hold the text is not clear: name {'one' if of_words else 'one or two'} of "
            f"{', '.join(names)} with --text_columns"
        )
    return tuple(strings)


def _label_list(cell: Any) -> Any:
    """The classes that a cell names; `None` where it is missing."""
    if not isinstance(cell, str):
        return cell if cell is None or isinstance(cell, list) else [cell]
    labels = [label.strip() for label in cell.split(SEPARATOR) if label.strip()]
    # Codes such as 01 are names.
    are_ids = all(label.isdecimal() and label == str(int(label)) for label in labels)
    return [int(label) for label in labels] if are_ids else labels


def _split(cell: Any) -> Any:
    """A list as it is; of a text, what stands between spaces. A number is the label of a single word."""
    if isinstance(cell, str):
        return cell.split()
    return cell if cell is None or isinstance(cell, list) else [cell]


def _check_texts(source: str, columns: tuple[str, ...], texts: list[list[Any]]) -> None:
    for name, values in zip(columns, texts, strict=True):
        row = next((row for row, value in enumerate(values) if not isinstance(value, str)), None)
        if row is not None and isinstance(values[row], list):
            raise CommandError(
                f"{source} has lists in column {name}: join the words to a text, or, for a label a word, train with "
                f"--problem_type {TOKENS}"
            )
        if row is not None:
            raise CommandError(f"{source} has no text in column {name} of row {row}: fill it, or take the row out")


def _check_words(source: str, columns: tuple[str, str], texts: list[Any], labels: list[Any]) -> None:
    """Refuses texts that are no lists of words, and lists of labels that are not as long."""
    for row, (words, classes) in enumerate(zip(texts, labels, strict=True)):
        if not isinstance(words, list) or not words or not all(isinstance(word, str) for word in words):
            raise CommandError(
                f"{source} has no list of words in column {columns[0]} of row {row}: fill it, or take the row out"
            )
        given = [one for one in classes or () if one is not None]
        if len(given) != len(words):
            raise CommandError(
                f"{source} has {len(words)} words in column {columns[0]} of row {row} and {len(given)} labels in "
                f"column {columns[1]}: each word needs one"
            )


def _check_lists(source: str, column: str, lists: list[Any]) -> None:
    """Refuses lists that hold a 0 or a 1 for each class: read as ids, they would name the first two."""
    for row, labels in enumerate(lists):
        if labels is not None and (len(set(labels)) < len(labels) or any(type(x) in (bool, float) for x in labels)):
            raise CommandError(
                f"{source} has the label {labels!r} in row {row} of column {column}: a list names the classes that "
                "the text has, each once, by name or id, not 0 or 1 for each"
            )


def read_examples(
    file: Path | None,
    arguments: argparse.Namespace,
    split: str = "validation",
    problem_type: str = PROBLEM_TYPES[0],
) -> Examples:
    """
    Reads labelled texts from a file or, where none is given, a `split` of what `--task` and `--dataset_dir` name.

    With `multi_label_classification` each label is a list, also an empty one; of a text it is what stands between
    [`SEPARATOR`]. With [`TOKENS`] a text is a list of words, its label a list as long; of texts they are what stands
    between spaces. Refuses a file that lacks a column, texts or labels.
    """
    source, table = _read(file, arguments, split)
    if arguments.label_column not in table.column_names:
        raise CommandError(
            f"{source} has no column {arguments.label_column!r}: name one of {', '.join(table.column_names)} with "
            "--label_column"
        )
    of_words = problem_type == TOKENS
    columns = _text_columns(table, source, arguments.label_column, arguments.text_columns, of_words)
    texts = [list(table[name][:]) for name in columns]
    if not of_words:
        _check_texts(source, columns, texts)
    labels = list(table[arguments.label_column][:])
    if not labels:
        raise CommandError(f"{source} holds no examples: check it")
    if of_words:
        texts, labels = [[_split(cell) for cell in texts[0]]], [_split(cell) for cell in labels]
        _check_words(source, (columns[0], arguments.label_column), texts[0], labels)
    if problem_type == "multi_label_classification":
        labels = [_label_list(label) for label in labels]
        _check_lists(source, arguments.label_column, labels)
    row = next((row for row, label in enumerate(labels) if label is None or label == ""), None)
    if row is not None:
        raise CommandError(
            f"{source} has no label in column {arguments.label_column} of row {row}: fill it, or take the row out"
        )
    feature = table.features[arguments.label_column]
    # Of a column of lists, the type of their entries knows the names.
    return Examples(source, columns, texts, labels, getattr(getattr(feature, "feature", feature), "names", None))
