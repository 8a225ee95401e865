"""Binary convolutions against convolutions of signs in float64, written out by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_stompp.nn import (
    MaskedBinaryActivation,
    MaskedBinaryConv2d,
    MaskedBinarySign,
    PackedBinaryActivation,
    PackedBinaryConv2d,
    PackedBinarySign,
)
from hf_stompp.nn.convolution import Geometry, in_filter_order, in_patch_order, patches
from hf_stompp.nn.plain import plain_module
from hf_stompp.ops import pack_bits


GEOMETRIES = [
    Geometry((1, 1)),
    Geometry((1, 1), stride=(2, 2)),
    Geometry((1, 1), padding=(1, 0)),
    Geometry((3, 3), padding=(1, 1)),
    Geometry((3, 3), stride=(2, 2), padding=(1, 1)),
    Geometry((3, 2), stride=(1, 3), padding=(0, 2), dilation=(2, 1)),
]
geometries = pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)


def latent(geometry: Geometry, channels: int = 8, filters: int = 5, binary: bool = True, **settings) -> nn.Module:
    layer = MaskedBinaryConv2d(channels, filters, geometry, **settings)
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    if binary:
        layer.set_input_activation(MaskedBinaryActivation(channels, surrogate=layer.surrogate), owned=True)
    return layer


def packed(geometry: Geometry, channels: int, binary: bool = True) -> tuple[PackedBinaryConv2d, Tensor]:
    """A layer, and its filters of +-1."""
    layer = PackedBinaryConv2d(channels, 5, geometry, binary_input=binary)
    signs = torch.randn(5, channels, *geometry.kernel_size).sign()
    layer.packed_weight.copy_(pack_bits(in_patch_order(signs)))
    layer.scale.uniform_(0.5, 1.5)
    layer.bias.normal_()
    if binary:
        layer.set_input_activation(PackedBinaryActivation(channels), owned=True)
        layer.input_activation.threshold.normal_(std=0.3)
    return layer, signs


def place(geometry: Geometry, padded: bool = False) -> dict[str, object]:
    return {
        "stride": geometry.stride,
        "padding": 0 if padded else geometry.padding,
        "dilation": geometry.dilation,
    }


def surrounded(images: Tensor, geometry: Geometry) -> Tensor:
    height, width = geometry.padding
    return F.pad(images, (width, width, height, height))


@geometries
@pytest.mark.parametrize("channels", [8, 24, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_packed_convolution_is_that_of_the_signs_of_the_padded_image(geometry, channels, dtype) -> None:
    layer, signs = packed(geometry, channels)
    images = torch.randn(2, channels, 7, 9).to(dtype)

    found = layer(images)

    above = surrounded(images.float(), geometry) >= layer.input_activation.threshold.view(-1, 1, 1)
    sums = F.conv2d(torch.where(above, 1.0, -1.0).double(), signs.double(), **place(geometry, padded=True))
    expected = sums.float() * layer.scale.view(-1, 1, 1) + layer.bias.view(-1, 1, 1)
    assert found.dtype == dtype and torch.equal(found, expected.to(dtype))
    assert torch.equal(plain_module(layer)(images), found)


@geometries
def test_packed_convolution_with_float_inputs_pads_with_zeros(geometry) -> None:
    layer, signs = packed(geometry, 3, binary=False)
    images = torch.randn(2, 3, 7, 9)

    filters = signs * layer.scale.view(-1, 1, 1, 1)

    assert torch.equal(layer(images), F.conv2d(images, filters, layer.bias, **place(geometry)))
    assert torch.allclose(plain_module(layer)(images), layer(images), atol=1e-5)


@geometries
def test_free_convolution_is_the_float_one_within_its_clip_ranges(geometry) -> None:
    layer, images = latent(geometry, clip=100.0), torch.randn(2, 8, 7, 9)
    layer.input_activation.clip = 100.0

    expected = F.conv2d(images.double(), layer.weight.double(), layer.bias.double(), **place(geometry))

    assert torch.allclose(layer(images).double(), expected, atol=1e-4)


@geometries
def test_committed_convolution_computes_in_evaluation_what_it_does_in_training(geometry) -> None:
    layer, images = latent(geometry), torch.randn(2, 8, 7, 9)
    layer(images)
    layer.input_activation.shift.data.normal_()
    layer.input_activation.threshold.data.normal_(std=0.3)
    layer.commit()
    layer.input_activation.commit()

    trained = layer.train()(images)
    with torch.no_grad():
        evaluated = layer.eval()(images)

    offset, amplitude = layer.input_activation.two_levels()
    above = surrounded(images, geometry) >= layer.input_activation.threshold.view(-1, 1, 1)
    levels = offset.double().view(-1, 1, 1) + amplitude.double() * torch.where(above, 1.0, -1.0).double()
    scale = layer.weight.double().abs().mean(dim=(1, 2, 3), keepdim=True)
    filters = torch.where(layer.weight >= 0, scale, -scale)
    expected = F.conv2d(levels, filters, layer.bias.double(), **place(geometry, padded=True))
    assert torch.allclose(evaluated.double(), expected, atol=1e-5)
    assert torch.allclose(trained.double(), expected, atol=1e-5)


def test_levels_are_measured_on_the_image_and_not_on_what_surrounds_it() -> None:
    images = 5 + torch.randn(2, 8, 3, 3)
    wide, narrow = (latent(Geometry((1, 1), padding=padding)) for padding in ((4, 4), (0, 0)))

    wide(images), narrow(images)

    assert torch.equal(wide.input_activation.shift, narrow.input_activation.shift)
    assert torch.equal(wide.input_activation.scale, narrow.input_activation.scale)


@pytest.mark.parametrize("surrogate", ["none", "ste"])
def test_gradient_of_a_frozen_weight_is_what_the_surrogate_says(surrogate) -> None:
    geometry = Geometry((3, 3), padding=(1, 1))
    layer, images = latent(geometry, binary=False, clip=100.0, surrogate=surrogate), torch.randn(2, 8, 5, 5)
    layer.freeze_mask.copy_(torch.rand(layer.weight.shape) < 0.5)

    output = layer(images)
    upstream = torch.randn_like(output)
    output.backward(upstream)

    # A convolution is linear in its filters: where the gradient passes, it does not depend on their values.
    filters = torch.zeros_like(layer.weight).requires_grad_()
    F.conv2d(images, filters, None, padding=1).backward(upstream)
    expected = filters.grad * ~layer.freeze_mask if surrogate == "none" else filters.grad
    assert torch.allclose(layer.weight.grad, expected, atol=1e-4)


def test_committed_filters_without_a_surrogate_get_no_gradient_at_all() -> None:
    layer = latent(Geometry((3, 3)), surrogate="none")
    layer(torch.randn(2, 8, 5, 5))
    layer.commit()

    layer(torch.randn(2, 8, 5, 5)).sum().backward()

    assert layer.weight.grad is None and layer.bias.grad is not None


@geometries
def test_patches_hold_what_unfold_finds_pixel_by_pixel(geometry) -> None:
    images = surrounded(torch.randn(2, 3, 7, 9), geometry)

    found = patches(images.movedim(1, -1), geometry)

    unfolded = F.unfold(images, geometry.kernel_size, geometry.dilation, stride=geometry.stride)
    by_channel = found.flatten(1, 2).unflatten(-1, (geometry.taps, 3)).transpose(-1, -2).flatten(-2)
    assert torch.equal(by_channel, unfolded.transpose(1, 2))


def test_rows_of_filters_become_the_filters_again() -> None:
    filters = torch.randn(5, 3, 2, 4)

    assert torch.equal(in_filter_order(in_patch_order(filters), Geometry((2, 4))), filters)


@pytest.mark.parametrize(
    "settings", [{"groups": 2}, {"padding": "same"}, {"padding": 1, "padding_mode": "reflect"}], ids=str
)
def test_convolution_that_bits_cannot_express_is_refused(settings) -> None:
    with pytest.raises(
        ValueError, match=r"cannot be binarized: only groups=1 and a number of zeros can; leave it float"
    ):
        Geometry.of(nn.Conv2d(4, 4, 3, **settings))


# signs in the place of activation functions


def half_frozen(surrogate: str = "none", clip: float = 1.0) -> MaskedBinarySign:
    sign = MaskedBinarySign(8, nn.ReLU(), clip=clip, surrogate=surrogate)
    sign.freeze_mask[::2] = True
    return sign


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sign_is_plus_or_minus_one_in_frozen_channels_and_the_clipped_identity_in_others(dtype) -> None:
    sign, images = half_frozen(clip=1.5), (2 * torch.randn(2, 8, 7, 9)).to(dtype)
    images[0, :, 0, 0], images[0, :, 0, 1] = 0.0, -0.0

    expected = images.double().clamp(-1.5, 1.5)
    expected[:, ::2] = torch.where(images[:, ::2] >= 0, 1.0, -1.0).double()

    found = sign(images)
    assert found.dtype == dtype and torch.equal(found.double(), expected)


@pytest.mark.parametrize("surrogate", ["none", "ste", "clipped_ste", "polynomial"])
def test_gradient_of_a_sign_is_that_of_the_clip_and_of_the_surrogate(surrogate) -> None:
    sign, images = half_frozen(surrogate), (2 * torch.randn(2, 8, 7, 9)).requires_grad_()
    gradient = torch.randn(2, 8, 7, 9)

    sign(images).backward(gradient)

    distance = images.detach().abs()
    inside = (distance <= 1).float()
    slope = {"none": 0.0 * inside, "ste": 1.0 + 0.0 * inside, "polynomial": inside * (2 - 2 * distance)}
    expected = gradient * inside
    expected[:, ::2] = (gradient * slope.get(surrogate, inside))[:, ::2]
    assert torch.equal(images.grad, expected)


@geometries
@pytest.mark.parametrize("committed", [False, True])
def test_convolution_behind_a_sign_is_surrounded_by_what_that_makes_of_zero(geometry, committed) -> None:
    layer, sign = latent(geometry, binary=False), half_frozen()
    layer.set_input_activation(sign, owned=False, upstream=True)
    if committed:
        sign.commit()
        layer.commit()
    images = sign(torch.randn(2, 8, 7, 9))

    border = sign.freeze_mask.double().view(-1, 1, 1)
    around = surrounded(images.double() - border, geometry) + border
    scale = layer.weight.abs().double().mean(dim=(1, 2, 3), keepdim=True)
    clipped = layer.weight.double().clamp(-layer.clip * scale, layer.clip * scale)
    filters = torch.where(layer.freeze_mask, torch.where(layer.weight >= 0, scale, -scale), clipped)
    expected = F.conv2d(around, filters, layer.bias.double(), **place(geometry, padded=True))

    assert torch.allclose(layer(images).double(), expected, atol=1e-4)
    with torch.no_grad():
        assert torch.allclose(layer.eval()(images).double(), expected, atol=1e-4)


def test_packed_sign_is_plus_or_minus_one() -> None:
    images = torch.randn(2, 8, 7, 9)
    images[0, :, 0, 0], images[0, :, 0, 1] = 0.0, -0.0
    expected = torch.where(images >= 0, 1.0, -1.0)

    assert torch.equal(PackedBinarySign(8)(images), expected)
    assert torch.equal(plain_module(PackedBinarySign(8))(images), expected)
