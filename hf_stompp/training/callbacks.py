"""
What carries a model through its progression in a training loop: callbacks of Transformers' trainers, and a scheduler
for loops of one's own.
"""

from __future__ import annotations

import logging
from typing import Any, cast

import torch
from torch import nn
from transformers import TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState, ProgressCallback

from ..model.cautions import few_steps
from ..model.modules import binarized_part, config_of, masked_modules
from .freezing import Freezing, check_masks, reset_masks
from .progression import Progression, ProgressionSettings, plan_progression


logger = logging.getLogger(__name__)


def refuse_another(progression: Progression, saved: dict[str, Any]) -> None:
    """Refuses another progression than the run was started with, by a ValueError that names what differs."""
    changes = progression.difference(saved)
    if changes:
        raise ValueError(
            "this run resumes a checkpoint with another progression; resume with the settings it was started with, or "
            "start anew in another output_dir. Saved -> now: " + "; ".join(changes)
        )


def _refuse_several(processes: int, gpus: int = 1) -> None:
    if processes > 1 or gpus > 1:
        raise ValueError(
            f"this runs in one process on one GPU, here are {processes} and {gpus}: each would initialise activations "
            "from batches of its own. Use StoMPPTrainer, or CUDA_VISIBLE_DEVICES=0"
        )


def _makes_activations_binary(encoder: nn.Module) -> bool:
    """Whether a run changes activations from float to binary: not one that starts from a model that is binary."""
    return config_of(encoder).has_binary_activations and not all(m.committed for m in masked_modules(encoder).values())


class ProgressionCallback(TrainerCallback, ExportableState):
    """
    Makes a Trainer binarize what it trains: once per optimizer step the masks advance. [`StoMPPTrainer`] has one of
    its own; this is for others, such as `SentenceTransformerTrainer`, in one process. What they evaluate before the
    last unit is committed is the network as it is then, partly float.

    Args:
        train_committed (`bool`, *optional*, defaults to `True`): as in [`StoMPPTrainingArguments`].
        trainer (`StoMPPTrainer`, *optional*): whose progression it is.
        **progression: fields of [`~hf_stompp.training.progression.ProgressionSettings`]: `order`, `schedule`,
            `warmup`, `tail`, `overlap`, `refresh_period`, `seed`.

    Raises:
        TypeError, ValueError: one of them does not exist, or has a bad value; when training begins, several processes
            or GPUs.

    Example:

    ```python
    >>> trainer = SentenceTransformerTrainer(model, args, train_dataset, loss=loss, callbacks=[ProgressionCallback()])
    ```
    """

    def __init__(self, train_committed: bool = True, trainer: Any = None, **progression: Any) -> None:
        # Now, not when the data is ready.
        ProgressionSettings(**progression)
        self.settings = progression
        self.train_committed = train_committed
        self.trainer = trainer
        self.progression: Progression | None = None
        self.freezing: Freezing | None = None

    def state(self) -> dict[str, Any]:
        """What Transformers writes into checkpoints: arguments to make the callback anew, and how training went on."""
        is_own = self.trainer is not None
        args = {} if is_own else {"train_committed": self.train_committed, **self.settings}
        if self.progression is None:
            return {"args": args, "attributes": {}}
        attributes: dict[str, Any] = {"progression": self.progression.to_dict()}
        if is_own:
            attributes |= {"step_settings": self.trainer.step_settings(), "machine": self.trainer.machine()}
        return {"args": args, "attributes": attributes}

    def _plan(self, args: TrainingArguments, state: TrainerState, encoder: nn.Module) -> Progression:
        """The progression of a Trainer that knows nothing of it."""
        _refuse_several(args.world_size, args.n_gpu)
        progression = plan_progression(config_of(encoder).units, state.max_steps, **self.settings)
        saved = cast(dict, state.stateful_callbacks).get(type(self).__name__, {}).get("attributes", {})
        if state.global_step > 0 and "progression" in saved:
            refuse_another(progression, saved["progression"])
        return progression

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: Any, model: nn.Module | None = None, **kwargs: Any
    ) -> None:
        if self.trainer is not None:
            encoder, train_committed = self.trainer.model, self.trainer.args.train_committed
            self.progression = self.trainer.plan(state.max_steps)
        else:
            encoder, train_committed = binarized_part(cast(nn.Module, model)), self.train_committed
            self.progression = self._plan(args, state, encoder)
        if state.global_step > 0:
            check_masks(encoder, self.progression, state.global_step - 1)
        else:
            warning = few_steps(state.max_steps) if _makes_activations_binary(encoder) else None
            if warning is not None and state.is_world_process_zero:
                logger.warning("%s", warning)
            # auto_find_batch_size starts again with the masks of the attempt that failed.
            reset_masks(encoder)
        self.freezing = Freezing(encoder, self.progression, train_committed)
        # Else only checkpoints would have it, and not what save_state() writes.
        cast(dict, state.stateful_callbacks)[type(self).__name__] = self.state()

    def on_step_begin(
        self, args: Any, state: TrainerState, control: Any, optimizer: Any = None, **kwargs: Any
    ) -> None:
        assert self.progression is not None and self.freezing is not None
        # Before a unit commits: full masks are the same on every rank whatever they were.
        if self.trainer is not None and self.progression.is_boundary(state.global_step):
            self.trainer.check_same_masks()
        self.freezing.begin_step(state.global_step, optimizer)

    def on_pre_optimizer_step(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        assert self.freezing is not None
        self.freezing.before_update(state.global_step)

    def on_optimizer_step(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        assert self.freezing is not None
        self.freezing.after_update()


class UnitProgressCallback(ProgressCallback):
    """The Trainer's progress bar, with the unit in transition behind it."""

    def __init__(self, trainer: Any) -> None:
        super().__init__()
        self.trainer = trainer

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        progression = self.trainer.progression_callback.progression
        if self.training_bar is not None and progression is not None:
            step = state.global_step - 1
            unit = progression.unit_in_transition(step)
            if unit is not None:
                text = f"{progression.units[unit]} {progression.fraction(unit, step):.0%} frozen"
            else:
                text = "fully binary" if step >= progression.committed_step else ""
            self.training_bar.set_postfix_str(text, refresh=False)
        super().on_step_end(args, state, control, **kwargs)


class MaskScheduler:
    """
    Binarizes a model in a training loop of one's own. It is used like a learning-rate scheduler: made after the
    optimizer, `step()` after each `optimizer.step()`.

    Steps that the optimizer does not take, while gradients accumulate or where one was not finite, do not count. It
    starts with empty masks, whatever the model had, and runs in one process.

    Args:
        model (`nn.Module`): after [`binarize`], or with such a model inside.
        optimizer (`torch.optim.Optimizer`): of PyTorch, or as Accelerate prepared it.
        total_steps (`int`): optimizer steps of the whole run.
        train_committed (`bool`, *optional*, defaults to `True`): as in [`StoMPPTrainingArguments`].
        **progression: fields of [`~hf_stompp.training.progression.ProgressionSettings`].

    Raises:
        ValueError: nothing in the model is binarized, the schedule cannot finish, nothing would be trained, or there
            are several processes.

    Example:

    ```python
    >>> scheduler = MaskScheduler(model, optimizer, total_steps=len(dataloader) * epochs)
    >>> for batch in dataloader:
    ...     model(**batch).loss.backward()
    ...     optimizer.step()
    ...     scheduler.step()
    ...     optimizer.zero_grad()
    >>> packed = pack(model)
    ```
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Any,
        total_steps: int,
        train_committed: bool = True,
        **progression: Any,
    ) -> None:
        is_distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        _refuse_several(torch.distributed.get_world_size() if is_distributed else 1)
        self.encoder = binarized_part(model)
        self.progression = plan_progression(config_of(self.encoder).units, total_steps, **progression)
        self.optimizer = optimizer
        self.freezing = Freezing(self.encoder, self.progression, train_committed)
        self.updates = 0
        taken = getattr(optimizer, "optimizer", optimizer)
        taken.register_step_pre_hook(self._before_update)
        taken.register_step_post_hook(self._after_update)
        reset_masks(self.encoder)
        self.masks_at = -1
        self.step()

    def _before_update(self, *args: Any) -> None:
        self.freezing.before_update(self.updates)

    def _after_update(self, optimizer: Any, *args: Any) -> None:
        self.freezing.after_update()
        # A GradScaler lets a fused optimizer find out for itself that the step is not to be taken.
        overflow = getattr(optimizer, "found_inf", None)
        self.updates += overflow is None or not bool(overflow)

    def step(self) -> None:
        """Brings the masks to the optimizer step that comes next."""
        if self.masks_at < self.updates:
            self.masks_at = self.updates
            self.freezing.begin_step(self.updates, self.optimizer)

    @property
    def is_committed(self) -> bool:
        """Whether every mask is full: the model is binary, and can be packed."""
        return all(module.committed for module in masked_modules(self.encoder).values())

    def state_dict(self) -> dict[str, Any]:
        """Steps taken, the masks and the step that they are at, and the progression."""
        masks = {name: module.freeze_mask.clone() for name, module in masked_modules(self.encoder).items()}
        return {
            "updates": self.updates,
            "masks_at": self.masks_at,
            "masks": masks,
            "progression": self.progression.to_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """
        Goes on where another left off; model and optimizer load their own states.

        Raises:
            ValueError: it had another progression, or the masks are not what that left.
        """
        refuse_another(self.progression, state_dict["progression"])
        for name, module in masked_modules(self.encoder).items():
            module.restore(state_dict["masks"][name].to(module.freeze_mask.device))
        check_masks(self.encoder, self.progression, state_dict["masks_at"])
        self.updates, self.masks_at = state_dict["updates"], state_dict["masks_at"]
        self.step()
