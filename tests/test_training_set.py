"""Labels of a training set: what is refused before the first step, and what is left alone."""

from __future__ import annotations

from typing import Any

import pytest
from datasets import Dataset
from transformers import (
    BertConfig,
    BertForMultipleChoice,
    BertForNextSentencePrediction,
    BertForSequenceClassification,
    BertModel,
    PreTrainedModel,
)

from hf_stompp.training.training_set import check_labels, check_training_set


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 1, 2], r"row 2 of train_dataset has labels=2, the model has 2 classes \(0 to 1\)"),
        ([0, -1, 1], r"row 1 of train_dataset has labels=-1"),
        ([0, None, 1], r"row 1 of train_dataset has no labels"),
        (["no", "yes"], r"holds texts, not numbers of classes: train_dataset.class_encode_column\('labels'\)"),
    ],
)
def test_a_label_that_is_no_class_is_refused(labels: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_labels(Dataset.from_dict({"labels": labels}), 2)


@pytest.mark.parametrize(
    "labels",
    [[0, 1, -100], [[0, 1, 5], [7]], [[0.0, 1.0], [1.0, 1.0]], [0.5, 3.5]],
    ids=["classes", "a label a token", "several labels", "numbers"],
)
def test_other_labels_are_left_alone(labels: list[Any]) -> None:
    check_labels(Dataset.from_dict({"labels": labels}), 2)
    check_labels(Dataset.from_dict({"text": ["a"]}), 2)


def test_no_row_is_transformed_to_read_its_label() -> None:
    dataset = Dataset.from_dict({"image": [1, 2], "label": [0, 3]})

    def fail(rows: Any) -> Any:
        raise AssertionError("an image was decoded")

    dataset.set_transform(fail)
    with pytest.raises(ValueError, match="row 1 of train_dataset has label=3"):
        check_labels(dataset, 2)


OUT_OF_RANGE = Dataset.from_dict({"labels": [0, 7]})


def model(head: type[PreTrainedModel] = BertForSequenceClassification, **settings: Any) -> PreTrainedModel:
    sizes = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=8)
    return head(BertConfig(**sizes, **settings))


def test_labels_are_checked_where_they_are_classes_that_the_model_learns() -> None:
    with pytest.raises(ValueError, match="row 1 of train_dataset has labels=7"):
        check_training_set(OUT_OF_RANGE, model())
    check_training_set(OUT_OF_RANGE, model(), answered=True)
    for head in (BertForMultipleChoice, BertForNextSentencePrediction, BertModel):
        check_training_set(OUT_OF_RANGE, model(head))
    check_training_set(OUT_OF_RANGE, model(problem_type="multi_label_classification"))
    check_training_set(OUT_OF_RANGE, model(num_labels=1))


def test_a_training_set_without_rows_is_refused_and_a_stream_is_not_read() -> None:
    with pytest.raises(ValueError, match="train_dataset is empty"):
        check_training_set(OUT_OF_RANGE.select([]), model())
    check_training_set(OUT_OF_RANGE.to_iterable_dataset(), model())
    check_training_set(None, model())
