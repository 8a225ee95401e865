from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import datasets
import pytest
import torch
from transformers import AutoModel, AutoTokenizer, BertForSequenceClassification

from hf_stompp import binarize


NAMES = ["bad", "fair", "good"]


def sentences(count: int, seed: int) -> list[str]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 30, (count,), generator=generator)
    return [
        " ".join(f"word{i}" for i in torch.randint(59, (int(length),), generator=generator).tolist())
        for length in lengths
    ]


@pytest.fixture
def examples() -> dict[str, list]:
    labels = torch.randint(3, (37,), generator=torch.Generator().manual_seed(2)).tolist()
    return {"sentence1": sentences(37, 0), "sentence2": sentences(37, 1), "label": labels}


@pytest.fixture
def classifier(tiny_packed, saved) -> str:
    return saved(tiny_packed("bert"), "classifier")


@pytest.fixture
def named(tiny_packed, saved) -> str:
    """A classifier whose classes have names."""
    model = tiny_packed("bert")
    model.config.id2label, model.config.label2id = dict(enumerate(NAMES)), {n: i for i, n in enumerate(NAMES)}
    return saved(model, "named")


def write(path: Path, columns: dict[str, list]) -> Path:
    """A table as a file of the kind that its suffix says."""
    table = datasets.Dataset.from_dict(columns)
    if path.suffix == ".parquet":
        table.to_parquet(path)
    elif path.suffix in (".json", ".jsonl"):
        table.to_json(path)
    elif path.suffix == ".csv":
        table.to_csv(path)
    else:
        rows = zip(*columns.values(), strict=True)
        path.write_text("\n".join("\t".join(map(str, row)) for row in [tuple(columns), *rows]) + "\n")
    return path


@torch.no_grad()
def correct(model: torch.nn.Module, folder: str, texts: list[list[str]], labels: list[int]) -> int:
    """One example at a time, without padding."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    right = 0
    for *text, label in zip(*texts, labels, strict=True):
        inputs = tokenizer(*text, truncation=True, max_length=40, return_tensors="pt")
        right += int(model(**inputs).logits.argmax()) == label
    return right


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".json", ".jsonl", ".parquet"])
def test_accuracy_is_that_of_one_example_at_a_time(tiny_packed, classifier, examples, printed, tmp_path, suffix):
    file = write(tmp_path / f"dev{suffix}", examples)

    result = json.loads(printed("eval", classifier, "--file", file, "--batch_size", "5", "--json"))

    texts = [examples["sentence1"], examples["sentence2"]]
    expected = correct(tiny_packed("bert"), classifier, texts, examples["label"])
    assert 0 < expected < 37
    assert (result["correct"], result["examples"], result["accuracy"]) == (expected, 37, expected / 37)
    assert result["text_columns"] == ["sentence1", "sentence2"] and result["source"] == str(file)
    assert result["largest_class"] == max(map(examples["label"].count, range(3))) / 37
    assert result["examples_per_second"] == pytest.approx(37 / result["seconds"])
    assert (result["state"], result["committed"], result["max_length"]) == ("packed", None, 40)


@pytest.mark.parametrize("state", ["float", "latent"])
def test_float_and_latent_models_are_measured_as_they_are(
    tiny_model, tiny_committed, examples, printed, saved, tmp_path, state
):
    model = tiny_model("bert") if state == "float" else tiny_committed("bert")
    folder = saved(model)
    file = write(tmp_path / "dev.csv", {"text": examples["sentence1"], "label": examples["label"]})

    result = json.loads(printed("eval", folder, "--file", file, "--json"))

    assert result["correct"] == correct(model, folder, [examples["sentence1"]], examples["label"])
    assert (result["state"], result["committed"]) == (state, None if state == "float" else True)
    assert "mixed" not in printed("eval", folder, "--file", file)


def test_measures_of_a_mixed_network_are_called_that(tiny_model, tiny_inputs, examples, printed, saved, tmp_path):
    model = binarize(tiny_model("bert"))
    model(**tiny_inputs("bert"))
    file = write(tmp_path / "dev.csv", examples)

    assert "not committed yet: what follows is of a mixed network" in printed("eval", saved(model), "--file", file)


def test_summary_tells_accuracy_speed_and_what_was_read(classifier, examples, printed, tmp_path):
    file = write(tmp_path / "dev.csv", examples)
    result = json.loads(printed("eval", classifier, "--file", file, "--json", "--max-length", "7"))
    output = printed("eval", classifier, "--file", file, "--max-length", "7")

    assert f"accuracy {result['accuracy']:.4f}, {result['correct']} of 37 right" in output
    assert f"f1_macro {result['f1_macro']:.4f}, matthews_correlation {result['matthews_correlation']:.4f}" in output
    assert "examples/s in batches of 32 on " in output
    assert f"text from sentence1, sentence2 of {file}, at most 7 tokens" in output


def test_texts_are_cut_at_max_length(classifier, examples, printed, tmp_path, monkeypatch):
    file = write(tmp_path / "dev.csv", examples)
    lengths = []
    forward = BertForSequenceClassification.forward

    def record(self, input_ids, **inputs):
        lengths.append(input_ids.shape[1])
        return forward(self, input_ids, **inputs)

    monkeypatch.setattr(BertForSequenceClassification, "forward", record)
    printed("eval", classifier, "--file", file, "--max_length", "8")

    assert max(lengths) == 8


@pytest.mark.parametrize("kind", ["names", "ids"])
def test_labels_are_names_of_classes_or_ids(tiny_packed, named, examples, printed, tmp_path, kind):
    labels = [NAMES[label] for label in examples["label"]] if kind == "names" else examples["label"]
    file = write(tmp_path / "dev.csv", {"text": examples["sentence1"], "label": labels})

    result = json.loads(printed("eval", named, "--file", file, "--json"))

    assert result["correct"] == correct(tiny_packed("bert"), named, [examples["sentence1"]], examples["label"])


def test_numbers_that_are_names_of_classes_are_names(tiny_packed, saved, examples, printed, tmp_path):
    model = tiny_packed("bert")
    model.config.id2label, model.config.label2id = {0: "1", 1: "2", 2: "3"}, {"1": 0, "2": 1, "3": 2}
    folder = saved(model)
    stars = [label + 1 for label in examples["label"]]
    file = write(tmp_path / "dev.csv", {"text": examples["sentence1"], "label": stars})

    result = json.loads(printed("eval", folder, "--file", file, "--json"))

    assert result["correct"] == correct(model, folder, [examples["sentence1"]], examples["label"])


def test_class_labels_of_a_parquet_file_are_matched_by_name(tiny_packed, named, examples, printed, tmp_path):
    # In another order than the model's.
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=NAMES[::-1])})
    columns = {"text": examples["sentence1"], "label": [2 - label for label in examples["label"]]}
    datasets.Dataset.from_dict(columns, features=features).to_parquet(tmp_path / "dev.parquet")

    result = json.loads(printed("eval", named, "--file", tmp_path / "dev.parquet", "--json"))

    assert result["correct"] == correct(tiny_packed("bert"), named, [examples["sentence1"]], examples["label"])


@pytest.mark.parametrize(
    ("names", "words", "expected"),
    [
        (["premise", "hypothesis", "id"], [], ["premise", "hypothesis"]),
        (["question", "sentence", "id"], [], ["question", "sentence"]),
        (["id", "sentence", "other"], [], ["sentence"]),
        (["title", "body"], [], ["title", "body"]),
        (["id", "title", "body"], ["--text_columns", "body"], ["body"]),
        (["sentence1", "sentence2", "body"], ["--text-columns", "body", "sentence1"], ["body", "sentence1"]),
    ],
)
def test_text_columns_are_found_or_named(classifier, examples, printed, tmp_path, names, words, expected):
    columns = {name: sentences(37, seed) for seed, name in enumerate(names)} | {"label": examples["label"]}
    file = write(tmp_path / "dev.csv", columns)

    assert json.loads(printed("eval", classifier, "--file", file, *words, "--json"))["text_columns"] == expected


@pytest.mark.parametrize("names", [["validation"], ["validation_matched"], ["validation-0-of-2", "validation-1-of-2"]])
def test_task_is_read_from_a_folder_of_parquet_files(classifier, examples, printed, tmp_path, names):
    whole = json.loads(printed("eval", classifier, "--file", write(tmp_path / "dev.csv", examples), "--json"))
    (tmp_path / "glue" / "mrpc").mkdir(parents=True)
    bounds = [0, 20, 37] if len(names) == 2 else [0, 37]
    for name, start, end in zip(names, bounds, bounds[1:], strict=False):
        part = {column: values[start:end] for column, values in examples.items()}
        write(tmp_path / "glue" / "mrpc" / f"{name}.parquet", part)

    result = json.loads(printed("eval", classifier, "--task", "mrpc", "--dataset_dir", tmp_path / "glue", "--json"))

    assert (result["correct"], result["examples"]) == (whole["correct"], 37)


def test_words_that_csv_readers_take_for_missing_stay_words(classifier, examples, printed, tmp_path):
    file = write(tmp_path / "dev.csv", {"text": ["NA", "null", "nan"], "label": [0, 1, 2]})

    assert json.loads(printed("eval", classifier, "--file", file, "--json"))["examples"] == 3


def test_commas_and_quotes_of_a_csv_file_are_part_of_the_text(classifier, printed, tmp_path):
    path = tmp_path / "dev.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([["text", "label"], ['word1, "word2"\nword3', 0], ["word4", 1]])

    assert json.loads(printed("eval", classifier, "--file", path, "--json"))["examples"] == 2


@pytest.mark.parametrize(
    ("columns", "words", "expected"),
    [
        (
            {"text": ["a", "b"], "label": [0, 3]},
            [],
            "has the label 3: it must be one of the model's classes, bad, fair",
        ),
        ({"text": ["a", "b"], "label": [0, -1]}, [], "or an id from 0 to 2; rows without a label must go"),
        ({"text": ["a", "b"], "label": [0.5, 1.0]}, [], "has the label 0.5"),
        ({"text": ["a", "b"], "label": ["bad", "best"]}, [], "has the label 'best', which the model does not know"),
        ({"text": ["a", "b"]}, [], "has no column 'label': name one of text with --label_column"),
        ({"a": ["a"], "b": ["b"], "c": ["c"], "label": [1]}, [], "is not clear: name one or two of a, b, c, label"),
        ({"text": ["a"], "label": [1]}, ["--text_columns", "body"], "has no column body: it has text, label"),
        ({"text": ["a"], "label": [1]}, ["--label_column", "class"], "has no column 'class': name one of text, label"),
        ({"text": ["a", None], "label": [1, 1]}, [], "has no text in column text of row 1: fill it, or take the row"),
        ({"text": [1, 2], "label": [1, 1]}, [], "has no text in column text of row 0"),
        ({"text": [["a", "b"]], "label": [[1, 1]]}, [], "has lists in column text: join the words"),
        (
            {"text": ["a"], "b": ["b"], "label": [1]},
            ["--text_columns", "text", "b", "text"],
            "--text_columns takes one or two columns",
        ),
    ],
)
def test_table_that_does_not_fit_is_refused(named, refused, tmp_path, columns, words, expected):
    file = write(tmp_path / "dev.parquet", columns)

    assert expected in refused("eval", named, "--file", file, *words)


def test_file_that_cannot_be_read_is_refused(classifier, refused, tmp_path):
    (tmp_path / "dev.parquet").write_text("no table")
    (tmp_path / "empty.csv").write_text("")
    (tmp_path / "header.csv").write_text("text,label\n")
    (tmp_path / "dev.txt").write_text("a")

    assert "is no valid parquet file" in refused("eval", classifier, "--file", tmp_path / "dev.parquet")
    assert "holds no examples" in refused("eval", classifier, "--file", tmp_path / "empty.csv")
    assert "holds no examples" in refused("eval", classifier, "--file", tmp_path / "header.csv")
    assert "ends in .csv, .tsv, .json" in refused("eval", classifier, "--file", tmp_path / "dev.txt")
    assert "there is no file" in refused("eval", classifier, "--file", tmp_path / "missing.csv")
    assert "holds no validation.parquet: check --dataset_dir" in refused(
        "eval", classifier, "--task", "sst2", "--dataset_dir", tmp_path
    )


def test_missing_package_is_named_with_the_extra_that_brings_it(classifier, examples, refused, tmp_path, monkeypatch):
    file = write(tmp_path / "dev.csv", examples)
    monkeypatch.setitem(sys.modules, "datasets", None)

    assert "pip install 'hf_stompp[glue]'" in refused("eval", classifier, "--file", file)


def test_model_that_is_no_classifier_is_refused(tiny_model, saved, refused, examples, tmp_path):
    file = write(tmp_path / "dev.csv", examples)

    encoder = saved(tiny_model("bert", AutoModel), "encoder")
    assert "is a BertModel, and eval measures classifiers" in refused("eval", encoder, "--file", file)
    numbers = saved(tiny_model("bert", num_labels=3, problem_type="regression"), "numbers")
    assert "predicts 3 numbers a text, and one is" in refused("eval", numbers, "--file", file)


def test_model_without_its_head_or_tokenizer_is_refused(tiny_packed, saved, classifier, refused, examples, tmp_path):
    file = write(tmp_path / "dev.csv", examples)

    bare = saved(tiny_packed("bert"), "bare", tokenizer=False)
    assert "has no tokenizer: copy tokenizer.json" in refused("eval", bare, "--file", file)
    path = Path(classifier, "config.json")
    encoder = AutoModel.from_pretrained(classifier)
    config = path.read_text()
    encoder.save_pretrained(classifier)
    path.write_text(
        config.replace('"name": "bert.', '"name": "')
        .replace('"unit": "bert.', '"unit": "')
        .replace('"input": "bert.', '"input": "')
    )
    assert "lacks classifier.bias and 1 more" in refused("eval", classifier, "--file", file)


def test_unknown_device_is_refused(classifier, examples, refused, tmp_path):
    file = write(tmp_path / "dev.csv", examples)

    assert "device" in refused("eval", classifier, "--file", file, "--device", "nothing")
