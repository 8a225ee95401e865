"""
Writes the models of `tests/test_golden.py` that are not there yet: what this version saves, and what it answers.

    python tests/golden/write.py

A folder that is there is never written again: later versions must load it as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, ResNetConfig, ResNetForImageClassification

from hf_stompp import StoMPPConfig, binarize, commit, pack
from hf_stompp.model.modules import masked_modules


FOLDER = Path(__file__).resolve().parent


def bert() -> nn.Module:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    return BertForSequenceClassification(BertConfig(vocab_size=24, max_position_embeddings=12, **sizes))


def resnet() -> nn.Module:
    return ResNetForImageClassification(
        ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=2)
    )


def inputs_of(model: nn.Module) -> dict[str, Tensor]:
    """Two texts, or two images."""
    draw = torch.Generator().manual_seed(1)
    if isinstance(model, ResNetForImageClassification):
        return {"pixel_values": torch.randn(2, 3, 32, 32, generator=draw)}
    return {"input_ids": torch.randint(24, (2, 9), generator=draw)}


MODELS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "packed-1-bnn": (bert, {}),
    "packed-1-binary-embeddings": (bert, {"word_embeddings": "binary"}),
    "packed-2-modes": (bert, {"modes": {"attention": "float"}}),
    "packed-3-bwn": (bert, {"mode": "bwn"}),
    "packed-4-int8-embeddings": (bert, {"word_embeddings": "int8"}),
    "packed-5-convolutions": (resnet, {}),
    "packed-6-signs": (resnet, {"activation_functions": "sign"}),
    "latent-1-bnn": (bert, {}),
    "latent-6-signs": (resnet, {"activation_functions": "sign"}),
}
"""By name: state, format version and what it is of; the float model, and the fields of its `StoMPPConfig`."""


def make(name: str) -> nn.Module:
    torch.manual_seed(0)
    build, settings = MODELS[name]
    model = binarize(build(), StoMPPConfig(**settings)).eval()
    with torch.no_grad():
        model(**inputs_of(model))
    if name.startswith("packed"):
        return pack(commit(model))
    for module in masked_modules(model).values():
        module.restore(torch.rand(module.freeze_mask.shape) < 0.5)
    return model


def main() -> None:
    for name in MODELS:
        folder = FOLDER / name
        if folder.exists():
            continue
        model = make(name)
        model.save_pretrained(folder)
        with torch.no_grad():
            inputs = inputs_of(model)
            save_file({**inputs, "logits": model(**inputs).logits}, folder / "answer.safetensors")
        print(folder)


if __name__ == "__main__":
    main()
