"""What each part costs when it alone is binarized: the parts, their costs against models made by hand, the command."""

from __future__ import annotations

import copy
import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from hf_stompp import StoMPPConfig, binarize, cli, commit, pack
from hf_stompp.cli import sensitivity
from hf_stompp.cli.sensitivity import Budget, suggestion_for
from hf_stompp.model.modules import masked_modules
from hf_stompp.model.sensitivity import (
    Cost,
    Part,
    as_options,
    binarized_alone,
    cost_of,
    linear_names,
    parts_of,
    suggest_modes,
)


WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"word{i}" for i in range(59))]


def test_parts_are_layers_names_and_single_layers(tiny_model: Callable) -> None:
    linears = linear_names(tiny_model("bert"))
    parts = parts_of(linears)
    assert [part.detail for part in parts] == ["unit"] * 2 + ["kind"] * 6 + ["module"] * 12
    by_name = {part.name: part.modules for part in parts}
    assert set(by_name["bert.encoder.layer.1"]) == {name for name in linears if ".layer.1." in name}
    assert by_name["attention.self.key"] == tuple(f"bert.encoder.layer.{i}.attention.self.key" for i in (0, 1))
    # `output.dense` ends the name of `attention.output.dense`, too.
    assert by_name["output.dense"] == tuple(f"bert.encoder.layer.{i}.output.dense" for i in (0, 1))
    for detail in ("unit", "kind", "module"):
        assert sorted(name for part in parts if part.detail == detail for name in part.modules) == sorted(linears)


def test_parts_are_found_in_every_family(tiny_model: Callable, family: str) -> None:
    model = tiny_model(family)
    linears = linear_names(model)
    assert set(linears) == {
        name for name, entry in binarize(model).config.quantization_config.plan.items() if entry.is_linear
    }


def test_cost_of_one_layer_is_that_of_signs_put_in_by_hand(tiny_model: Callable, tiny_inputs: Callable) -> None:
    model, inputs = tiny_model("bert"), tiny_inputs("bert", batch=6)
    before = copy.deepcopy(model.state_dict())
    labels = torch.tensor([0, 1, 2, 0, 1, 2])

    def answer(other: Any) -> torch.Tensor:
        with torch.no_grad():
            return other(**inputs).logits

    linears = linear_names(model)
    found = {
        (part.name, mode): cost_of(
            part, mode, answer(binarized_alone(model, part, mode, linears, inputs)), answer(model), labels
        )
        for part in parts_of(linears)
        for mode in ("bnn", "bwn")
    }
    name = "bert.encoder.layer.1.attention.self.value"
    by_hand = copy.deepcopy(model)
    linear: nn.Linear = by_hand.get_submodule(name)
    with torch.no_grad():
        linear.weight.copy_(torch.where(linear.weight >= 0, 1.0, -1.0) * linear.weight.abs().mean(1, keepdim=True))

    def rounded(module: nn.Module, inputs: tuple[torch.Tensor]) -> torch.Tensor:
        step = inputs[0].abs().amax(-1, keepdim=True) / 127
        return (inputs[0] / step).round() * step

    linear.register_forward_pre_hook(rounded)
    expected, logits = (answer(one).double().softmax(-1) for one in (model, by_hand))
    divergence = (expected * (expected / logits).log()).sum(-1).mean().item()
    assert found[name, "bwn"].divergence == pytest.approx(divergence, rel=1e-3)
    assert found[name, "bwn"].accuracy == pytest.approx((logits.argmax(-1) == labels).float().mean().item())
    # The whole of one layer, binarized without modes, everything else being excluded.
    config = StoMPPConfig(modules_to_not_convert=["embeddings", "pooler", "classifier", r"layer\.0"])
    whole = binarize(copy.deepcopy(model), config).eval()
    answer(whole)
    logits = answer(commit(whole)).double().softmax(-1)
    divergence = (expected * (expected / logits).log()).sum(-1).mean().item()
    assert found["bert.encoder.layer.1", "bnn"].divergence == pytest.approx(divergence, rel=1e-3)
    assert not masked_modules(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def cost(name: str, divergence: float, mode: str = "bnn", detail: str = "module") -> Cost:
    return Cost(Part(detail, name, (name,)), mode, divergence, 0.5)


def test_layers_whose_other_mode_saves_most_are_changed_until_nothing_fits() -> None:
    measured = [cost("key", 0.1), cost("query", 0.3), cost("value", 0.2)]
    measured += [cost("key", 0.2, "bwn"), cost("query", 0.2, "bwn"), cost("value", 0.01, "bwn")]
    measured += [cost("layer", 0.9, detail="unit")]
    one_each = {name: {"bnn": 0.0, "bwn": 1.0} for name in ("key", "query", "value")}
    assert suggest_modes(measured, one_each, 1) == {"key": "bnn", "query": "bnn", "value": "bwn"}
    # A layer that loses by the change keeps its mode, whatever is left.
    assert suggest_modes(measured, one_each, 9) == {"key": "bnn", "query": "bwn", "value": "bwn"}
    as_float = {name: {"bnn": 0.0, "float": 1.0} for name in one_each}
    assert suggest_modes(measured, as_float, 2) == {"key": "bnn", "query": "float", "value": "float"}
    # By what is saved for the price: 0.19 for 10, 0.1 for 2, 0.3 for 40.
    priced = {
        "key": {"bnn": 5.0},
        "query": {"bnn": 5.0, "bwn": 7.0, "float": 45.0},
        "value": {"bnn": 5.0, "bwn": 15.0},
    }
    assert suggest_modes(measured, priced, 17) == {"key": "bnn", "query": "bwn", "value": "bnn"}
    # The larger saving would fit, too, but costs more for what it saves.
    assert suggest_modes(measured, priced, 25) == {"key": "bnn", "query": "bwn", "value": "bnn"}
    assert suggest_modes(measured, priced, 27) == {"key": "bnn", "query": "bwn", "value": "bwn"}
    assert suggest_modes(measured, priced, 65) == {"key": "bnn", "query": "float", "value": "bwn"}
    # Of two modes of one price the better.
    assert suggest_modes(measured, {"value": {"bnn": 1.0, "bwn": 1.0}}, 1) == {"value": "bwn"}
    with pytest.raises(ValueError, match="need 15 in their cheapest modes, and the budget is 14"):
        suggest_modes(measured, priced, 14)
    with pytest.raises(ValueError, match="needs the cost of layer in mode bnn"):
        suggest_modes(measured, {"layer": {"bnn": 0.0}}, 1)


def test_most_layers_have_the_mode_and_the_others_are_named() -> None:
    modes = {"layer.0.key": "bwn", "layer.0.value": "float", "layer.1.key": "bwn", "layer.1.value": "bnn"}
    expected = {"mode": "bwn", "modes": {r"layer\.0\.value": "float", r"layer\.1\.value": "bnn"}}
    assert as_options(modes) == expected
    assert as_options({"key": "float"}) == {"mode": "bnn", "modes": {"key": "float"}}


@pytest.fixture
def model(tiny_model: Callable, tmp_path: Path) -> Path:
    tiny_model("bert").save_pretrained(tmp_path / "model")
    transformers.BertTokenizer(vocab={word: row for row, word in enumerate(WORDS)}).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def examples(folder: Path, count: int) -> Path:
    datasets = pytest.importorskip("datasets")
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(59, (count, 5), generator=generator).tolist()
    texts = [" ".join(f"word{i}" for i in row) for row in rows]
    datasets.Dataset.from_dict({"text": texts, "label": [row[0] % 3 for row in rows]}).to_csv(folder / "dev.csv")
    return folder / "dev.csv"


@pytest.mark.slow
def test_command_prints_a_table_a_suggestion_that_binarize_takes_and_a_picture(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["sensitivity", str(model), "--file", str(examples(tmp_path, 60)), "--keep", "3"]
    capsys.readouterr()
    assert cli.main([*words, "--json", "--plot", str(tmp_path / "costs.png")]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["examples"] == 28 and len(result["parts"]) == 40
    single = [part for part in result["parts"] if part["detail"] == "module" and part["mode"] == "bnn"]
    by_mode = {
        (part["name"], part["mode"]): part["divergence"] for part in result["parts"] if part["detail"] == "module"
    }
    names = {part["name"] for part in single}
    worst = sorted(names, key=lambda name: by_mode[name, "bwn"] - by_mode[name, "bnn"])[:3]
    suggestion = result["suggestion"]
    assert suggestion["mode"] == "bnn" and suggestion["cost"] == {"keep": 3.0}
    assert sorted(pattern.replace("\\", "") for pattern in suggestion["modes"]) == sorted(worst)
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(model)
    plan = binarize(loaded, StoMPPConfig(modes=suggestion["modes"])).config.quantization_config.plan
    found = {name for name, entry in plan.items() if entry.is_linear and entry.input is None}
    assert found == set(worst)
    assert (tmp_path / "costs.png").stat().st_size > 5000
    assert cli.main(words) == 0
    printed = capsys.readouterr().out
    assert "accuracy" in printed and "attention.self.key" in printed
    line = next(line for line in printed.splitlines() if line.startswith("--mode "))
    # What is printed is what the other commands take.
    assert cli.main(["inspect", str(model), *shlex.split(line), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["options"]["modes"] == suggestion["modes"]
    for wrong in (["--detail", "unit"], ["--mode", "bnn"]):
        assert cli.main([*words, *wrong]) == 2
        assert "--keep needs the costs of single layers in both modes" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("file/costs.png", "cannot write to "),
        ("folder.png", "is a folder: name a file"),
        ("costs.doc", "ends in no kind of picture: name one that ends in ."),
    ],
)
def test_picture_that_cannot_be_written_is_refused_before_anything_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str, message: str
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(sensitivity, "measure", lambda arguments: pytest.fail("it was measured"))
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder.png").mkdir()
    assert cli.main(["sensitivity", "model", "--file", "dev.csv", "--plot", str(tmp_path / name)]) == 2
    printed = capsys.readouterr()
    assert message in printed.err and printed.err.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder.png"]


@pytest.mark.parametrize("name", ["deep/costs.svg", "costs"])
def test_measurement_that_fails_leaves_the_earlier_picture_and_no_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "costs.png").write_text("earlier")
    monkeypatch.setattr(sensitivity, "measure", lambda arguments: 1 / 0)
    assert cli.main(["sensitivity", "model", "--file", "dev.csv", "--plot", str(tmp_path / name)]) == 2
    assert "ZeroDivisionError" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["costs.png"]
    assert (tmp_path / "costs.png").read_text() == "earlier"


@pytest.mark.slow
def test_suggestion_for_a_number_of_bytes_makes_a_file_that_fits(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["sensitivity", str(model), "--file", str(examples(tmp_path, 60)), "--detail", "module", "--json"]
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(model)

    def file_bytes(**options: Any) -> int:
        binary = binarize(copy.deepcopy(loaded), StoMPPConfig(**options))
        with torch.no_grad():
            binary(input_ids=torch.ones(1, 4, dtype=torch.long))
        pack(commit(binary)).save_pretrained(tmp_path / "packed")
        return (tmp_path / "packed" / "model.safetensors").stat().st_size

    def number_in_refusal(limit: int) -> int:
        assert cli.main([*words, "--bytes", str(limit)]) == 2
        return int(re.findall(r"([\d,]+) bytes", capsys.readouterr().err)[0].replace(",", ""))

    capsys.readouterr()
    # What the refusals name can be asked for, and one byte less cannot.
    smallest, whole = number_in_refusal(1), number_in_refusal(10**9)
    assert number_in_refusal(smallest - 1) == smallest
    for limit in (smallest, (smallest + whole) // 2, whole - 1):
        assert cli.main([*words, "--bytes", str(limit)]) == 0
        suggestion = json.loads(capsys.readouterr().out)["suggestion"]
        cost = suggestion["cost"]["bytes"]
        size = file_bytes(mode=suggestion["mode"], modes=suggestion["modes"])
        # The header is estimated, from above.
        assert 0.9 * cost < size <= cost <= limit
        left_float = sum(mode == "float" for mode in suggestion["modes"].values())
        assert (limit == smallest) == (left_float == 0)


def test_suggestion_for_a_time_says_what_the_packed_model_takes(tiny_model: Callable) -> None:
    model = tiny_model("bert")
    names = list(linear_names(model))
    measured = [cost(name, row / 10, mode) for mode in ("bnn", "bwn") for row, name in enumerate(names, 1)]
    budget = Budget("milliseconds", 20.0, 3.0, {name: {"bnn": 1.0, "bwn": 1.5, "float": 2.0} for name in names})
    suggestion = suggestion_for(budget, model, measured, 8)
    # Twelve layers in bnn and the rest are 15; the five that lose most become float.
    assert suggestion["mode"] == "bnn"
    assert suggestion["modes"] == {name.replace(".", "\\."): "float" for name in names[-5:]}
    assert suggestion["cost"]["milliseconds"] == 20.0
    assert suggestion["cost"]["measured_packed"] > 0 and suggestion["cost"]["measured_float"] > 0


@pytest.mark.parametrize(
    ("limit", "message"),
    [("1e-6", "with every layer in its cheapest mode it is"), ("60000", "is enough for the float")],
)
def test_a_time_that_leaves_nothing_to_choose_is_refused(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], limit: str, message: str
) -> None:
    words = ["sensitivity", str(model), "--file", str(examples(tmp_path, 60)), "--max_length", "8"]
    capsys.readouterr()
    assert cli.main([*words, "--milliseconds", limit]) == 2
    printed = capsys.readouterr()
    assert message in printed.err and "ms for a text of 8 tokens" in printed.err and printed.out == ""


@pytest.mark.parametrize(
    ("state", "count", "message"),
    [("packed", 60, "is packed, binary already: name the float model"), ("float", 32, "32 examples: more than 32")],
)
def test_what_cannot_be_measured_is_refused(
    tiny_packed: Callable,
    model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    state: str,
    count: int,
    message: str,
) -> None:
    if state == "packed":
        tiny_packed("bert").save_pretrained(model)
    file = examples(tmp_path, count)
    capsys.readouterr()
    assert cli.main(["sensitivity", str(model), "--file", str(file)]) == 2
    printed = capsys.readouterr()
    assert message in printed.err and printed.out == "" and printed.err.count("\n") == 1
