from __future__ import annotations

import math

import pytest
import torch
from masks import advance_mask_
from torch import Tensor

from hf_stompp.nn.mask import frozen_probability, mask_generator


ENTRIES = 20_000


def generator(step: int, seed: int = 0, unit: str = "layer.0", tensor: str = "layer.0.freeze_mask") -> torch.Generator:
    return mask_generator(seed, unit, tensor, step)


def draw(**kwargs: object) -> Tensor:
    return torch.rand(64, generator=generator(**{"step": 0, **kwargs}))


def is_binomial(successes: int, trials: int, probability: float) -> bool:
    """Within five standard deviations (and one count); the seeds are fixed, so this either always or never holds."""
    return abs(successes - trials * probability) <= 5 * math.sqrt(trials * probability * (1 - probability)) + 1


@pytest.mark.parametrize("period", [1, 10, 100, 1000, math.inf])
@pytest.mark.parametrize("power", [1, 3], ids=["linear", "cubic"])
def test_growth_keeps_the_scheduled_fraction(power: int, period: float) -> None:
    mask, steps, previous = torch.zeros(ENTRIES, dtype=torch.bool), 150, 0.0
    for step in range(steps):
        fraction = ((step + 1) / steps) ** power
        advance_mask_(mask, previous, fraction, period, generator(step))
        assert is_binomial(int(mask.sum()), ENTRIES, fraction), f"step {step}"
        previous = fraction


@pytest.mark.parametrize("period", [1, 5, 100])
@pytest.mark.parametrize("fraction", [0.2, 0.5, 0.9])
def test_refresh_at_a_constant_fraction_redraws_one_entry_in_period(fraction: float, period: float) -> None:
    mask = torch.zeros(ENTRIES, dtype=torch.bool)
    advance_mask_(mask, 0.0, fraction, period, generator(0))
    frozen, froze, thawed = 0, 0, 0
    for step in range(1, 51):
        before = mask.clone()
        advance_mask_(mask, fraction, fraction, period, generator(step))
        frozen += int(before.sum())
        froze += int((mask & ~before).sum())
        thawed += int((before & ~mask).sum())
    free = 50 * ENTRIES - frozen
    assert froze > 0 and thawed > 0
    # An entry that is redrawn changes with the probability of the other state.
    assert is_binomial(froze, free, fraction / period)
    assert is_binomial(thawed, frozen, (1 - fraction) / period)


def test_with_a_period_of_one_step_the_mask_forgets_the_step_before() -> None:
    masks = [torch.zeros(ENTRIES, dtype=torch.bool), torch.ones(ENTRIES, dtype=torch.bool)]
    for mask in masks:
        advance_mask_(mask, 0.5, 0.5, 1, generator(3))
    assert torch.equal(*masks)


@pytest.mark.parametrize("period", [1e30, math.inf])
def test_without_refresh_a_frozen_entry_never_thaws(period: float) -> None:
    mask = torch.zeros(ENTRIES, dtype=torch.bool)
    for step in range(100):
        before = mask.clone()
        advance_mask_(mask, step / 100, (step + 1) / 100, period, generator(step))
        assert torch.equal(mask | before, mask)


@pytest.mark.parametrize("previous", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("period", [1, 100])
def test_fraction_one_is_exactly_full(previous: float, period: float) -> None:
    mask = torch.zeros(1000, dtype=torch.bool)
    advance_mask_(mask, previous, 1.0, period, generator(0))
    assert mask.all()


def test_fraction_zero_is_exactly_empty() -> None:
    mask = torch.zeros(1000, dtype=torch.bool)
    advance_mask_(mask, 0.0, 0.0, 10, generator(0))
    assert not mask.any()


def test_mask_is_written_in_place() -> None:
    mask = torch.zeros(7, 9, dtype=torch.bool)
    alias, address = mask.view(-1), mask.data_ptr()
    assert advance_mask_(mask, 0.0, 0.5, 10, generator(0)) is mask
    assert mask.data_ptr() == address
    assert alias.any()


def test_a_strided_mask_draws_as_a_contiguous_one() -> None:
    contiguous, strided = torch.zeros(30, 20, dtype=torch.bool), torch.zeros(20, 30, dtype=torch.bool).T
    advance_mask_(contiguous, 0.0, 0.5, 10, generator(0))
    advance_mask_(strided, 0.0, 0.5, 10, generator(0))
    assert torch.equal(contiguous, strided)


def test_draws_repeat_whatever_the_global_random_state() -> None:
    masks = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        mask = torch.zeros(500, dtype=torch.bool)
        advance_mask_(mask, 0.0, 0.5, 10, generator(0))
        assert torch.equal(torch.get_rng_state(), state)
        masks.append(mask)
    assert torch.equal(*masks)


def test_draws_do_not_depend_on_what_was_drawn_before() -> None:
    expected = draw(step=5)
    for step in range(5):
        draw(step=step, tensor="another.freeze_mask")
    assert torch.equal(draw(step=5), expected)


@pytest.mark.parametrize(
    "changed",
    [{"seed": 1}, {"unit": "layer.1"}, {"tensor": "layer.1.freeze_mask"}, {"step": 1}, {"seed": -1}],
    ids=lambda changed: "-".join(f"{name}={value}" for name, value in changed.items()),
)
def test_generators_differ_by_seed_unit_tensor_and_step(changed: dict[str, object]) -> None:
    assert not torch.equal(draw(), draw(**changed))


def test_generator_arguments_do_not_run_into_each_other() -> None:
    assert not torch.equal(draw(unit="layer.1", tensor="0"), draw(unit="layer.", tensor="10"))
    assert not torch.equal(draw(seed=1, step=11), draw(seed=11, step=1))


@pytest.mark.parametrize(
    ("previous", "fraction"), [(0.5, 0.4), (-0.1, 0.5), (0.5, 1.1), (math.nan, 0.5), (0.5, math.nan)]
)
def test_a_fraction_that_falls_or_leaves_the_unit_interval_is_refused(previous: float, fraction: float) -> None:
    mask = torch.zeros(10, dtype=torch.bool)
    with pytest.raises(ValueError, match="may only grow within"):
        advance_mask_(mask, previous, fraction, 10, generator(0))
    assert not mask.any()


@pytest.mark.parametrize("period", [0.99, 0, -5, -math.inf, math.nan])
def test_a_refresh_period_below_one_step_is_refused(period: float) -> None:
    with pytest.raises(ValueError, match="refresh_period must be at least 1"):
        frozen_probability(0.1, 0.2, period)


@pytest.mark.parametrize("period", [1, 3, 100])
@pytest.mark.parametrize(("previous", "fraction"), [(0.0, 0.1), (0.25, 0.75), (0.5, 0.5), (0.9, 1.0), (1.0, 1.0)])
def test_probabilities_lift_one_fraction_exactly_to_the_next(previous: float, fraction: float, period: float) -> None:
    if_free, if_frozen = frozen_probability(previous, fraction, period)
    assert (1 - previous) * if_free + previous * if_frozen == pytest.approx(fraction, abs=1e-15)
    assert 0 <= if_free <= 1 and 0 <= if_frozen <= 1
    assert if_frozen == pytest.approx(1 - (1 - fraction) / period, abs=1e-15)
