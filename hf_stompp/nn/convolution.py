"""
Binary convolutions, latent and packed: linear layers that read every patch of an image.

A binary input is padded before its sign is taken: what surrounds the image is the sign of 0 relative to each channel's
threshold, one of two levels like all else, so that latent and packed layers agree (ours).
"""

from __future__ import annotations

from dataclasses import astuple, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..ops import binary_linear, pack_sign, packed_bytes, plus_minus_one
from .activation import MaskedBinaryActivation
from .functional import compute_dtype, masked_binary_activation, masked_binary_weight, weight_scale
from .linear import MaskedBinaryLinear
from .packed import PackedBinaryActivation, PackedBinaryLinear


Pair = tuple[int, int]


@dataclass(frozen=True)
class Geometry:
    """Where the patches of a convolution lie, each by height and width, as in [`~torch.nn.Conv2d`]."""

    kernel_size: Pair
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)

    @classmethod
    def of(cls, convolution: nn.Conv2d) -> Geometry:
        """
        That of a float convolution. Raises a `ValueError` if it has groups, or pads by another rule than a number of
        zeros.
        """
        padding: Any = (0, 0) if convolution.padding == "valid" else convolution.padding
        if convolution.groups != 1 or convolution.padding_mode != "zeros" or isinstance(padding, str):
            raise ValueError(
                f"a convolution with groups={convolution.groups}, padding={padding!r} and "
                f"padding_mode={convolution.padding_mode!r} cannot be binarized: only groups=1 and a number of zeros "
                "can; leave it float: in modules_to_not_convert, and in no pattern of modes"
            )
        sizes: Any = convolution.kernel_size, convolution.stride, padding, convolution.dilation
        return cls(*sizes)

    @property
    def taps(self) -> int:
        """Pixels of a patch."""
        return self.kernel_size[0] * self.kernel_size[1]

    def __str__(self) -> str:
        return ", ".join(
            f"{name}={value}"
            for name, value in zip(("kernel_size", "stride", "padding", "dilation"), astuple(self), strict=True)
        )


def pixels_of(images: Tensor) -> Tensor:
    """Channels last: `(..., channels, height, width)` to dense `(..., height, width, channels)`."""
    return images.movedim(-3, -1).contiguous()


def images_of(pixels: Tensor) -> Tensor:
    """The inverse of [`pixels_of`], as a view: in PyTorch's memory format `channels_last`."""
    return pixels.movedim(-1, -3)


def patches(pixels: Tensor, geometry: Geometry) -> Tensor:
    """
    What a filter reads at every place of padded images, pixel by pixel: `(..., height, width, channels)` to `(...,
    out_height, out_width, taps * channels)`.
    """
    down, right = (
        [slice(tap * step, tap * step + size - step * (kernel - 1), stride) for tap in range(kernel)]
        for size, kernel, stride, step in zip(
            pixels.shape[-3:-1], geometry.kernel_size, geometry.stride, geometry.dilation, strict=True
        )
    )
    return torch.cat([pixels[..., row, column, :] for row in down for column in right], dim=-1)


def surrounded(pixels: Tensor, border: Tensor, padding: Pair) -> Tensor:
    """
    Images `(..., height, width, channels)` within a border, every pixel of which is `border`, of shape `(channels,)`:
    `(..., height + 2 * padding[0], width + 2 * padding[1], channels)`, in the dtype of the pixels.
    """
    if not any(padding):
        return pixels
    down, right = padding
    *batch, height, width, channels = pixels.shape
    result = border.to(pixels.dtype).expand(*batch, height + 2 * down, width + 2 * right, channels).clone()
    result[..., down : down + height, right : right + width, :] = pixels
    return result


def in_patch_order(filters: Tensor) -> Tensor:
    """Filters `(out_channels, in_channels, height, width)` as rows in the order of [`patches`]."""
    return filters.permute(0, 2, 3, 1).flatten(1)


def in_filter_order(rows: Tensor, geometry: Geometry) -> Tensor:
    """The inverse of [`in_patch_order`]."""
    return rows.unflatten(1, (*geometry.kernel_size, -1)).permute(0, 3, 1, 2)


def convolve_bits(
    pixels: Tensor, threshold: Tensor, packed_weight: Tensor, scale: Tensor, bias: Tensor | None, geometry: Geometry
) -> Tensor:
    """
    A convolution of signs: [`~hf_stompp.ops.binary_linear`] on every patch.

    Pixels `(..., height, width, channels)` of float32, bfloat16 or float16, not padded, to `(..., out_channels,
    out_height, out_width)` in their dtype. Channels are whole bytes: a multiple of 8. The weight is uint8 of shape
    `(out_channels, packed_bytes(taps * channels))`, in the order of [`patches`]; threshold, a channel, and scale and
    bias, a filter, are float32.
    """
    channels = pixels.shape[-1]
    bits = pack_sign(pixels, threshold)[0]
    bits = surrounded(bits, pack_sign(pixels.new_zeros(channels), threshold)[0], geometry.padding)
    if geometry.taps > 1:
        row = patches(bits[..., : channels // 8], geometry)
        bits = F.pad(row, (0, packed_bytes(geometry.taps * channels) - row.shape[-1]))
    else:
        bits = patches(bits, geometry)
    layer = packed_weight, geometry.taps * channels, scale, bias, pixels.dtype
    return images_of(binary_linear(bits, None, *layer))


class HasGeometry(nn.Module):
    """The attributes of [`~torch.nn.Conv2d`] that a model may read: some pad by them."""

    geometry: Geometry
    in_channels: int
    out_features: int

    kernel_size = property(lambda self: self.geometry.kernel_size)
    stride = property(lambda self: self.geometry.stride)
    padding = property(lambda self: self.geometry.padding)
    dilation = property(lambda self: self.geometry.dilation)
    groups = property(lambda self: 1)
    out_channels = property(lambda self: self.out_features)
    activation_features = property(lambda self: self.in_channels)

    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self.geometry}, {super().extra_repr()}"


class MaskedBinarySign(MaskedBinaryActivation):
    """
    The sign in the place of an activation function (paper), which is not called: `M * sign(u) + (1 - M) * clip(u)` of
    images `(..., channels, height, width)`, with one mask entry a channel. Its levels are +-1: behind BatchNorm a
    scale and a threshold would say nothing that is not learned there.
    """

    def __init__(self, channels: int, activation: nn.Module, **settings: Any) -> None:
        super().__init__(channels, activation, scale="fixed", shift="none", **settings)
        self.scale.fill_(1.0)
        self.initialized = True

    def forward(self, input: Tensor) -> Tensor:
        pixels = pixels_of(input)
        levels = masked_binary_activation(
            pixels,
            pixels,
            self.freeze_mask,
            self.threshold,
            self.scale,
            self.shift,
            self.clip,
            self.surrogate,
            window=self.window,
            blocked=self.blocks_gradient,
        )
        return images_of(levels)


class PackedBinarySign(PackedBinaryActivation):
    """[`MaskedBinarySign`], packed: images `(..., channels, height, width)` to +-1 of the same shape."""

    def forward(self, input: Tensor) -> Tensor:
        return plus_minus_one(input >= self.threshold.view(-1, 1, 1), input.dtype)


class MaskedBinaryConv2d(HasGeometry, MaskedBinaryLinear):
    """
    A convolution whose filters are masked-binarized, and whose input may be: `(batch, in_channels, height, width)` to
    `(batch, out_channels, out_height, out_width)`.

    It is a [`MaskedBinaryLinear`] on patches, with a scale a filter; the input's mask, shift and threshold have an
    entry a channel. Float inputs are not rounded, whatever `activation_bits` says.
    """

    def __init__(
        self, in_channels: int, out_channels: int, geometry: Geometry, bias: bool = True, **settings: Any
    ) -> None:
        super().__init__(in_channels * geometry.taps, out_channels, bias, **settings)
        self.in_channels = in_channels
        self.geometry = geometry
        shape = (out_channels, in_channels, *geometry.kernel_size)
        self.weight = nn.Parameter(self.weight.detach().reshape(shape))
        self.freeze_mask = self.freeze_mask.reshape(shape)

    def weight_rows(self) -> Tensor:
        """The latent filters as rows of shape `(out_channels, in_channels * taps)`."""
        return self.weight.flatten(1)

    def rows_to_pack(self) -> Tensor:
        """The centred filters as rows in the order of [`patches`]."""
        return in_patch_order(self.centered_weight().view_as(self.weight))

    def input_levels(self) -> tuple[Tensor, Tensor]:
        """The offset of every entry of a patch, of shape `(taps * channels,)` or `()`, and the amplitude."""
        offset, amplitude = super().input_levels()
        # Every pixel of a patch has the channels.
        return (offset.repeat(self.geometry.taps) if offset.dim() else offset), amplitude

    def forward(self, input: Tensor) -> Tensor:
        activation = self.input_activation
        if activation is None:
            return self._convolve(input, self.padding)
        pixels = pixels_of(input)
        if not activation.initialized:
            # Of the image alone, not of what surrounds it.
            activation(pixels)
        if not self.training and activation.gives_signs(pixels) and self.committed:
            packed = self.packed()
            threshold = activation.threshold.detach().float()
            return convolve_bits(pixels, threshold, packed[0], *self.folded(packed), self.geometry)
        if self.binarizes_input:
            levels = activation(surrounded(pixels, pixels.new_zeros(self.in_channels), self.padding))
        else:
            # A sign makes +1 of 0 where a channel is frozen, else 0.
            levels = surrounded(pixels, activation.freeze_mask.float(), self.padding)
        return self._convolve(images_of(levels.to(compute_dtype(input))), (0, 0))

    def _convolve(self, images: Tensor, padding: Pair) -> Tensor:
        weight = self.centered_weight()
        scale = weight_scale(weight, self.scale)
        if self.blocks_gradient:
            weight = weight.detach()
        mask = self.freeze_mask.flatten(1)
        weight = masked_binary_weight(weight, mask, scale, self.clip, self.surrogate, self.window)
        filters = weight.view_as(self.weight).to(images.dtype)
        bias = None if self.bias is None else self.bias.to(images.dtype)
        return F.conv2d(images, filters, bias, self.stride, padding, self.dilation)


class PackedBinaryConv2d(HasGeometry, PackedBinaryLinear):
    """
    A convolution with 1-bit filters, `(batch, in_channels, height, width)` to `(batch, out_channels, out_height,
    out_width)`: [`PackedBinaryLinear`] on patches. With `binary_input` (mode `bnn`) the channels must be a multiple of
    8; otherwise (mode `bwn`) it is a float convolution with `+-scale`.
    """

    def __init__(
        self, in_channels: int, out_channels: int, geometry: Geometry, bias: bool = True, **settings: Any
    ) -> None:
        super().__init__(in_channels * geometry.taps, out_channels, bias, **settings)
        self.in_channels = in_channels
        self.geometry = geometry

    def forward(self, input: Tensor) -> Tensor:
        bias = self.bias
        if self.binary_input:
            pixels = pixels_of(input.detach() if input.requires_grad else input)
            layer = self.packed_weight, self.scale.float(), None if bias is None else bias.float()
            return convolve_bits(pixels, self.input_activation.threshold.float(), *layer, self.geometry)
        filters, bias = self.float_weight(input.dtype), None if bias is None else bias.to(input.dtype)
        return F.conv2d(input, filters, bias, self.stride, self.padding, self.dilation)

    def _unpacked(self, dtype: torch.dtype) -> Tensor:
        filters = in_filter_order(super()._unpacked(dtype), self.geometry)
        # Strides decide the order in which PyTorch sums, and those of a 1 x 1 filter pass for contiguous already.
        return filters.clone(memory_format=torch.contiguous_format)
