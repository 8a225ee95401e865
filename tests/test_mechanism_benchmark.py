"""The benchmark of gradients and sign flips: what it notes, against weights and gradients that are set by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from programs import load

from hf_stompp import StoMPPConfig, binarize
from hf_stompp.model.modules import config_of, unit_modules


ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def mechanism() -> Any:
    pytest.importorskip("datasets")
    return load(ROOT / "benchmarks" / "mechanism.py")


def test_norms_and_flips_are_those_of_each_layer(mechanism: Any, tiny_model: Callable) -> None:
    model = binarize(tiny_model("bert"), StoMPPConfig())
    watch = mechanism.Watch(model)
    units = unit_modules(model, config_of(model))
    first, second = (
        [module.weight for module in modules.values() if hasattr(module, "weight")] for modules in units.values()
    )
    for weight in first:
        weight.grad = torch.full_like(weight, 2.0)
    second[0].grad = torch.full_like(second[0], 3.0)
    watch.on_pre_optimizer_step(None, None, None)
    entries = sum(weight.numel() for weight in first)
    assert [norms[0] for norms in watch.gradients.values()] == pytest.approx(
        [2.0 * entries**0.5, 3.0 * second[0].numel() ** 0.5]
    )
    with torch.no_grad():
        for weight in first:
            weight[0].neg_()
    watch.on_step_end(None, None, None)
    watch.on_step_end(None, None, None)
    flipped = sum(weight[0].numel() for weight in first)
    assert list(watch.flips.values()) == [[pytest.approx(flipped / entries), 0.0], [0.0, 0.0]]


def test_every_method_of_the_figure_is_one_that_the_recipe_knows(mechanism: Any) -> None:
    for options in mechanism.METHODS.values():
        config = {name: value for name, value in options.items() if not name.startswith("progression_")}
        assert mechanism.RecipeArguments(**config).config() is not None


def test_figure_has_a_row_for_each_method(mechanism: Any, tmp_path: Path) -> None:
    series = {f"layer.{number}": [0.1 * number + 0.01 * step for step in range(20)] for number in range(1, 4)}
    method = {"accuracy": 80.0, "gradient_norm": series, "flips": series}
    sizes = []
    for count in (1, 3):
        mechanism.plot({"methods": {f"method {number}": method for number in range(count)}}, tmp_path / "figure.png")
        from matplotlib import image

        sizes.append(image.imread(tmp_path / "figure.png").shape[0])
    assert sizes[1] > sizes[0] + 200
