"""`hf-stompp train` and `eval` with a class a word (token classification)."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import sklearn.metrics
import torch
import transformers
from huggingface_hub import ModelCard
from transformers import AutoModelForTokenClassification, AutoTokenizer

from hf_stompp.cli.measures import token_metrics
from hf_stompp.cli.words import first_tokens, name_spans, spans, token_labels, word_logits


ASKED = ["--problem_type", "token_classification", "--label_column", "tags"]
SHORT = ["--batch_size", "8", "--max_length", "16", "--cpu", "--epochs", "3"]
TAGS = ["B-ODD", "I-ODD", "O"]


def table(count: int, seed: int) -> dict[str, list]:
    """Texts of one to six words; odd numbers behind each other are tagged together. `word7word8` has two tokens."""
    generator = torch.Generator().manual_seed(seed)
    tokens, tags = [], []
    for _ in range(count):
        numbers = torch.randint(59, (int(torch.randint(1, 7, (), generator=generator)),), generator=generator).tolist()
        tokens.append([f"word{i}" + (",word0" if i % 5 == 0 else "") for i in numbers])
        odd = [False, *(i % 2 == 1 for i in numbers)]
        tags.append([("I-ODD" if odd[i] else "B-ODD") if odd[i + 1] else "O" for i in range(len(numbers))])
    return {"tokens": tokens, "tags": tags}


def write(path: Path, columns: dict[str, list]) -> Path:
    if path.suffix == ".csv":
        columns = {name: [" ".join(row) for row in rows] for name, rows in columns.items()}
    rows = datasets.Dataset.from_dict(columns)
    {".csv": rows.to_csv, ".jsonl": rows.to_json, ".parquet": rows.to_parquet}[path.suffix](path)
    return path


@pytest.fixture
def files(tmp_path: Path) -> Callable[..., list[str]]:
    """`files(*suffixes)`: options that name a training and a validation set."""

    def make(train: str = ".jsonl", dev: str = ".jsonl") -> list[str]:
        names = [write(tmp_path / f"train{train}", table(48, 0)), write(tmp_path / f"dev{dev}", table(48, 1))]
        return ["--train_file", str(names[0]), "--validation_file", str(names[1])]

    return make


@pytest.fixture
def encoder(tiny_model: Callable, saved: Callable) -> str:
    return saved(tiny_model("bert", transformers.AutoModel), "encoder")


@pytest.fixture
def tagger(tiny_model: Callable, saved: Callable) -> str:
    names = {"id2label": dict(enumerate(TAGS)), "label2id": {tag: i for i, tag in enumerate(TAGS)}}
    return saved(tiny_model("bert", AutoModelForTokenClassification, num_labels=3, **names), "tagger")


@torch.no_grad()
def answers(folder: Path | str, texts: list[list[str]]) -> list[list[str]]:
    """One text at a time, without padding: what the first token of each word is tagged."""
    model = AutoModelForTokenClassification.from_pretrained(folder)
    tokenizer, found = AutoTokenizer.from_pretrained(folder), []
    for words in texts:
        encoded = tokenizer(words, is_split_into_words=True, truncation=True, max_length=16, return_tensors="pt")
        ids, of_word = model(**encoded).logits[0].argmax(-1).tolist(), encoded.word_ids()
        found.append([model.config.id2label[ids[of_word.index(word)]] for word in range(len(words))])
    return found


def pieces(tags: list[str]) -> set[tuple[int, int, str]]:
    """Spans of well-formed B- and I- tags of one kind, by a regular expression over their first letters."""
    letters = "".join(tag[0] for tag in tags)
    return {(found.start(), found.end() - 1, "ODD") for found in re.finditer("BI*", letters)}


@pytest.mark.slow
def test_tags_are_learned_measured_and_packed_whatever_the_format_of_a_file(
    encoder: str, files: Callable, tmp_path: Path, printed: Callable
) -> None:
    named, output = files(".csv", ".parquet"), tmp_path / "run"

    shown = printed("train", encoder, output, *named, *ASKED, *SHORT, "--float_epochs", 8, "--learning_rate", 3e-3)

    summary = json.loads((output / "summary.json").read_text())
    assert summary["teacher"] == "float" and shown.split()[:4] == ["f1", "precision", "recall", "accuracy"]
    config = transformers.AutoConfig.from_pretrained(output / "packed")
    assert config.architectures == ["BertForTokenClassification"] and list(config.label2id) == TAGS
    dev = table(48, 1)
    truth, tagged = list(chain(*dev["tags"])), list(chain(*answers(output / "packed", dev["tokens"])))
    evaluated = ["eval", output / "packed", "--max_length", 16, "--label_column", "tags", "--file"]
    files_of_dev = [write(tmp_path / f"dev{suffix}", dev) for suffix in (".parquet", ".jsonl", ".csv")]
    found, *others = (json.loads(printed(*evaluated, file, "--json")) for file in files_of_dev)
    told = (*found["measures"], "words", "words_left_out", "examples")
    assert all(other[name] == found[name] for other in others for name in told)
    assert found["accuracy"] == pytest.approx(sklearn.metrics.accuracy_score(truth, tagged))
    assert (found["words"], found["words_left_out"], found["examples"]) == (len(truth), 0, 48)
    packed = {name.removeprefix("eval_"): value for name, value in summary["metrics"]["packed"].items()}
    assert {name: packed[name] for name in found["measures"]} == pytest.approx(
        {name: found[name] for name in found["measures"]}
    )
    assert f"{found['correct']} of {found['words']} words right" in printed(*evaluated, files_of_dev[0])
    card = ModelCard.load(output / "packed" / "README.md")
    assert card.data.pipeline_tag == "token-classification" and "| precision |" in card.text


def test_a_named_teacher_is_a_token_classifier(
    encoder: str, files: Callable, tmp_path: Path, printed: Callable
) -> None:
    named = files()
    printed("train", encoder, tmp_path / "float", *named, *ASKED, *SHORT, "--method", "float")
    teacher = tmp_path / "float" / "model"
    printed("train", encoder, tmp_path / "run", *named, *ASKED, *SHORT, "--teacher", teacher)
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["teacher"] == str(teacher)


def test_class_ids_are_read_by_the_names_in_the_file(tagger: str, tmp_path: Path, printed: Callable) -> None:
    columns, names = table(16, 0), TAGS[::-1]
    kinds = datasets.Features(
        {
            "tokens": datasets.List(datasets.Value("string")),
            "tags": datasets.List(datasets.ClassLabel(names=names)),
        }
    )
    ids = columns | {"tags": [[names.index(tag) for tag in tags] for tags in columns["tags"]]}
    datasets.Dataset.from_dict(ids, features=kinds).to_parquet(tmp_path / "ids.parquet")
    files = write(tmp_path / "names.jsonl", columns), tmp_path / "ids.parquet"
    found = [json.loads(printed("eval", tagger, "--file", file, *ASKED[2:], "--json")) for file in files]
    assert found[0]["correct"] == found[1]["correct"] > 0


def test_a_number_is_the_label_of_a_single_word(tagger: str, tmp_path: Path, printed: Callable) -> None:
    # So a csv reader takes a column of ids where no text has a second word.
    datasets.Dataset.from_dict({"tokens": ["word1", "word2"], "tags": [2, 0]}).to_csv(tmp_path / "dev.csv")
    found = json.loads(printed("eval", tagger, "--file", tmp_path / "dev.csv", *ASKED[2:], "--json"))
    assert found["words"] == 2


def test_words_beyond_the_last_token_are_told_and_not_measured(tagger: str, tmp_path: Path, printed: Callable) -> None:
    columns = {"tokens": [["word1"] * 9, ["word1"] * 2], "tags": [["O"] * 9, ["O"] * 2]}
    words = ["eval", tagger, "--file", write(tmp_path / "dev.jsonl", columns), *ASKED[2:], "--max_length", 6]
    found = json.loads(printed(*words, "--json"))
    # Four of nine: the other two tokens are [CLS] and [SEP].
    assert (found["words"], found["words_left_out"]) == (4 + 2, 5)
    assert "; 5 words beyond are not measured" in printed(*words)


class TestSpans:
    @pytest.mark.parametrize(
        ("tags", "expected"),
        [
            ([], set()),
            (["O", "O"], set()),
            (["B-PER", "I-PER", "O", "B-LOC"], {(0, 1, "PER"), (3, 3, "LOC")}),
            (["B-PER", "B-PER"], {(0, 0, "PER"), (1, 1, "PER")}),
            (["O", "I-PER", "I-PER"], {(1, 2, "PER")}),
            (["B-PER", "I-LOC"], {(0, 0, "PER"), (1, 1, "LOC")}),
            (["B-A", "E-A", "I-A", "S-A", "I-A"], {(0, 1, "A"), (2, 2, "A"), (3, 3, "A"), (4, 4, "A")}),
            (["B-LOC-city", "I-LOC-city"], {(0, 1, "LOC-city")}),
        ],
    )
    def test_are_those_of_the_conll_tasks(self, tags: list[str], expected: set) -> None:
        assert spans(tags) == expected

    def test_of_many_texts_are_those_of_a_regular_expression(self) -> None:
        tags = table(200, 3)["tags"]
        assert sum(map(len, tags)) > 500
        assert all(spans(row) == pieces(row) for row in tags)

    @pytest.mark.parametrize(
        ("classes", "expected"),
        [(TAGS, True), (["O", "S-A", "E-A"], True), (["O"], False), (["B-A"], False), (["NOUN", "VERB", "O"], False)],
    )
    def test_are_named_by_tags_with_a_prefix(self, classes: list[str], expected: bool) -> None:
        assert name_spans(classes) is expected


class TestMeasures:
    NAMES = ("O", "B-A", "I-A")

    def test_of_spans_by_hand(self) -> None:
        truth = np.array([[1, 2, 0, 1], [0, 1, -100, 2], [0, 0, 0, -100]])
        answers = np.array([[1, 2, 0, 0], [0, 1, 0, 2], [1, 0, 1, 0]])
        # True: (0, 1), (3, 3); (1, 2) of the second text, where -100 is passed over. Found: (0, 1); (1, 2); two wrong.
        found = token_metrics(np.eye(3)[answers], truth, self.NAMES)
        assert found == pytest.approx({"f1": 4 / 7, "precision": 1 / 2, "recall": 2 / 3, "accuracy": 7 / 10})

    def test_of_nothing_found_are_0(self) -> None:
        found = token_metrics(np.eye(3)[np.zeros((1, 2), int)], np.zeros((1, 2), int), self.NAMES)
        assert found == {"f1": 0.0, "precision": 0.0, "recall": 0.0, "accuracy": 1.0}

    def test_of_other_classes_are_a_mean_over_them(self) -> None:
        truth, answers = np.array([[0, 1, 2, -100]]), np.array([[0, 1, 1, 0]])
        found = token_metrics(np.eye(3)[answers], truth, ["NOUN", "VERB", "ADJ"])
        # Of NOUN 1, of VERB 2 / 3, of ADJ 0.
        assert found == pytest.approx({"accuracy": 2 / 3, "f1_macro": 5 / 9})


class TestTokens:
    WORDS = (None, 0, 0, 1, 3, 3, None, None)

    def test_first_one_answers_for_its_word(self) -> None:
        assert first_tokens(self.WORDS) == {0: 1, 1: 3, 3: 4}
        assert token_labels(self.WORDS, [5, 6, 7, 8]) == [-100, 5, -100, 6, 8, -100, -100, -100]

    def test_word_without_one_has_no_logits(self) -> None:
        logits = torch.arange(16.0).reshape(8, 2)
        found = word_logits(logits, self.WORDS, 5)
        assert torch.equal(found[[0, 1, 3]], logits[[1, 3, 4]]) and found[[2, 4]].isneginf().all()


class TestBadInput:
    @pytest.mark.parametrize(
        ("words", "tags", "message"),
        [
            (["a", "b"], ["O"], "has 2 words in column tokens of row 1 and 1 labels in column tags: each word needs"),
            (["a"], ["O", "O"], "has 1 words in column tokens of row 1 and 2 labels"),
            (["a", "b"], ["O", None], "has 2 words in column tokens of row 1 and 1 labels"),
            ([], [], "has no list of words in column tokens of row 1"),
            (None, ["O"], "has no list of words in column tokens of row 1"),
            (["a", None], ["O", "O"], "has no list of words in column tokens of row 1"),
            (["a"], None, "has 1 words in column tokens of row 1 and 0 labels"),
        ],
    )
    def test_row_that_does_not_fit(
        self, encoder: str, tmp_path: Path, refused: Callable, words: Any, tags: Any, message: str
    ) -> None:
        file = write(tmp_path / "train.parquet", {"tokens": [["a"], words], "tags": [["O"], tags]})
        said = refused("train", encoder, tmp_path / "run", "--train_file", file, "--validation_file", file, *ASKED)
        assert f"train.parquet {message}" in said
        assert not (tmp_path / "run").exists()

    def test_tag_that_the_model_does_not_know(self, tagger: str, tmp_path: Path, refused: Callable) -> None:
        file = write(tmp_path / "dev.jsonl", {"tokens": [["a", "b"]], "tags": [["O", "B-EVEN"]]})
        message = refused("eval", tagger, "--file", file, *ASKED[2:])
        assert "has the label 'B-EVEN', which the model does not know: its classes are B-ODD, I-ODD, O" in message

    def test_words_are_in_one_column_that_is_known_or_named(
        self, encoder: str, tmp_path: Path, refused: Callable
    ) -> None:
        file = write(tmp_path / "train.jsonl", {"said": [["a"]], "pos": [["b"]], "tags": [["O"]]})
        words = ["train", encoder, tmp_path / "run", "--train_file", file, "--validation_file", file, *ASKED]
        assert "is not clear: name one of said, pos, tags with --text_columns" in refused(*words)
        message = refused(*words, "--text_columns", "said", "pos")
        assert "takes one column of words, got 2: choose one" in message

    def test_lists_without_being_asked(self, encoder: str, files: Callable, tmp_path: Path, refused: Callable) -> None:
        words = ["train", encoder, tmp_path / "run", *files(), *ASKED[2:], "--text_columns", "tokens"]
        message = refused(*words)
        assert "has lists in column tokens" in message and "--problem_type token_classification" in message

    def test_head_for_other_answers(
        self, tagger: str, tiny_model: Callable, saved: Callable, files: Callable, tmp_path: Path, refused: Callable
    ) -> None:
        message = refused("train", tagger, tmp_path / "run", *files(), "--label_column", "tags", "--text_columns", "a")
        assert "has no column a" in message
        classifier = saved(tiny_model("bert"), "classifier")
        message = refused("train", classifier, tmp_path / "run", *files(), *ASKED)
        assert "is for single_label_classification, and token_classification is to be trained" in message
        text = tmp_path / "text.jsonl"
        datasets.Dataset.from_dict({"text": ["a", "b"], "label": [0, 1]}).to_json(text)
        message = refused("train", tagger, tmp_path / "run", "--train_file", text, "--validation_file", text)
        assert "is for token_classification" in message and "or give --problem_type token_classification" in message

    def test_sensitivity_is_of_texts(self, tagger: str, files: Callable, refused: Callable) -> None:
        message = refused("sensitivity", tagger, "--file", files()[3], *ASKED[2:])
        assert "is for token_classification, and costs are measured by answers of one class a text" in message
