"""The command's measures against scikit-learn and SciPy, and by hand."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
import sklearn.metrics as reference

from hf_stompp.cli.measures import METRICS, metrics_of


@pytest.mark.parametrize("classes", [2, 3, 7])
def test_one_class_an_example_is_measured_as_by_scikit_learn(classes: int) -> None:
    generator = np.random.default_rng(classes)
    labels = generator.integers(classes, size=200)
    # Right more often than by chance.
    logits = generator.normal(size=(200, classes)) + np.eye(classes)[labels]
    answers = logits.argmax(-1)
    f1 = {"f1": reference.f1_score(labels, answers)} if classes == 2 else {}
    f1_macro = {"f1_macro": reference.f1_score(labels, answers, average="macro")} if classes > 2 else {}
    assert metrics_of(logits, labels, "single_label_classification") == pytest.approx(
        {
            "accuracy": reference.accuracy_score(labels, answers),
            **f1,
            **f1_macro,
            "matthews_correlation": reference.matthews_corrcoef(labels, answers),
        }
    )


def test_two_classes_by_hand() -> None:
    # Answers 1 0 1 1: two of class 1 found, one said too often, none missed.
    logits = np.array([[0, 1], [1, 0], [0, 1], [0, 1]])
    found = metrics_of(logits, np.array([1, 0, 0, 1]), "single_label_classification")
    assert found == pytest.approx({"accuracy": 0.75, "f1": 0.8, "matthews_correlation": 1 / 3**0.5})


def test_a_class_that_nobody_names_does_not_count_in_the_mean() -> None:
    logits, labels = np.eye(4)[[0, 1, 1, 0]], np.array([0, 1, 0, 0])
    expected = reference.f1_score(labels, logits.argmax(-1), average="macro")
    assert metrics_of(logits, labels, "single_label_classification")["f1_macro"] == pytest.approx(expected)


def test_always_the_same_answer_correlates_with_nothing() -> None:
    logits, labels = np.array([[1, 0]] * 4), np.array([0, 1, 1, 0])
    found = metrics_of(logits, labels, "single_label_classification")
    assert found == {"accuracy": 0.5, "f1": 0.0, "matthews_correlation": 0.0}
    for answers, truth in ([2.0] * 3, [1.0, 2.0, 3.0]), ([1.0, 2.0, 3.0], [2.0] * 3):
        found = metrics_of(np.array(answers)[:, None], np.array(truth), "regression")
        assert found == {"pearson": 0.0, "spearmanr": 0.0, "mse": pytest.approx(2 / 3)}


def test_correlation_of_many_examples_does_not_overflow() -> None:
    labels = np.arange(300_000) % 2
    found = metrics_of(np.eye(2)[labels], labels, "single_label_classification")
    assert found["matthews_correlation"] == pytest.approx(1.0)


def test_numbers_by_hand() -> None:
    # Ranks 1, 2.5, 2.5, 4 and 1, 2, 3, 4: equal values share the mean of their places.
    found = metrics_of(np.array([[0.0], [1.0], [1.0], [5.0]]), np.array([0.0, 1.0, 2.0, 3.0]), "regression")
    assert found == pytest.approx({"pearson": 7.5 / (14.75 * 5) ** 0.5, "spearmanr": 0.9**0.5, "mse": 1.25})


def test_numbers_are_measured_as_by_scipy() -> None:
    generator = np.random.default_rng(0)
    # Rounded, so that some are equal.
    labels = generator.uniform(0, 5, size=200).round(1).astype(np.float32)
    logits = (labels + generator.normal(size=200)).round(1).astype(np.float32)
    assert metrics_of(logits[:, None], labels, "regression") == pytest.approx(
        {
            "pearson": scipy.stats.pearsonr(logits, labels)[0],
            "spearmanr": scipy.stats.spearmanr(logits, labels)[0],
            "mse": reference.mean_squared_error(labels, logits),
        }
    )


def test_a_model_that_puts_out_no_numbers_gets_no_correlation() -> None:
    found = metrics_of(np.array([[np.nan], [1.0], [2.0]]), np.array([0.0, 1.0, 2.0]), "regression")
    assert all(np.isnan(value) for value in found.values())


def test_several_classes_an_example_are_measured_as_by_scikit_learn() -> None:
    generator = np.random.default_rng(0)
    labels = (generator.random((100, 5)) < 0.3).astype(np.float32)
    # Of the last class there is neither an example nor an answer.
    labels[:, -1] = 0
    logits = labels * 2 - 1 + generator.normal(size=labels.shape)
    logits[:, -1] = -1
    answers = 1 / (1 + np.exp(-logits)) > 0.5
    assert metrics_of(logits, labels, "multi_label_classification") == pytest.approx(
        {
            "f1_micro": reference.f1_score(labels, answers, average="micro"),
            "f1_macro": reference.f1_score(labels, answers, average="macro", zero_division=0.0),
            "subset_accuracy": reference.accuracy_score(labels, answers),
        }
    )


def test_several_classes_by_hand() -> None:
    logits = np.array([[1, 1, -1], [-1, 1, 0]])
    found = metrics_of(logits, np.array([[1, 0, 0], [0, 1, 0]]), "multi_label_classification")
    assert found == pytest.approx({"f1_micro": 0.8, "f1_macro": (1 + 2 / 3 + 0) / 3, "subset_accuracy": 0.5})


def test_the_measure_of_the_task_comes_first() -> None:
    logits, labels = np.eye(2), np.array([0, 1])
    assert next(iter(metrics_of(logits, labels, "single_label_classification", "cola"))) == "matthews_correlation"
    assert next(iter(metrics_of(logits, labels, "single_label_classification", "mrpc"))) == "accuracy"
    assert list(METRICS["regression"](np.ones((2, 1)), np.ones(2)))[:2] == ["pearson", "spearmanr"]
