"""The smallest input that shows how a model's layers are connected, made from its config."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES


TOKENS = 8
CHOICES = 2
FRAMES = 32
IMAGE_SIZE = 224
"""Where the config does not tell: the model takes any size then."""


def example_inputs(model: nn.Module) -> dict[str, Tensor]:
    """
    A smallest input to trace a model with, on its device: eight token ids (twice for multiple choice), a black image,
    or silence. Raises a `ValueError` for a model that takes something else.
    """
    name = getattr(model, "main_input_name", "input_ids")
    make = {
        "input_ids": _token_ids,
        "inputs": _token_ids,
        "pixel_values": _image,
        "input_values": _sound,
        "input_features": _sound_features,
    }.get(name)
    example = None if make is None else make(model, getattr(model, "config", None))
    if example is None:
        raise ValueError(
            f"{type(model).__name__} takes {name!r}, for which no example can be made: pass binarize(model, config, "
            "example_inputs={...}), a dict of its forward arguments"
        )
    parameter = next(model.parameters())
    return {name: example.to(parameter.device, parameter.dtype if example.is_floating_point() else None)}


def _token_ids(model: nn.Module, config: Any) -> Tensor | None:
    if config is None:
        return None
    # Characters (CANINE) have no vocabulary: any number will do.
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    vocabulary = getattr(text, "vocab_size", None) or TOKENS
    ids = torch.arange(TOKENS).remainder(vocabulary)
    separator = getattr(config, "sep_token_id", None)
    if separator is not None and separator < vocabulary:
        # Of a pair; Longformer looks for all three.
        ids[[2, 4, -1]] = separator
    if type(model).__name__ in MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES.values():
        return ids.expand(1, CHOICES, TOKENS)
    return ids.unsqueeze(0)


def _image(model: nn.Module, config: Any) -> Tensor:
    config = getattr(config, "vision_config", config)
    size = getattr(config, "image_size", None) or IMAGE_SIZE
    height, width = size if isinstance(size, list | tuple) else (size, size)
    return torch.zeros(1, getattr(config, "num_channels", 3), height, width)


def _sound(model: nn.Module, config: Any) -> Tensor | None:
    """A wave of so many samples that their convolutions leave some frames, or a spectrogram."""
    if hasattr(config, "conv_stride"):
        return torch.zeros(1, FRAMES * math.prod(config.conv_stride))
    if hasattr(config, "num_mel_bins"):
        return torch.zeros(1, getattr(config, "max_length", FRAMES), config.num_mel_bins)
    return None


def _sound_features(model: nn.Module, config: Any) -> Tensor | None:
    if hasattr(config, "max_source_positions") and hasattr(config, "num_mel_bins"):
        return torch.zeros(1, config.num_mel_bins, 2 * config.max_source_positions)
    if hasattr(config, "feature_projection_input_dim"):
        return torch.zeros(1, FRAMES, config.feature_projection_input_dim)
    return None
