"""XLNet has no limit to the tokens that it reads; its config says so by a number of positions of -1."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers
from programs import load
from transformers import AutoModel, AutoModelForSequenceClassification, XLNetConfig

from hf_stompp import benchmark
from hf_stompp.cli.evaluation import longest


CONFIG = XLNetConfig(vocab_size=64, d_model=32, n_layer=2, n_head=2, d_inner=64, num_labels=2)
SERVER = Path(__file__).resolve().parents[2] / "examples" / "serve" / "server.py"
SHORT = ["--batch_size", "4", "--max_length", "8", "--cpu"]


class Tokenizer:
    model_max_length = 512


@pytest.fixture
def table(tmp_path: Path) -> Path:
    path = tmp_path / "table.csv"
    path.write_text("text,label\n" + "word1 word2,0\nword3 word4 word5,1\n" * 8)
    return path


@pytest.fixture
def classifier(saved: Callable) -> str:
    return saved(AutoModelForSequenceClassification.from_config(CONFIG))


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (CONFIG, 100),
        (transformers.BertConfig(max_position_embeddings=40), 40),
        (transformers.T5Config(), 100),
    ],
    ids=["no limit", "a limit", "not known"],
)
def test_length_is_what_is_asked_for_or_the_number_of_positions(config: Any, expected: int) -> None:
    assert longest(100, config, Tokenizer()) == expected
    assert longest(1000, config, Tokenizer()) == min(512, expected if expected < 100 else 512)


def test_xlnet_is_measured(classifier: str, table: Path, printed: Callable) -> None:
    result = json.loads(printed("eval", classifier, "--file", table, "--max_length", 8, "--json"))

    assert result["max_length"] == 8 and result["examples"] == 16


def test_xlnet_is_trained_and_timed_beside_a_float_one(
    classifier: str, table: Path, printed: Callable, tmp_path: Path
) -> None:
    files = ["--train_file", table, "--validation_file", table]
    printed("train", classifier, tmp_path / "run", *files, *SHORT, "--epochs", 6)

    packed = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "packed")
    assert {row["length"] for row in benchmark.compare_with_float(packed, batches=(1,))} == {128}


def test_xlnet_is_distilled(saved: Callable, printed: Callable, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("word1 word2\nword3 word4 word5\n" * 16)
    encoder = saved(AutoModel.from_config(CONFIG))

    printed("distill", encoder, tmp_path / "run", "--text", tmp_path / "text.txt", *SHORT, "--max_steps", 12)

    assert (tmp_path / "run" / "packed" / "model.safetensors").is_file()


def test_xlnet_is_served(classifier: str) -> None:
    pytest.importorskip("fastapi")
    pytest.importorskip("uvicorn")
    answers = load(SERVER).load(classifier, None, 8)(["word1 word2", "word3 " * 20])

    assert [answer["truncated"] for answer in answers] == [False, True]
