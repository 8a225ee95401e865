"""What labels are: classes, numbers, any number of classes a text, or a class a word."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import chain, islice
from typing import Any

from transformers.models.auto.modeling_auto import MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES

from .errors import CommandError
from .examples import TOKENS, Examples
from .models import first_architecture


LISTS = ("multi_label_classification", TOKENS)
"""Problem types whose labels are lists of classes."""


def problem_type_of(config: Any, model: str) -> str:
    """
    What a classifier's answers are, one of [`~hf_stompp.cli.examples.PROBLEM_TYPES`]. Refuses one that puts out
    several numbers, which have no one measure; `model` is its name in messages.
    """
    if first_architecture(config) in MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES.values():
        return TOKENS
    # Transformers takes one output for a number where the config does not say.
    found = config.problem_type or ("regression" if config.num_labels == 1 else "single_label_classification")
    if found == "regression" and config.num_labels != 1:
        raise CommandError(
            f"{model} predicts {config.num_labels} numbers a text, and one is trained and measured here: name a "
            "regression with num_labels=1, or use StoMPPTrainer in Python"
        )
    return str(found)


def class_names(config: Any) -> list[str]:
    """Names of a model's outputs, in the order of their ids."""
    return [config.id2label[index] for index in range(config.num_labels)]


def output_names(examples: Examples, problem_type: str) -> list[str]:
    """
    Names of a new head's outputs: those of the classes that labels are of, or that of the one number. Refuses labels
    that are numbers or lists and no classes, or name no class at all.
    """
    if problem_type == "regression":
        return ["LABEL_0"]
    if examples.names is not None:
        return examples.names
    labels = list(chain(*examples.labels)) if problem_type in LISTS else examples.labels
    if not labels:
        raise CommandError(f"{examples.source} names no class in any row: check --label_column")
    wrong = [
        label
        for label in labels
        if label is None or isinstance(label, float | list | dict) or (isinstance(label, int) and label < 0)
    ]
    if wrong:
        raise CommandError(
            f"{examples.source} has labels that are no classes, such as {wrong[0]!r}: give every row one, or say what "
            "they are: --problem_type regression (numbers), multi_label_classification (lists of classes) or "
            f"{TOKENS} (a class a word)"
        )
    if all(isinstance(label, int) for label in labels):
        return [f"LABEL_{index}" for index in range(max(labels) + 1)]
    return sorted({str(label) for label in labels})


def model_labels(examples: Examples, config: Any, problem_type: str) -> list[Any]:
    """Labels as a model takes them: class ids, numbers, 1.0 and 0.0 for each class, or lists of ids."""
    if problem_type == "regression":
        return numbers(examples)
    if problem_type == "single_label_classification":
        return class_ids(examples, config)
    ids = iter(class_ids(replace(examples, labels=list(chain(*examples.labels))), config))
    chosen = [list(islice(ids, len(labels))) for labels in examples.labels]
    if problem_type == TOKENS:
        return chosen
    return [[float(index in row) for index in range(config.num_labels)] for row in chosen]


def numbers(examples: Examples) -> list[float]:
    """Labels as finite numbers. Refuses a label that is none, and names its row."""
    found = []
    for row, label in enumerate(examples.labels):
        try:
            number = float(label)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise CommandError(
                f"{examples.source} has the label {label!r} in row {row}, and a regression takes a number: correct "
                "it, take the row out, or, for classes, train with --problem_type single_label_classification"
            )
        found.append(number)
    return found


def class_ids(examples: Examples, config: Any) -> list[int]:
    """Labels as the model's class ids: by name, where they are the names of its classes, and otherwise as ids."""
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
