"""The measures of GLUE, compared with values computed by hand."""

from __future__ import annotations

import importlib
import math
import sys
import warnings
from pathlib import Path
from types import ModuleType

import pytest


EXAMPLE = Path(__file__).parents[2] / "examples" / "glue"


@pytest.fixture
def glue_metric(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(sys, "path", [str(EXAMPLE), *sys.path])
    return importlib.import_module("glue_metric")


def compute(glue_metric: ModuleType, task: str, predictions: list, references: list) -> dict[str, float]:
    metric = glue_metric.GlueMetric(task, keep_in_memory=True)
    return metric.compute(predictions=predictions, references=references)


@pytest.mark.parametrize("task", ["sst2", "mnli", "mnli_matched", "mnli_mismatched", "qnli", "rte", "wnli"])
def test_accuracy(glue_metric, task):
    assert compute(glue_metric, task, [0, 1, 1, 0], [0, 1, 0, 0]) == {"accuracy": 0.75}


@pytest.mark.parametrize("task", ["mrpc", "qqp"])
def test_accuracy_and_f1(glue_metric, task):
    # Two true positives, one false positive, two false negatives: F1 = 2 * 2 / (2 * 2 + 1 + 2).
    result = compute(glue_metric, task, [1, 1, 1, 0, 0, 0], [1, 1, 0, 1, 1, 0])
    assert result == {"accuracy": pytest.approx(0.5), "f1": pytest.approx(4 / 7)}


def test_matthews_correlation(glue_metric):
    # TP 2, TN 1, FP 1, FN 2: (2 * 1 - 1 * 2) / ... = 0.
    result = compute(glue_metric, "cola", [1, 1, 1, 0, 0, 0], [1, 1, 0, 1, 1, 0])
    assert result == {"matthews_correlation": pytest.approx(0.0)}
    # TP 3, TN 2, FP 1, FN 0: (3 * 2 - 1 * 0) / sqrt(4 * 3 * 3 * 2).
    result = compute(glue_metric, "cola", [1, 1, 1, 1, 0, 0], [1, 1, 1, 0, 0, 0])
    assert result == {"matthews_correlation": pytest.approx(6 / math.sqrt(72))}


def test_correlations(glue_metric):
    # Deviations (-1.5, -0.5, 0.5, 1.5) and (-2, -1, 0, 3): products add up to 8, squares to 5 and to 14.
    result = compute(glue_metric, "stsb", [1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 3.0, 6.0])
    assert result == {"pearson": pytest.approx(8 / math.sqrt(5 * 14)), "spearmanr": pytest.approx(1.0)}


def test_rank_correlation_of_unequal_ranks(glue_metric):
    # Differences of ranks (0, 1, -1, 0): 1 - 6 * 2 / (4 * 15).
    result = compute(glue_metric, "stsb", [1.0, 2.0, 3.0, 4.0], [0.0, 2.5, 2.0, 5.0])
    assert result["spearmanr"] == pytest.approx(0.8)


@pytest.mark.parametrize("task", ["cola", "stsb"])
def test_constant_predictions_correlate_with_nothing(glue_metric, task):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = compute(glue_metric, task, [1, 1, 1, 1], [0, 1, 0, 1])
    assert set(result.values()) == {0.0}


def test_f1_without_any_positive(glue_metric):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert compute(glue_metric, "mrpc", [0, 0], [0, 0]) == {"accuracy": 1.0, "f1": 0.0}


def test_diverged_scores_stay_nan(glue_metric):
    result = compute(glue_metric, "stsb", [math.nan, 1.0, 2.0], [0.0, 1.0, 2.0])
    assert math.isnan(result["pearson"]) and math.isnan(result["spearmanr"])


def test_batches_add_up(glue_metric):
    metric = glue_metric.GlueMetric("sst2", keep_in_memory=True)
    metric.add_batch(predictions=[0, 1], references=[0, 1])
    metric.add_batch(predictions=[1, 1], references=[0, 1])
    assert metric.compute() == {"accuracy": 0.75}


@pytest.mark.parametrize("task", [None, "imdb"])
def test_unknown_task_lists_the_known_ones(glue_metric, task):
    with pytest.raises(ValueError, match="cola.*mrpc.*wnli"):
        glue_metric.GlueMetric(task)
