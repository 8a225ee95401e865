"""One step of a mask, drawn and applied at once. Training draws the next step while it computes the present one."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from hf_stompp.nn.mask import change_mask_, draw_changes


def advance_mask_(mask: Tensor, *step: Any) -> Tensor:
    return change_mask_(mask, draw_changes(mask.numel(), *step))


def advance(module: Any, previous: float, fraction: float, *step: Any) -> None:
    if fraction < 1.0:
        module.change(draw_changes(module.freeze_mask.numel(), previous, fraction, *step))
    else:
        module.commit()
