"""Checks a training set before the first step."""

from __future__ import annotations

from typing import Any

from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
)


def class_names(names: Any) -> set[str]:
    """The classes of a table, which has several for some models."""
    return {name for value in names.values() for name in ([value] if isinstance(value, str) else value)}


CLASSIFIERS = (
    class_names(MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES)
    | class_names(MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES)
    | class_names(MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES)
)
"""Classes of models whose labels are numbers below `num_labels`."""


def check_training_set(dataset: Any, model: Any, answered: bool = False) -> None:
    """
    Checks a training set before the first step; one that is streamed is not read. Raises a ValueError if it is empty,
    or has a label that [`check_labels`] refuses.

    `answered` says that a teacher answers in the place of labels, or that another loss than the model's reads them:
    they are not checked then.
    """
    if dataset is not None and hasattr(dataset, "__len__") and len(dataset) == 0:
        raise ValueError("train_dataset is empty: check max_train_samples and whatever filters the data")
    classes = getattr(model.config, "num_labels", 1)
    is_single = getattr(model.config, "problem_type", None) in (None, "single_label_classification")
    # A stream has no length, and is not read twice.
    is_table = hasattr(dataset, "select_columns") and hasattr(dataset, "__len__")
    if is_table and classes > 1 and is_single and not answered and type(model).__name__ in CLASSIFIERS:
        check_labels(dataset, classes)


def check_labels(dataset: Any, classes: int) -> None:
    """
    Checks a column of classes, `labels` or `label`, which takes no longer than to read it. Other labels, such as one
    for each token, are not checked. Raises a ValueError if labels are texts, or one is missing or out of range; names
    its row.
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
