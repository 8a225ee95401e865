"""The masked and packed modules of a model: which there are, of which unit, and what config they came from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..config import StoMPPConfig
from ..nn import (
    MaskedBinaryModule,
    PackedBinaryActivation,
    PackedBinaryEmbedding,
    PackedBinaryLinear,
    PackedInt8Embedding,
)
from ..plan import unit_prefixes
from .adapters import refuse_adapters


PackedModule = PackedBinaryActivation | PackedBinaryLinear | PackedBinaryEmbedding | PackedInt8Embedding


@torch.no_grad()
def first_nonfinite(tensors: Iterable[tuple[str, Tensor]]) -> str | None:
    """Name of the first tensor of floats that holds NaN or infinity; None if none does. Those on `meta` hold none."""
    return next((name for name, tensor in tensors if not tensor.is_meta and not _is_finite(tensor)), None)


def _is_finite(tensor: Tensor) -> bool:
    # A sum takes no memory of the tensor's size; one that overflows says nothing.
    return not tensor.is_floating_point() or bool(tensor.sum().isfinite()) or bool(tensor.isfinite().all())


def masked_modules(model: nn.Module) -> dict[str, MaskedBinaryModule]:
    """Every module of a latent model that has a freeze mask, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, MaskedBinaryModule)}


def packed_modules(model: nn.Module) -> dict[str, PackedModule]:
    """Every module of a packed model that holds packed weights or thresholds, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, PackedModule)}


def config_of(model: nn.Module) -> StoMPPConfig:
    """
    The `StoMPPConfig` of a binarized or packed model. Raises a `ValueError` if the model is neither, or has adapters
    of peft.
    """
    refuse_adapters(model)
    config = getattr(getattr(model, "config", None), "quantization_config", None)
    if not isinstance(config, StoMPPConfig) or not (masked_modules(model) or packed_modules(model)):
        raise ValueError(f"{type(model).__name__} is not binarized; call binarize(model, StoMPPConfig()) first")
    return config


def binarized_part(model: nn.Module) -> Any:
    """
    The model that [`binarize`] was called on: this one, or one inside it, such as the encoder of a sentence encoder.
    Raises a `ValueError` if there is none, or there are several.
    """
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        config = getattr(getattr(module, "config", None), "quantization_config", None)
        inside = any(not other or name.startswith(f"{other}.") for other in found)
        if inside or not isinstance(config, StoMPPConfig) or not masked_modules(module):
            continue
        # What wraps an encoder may have been given its config.
        if set(config.plan) <= {inner for inner, _ in module.named_modules()}:
            found[name] = module
    if len(found) != 1:
        what = f"holds several binarized models, {list(found)}" if found else "holds no binarized model"
        raise ValueError(f"{type(model).__name__} {what}: call binarize() on one encoder in it")
    return next(iter(found.values()))


def unit_modules(model: nn.Module, config: StoMPPConfig) -> dict[str, dict[str, MaskedBinaryModule]]:
    """The masked modules of each unit, units from input to output: unit name -> module name -> module."""
    units: dict[str, dict[str, MaskedBinaryModule]] = {unit: {} for unit in config.units}
    for name, module in masked_modules(model).items():
        # An activation that binarizes the input of a linear layer is within it.
        owner = name if name in config.plan else name.rpartition(".")[0]
        units[config.plan[owner].unit][name] = module
    return units


def frozen_counts(model: nn.Module, config: StoMPPConfig) -> dict[str, tuple[int, int]]:
    """How many entries of each unit are frozen, and how many it has, units from input to output."""
    counts = {}
    for unit, modules in unit_modules(model, config).items():
        sizes = [module.freeze_mask.numel() for module in modules.values()]
        # A full mask need not be read.
        frozen = [
            size if module.committed else int(module.freeze_mask.sum())
            for size, module in zip(sizes, modules.values(), strict=True)
        ]
        counts[unit] = sum(frozen), sum(sizes)
    return counts


def unit_parameters(model: nn.Module, config: StoMPPConfig) -> list[list[nn.Parameter]]:
    """The parameters that lie in each unit, units from input to output, latent weights included."""
    found = []
    for unit in config.units:
        prefixes = unit_prefixes(unit)
        found.append([parameter for name, parameter in model.named_parameters() if name.startswith(prefixes)])
    return found


@contextmanager
def fully_binary(model: nn.Module) -> Iterator[None]:
    """Commits every mask within the block, and restores the masks after it, whatever happens inside."""
    saved = [(m, m.freeze_mask.clone()) for m in masked_modules(model).values() if not m.committed]
    try:
        for module, _ in saved:
            module.commit()
        yield
    finally:
        for module, mask in saved:
            module.restore(mask)
