"""The benchmark of what rounding inputs costs, against answers that are known."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from programs import load

from hf_stompp import StoMPPConfig
from hf_stompp.nn import PackedBinaryLinear


ROOT = Path(__file__).resolve().parent.parent
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"word{i}" for i in range(59))]


def test_it_counts_what_the_rounding_of_inputs_changes(tiny_packed: Callable, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rounding = load(ROOT / "benchmarks" / "rounding.py")
    tokenizer = transformers.BertTokenizer(vocab={word: row for row, word in enumerate(WORDS)})
    model = tiny_packed("bert", StoMPPConfig(mode="bwn"))
    model.save_pretrained(tmp_path / "packed")
    tokenizer.save_pretrained(tmp_path / "packed")
    before = model.bert.embeddings.word_embeddings.weight.detach().clone()
    sentences = ["word1 word2", "word3", "word4 word5 word6 word7 word8", "word9"]
    with torch.no_grad():
        inputs = tokenizer(sentences, padding=True, return_tensors="pt")
        answers = model(**inputs).logits.argmax(-1)
    (tmp_path / "sst2").mkdir()
    labels = [answers[0].item(), answers[1].item(), answers[2].item(), 1 - answers[3].item()]
    datasets.Dataset.from_dict({"sentence": sentences, "label": labels}).to_parquet(
        tmp_path / "sst2" / "validation.parquet"
    )
    output = tmp_path / "result.json"
    rounding.main([str(tmp_path / "packed"), "--dataset_dir", str(tmp_path), "--output", str(output)])

    result = json.loads(output.read_text())
    assert result["examples"] == 4 and result["accuracy"]["8 bits"] == 75.0
    assert list(result["accuracy"]) == ["float inputs", "8 bits", "8 bits, int8 word embeddings"]
    changes = result["largest_change_of_a_logit"]
    assert 0 < changes["8 bits"] < 0.1
    # Rounded by hand.
    table = model.bert.embeddings.word_embeddings.weight
    step = table.detach().abs().amax(1, keepdim=True) / 127
    with torch.no_grad():
        table.copy_((table / step).round() * step)
        rounded = model(**inputs).logits
        for module in model.modules():
            if isinstance(module, PackedBinaryLinear):
                module.activation_bits = None
        table.copy_(before)
        expected = (rounded - model(**inputs).logits).abs().max().item()
    assert changes["8 bits, int8 word embeddings"] == pytest.approx(expected, rel=0.01, abs=1e-5)
