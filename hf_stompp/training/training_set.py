"""Checks a training set before the first step."""

from __future__ import annotations

from typing import Any

from transformers.models.auto.modeling_auto import (
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES,
    MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
)


OTHER_HEADS = {
    *MODEL_FOR_MASKED_LM_MAPPING_NAMES.values(),
    *MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES.values(),
    *MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES.values(),
}
"""Classes of models whose `num_labels` says nothing of a column of labels."""


def check_training_set(dataset: Any, model: Any, answered: bool = False) -> None:
    """
    Checks a training set before the first step.

    Args:
        dataset (`datasets.Dataset` or whatever a Trainer takes, *optional*): one that is streamed is not read.
        model (`PreTrainedModel`): which is to learn it.
        answered (`bool`, *optional*, defaults to `False`): a teacher answers in the place of labels.

    Raises:
        ValueError: it is empty, or see [`check_labels`].
    """
    if dataset is not None and hasattr(dataset, "__len__") and len(dataset) == 0:
        raise ValueError("train_dataset is empty: check max_train_samples and whatever filters the data")
    classes = getattr(model.config, "num_labels", 1)
    is_single = getattr(model.config, "problem_type", None) in (None, "single_label_classification")
    # A stream has no length, and is not read twice.
    is_table = hasattr(dataset, "select_columns") and hasattr(dataset, "__len__")
    # With a teacher labels may be no classes; those of multiple choice are the choices; other heads have none.
    if is_table and classes > 1 and is_single and not answered and type(model).__name__ not in OTHER_HEADS:
        check_labels(dataset, classes)


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
