"""`hf-stompp train` and `eval` with numbers and with several classes a text."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import scipy.stats
import sklearn.metrics
import torch
import transformers
from huggingface_hub import ModelCard
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from hf_stompp import cli


SHORT = ["--batch_size", "8", "--max_length", "16", "--cpu", "--epochs", "3"]
REGRESSION = ["--problem_type", "regression"]
SEVERAL = ["--problem_type", "multi_label_classification"]
NAMES = ["bad", "long", "sad"]


def table(count: int, seed: int, label: Callable[[list[int]], Any]) -> dict[str, list]:
    """Texts of six words, and what is made of their numbers."""
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(59, (count, 6), generator=generator).tolist()
    return {"text": [" ".join(f"word{i}" for i in row) for row in words], "label": [label(row) for row in words]}


def number(words: list[int]) -> float:
    return words[0] / 10


def classes(words: list[int]) -> list[str]:
    return [name for name, word in zip(NAMES, words, strict=False) if word < 25]


def write(path: Path, columns: dict[str, list]) -> Path:
    rows = datasets.Dataset.from_dict(columns)
    {".csv": rows.to_csv, ".jsonl": rows.to_json, ".parquet": rows.to_parquet}[path.suffix](path)
    return path


@pytest.fixture
def files(tmp_path: Path) -> Callable[..., list[str]]:
    """`files(label, suffix=".jsonl", **columns)`: options that name a training and a validation set."""

    def make(label: Callable[[list[int]], Any], suffix: str = ".jsonl", **columns: list) -> list[str]:
        names = [tmp_path / f"train{suffix}", tmp_path / f"dev{suffix}"]
        for seed, (name, count) in enumerate(zip(names, (64, 32), strict=True)):
            write(name, table(count, seed, label) | columns)
        return ["--train_file", str(names[0]), "--validation_file", str(names[1])]

    return make


@pytest.fixture
def encoder(tiny_model: Callable, saved: Callable) -> str:
    return saved(tiny_model("bert", transformers.AutoModel), "encoder")


@torch.no_grad()
def logits_of(folder: Path, texts: list[str]) -> torch.Tensor:
    """One text at a time, without padding."""
    model, tokenizer = (
        AutoModelForSequenceClassification.from_pretrained(folder),
        AutoTokenizer.from_pretrained(folder),
    )
    answers = [model(**tokenizer(t, truncation=True, max_length=16, return_tensors="pt")).logits for t in texts]
    return torch.cat(answers)


def test_numbers_are_learned_measured_and_packed(
    encoder: str, files: Callable, tmp_path: Path, printed: Callable
) -> None:
    named, output = files(number, ".csv"), tmp_path / "run"
    words = ["train", encoder, output, *named, *SHORT, *REGRESSION, "--float_epochs", 1]

    shown = printed(*words)

    summary = json.loads((output / "summary.json").read_text())
    assert "pearson  spearmanr" in shown and summary["problem_type"] == "regression" and summary["teacher"] == "float"
    config = transformers.AutoConfig.from_pretrained(output / "packed")
    assert (config.num_labels, config.problem_type) == (1, "regression")
    dev = table(32, 1, number)
    answers = logits_of(output / "packed", dev["text"])[:, 0]
    expected = {
        "pearson": scipy.stats.pearsonr(answers, dev["label"])[0],
        "spearmanr": scipy.stats.spearmanr(answers, dev["label"])[0],
        "mse": sklearn.metrics.mean_squared_error(dev["label"], answers),
    }
    evaluated = ["eval", output / "packed", "--file", named[3], "--max_length", 16]
    found = json.loads(printed(*evaluated, "--json"))
    assert {name: found[name] for name in found["measures"]} == pytest.approx(expected, abs=1e-5)
    packed = {name.removeprefix("eval_"): value for name, value in summary["metrics"]["packed"].items()}
    assert {name: packed[name] for name in expected} == pytest.approx(expected, abs=1e-5)
    assert f"pearson {found['pearson']:.4f}, spearmanr {found['spearmanr']:.4f}, mse " in printed(*evaluated)
    assert "| spearmanr |" in ModelCard.load(output / "packed" / "README.md").text


def test_a_regression_is_trained_on_with_its_head(
    tiny_model: Callable, saved: Callable, files: Callable, tmp_path: Path, printed: Callable
) -> None:
    model = tiny_model("bert", num_labels=1)
    words = ["train", saved(model), tmp_path / "run", *files(number), "--json", "--batch_size", 8, *REGRESSION]
    # A learning rate that changes nothing.
    printed(*words, "--method", "float", "--cpu", "--epochs", 1, "--float_learning_rate", 1e-30)
    trained = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "model")
    assert torch.equal(model.classifier.weight, trained.classifier.weight)


def test_stsb_is_a_regression_without_being_asked(encoder: str, tmp_path: Path, printed: Callable) -> None:
    folder = tmp_path / "glue" / "stsb"
    folder.mkdir(parents=True)
    for seed, split in enumerate(("train", "validation")):
        columns = table(16, seed, number)
        pairs = {"sentence1": columns["text"], "sentence2": columns["text"][::-1], "label": columns["label"]}
        write(folder / f"{split}.parquet", pairs)
    words = ["--task", "stsb", "--dataset_dir", tmp_path / "glue", "--method", "float", "--epochs", 1, "--cpu"]
    assert "pearson" in printed("train", encoder, tmp_path / "run", *words)
    assert "pearson" in printed("eval", tmp_path / "run" / "model", *words[:4])


def joined(words: list[int]) -> str:
    return "|".join(classes(words))


@pytest.mark.parametrize(("suffix", "label"), [(".jsonl", classes), (".csv", joined)])
def test_several_classes_are_learned_measured_and_packed(
    encoder: str, files: Callable, tmp_path: Path, printed: Callable, suffix: str, label: Callable
) -> None:
    named, output = files(label, suffix), tmp_path / "run"

    shown = printed("train", encoder, output, *named, *SHORT, *SEVERAL, "--float_epochs", 1)

    summary = json.loads((output / "summary.json").read_text())
    assert "f1_micro  f1_macro  subset_accuracy" in shown and summary["teacher"] == "float"
    config = transformers.AutoConfig.from_pretrained(output / "packed")
    assert list(config.label2id) == NAMES and config.problem_type == "multi_label_classification"
    dev = table(32, 1, classes)
    assert [] in dev["label"]
    answers = logits_of(output / "packed", dev["text"]).sigmoid() > 0.5
    truth = [[name in labels for name in NAMES] for labels in dev["label"]]
    expected = {
        "f1_micro": sklearn.metrics.f1_score(truth, answers, average="micro", zero_division=0.0),
        "f1_macro": sklearn.metrics.f1_score(truth, answers, average="macro", zero_division=0.0),
        "subset_accuracy": sklearn.metrics.accuracy_score(truth, answers),
    }
    evaluated = ["eval", output / "packed", "--file", named[3], "--max_length", 16]
    found = json.loads(printed(*evaluated, "--json"))
    assert {name: found[name] for name in found["measures"]} == pytest.approx(expected)
    assert "accuracy" not in found and f"f1_micro {found['f1_micro']:.4f}, f1_macro " in printed(*evaluated)


def test_class_ids_are_read_from_lists_and_from_text(
    tiny_model: Callable, saved: Callable, tmp_path: Path, printed: Callable
) -> None:
    folder = saved(tiny_model("bert", num_labels=3, problem_type="multi_label_classification"))
    columns = table(32, 0, lambda words: [index for index in range(3) if words[index] < 30])
    text = columns | {"label": ["|".join(map(str, labels)) for labels in columns["label"]]}
    kinds = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.List(datasets.ClassLabel(names=NAMES))}
    )
    datasets.Dataset.from_dict(columns, features=kinds).to_parquet(tmp_path / "named.parquet")
    names = write(tmp_path / "lists.jsonl", columns), write(tmp_path / "text.csv", text), tmp_path / "named.parquet"
    found = [json.loads(printed("eval", folder, "--file", name, "--json")) for name in names]
    assert found[0]["f1_micro"] == found[1]["f1_micro"] == found[2]["f1_micro"] > 0


def test_codes_with_a_leading_zero_are_names_and_no_ids(encoder: str, tmp_path: Path, printed: Callable) -> None:
    codes = table(16, 0, lambda words: "01|10" if words[0] < 30 else "10")
    # A column of bare codes would be read as numbers.
    file = write(tmp_path / "train.jsonl", codes)
    files = ["--train_file", file, "--validation_file", file]
    printed("train", encoder, tmp_path / "run", *files, *SEVERAL, "--method", "float", "--epochs", 1, "--cpu")
    assert list(transformers.AutoConfig.from_pretrained(tmp_path / "run" / "model").label2id) == ["01", "10"]


def test_a_new_head_takes_the_names_that_a_list_of_class_labels_has(
    encoder: str, tmp_path: Path, printed: Callable
) -> None:
    kinds = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.List(datasets.ClassLabel(names=NAMES))}
    )
    file = tmp_path / "train.parquet"
    datasets.Dataset.from_dict(table(16, 0, lambda words: [words[0] % 3]), features=kinds).to_parquet(file)
    files = ["--train_file", file, "--validation_file", file]
    printed("train", encoder, tmp_path / "run", *files, *SEVERAL, "--method", "float", "--epochs", 1, "--cpu")
    assert list(transformers.AutoConfig.from_pretrained(tmp_path / "run" / "model").label2id) == NAMES


class TestBadInput:
    @pytest.mark.parametrize("labels", [[0, 1, 1, 0], [True, False], [0.0, 1.0], ["sad", "sad"]])
    def test_list_with_a_0_or_1_for_each_class(
        self, encoder: str, files: Callable, tmp_path: Path, refused: Callable, labels: list[Any]
    ) -> None:
        message = refused("train", encoder, tmp_path / "run", *files(lambda words: labels), *SEVERAL)
        assert f"has the label {labels!r} in row 0 of column label: a list names the classes" in message

    def test_hidden_labels_are_no_classes(
        self, encoder: str, files: Callable, tmp_path: Path, refused: Callable
    ) -> None:
        assert "no classes, such as -1" in refused("train", encoder, tmp_path / "run", *files(lambda words: -1))

    @pytest.mark.parametrize(
        ("label", "message"),
        [
            ("good", "has the label 'good' in row 0, and a regression takes a number"),
            (float("nan"), "has the label nan in row 0"),
            ([1.5], "has the label [1.5] in row 0"),
            (None, "has no label in column label of row 0"),
        ],
    )
    def test_number_that_is_none(
        self, encoder: str, tmp_path: Path, refused: Callable, label: Any, message: str
    ) -> None:
        file = write(tmp_path / "train.parquet", {"text": ["word1"], "label": [label]})
        words = ["train", encoder, tmp_path / "run", "--train_file", file, "--validation_file", file]
        assert message in refused(*words, *REGRESSION)
        assert not (tmp_path / "run").exists()

    def test_validation_set_is_checked_before_training(
        self, encoder: str, files: Callable, tmp_path: Path, refused: Callable
    ) -> None:
        named = files(number, ".csv")
        write(Path(named[3]), table(8, 0, lambda words: "" if words[0] < 30 else "0.5"))
        assert "dev.csv has no label in column label of row" in refused(
            "train", encoder, tmp_path / "run", *named, *REGRESSION
        )
        assert not (tmp_path / "run").exists()

    @pytest.mark.parametrize(
        ("labels", "message"),
        [
            (["LABEL_0", "LABEL_1|best"], "has the label 'best', which the model does not know"),
            (["0", "1|3"], "has the label 3: it must be one of the model's classes"),
        ],
    )
    def test_unknown_class_at_evaluation(
        self, tiny_model: Callable, saved: Callable, tmp_path: Path, refused: Callable, labels: list[str], message: str
    ) -> None:
        folder = saved(tiny_model("bert", num_labels=3, problem_type="multi_label_classification"))
        file = write(tmp_path / "dev.csv", {"text": ["a", "b"], "label": labels})
        assert message in refused("eval", folder, "--file", file)

    def test_no_class_at_all(self, encoder: str, tmp_path: Path, refused: Callable) -> None:
        file = write(tmp_path / "train.csv", {"text": ["a", "b"], "label": ["", ""]})
        words = ["train", encoder, tmp_path / "run", "--train_file", file, "--validation_file", file, *SEVERAL]
        assert "names no class in any row: check --label_column" in refused(*words)

    def test_lists_without_being_asked(self, encoder: str, files: Callable, tmp_path: Path, refused: Callable) -> None:
        message = refused("train", encoder, tmp_path / "run", *files(classes))
        assert "labels that are no classes, such as [" in message
        assert "multi_label_classification (lists of classes)" in message

    @pytest.mark.parametrize(
        ("fields", "asked", "made_for"),
        [
            ({"num_labels": 3}, REGRESSION, "single_label_classification"),
            ({"num_labels": 3}, SEVERAL, "single_label_classification"),
            ({"num_labels": 1}, [], "regression"),
            ({"num_labels": 3, "problem_type": "multi_label_classification"}, [], "multi_label_classification"),
        ],
    )
    def test_head_for_other_answers(
        self,
        tiny_model: Callable,
        saved: Callable,
        files: Callable,
        tmp_path: Path,
        refused: Callable,
        fields: dict[str, Any],
        asked: list[str],
        made_for: str,
    ) -> None:
        model = saved(tiny_model("bert", **fields))
        message = refused("train", model, tmp_path / "run", *files(lambda words: words[0] % 3), *asked)
        assert f"the head of {model} is for {made_for}, and" in message
        assert f"or give --problem_type {made_for}" in message

    def test_resumed_as_another_problem(
        self, encoder: str, files: Callable, tmp_path: Path, printed: Callable, refused: Callable
    ) -> None:
        named = files(lambda words: words[0] % 3)
        words = ["train", encoder, tmp_path / "run", *named, "--method", "float", "--epochs", 1, "--cpu"]
        printed(*words)
        message = refused(*words, *REGRESSION, "--resume")
        assert "problem_type was 'single_label_classification', is 'regression'" in message

    def test_sensitivity_is_of_one_class_a_text(
        self, tiny_model: Callable, saved: Callable, files: Callable, refused: Callable
    ) -> None:
        message = refused("sensitivity", saved(tiny_model("bert", num_labels=1)), "--file", files(number)[3])
        assert "is for regression, and costs are measured by answers of one class a text" in message

    def test_word_that_is_no_problem_type(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit):
            cli.main(["train", "model", "output", "--problem_type", "ranking"])
        assert "single_label_classification" in capsys.readouterr().err
