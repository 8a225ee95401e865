"""What a step of the progression does to a model: masks grow, and what is committed stops training."""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from ..config import StoMPPConfig
from ..model.cautions import attend
from ..model.modules import config_of, masked_modules, unit_modules, unit_parameters
from ..nn import MaskedBinaryActivation, MaskedBinaryModule
from ..nn.mask import MaskChanges, draw_changes, mask_generator
from .progression import Progression


Changes = dict[str, MaskChanges]


def _draw(progression: Progression, unit: int, sizes: dict[str, int], step: int) -> Changes:
    previous = progression.fraction(unit, step - 1) if step else 0.0
    fraction, name = progression.fraction(unit, step), progression.units[unit]
    return {
        tensor: draw_changes(
            size, previous, fraction, progression.refresh_period, mask_generator(progression.seed, name, tensor, step)
        )
        for tensor, size in sizes.items()
    }


def _latent(modules: dict[str, MaskedBinaryModule]) -> list[Any]:
    """Those that have a latent weight: not the activations."""
    return [module for module in modules.values() if not isinstance(module, MaskedBinaryActivation)]


def check_settings(config: StoMPPConfig, progression: Progression, train_committed: bool) -> None:
    """
    Checks that a progression trains something, and that `train_committed` says something. Raises a ValueError if every
    weight is frozen before the first step and passes no gradient, or if committed units are to stop learning where
    their weights go on.
    """
    from_the_start = progression.schedule == "immediate" and all(start == 0 for start, _ in progression.windows)
    if from_the_start and config.surrogate == "none":
        raise ValueError(
            "progression_schedule='immediate' with surrogate='none' freezes every weight before the first step "
            "and passes no gradient: nothing in the encoder would be trained. For vanilla STE use "
            "StoMPPConfig(surrogate='ste')"
        )
    if not train_committed and config.surrogate != "none":
        raise ValueError(
            f"train_committed=False needs StoMPPConfig(surrogate='none'), got {config.surrogate!r}: with a "
            "straight-through estimator the weights of a committed unit go on learning"
        )


class Freezing:
    """
    Carries a model through a progression, one optimizer step at a time.

    What it does is a function of the step, the progression and the masks as the step before left them. The random
    numbers of a step do not depend on the masks: they are drawn by a thread while the step before runs.

    In STE-free training (`surrogate="none"`) what is frozen stays where it is: entries of a partly frozen weight are
    written back after each update, and a committed weight gets no gradient, so that the optimizer passes it over; its
    state in the optimizer is let go.

    Args:
        model (`PreTrainedModel`): after [`binarize`].
        progression (`Progression`).
        train_committed (`bool`, *optional*, defaults to `True`): whether LayerNorm, biases, activation scales and
            shifts of a committed unit go on learning (STE-free only).

    Raises:
        ValueError: see [`check_settings`].
    """

    def __init__(self, model: nn.Module, progression: Progression, train_committed: bool = True) -> None:
        config = config_of(model)
        check_settings(config, progression, train_committed)
        attend(model)
        self.progression = progression
        self.units: list[dict[str, MaskedBinaryModule]] = list(unit_modules(model, config).values())
        self.parameters = unit_parameters(model, config)
        self.ste_free = config.surrogate == "none"
        self.train_committed = train_committed
        self._held: list[tuple[Any, Tensor]] = []
        self._released: set[int] = set()
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="hf_stompp-masks")
        self._ahead: dict[tuple[int, int], Future[Changes]] = {}

    def _is_partial(self, unit: int, step: int) -> bool:
        return 0.0 < self.progression.fraction(unit, step) < 1.0

    def begin_step(self, step: int, optimizer: torch.optim.Optimizer | None = None) -> None:
        """
        Brings every mask from the step before to `step`, in place.

        Args:
            step (`int`): 0-based optimizer step that is about to be taken.
            optimizer (`torch.optim.Optimizer`, *optional*): where the state of committed weights is let go.
        """
        for unit, modules in enumerate(self.units):
            if self._is_partial(unit, step):
                for name, changes in self._changes(unit, step).items():
                    modules[name.removesuffix(".freeze_mask")].change(changes)
            elif self.progression.fraction(unit, step) == 1.0 and not all(m.committed for m in modules.values()):
                for module in modules.values():
                    module.commit()
        self._draw_ahead(step + 1)
        if optimizer is not None and self.ste_free:
            self._release_committed(optimizer)

    def _sizes(self, unit: int) -> dict[str, int]:
        return {f"{name}.freeze_mask": m.freeze_mask.numel() for name, m in self.units[unit].items()}

    def _changes(self, unit: int, step: int) -> Changes:
        ahead = self._ahead.pop((unit, step), None)
        return _draw(self.progression, unit, self._sizes(unit), step) if ahead is None else ahead.result()

    def _draw_ahead(self, step: int) -> None:
        self._ahead = {
            (unit, step): self._executor.submit(_draw, self.progression, unit, self._sizes(unit), step)
            for unit in range(len(self.units))
            if self._is_partial(unit, step)
        }

    def _committed_parameters(self, unit: int) -> list[nn.Parameter]:
        """What of a committed unit does not train any more."""
        modules = self.units[unit]
        if not all(module.committed for module in modules.values()):
            return []
        latent = [module.weight for module in _latent(modules)]
        return latent if self.train_committed else [*latent, *self.parameters[unit]]

    def _release_committed(self, optimizer: torch.optim.Optimizer) -> None:
        for unit in range(len(self.units)):
            if unit in self._released:
                continue
            parameters = self._committed_parameters(unit)
            for parameter in parameters:
                optimizer.state.pop(parameter, None)
            if parameters:
                self._released.add(unit)

    def before_update(self, step: int) -> None:
        """To be called with the gradients complete, before the optimizer uses them."""
        if not self.ste_free:
            return
        if not self.train_committed:
            for unit in range(len(self.units)):
                for parameter in self._committed_parameters(unit):
                    parameter.grad = None
        # Momentum and weight decay move an entry whose gradient is 0.
        self._held = [
            (module, module.weight.detach().clone())
            for unit, modules in enumerate(self.units)
            if self._is_partial(unit, step)
            for module in _latent(modules)
        ]

    @torch.no_grad()
    def after_update(self) -> None:
        """To be called after the optimizer's step."""
        for module, weight in self._held:
            module.weight.copy_(torch.where(module.freeze_mask, weight, module.weight))
        self._held = []


def reset_masks(model: nn.Module) -> None:
    """Makes every mask of a binarized model empty, as a new run starts."""
    for module in masked_modules(model).values():
        module.reset()


def check_masks(model: nn.Module, progression: Progression, step: int) -> None:
    """
    Checks that the masks of a resumed run are what its progression left after `step`, 0-based, the last one taken.

    Raises a ValueError that names a committed mask that is not full, a free one that is not empty, or one in
    transition that is further from the schedule than chance allows (eight standard deviations and four entries).
    """
    for index, modules in enumerate(unit_modules(model, config_of(model)).values()):
        fraction = progression.fraction(index, step)
        for name, module in modules.items():
            mask = module.freeze_mask
            found = mask.float().mean().item()
            tolerance = 8 * math.sqrt(fraction * (1 - fraction) / mask.numel()) + 4 / mask.numel()
            exact = bool(mask.all()) if fraction == 1.0 else not bool(mask.any())
            if not exact if fraction in (0.0, 1.0) else abs(found - fraction) > tolerance:
                raise ValueError(
                    f"{name}.freeze_mask is corrupted: {found:.4f} of it is frozen after step {step + 1}, the "
                    f"progression says {fraction:.4f}; resume from another checkpoint"
                )


@torch.no_grad()
def initialize_activations(
    model: nn.Module,
    inputs: dict[str, Any],
    reduce: Callable[[Tensor], Tensor] | None = None,
    by_batch: bool = False,
) -> None:
    """
    Initialises scale, shift and threshold of every binary activation that has none yet, from what it reads in one
    batch.

    That is the float network where nothing is frozen yet, and the binary one, layer after layer, where everything is
    from the first step on (vanilla STE). The network is in evaluation mode, except with `by_batch` for BatchNorm.

    `by_batch` is for a step of training. BatchNorm in training mode normalises by the batch, as it will in that step:
    what it has recorded is not yet true of a network that starts from its config. It records nothing here. `reduce`
    sums a statistic over the ranks of a distributed run.
    """
    waiting = [
        m for m in masked_modules(model).values() if isinstance(m, MaskedBinaryActivation) and not m.initialized
    ]
    if not waiting:
        return

    def hook(module: MaskedBinaryActivation, args: tuple[Tensor, ...]) -> None:
        # A layer that several readers share is called several times; the first call counts.
        if not module.initialized:
            module.initialize(args[0], *(() if reduce is None else (reduce,)))

    modes = {module: module.training for module in model.modules()}
    norms = [
        module
        for module, is_training in modes.items()
        if by_batch and is_training and isinstance(module, nn.modules.batchnorm._BatchNorm)
    ]
    recorded = [(buffer, buffer.clone()) for norm in norms for buffer in norm.buffers()]
    with ExitStack() as hooks:
        for module in waiting:
            hooks.callback(module.register_forward_pre_hook(hook).remove)
        model.eval()
        for norm in norms:
            norm.train()
        try:
            model(**inputs)
        finally:
            for part, is_training in modes.items():
                part.training = is_training
            for buffer, value in recorded:
                buffer.copy_(value)
