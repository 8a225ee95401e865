"""The order of the examples that a Trainer sees."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import Sampler, SequentialSampler
from transformers.trainer_pt_utils import LengthGroupedSampler


class SameStepsResumed:
    """
    A Trainer of which a resumed run takes the steps that it would have taken: the order of `group_by_length` is a
    function of seed and epoch, and a finished run takes no further step. Examples are evaluated in their order.
    """

    args: Any
    state: Any
    control: Any

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # Trainer looks for the end of training only after a step.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)  # type: ignore[misc]

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        sampler = super()._get_train_sampler(*args, **kwargs)  # type: ignore[misc]
        if not isinstance(sampler, LengthGroupedSampler):
            return sampler
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return SeededEveryEpoch(sampler, lambda: seed + int(self.state.epoch or 0))

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        sampler = super()._get_eval_sampler(eval_dataset)  # type: ignore[misc]
        if not isinstance(sampler, LengthGroupedSampler):
            return sampler
        return SequentialSampler(eval_dataset) if self.args.world_size == 1 else None


class SeededEveryEpoch(Sampler[int]):
    """A sampler whose generator gets a seed whenever an epoch begins."""

    def __init__(self, sampler: LengthGroupedSampler, seed: Callable[[], int]) -> None:
        self.sampler, self.seed = sampler, seed

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[int]:
        self.sampler.generator = torch.Generator().manual_seed(self.seed())
        return iter(self.sampler)
