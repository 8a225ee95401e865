"""The program that writes sentences for distillation."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from programs import load


ROOT = Path(__file__).resolve().parent.parent


def test_writes_sentences_of_reviews_and_of_both_columns_of_a_task_once_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets")
    unlabelled_text = load(ROOT / "benchmarks" / "unlabelled_text.py")
    reviews = [f"This is film {number}. Too short. I liked it very much!" for number in range(20)]
    datasets.Dataset.from_dict({"text": reviews}).to_parquet(tmp_path / "reviews.parquet")
    pairs = {
        "sentence1": ["A dog runs fast."] * 2,
        "sentence2": ["A cat  sits\nthere. Its in a development set", "w " * 41],
    }
    (tmp_path / "mrpc").mkdir()
    datasets.Dataset.from_dict(pairs).to_parquet(tmp_path / "mrpc" / "train.parquet")
    known = {"sentence1": ["He is known. It's in a development set!"], "sentence2": ["no"], "label": [0]}
    datasets.Dataset.from_dict(known).to_parquet(tmp_path / "mrpc" / "validation.parquet")
    output = tmp_path / "sentences.txt"
    words = [str(output), "--reviews", str(tmp_path / "reviews.parquet"), "--reviews_sentences", "30"]
    monkeypatch.setattr(sys, "argv", ["unlabelled_text.py", *words, "--dataset_dir", str(tmp_path), "--tasks", "mrpc"])
    unlabelled_text.main()
    lines = output.read_text().splitlines()
    films = [line for line in lines if line.startswith("This is film")]
    # Six reviews, with one sentence that all of them share.
    assert len(films) == 6 and set(lines) - set(films) == {
        "I liked it very much!",
        "A dog runs fast.",
        "A cat sits there.",
    }
    assert len(lines) == len(set(lines))


@pytest.mark.parametrize("names", [("a", "b"), ("sentence1", "sentence2")])
def test_writes_pairs_of_texts_once_each_without_those_of_a_development_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], names: tuple[str, str]
) -> None:
    datasets = pytest.importorskip("datasets")
    unlabelled_text = load(ROOT / "benchmarks" / "unlabelled_text.py")
    # The last four share a text with a development set, or a sentence, spelled in another way.
    pairs = {
        "sentence1": ["one", "two", "one", "four", "Three", "It is a dog. It ran away.", "Not known. He ran off."],
        "sentence2": ["first", "second", "first", " three", "third", "sixth", "seventh"],
    }
    (tmp_path / "mrpc").mkdir()
    datasets.Dataset.from_dict(pairs).to_parquet(tmp_path / "mrpc" / "train.parquet")
    (tmp_path / "stsb").mkdir()
    known = {
        "sentence1": ["Three!", "it is a dog.  It ran away", "He ran off! And she stayed."],
        "sentence2": ["y", "z", "Three"],
        "label": [1.0, 2.0, 3.0],
    }
    datasets.Dataset.from_dict(known).to_parquet(tmp_path / "stsb" / "validation.parquet")
    output = tmp_path / "pairs.jsonl"
    columns = [] if names == ("a", "b") else ["--columns", *names]
    words = ["unlabelled_text.py", str(output), "--dataset_dir", str(tmp_path), "--tasks", "mrpc", *columns]
    monkeypatch.setattr(sys, "argv", words)
    unlabelled_text.main()

    def written() -> list[tuple[str, ...]]:
        lines = map(json.loads, output.read_text().splitlines())
        return sorted(tuple(line[name] for name in names) for line in lines)

    assert written() == [("one", "first"), ("two", "second")]
    told = capsys.readouterr().out
    assert "left out: 4 that" in told and "stsb: 3 of 3" in told

    made = tmp_path / "made.csv"
    made.write_text('sentence1,sentence2\none,first\n"five, or six",fifth\nthree,seventh\n')
    monkeypatch.setattr(sys, "argv", [*words, "--made", str(made)])
    unlabelled_text.main()
    assert written() == [("five, or six", "fifth"), ("one", "first"), ("two", "second")]
    assert "left out: 5 that" in capsys.readouterr().out
