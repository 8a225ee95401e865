"""The benchmark of networks from scratch: its command lines, its results, and what the page says of them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from programs import load


ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "vision.jsonl"


@pytest.fixture(scope="module")
def vision() -> ModuleType:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import vision

    return vision


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load(ROOT / "examples" / "image_classification" / "run_image_classification.py")


@pytest.fixture
def lines(vision: Any) -> list[dict[str, Any]]:
    return vision.read_lines(RESULTS)


def test_the_script_takes_the_command_line_of_every_run(vision: Any, script: Any, tmp_path: Path) -> None:
    arguments = vision.parse_arguments([str(tmp_path), "--train_file", "a.parquet", "--validation_file", "b.parquet"])
    blocks = {18: 8, 34: 16, 50: 16}
    for depth, network in vision.DEPTHS.items():
        for cell, asked in vision.CELLS.items():
            words = vision.command_of(cell, depth, 3, tmp_path, arguments)
            model, data, recipe, training = script.parse_arguments([*words, "--use_cpu", "True"])
            assert model.model_type == asked.get("model_type", network.model_type)
            assert depth not in blocks or sum(model.config_overrides["depths"]) == blocks[depth]
            assert (recipe.method, training.seed, data.image_size) == (asked["method"], 3, 64)
    # Blocks of three convolutions and of depthwise ones are not those of Bi-Real.
    assert [depth for depth in vision.DEPTHS if vision.exists("bireal-ste", depth)] == [18, 34]


@pytest.fixture
def images(vision: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Arguments of eight small images, for the shallowest of networks."""
    import numpy as np
    from datasets import ClassLabel, Dataset, Features, Image
    from PIL import Image as PILImage

    pictures = [PILImage.fromarray(np.full((16, 16, 3), 20 * index, dtype=np.uint8)) for index in range(8)]
    features = Features({"img": Image(), "label": ClassLabel(names=["a", "b"])})
    rows = {"img": pictures, "label": [index % 2 for index in range(8)]}
    file = str(tmp_path / "images.parquet")
    Dataset.from_dict(rows, features=features).to_parquet(file)
    shallow = vision.DEPTHS[18]._replace(config={**vision.RESNET, "depths": [1, 1, 1, 1]})
    monkeypatch.setitem(vision.DEPTHS, 18, shallow)
    return [str(tmp_path / "work"), "--train_file", file, "--validation_file", file, "--depth", "18"]


@pytest.mark.slow
def test_a_run_is_done_once_and_leaves_a_line(vision: Any, images: list[str], tmp_path: Path) -> None:
    results = tmp_path / "results.jsonl"
    words = [*images, "--results", str(results), "--cell", "stompp", "--epochs", "4", "--batch_size", "4"]

    vision.main(words)
    (line,) = vision.read_lines(results)
    vision.main(words)

    assert len(vision.read_lines(results)) == 1
    assert (line["cell"], line["depth"], line["mode"], line["steps"]["binary"]) == ("stompp", 18, "bnn", 8)
    assert str(tmp_path) not in json.dumps(line) and "--activation_functions sign" in line["command"]
    assert not list((tmp_path / "work").glob("*/checkpoint-*"))


@pytest.mark.slow
def test_gradients_and_flips_of_every_block_are_noted_at_every_step(images: list[str], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    import vision_gradients

    output, figure = tmp_path / "gradients.json", tmp_path / "gradients.png"
    words = ["--cell", "ste", "--steps", "3", "--batch_size", "4", "--output", str(output), "--plot", str(figure)]
    vision_gradients.main([*images, *words])

    result = json.loads(output.read_text(encoding="utf-8"))
    noted = result["methods"]["STE"]
    for kind in ("gradient_norm", "flips"):
        assert [len(series) for series in noted[kind].values()] == [3] * 4
    # The binary network learns: gradients arrive in every block.
    assert all(value > 0 for series in noted["gradient_norm"].values() for value in series)
    assert str(tmp_path) not in json.dumps(result) and figure.stat().st_size > 1000


def test_the_page_says_what_the_results_do(vision: Any, lines: list[dict[str, Any]]) -> None:
    page = (ROOT / "docs" / "findings.md").read_text(encoding="utf-8")

    assert {line["cell"] for line in lines} >= set(vision.SHOWN)
    assert vision.table_of(lines) in page
    for line in lines:
        assert line["steps"]["binary" if line["mode"] else "float"] == 3128 and line["machine"] and line["command"]


def test_the_figure_is_drawn(vision: Any, lines: list[dict[str, Any]], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    vision.plot(lines, tmp_path / "vision.png")

    assert (tmp_path / "vision.png").stat().st_size > 10_000
