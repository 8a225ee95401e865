from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
import transformers
from torch import nn
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
)

from hf_stompp import StoMPPConfig, binarization_report, binarize, commit, pack
from hf_stompp.model.modules import fully_binary, masked_modules
from hf_stompp.nn import MaskedBinaryActivation, MaskedBinaryLinear


WIDE = {"weight_clip": 1e4, "activation_clip": 1e4}


def data_bytes(file) -> int:
    """Bytes of a safetensors file without its header."""
    content = file.read_bytes()
    return len(content) - 8 - int.from_bytes(content[:8], "little")


def state_bytes(model: nn.Module) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())


def test_binarize_returns_the_same_object_with_its_own_parameters(tiny_model, family):
    model = tiny_model(family)
    before = dict(model.named_parameters())
    values = {name: parameter.clone() for name, parameter in before.items()}

    assert binarize(model) is model

    after = dict(model.named_parameters())
    assert all(after[name] is parameter for name, parameter in before.items())
    assert all(torch.equal(after[name], value) for name, value in values.items())


def test_binarize_replaces_every_linear_layer_of_the_encoder(tiny_model):
    model = binarize(tiny_model("bert"))

    linears = [module for module in model.bert.encoder.modules() if isinstance(module, nn.Linear | MaskedBinaryLinear)]
    assert len(linears) == 2 * 6
    assert all(type(module) is MaskedBinaryLinear for module in linears)
    assert type(model.classifier) is nn.Linear
    assert type(model.bert.pooler.dense) is nn.Linear


def test_layers_that_read_one_tensor_share_one_activation(tiny_model):
    model = binarize(tiny_model("bert"))

    attention = model.bert.encoder.layer[0].attention.self
    assert attention.query.input_activation is attention.key.input_activation is attention.value.input_activation
    assert sum(isinstance(module, MaskedBinaryActivation) for module in model.modules()) == 2 * 4


def test_binarize_keeps_requires_grad(tiny_model):
    model = tiny_model("bert")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("layer.0" not in name and "embeddings" not in name)
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}

    binarize(model)

    after = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert {name: after[name] for name in before} == before


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_binarize_keeps_the_mode(tiny_model, training):
    model = binarize(tiny_model("bert").train(training))

    assert {module.training for module in model.modules()} == {training}


@pytest.mark.parametrize("mode", ["bnn", "bwn"])
def test_without_frozen_entries_and_clipping_the_function_is_the_float_one(tiny_model, logits, family, mode):
    model = tiny_model(family)
    expected = logits(model, family)

    binarize(model, StoMPPConfig(mode=mode, **WIDE))

    torch.testing.assert_close(logits(model, family), expected, atol=1e-5, rtol=1e-5)


def test_binarize_does_not_touch_the_config_it_is_given(tiny_model):
    config = StoMPPConfig(unit="sublayer")

    first, second = binarize(tiny_model("bert"), config), binarize(tiny_model("roberta"), config)

    assert config.modules is None
    assert first.config.quantization_config.units != second.config.quantization_config.units


def test_models_built_from_one_config_object_are_told_apart():
    config = BertConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    student, teacher = BertForSequenceClassification(config), BertForSequenceClassification(config)

    binarize(student)

    assert getattr(teacher.config, "quantization_config", None) is None
    binarize(teacher, StoMPPConfig(mode="bwn"))
    assert student.config.quantization_config.mode == "bnn"


def test_binarize_twice_is_refused(tiny_model):
    with pytest.raises(ValueError, match="already binarized"):
        binarize(binarize(tiny_model("bert")))


def test_binarize_of_a_packed_model_is_refused(tiny_packed):
    with pytest.raises(ValueError, match=r"is packed.*unpack"):
        binarize(tiny_packed("bert"))


def test_binarize_with_the_config_of_another_model_is_refused(tiny_model):
    used = binarize(tiny_model("bert")).config.quantization_config

    with pytest.raises(ValueError, match="belongs to another model"):
        binarize(tiny_model("bert"), used)


def test_binarize_of_a_quantized_model_is_refused(tiny_model):
    model = tiny_model("bert")
    model.is_quantized, model.quantization_method = True, "bitsandbytes"

    with pytest.raises(ValueError, match=r"already quantized .bitsandbytes."):
        binarize(model)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["bert.encoder.layer.1.output.dense.bias", "classifier.weight"])
def test_binarize_refuses_weights_that_are_not_finite(tiny_model, name, value):
    model = tiny_model("bert")
    model.get_parameter(name).data.flatten()[-1] = value

    with pytest.raises(ValueError, match=rf"{name} holds NaN or infinity"):
        binarize(model)


def test_binarize_refuses_integer_parameters(tiny_model):
    model = tiny_model("bert")
    weight = torch.zeros(3, 36, dtype=torch.int8)
    model.classifier.weight = nn.Parameter(weight, requires_grad=False)

    with pytest.raises(ValueError, match=r"classifier.weight is torch.int8"):
        binarize(model)


def test_binarize_refuses_weights_that_are_not_loaded(tiny_model):
    with pytest.raises(ValueError, match=r"word_embeddings.weight is on the meta device"):
        binarize(tiny_model("bert").to("meta"))


def test_a_refused_model_is_left_as_it_was(tiny_model):
    model = tiny_model("bert", AutoModelForMaskedLM)
    before = {name: type(module) for name, module in model.named_modules()}

    with pytest.raises(ValueError, match="tied"):
        binarize(model, StoMPPConfig(word_embeddings="binary"))

    assert {name: type(module) for name, module in model.named_modules()} == before
    assert getattr(model.config, "quantization_config", None) is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("committed", [False, True], ids=["free", "committed"])
@pytest.mark.parametrize("name", ["bert", "deberta_v2", "modernbert"])
def test_half_precision_models_train(tiny_model, tiny_inputs, name, dtype, committed):
    model = binarize(tiny_model(name).to(dtype), StoMPPConfig(word_embeddings="binary")).train()
    if committed:
        commit(model)

    loss = model(**tiny_inputs(name), labels=torch.tensor([0, 1])).loss
    loss.backward()

    assert loss.dtype == dtype or loss.dtype == torch.float32
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert all(bool(torch.isfinite(gradient).all()) for gradient in gradients.values())
    linears = [n for n, module in model.named_modules() if isinstance(module, MaskedBinaryLinear)]
    assert all(gradients[f"{n}.weight"].dtype == dtype for n in linears)
    assert all(m.scale.dtype == torch.float32 for m in model.modules() if isinstance(m, MaskedBinaryActivation))


def test_commit_fills_every_mask_in_place(tiny_model):
    model = binarize(tiny_model("bert"), StoMPPConfig(word_embeddings="binary"))
    masks = {name: module.freeze_mask for name, module in masked_modules(model).items()}

    assert commit(model) is model

    assert all(bool(mask.all()) for mask in masks.values())
    assert all(module.freeze_mask is masks[name] for name, module in masked_modules(model).items())


def test_commit_changes_the_function(tiny_model, logits):
    model = binarize(tiny_model("bert"))
    free = logits(model)

    assert not torch.allclose(logits(commit(model)), free, atol=1e-3)


@pytest.mark.parametrize("verb", [commit, pack, binarization_report])
def test_a_float_model_is_refused_and_told_of_binarize(tiny_model, verb):
    with pytest.raises(ValueError, match="BertForSequenceClassification is not binarized; call binarize"):
        verb(tiny_model("bert"))


def test_commit_of_a_packed_model_is_refused(tiny_packed):
    with pytest.raises(ValueError, match="packed"):
        commit(tiny_packed("bert"))


def test_fully_binary_restores_the_masks_after_an_error(tiny_model):
    model = binarize(tiny_model("bert"))
    first = next(iter(masked_modules(model).values()))
    first.freeze_mask[0] = True
    masks = {name: module.freeze_mask.clone() for name, module in masked_modules(model).items()}

    with pytest.raises(KeyError), fully_binary(model):
        assert all(bool(module.freeze_mask.all()) for module in masked_modules(model).values())
        raise KeyError

    assert all(torch.equal(module.freeze_mask, masks[name]) for name, module in masked_modules(model).items())
    assert not any(module.committed for module in masked_modules(model).values())


def test_report_of_a_tiny_bert_by_hand(tiny_model):
    hidden, inner, labels, vocabulary, positions, types = 36, 76, 3, 64, 40, 2
    report = binarization_report(binarize(tiny_model("bert")))

    layer_weights = 4 * hidden * hidden + 2 * hidden * inner
    layer_biases = 5 * hidden + inner
    norms = 2 * 2 * hidden
    head = (vocabulary + positions + types) * hidden + 2 * hidden + hidden * hidden + hidden + labels * hidden + labels
    layer, last = report.units[0], report.units[-1]
    assert [row.unit for row in report.units] == ["bert.encoder.layer.0", "bert.encoder.layer.1", "(float)"]
    assert layer.modules == 6 + 4
    assert layer.binary_weights == layer_weights
    assert layer.float_weights == layer_biases + norms
    assert layer.bytes_before == 4 * (layer_weights + layer_biases + norms)
    # Latent: a mask byte a weight; three activations of the hidden size and one of the inner, each a mask byte, a
    # shift and a threshold a feature, and one scale.
    features = 3 * hidden + inner
    assert layer.bytes_latent == layer.bytes_before + layer_weights + 9 * features + 4 * 4
    # Packed: rows of 36 and of 76 bits both take one 256-bit word; scale and bias a row, threshold a feature.
    assert layer.bytes_packed == layer_biases * (32 + 4 + 4) + 4 * (features + norms)
    assert (last.modules, last.binary_weights, last.float_weights) == (0, 0, head)
    assert report.total.binary_weights == 2 * layer_weights
    assert report.total.float_weights == 2 * layer.float_weights + head


@pytest.mark.parametrize(
    "config",
    [{}, {"mode": "bwn"}, {"word_embeddings": "binary"}, {"word_embeddings": "int8"}],
    ids=["bnn", "bwn", "embeddings", "int8"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", ["bert", "modernbert"])
def test_report_tells_the_bytes_that_are_saved(tiny_model, tiny_committed, tmp_path, name, dtype, config):
    float_model, model = tiny_model(name, dtype=dtype), tiny_committed(name, StoMPPConfig(**config), dtype=dtype)
    packed = pack(model)
    packed.save_pretrained(tmp_path)

    total = binarization_report(model).total

    assert total.bytes_before == state_bytes(float_model)
    assert total.bytes_latent == state_bytes(model)
    assert total.bytes_packed == state_bytes(packed)
    assert 0 <= data_bytes(tmp_path / "model.safetensors") - total.bytes_packed < 8


def test_report_of_the_packed_model_is_that_of_the_latent_one(tiny_committed, family):
    model = tiny_committed(family)

    assert binarization_report(pack(model)) == binarization_report(model)


def test_report_prints_a_line_for_each_unit_and_the_total(tiny_model):
    lines = str(binarization_report(binarize(tiny_model("bert")))).splitlines()

    assert [line.split()[0] for line in lines] == [
        "unit",
        "bert.encoder.layer.0",
        "bert.encoder.layer.1",
        "(float)",
        "total",
    ]
    assert len({len(line) for line in lines}) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_quantization_config_at_loading_equals_binarize(tiny_model, tmp_path, dtype):
    tiny_model("bert").save_pretrained(tmp_path)
    config = StoMPPConfig(unit="sublayer", word_embeddings="binary")
    load = AutoModelForSequenceClassification.from_pretrained

    after = binarize(load(tmp_path, dtype=dtype), config)
    at_loading = load(tmp_path, quantization_config=config, dtype=dtype)

    expected, state = after.state_dict(), at_loading.state_dict()
    assert list(state) == list(expected)
    assert all(
        torch.equal(state[name], value) and state[name].dtype == value.dtype for name, value in expected.items()
    )
    assert at_loading.config.to_dict() == after.config.to_dict()
    assert {n: p.requires_grad for n, p in at_loading.named_parameters()} == {
        n: p.requires_grad for n, p in after.named_parameters()
    }


def test_one_config_serves_for_several_loads(tiny_model, tmp_path):
    tiny_model("bert").save_pretrained(tmp_path)
    config = StoMPPConfig()

    for _ in range(2):
        AutoModelForSequenceClassification.from_pretrained(tmp_path, quantization_config=config)

    assert config.modules is None


def test_config_in_a_saved_model_is_plain_json(tiny_model, tmp_path):
    binarize(tiny_model("bert"), StoMPPConfig(surrogate="none")).save_pretrained(tmp_path)

    saved = json.loads((tmp_path / "config.json").read_text())["quantization_config"]

    assert saved["quant_method"] == "stompp"
    assert saved["state"] == "latent"
    assert saved["surrogate"] == "none"


@pytest.mark.parametrize("name", ["bert", "modernbert", "distilbert"])
@pytest.mark.parametrize("mode", ["bnn", "bwn"])
def test_one_row_of_nothing_but_padding_gives_finite_logits(tiny_model, tiny_inputs, name, mode):
    model = binarize(tiny_model(name), StoMPPConfig(mode=mode))
    inputs = tiny_inputs(name, batch=1)
    inputs["attention_mask"].zero_()

    with torch.no_grad():
        free = model(**inputs).logits
        committed = commit(model)(**inputs).logits
        packed = pack(model)(**inputs).logits

    assert bool(torch.isfinite(free).all())
    assert bool(torch.isfinite(committed).all())
    assert torch.equal(packed, committed)


def test_rows_do_not_depend_on_the_batch_they_are_in(tiny_committed, tiny_inputs):
    packed = pack(tiny_committed("bert"))
    inputs = tiny_inputs("bert", batch=3)

    with torch.no_grad():
        together = packed(**inputs).logits
        alone = torch.cat(
            [packed(**{key: value[i : i + 1] for key, value in inputs.items()}).logits for i in range(3)]
        )

    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


def test_layer_norms_of_a_sublayer_count_as_its_own(tiny_model):
    whole = {unit.unit: unit for unit in binarization_report(binarize(tiny_model("bert"), StoMPPConfig())).units}
    parts = binarization_report(binarize(tiny_model("bert"), StoMPPConfig(unit="sublayer"))).units

    for layer in ("bert.encoder.layer.0", "bert.encoder.layer.1"):
        of_layer = [unit for unit in parts if unit.unit.startswith(f"{layer}.")]
        assert len(of_layer) == 2
        assert sum(unit.float_weights for unit in of_layer) == whole[layer].float_weights
        # Weight and bias of one LayerNorm, and the biases of the linear layers.
        hidden, intermediate = 36, 76
        assert [unit.float_weights for unit in of_layer] == [6 * hidden, 3 * hidden + intermediate]


def test_importing_the_package_does_not_import_the_trainer():
    code = (
        # Some versions of Transformers bring pandas themselves.
        "import sys; from transformers import AutoModelForSequenceClassification; "
        "before = set(sys.modules); import hf_stompp; "
        "heavy = {'transformers.trainer', 'datasets', 'pandas'} & set(sys.modules) - before; "
        "assert not heavy, heavy; "
        "assert set(hf_stompp.__all__) <= set(dir(hf_stompp)); "
        "hf_stompp.StoMPPTrainer, hf_stompp.StoMPPTrainingArguments, hf_stompp.MaskScheduler"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


SQUEEZED = {
    **dict.fromkeys(("hidden_size", "embedding_size", "intermediate_size"), 8),
    **dict.fromkeys(("num_attention_heads", "num_hidden_layers"), 2),
    **dict.fromkeys(("q_groups", "k_groups", "v_groups", "post_attention_groups", "intermediate_groups"), 2),
    "output_groups": 2,
}


@pytest.mark.parametrize(
    ("name", "fields", "kind"),
    [
        ("SqueezeBertForSequenceClassification", {**SQUEEZED, "vocab_size": 16}, "Conv1d"),
        ("GPT2ForSequenceClassification", {"n_embd": 8, "n_layer": 2, "n_head": 2, "vocab_size": 16}, "Conv1D"),
    ],
)
def test_a_network_of_other_layers_is_told_that_no_stack_would_help(name, fields, kind):
    model_class = getattr(transformers, name)
    with pytest.raises(ValueError, match=f"its layers are {kind}, and only nn.Linear and nn.Conv2d become binary"):
        binarize(model_class(model_class.config_class(**fields)))
