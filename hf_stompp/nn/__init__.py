"""What replaces `nn.Linear`, activation functions and word embeddings. Knows nothing of transformers."""

from __future__ import annotations

from .activation import MaskedBinaryActivation
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
    "MaskedBinaryEmbedding",
    "MaskedBinaryLinear",
    "MaskedBinaryModule",
    "PackedBinaryActivation",
    "PackedBinaryEmbedding",
    "PackedBinaryLinear",
    "PackedEmbedding",
    "PackedInt8Embedding",
    "PackedResidualNorm",
    "RoundedEmbedding",
]
