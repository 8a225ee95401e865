"""`benchmarks/supported.py`: what it says of a model that works, one that is refused and one that fails; the page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from programs import load


ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "supported.json"


@pytest.fixture
def supported() -> Any:
    return load(ROOT / "benchmarks" / "supported.py")


@pytest.mark.parametrize(
    ("family", "head", "name", "result", "reason"),
    [
        ("bert", "token classification", "BertForTokenClassification", "works", ""),
        ("albert", "sequence classification", "AlbertForSequenceClassification", "refused", "shares its layers"),
        ("bert", "audio classification", "NoSuchModel", "not built", "NoSuchModel"),
        ("swin", "image classification", "SwinForImageClassification", "no example", "fails on the example"),
        # An example without an end of the text, which BART looks for, fails in training.
        ("bart", "masked language modeling", "BartForSequenceClassification", "fails", "training: "),
    ],
)
def test_a_case_says_what_became_of_it(
    supported: Any, family: str, head: str, name: str, result: str, reason: str
) -> None:
    found = supported.attempt(family, head, name)
    assert found["result"] == result, found
    assert found["reason"].startswith(reason) or reason in found["reason"]


def test_decoders_are_left_out(supported: Any) -> None:
    assert [family for family in ("bert", "t5", "bart", "vit", "llama", "gpt2") if supported.is_encoder(family)] == [
        "bert", "t5", "bart", "vit"
    ]  # fmt: skip


def test_page_counts_and_gives_each_reason_once(supported: Any) -> None:
    cases: list[dict[str, Any]] = [
        {"family": "bert", "class": "BertModel", "head": "token classification", "result": "works", "reason": ""},
        {
            "family": "albert",
            "class": "AlbertModel",
            "head": "token classification",
            "result": "refused",
            "reason": "shared | layers",
        },
        {
            "family": "albert",
            "class": "AlbertModel",
            "head": "multiple choice",
            "result": "refused",
            "reason": "shared | layers",
        },
        {
            "family": "swin",
            "class": "SwinModel",
            "head": "image classification",
            "result": "no example",
            "reason": "x" * 20 + " y" * 80,
        },
    ]
    result = {"cases": cases, "versions": {"transformers": "5.0"}, "command": "python benchmarks/supported.py"}
    page = supported.page(result)
    assert "1 of 4 pairs of an encoder family and a head work; they are of 1 of 3 families.\n2 are refused" in page
    assert "| bert |  | works |  |  |  |  |  |" in page
    assert "| refused | albert | all | shared \\| layers |" in page
    assert "| no example | swin | all | xxxxxxxxxxxxxxxxxxxx y" in page and " y ... |" in page


def test_the_page_is_that_of_the_result_and_nothing_fails(supported: Any) -> None:
    result = json.loads(RESULT.read_text(encoding="utf-8"))
    assert (ROOT / "docs" / "supported.md").read_text(encoding="utf-8") == supported.page(result)
    assert not [case for case in result["cases"] if case["result"] == "fails"]
    works = sum(case["result"] == "works" for case in result["cases"])
    families = len({case["family"] for case in result["cases"] if case["result"] == "works"})
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"{families} encoder families with {works} heads" in " ".join(readme.split())
