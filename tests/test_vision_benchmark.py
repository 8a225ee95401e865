"""The benchmark of networks from scratch: its command lines, its results, and what the page says of them."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "vision.jsonl"


def load(file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"loaded_{file.stem}", file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def vision() -> ModuleType:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    return load(ROOT / "benchmarks" / "vision.py")


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load(ROOT / "examples" / "image_classification" / "run_image_classification.py")


@pytest.fixture
def lines(vision: Any) -> list[dict[str, Any]]:
    return vision.read_lines(RESULTS)


def test_the_script_takes_the_command_line_of_every_run(vision: Any, script: Any, tmp_path: Path) -> None:
    arguments = vision.parse_arguments([str(tmp_path), "--train_file", "a.parquet", "--validation_file", "b.parquet"])
    for depth in vision.DEPTHS:
        for cell, asked in vision.CELLS.items():
            words = vision.command_of(cell, depth, 3, tmp_path, arguments)
            model, data, recipe, training = script.parse_arguments([*words, "--use_cpu", "True"])
            assert sum(model.config_overrides["depths"]) == {18: 8, 34: 16, 50: 16}[depth]
            assert (recipe.method, training.seed, data.image_size) == (asked["method"], 3, 64)


@pytest.mark.slow
def test_a_run_is_done_once_and_leaves_a_line(vision: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import numpy as np
    from datasets import ClassLabel, Dataset, Features, Image
    from PIL import Image as PILImage

    pictures = [PILImage.fromarray(np.full((16, 16, 3), 20 * index, dtype=np.uint8)) for index in range(8)]
    features = Features({"img": Image(), "label": ClassLabel(names=["a", "b"])})
    rows = {"img": pictures, "label": [index % 2 for index in range(8)]}
    Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "images.parquet")
    monkeypatch.setitem(vision.DEPTHS, 18, {"depths": [1, 1, 1, 1], "layer_type": "basic"})
    file, results = str(tmp_path / "images.parquet"), tmp_path / "results.jsonl"
    words = [str(tmp_path / "work"), "--train_file", file, "--validation_file", file, "--results", str(results)]
    words += ["--depth", "18", "--cell", "stompp", "--epochs", "4", "--batch_size", "4"]

    vision.main(words)
    (line,) = vision.read_lines(results)
    vision.main(words)

    assert len(vision.read_lines(results)) == 1
    assert (line["cell"], line["depth"], line["mode"], line["steps"]["binary"]) == ("stompp", 18, "bnn", 8)
    assert str(tmp_path) not in json.dumps(line) and "--activation_functions sign" in line["command"]
    assert not list((tmp_path / "work").glob("*/checkpoint-*"))


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
