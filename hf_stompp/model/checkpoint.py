"""What is done around reading a checkpoint of a latent or packed model, and what it must hold."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..config import StoMPPConfig
from ..nn import PackedBinaryActivation, PackedBinaryLinear, PackedInt8Embedding
from ..plan import renamed
from .modules import PackedModule, first_nonfinite, masked_modules, packed_modules


def follow_prefix(model: nn.Module, config: StoMPPConfig) -> None:
    """
    Renames the modules of the plan where a base model is loaded from the checkpoint of a model with a head, or the
    other way round: `bert.encoder...` is `encoder...` there.
    """
    prefix = getattr(model, "base_model_prefix", "")
    names = list(config.plan)
    if not prefix or not names:
        return
    inside = f"{prefix}."
    is_base, has_prefix = not hasattr(model, prefix), all(name.startswith(inside) for name in names)
    if is_base != has_prefix or not (is_base or hasattr(getattr(model, prefix), names[0].split(".")[0])):
        return

    def rename(name: str) -> str:
        return name[len(inside) :] if is_base else inside + name

    if config.modes:
        # A pattern may have held the prefix. What is left float is in no plan, so nothing is lost with its pattern.
        linears = [entry for entry in config.plan.values() if entry.is_linear]
        config.modes = {re.escape(rename(e.name)): e.mode for e in linears if e.mode != config.mode}
    config.plan = renamed(config.plan, rename)


def guard_name(model: nn.Module) -> str | None:
    """
    Name of the empty tensor in packed files that keeps a process without hf_stompp from loading them.

    It is that of a weight of the float model, whose shape it does not have. Transformers does not know the
    quantization there, warns, and would leave every packed weight random; a tensor of another shape is what it raises
    for.
    """
    names = (name for name, module in packed_modules(model).items() if not isinstance(module, PackedBinaryActivation))
    return next((f"{name}.weight" for name in names), None)


BINARY_TENSORS = {"latent": ("packed_weight", "freeze_mask"), "packed": ("threshold",)}
"""
By the state of a model: last parts of names, of which a file may hold none that the model lacks. Every masked module
has a mask; and where a packed model has no `packed_weight`, its file lacks a float weight, see [`check_loaded`].
"""


def check_modules(model: nn.Module, files: Mapping[str, Path], state: str, known: Iterable[str]) -> None:
    """
    `files` has the safetensors file of each tensor by its name: checks that they belong to a model with these binary
    modules, whose tensors have the names `known`. The guard in packed files would refuse a latent model without an
    explanation; a layer that only the file knows as masked would become a float one, and a threshold that only the
    file knows would be dropped. The `ValueError` names the first of [`BINARY_TENSORS`] that the model lacks.
    """
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    known = {name.removeprefix(prefix) for name in known}
    for name, file in files.items():
        inside = name.removeprefix(prefix)
        module, _, tensor = inside.rpartition(".")
        if not module or tensor not in BINARY_TENSORS[state] or inside in known:
            continue
        if tensor == "packed_weight":
            found = f"the packed tensor {name!r}, but its config.json says {state!r}"
        else:
            found = f"the tensor {name!r}, but the modules in its config.json lack {module!r}"
        raise ValueError(f"{file} holds {found}: they are not of one model; download or copy the folder again")


def expect_guard(model: nn.Module) -> None:
    """Keeps the empty tensor of packed files out of the list of unexpected ones."""
    name = guard_name(model)
    if name is not None:
        holder: Any = model
        # The file may be that of a model with a head, or without.
        inside = name.removeprefix(f"{getattr(model, 'base_model_prefix', '')}.")
        known = holder._keys_to_ignore_on_load_unexpected or ()
        holder._keys_to_ignore_on_load_unexpected = {*known, rf"(^|\.){re.escape(inside)}$"}


def skip_initialization(model: nn.Module) -> None:
    """Keeps `_init_weights` off the parents of packed modules: some models initialise their children there."""
    modules = dict(model.named_modules())
    for name, module in packed_modules(model).items():
        parent: Any = modules[name.rpartition(".")[0]]
        # Its own buffers that are not saved are computed there.
        if not parent._non_persistent_buffers_set:
            parent._is_hf_initialized = True
        holder: Any = module
        holder._is_hf_initialized = True


@torch.no_grad()
def leave_files(model: nn.Module) -> None:
    """
    Gives every tensor on the CPU memory of its own. Those that were loaded lie in the file as it is on disk: whoever
    overwrites it changes the weights of a model in use, and whoever cuts it ends the process.
    """
    for parameter in model.parameters():
        if parameter.device.type == "cpu":
            parameter.data = parameter.data.clone()
    copies: dict[torch.Tensor, torch.Tensor] = {}
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is None or buffer.device.type != "cpu":
                continue
            # A new tensor, unlike above: a buffer is a view of the file's bytes, and would keep them all in memory.
            if buffer not in copies:
                copies[buffer] = buffer.clone()
                copies[buffer].__dict__.update(buffer.__dict__)
            module._buffers[name] = copies[buffer]


def check_loaded(model: nn.Module) -> None:
    """
    Checks that the checkpoint held every tensor of the encoder: what it does not hold would be uninitialised memory.
    NaN, infinity and values that no packed model has raise a `ValueError`, too.
    """
    base = getattr(model, "base_model_prefix", "")
    inside = f"{base}." if base and hasattr(model, base) else ""
    ours = tuple(f"{name}." for name in [*masked_modules(model), *packed_modules(model)])
    persistent = model.state_dict(keep_vars=True)
    names = [name for name in persistent if name.startswith(inside) or name.startswith(ours)]
    missing = [name for name in names if not getattr(persistent[name], "_is_hf_initialized", False)]
    if missing:
        offloaded = _offloaded(model)
        missing = [name for name in missing if name not in offloaded]
    pooler = {name for name in names if "pooler" in name.split(".")}
    if pooler <= set(missing):
        # A head may be new, and the pooler is a part of one; half a pooler is damage.
        missing = [name for name in missing if name not in pooler]
    if missing:
        raise ValueError(
            f"the checkpoint lacks {len(missing)} tensors of {type(model).__name__}, the first of them "
            f"{missing[0]!r}: it is incomplete or was written for another model class; download or copy it again"
        )
    for name, module in packed_modules(model).items():
        _check_packed(name, module)
    damaged = first_nonfinite(persistent.items())
    if damaged is not None:
        raise ValueError(f"tensor {damaged!r} holds NaN or infinity: the checkpoint is damaged")


def _offloaded(model: nn.Module) -> set[str]:
    """Names of the tensors that accelerate has on disk or elsewhere, and fetches for each call."""
    names: set[str] = set()
    for module in model.modules():
        hook = getattr(module, "_hf_hook", None)
        for part in getattr(hook, "hooks", (hook,)):
            names.update(getattr(part, "weights_map", None) or ())
    return names


def check_shapes(model: nn.Module, shapes: dict[str, torch.Size]) -> None:
    """
    Checks the shapes of what was binarized: not every version of Transformers does so for buffers. The `ValueError`
    names the first tensor of another shape.
    """
    ours = tuple(f"{name}." for name in [*masked_modules(model), *packed_modules(model)])
    for name, tensor in model.state_dict().items():
        if name.startswith(ours) and tensor.shape != shapes.get(name):
            raise ValueError(
                f"tensor {name!r} has shape {tuple(tensor.shape)}, expected {tuple(shapes.get(name, ()))}: the "
                "checkpoint is damaged or was written for another model"
            )


def _check_packed(name: str, module: PackedModule) -> None:
    for tensor_name, tensor in module.named_buffers(recurse=False):
        if tensor.is_meta:
            # Several layers read one threshold, and none of them is what accelerate would fetch it for.
            raise ValueError(
                f"tensor {name + '.' + tensor_name!r} is offloaded, which packed layers do not work with: load the "
                "model with offload_buffers=False, the default; parameters may be offloaded"
            )
    if isinstance(module, PackedBinaryActivation | PackedInt8Embedding):
        return
    columns = module.in_features if isinstance(module, PackedBinaryLinear) else module.embedding_dim
    whole, rest = divmod(columns, 8)
    tail = module.packed_weight[:, whole:]
    if tail.numel() and bool((tail[:, 0] >> rest).any() or tail[:, 1:].any()):
        raise ValueError(
            f"tensor {name + '.packed_weight'!r} has bits beyond its {columns} columns: the checkpoint is damaged or "
            "of another format"
        )
