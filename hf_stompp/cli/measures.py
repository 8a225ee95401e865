"""
What answers are measured by, in NumPy alone: scikit-learn's and SciPy's measures, by the names that GLUE's metric has.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray


Array = NDArray[Any]


def f1(hits: Array, predicted: Array, there: Array) -> Array:
    """
    F1 of each class; 0.0 for one that is neither predicted nor there.

    Args:
        hits, predicted, there (`np.ndarray` of shape `(classes,)`): number of examples of each class that are found,
            that are said to be of it, and that are.
    """
    return 2 * hits / np.maximum(predicted + there, 1)


def matthews_correlation(hits: Array, predicted: Array, there: Array) -> float:
    """
    Matthews correlation, in [-1, 1], for more than two classes Gorodkin's; 0.0 where one side is constant.

    Args:
        hits, predicted, there (`np.ndarray` of shape `(classes,)`): see [`f1`]; of one class an example.
    """
    # Products of four counts are more than an int64 holds.
    hits, predicted, there = (counts.astype(float) for counts in (hits, predicted, there))
    count = there.sum()
    scale = (count**2 - predicted @ predicted) * (count**2 - there @ there)
    return float((hits.sum() * count - predicted @ there) / np.sqrt(scale)) if scale else 0.0


def pearson(predicted: Array, labels: Array) -> float:
    """Pearson correlation of arrays of shape `(examples,)`, in [-1, 1]; 0.0 where one side is constant."""
    if np.ptp(predicted) == 0 or np.ptp(labels) == 0:
        return 0.0
    mine, theirs = (values - values.mean() for values in (predicted.astype(float), labels.astype(float)))
    return float(mine @ theirs / np.sqrt((mine @ mine) * (theirs @ theirs)))


def spearmanr(predicted: Array, labels: Array) -> float:
    """Spearman rank correlation of arrays of shape `(examples,)`, in [-1, 1]; 0.0 where one side is constant."""
    return pearson(ranks(predicted), ranks(labels))


def ranks(values: Array) -> Array:
    """Place of each value in ascending order, from 1 on; equal ones share the mean of theirs. All NaN where one is."""
    if np.isnan(values).any():
        return np.full(len(values), np.nan)
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def single_label_metrics(logits: Array, labels: Array) -> dict[str, float]:
    """
    Measures of one class an example: F1 is that of class 1 where there are two, and otherwise the mean over the
    classes that are predicted or there.

    Args:
        logits (`np.ndarray` of shape `(examples, classes)`).
        labels (`np.ndarray` of shape `(examples,)`): class ids.
    """
    answers, classes = logits.argmax(-1), logits.shape[-1]
    right = answers == labels
    hits, predicted, there = (np.bincount(ids, minlength=classes) for ids in (labels[right], answers, labels))
    scores = f1(hits, predicted, there)
    return {
        "accuracy": float(right.mean()),
        **({"f1": float(scores[1])} if classes == 2 else {"f1_macro": float(scores[predicted + there > 0].mean())}),
        "matthews_correlation": matthews_correlation(hits, predicted, there),
    }


def multi_label_metrics(logits: Array, labels: Array) -> dict[str, float]:
    """
    Measures of any number of classes an example, each told by a probability above 0.5.

    Args:
        logits (`np.ndarray` of shape `(examples, classes)`).
        labels (`np.ndarray` of the same shape): 1 for a class that the example has, otherwise 0.
    """
    answers, truth = logits > 0, labels > 0
    hits, predicted, there = (chosen.sum(0) for chosen in (answers & truth, answers, truth))
    return {
        "f1_micro": float(f1(hits.sum(), predicted.sum(), there.sum())),
        "f1_macro": float(f1(hits, predicted, there).mean()),
        "subset_accuracy": float((answers == truth).all(-1).mean()),
    }


def regression_metrics(logits: Array, labels: Array) -> dict[str, float]:
    """
    Measures of numbers.

    Args:
        logits (`np.ndarray` of shape `(examples, 1)`).
        labels (`np.ndarray` of shape `(examples,)`).
    """
    answers = logits.reshape(-1)
    return {
        "pearson": pearson(answers, labels),
        "spearmanr": spearmanr(answers, labels),
        "mse": float(np.square(answers - labels).mean()),
    }


METRICS: dict[str, Callable[[Array, Array], dict[str, float]]] = {
    "single_label_classification": single_label_metrics,
    "regression": regression_metrics,
    "multi_label_classification": multi_label_metrics,
}
"""Measures `(logits, labels) -> {name: value}` by the `problem_type` of a model's config, the first one first."""

FIRST = {"cola": "matthews_correlation"}
"""What GLUE ranks a task by, where that is another measure."""


def metrics_of(logits: Any, labels: Any, problem_type: str, task: str | None = None) -> dict[str, float]:
    """
    Measures of answers.

    Args:
        logits (array of shape `(examples, outputs)`).
        labels (array): as a model with this `problem_type` takes them.
        problem_type (`str`): a key of [`METRICS`].
        task (`str`, *optional*): of GLUE, whose own measure comes first.
    """
    found = METRICS[problem_type](np.asarray(logits), np.asarray(labels))
    first = FIRST.get(task or "")
    return {first: found[first], **found} if first in found else found
