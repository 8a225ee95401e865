"""Growth and soft refresh of a freeze mask: pure functions with an explicit generator."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import torch
from torch import Tensor


def mask_generator(seed: int, unit: str, tensor: str, step: int) -> torch.Generator:
    """
    CPU generator of one freeze mask at one step.

    Its seed is a hash of the run's mask seed, the names of the unit and of the mask, such as `bert.encoder.layer.0`
    and `bert.encoder.layer.0.output.dense.freeze_mask`, and the optimizer step, from 0 on. So the draw does not depend
    on the rank, on the device, on what other tensors exist, or on what was drawn before: any rank and any resumed run
    draws the same.
    """
    digest = hashlib.sha256(f"{seed}\n{unit}\n{tensor}\n{step}".encode()).digest()
    generator = torch.Generator(device="cpu")
    generator.manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return generator


def frozen_probability(previous: float, fraction: float, refresh_period: float) -> tuple[float, float]:
    """
    Probability that an entry is frozen after a step: `(if it was not, if it was)`.

    With probability `1 / refresh_period` an entry is redrawn from Bernoulli(`fraction`) (the soft refresh of arXiv
    2606.27759); otherwise a frozen entry stays frozen and a free one is frozen with the probability that lifts
    Bernoulli(`previous`) to Bernoulli(`fraction`). So a mask that was Bernoulli(`previous`) becomes
    Bernoulli(`fraction`) whatever the period.

    `previous` and `fraction` are the scheduled frozen fractions of the step before and of this one; `refresh_period`
    is the mean number of steps between two draws of an entry. Raises a `ValueError` if the fraction falls or lies
    outside [0, 1], or the period is below 1 step.
    """
    if not 0.0 <= previous <= fraction <= 1.0:
        raise ValueError(f"a frozen fraction may only grow within [0, 1], got {previous} -> {fraction}")
    if not refresh_period >= 1:
        raise ValueError(f"refresh_period must be at least 1 step, got {refresh_period}")
    redraw = 1.0 / refresh_period
    growth = (fraction - previous) / (1.0 - previous) if previous < 1.0 else 1.0
    return (1.0 - redraw) * growth + redraw * fraction, 1.0 - redraw * (1.0 - fraction)


@dataclass(frozen=True)
class MaskChanges:
    """
    The random part of one step of a mask: which entries may change, and a uniform number for each. Does not depend on
    the mask, so that it can be drawn ahead of time.

    `candidates` are rising indices into the flat mask, int64 of shape `(n,)`, None for all; `chances` are uniform in
    [0, 1), float32 of shape `(n,)`. A free candidate is frozen where its chance is below `freeze`, a frozen one freed
    where its chance is at least `1 - free`.
    """

    candidates: Tensor | None
    chances: Tensor
    freeze: float
    free: float


DENSE_RATE = 0.25
"""From this share of candidates on, one draw for every entry costs less than finding out which are candidates."""


def draw_changes(
    entries: int, previous: float, fraction: float, refresh_period: float, generator: torch.Generator
) -> MaskChanges:
    """
    Draws what one step changes of a freeze mask.

    Every entry is a candidate with the larger of the two probabilities of changing, and the distances between
    candidates are geometric: so a step that changes one entry in a hundred draws two numbers for each hundred entries.

    `entries` is the size of the mask, and `generator` is from [`mask_generator`]; the rest, and the `ValueError`, are
    those of [`frozen_probability`].
    """
    if_free, if_frozen = frozen_probability(previous, fraction, refresh_period)
    freeze, free = if_free, 1.0 - if_frozen
    rate = max(freeze, free)
    if rate >= DENSE_RATE:
        return MaskChanges(None, torch.rand(entries, generator=generator), freeze, free)
    if rate == 0.0:
        return MaskChanges(torch.empty(0, dtype=torch.int64), torch.empty(0), 0.0, 0.0)
    # Six standard deviations more than are expected, so that one round nearly always reaches the end.
    count = math.ceil(entries * rate + 6 * math.sqrt(entries * rate)) + 8
    positions = torch.zeros(1, dtype=torch.float64)
    rounds = []
    while float(positions[-1]) < entries:
        gaps = torch.empty(count, dtype=torch.float64).geometric_(rate, generator=generator)
        positions = positions[-1] + gaps.cumsum(0)
        rounds.append(positions)
    candidates = torch.cat(rounds).sub_(1)
    candidates = candidates[candidates < entries].long()
    chances = torch.rand(len(candidates), generator=generator)
    return MaskChanges(candidates, chances, freeze / rate, free / rate)


@torch.no_grad()
def change_mask_(mask: Tensor, changes: MaskChanges) -> Tensor:
    """
    Applies [`draw_changes`] to a freeze mask of the size that they were drawn for, bool of any shape and device, in
    place; returns the mask itself.
    """
    flat = mask.reshape(-1)
    chances = changes.chances.to(mask.device)
    candidates = None if changes.candidates is None else changes.candidates.to(mask.device)
    current = flat if candidates is None else flat[candidates]
    # Low chances freeze, high ones free: an entry that every step redraws becomes the same, whatever it was.
    changed = torch.where(current, chances < 1.0 - changes.free, chances < changes.freeze)
    if candidates is None:
        flat.copy_(changed)
    else:
        flat[candidates] = changed
    if flat.data_ptr() != mask.data_ptr():
        mask.copy_(flat.view(mask.shape))
    return mask
