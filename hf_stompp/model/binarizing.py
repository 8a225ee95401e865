"""From a float model to a latent one: what is refused, the plan, and the swap."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..config import QUANT_METHOD, StoMPPConfig
from ..nn import MaskedBinaryModule
from .adapters import has_adapters
from .example_inputs import example_inputs
from .modules import packed_modules
from .planning import plan_modules
from .swap import swap_in_masked, swap_in_packed


def _check_float(model: nn.Module) -> None:
    """Raises a `ValueError` for a model that is not float and finite, was quantized before, or has adapters."""
    if packed_modules(model):
        raise ValueError(
            f"{type(model).__name__} is packed; binarize the float model it came from, or unpack(model) to train on"
        )
    if any(isinstance(module, MaskedBinaryModule) for module in model.modules()):
        raise ValueError(
            f"{type(model).__name__} is already binarized; binarize a model once, right after from_pretrained"
        )
    if has_adapters(model):
        raise ValueError(
            f"{type(model).__name__} has adapters that are not merged, whose matrices would become binary, too: merge "
            "them first, model.merge_and_unload()"
        )
    method = getattr(model, "quantization_method", None)
    # from_pretrained(float, quantization_config=StoMPPConfig(...)) has marked the model already.
    if method not in (None, QUANT_METHOD) or (getattr(model, "is_quantized", False) and method is None):
        raise ValueError(f"{type(model).__name__} is already quantized ({method}); binarize takes a float model")
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise ValueError(f"{name} is on the meta device: load the weights before binarize")
        if not parameter.is_floating_point():
            raise ValueError(f"{name} is {parameter.dtype}: binarize takes a float model")
        if not bool(torch.isfinite(parameter).all()):
            raise ValueError(f"{name} holds NaN or infinity: start from sound weights")


def binarize_modules(model: nn.Module, config: StoMPPConfig) -> None:
    """Checks, plans and swaps: [`binarize`] without marking the model. Takes the example inputs out of the config."""
    _check_float(model)
    if config.state != "latent" or config.plan:
        raise ValueError("this StoMPPConfig belongs to another model; pass a fresh one, StoMPPConfig(...)")
    inputs = example_inputs(model) if config.example_inputs is None else config.example_inputs
    config.plan = plan_modules(model, config, inputs)
    config.format_version = max(config.format_version, config.oldest_version()[0])
    _check_packed_form(model, config, inputs)
    swap_in_masked(model, config)
    config.example_inputs = None


def _check_packed_form(model: nn.Module, config: StoMPPConfig, inputs: Mapping[str, Any]) -> None:
    """
    Refuses a model whose packed form cannot run, before it is trained: its forward may ask linear layers for what
    packed ones do not have. A copy without values is packed, which takes milliseconds and no memory.
    """

    def without_value(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        return value.to("meta", torch.float32 if value.is_floating_point() else None)

    on_meta = {name: without_value(value) for name, value in inputs.items()}
    with torch.no_grad():
        try:
            copied = _without_values(model).eval().float()
            copied(**on_meta)
        # Some models (DeBERTa) read values on their way, others cannot be copied: these cannot be tried out.
        except Exception:
            return
        swap_in_packed(copied, config)
        try:
            copied(**on_meta)
        except Exception as error:
            raise ValueError(
                f"{type(model).__name__} could be trained, but not run as a packed model: {type(error).__name__}: "
                f"{error}. Leave the layers that it means float: name them in modules_to_not_convert"
            ) from error


def _without_values(model: nn.Module) -> Any:
    """A copy on the meta device, without hooks."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)
    for buffer in model.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    copied = copy.deepcopy(model, memo)
    for module in copied.modules():
        # They belong to whoever registered them, and expect values.
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    return copied
