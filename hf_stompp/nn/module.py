"""What every masked module shares: a freeze mask, and the ways it may change."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .mask import advance_mask_


def refer(module: nn.Module, name: str, other: nn.Module) -> None:
    """Sets `module.name = other` past nn.Module's registration, so that `other` is neither saved nor counted twice."""
    object.__setattr__(module, name, other)


class BinaryInputModule(nn.Module):
    """A linear layer, latent or packed, whose input may be binarized, by a module of its own or one that it shares."""

    input_activation: Any
    binarizes_input: bool

    def set_input_activation(self, activation: nn.Module, owned: bool, upstream: bool = False) -> None:
        """
        Says what binarizes the input of this layer.

        Args:
            activation (`MaskedBinaryActivation` or `PackedBinaryActivation`).
            owned (`bool`): register it as a submodule. Layers that read the same tensor share one activation, and one
                owns it.
            upstream (`bool`, *optional*, defaults to `False`): it has already been applied, by the feed-forward
                activation function.
        """
        if owned:
            self.input_activation = activation
        else:
            refer(self, "input_activation", activation)
        self.binarizes_input = not upstream


class MaskedBinaryModule(nn.Module):
    """
    A module with a freeze mask.

    The mask is a persistent buffer that is only ever written in place: `torch.compile` and DistributedDataParallel
    hold references to it. `committed` repeats in a Python bool whether the mask is full, so that reading it neither
    synchronises with a GPU nor breaks a compiled graph; every method that writes the mask keeps it true.

    Args:
        mask_shape (`tuple[int, ...]`): shape of the freeze mask.
        device (`torch.device`, *optional*).
    """

    freeze_mask: Tensor

    def __init__(self, mask_shape: tuple[int, ...], device: torch.device | None = None) -> None:
        super().__init__()
        self.register_buffer("freeze_mask", torch.zeros(mask_shape, dtype=torch.bool, device=device))
        self.committed = False

    def advance(self, previous: float, fraction: float, refresh_period: float, generator: torch.Generator) -> None:
        """Grows and refreshes the mask by one step, see [`~hf_stompp.nn.mask.advance_mask_`]."""
        advance_mask_(self.freeze_mask, previous, fraction, refresh_period, generator)
        self.committed = fraction >= 1.0

    def commit(self) -> None:
        """Freezes every entry, for good."""
        self.freeze_mask.fill_(True)
        self.committed = True

    def reset(self) -> None:
        """Frees every entry: the state before training."""
        self.freeze_mask.fill_(False)
        self.committed = False

    def restore(self, mask: Tensor) -> None:
        """Writes back a mask that was saved with `freeze_mask.clone()`."""
        self.freeze_mask.copy_(mask)
        self.refresh_flags()

    def refresh_flags(self) -> None:
        """Derives the Python flags from the tensors, where those were not loaded by `load_state_dict`."""
        self.committed = bool(self.freeze_mask.all())

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        if not self.freeze_mask.is_meta:
            self.refresh_flags()
