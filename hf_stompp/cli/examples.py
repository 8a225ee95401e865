"""Labelled texts from files and GLUE tasks, for the commands that train and measure."""

from __future__ import annotations

import argparse
import hashlib
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..tables import HUB_DATASET, import_datasets, read_hub_splits, read_table, split_files
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


@dataclass(frozen=True)
class Examples:
    """
    Labelled texts.

    Args:
        source (`str`): where they come from.
        columns (`tuple[str, ...]`): the one or two columns that the texts come from.
        texts (`list[list[str]]`): one list a column.
        labels (`list`): as they stand there.
        names (`list[str]`, *optional*): of the classes that labels are ids of, where the file knows them.
    """

    source: str
    columns: tuple[str, ...]
    texts: list[list[str]]
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


def _text_columns(table: Any, source: str, label_column: str, wanted: list[str] | None) -> tuple[str, ...]:
    names = table.column_names
    if wanted and len(wanted) > 2:
        raise CommandError(f"--text_columns takes one or two columns, got {len(wanted)}: choose two")
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
    for columns in TEXT_COLUMNS:
        if all(name in names for name in columns):
            return columns
    kinds = {name: getattr(table.features[name], "dtype", None) for name in names if name != label_column}
    strings = [name for name, kind in kinds.items() if kind in ("string", "large_string")]
    if len(strings) not in (1, 2):
        raise CommandError(
            f"which columns of {source} hold the text is not clear: name one or two of {', '.join(names)} with "
            "--text_columns"
        )
    return tuple(strings)


def read_examples(file: Path | None, arguments: argparse.Namespace, split: str = "validation") -> Examples:
    """
    Reads labelled texts.

    Args:
        file (`Path`, *optional*): where to read them; where none is given, `--task` and `--dataset_dir` say it.
        arguments (`argparse.Namespace`): with `text_columns` and `label_column`.
        split (`str`, *optional*, defaults to `"validation"`): of the task.

    Raises:
        CommandError: there is no such file, or it lacks a column, texts or labels.
    """
    source, table = _read(file, arguments, split)
    if arguments.label_column not in table.column_names:
        raise CommandError(
            f"{source} has no column {arguments.label_column!r}: name one of {', '.join(table.column_names)} with "
            "--label_column"
        )
    columns = _text_columns(table, source, arguments.label_column, arguments.text_columns)
    texts = [list(table[name][:]) for name in columns]
    for name, values in zip(columns, texts, strict=True):
        row = next((row for row, value in enumerate(values) if not isinstance(value, str)), None)
        if row is not None:
            raise CommandError(f"{source} has no text in column {name} of row {row}: fill it, or take the row out")
    labels = list(table[arguments.label_column][:])
    if not labels:
        raise CommandError(f"{source} holds no examples: check it")
    row = next((row for row, label in enumerate(labels) if label is None or label == ""), None)
    if row is not None:
        raise CommandError(
            f"{source} has no label in column {arguments.label_column} of row {row}: fill it, or take the row out"
        )
    feature = table.features[arguments.label_column]
    return Examples(source, columns, texts, labels, getattr(feature, "names", None))


def class_ids(examples: Examples, config: Any) -> list[int]:
    """
    Labels as the model's class ids: by name, where they are the names of its classes, and otherwise as ids.

    Args:
        examples (`Examples`).
        config (`PreTrainedConfig`): of the model, which knows the classes.

    Raises:
        CommandError: a label is no class of the model.
    """
    source, labels = examples.source, examples.labels
    if examples.names is not None and set(examples.names) <= set(config.label2id):
        labels = [label if label is None or label < 0 else examples.names[label] for label in labels]
    names: dict[str, int] = {str(name): int(index) for name, index in config.label2id.items()}
    if any(str(label) in names for label in labels):
        unknown = next((label for label in labels if str(label) not in names), None)
        if unknown is not None:
            raise CommandError(
                f"{source} has the label {unknown!r}, which the model does not know: its classes are "
                f"{', '.join(names)}"
            )
        return [names[str(label)] for label in labels]
    ids = []
    for label in labels:
        try:
            index = int(label)
        except (TypeError, ValueError):
            index = -1
        if index not in range(config.num_labels) or (isinstance(label, float) and label != index):
            raise CommandError(
                f"{source} has the label {label!r}: it must be one of the model's classes, {', '.join(names)}, or an "
                f"id from 0 to {config.num_labels - 1}; rows without a label must go"
            )
        ids.append(index)
    return ids
