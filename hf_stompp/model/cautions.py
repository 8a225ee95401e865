"""What is told in the first step, not when the run is over: masks that nothing advances, a run that is too short."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn

from ..nn import MaskedBinaryModule


logger = logging.getLogger(__name__)

FEW_STEPS = 2000
"""Optimizer steps below which binary activations stay far from float, see [`few_steps`]."""


def watch(model: nn.Module) -> None:
    """
    Makes a binarized model warn, once, in the first forward pass of a training that does not [`attend`] to it. A
    compiled model does not warn.
    """
    model.register_forward_pre_hook(_warn)


def attend(model: nn.Module) -> None:
    """Says that somebody advances the masks of a model, or that it has none."""
    for key, hook in list(model._forward_pre_hooks.items()):
        if hook is _warn:
            # Threads that run one model share its hooks.
            model._forward_pre_hooks.pop(key, None)


def _warn(model: nn.Module, args: Any) -> None:
    if torch.compiler.is_compiling() or not (model.training and torch.is_grad_enabled()):
        return
    attend(model)
    masked: list[Any] = [module for module in model.modules() if isinstance(module, MaskedBinaryModule)]
    if not any(p.requires_grad for module in masked if not module.committed for p in module.parameters()):
        return
    logger.warning(
        "%s is trained, and nothing advances its masks: what is float in it will stay so. Use StoMPPTrainer, or give "
        "another trainer callbacks=[ProgressionCallback()], or a loop of your own a MaskScheduler; commit(model) "
        "makes it binary from the first step on.",
        type(model).__name__,
    )


def few_steps(total_steps: int) -> str | None:
    """
    A warning for a run of few optimizer steps that makes activations binary; `None` for a longer one. The figures are
    MiniLM's on SST-2 (`benchmarks/results/accuracy.jsonl`; of the 11,800 steps 3,350 were on text without labels).
    """
    if total_steps >= FEW_STEPS:
        return None
    return (
        f"{total_steps:,} optimizer steps are few for binary activations: on SST-2, MiniLM was 8 points below float "
        "after 2,100 steps of 32 examples, and 3 after 11,800. More epochs help, and mode='bwn' most: it was 1 "
        "point below after 2,100 (docs/benchmarks.md)"
    )
