"""Checkpoints that a run goes on from: what they must share with it, and what is wrong with one that does not."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, Trainer

from ..machine import processor
from ..model.integrity import check_whole, read_json, verify_files
from ..model.modules import config_of
from .callbacks import ProgressionCallback


logger = logging.getLogger(__name__)

STEP_SETTINGS = (
    *("seed", "data_seed", "train_sampling_strategy", "world_size", "per_device_train_batch_size"),
    "gradient_accumulation_steps",
)
"""Arguments of the Trainer that say which examples make a step."""


class ResumingTrainer(Trainer):
    """A Trainer of a binary model that checks a checkpoint before anything is loaded from it."""

    model: PreTrainedModel

    # Of the run that is resumed.
    _saved_progression: dict[str, Any] | None = None

    def step_settings(self) -> dict[str, Any]:
        """
        What a resumed run must share with the one that it goes on with, beside config and progression:
        [`STEP_SETTINGS`] of the arguments, and in which precision a step is computed.
        """
        return {
            **{name: getattr(self.args, name) for name in STEP_SETTINGS},
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "mixed_precision": self.accelerator.mixed_precision,
        }

    def machine(self) -> str:
        """What decides, beside the settings, in which order sums run: processor or GPU, and the version of PyTorch."""
        device = self.args.device
        name = processor()["name"] if device.type == "cpu" else torch.get_device_module(device).get_device_name(device)
        return f"{name}, torch {torch.__version__}"

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self._check_checkpoint(Path(resume_from_checkpoint))
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        # It was on disk for a while.
        verify_files(sorted(Path(str(self.state.best_model_checkpoint)).glob("*.safetensors")))
        super()._load_best_model()

    def _check_checkpoint(self, folder: Path) -> None:
        """Refuses a checkpoint that is damaged, incomplete, of another config, or was not written by this Trainer."""
        # First: with other processes it would seem incomplete.
        self._check_progress(folder)
        names = check_whole(folder, self.args.world_size, self.accelerator.scaler is not None)
        tied = set(getattr(self.model, "all_tied_weights_keys", None) or ())
        missing = [name for name in self.model.state_dict() if name not in names and name not in tied]
        if missing:
            raise ValueError(
                f"{folder}: the checkpoint lacks {len(missing)} tensors, the first of them {missing[0]!r}; use "
                "another one"
            )
        saved = read_json(folder / "config.json").get("quantization_config", {})
        mine = json.loads(config_of(self.model).to_json_string())
        changed = sorted(name for name in mine if mine[name] != saved.get(name))
        if changed:
            raise ValueError(
                f"{folder}: the checkpoint was trained with another StoMPPConfig; resume with the one it was started "
                "with. Fields that differ, saved -> now: "
                + "; ".join(f"{name}: {saved.get(name)!r} -> {mine[name]!r}" for name in changed)
            )

    def _check_progress(self, folder: Path) -> None:
        """Refuses a checkpoint that holds no progression, or one of a run with other steps; notes its progression."""
        try:
            callbacks = read_json(folder / "trainer_state.json").get("stateful_callbacks", {})
            attributes = dict(callbacks.get(ProgressionCallback.__name__, {}).get("attributes", {}))
            saved = dict(attributes.get("step_settings", {}))
        except (AttributeError, TypeError, ValueError) as error:
            raise ValueError(f"{folder}/trainer_state.json is damaged ({error}); use another checkpoint") from error
        mine = self.step_settings()
        changed = [name for name in mine if name in saved and saved[name] != mine[name]]
        if changed:
            raise ValueError(
                f"{folder}: other examples would make a step, or it would be computed in another precision; resume "
                "with the settings that the run was started with. Saved -> now: "
                + "; ".join(f"{name}: {saved[name]!r} -> {mine[name]!r}" for name in changed)
            )
        before, now = attributes.get("machine"), self.machine()
        if before is not None and before != now and self.is_world_process_zero():
            logger.warning(
                "%s was written on another machine (%s, here %s), where sums may run in another order: the run will "
                "not end in the same bits",
                *(folder, before, now),
            )
        self._saved_progression = attributes.get("progression")
        if self._saved_progression is None:
            raise ValueError(
                f"{folder}/trainer_state.json holds no progression: the checkpoint was not written by StoMPPTrainer"
            )
