"""`StoMPPTrainingArguments`: the Trainer's arguments and those of the progression."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, fields
from typing import Any

from transformers import TrainingArguments

from .distillation import DEFAULT_LOSSES, LABELS, LOSSES, check_losses
from .methods import option
from .progression import ORDERS, SCHEDULES, ProgressionSettings


@dataclass
class StoMPPTrainingArguments(TrainingArguments):
    """
    Arguments of [`StoMPPTrainer`]: those of [`~transformers.TrainingArguments`], and:

    > Parameters that control the progression

    Args:
        progression_order (`str`, *optional*, defaults to `"forward"`):
            Order in which the units are frozen: `"forward"` (input to output, the paper's), `"reverse"`, `"global"`
            (all at once) or `"random"`.
        progression_schedule (`str`, *optional*, defaults to `"cubic"`):
            Frozen fraction of a unit over its window: `"cubic"` (the paper's), `"linear"`, `"quadratic"`,
            `"flipped_quadratic"`, `"cosine"`, or `"immediate"`: everything is frozen from the first step on, which
            with a straight-through estimator is vanilla STE.
        progression_warmup (`float`, *optional*, defaults to 0.0):
            Steps before the first window, with nothing frozen: a share of all steps below 1, steps from 1 on.
        progression_tail (`float`, *optional*, defaults to 0.3):
            Steps after the last window, with everything frozen: a share of all steps below 1, steps from 1 on.
        progression_overlap (`float`, *optional*, defaults to 0.0):
            Share of its length that a window has in common with the next, in [0, 1).
        refresh_period (`float`, *optional*, defaults to 100):
            Mean number of steps between two draws of a mask entry, at least 1 (the paper's r).
        mask_seed (`int`, *optional*):
            Seed of the freeze masks; `seed` when not given.
        train_committed (`bool`, *optional*, defaults to `True`):
            STE-free only: whether LayerNorm, biases, activation scales and shifts of a committed unit go on learning
            (ours). Its latent weights never do. On by default, as in the paper: over three seeds on SST-2 the two
            could not be told apart (docs/training.md).

    > Parameters that control the optimizer

    Args:
        activation_learning_rate (`float`, *optional*):
            Learning rate of scales, shifts and thresholds of binary activations, which have a group of their own then
            (BiT, arXiv 2205.13016, takes 1e-4). `learning_rate` when not given. They never decay.

    > Parameters that control distillation, where [`StoMPPTrainer`] has a teacher

    Args:
        distillation_losses (`dict[str, float]` or `str`, *optional*):
            What the student learns from the teacher, and with what weight: keys of
            [`~hf_stompp.training.distillation.LOSSES`], and `"labels"` for the model's own loss beside them. As a
            string: JSON. [`DEFAULT_LOSSES`] when not given.
        distillation_temperature (`float`, *optional*, defaults to 1.0):
            Temperature of the logits.

    > Parameters that control evaluation

    Args:
        eval_mixed (`bool`, *optional*, defaults to `True`):
            `eval_*` is always the fully binary network. Until it is committed, evaluate the network as it is in
            training too, as `eval_mixed_*`.

    > Parameters that control the model card

    Args:
        card_speed (`bool`, *optional*, defaults to `False`):
            Time the packed model for its card, on the machine that writes it, beside a float one of the same shapes.
            That model is made for it, which takes its memory and some seconds.
    """

    progression_order: str = option("Order in which units are frozen.", "forward", ORDERS)
    progression_schedule: str = option(
        "Frozen fraction of a unit over its window; 'immediate' freezes everything from the first step on.",
        "cubic",
        SCHEDULES,
    )
    progression_warmup: float = option(
        "Steps before the first window: a share of all steps below 1, steps from 1 on.", 0.0
    )
    progression_tail: float = option(
        "Steps after the last window: a share of all steps below 1, steps from 1 on.", 0.3
    )
    progression_overlap: float = option(
        "Share of its length that a window has in common with the next, in [0, 1).", 0.0
    )
    refresh_period: float = option("Mean number of steps between two draws of a mask entry, at least 1.", 100)
    mask_seed: int | None = option("Seed of the freeze masks; the seed of the run when not given.")
    train_committed: bool = option(
        "STE-free: let LayerNorm, biases, scales and shifts of committed units go on learning.", True
    )
    activation_learning_rate: float | None = option(
        "Learning rate of scales, shifts and thresholds of binary activations; that of the rest when not given."
    )
    distillation_losses: dict[str, Any] | str | None = option(
        f"What is learned from a teacher, as JSON: a weight for some of {', '.join(LOSSES)}, and {LABELS} "
        f"for the model's own loss. {json.dumps(DEFAULT_LOSSES)} when not given."
    )
    distillation_temperature: float = option("Temperature of teacher's and student's logits.", 1.0)
    eval_mixed: bool = option("Evaluate the partly binary network of training too, as eval_mixed_*.", True)
    card_speed: bool = option("Time the packed model beside a float one of its shapes, for the model card.", False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_distillation()
        ProgressionSettings(**self.progression())
        rate = self.activation_learning_rate
        if rate is not None and not 0 < rate < math.inf:
            raise ValueError(f"activation_learning_rate must be a finite number above 0, got {rate}")

    def progression(self) -> dict[str, Any]:
        """Fields of [`~hf_stompp.training.progression.ProgressionSettings`]."""
        names = ("order", "schedule", "warmup", "tail", "overlap")
        seed = self.seed if self.mask_seed is None else self.mask_seed
        settings = {name: getattr(self, f"progression_{name}") for name in names}
        return {**settings, "refresh_period": self.refresh_period, "seed": seed}

    def own_arguments(self) -> dict[str, Any]:
        """What this class adds to the arguments of Transformers, and a run depends on: values by name."""
        known = {item.name for item in fields(TrainingArguments)} | {"card_speed"}
        return {item.name: getattr(self, item.name) for item in fields(self) if item.name not in known}

    def _check_distillation(self) -> None:
        losses = DEFAULT_LOSSES if self.distillation_losses is None else self.distillation_losses
        if isinstance(losses, str):
            try:
                losses = json.loads(losses)
            except ValueError as error:
                raise ValueError(f"distillation_losses={losses!r} is no JSON ({error})") from error
        self.distillation_losses = check_losses(losses)
        if not 0 < self.distillation_temperature < math.inf:
            raise ValueError(
                f"distillation_temperature must be a finite number above 0, got {self.distillation_temperature}"
            )
