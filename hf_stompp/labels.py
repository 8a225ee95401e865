"""Checks the labels of a training set before the first step."""

from __future__ import annotations

from typing import Any


def check_labels(dataset: Any, classes: int) -> None:
    """
    Checks a column of classes, which takes no longer than to read it. Other labels, such as one for each token, are
    not checked.

    Args:
        dataset (`datasets.Dataset`): with a column `labels` or `label`, or without.
        classes (`int`): number of classes.

    Raises:
        ValueError: a label is a text, is missing or is out of range; names the row.
    """
    column = next((name for name in ("labels", "label") if name in dataset.column_names), None)
    dtype = str(getattr(dataset.features[column], "dtype", "")) if column is not None else ""
    if dtype in ("string", "large_string"):
        raise ValueError(
            f"column {column} of train_dataset holds texts, not numbers of classes: "
            f"train_dataset.class_encode_column({column!r}) numbers them"
        )
    if not dtype.startswith(("int", "uint")):
        return
    # As it is stored: a transform would make every image to get its label.
    labels = dataset.select_columns([column]).with_format("arrow")[:][column].to_pylist()
    for row, label in enumerate(labels):
        if label is None:
            raise ValueError(f"row {row} of train_dataset has no {column}: leave such rows out")
        if not 0 <= label < classes and label != -100:
            raise ValueError(
                f"label out of range: row {row} of train_dataset has {column}={label}, the model has {classes} "
                f"classes (0 to {classes - 1}); pass num_labels to from_pretrained or correct the data"
            )
