from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModel

from hf_stompp.training.distillation import pooled
from hf_stompp.training.sentence_encoder import copy_modules, embed, modules_folder, pooling_of


WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"word{i}" for i in range(59))]


def write_modules(folder: Path, pooling: Any, name: str = "sentence_transformers.models.Pooling") -> Path:
    (folder / "1_Pooling").mkdir(parents=True)
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    entries = [("", "sentence_transformers.models.Transformer"), ("1_Pooling", name)]
    modules = [{"idx": i, "name": str(i), "path": path, "type": kind} for i, (path, kind) in enumerate(entries)]
    (folder / "modules.json").write_text(json.dumps(modules))
    return folder


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}, "mean"),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "cls"),
        ({"pooling_mode": "mean"}, "mean"),
        ({"pooling_mode": ["cls"]}, "cls"),
    ],
    ids=str,
)
def test_pooling_is_read_as_every_version_of_sentence_transformers_writes_it(
    tmp_path: Path, config: dict[str, Any], expected: str
) -> None:
    assert pooling_of(write_modules(tmp_path / "model", config)) == expected


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"pooling_mode_max_tokens": True}, "max"),
        ({"pooling_mode_mean_sqrt_len_tokens": True}, "mean_sqrt_len"),
        ({"pooling_mode": "lasttoken"}, "lasttoken"),
        ({"pooling_mode": ["cls", "mean"]}, "cls, mean"),
        ({}, "nothing"),
    ],
    ids=str,
)
def test_other_pooling_is_refused_by_name(tmp_path: Path, config: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=f"pools by {named}: only mean or cls"):
        pooling_of(write_modules(tmp_path / "model", config))


def test_modules_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    folder = write_modules(tmp_path / "model", {"pooling_mode": "mean"})
    (folder / "1_Pooling" / "config.json").unlink()
    with pytest.raises(ValueError, match="cannot be read"):
        pooling_of(folder)
    (folder / "modules.json").write_text("[")
    with pytest.raises(ValueError, match="cannot be read"):
        pooling_of(folder)
    (folder / "modules.json").write_text("[]")
    with pytest.raises(ValueError, match="pools by nothing"):
        pooling_of(folder)
    other = write_modules(tmp_path / "other", {"pooling_mode": "mean"}, "sentence_transformers.models.Dense")
    with pytest.raises(ValueError, match="pools by nothing"):
        pooling_of(other)


ANYTHING = [None, 5, [], {}, "text", [5], {"a": 1}, [None], ["cls", 5], {"pooling_mode": 5}, {"pooling_mode": [5]}]


@pytest.mark.parametrize("content", ANYTHING, ids=str)
def test_files_that_say_something_else_are_refused(tmp_path: Path, content: Any) -> None:
    folder = write_modules(tmp_path / "pooling", content)
    with pytest.raises(ValueError, match=r"pools by (nothing|5):|1_Pooling/config.json .*copy the folder again"):
        pooling_of(folder)
    folder = write_modules(tmp_path / "modules", {"pooling_mode": "mean"})
    modules = json.loads((folder / "modules.json").read_text())
    for edited in (content, [content], *([{**modules[1], key: content}] for key in ("type", "path"))):
        (folder / "modules.json").write_text(json.dumps(edited))
        with pytest.raises(ValueError, match=r"pools by nothing|(modules|config).json .*copy the folder again"):
            pooling_of(folder)


@pytest.mark.parametrize("name", ["1_Pooling/secret.json", "sentence_bert_config.json", "2_Normalize"])
def test_a_link_that_leads_out_of_a_sentence_encoder_is_refused(tmp_path: Path, name: str) -> None:
    source = write_modules(tmp_path / "source", {"pooling_mode": "mean"})
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "key").write_text("secret")
    (source / name).symlink_to(tmp_path / "secret" / ("key" if name.endswith(".json") else ""))
    (tmp_path / "target").mkdir()
    with pytest.raises(ValueError, match=f"{name}.* leads to {tmp_path / 'secret'}"):
        copy_modules(source, tmp_path / "target")
    assert "secret" not in [path.read_text() for path in (tmp_path / "target").rglob("*") if path.is_file()]


def test_a_plain_encoder_has_no_modules(tmp_path: Path) -> None:
    assert modules_folder(str(tmp_path)) is None


def test_what_makes_a_sentence_encoder_is_copied_and_nothing_else(tmp_path: Path) -> None:
    source = write_modules(tmp_path / "source", {"pooling_mode": "mean"})
    (source / "2_Normalize").mkdir()
    (source / "checkpoints").mkdir()
    for name in ("sentence_bert_config.json", "config_sentence_transformers.json"):
        (source / name).write_text("{}")
    for name in ("config.json", "model.safetensors", "README.md", "checkpoints/model.safetensors"):
        (source / name).write_text("not to be copied")
    (tmp_path / "target").mkdir()
    copy_modules(source, tmp_path / "target")
    found = {str(path.relative_to(tmp_path / "target")) for path in (tmp_path / "target").rglob("*") if path.is_file()}
    assert found == {
        "modules.json",
        "1_Pooling/config.json",
        "sentence_bert_config.json",
        "config_sentence_transformers.json",
    }


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_embeddings_do_not_depend_on_the_batch_that_a_text_is_in(
    tiny_model: Callable, tmp_path: Path, pooling: str
) -> None:
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS))
    tokenizer = transformers.BertTokenizer(vocab=str(tmp_path / "vocab.txt"))
    model = tiny_model("bert", AutoModel)
    texts = ["word1", "word2 word3 word4 word5", ("word6", "word7 word9"), "word8 " * 20, ("word2 " * 9, "word3 " * 9)]
    found = embed(model, tokenizer, texts, pooling, max_length=12, batch_size=3)
    for text, embedding in zip(texts, found, strict=True):
        # A pair is two arguments.
        parts = [text] if isinstance(text, str) else text
        with torch.no_grad():
            states = model(**tokenizer(*parts, truncation=True, max_length=12, return_tensors="pt")).last_hidden_state
        torch.testing.assert_close(embedding, pooled(states, pooling=pooling)[0], rtol=1e-4, atol=1e-5)
