"""A mode for each module: what the plan makes of `StoMPPConfig.modes`, what is refused, training, loading."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModel, AutoModelForSequenceClassification

from hf_stompp import (
    StoMPPConfig,
    StoMPPTrainer,
    StoMPPTrainingArguments,
    binarization_report,
    binarize,
    cli,
    config,
    pack,
    unpack,
)
from hf_stompp.model.card import model_card
from hf_stompp.nn import MaskedBinaryLinear, PackedBinaryLinear


PARTS = ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense")
LINEARS = [
    f"bert.encoder.layer.{layer}.{part}" for layer in (0, 1) for part in (*PARTS, "intermediate.dense", "output.dense")
]


def modes_of(model: Any) -> dict[str, str]:
    """What each linear layer of the encoder has become, by its module."""
    found = {}
    for name in LINEARS:
        module = model.get_submodule(name)
        if not isinstance(module, MaskedBinaryLinear | PackedBinaryLinear):
            found[name] = "float"
        else:
            function = model.config.quantization_config.plan[name].input
            is_binary = module.input_activation is not None or function is not None
            found[name] = "bnn" if is_binary else "bwn"
    return found


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"modes": {"attention": "bwn"}}, lambda name: "bwn" if "attention" in name else "bnn"),
        ({"modes": {"query|key": "float"}}, lambda name: "float" if "query" in name or "key" in name else "bnn"),
        ({"mode": "bwn", "modes": {r"layer\.1": "bnn"}}, lambda name: "bnn" if "layer.1" in name else "bwn"),
        ({"modes": {r"layer\.0": "bnn", r"layer\.1": "bnn"}}, lambda name: "bnn"),
        (
            {"modes": {r"layer\.0": "float"}, "modules_to_not_convert": [r"layer\.1\.attention"]},
            lambda name: "float" if "layer.0" in name or "attention" in name else "bnn",
        ),
    ],
)
def test_every_layer_gets_the_mode_of_its_pattern_also_after_loading(
    tiny_committed: Callable, logits: Callable, tmp_path: Path, settings: dict[str, Any], expected: Callable
) -> None:
    model = tiny_committed("bert", StoMPPConfig(**settings))
    wanted = {name: expected(name) for name in LINEARS}
    assert modes_of(model) == wanted
    pack(model).save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert modes_of(loaded) == wanted and modes_of(unpack(loaded)) == wanted
    assert torch.equal(logits(loaded), logits(model)) and torch.allclose(
        logits(unpack(loaded)), logits(model), atol=1e-5
    )
    saved = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    version = 3 if "bwn" in (settings.get("mode"), *settings["modes"].values()) else 2
    assert saved["format_version"] == version and saved["modes"] == settings["modes"]


@pytest.mark.parametrize("state", ["latent", "packed"])
def test_patterns_with_a_prefix_survive_the_encoder_being_loaded_and_saved_without_its_head(
    tiny_committed: Callable, tiny_inputs: Callable, tmp_path: Path, state: str
) -> None:
    modes = {r"bert\.encoder\.layer\.0\.attention\.self\.key": "bwn", r"bert\.encoder\.layer\.1\.output": "float"}
    model = tiny_committed("bert", StoMPPConfig(modes=modes))
    (pack(model) if state == "packed" else model).save_pretrained(tmp_path / "classifier")
    encoder = AutoModel.from_pretrained(tmp_path / "classifier")
    encoder.save_pretrained(tmp_path / "encoder")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "encoder", num_labels=3)
    again.save_pretrained(tmp_path / "again")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "again")
    assert modes_of(again) == modes_of(model)
    with torch.no_grad():
        found, expected = (one.eval().bert(**tiny_inputs("bert")).last_hidden_state for one in (again, model))
    assert torch.equal(found, expected)


def test_a_layer_of_mode_bwn_beside_binary_ones_reads_floats(tiny_committed: Callable, tiny_inputs: Callable) -> None:
    model = pack(tiny_committed("bert", StoMPPConfig(modes={"key": "bwn"}, activation_bits=None)))
    attention = model.bert.encoder.layer[0].attention.self
    read: list[torch.Tensor] = []
    attention.key.register_forward_hook(lambda module, args, output: read.extend([args[0], output]))
    with torch.no_grad():
        model(**tiny_inputs("bert"))
    input, output = read
    bits = (attention.key.packed_weight.unsqueeze(-1) >> torch.arange(8)) & 1
    signs = 2.0 * bits.flatten(1)[:, : input.shape[-1]].double() - 1
    expected = F.linear(
        input.double(), signs * attention.key.scale.double().unsqueeze(-1), attention.key.bias.double()
    )
    torch.testing.assert_close(output.double(), expected, atol=1e-5, rtol=1e-5)
    assert attention.key.input_activation is None
    assert attention.query.input_activation is attention.value.input_activation is not None


# ModernBERT's linear layers have no bias, and only those that read binary inputs get one.
@pytest.mark.parametrize(
    ("family", "modes"),
    [("bert", {"attention": "bwn", "intermediate": "float"}), ("modernbert", {"attn": "bwn", "Wo": "bwn"})],
)
def test_sizes_are_those_of_the_saved_file(
    tiny_committed: Callable, tmp_path: Path, family: str, modes: dict[str, str]
) -> None:
    model = tiny_committed(family, StoMPPConfig(modes=modes))
    packed = pack(model)
    packed.save_pretrained(tmp_path)
    with open(tmp_path / "model.safetensors", "rb") as file:
        header = int.from_bytes(file.read(8), "little")
        stored = (tmp_path / "model.safetensors").stat().st_size - 8 - header
    for reported in (binarization_report(model), binarization_report(packed)):
        assert reported.total.bytes_packed == stored


@pytest.mark.parametrize("surrogate", ["none", "ste", "clipped_ste"])
def test_training_ends_committed_and_float_layers_go_on_learning(
    tiny_model: Callable, tmp_path: Path, surrogate: str
) -> None:
    modes = {"query": "float", r"attention\.output": "bwn", r"layer\.1\.intermediate": "bwn"}
    model = binarize(tiny_model("bert"), StoMPPConfig(surrogate=surrogate, modes=modes))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    generator = torch.Generator().manual_seed(0)
    data = [
        {"input_ids": torch.randint(3, 60, (6,), generator=generator), "labels": torch.tensor(label % 3)}
        for label in range(16)
    ]
    args = StoMPPTrainingArguments(
        str(tmp_path), max_steps=12, per_device_train_batch_size=4, learning_rate=1e-2, report_to="none",
        use_cpu=True, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trainer = StoMPPTrainer(model, args, train_dataset=data)
    trainer.train()
    assert trainer.is_committed
    after = dict(model.named_parameters())
    for name in ("query.weight", "key.weight", "attention.output.dense.weight"):
        full = f"bert.encoder.layer.1.{'attention.self.' if name[0] in 'qk' else ''}{name}"
        assert not torch.equal(before[full], after[full]), name
    packed = pack(model)
    with torch.no_grad():
        inputs = {"input_ids": torch.stack([row["input_ids"] for row in data])}
        assert torch.equal(packed.eval()(**inputs).logits, model.eval()(**inputs).logits)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"modes": {"decoder": "bwn"}},
            "'decoder' matches no linear layer of the encoder; their names are like 'bert",
        ),
        (
            {"modes": {"attention": "bwn", "query": "bnn"}},
            "contradicts itself for 'bert.encoder.layer.0.attention.self",
        ),
        (
            {"modes": {r"layer\.0": "bwn"}, "modules_to_not_convert": ["query"]},
            "modules_to_not_convert leaves it float",
        ),
        ({"modes": {"encoder": "float"}}, "nothing to binarize"),
    ],
)
def test_patterns_that_do_not_fit_the_model_are_refused(
    tiny_model: Callable, settings: dict[str, Any], message: str
) -> None:
    model = tiny_model("bert")
    with pytest.raises(ValueError, match=message):
        binarize(model, StoMPPConfig(**settings))
    assert not any(isinstance(module, MaskedBinaryLinear) for module in model.modules())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"modes": {"query": "ternary"}}, "modes must give one of .'bnn', 'bwn', 'float'. for each pattern"),
        ({"modes": ["query"]}, "modes must give one of"),
        ({"modes": {"qu(ery": "bwn"}}, r"modes: 'qu\(ery' is no regular expression"),
        ({"modes": {"query": "bwn"}, "format_version": 1}, "modes needs format version 2, got 1"),
    ],
)
def test_bad_modes_are_refused_with_the_field(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StoMPPConfig(**settings)


def test_models_without_modes_keep_the_first_version_and_are_read(tiny_committed: Callable, tmp_path: Path) -> None:
    pack(tiny_committed("bert")).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["quantization_config"]["format_version"] == 1
    # As files were written before there were modes.
    assert "modes" not in saved["quantization_config"]
    assert modes_of(AutoModelForSequenceClassification.from_pretrained(tmp_path)) == dict.fromkeys(LINEARS, "bnn")


def test_files_from_before_inputs_were_rounded_are_read_and_keep_their_float_inputs(
    tiny_committed: Callable, logits: Callable, tmp_path: Path
) -> None:
    model = pack(tiny_committed("bert", StoMPPConfig(mode="bwn", activation_bits=None)))
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["quantization_config"]["format_version"] == 1
    assert "activation_bits" not in saved["quantization_config"]
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert loaded.config.quantization_config.activation_bits is None
    assert torch.equal(logits(loaded), logits(model))


def test_inputs_of_a_dtype_that_no_kernel_takes_are_not_rounded(tiny_committed: Callable, logits: Callable) -> None:
    committed = tiny_committed("bert", StoMPPConfig(mode="bwn")).double()
    packed = pack(tiny_committed("bert", StoMPPConfig(mode="bwn"))).double()
    torch.testing.assert_close(logits(packed), logits(committed), rtol=1e-5, atol=1e-5)


def test_a_reader_of_version_1_names_the_version(
    tiny_committed: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack(tiny_committed("bert", StoMPPConfig(modes={"query": "bwn"}))).save_pretrained(tmp_path)
    monkeypatch.setattr(config, "FORMAT_VERSION", 1)
    with pytest.raises(ValueError, match="has format version 3; this hf_stompp reads up to 1: upgrade"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path)


def test_plan_of_another_mode_than_the_modes_say_is_refused(tiny_committed: Callable) -> None:
    fields = tiny_committed("bert", StoMPPConfig(modes={"query": "bwn"})).config.quantization_config.to_dict()
    for mode in ("bnn", "float"):
        with pytest.raises(ValueError, match="that of mode 'bwn', which neither mode nor modes have"):
            StoMPPConfig(**{**fields, "modes": {"query": mode}})


@pytest.mark.parametrize("auto_class", [AutoModelForSequenceClassification, AutoModel], ids=["head", "encoder"])
@pytest.mark.parametrize("state", ["latent", "packed"])
def test_patterns_of_a_file_are_not_run_on_loading_because_matching_one_may_never_end(
    tiny_committed: Callable, tiny_inputs: Callable, tmp_path: Path, state: str, auto_class: Any
) -> None:
    model = tiny_committed("bert", StoMPPConfig(modes={"query": "bwn"}))
    (pack(model) if state == "packed" else model).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    hostile = r"(\w+\.?)+-"
    saved["quantization_config"]["modes"] = {hostile: "bwn"}
    saved["quantization_config"]["modules_to_not_convert"] = [hostile]
    (tmp_path / "config.json").write_text(json.dumps(saved))

    def stop(*_: Any) -> None:
        raise TimeoutError("loading did not end")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(10)
    try:
        loaded = auto_class.from_pretrained(tmp_path)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)

    with torch.no_grad():
        encoder = loaded if auto_class is AutoModel else loaded.bert
        assert torch.equal(encoder.eval()(**tiny_inputs("bert"))[0], model.bert(**tiny_inputs("bert"))[0])


def test_only_models_without_binary_activations_become_plain_float_ones(
    tiny_committed: Callable, logits: Callable
) -> None:
    mixed = pack(tiny_committed("bert", StoMPPConfig(modes={"query": "bwn"})))
    with pytest.raises(ValueError, match="binary activations"):
        mixed.dequantize()
    weights_only = pack(tiny_committed("bert", StoMPPConfig(modes={"encoder": "bwn"}, activation_bits=None)))
    expected = logits(weights_only)
    torch.testing.assert_close(logits(weights_only.dequantize()), expected)


def test_card_says_how_many_layers_read_binary_activations(tiny_committed: Callable) -> None:
    packed = pack(tiny_committed("bert", StoMPPConfig(modes={"attention": "bwn"})))
    text = str(model_card(packed, "name", "name"))
    assert "the weights of 12 linear layers" in text
    assert "the activations that enter 4 of them" in text and "enter the others (mode `bwn`" in text
    assert "`modes={'attention': 'bwn'}`" in text


def test_inspect_shows_what_modes_make_of_a_model(
    tiny_model: Callable, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_model("bert").save_pretrained(tmp_path)
    assert cli.main(["inspect", str(tmp_path), "--modes", "attention=bwn", r"intermediate=float", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["options"]["modes"] == {"attention": "bwn", "intermediate": "float"}
    linears = {entry["name"]: entry["input"] for entry in found["modules"] if entry["kind"] == "linear"}
    assert set(linears) == {name for name in LINEARS if "intermediate" not in name}
    assert {name for name, source in linears.items() if source is None} == {
        name for name in linears if "attention" in name
    }
    assert cli.main(["inspect", str(tmp_path), "--modes", "attention=bwn"]) == 0
    assert "(mode bnn, bwn where attention, unit layer)" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        cli.main(["inspect", str(tmp_path), "--modes", "attention"])
    assert "'attention' is no PATTERN=MODE" in capsys.readouterr().err


def test_the_recipe_takes_modes_as_json_and_the_command_as_words(tmp_path: Path) -> None:
    from transformers import HfArgumentParser

    from hf_stompp.training.methods import RecipeArguments

    (asked,) = HfArgumentParser(RecipeArguments).parse_args_into_dataclasses(["--modes", '{"attention": "bwn"}'])
    assert asked.config().modes == {"attention": "bwn"}
    with pytest.raises(ValueError, match="is no JSON"):
        RecipeArguments(modes="attention=bwn")
    with pytest.raises(ValueError, match="contradicted by --modes"):
        RecipeArguments("float", modes={"attention": "bwn"})
    with pytest.raises(ValueError, match=r"binarized with modes=None, and .* is asked for"):
        RecipeArguments(modes={"attention": "bwn"}).check_latent(StoMPPConfig())
