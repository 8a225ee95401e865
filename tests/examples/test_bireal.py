"""The Bi-Real network of the image classification example."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from programs import load
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForImageClassification

from hf_stompp import StoMPPConfig, binarize, commit, pack


NETWORK = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}


@pytest.fixture(scope="module")
def bireal() -> ModuleType:
    # Registered once in a process.
    example = Path(__file__).resolve().parents[2] / "examples" / "image_classification" / "bireal.py"
    return sys.modules.get("bireal") or load(example)


@pytest.fixture
def network(bireal: ModuleType) -> torch.nn.Module:
    torch.manual_seed(0)
    return AutoModelForImageClassification.from_config(AutoConfig.for_model("bireal_resnet", **NETWORK)).eval()


def test_every_convolution_has_a_shortcut_of_its_own_and_no_activation_function(network: torch.nn.Module) -> None:
    def normalized(convolution, normalization, input, **stride):
        scale = normalization.weight / (normalization.running_var + normalization.eps).sqrt()
        output = F.conv2d(input, convolution.weight, **stride) - normalization.running_mean.view(1, -1, 1, 1)
        return output * scale.view(1, -1, 1, 1) + normalization.bias.view(1, -1, 1, 1)

    layer = network.resnet.encoder.stages[1].layers[0]
    input = torch.randn(2, 8, 6, 6)
    (first, second), shortcut = layer.layer, layer.shortcut
    middle = normalized(first.convolution, first.normalization, input, stride=2, padding=1)
    middle = middle + normalized(shortcut.convolution, shortcut.normalization, input, stride=2)
    expected = normalized(second.convolution, second.normalization, middle, padding=1) + middle
    torch.testing.assert_close(layer(input), expected)


def test_a_packed_one_is_loaded_by_its_type_and_answers_as_the_committed_one(network, tmp_path) -> None:
    images = torch.randn(2, 3, 32, 32)
    latent = binarize(network, StoMPPConfig())
    with torch.no_grad():
        latent(images)
        committed = commit(latent).eval()
        expected = committed(images).logits
        pack(committed).save_pretrained(tmp_path)
        loaded = AutoModelForImageClassification.from_pretrained(tmp_path)
        assert type(loaded).__name__ == "BiRealResNetForImageClassification"
        assert torch.equal(loaded(images).logits, expected)


def test_bottleneck_blocks_are_refused(bireal: ModuleType) -> None:
    config = bireal.BiRealResNetConfig(**NETWORK, layer_type="bottleneck")
    with pytest.raises(ValueError, match="layer_type 'basic', got 'bottleneck'"):
        bireal.BiRealResNetForImageClassification(config)
