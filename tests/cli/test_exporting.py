from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification


needs_onnx = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("onnx", "onnxscript", "onnxruntime")),
    reason="no onnx, onnxscript and onnxruntime",
)


@pytest.fixture
def packed(tiny_packed, saved) -> str:
    return saved(tiny_packed("bert"), "packed")


@needs_onnx
def test_export_writes_an_onnx_file_that_gives_the_same_logits(packed, printed, tiny_inputs, tmp_path):
    import onnxruntime

    output = tmp_path / "deep" / "model.onnx"

    result = json.loads(printed("export", packed, output, "--json"))

    assert [path.name for path in output.parent.iterdir()] == ["model.onnx"]
    inputs = tiny_inputs("bert", batch=3, length=13)
    inputs["token_type_ids"] = torch.zeros_like(inputs["input_ids"])
    session = onnxruntime.InferenceSession(str(output), providers=["CPUExecutionProvider"])
    (found,) = session.run(["logits"], {name: tensor.numpy() for name, tensor in inputs.items()})
    with torch.no_grad():
        expected = AutoModelForSequenceClassification.from_pretrained(packed)(**inputs).logits
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-5, atol=1e-5)
    assert result == {
        "model": packed,
        "output": str(output),
        "class": "BertForSequenceClassification",
        "inputs": list(inputs),
        "bytes_before": Path(packed, "model.safetensors").stat().st_size,
        "bytes_after": output.stat().st_size,
    }


@needs_onnx
@pytest.mark.slow
def test_export_replaces_a_file_with_force_alone(packed, printed, refused, tmp_path):
    output = tmp_path / "model.onnx"
    output.write_text("mine")

    assert "is there" in refused("export", packed, output) and output.read_text() == "mine"
    text = printed("export", packed, output, "--force")

    size = output.stat().st_size
    assert size > 10_000 and f"ONNX:   {size / 1e6:.2f} MB  {output}\n" in text
    assert "inputs input_ids, attention_mask, token_type_ids\n" in text


@pytest.mark.parametrize(
    ("state", "expected"),
    [("float", "is a float model: torch.onnx.export takes it"), ("latent", "is a latent model, .*`hf-stompp pack ")],
)
def test_model_that_is_not_packed_is_refused(tiny_model, tiny_committed, saved, refused, tmp_path, state, expected):
    folder = saved(tiny_model("bert") if state == "float" else tiny_committed("bert"))

    assert re.search(expected, refused("export", folder, tmp_path / "new" / "model.onnx"))
    assert not (tmp_path / "new").exists()


def test_output_that_is_no_onnx_file_is_refused(packed, refused, tmp_path):
    assert "is a folder: name a file" in refused("export", packed, tmp_path)
    assert "does not end in .onnx" in refused("export", packed, tmp_path / "model")
    (tmp_path / "file").write_text("")
    for output in (tmp_path / "file" / "model.onnx", tmp_path / "file" / "deep" / "model.onnx"):
        assert f"cannot write to {output.parent}" in refused("export", packed, output)


def test_link_to_nothing_is_a_file_that_is_there(packed, refused, tmp_path):
    (tmp_path / "model.onnx").symlink_to(tmp_path / "elsewhere.onnx")

    assert "is there" in refused("export", packed, tmp_path / "model.onnx")
    assert not (tmp_path / "elsewhere.onnx").exists()


def test_export_without_onnx_says_what_to_install_and_leaves_nothing(packed, refused, tmp_path, monkeypatch):
    for name in ("onnx", "onnxscript"):
        monkeypatch.setitem(sys.modules, name, None)

    message = refused("export", packed, tmp_path / "new" / "model.onnx")

    assert "export to ONNX needs onnx and onnxscript: pip install 'hf_stompp[onnx]'" in message
    assert not (tmp_path / "new").exists()
