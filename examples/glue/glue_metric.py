"""The measures GLUE reports for each task, as an `evaluate.Metric` that needs no network."""

from __future__ import annotations

from collections.abc import Callable

import datasets
import evaluate
import numpy as np
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from hf_stompp.cli.measures import pearson, spearman


def accuracy(predictions: np.ndarray, references: np.ndarray) -> float:
    """Share of equal entries, in [0, 1]."""
    return float(accuracy_score(references, predictions))


def f1(predictions: np.ndarray, references: np.ndarray) -> float:
    """F1 of class 1, in [0, 1]; 0.0 where class 1 occurs neither in the predictions nor in the references."""
    return float(f1_score(references, predictions, zero_division=0.0))


def matthews_correlation(predictions: np.ndarray, references: np.ndarray) -> float:
    """Matthews correlation, in [-1, 1]; 0.0 where one side is constant."""
    return float(matthews_corrcoef(references, predictions))


Measure = Callable[[np.ndarray, np.ndarray], float]

ACCURACY: dict[str, Measure] = {"accuracy": accuracy}
ACCURACY_AND_F1: dict[str, Measure] = {"accuracy": accuracy, "f1": f1}
CORRELATIONS: dict[str, Measure] = {"pearson": pearson, "spearmanr": spearman}

TASK_MEASURES: dict[str, dict[str, Measure]] = {
    "cola": {"matthews_correlation": matthews_correlation},
    "mnli": ACCURACY,
    "mnli_matched": ACCURACY,
    "mnli_mismatched": ACCURACY,
    "mrpc": ACCURACY_AND_F1,
    "qnli": ACCURACY,
    "qqp": ACCURACY_AND_F1,
    "rte": ACCURACY,
    "sst2": ACCURACY,
    "stsb": CORRELATIONS,
    "wnli": ACCURACY,
}


class GlueMetric(evaluate.Metric):
    """
    The measures of one GLUE task, under the keys that the Hub's `glue` metric uses.

    scikit-learn and SciPy compute them, nothing is downloaded. A correlation whose predictions or references are
    constant is undefined; it is reported as 0.0, where SciPy would give NaN and a warning, so that a model that
    collapsed to one answer scores like a guess and can still be compared. NaN predictions stay NaN.

    Args:
        config_name (`str`):
            The task: `cola` (`matthews_correlation`), `mrpc` and `qqp` (`accuracy`, `f1`), `stsb` (`pearson`,
            `spearmanr`), or `mnli`, `mnli_matched`, `mnli_mismatched`, `qnli`, `rte`, `sst2`, `wnli` (`accuracy`).
        keep_in_memory, num_process, process_id, experiment_id, ...:
            As for [`evaluate.Metric`].

    Raises:
        `ValueError`: if the task is unknown, or if there is nothing to compute from.

    Example:

    ```python
    >>> GlueMetric("mrpc", keep_in_memory=True).compute(predictions=[1, 0, 1, 1], references=[1, 0, 0, 1])
    {'accuracy': 0.75, 'f1': 0.8}
    ```
    """

    def _info(self) -> evaluate.MetricInfo:
        if self.config_name not in TASK_MEASURES:
            raise ValueError(
                f"GlueMetric knows no task {self.config_name!r}. Give one of {', '.join(TASK_MEASURES)} as its first "
                "argument (config_name)."
            )
        kind = "float32" if self.config_name == "stsb" else "int64"
        return evaluate.MetricInfo(
            description="The measures of one GLUE task.",
            citation="Wang et al., GLUE: A Multi-Task Benchmark and Analysis Platform for Natural Language "
            "Understanding, ICLR 2019.",
            inputs_description="predictions, references: one class id (a score for stsb) an example.",
            features=datasets.Features({"predictions": datasets.Value(kind), "references": datasets.Value(kind)}),
            format="numpy",
        )

    @property
    def measures(self) -> list[str]:
        """Keys of what `compute` returns."""
        return list(TASK_MEASURES[self.config_name])

    def _compute(self, predictions: np.ndarray, references: np.ndarray) -> dict[str, float]:
        if len(references) == 0:
            raise ValueError(f"GlueMetric({self.config_name!r}) was given no examples; add some before compute().")
        measures = TASK_MEASURES[self.config_name]
        return {name: measure(predictions, references) for name, measure in measures.items()}
