"""Adapters of peft: over binary models, and where they do not belong. Imports peft on use."""

from __future__ import annotations

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
    from .nn.lora import BinaryLoraModel

    peft.PEFT_TYPE_TO_TUNER_MAPPING[peft.PeftType.LORA] = BinaryLoraModel


def has_adapters(model: nn.Module) -> bool:
    """Whether a model is one of peft, or Transformers has put adapters of peft into it."""
    return hasattr(model, "peft_config") or getattr(model, "_hf_peft_config_loaded", False)
