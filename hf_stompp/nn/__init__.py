"""What replaces `nn.Linear`, `nn.Conv2d`, activation functions and word embeddings. Knows nothing of transformers."""

from __future__ import annotations

from .activation import MaskedBinaryActivation
from .convolution import MaskedBinaryConv2d, MaskedBinarySign, PackedBinaryConv2d, PackedBinarySign
from .linear import MaskedBinaryEmbedding, MaskedBinaryLinear, RoundedEmbedding
from .module import MaskedBinaryModule
from .packed import (
    PackedBinaryActivation,
    PackedBinaryEmbedding,
    PackedBinaryLinear,
    PackedEmbedding,
    PackedInt8Embedding,
)
from .residual_norm import PackedResidualNorm


__all__ = [
    "MaskedBinaryActivation",
    "MaskedBinaryConv2d",
    "MaskedBinaryEmbedding",
    "MaskedBinaryLinear",
    "MaskedBinaryModule",
    "MaskedBinarySign",
    "PackedBinaryActivation",
    "PackedBinaryConv2d",
    "PackedBinaryEmbedding",
    "PackedBinaryLinear",
    "PackedBinarySign",
    "PackedEmbedding",
    "PackedInt8Embedding",
    "PackedResidualNorm",
    "RoundedEmbedding",
]
