"""`StoMPPTrainingArguments`: the Trainer's arguments and those of the progression."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from transformers import TrainingArguments

from .progression import ORDERS, SCHEDULES, steps_of


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
            with the surrogate `"ste"` is vanilla STE.
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

    > Parameters that control evaluation

    Args:
        eval_mixed (`bool`, *optional*, defaults to `True`):
            `eval_*` is always the fully binary network. Until it is committed, evaluate the network as it is in
            training too, as `eval_mixed_*`.
    """

    progression_order: str = field(
        default="forward", metadata={"help": "Order in which units are frozen.", "choices": list(ORDERS)}
    )
    progression_schedule: str = field(
        default="cubic",
        metadata={
            "help": "Frozen fraction of a unit over its window; 'immediate' freezes everything from the first step "
            "on.",
            "choices": list(SCHEDULES),
        },
    )
    progression_warmup: float = field(
        default=0.0, metadata={"help": "Steps before the first window: a share of all steps below 1, steps from 1 on."}
    )
    progression_tail: float = field(
        default=0.3, metadata={"help": "Steps after the last window: a share of all steps below 1, steps from 1 on."}
    )
    progression_overlap: float = field(
        default=0.0, metadata={"help": "Share of its length that a window has in common with the next, in [0, 1)."}
    )
    refresh_period: float = field(
        default=100, metadata={"help": "Mean number of steps between two draws of a mask entry, at least 1."}
    )
    mask_seed: int | None = field(
        default=None, metadata={"help": "Seed of the freeze masks; the seed of the run when not given."}
    )
    train_committed: bool = field(
        default=True,
        metadata={"help": "STE-free: let LayerNorm, biases, scales and shifts of committed units go on learning."},
    )
    eval_mixed: bool = field(
        default=True, metadata={"help": "Evaluate the partly binary network of training too, as eval_mixed_*."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, table in (("progression_order", ORDERS), ("progression_schedule", SCHEDULES)):
            if getattr(self, name) not in table:
                raise ValueError(f"{name} must be one of {sorted(table)}, got {getattr(self, name)!r}")
        for name in ("progression_warmup", "progression_tail"):
            steps_of(getattr(self, name), 1, name)
        if not 0 <= self.progression_overlap < 1:
            raise ValueError(f"progression_overlap must lie in [0, 1), got {self.progression_overlap}")
        if not 1 <= self.refresh_period < math.inf:
            raise ValueError(f"refresh_period must be at least 1 step, got {self.refresh_period}")
