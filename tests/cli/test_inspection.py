from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import save_file

from hf_stompp import StoMPPConfig, binarization_report, binarize, cli


OPTIONS = {
    "default": ({}, []),
    "weights": ({"mode": "bwn", "unit": "module"}, ["--mode", "bwn", "--unit", "module"]),
    "sublayers": ({"unit": "sublayer"}, ["--unit", "sublayer"]),
    "excluded": (
        {"modules_to_not_convert": ["classifier", r"layer\.0", "output"]},
        ["--modules-to-not-convert", "classifier", r"layer\.0", "output"],
    ),
    "embeddings": (
        {"word_embeddings": "binary", "layer_stack": "bert.encoder.layer"},
        ["--word_embeddings", "binary", "--layer_stack", "bert.encoder.layer"],
    ),
}


def config_only(model: transformers.PreTrainedModel, folder: Path) -> str:
    """A folder without weights: what is not there cannot be read."""
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    return str(folder)


def test_float_model_is_reported_as_binarize_would_make_it_without_its_weights(tiny_model, printed, tmp_path, family):
    model = tiny_model(family)

    result = json.loads(printed("inspect", config_only(model, tmp_path), "--json"))

    binarized = binarize(model)
    expected = binarization_report(binarized)
    assert result["units"] == [asdict(unit) for unit in expected.units]
    assert result["total"] == asdict(expected.total) and result["total"]["binary_weights"] > 0
    assert result["modules"] == binarized.config.quantization_config.modules
    assert (result["state"], result["class"]) == ("float", type(model).__name__)


@pytest.mark.parametrize("name", OPTIONS)
def test_options_are_those_of_the_config(tiny_model, printed, tmp_path, name):
    fields, words = OPTIONS[name]
    model = tiny_model("bert")

    result = json.loads(printed("inspect", config_only(model, tmp_path), *words, "--json"))

    binarized = binarize(model, StoMPPConfig(**fields))
    assert result["units"] == [asdict(unit) for unit in binarization_report(binarized).units]
    assert result["modules"] == binarized.config.quantization_config.modules
    assert {field: result["options"][field] for field in fields} == fields


def test_dtype_of_the_checkpoint_counts(tiny_model, printed, tmp_path):
    model = tiny_model("bert")
    full = json.loads(printed("inspect", config_only(model, tmp_path / "full"), "--json"))
    model.config.dtype = torch.bfloat16
    half = json.loads(printed("inspect", config_only(model, tmp_path / "half"), "--json"))

    assert half["total"]["bytes_before"] * 2 == full["total"]["bytes_before"]
    assert half["total"] == asdict(binarization_report(binarize(model.bfloat16())).total)


def test_model_larger_than_memory_is_inspected(printed, tmp_path):
    config = transformers.BertConfig(
        hidden_size=16384, num_hidden_layers=40, num_attention_heads=128, intermediate_size=65536
    )
    config.architectures = ["BertModel"]
    config.save_pretrained(tmp_path)

    result = json.loads(printed("inspect", tmp_path, "--json"))

    assert result["total"]["bytes_before"] > 5e11 and len(result["units"]) == 41


def test_latent_model_tells_what_is_frozen(tiny_model, printed, saved):
    model = binarize(tiny_model("bert"))
    plan = model.config.quantization_config.plan
    for name, module in model.named_modules():
        if name in plan and plan[name].unit.endswith(".0"):
            module.commit()
            if getattr(module, "input_activation", None) is not None:
                module.input_activation.commit()
    folder = saved(model)

    result = json.loads(printed("inspect", folder, "--json"))

    assert result["state"] == "latent"
    assert result["frozen_fractions"] == {"bert.encoder.layer.0": 1.0, "bert.encoder.layer.1": 0.0}
    assert result["units"] == [asdict(unit) for unit in binarization_report(model).units]
    assert "frozen: not yet all of bert.encoder.layer.1\n" in printed("inspect", folder)


def test_committed_model_can_be_packed(tiny_committed, printed, saved):
    assert "frozen: everything, it can be packed" in printed("inspect", saved(tiny_committed("bert")))


def test_packed_model_is_reported_with_its_table(tiny_packed, printed, saved):
    model = tiny_packed("bert")

    output = printed("inspect", saved(model))

    report = binarization_report(model)
    assert str(report) in output and "BertForSequenceClassification, packed (mode bnn, unit layer)" in output
    total = report.total
    assert f"{total.bytes_before / total.bytes_packed:.1f} times smaller" in output
    assert f"1-bit: {total.binary_weights:,} of {total.binary_weights + total.float_weights:,} weights" in output


def test_what_stays_float_is_named_the_largest_first(tiny_model, printed, saved):
    model = tiny_model("bert")
    folder = saved(model)

    result = json.loads(printed("inspect", folder, "--json"))

    binary = {entry["name"] for entry in result["modules"] if entry["kind"] == "linear"}
    expected = {
        name: 4 * sum(parameter.numel() for parameter in module.parameters(recurse=False))
        for name, module in model.named_modules()
        if name not in binary
    }
    assert result["float_modules"] == {name: size for name, size in expected.items() if size}
    sizes = list(result["float_modules"].values())
    assert sizes == sorted(sizes, reverse=True)
    assert f"stays float: {next(iter(result['float_modules']))} " in printed("inspect", folder)


def test_int8_word_embeddings_do_not_count_as_float(tiny_model, printed, saved):
    folder = saved(tiny_model("bert"), "float")
    result = json.loads(printed("inspect", folder, "--word_embeddings", "int8", "--json"))
    assert not any("word_embeddings" in name for name in result["float_modules"])


def test_options_for_a_binarized_model_are_refused(tiny_packed, refused, saved):
    message = refused("inspect", saved(tiny_packed("bert")), "--unit", "module")

    assert "is packed" in message and "--unit" in message and "leave it out" in message


def test_model_with_shared_layers_is_refused(tiny_model, refused, saved):
    message = refused("inspect", saved(tiny_model("albert")))

    assert "shares its layers" in message and "ALBERT" in message and "choose" in message


def test_bad_option_names_the_config_field(tiny_model, refused, saved):
    folder = saved(tiny_model("bert"))

    assert "is no regular expression" in refused("inspect", folder, "--modules_to_not_convert", "(")
    assert "names no list of layers" in refused("inspect", folder, "--layer_stack", "bert.layers")


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantized by gptq: name the float model"),
        ({"architectures": None}, "names no model class: save the model with save_pretrained"),
        ({"architectures": ["BertForNothing"]}, "is a BertForNothing, which this Transformers does not have"),
        ({"model_type": "nothing"}, "nothing"),
    ],
)
def test_config_that_cannot_be_used_is_refused(tiny_model, refused, saved, edit, expected):
    folder = saved(tiny_model("bert"))
    path = Path(folder, "config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | edit))

    assert expected in refused("inspect", folder)


def test_newer_format_is_refused_before_anything_is_loaded(tiny_packed, refused, saved):
    folder = saved(tiny_packed("bert"))
    path = Path(folder, "config.json")
    config = json.loads(path.read_text())
    config["quantization_config"]["format_version"] = 99
    path.write_text(json.dumps(config))

    assert "format version 99" in refused("inspect", folder)


def test_damaged_model_is_refused_by_the_name_of_the_tensor(tiny_packed, refused, saved):
    folder = saved(tiny_packed("bert"))
    path = Path(folder, "model.safetensors")
    path.write_bytes(path.read_bytes()[:-100])

    message = refused("inspect", folder)

    assert "is damaged: tensor '" in message and "download or copy it again" in message


NO_MODELS = ["set_seed", "pipeline", "TextStreamer", "logging", "BertConfig", "Trainer", "AutoModel", "__doc__", "x"]


def write_config(folder: Path, **fields: object) -> str:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    return str(folder)


@pytest.mark.parametrize("state", ["float", "packed"])
@pytest.mark.parametrize("name", NO_MODELS)
def test_what_is_no_model_class_of_transformers_is_not_called(
    tiny_model, tiny_packed, refused, saved, monkeypatch, state, name
):
    folder = saved(tiny_model("bert") if state == "float" else tiny_packed("bert"))

    def fail(*arguments: object, **options: object) -> None:
        raise AssertionError("called")

    monkeypatch.setattr(transformers, "set_seed", fail)
    message = refused("inspect", write_config(Path(folder), architectures=[name]))

    assert f"is a {name}, which this Transformers does not have as a class of models" in message


@pytest.mark.parametrize(
    "value", [None, [], "BertModel", 5, {"a": 1}, [5], [None], [["BertModel"]], ["BertModel", 5], [{"a": 1}]], ids=str
)
def test_architectures_that_are_no_list_of_names_are_refused(tiny_model, refused, tmp_path, value):
    config_only(tiny_model("bert"), tmp_path)

    message = refused("inspect", write_config(tmp_path, architectures=value))

    assert "architectures" in message and "BertForSequenceClassification" in message


@pytest.mark.parametrize("command", ["inspect", "pack", "unpack", "export", "eval", "train", "distill", "sensitivity"])
def test_code_of_a_model_is_neither_run_nor_offered_to_be(refused, tmp_path, monkeypatch, command):
    code = "raise SystemExit('run')\n"
    (tmp_path / "evil.py").write_text(code)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": {"AutoConfig": "evil.C"}}))
    monkeypatch.setattr("builtins.input", lambda question: "y")
    file = tmp_path / "text.csv"
    file.write_text("sentence,label\na text,0\nanother,1\n")
    output = tmp_path / "output"
    more = {
        "inspect": [],
        "pack": [output],
        "unpack": [output],
        "export": [tmp_path / "model.onnx"],
        "eval": ["--file", file],
        "train": [output, "--train_file", file, "--validation_file", file],
        "distill": [output, "--text", file],
        "sensitivity": ["--file", file],
    }

    message = refused(command, tmp_path, *more[command])

    assert "comes with code of its own, and this command runs no code from a repository" in message


FIELDS = ["unit", "name", "input", "kind", "modes", "modules_to_not_convert", "mode", "quant_method", "unknown"]
# A regular expression too.
ESCAPES = "\x1b2J\u202e\x9b\n"


def edit_names(quantization: dict, key: str) -> None:
    """Puts what a terminal obeys into a field, or into that of every entry of the plan."""
    for entry in quantization["modules"]:
        if key in entry and isinstance(entry[key], str):
            entry[key] = ESCAPES + entry[key]
    if key == "modes":
        quantization |= {"modes": {ESCAPES: "bwn"}, "format_version": 2}
    elif key == "modules_to_not_convert":
        quantization[key] = [ESCAPES]
    elif key not in ("unit", "name", "input", "kind"):
        quantization[ESCAPES if key == "unknown" else key] = ESCAPES


@pytest.mark.parametrize("state", ["latent", "packed"])
@pytest.mark.parametrize("key", FIELDS, ids=ascii)
def test_names_of_a_config_do_not_reach_the_terminal_as_they_are(
    tiny_committed, tiny_packed, saved, capsys, state, key
):
    folder = saved(tiny_packed("bert") if state == "packed" else tiny_committed("bert"))
    path = Path(folder, "config.json")
    config = json.loads(path.read_text())
    edit_names(config["quantization_config"], key)
    path.write_text(json.dumps(config))

    for words in (["inspect", folder], ["inspect", folder, "--json"]):
        capsys.readouterr()
        cli.main(words)
        out, err = capsys.readouterr()
        assert out or err
        assert all(character.isprintable() or character == "\n" for character in out + err)


def test_folder_that_is_no_model_is_refused(refused, tmp_path):
    (tmp_path / "file").write_text("")

    assert "has no config.json: name a folder that save_pretrained wrote" in refused("inspect", tmp_path)
    assert "is a file: name the folder it is in" in refused("inspect", tmp_path / "file")
    assert "there is no folder" in refused("inspect", tmp_path / "missing")
    assert "there is no folder ./missing" in refused("inspect", "./missing")
    (tmp_path / "config.json").write_text("{")
    assert "config.json" in refused("inspect", tmp_path)


def test_example_inputs_come_from_a_file(tiny_model, printed, refused, tmp_path):
    folder = config_only(tiny_model("bert"), tmp_path / "model")
    expected = printed("inspect", folder, "--json")
    file = tmp_path / "inputs.safetensors"
    save_file({"input_ids": torch.zeros(1, 6, dtype=torch.long)}, file)
    assert printed("inspect", folder, "--json", "--example_inputs", file) == expected

    save_file({"input_ids": torch.zeros(1, 2, 3, 6, dtype=torch.long)}, file)
    assert "'input_ids': [1, 2, 3, 6]" in refused("inspect", folder, "--example_inputs", file)
    file.write_text("no tensors")
    assert "cannot be read" in refused("inspect", folder, "--example_inputs", file)
