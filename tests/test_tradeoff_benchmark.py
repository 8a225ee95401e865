"""The benchmark of accuracy, size and latency: what it measures of each kind of model, prints and draws."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from programs import load

from hf_stompp import StoMPPConfig, binarize, commit, pack
from hf_stompp.model.example_inputs import example_inputs


ROOT = Path(__file__).resolve().parent.parent
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"word{i}" for i in range(59))]


@pytest.fixture
def tradeoff() -> Any:
    pytest.importorskip("sklearn")
    pytest.importorskip("datasets")
    return load(ROOT / "benchmarks" / "tradeoff.py")


@pytest.fixture
def models(tiny_model: Callable, tmp_path: Path) -> dict[str, Path]:
    folders = {name: tmp_path / name for name in ("float", "packed")}
    model = tiny_model("bert", num_labels=2)
    model.save_pretrained(folders["float"])
    binarize(model, StoMPPConfig())
    model(**example_inputs(model))
    pack(commit(model)).save_pretrained(folders["packed"])
    for folder in folders.values():
        transformers.BertTokenizer(vocab={word: row for row, word in enumerate(WORDS)}).save_pretrained(folder)
    return folders


@pytest.fixture
def dataset_dir(tmp_path: Path) -> Path:
    import datasets

    generator = torch.Generator().manual_seed(0)
    (tmp_path / "glue" / "sst2").mkdir(parents=True)
    for split, count in (("train", 60), ("validation", 30)):
        labels = torch.randint(2, (count,), generator=generator).tolist()
        noise = torch.randint(2, 59, (count, 5), generator=generator).tolist()
        # The first word tells the class.
        texts = [" ".join(f"word{i}" for i in [label, *row]) for label, row in zip(labels, noise, strict=True)]
        table = datasets.Dataset.from_dict({"sentence": texts, "label": labels})
        table.to_parquet(tmp_path / "glue" / "sst2" / f"{split}.parquet")
    return tmp_path / "glue"


def test_every_kind_of_model_is_measured_on_the_development_set(
    tradeoff: Any, models: dict[str, Path], dataset_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import datasets

    names = [f"tiny={models['float']}", f"tiny, 1 bit={models['packed']}"]
    files = ["--output", str(tmp_path / "result.json"), "--plot", str(tmp_path / "figure.png")]
    tradeoff.main([*names, "--dataset_dir", str(dataset_dir), "--sentences", "4", "--rounds", "2", *files])
    result = json.loads((tmp_path / "result.json").read_text())
    rows = result["models"]
    assert {name: row["kind"] for name, row in rows.items()} == {
        "tiny": "float",
        "tiny, int8": "int8",
        "tiny, 1 bit": "binary",
        "bag of words": "bag",
    }
    # One sentence at a time, without the program's batches.
    table = datasets.Dataset.from_parquet(str(dataset_dir / "sst2" / "validation.parquet"))
    for name, folder in (("tiny", models["float"]), ("tiny, 1 bit", models["packed"])):
        model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        with torch.no_grad():
            answers = [
                model(**tokenizer(text, return_tensors="pt")).logits.argmax().item() for text in table["sentence"]
            ]
        right = [answer == label for answer, label in zip(answers, table["label"], strict=True)]
        assert rows[name]["accuracy"] == pytest.approx(100 * sum(right) / len(right), abs=0.01)
        assert rows[name]["bytes"] == (folder / "model.safetensors").stat().st_size
    assert rows["bag of words"]["accuracy"] == 100
    assert rows["tiny, int8"]["bytes"] < rows["tiny"]["bytes"]
    assert all(row["milliseconds"] > 0 for row in rows.values())
    assert (tmp_path / "figure.png").stat().st_size > 10_000
    printed = capsys.readouterr().out
    assert "| bag of words | 100.0 |" in printed
    tradeoff.main(["--show", str(tmp_path / "result.json")])
    assert capsys.readouterr().out == printed


def test_median_latency_is_over_texts_and_rounds_and_models_take_turns(tradeoff: Any) -> None:
    asked: list[tuple[str, str]] = []

    def candidate(name: str) -> Any:
        return tradeoff.Candidate("float", lambda texts: asked.append((name, texts[0])) or [0], 0)

    found = tradeoff.latencies({"a": candidate("a"), "b": candidate("b")}, ["x", "y"], rounds=2)
    warm_up = [("a", "x"), ("b", "x")]
    assert asked == [*warm_up, *[(name, text) for text in ("x", "y", "x", "y") for name in ("a", "b")]]
    assert found.keys() == {"a", "b"}


def test_folder_that_does_not_exist_is_named(tradeoff: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        tradeoff.main(["float=nowhere", "--dataset_dir", "."])
    assert "float=nowhere" in capsys.readouterr().err
