"""LoRA of peft over binary layers: what it computes, what it trains, what it leaves alone, and what is refused."""

from __future__ import annotations

import copy
import logging
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, ResNetConfig, ResNetForImageClassification

import hf_stompp
from hf_stompp import (
    StoMPPConfig,
    StoMPPTrainer,
    StoMPPTrainingArguments,
    binarization_report,
    binarize,
    commit,
    pack,
    unpack,
)
from hf_stompp.export import plain_torch
from hf_stompp.model.modules import masked_modules, packed_modules
from hf_stompp.nn import MaskedBinaryLinear, PackedBinaryActivation, PackedBinaryLinear
from hf_stompp.nn.module import as_integers
from hf_stompp.ops import pack_bits


peft = pytest.importorskip("peft")

pytestmark = [
    # peft asks Transformers for what that has renamed.
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("error:Unsupported layer type"),
]

BASES = ("packed", "latent")
MODES = ("bnn", "bwn")


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    """LoRA over binary layers within a test, and peft as it was after it."""
    before = peft.PEFT_TYPE_TO_TUNER_MAPPING[peft.PeftType.LORA]
    hf_stompp.register_lora()
    yield
    peft.PEFT_TYPE_TO_TUNER_MAPPING[peft.PeftType.LORA] = before


@pytest.fixture
def base_model(tiny_packed: Callable, tiny_committed: Callable) -> Callable[..., Any]:
    """`base_model(kind, mode="bnn", family="bert")`: a packed or a committed latent model."""

    def make(kind: str, mode: str = "bnn", family: str = "bert") -> Any:
        return {"packed": tiny_packed, "latent": tiny_committed}[kind](family, StoMPPConfig(mode=mode))

    return make


def lora(targets: Any = "all-linear", **fields: Any) -> Any:
    """A config whose adapters change something from the start."""
    return peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets, **{"init_lora_weights": False, **fields})


def adapter_layers(model: nn.Module) -> dict[str, Any]:
    """The adapted binary layers of a model of peft, under the names of the base."""
    return {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if isinstance(getattr(module, "base_layer", None), (PackedBinaryLinear, MaskedBinaryLinear))
    }


def by_hand(layer: Any, base: Tensor, input: Tensor) -> Tensor:
    """Base output plus scaling * B A x, of the adapter `default`."""
    a, b = layer.lora_A["default"].weight.double(), layer.lora_B["default"].weight.double()
    return base.double() + (8 / 4) * (input.double() @ a.T) @ b.T


def watch(module: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """Inputs and outputs of a module, as they come."""
    seen: list[tuple[Tensor, Tensor]] = []
    module.register_forward_hook(lambda _, inputs, output: seen.append((inputs[0], output)))
    return seen


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", BASES)
def test_all_linear_means_every_binary_layer_too(base_model, kind, mode):
    model = base_model(kind, mode)
    binary = {
        name for name, module in model.named_modules() if isinstance(module, PackedBinaryLinear | MaskedBinaryLinear)
    }

    adapted = peft.get_peft_model(model, lora(task_type="SEQ_CLS"))

    assert set(adapter_layers(adapted)) == binary and len(binary) == 12
    names = {name for name, _ in adapted.named_parameters() if "lora_" in name}
    assert any("pooler" in name for name in names) and not any("classifier" in name for name in names)
    adapted.add_adapter("second", lora(task_type="SEQ_CLS"))
    first, second = (adapted.peft_config[name].target_modules for name in ("default", "second"))
    # The classifier is trained, and peft goes into it.
    assert first == {name for name in second if not name.startswith("classifier.")}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", BASES)
@torch.no_grad()
def test_output_is_that_of_the_base_plus_the_low_rank_product(base_model, tiny_inputs, kind, mode, dtype):
    model = base_model(kind, mode)
    nn.Module.to(model, dtype)
    adapted = peft.get_peft_model(model, lora()).eval()
    layers = adapter_layers(adapted)
    seen = {name: (watch(layer), watch(layer.base_layer)) for name, layer in layers.items()}

    adapted(**tiny_inputs("bert"))

    for name, (outer, inner) in seen.items():
        (input, output), (_, base) = outer[0], inner[0]
        assert output.dtype == dtype
        if not input.is_floating_point():
            assert name.endswith("output.dense") and mode == "bnn"
            continue
        torch.testing.assert_close(output, by_hand(layers[name], base, input).to(dtype))


@pytest.mark.parametrize("kind", BASES)
@torch.no_grad()
def test_an_adapter_behind_a_feed_forward_activation_reads_its_two_levels(base_model, kind):
    adapted = peft.get_peft_model(base_model(kind), lora()).eval()
    layer = adapter_layers(adapted)["bert.encoder.layer.0.output.dense"]
    signs = torch.randn(2, 5, layer.in_features).sign()
    bits = as_integers(pack_bits(signs), torch.float32)
    activation = layer.base_layer.input_activation
    levels = signs if kind == "packed" else activation.shift + activation.scale.abs() * signs

    assert not bits.is_floating_point()
    torch.testing.assert_close(layer(bits), by_hand(layer, layer.base_layer(bits), levels).float())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", BASES)
def test_a_disabled_adapter_and_an_unloaded_model_are_the_base(base_model, logits, kind, mode):
    model = base_model(kind, mode)
    before, names = logits(model), list(model.state_dict())

    adapted = peft.get_peft_model(model, lora()).eval()

    assert not torch.equal(logits(adapted), before)
    with adapted.disable_adapter():
        assert torch.equal(logits(adapted), before)
    base = adapted.unload()
    assert base is model and torch.equal(logits(base), before) and list(base.state_dict()) == names


def test_an_unloaded_packed_model_fuses_the_feed_forward_sign_again(base_model, tiny_inputs, operators):
    model = base_model("packed")
    base = peft.get_peft_model(model, lora()).eval().unload()

    with torch.no_grad(), operators() as run:
        base(**tiny_inputs("bert"))

    assert run.count["hf_stompp::binary_linear_sign"] == 2


@pytest.mark.parametrize("mode", MODES)
def test_an_adapter_is_saved_and_loaded_over_a_base_loaded_anew(base_model, logits, tmp_path, mode):
    model = base_model("packed", mode)
    model.save_pretrained(tmp_path / "base")
    adapted = peft.get_peft_model(model, lora(modules_to_save=["classifier"])).eval()
    with torch.no_grad():
        adapted.base_model.model.classifier.modules_to_save["default"].weight.add_(1.0)
    adapted.save_pretrained(tmp_path / "adapter")

    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")

    assert torch.equal(logits(loaded), logits(adapted))
    saved = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert "adapter_model.safetensors" in saved and "model.safetensors" not in saved


def test_transformers_loads_an_adapter_over_a_packed_base(base_model, logits, tmp_path):
    model = base_model("packed")
    model.save_pretrained(tmp_path / "base")
    adapted = peft.get_peft_model(model, lora()).eval()
    adapted.save_pretrained(tmp_path / "adapter")

    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    base.load_adapter(str(tmp_path / "adapter"))

    assert torch.equal(logits(base), logits(adapted))


@pytest.mark.parametrize("kind", BASES)
def test_several_adapters_share_one_base(base_model, logits, tmp_path, kind):
    alone = {}
    for seed, name in enumerate(("first", "second")):
        torch.manual_seed(seed)
        adapted = peft.get_peft_model(base_model(kind), lora()).eval()
        alone[name] = logits(adapted)
        adapted.save_pretrained(tmp_path / name)
    assert not torch.equal(alone["first"], alone["second"])

    shared = peft.PeftModel.from_pretrained(base_model(kind), tmp_path / "first", adapter_name="first")
    shared.load_adapter(tmp_path / "second", adapter_name="second")

    for name, expected in alone.items():
        shared.set_adapter(name)
        assert torch.equal(logits(shared), expected)


@torch.no_grad()
def test_examples_of_one_batch_may_have_different_adapters(base_model, tiny_inputs):
    shared = peft.get_peft_model(base_model("packed"), lora(), adapter_name="first").eval()
    shared.add_adapter("second", lora())
    inputs = tiny_inputs("bert", batch=3)

    mixed = shared(**inputs, adapter_names=["second", "__base__", "first"]).logits

    for row, name in ((0, "second"), (2, "first")):
        shared.set_adapter(name)
        torch.testing.assert_close(mixed[row], shared(**inputs).logits[row])
    with shared.disable_adapter():
        torch.testing.assert_close(mixed[1], shared(**inputs).logits[1])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", BASES)
def test_only_adapters_and_classifier_are_trained(base_model, tiny_inputs, kind, mode):
    adapted = peft.get_peft_model(base_model(kind, mode), lora(modules_to_save=["classifier"])).train()
    before = copy.deepcopy(adapted.state_dict())
    optimizer = torch.optim.AdamW(adapted.parameters(), lr=0.1, weight_decay=0.1)

    for _ in range(2):
        adapted(**tiny_inputs("bert"), labels=torch.tensor([0, 2])).loss.backward()
        optimizer.step()

    after = adapted.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all("lora_" in name or "classifier.modules_to_save" in name for name in changed)
    trainable = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert all("lora_" in name or "classifier.modules_to_save" in name for name in trainable)
    assert all(bool(module.freeze_mask.all()) for module in masked_modules(adapted).values())


def without_gradient(model: Any, inputs: dict[str, Tensor]) -> set[str]:
    """The adapted layers whose A or B has no gradient."""
    model.train()(**inputs, labels=torch.tensor([0, 2])).loss.backward()
    return {
        name
        for name, layer in adapter_layers(model).items()
        for matrix in (layer.lora_A["default"].weight, layer.lora_B["default"].weight)
        if matrix.grad is None or not bool(matrix.grad.any())
    }


@pytest.mark.parametrize("targets", ["all-linear", ["query", "value"]])
@pytest.mark.parametrize("mode", MODES)
def test_the_gradient_reaches_every_adapter_over_an_unpacked_base(base_model, tiny_inputs, mode, targets):
    adapted = peft.get_peft_model(unpack(base_model("packed", mode), surrogate="ste"), lora(targets))

    assert without_gradient(adapted, tiny_inputs("bert")) == set()


def test_the_gradient_passes_a_packed_layer_through_adapters_alone(base_model, tiny_inputs):
    everywhere = peft.get_peft_model(base_model("packed"), lora())
    feed_forward = {f"bert.encoder.layer.{layer}.intermediate.dense" for layer in range(2)}
    attention = peft.get_peft_model(base_model("packed"), lora(["query", "value"], modules_to_save=["classifier"]))

    # A sign follows it, and nothing goes past it.
    assert without_gradient(everywhere, tiny_inputs("bert")) == feed_forward
    assert without_gradient(attention, tiny_inputs("bert")) == set(adapter_layers(attention))


def test_training_over_layers_that_pass_no_gradient_is_warned_of(base_model, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="hf_stompp"):
        adapted = peft.get_peft_model(base_model("packed"), lora())
    assert (
        "12 layers pass no gradient to their inputs, such as bert.encoder.layer.0.attention.self.query:" in caplog.text
    )
    assert "Train on unpack(packed, surrogate='ste')" in caplog.text
    adapted.save_pretrained(tmp_path)
    caplog.clear()

    with caplog.at_level(logging.WARNING, logger="hf_stompp"):
        peft.PeftModel.from_pretrained(base_model("packed"), tmp_path)
        peft.get_peft_model(unpack(base_model("packed")), lora())
    assert not [record for record in caplog.records if record.name.startswith("hf_stompp")]


@pytest.mark.parametrize("mode", MODES)
def test_an_adapter_trained_on_the_unpacked_base_computes_the_same_over_the_packed_one(
    base_model, tiny_inputs, logits, tmp_path, mode
):
    packed = base_model("packed", mode)
    adapted = peft.get_peft_model(unpack(packed, surrogate="ste"), lora(init_lora_weights=True)).train()
    optimizer = torch.optim.AdamW(adapted.parameters(), lr=0.05)
    for _ in range(5):
        optimizer.zero_grad()
        adapted(**tiny_inputs("bert"), labels=torch.tensor([0, 2])).loss.backward()
        optimizer.step()
    adapted.eval().save_pretrained(tmp_path)
    before = logits(packed)

    served = peft.PeftModel.from_pretrained(packed, tmp_path)

    assert not torch.equal(logits(served), before)
    assert torch.equal(logits(served), logits(adapted))


def test_merging_is_refused_before_anything_is_merged(base_model, logits):
    for kind in BASES:
        adapted = peft.get_peft_model(base_model(kind, family="electra"), lora()).eval()
        before = logits(adapted, "electra")
        for merge in (
            adapted.merge_and_unload,
            adapted.merge_adapter,
            next(iter(adapter_layers(adapted).values())).merge,
        ):
            with pytest.raises(
                ValueError, match="cannot be merged: .* one sign a weight.*Keep the adapter beside the base"
            ):
                merge()
        assert torch.equal(logits(adapted, "electra"), before)


def test_an_adapter_is_merged_into_the_float_model_of_a_packed_one(base_model, logits, tmp_path):
    packed = base_model("packed", "bwn")
    adapted = peft.get_peft_model(packed, lora()).eval()
    adapted.save_pretrained(tmp_path)
    expected = logits(adapted)

    merged = peft.PeftModel.from_pretrained(adapted.unload().dequantize(), tmp_path).merge_and_unload()

    # But for inputs that the packed model rounds to 8 bits.
    assert not packed_modules(merged)
    torch.testing.assert_close(logits(merged), expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_a_start_that_changes_the_base_weight_is_refused(base_model, start):
    for kind in BASES:
        with pytest.raises(ValueError, match=f"init_lora_weights='{start}' changes the base weight"):
            peft.get_peft_model(base_model(kind), lora(init_lora_weights=start))


def test_a_model_with_adapters_is_neither_binarized_nor_packed_nor_unpacked(base_model):
    for call, kind in ((binarize, "packed"), (pack, "latent"), (unpack, "packed")):
        adapted = peft.get_peft_model(base_model(kind), lora())
        message = "is packed" if call is binarize else "has adapters.*take the base alone, PeftModel.unload()"
        with pytest.raises(ValueError, match=message):
            call(adapted)


def test_a_model_with_adapters_or_what_they_left_is_refused_by_whatever_takes_a_binary_model(base_model, tmp_path):
    def deleted(model: Any) -> Any:
        model.add_adapter(lora(), "mine")
        model.delete_adapter("mine")
        return model

    def train(model: Any) -> None:
        StoMPPTrainer(model, StoMPPTrainingArguments(str(tmp_path), use_cpu=True), train_dataset=[{}]).train()

    for kind, call in (
        *(("packed", call) for call in (unpack, plain_torch, binarization_report)),
        *(("latent", call) for call in (pack, train, binarization_report)),
    ):
        for adapted in (deleted, lambda model: peft.get_peft_model(model, lora())):
            with pytest.raises(ValueError, match="has adapters"):
                call(adapted(base_model(kind)))
    with pytest.raises(ValueError, match="has adapters"):
        deleted(base_model("packed", "bwn")).dequantize()


def test_several_adapters_are_combined_into_one(base_model, logits):
    model = peft.get_peft_model(base_model("packed"), lora()).eval()
    model.add_adapter("other", lora())
    model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "sum", combination_type="svd", svd_rank=8)
    model.set_adapter("sum")
    for layer in adapter_layers(model).values():
        found = [layer.scaling[name] * layer.lora_B[name].weight @ layer.lora_A[name].weight for name in layer.lora_A]
        torch.testing.assert_close(found[2], found[0] + found[1], rtol=1e-3, atol=1e-4)


def test_unpack_takes_a_surrogate_and_refuses_an_unknown_one(tiny_packed):
    packed = tiny_packed("bert", StoMPPConfig(surrogate="none"))

    assert {module.surrogate for module in masked_modules(unpack(packed)).values()} == {"none"}
    latent = unpack(packed, surrogate="ste")
    assert {module.surrogate for module in masked_modules(latent).values()} == {"ste"}
    assert latent.config.quantization_config.surrogate == "ste"
    with pytest.raises(ValueError, match="surrogate must be one of"):
        unpack(packed, surrogate="stee")


def test_adapters_are_copied_with_their_model(base_model, logits):
    adapted = peft.get_peft_model(base_model("packed"), lora()).eval()
    twin = copy.deepcopy(adapted)
    assert torch.equal(logits(twin), logits(adapted))

    base = twin.unload()

    activations = [module for module in base.modules() if isinstance(module, PackedBinaryActivation)]
    following = base.bert.encoder.layer[0].intermediate.dense.output_activation
    assert any(following is activation for activation in activations)


def test_every_family_takes_adapters(tiny_packed, tiny_inputs, logits, family):
    packed = tiny_packed(family)
    before = logits(packed, family)

    adapted = peft.get_peft_model(packed, lora()).eval()

    assert not torch.equal(logits(adapted, family), before)
    with adapted.disable_adapter():
        assert torch.equal(logits(adapted, family), before)


def test_peft_is_imported_on_use_and_its_absence_is_told(tmp_path: Path):
    code = (
        "import sys, hf_stompp; assert 'peft' not in sys.modules; sys.modules['peft'] = None\n"
        "try:\n    hf_stompp.register_lora()\nexcept ImportError as error:\n    print(error)"
    )
    printed = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert printed == "LoRA over binary layers needs peft: pip install peft\n"


@pytest.mark.parametrize("packs", [False, True], ids=["latent", "packed"])
def test_lora_beside_a_binary_convolution_is_refused(packs: bool) -> None:
    network = ResNetForImageClassification(
        ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1], layer_type="basic", num_labels=3)
    )
    model = binarize(network, StoMPPConfig(mode="bwn"))
    model = pack(commit(model)) if packs else model

    with pytest.raises(ValueError, match="LoRA beside a binary convolution is not supported: name linear layers"):
        peft.get_peft_model(model, peft.LoraConfig(target_modules=["layer.1.convolution"]))
