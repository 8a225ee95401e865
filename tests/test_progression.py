from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Iterator

import pytest

from hf_stompp.training.progression import (
    ORDERS,
    SCHEDULES,
    Progression,
    ProgressionSettings,
    plan_progression,
    plan_windows,
    steps_of,
)


UNITS = ["layer.0", "layer.1", "layer.2"]


def random_plans(count: int = 400) -> Iterator[tuple[dict[str, object], Progression]]:
    """Settings that can finish, and their progressions."""
    choose = random.Random(0)
    while count:
        settings = {
            "total_steps": choose.choice([choose.randint(1, 60), choose.randint(60, 3000)]),
            "order": choose.choice(list(ORDERS)),
            "schedule": choose.choice(list(SCHEDULES)),
            "warmup": choose.choice([0, 0.1, choose.random() / 2, choose.randint(1, 20)]),
            "tail": choose.choice([0, 0.3, choose.random() / 2, choose.randint(1, 20)]),
            "overlap": choose.choice([0, 0.5, 0.99, choose.random()]),
            "seed": choose.randint(0, 99),
        }
        units = [f"layer.{i}" for i in range(choose.randint(1, 24))]
        windows = 1 if settings["order"] == "global" else len(units)
        warmup, tail = (steps_of(settings[name], settings["total_steps"], name) for name in ("warmup", "tail"))
        needed = warmup + (1 if settings["schedule"] == "immediate" else windows + tail)
        if needed <= settings["total_steps"]:
            count -= 1
            yield settings, plan_progression(units, **settings)


# a share or a number of steps


@pytest.mark.parametrize(
    ("value", "steps"), [(0, 0), (0.0, 0), (0.3, 60), (0.999, 200), (1, 1), (1.0, 1), (2, 2), (50.0, 50), (0.001, 0)]
)
def test_below_one_is_a_share_and_from_one_on_a_number_of_steps(value: float, steps: int) -> None:
    assert steps_of(value, 200, "tail") == steps


@pytest.mark.parametrize("value", [-0.1, -1, 1.5, 2.25, math.nan, math.inf])
def test_neither_a_share_nor_a_whole_number_of_steps_is_refused_by_name(value: float) -> None:
    with pytest.raises(ValueError, match="progression_tail must be a share"):
        steps_of(value, 200, "progression_tail")


# orders and windows


@pytest.mark.parametrize(
    ("order", "windows"),
    [
        ("forward", [(0, 30), (30, 60), (60, 90)]),
        ("reverse", [(60, 90), (30, 60), (0, 30)]),
        ("global", [(0, 90)] * 3),
    ],
)
def test_order_gives_each_unit_its_window(order: str, windows: list[tuple[int, int]]) -> None:
    assert plan_windows(3, 100, ProgressionSettings(order, tail=10)) == windows


def test_random_order_shuffles_the_windows_by_seed() -> None:
    forward = plan_windows(12, 240, ProgressionSettings("forward", tail=0))
    shuffled = [plan_windows(12, 240, ProgressionSettings("random", tail=0, seed=seed)) for seed in range(5)]
    assert all(sorted(windows) == forward for windows in shuffled)
    assert len({tuple(windows) for windows in [forward, *shuffled]}) == 6
    assert plan_windows(12, 240, ProgressionSettings("random", tail=0, seed=3)) == shuffled[3]


@pytest.mark.parametrize(
    ("settings", "windows"),
    [
        ({"warmup": 0.1, "tail": 0.3}, [(10, 30), (30, 50), (50, 70)]),
        ({"warmup": 10, "tail": 30}, [(10, 30), (30, 50), (50, 70)]),
        ({"warmup": 1, "tail": 0}, [(1, 34), (34, 67), (67, 100)]),
        ({"tail": 0, "overlap": 0.5}, [(0, 50), (25, 75), (50, 100)]),
        ({"warmup": 20, "tail": 0.2, "overlap": 0.25}, [(20, 44), (38, 62), (56, 80)]),
        ({"tail": 97}, [(0, 1), (1, 2), (2, 3)]),
    ],
    ids=lambda value: "-".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_windows_by_hand(settings: dict[str, float], windows: list[tuple[int, int]]) -> None:
    assert plan_windows(3, 100, ProgressionSettings(**settings)) == windows


def test_windows_reach_from_the_warmup_to_the_tail() -> None:
    for settings, plan in random_plans():
        warmup, tail = (steps_of(settings[name], plan.total_steps, name) for name in ("warmup", "tail"))
        windows = sorted(map(tuple, plan.windows))
        assert windows[0][0] == warmup, settings
        if plan.schedule == "immediate":
            assert set(windows) == {(warmup, warmup)}
            continue
        assert max(end for _, end in windows) == plan.total_steps - tail, settings
        assert all(start < end for start, end in windows), settings
        lengths = [end - start for start, end in windows]
        assert max(lengths) - min(lengths) <= 2, settings


def test_windows_without_overlap_follow_one_another_without_gap() -> None:
    for units, total in itertools.product(range(2, 25), range(24, 1300, 7)):
        windows = plan_windows(units, total, ProgressionSettings(tail=0))
        assert [start for start, _ in windows[1:]] == [end for _, end in windows[:-1]], (units, total, windows)


@pytest.mark.parametrize("overlap", [0.1, 0.5, 0.8])
def test_a_window_has_the_share_overlap_in_common_with_the_next(overlap: float) -> None:
    windows = plan_windows(6, 6000, ProgressionSettings(tail=0, overlap=overlap))
    for (start, end), (following, _) in itertools.pairwise(windows):
        assert (end - following) / (end - start) == pytest.approx(overlap, abs=0.002)


# schedules


@pytest.mark.parametrize(
    ("schedule", "tenth", "half"),
    [
        ("cubic", 0.001, 0.125),
        ("linear", 0.1, 0.5),
        ("quadratic", 0.01, 0.25),
        ("flipped_quadratic", 0.19, 0.75),
        ("cosine", 0.0244717, 0.5),
    ],
)
def test_schedule_by_hand(schedule: str, tenth: float, half: float) -> None:
    plan = plan_progression(["a", "b"], 30, schedule=schedule, warmup=5, tail=5)
    assert plan.windows == [[5, 15], [15, 25]]
    assert [plan.fraction(0, step) for step in (0, 4, 14, 15, 29)] == [0, 0, 1, 1, 1]
    assert plan.fraction(0, 5) == pytest.approx(tenth, rel=1e-5)
    assert plan.fraction(0, 9) == pytest.approx(half)
    assert plan.fraction(1, 14) == 0
    assert plan.fraction(1, 15) == pytest.approx(tenth, rel=1e-5)


def test_every_schedule_is_covered() -> None:
    assert set(SCHEDULES) == {"cubic", "linear", "quadratic", "flipped_quadratic", "cosine", "immediate"}
    assert set(ORDERS) == {"forward", "reverse", "global", "random"}


def test_immediate_commits_every_unit_in_the_first_step_after_the_warmup() -> None:
    plan = plan_progression(UNITS, 10, schedule="immediate", warmup=4)
    assert [[plan.fraction(unit, step) for step in range(10)] for unit in range(3)] == [[0.0] * 4 + [1.0] * 6] * 3
    assert plan.committed_step == 4
    assert plan.unit_in_transition(4) is None
    assert plan_progression(UNITS, 10, schedule="immediate").committed_step == 0


def test_immediate_needs_no_step_a_unit() -> None:
    assert plan_progression(UNITS, 1, schedule="immediate").fraction(2, 0) == 1.0


def test_fractions_grow_from_zero_to_one_and_never_fall() -> None:
    for settings, plan in random_plans(150):
        for unit, (start, end) in enumerate(plan.windows):
            fractions = [plan.fraction(unit, step) for step in range(-1, plan.total_steps)]
            assert all(0.0 <= a <= b <= 1.0 for a, b in itertools.pairwise(fractions)), settings
            assert not any(fractions[: start + 1]), settings
            # Index 0 is the step before the run.
            assert fractions[max(end, start + 1)] == 1.0, settings
            assert all(0.0 < fraction < 1.0 for fraction in fractions[start + 1 : end]), settings


def test_committed_step_is_the_first_with_every_unit_full() -> None:
    for settings, plan in random_plans(100):
        full = [
            step
            for step in range(plan.total_steps)
            if all(plan.fraction(unit, step) == 1.0 for unit in range(len(plan.units)))
        ]
        assert full[0] == plan.committed_step, settings


@pytest.mark.parametrize(
    ("order", "in_transition"),
    [
        ("forward", [0, 0, None, 1, 1, None, 2, 2, None, None]),
        ("reverse", [2, 2, None, 1, 1, None, 0, 0, None, None]),
        ("global", [0] * 8 + [None] * 2),
    ],
)
def test_unit_in_transition_is_neither_free_nor_committed(order: str, in_transition: list[int | None]) -> None:
    plan = plan_progression(UNITS, 10, order=order, tail=1)
    assert [plan.unit_in_transition(step) for step in range(10)] == in_transition


def test_unit_in_transition_is_the_earliest_where_windows_overlap() -> None:
    plan = plan_progression(UNITS, 100, order="reverse", tail=0, overlap=0.5)
    assert [plan.unit_in_transition(step) for step in (10, 30, 49, 60)] == [2, 2, 1, 1]


# what is refused


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_units": 0}, "there is no unit to binarize"),
        ({"order": "backward"}, r"progression_order must be one of \['forward', .*'reverse'\], got 'backward'"),
        ({"schedule": "quartic"}, r"progression_schedule must be one of \['cosine', 'cubic', .*'quartic'"),
        ({"overlap": 1.0}, r"progression_overlap must lie in \[0, 1\), got 1.0"),
        ({"overlap": -0.1}, r"progression_overlap must lie in \[0, 1\), got -0.1"),
        ({"overlap": math.nan}, r"progression_overlap must lie in \[0, 1\), got nan"),
        ({"warmup": -1}, "progression_warmup must be a share"),
        ({"warmup": 1.5}, "progression_warmup must be a share"),
        ({"tail": -0.5}, "progression_tail must be a share"),
        ({"total_steps": 2, "tail": 0}, "2 steps less a warm-up of 0 and a tail of 0 leave 2 steps for 3 windows"),
        ({"warmup": 0.5, "tail": 0.5}, "leave 0 steps for 3 windows"),
        ({"warmup": 80, "tail": 80}, "leave 0 steps for 3 windows"),
        ({"order": "global", "tail": 100}, "leave 0 steps for 1 windows"),
        ({"schedule": "immediate", "warmup": 100}, "progression_warmup takes 100 of 100 steps"),
        ({"total_steps": 0}, "the schedule cannot finish"),
    ],
    ids=lambda value: "-".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_a_plan_that_makes_no_sense_is_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        asked = {"num_units": 3, "total_steps": 100, **settings}
        units, steps = asked.pop("num_units"), asked.pop("total_steps")
        plan_windows(units, steps, ProgressionSettings(**asked))


def test_global_needs_one_step_for_all_units() -> None:
    assert plan_windows(3, 1, ProgressionSettings("global", tail=0)) == [(0, 1)] * 3


@pytest.mark.parametrize("period", [0, 0.5, -1, math.nan])
def test_a_refresh_period_below_one_step_is_refused(period: float) -> None:
    with pytest.raises(ValueError, match="refresh_period must be at least 1"):
        plan_progression(UNITS, 100, refresh_period=period)


# saved and compared


def test_a_progression_survives_json() -> None:
    for settings, plan in random_plans(50):
        saved = json.loads(json.dumps(plan.to_dict()))
        assert Progression(**saved) == plan, settings
        assert plan.difference(saved) == []


@pytest.mark.parametrize(
    ("changed", "lines"),
    [
        ({"seed": 1}, ["seed: 0 -> 1"]),
        ({"refresh_period": 10}, ["refresh_period: 100 -> 10"]),
        ({"schedule": "linear"}, ["schedule: 'cubic' -> 'linear'"]),
        ({"units": ["a", "b", "c"]}, [f"units: {UNITS!r} -> ['a', 'b', 'c']"]),
        (
            {"total_steps": 200, "tail": 60},
            ["windows: [[0, 13], [13, 27], [27, 40]] -> [[0, 47], [47, 93], [93, 140]]", "total_steps: 100 -> 200"],
        ),
        ({"tail": 0.6}, []),
    ],
    ids=["seed", "refresh", "schedule", "units", "steps", "same"],
)
def test_difference_names_the_changed_fields(changed: dict[str, object], lines: list[str]) -> None:
    saved = json.loads(json.dumps(plan_progression(UNITS, 100, tail=60).to_dict()))
    now = plan_progression(**{"units": UNITS, "total_steps": 100, "tail": 60, **changed})
    assert now.difference(saved) == lines


def test_a_field_that_was_not_saved_is_a_difference() -> None:
    plan = plan_progression(UNITS, 100)
    saved = plan.to_dict()
    del saved["seed"]
    assert plan.difference(saved) == ["seed: None -> 0"]
