"""Adapters of peft: over binary models, and where they do not belong. Imports peft on use."""

from __future__ import annotations

import sys

from torch import nn


def register_lora() -> None:
    """
    Makes LoRA of peft adapt binary linear layers, packed and latent: from then on `peft.get_peft_model`,
    `PeftModel.from_pretrained` and the `load_adapter` of Transformers take binarized and packed models, and
    `target_modules="all-linear"` means their layers, too. Call it once in a program, before the first adapter.

    Raises:
        ImportError: peft is not installed.

    Example:

    ```python
    >>> hf_stompp.register_lora()
    >>> model = peft.PeftModel.from_pretrained(packed, "adapter")
    ```
    """
    try:
        import peft
    except ImportError as error:
        raise ImportError("LoRA over binary layers needs peft: pip install peft") from error
    from ..nn.lora import BinaryLoraModel

    peft.PEFT_TYPE_TO_TUNER_MAPPING[peft.PeftType.LORA] = BinaryLoraModel


def has_adapters(model: nn.Module) -> bool:
    """Whether a model is one of peft, or holds layers of peft, also such whose adapters were deleted."""
    if hasattr(model, "peft_config") or getattr(model, "_hf_peft_config_loaded", False):
        return True
    # Who has not imported it has none.
    layers = sys.modules.get("peft.tuners.tuners_utils")
    return layers is not None and any(isinstance(module, layers.BaseTunerLayer) for module in model.modules())


def refuse_adapters(model: nn.Module) -> None:
    """Raises a `ValueError` if a model has adapters."""
    if has_adapters(model):
        raise ValueError(
            f"{type(model).__name__} has adapters, which are float and stay beside the base: take the base alone, "
            "PeftModel.unload(), or load it anew. Adapters are trained by Transformers' Trainer"
        )
