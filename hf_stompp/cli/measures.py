"""What answers are measured by: scikit-learn's and SciPy's measures, by the names that GLUE's metric has."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .examples import TOKENS
from .words import IGNORED, name_spans, spans


try:
    from scipy.stats import pearsonr, spearmanr
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
except ImportError as error:
    raise ValueError(
        "answers are measured by scikit-learn and SciPy, which are not installed: pip install 'hf_stompp[glue]'"
    ) from error


Array = NDArray[Any]


def pearson(predictions: Array, references: Array) -> float:
    """Pearson correlation of arrays of shape `(examples,)`, in [-1, 1]; 0.0 where one side is constant."""
    return 0.0 if one_side_is_constant(predictions, references) else float(pearsonr(predictions, references)[0])


def spearman(predictions: Array, references: Array) -> float:
    """Spearman rank correlation of arrays of shape `(examples,)`, in [-1, 1]; 0.0 where one side is constant."""
    return 0.0 if one_side_is_constant(predictions, references) else float(spearmanr(predictions, references)[0])


def one_side_is_constant(predictions: Array, references: Array) -> bool:
    """Whether a correlation is undefined because one of the two arrays holds a single value."""
    return bool(np.ptp(predictions) == 0 or np.ptp(references) == 0)


def single_label_metrics(logits: Array, labels: Array) -> dict[str, float]:
    """
    Measures of one class an example, from logits of shape `(examples, classes)` and class ids: F1 is that of class 1
    where there are two, and otherwise the mean over the classes that are predicted or there.
    """
    answers, is_binary = logits.argmax(-1), logits.shape[-1] == 2
    f1 = f1_score(labels, answers, average="binary" if is_binary else "macro", zero_division=0.0)
    return {
        "accuracy": float(accuracy_score(labels, answers)),
        "f1" if is_binary else "f1_macro": float(f1),
        "matthews_correlation": float(matthews_corrcoef(labels, answers)),
    }


def multi_label_metrics(logits: Array, labels: Array) -> dict[str, float]:
    """
    Measures of any number of classes an example, each told by a probability above 0.5. Logits and labels, 1 for a
    class that the example has and otherwise 0, have shape `(examples, classes)`.
    """
    answers, truth = logits > 0, labels > 0
    f1 = {
        f"f1_{mean}": float(f1_score(truth, answers, average=mean, zero_division=0.0)) for mean in ("micro", "macro")
    }
    return {**f1, "subset_accuracy": float(accuracy_score(truth, answers))}


def regression_metrics(logits: Array, labels: Array) -> dict[str, float]:
    """Measures of numbers: logits of shape `(examples, 1)` and labels of shape `(examples,)`."""
    answers = logits.reshape(-1)
    return {
        "pearson": pearson(answers, labels),
        "spearmanr": spearman(answers, labels),
        "mse": float(np.square(answers - labels).mean()),
    }


def token_metrics(logits: Array, labels: Array, names: Sequence[str]) -> dict[str, float]:
    """
    Measures of a class a word, from logits of shape `(examples, words, classes)`; the label
    [`~hf_stompp.cli.words.IGNORED`] is passed over. Where classes are tags of spans (`B-PER`), precision, recall and
    F1 are those of whole spans of all kinds together, as the CoNLL shared tasks count them; otherwise F1 is the mean
    over the classes.
    """
    counted = labels != IGNORED
    answers = logits.argmax(-1)
    accuracy = {"accuracy": float(accuracy_score(labels[counted], answers[counted]))}
    if not name_spans(names):
        f1 = f1_score(labels[counted], answers[counted], average="macro", zero_division=0.0)
        return accuracy | {"f1_macro": float(f1)}
    found, true, right = 0, 0, 0
    for row, mask in enumerate(counted):
        mine, theirs = (spans([names[one] for one in ids[row][mask]]) for ids in (answers, labels))
        found, true, right = found + len(mine), true + len(theirs), right + len(mine & theirs)
    return {
        "f1": 2 * right / max(1, found + true),
        "precision": right / max(1, found),
        "recall": right / max(1, true),
        **accuracy,
    }


METRICS: dict[str, Callable[[Array, Array], dict[str, float]]] = {
    "single_label_classification": single_label_metrics,
    "regression": regression_metrics,
    "multi_label_classification": multi_label_metrics,
}
"""Measures of a text, `(logits, labels) -> {name: value}`, by the `problem_type` of a model's config, the first one
first; those of words are [`token_metrics`]."""

FIRST = {"cola": "matthews_correlation"}
"""What GLUE ranks a task by, where that is another measure."""


def metrics_of(
    logits: Any, labels: Any, problem_type: str, task: str | None = None, names: Sequence[str] = ()
) -> dict[str, float]:
    """
    Measures of answers, logits of shape `(examples, outputs)` or `(examples, words, outputs)`, beside labels as a
    model takes them. The measure of a GLUE `task` comes first; words need the `names` of the classes.
    """
    if problem_type == TOKENS:
        return token_metrics(np.asarray(logits), np.asarray(labels), names)
    found = METRICS[problem_type](np.asarray(logits), np.asarray(labels))
    first = FIRST.get(task or "")
    return {first: found[first], **found} if first in found else found
