"""Growth and soft refresh of a freeze mask: pure functions with an explicit generator."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def mask_generator(seed: int, unit: str, tensor: str, step: int) -> torch.Generator:
    """
    CPU generator of one freeze mask at one step.

    Its seed is a hash of the arguments, so that the draw does not depend on the rank, on the device, on what other
    tensors exist, or on what was drawn before: any rank and any resumed run draws the same.

    Args:
        seed (`int`): the run's mask seed.
        unit (`str`): name of the unit, e.g. `"bert.encoder.layer.0"`.
        tensor (`str`): name of the mask, e.g. `"bert.encoder.layer.0.output.dense.freeze_mask"`.
        step (`int`): optimizer step, 0-based.
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
    Bernoulli(`previous`) to
    Bernoulli(`fraction`). So a mask that was Bernoulli(`previous`) becomes Bernoulli(`fraction`) whatever the period.

    Args:
        previous (`float`): scheduled frozen fraction of the step before, in [0, 1].
        fraction (`float`): scheduled frozen fraction of this step, in [`previous`, 1].
        refresh_period (`float`): mean number of steps between two draws of an entry, at least 1.

    Raises:
        ValueError: the fraction falls, lies outside [0, 1], or the period is below 1.
    """
    if not 0.0 <= previous <= fraction <= 1.0:
        raise ValueError(f"a frozen fraction may only grow within [0, 1], got {previous} -> {fraction}")
    if not refresh_period >= 1:
        raise ValueError(f"refresh_period must be at least 1 step, got {refresh_period}")
    redraw = 1.0 / refresh_period
    growth = (fraction - previous) / (1.0 - previous) if previous < 1.0 else 1.0
    return (1.0 - redraw) * growth + redraw * fraction, 1.0 - redraw * (1.0 - fraction)


@torch.no_grad()
def advance_mask_(
    mask: Tensor, previous: float, fraction: float, refresh_period: float, generator: torch.Generator
) -> Tensor:
    """
    Grows and refreshes a freeze mask by one step, in place.

    At `fraction = 1` the mask is all ones, exactly, and nothing is drawn.

    Args:
        mask (`Tensor`, bool, any shape and device): overwritten.
        previous (`float`): scheduled frozen fraction of the step before.
        fraction (`float`): scheduled frozen fraction of this step.
        refresh_period (`float`): mean number of steps between two draws of an entry.
        generator (`torch.Generator`): a CPU generator, from [`mask_generator`].

    Returns:
        `Tensor`: `mask` itself.

    Raises:
        ValueError: see [`frozen_probability`].
    """
    if_free, if_frozen = frozen_probability(previous, fraction, refresh_period)
    if fraction >= 1.0:
        return mask.fill_(True)
    draw = torch.rand(mask.shape, generator=generator)
    current = mask.to(draw.device)
    return mask.copy_((draw < if_free) | (current & (draw < if_frozen)))
