"""
Packed modules in PyTorch's own operators: what a program that does not have ours can run, and what exports.

Signs are floats of +-1 here, and the bits of the weights are unpacked in every call. Who compiles a graph of it may do
that once.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..ops import quantize_rows, scale_sums
from .convolution import HasGeometry, PackedBinaryConv2d, PackedBinarySign, images_of, in_filter_order, pixels_of
from .packed import (
    Float32Buffers,
    PackedBinaryActivation,
    PackedBinaryEmbedding,
    PackedBinaryLinear,
    PackedInt8Embedding,
    look_up,
)


def _plus_minus_one(above: Tensor, dtype: torch.dtype) -> Tensor:
    """+1 where a boolean tensor is true, -1 elsewhere: one operator in a graph."""
    one = torch.ones((), dtype=dtype, device=above.device)
    return torch.where(above, one, -one)


class _PackedRows(Float32Buffers):
    """A module that holds packed rows."""

    packed_weight: Tensor
    bit_values: Tensor

    def __init__(self, packed_weight: Tensor, columns: int) -> None:
        super().__init__()
        self.columns = columns
        self.register_buffer("packed_weight", packed_weight)
        # Compared, not shifted: the ONNX exporter takes every shifted integer for a signed one.
        values = torch.tensor([1 << bit for bit in range(8)], dtype=torch.uint8, device=packed_weight.device)
        self.register_buffer("bit_values", values, persistent=False)

    def signs(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        """Packed rows of shape `(..., bytes)` as +-1 of shape `(..., columns)`."""
        is_set = (rows.unsqueeze(-1) & self.bit_values) != 0
        return _plus_minus_one(is_set.flatten(-2)[..., : self.columns], dtype)


class PlainBinaryActivation(Float32Buffers):
    """
    [`PackedBinaryActivation`] in the place of a feed-forward activation function: puts out +-1. The threshold is
    shared, not copied.
    """

    threshold: Tensor

    def __init__(self, packed: PackedBinaryActivation) -> None:
        super().__init__()
        self.register_buffer("threshold", packed.threshold)

    def forward(self, input: Tensor) -> Tensor:
        return _plus_minus_one(input >= self.threshold, input.dtype)


class PlainBinarySign(PlainBinaryActivation):
    """[`PackedBinarySign`], likewise."""

    def forward(self, input: Tensor) -> Tensor:
        return _plus_minus_one(input >= self.threshold.view(-1, 1, 1), input.dtype)


class PlainBinaryLinear(_PackedRows):
    """
    [`PackedBinaryLinear`], whose tensors are shared, not copied: on binary inputs a sign, the product of +-1 with +-1,
    a scale and a bias; on float inputs the same of what is rounded to 8 bits, or the product with `+-scale`.

    With `in_integers`, inputs of 8 bits are multiplied as int8, by an operator that ONNX has but PyTorch has not for
    every shape on a GPU; else as floats, which hold the same integers.
    """

    scale: Tensor
    bias: Tensor | None
    threshold: Tensor | None

    def __init__(self, packed: PackedBinaryLinear, in_integers: bool = False) -> None:
        super().__init__(packed.packed_weight, packed.in_features)
        self.in_integers = in_integers
        self.binary_input = packed.binary_input
        self.activation_bits = packed.activation_bits
        self.register_buffer("scale", packed.scale)
        self.register_buffer("bias", packed.bias)
        self.register_buffer("threshold", packed.input_activation.threshold if packed.binarizes_input else None)

    def forward(self, input: Tensor) -> Tensor:
        if not self.binary_input and self.activation_bits is not None:
            return self._multiply_bytes(input)
        # In float32, which holds every sum of up to 2^24 terms of +-1.
        signs = self.signs(self.packed_weight, torch.float32)
        if not self.binary_input:
            weight = (signs * self.scale.unsqueeze(-1)).to(input.dtype)
            return F.linear(input, weight, None if self.bias is None else self.bias.to(input.dtype))
        above = input if self.threshold is None else _plus_minus_one(input >= self.threshold, torch.float32)
        return scale_sums(F.linear(above.float(), signs), self.scale, self.bias, input.dtype)

    def _multiply_bytes(self, input: Tensor) -> Tensor:
        codes, code_scale = quantize_rows(input)
        if self.in_integers:
            sums = torch._int_mm(codes.flatten(0, -2), self.signs(self.packed_weight, torch.int8).T)
            sums = sums.unflatten(0, codes.shape[:-1]).float()
        else:
            # Exact up to 2^24 / 127 terms.
            sums = F.linear(codes.float(), self.signs(self.packed_weight, torch.float32))
        return scale_sums(sums, self.scale, self.bias, input.dtype, code_scale)

    def extra_repr(self) -> str:
        return f"in_features={self.columns}, out_features={self.scale.shape[0]}, bias={self.bias is not None}"


class PlainBinaryConv2d(HasGeometry, PlainBinaryLinear):
    """[`PackedBinaryConv2d`], likewise."""

    def __init__(self, packed: PackedBinaryConv2d) -> None:
        super().__init__(packed)
        # What an activation function in front has signed, too: the border is signed here.
        self.threshold = packed.input_activation.threshold if packed.binary_input else None
        self.geometry, self.in_channels, self.out_features = packed.geometry, packed.in_channels, packed.out_features

    def forward(self, input: Tensor) -> Tensor:
        filters = in_filter_order(self.signs(self.packed_weight, torch.float32), self.geometry)
        if not self.binary_input:
            weight = (filters * self.scale.view(-1, 1, 1, 1)).to(input.dtype)
            bias = None if self.bias is None else self.bias.to(input.dtype)
            return F.conv2d(input, weight, bias, self.stride, self.padding, self.dilation)
        assert self.threshold is not None
        height, width = self.padding
        padded = F.pad(input, (width, width, height, height))
        signs = _plus_minus_one(padded >= self.threshold.view(-1, 1, 1), torch.float32)
        sums = F.conv2d(signs, filters, None, self.stride, 0, self.dilation)
        return images_of(scale_sums(pixels_of(sums), self.scale, self.bias, input.dtype))


class PlainBinaryEmbedding(_PackedRows):
    """[`PackedBinaryEmbedding`], whose tensors are shared, not copied."""

    scale: Tensor

    def __init__(self, packed: PackedBinaryEmbedding) -> None:
        super().__init__(packed.packed_weight, packed.embedding_dim)
        self.register_buffer("scale", packed.scale)

    def forward(self, input: Tensor) -> Tensor:
        # Refuses a negative number, as in `look_up`.
        return self.signs(F.embedding(input, self.packed_weight), self.scale.dtype) * self.scale[input].unsqueeze(-1)


class PlainInt8Embedding(nn.Module):
    """[`PackedInt8Embedding`], whose tensors are shared, not copied."""

    int8_weight: Tensor
    scale: Tensor

    def __init__(self, packed: PackedInt8Embedding) -> None:
        super().__init__()
        self.register_buffer("int8_weight", packed.int8_weight)
        self.register_buffer("scale", packed.scale)

    def forward(self, input: Tensor) -> Tensor:
        return look_up(input, self.int8_weight, self.scale)


def plain_module(packed: nn.Module, in_integers: bool = False) -> nn.Module:
    """The computation of a packed module in PyTorch's own operators; `in_integers` as in [`PlainBinaryLinear`]."""
    if isinstance(packed, PackedBinarySign):
        return PlainBinarySign(packed)
    if isinstance(packed, PackedBinaryActivation):
        return PlainBinaryActivation(packed)
    if isinstance(packed, PackedBinaryConv2d):
        return PlainBinaryConv2d(packed)
    if isinstance(packed, PackedBinaryLinear):
        return PlainBinaryLinear(packed, in_integers)
    if isinstance(packed, PackedInt8Embedding):
        return PlainInt8Embedding(packed)
    assert isinstance(packed, PackedBinaryEmbedding)
    return PlainBinaryEmbedding(packed)
