"""
`binarize`, `commit`, `pack`, `unpack`: a float model becomes latent, is committed, packed, and latent again. What a
packed model holds: `docs/format.md`.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import nn

from ..config import StoMPPConfig, checked_inputs
from ..nn import MaskedBinaryActivation, PackedBinaryEmbedding, PackedBinaryLinear, PackedInt8Embedding
from ..nn.functional import SURROGATES
from ..ops import pack_bits, quantize_rows
from .binarizing import binarize_modules
from .modules import config_of, first_nonfinite, masked_modules, packed_modules, unit_modules
from .quantizer import attach_quantizer
from .report import BinarizationReport, report
from .swap import swap_in_float, swap_in_masked, swap_in_packed


Model = TypeVar("Model", bound=nn.Module)


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


def _check_packable(model: nn.Module) -> None:
    config = config_of(model)
    if packed_modules(model):
        raise ValueError(f"{type(model).__name__} is packed already")
    free = [
        unit
        for unit, modules in unit_modules(model, config).items()
        if not all(bool(module.freeze_mask.all()) for module in modules.values())
    ]
    if free:
        raise ValueError(
            f"only a committed model can be packed; these units are not: {', '.join(free)}. Train to the end of the "
            "progression, or commit(model) to freeze them without training"
        )
    for name, module in masked_modules(model).items():
        if isinstance(module, MaskedBinaryActivation) and not module.initialized:
            raise ValueError(
                f"{name} has no scale yet: it is initialised from the first batch; run the model on one before pack"
            )
    damaged = first_nonfinite(model.state_dict().items())
    if damaged is not None:
        raise ValueError(f"{damaged} holds NaN or infinity; nothing was packed")


@torch.no_grad()
def pack(model: Model) -> Model:
    """
    Packs a committed model: 1-bit weights, a scale and a bias a row, a threshold a feature. Inference only.

    Args:
        model (`PreTrainedModel`): committed, by training or by [`commit`]. It is left as it is.

    Returns:
        `PreTrainedModel`: a new model of the same class, in evaluation mode, whose logits are those of `model` in
            evaluation mode.

    Raises:
        ValueError: the model is not binarized or packed already, has adapters, units are not committed (named), an
            activation was never initialised, or a tensor holds NaN or infinity, or would once packed.
    """
    _check_packable(model)
    packed = copy.deepcopy(model)
    latent = dict(model.named_modules())
    config = config_of(packed)
    config.state = "packed"
    swap_in_packed(packed, config)
    for name, module in packed_modules(packed).items():
        source: Any = latent[name]
        if isinstance(module, PackedBinaryLinear):
            packed_rows = source.packed()
            scale, bias = source.folded(packed_rows)
            module.packed_weight.copy_(packed_rows[0])
            module.scale.copy_(scale)
            if module.bias is not None and bias is not None:
                module.bias.copy_(bias)
        elif isinstance(module, PackedBinaryEmbedding):
            module.packed_weight.copy_(pack_bits(source.weight))
            module.scale.copy_(source.row_scale().flatten())
        elif isinstance(module, PackedInt8Embedding):
            codes, row_scale = quantize_rows(source.weight)
            module.int8_weight.copy_(codes)
            module.scale.copy_(row_scale.flatten())
        else:
            module.threshold.copy_(source.threshold)
    infinite = first_nonfinite(packed.state_dict().items())
    if infinite is not None:
        raise ValueError(
            f"{infinite} would be infinite: weights or scales are too large for products of them in float32; nothing "
            "was packed"
        )
    attach_quantizer(packed, config)
    return packed.eval()


@torch.no_grad()
def unpack(model: Model, surrogate: str | None = None) -> Model:
    """
    Turns a packed model into a committed latent one: plain PyTorch operations, trainable, packs to the same bits.

    The latent weights are `+-scale`; what training knew beyond the signs is gone. Activations have amplitude 1 and no
    shift: both were folded into scale and bias.

    Args:
        model (`PreTrainedModel`): from [`pack`] or a packed checkpoint. It is left as it is.
        surrogate (`str`, *optional*): the gradient of what is binary, a key of
            [`~hf_stompp.nn.functional.SURROGATES`]; that which the model was trained with when not given. With `none`
            nothing passes back through a committed layer.

    Returns:
        `PreTrainedModel`: a new model of the same class.

    Raises:
        ValueError: the model is not packed, has adapters or int8 word embeddings in half precision, or there is no
            such surrogate.
    """
    if surrogate is not None and surrogate not in SURROGATES:
        raise ValueError(f"surrogate must be one of {list(SURROGATES)}, got {surrogate!r}")
    config = config_of(model)
    if not packed_modules(model):
        raise ValueError(f"{type(model).__name__} is not packed")
    for name, packed in packed_modules(model).items():
        if isinstance(packed, PackedInt8Embedding) and packed.scale.dtype != torch.float32:
            raise ValueError(
                f"{name} is {packed.scale.dtype}, in which its 8-bit entries cannot be given back exactly: load the "
                "model with dtype=torch.float32 to unpack it"
            )
    latent = copy.deepcopy(model)
    config = config_of(latent)
    config.state = "latent"
    if surrogate is not None:
        config.surrogate = surrogate
    config.feed_forward_levels = "signed"
    # Rows have scales now, whatever the kind they came from: the input's amplitude was folded into them.
    config.weight_scale = "row"
    # The signs are what is stored: a mean would change them.
    config.weight_center = "none"
    swap_in_float(latent, config)
    swap_in_masked(latent, config)
    values = dict(model.named_modules())
    for name, module in masked_modules(latent).items():
        source: Any = values[name]
        if isinstance(module, MaskedBinaryActivation):
            module.threshold.copy_(source.threshold)
            module.scale.fill_(1.0)
        module.commit()
        module.refresh_flags()
    attach_quantizer(latent, config)
    return latent.eval()


def binarization_report(model: nn.Module) -> BinarizationReport:
    """
    Sizes by unit and in total: modules, binary weights, float weights, bytes before, latent and packed. `print` it for
    a table.

    Args:
        model (`PreTrainedModel`): after [`binarize`] or [`pack`].

    Returns:
        [`~hf_stompp.model.report.BinarizationReport`]: sizes in bytes, numbers of modules and weights.

    Raises:
        ValueError: the model is neither.
    """
    return report(model, config_of(model))
