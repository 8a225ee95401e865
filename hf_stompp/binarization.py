"""`binarize`, `commit` and `binarization_report`."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, TypeVar

from torch import nn

from .adapters import refuse_adapters
from .config import StoMPPConfig, checked_inputs
from .patching import masked_modules, packed_modules
from .quantizer import attach_quantizer, binarize_modules
from .report import BinarizationReport, report


Model = TypeVar("Model", bound=nn.Module)


def config_of(model: nn.Module) -> StoMPPConfig:
    """
    The `StoMPPConfig` of a binarized or packed model.

    Raises:
        ValueError: the model is neither, or has adapters of peft.
    """
    refuse_adapters(model)
    config = getattr(getattr(model, "config", None), "quantization_config", None)
    if not isinstance(config, StoMPPConfig) or not (masked_modules(model) or packed_modules(model)):
        raise ValueError(f"{type(model).__name__} is not binarized; call binarize(model, StoMPPConfig()) first")
    return config


def binarized_part(model: nn.Module) -> Any:
    """
    The model that [`binarize`] was called on: this one, or one inside it, such as the encoder of a sentence encoder.

    Args:
        model (`nn.Module`).

    Returns:
        `PreTrainedModel`.

    Raises:
        ValueError: there is none, or there are several.
    """
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        config = getattr(getattr(module, "config", None), "quantization_config", None)
        inside = any(not other or name.startswith(f"{other}.") for other in found)
        if inside or not isinstance(config, StoMPPConfig) or not masked_modules(module):
            continue
        # What wraps an encoder may have been given its config.
        if set(config.table) <= {inner for inner, _ in module.named_modules()}:
            found[name] = module
    if len(found) != 1:
        what = f"holds several binarized models, {list(found)}" if found else "holds no binarized model"
        raise ValueError(f"{type(model).__name__} {what}: call binarize() on one encoder in it")
    return next(iter(found.values()))


def binarize(
    model: Model, config: StoMPPConfig | None = None, example_inputs: Mapping[str, Any] | None = None
) -> Model:
    """
    Makes a float encoder trainable into a binary one: replaces its linear layers and activations by masked ones, in
    place.

    With no mask entry frozen, the model computes what it computed before, but for clipping at `weight_clip` and
    `activation_clip` times the scales.

    Args:
        model (`PreTrainedModel`): a float model with a stack of encoder layers.
        config (`StoMPPConfig`, *optional*): what to binarize and how; copied. The defaults when not given.
        example_inputs (`Mapping[str, Any]`, *optional*): forward arguments for the one pass that finds out which
            layers read the same tensor, for models that take neither token ids nor an image.

    Returns:
        `PreTrainedModel`: the same object.

    Raises:
        ValueError: the model is binarized, packed or quantized already, holds NaN or infinity, shares its layers, has
            no stack of layers or several, or a weight to binarize is tied.

    Example:

    ```python
    >>> model = AutoModelForSequenceClassification.from_pretrained("bert-base-uncased", num_labels=2)
    >>> model = binarize(model, StoMPPConfig(mode="bnn"))
    ```
    """
    config = StoMPPConfig() if config is None else copy.deepcopy(config)
    if example_inputs is not None:
        config.example_inputs = checked_inputs(example_inputs)
    binarize_modules(model, config)
    attach_quantizer(model, config)
    return model


def commit(model: Model) -> Model:
    """
    Makes every freeze mask full without training, in place: post-training binarization.

    Args:
        model (`PreTrainedModel`): after [`binarize`].

    Returns:
        `PreTrainedModel`: the same object. Activation scales that no batch has initialised are initialised by the next
            one.

    Raises:
        ValueError: the model is not binarized, or packed already.
    """
    config_of(model)
    if packed_modules(model):
        raise ValueError(f"{type(model).__name__} is packed: there is nothing left to commit")
    for module in masked_modules(model).values():
        module.commit()
    return model


def binarization_report(model: nn.Module) -> BinarizationReport:
    """
    Sizes by unit and in total: modules, binary weights, float weights, bytes before, latent and packed. `print` it for
    a table.

    Args:
        model (`PreTrainedModel`): after [`binarize`] or [`pack`].

    Returns:
        [`~hf_stompp.report.BinarizationReport`]: sizes in bytes, numbers of modules and weights.

    Raises:
        ValueError: the model is neither.
    """
    return report(model, config_of(model))
