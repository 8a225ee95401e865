"""
The progression: which fraction of each unit is frozen at which step. Order x schedule x windows, as plain functions.

Everything here is a function of its arguments: no state is kept from one step to the next.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any


def _random_order(num_units: int, seed: int) -> list[int]:
    positions = list(range(num_units))
    random.Random(seed).shuffle(positions)
    return positions


ORDERS: dict[str, Callable[[int, int], list[int]]] = {
    "forward": lambda num_units, seed: list(range(num_units)),
    "reverse": lambda num_units, seed: list(range(num_units))[::-1],
    "global": lambda num_units, seed: [0] * num_units,
    "random": _random_order,
}
"""
Order by name: `(num_units, seed) -> position of each unit's window`, units counted from the input. `forward` goes from
input to output (the paper's), `reverse` from output to input, `global` gives all units one window, `random` shuffles.
"""

SCHEDULES: dict[str, Callable[[float], float]] = {
    "cubic": lambda time: time**3,
    "linear": lambda time: time,
    "quadratic": lambda time: time**2,
    "flipped_quadratic": lambda time: 1.0 - (1.0 - time) ** 2,
    "cosine": lambda time: 0.5 - 0.5 * math.cos(math.pi * time),
    "immediate": lambda time: 1.0,
}
"""
Schedule by name: share of the window that has passed, in (0, 1], to frozen fraction. `cubic` is the paper's.
`immediate` has windows of no length: every unit is committed from the first step after the warm-up on, which with the
surrogate `ste` is vanilla STE (BinaryConnect, arXiv 1511.00363).
"""


def steps_of(value: float, total_steps: int, name: str) -> int:
    """
    Number of steps meant by a setting that is a share of all steps below 1 and a number of steps from 1 on. Raises a
    ValueError if it is negative, or neither a share nor a whole number.
    """
    if not 0 <= value < math.inf or (value >= 1 and value != int(value)):
        raise ValueError(
            f"{name} must be a share of all steps in [0, 1) or a whole number of steps from 1 on, got {value}"
        )
    return int(value) if value >= 1 else round(value * total_steps)


@dataclass(frozen=True)
class ProgressionSettings:
    """
    In which order and how fast units freeze, whatever their number and that of the steps.

    Args:
        order (`str`, *optional*, defaults to `"forward"`): a key of [`ORDERS`].
        schedule (`str`, *optional*, defaults to `"cubic"`): a key of [`SCHEDULES`].
        warmup (`float`, *optional*, defaults to 0.0):
            Steps before the first window, all units float; below 1 a share of all steps.
        tail (`float`, *optional*, defaults to 0.3):
            Steps after the last window, all units committed; below 1 a share of all steps.
        overlap (`float`, *optional*, defaults to 0.0):
            Share of its length that a window has in common with the next, in [0, 1).
        refresh_period (`float`, *optional*, defaults to 100):
            Mean number of steps between two draws of a mask entry, at least 1 (the paper's r).
        seed (`int`, *optional*, defaults to 0): of the masks and of the order `random`.

    Raises:
        ValueError: one of them is out of range.
    """

    order: str = "forward"
    schedule: str = "cubic"
    warmup: float = 0.0
    tail: float = 0.3
    overlap: float = 0.0
    refresh_period: float = 100
    seed: int = 0

    def __post_init__(self) -> None:
        if self.order not in ORDERS:
            raise ValueError(f"progression_order must be one of {sorted(ORDERS)}, got {self.order!r}")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"progression_schedule must be one of {sorted(SCHEDULES)}, got {self.schedule!r}")
        if not 0.0 <= self.overlap < 1.0:
            raise ValueError(f"progression_overlap must lie in [0, 1), got {self.overlap}")
        if not 1 <= self.refresh_period < math.inf:
            raise ValueError(f"refresh_period must be at least 1 step, got {self.refresh_period}")
        self.steps_around(1)

    def steps_around(self, total_steps: int) -> tuple[int, int]:
        """Steps before the first window, and after the last."""
        return (
            steps_of(self.warmup, total_steps, "progression_warmup"),
            steps_of(self.tail, total_steps, "progression_tail"),
        )


def plan_windows(num_units: int, total_steps: int, settings: ProgressionSettings) -> list[tuple[int, int]]:
    """
    Window of each unit: its first step and the step after its last. In the last step of its window a unit is full.

    Args:
        num_units (`int`).
        total_steps (`int`): optimizer steps of the whole run.
        settings (`ProgressionSettings`).

    Returns:
        `list[tuple[int, int]]`: start (inclusive) and end (exclusive) in absolute steps, one pair a unit.

    Raises:
        ValueError: no unit, or a schedule that cannot finish within `total_steps`.
    """
    if num_units < 1:
        raise ValueError("there is no unit to binarize; call binarize(model, config) on a model with encoder layers")
    order, overlap = settings.order, settings.overlap
    warmup_steps, tail_steps = settings.steps_around(total_steps)
    if settings.schedule == "immediate":
        if warmup_steps >= total_steps:
            raise ValueError(
                f"the schedule cannot finish: progression_warmup takes {warmup_steps} of {total_steps} steps; shorten "
                "it or train longer"
            )
        return [(warmup_steps, warmup_steps)] * num_units
    positions = ORDERS[order](num_units, settings.seed)
    num_windows = max(positions) + 1
    available = total_steps - warmup_steps - tail_steps
    if available < num_windows:
        raise ValueError(
            f"the schedule cannot finish: {total_steps} steps less a warm-up of {warmup_steps} and a tail of "
            f"{tail_steps} leave {max(available, 0)} steps for {num_windows} windows ({num_units} units, order "
            f"{order!r}); train longer, shorten progression_warmup or progression_tail, or take a coarser unit"
        )
    length = available / (1 + (num_windows - 1) * (1 - overlap))
    # The same expression for an end as for the next start: otherwise rounding would leave gaps.
    starts = [warmup_steps + round(position * (1 - overlap) * length) for position in positions]
    ends = [warmup_steps + round((position * (1 - overlap) + 1) * length) for position in positions]
    return [(start, max(end, start + 1)) for start, end in zip(starts, ends, strict=True)]


@dataclass(frozen=True)
class Progression:
    """
    What is frozen when, in absolute steps: saved with every checkpoint and compared on resume.

    Args:
        units (`list[str]`): names of the units, from input to output.
        windows (`list[list[int]]`): start (inclusive) and end (exclusive) of each unit's window, in steps.
        schedule (`str`): a key of [`SCHEDULES`].
        order (`str`): a key of [`ORDERS`].
        total_steps (`int`): optimizer steps of the whole run.
        refresh_period (`float`): mean number of steps between two draws of a mask entry.
        seed (`int`): seed of the masks and of the order `random`.
    """

    units: list[str]
    windows: list[list[int]]
    schedule: str
    order: str
    total_steps: int
    refresh_period: float
    seed: int

    def fraction(self, unit: int, step: int) -> float:
        """Scheduled frozen fraction of a unit during a 0-based step; 0 before the run."""
        start, end = self.windows[unit]
        if step < start:
            return 0.0
        if step >= end - 1:
            return 1.0
        return SCHEDULES[self.schedule]((step - start + 1) / (end - start))

    def unit_in_transition(self, step: int) -> int | None:
        """Index of the first unit, in order of the windows, that is partly frozen during a step; None without one."""
        partial = [i for i in range(len(self.units)) if 0.0 < self.fraction(i, step) < 1.0]
        return min(partial, key=lambda i: self.windows[i], default=None)

    def is_boundary(self, step: int) -> bool:
        """Whether a unit's window begins with this step, or the unit commits with it."""
        changes = [
            (self.fraction(i, step - 1) if step else 0.0, self.fraction(i, step)) for i in range(len(self.units))
        ]
        return any((before == 0.0) != (now == 0.0) or (before == 1.0) != (now == 1.0) for before, now in changes)

    @property
    def committed_step(self) -> int:
        """The first step during which every unit is full."""
        return max(max(end - 1, start) for start, end in self.windows)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return asdict(self)

    def difference(self, other: dict[str, Any]) -> list[str]:
        """Lines `field: saved -> now` for the fields in which a saved progression differs from this one."""
        mine = self.to_dict()
        names = [name for name in mine if mine[name] != other.get(name)]
        return [f"{name}: {other.get(name)!r} -> {mine[name]!r}" for name in names]


def plan_progression(units: list[str], total_steps: int, **settings: Any) -> Progression:
    """
    The progression of a run.

    Args:
        units (`list[str]`): their names, from input to output.
        total_steps (`int`): optimizer steps of the whole run.
        **settings: fields of [`ProgressionSettings`].

    Returns:
        `Progression`.

    Raises:
        ValueError: no unit, a setting out of range, or a schedule that cannot finish within `total_steps`.
    """
    asked = ProgressionSettings(**settings)
    windows = [list(window) for window in plan_windows(len(units), total_steps, asked)]
    return Progression(
        list(units), windows, asked.schedule, asked.order, total_steps, asked.refresh_period, asked.seed
    )
