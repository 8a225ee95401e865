from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from programs import load
from scipy.stats import spearmanr
from transformers import AutoModel, AutoTokenizer, BertTokenizer


SCRIPT = Path(__file__).parent.parent / "benchmarks" / "sentence_encoder.py"
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"word{i}" for i in range(59))]
FIRST = ["word1 word2", "word3 word4 word5", "word6", "word7 word8 word9 word10", "word11 word12"]
SECOND = ["word2 word1", "word3", "word40 word41", "word7 word8 word9", "word50"]
LABELS = [5.0, 2.5, 0.0, 4.0, 1.0]


def write_split(folder: Path, split: str, labels: list[float]) -> None:
    rows = {"sentence1": FIRST, "sentence2": SECOND, "label": labels}
    datasets.Dataset.from_dict(rows).to_parquet(folder / "stsb" / f"{split}.parquet")


def expected(folder: Path) -> float:
    model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    similarities = []
    for pair in zip(FIRST, SECOND, strict=True):
        with torch.no_grad():
            means = [model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0) for text in pair]
        similarities.append(torch.nn.functional.cosine_similarity(*means, dim=0).item())
    return 100 * float(spearmanr(similarities, LABELS).statistic)


@pytest.mark.slow
def test_correlation_is_that_of_the_labels_that_are_known(
    tiny_model: Callable, tiny_packed: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS))
    models = {"float": tiny_model("bert", AutoModel), "packed": tiny_packed("bert", auto_class=AutoModel)}
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
        BertTokenizer(vocab=str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / name)
    write_split(tmp_path, "test", [-1.0] * 5)
    write_split(tmp_path, "validation", LABELS)
    output = tmp_path / "results.jsonl"
    output.write_text("{}\n")
    words = ["--model", tmp_path / "packed", "--dataset_dir", tmp_path, "--float", tmp_path / "float"]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, words), "--output", str(output)])
    capsys.readouterr()
    load(SCRIPT).main()
    printed = capsys.readouterr().out

    line = json.loads(printed)
    assert output.read_text().splitlines() == ["{}", printed.rstrip("\n")]
    assert line["split"] == "validation" and line["mode"] == "bnn"
    for name in ("float", "packed"):
        assert line[name]["spearman"] == pytest.approx(expected(tmp_path / name), abs=1e-6)
        assert line["bytes"][name] == (tmp_path / name / "model.safetensors").stat().st_size
    assert line["kept"] == pytest.approx(100 * line["packed"]["spearman"] / line["float"]["spearman"])
