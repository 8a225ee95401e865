"""
Bi-Real networks: a ResNet with a shortcut around every binary convolution (arXiv 1808.00278, section 3.2).

A ResNet of basic blocks has one around each two. The real values that a shortcut carries past a sign are what the name
means. There are no activation functions but the signs. Importing this file registers the type `bireal_resnet` with
Transformers; tensors have the names of a ResNet's.
"""

from __future__ import annotations

from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageClassification, ResNetConfig, ResNetForImageClassification


class BiRealResNetConfig(ResNetConfig):
    """A [`ResNetConfig`] of basic blocks without activation functions."""

    model_type = "bireal_resnet"
    layer_type: str = "basic"
    hidden_act: str = "linear"


class BiRealLayer(nn.Module):
    """
    Two convolutions, each with BatchNorm and a shortcut of its own.

    Args:
        basic (`ResNetBasicLayer`): whose modules it takes.
    """

    def __init__(self, basic: nn.Module) -> None:
        super().__init__()
        self.shortcut, self.layer = basic.shortcut, basic.layer
        # A ReLU whatever the config says.
        self.layer[0].activation = nn.Identity()

    def forward(self, hidden_state: Tensor) -> Tensor:
        """Maps images of shape `(batch, in_channels, height, width)` to `(batch, out_channels, ...)`."""
        first, second = self.layer
        hidden_state = first(hidden_state) + self.shortcut(hidden_state)
        return second(hidden_state) + hidden_state


class BiRealResNetForImageClassification(ResNetForImageClassification):
    """
    A [`ResNetForImageClassification`] whose blocks are [`BiRealLayer`]s.

    Raises:
        ValueError: the config has bottleneck blocks.
    """

    config_class = BiRealResNetConfig

    def __init__(self, config: BiRealResNetConfig) -> None:
        if config.layer_type != "basic":
            raise ValueError(f"a Bi-Real network has blocks of layer_type 'basic', got {config.layer_type!r}")
        super().__init__(config)
        for stage in self.resnet.encoder.stages:
            stage.layers = nn.Sequential(*map(BiRealLayer, stage.layers))


AutoConfig.register(BiRealResNetConfig.model_type, BiRealResNetConfig)
AutoModelForImageClassification.register(BiRealResNetConfig, BiRealResNetForImageClassification)
