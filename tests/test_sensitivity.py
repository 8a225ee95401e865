"""What each part costs when it alone is binarized: the parts, their costs against models made by hand, the command."""

from __future__ import annotations

import copy
import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from hf_stompp import StoMPPConfig, binarize, cli, commit
from hf_stompp.patching import masked_modules
from hf_stompp.sensitivity import Cost, Part, binarized_alone, cost_of, linear_names, parts_of, suggest_modes


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
        name for name, entry in binarize(model).config.quantization_config.table.items() if entry["kind"] == "linear"
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


def test_the_costliest_single_layers_are_suggested(tiny_model: Callable) -> None:
    def cost(name: str, divergence: float, detail: str = "module", mode: str = "bnn") -> Cost:
        return Cost(Part(detail, name, (name,)), mode, divergence, None)

    measured = [cost("layer.0.key", 0.1), cost("layer.1.key", 0.3), cost("layer.0.value", 0.2)]
    measured += [cost("layer.1", 0.9, "unit"), cost("layer.0.key", 5.0, mode="bwn")]
    assert suggest_modes(measured, 2) == {r"layer\.1\.key": "bwn", r"layer\.0\.value": "bwn"}
    assert suggest_modes(measured, 1, "float") == {r"layer\.1\.key": "float"}
    with pytest.raises(ValueError, match="costs of single layers in mode bnn"):
        suggest_modes([cost("layer.1", 0.9, "unit")], 1)


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


def test_command_prints_a_table_a_suggestion_that_binarize_takes_and_a_picture(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["sensitivity", str(model), "--file", str(examples(tmp_path, 60)), "--keep", "3"]
    capsys.readouterr()
    assert cli.main([*words, "--json", "--plot", str(tmp_path / "costs.png")]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["examples"] == 28 and len(result["parts"]) == 40
    single = [part for part in result["parts"] if part["detail"] == "module" and part["mode"] == "bnn"]
    worst = sorted(single, key=lambda part: -part["divergence"])[:3]
    assert [pattern.replace("\\", "") for pattern in result["modes"]] == [part["name"] for part in worst]
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(model)
    table = binarize(loaded, StoMPPConfig(modes=result["modes"])).config.quantization_config.table
    assert [name for name, entry in table.items() if entry["kind"] == "linear" and entry["input"] is None] == [
        name for name in linear_names(transformers.AutoModelForSequenceClassification.from_pretrained(model))
        if name in {part["name"] for part in worst}
    ]  # fmt: skip
    assert (tmp_path / "costs.png").stat().st_size > 5000
    assert cli.main(words) == 0
    printed = capsys.readouterr().out
    assert "accuracy" in printed and "attention.self.key" in printed
    line = next(line for line in printed.splitlines() if line.startswith("--modes "))
    # What is printed is what the other commands take.
    assert cli.main(["inspect", str(model), *shlex.split(line), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["options"]["modes"] == result["modes"]
    assert cli.main([*words, "--detail", "unit"]) == 2
    assert "--keep needs the costs of single layers" in capsys.readouterr().err


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
