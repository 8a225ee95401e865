"""The order of the examples that a Trainer sees."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import Sampler, SequentialSampler
from transformers.trainer_pt_utils import LengthGroupedSampler


class ReproducibleGrouping:
    """
    A Trainer's `group_by_length` whose order is a function of seed and epoch, so that a run that is resumed within an
    epoch sees the same batches, and evaluates examples in the order of the data set.
    """

    args: Any
    state: Any

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
