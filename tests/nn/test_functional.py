from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from hf_stompp.nn.functional import (
    LEVELS,
    SURROGATES,
    WEIGHT_SCALES,
    masked_binary_activation,
    masked_binary_weight,
    weight_scale,
)


# The definitions once more, entry by entry in Python's floats, without a tensor operation.


def slope_of(frozen: bool, distance: float, reach: float, surrogate: str) -> float:
    inside = float(distance <= reach)
    if not frozen:
        return inside
    falling = inside * (2 - 2 * (distance / reach))
    return {"none": 0.0, "ste": 1.0, "clipped_ste": inside, "polynomial": falling}[surrogate]


def gelu_and_slope(x: float) -> tuple[float, float]:
    cumulative = 0.5 * math.erfc(-x / math.sqrt(2))
    return x * cumulative, cumulative + x * math.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)


def reference_weight(w, mask, scale, clip, surrogate, upstream, window=None):
    window = clip if window is None else window
    out, grad = torch.zeros_like(w), torch.zeros_like(w)
    for r, c in itertools.product(range(w.shape[0]), range(w.shape[1])):
        x, a, frozen = w[r, c].item(), scale[r, 0].item(), mask[r, c].item()
        inside = -clip * a <= x <= clip * a
        free = x if inside else math.copysign(clip * a, x)
        out[r, c] = (a if x >= 0 else -a) if frozen else free
        slope = slope_of(frozen, abs(x), (window if frozen else clip) * a, surrogate)
        grad[r, c] = upstream[r, c].item() * slope
    return out, grad


def reference_activation(
    pre, mask, threshold, scale, shift, clip, surrogate, levels, with_gelu, upstream, window=None
):
    window = clip if window is None else window
    out, d_pre = torch.zeros_like(pre), torch.zeros_like(pre)
    d_threshold, d_shift, d_scale = torch.zeros_like(threshold), torch.zeros_like(shift), 0.0
    a, signed = scale.item(), levels == "signed"
    for n, f in itertools.product(range(pre.shape[0]), range(pre.shape[1])):
        x, g, frozen, middle = pre[n, f].item(), upstream[n, f].item(), mask[f].item(), shift[f].item()
        value, slope = gelu_and_slope(x) if with_gelu else (x, 1.0)
        center = middle if signed else 0.0
        inside = abs(value - center) <= clip * a
        above = x >= threshold[f].item()
        passes = slope_of(frozen, abs(value - center), (window if frozen else clip) * a, surrogate)
        if frozen:
            low, high = (middle - a, middle + a) if signed else (0.0, a)
            out[n, f] = high if above else low
            d_threshold[f] -= g * passes
            d_shift[f] += g if signed else 0.0
            d_scale += g * ((1 if above else -1) if signed else (1 if above else 0))
        elif inside:
            out[n, f] = value
        else:
            side = math.copysign(1.0, value - center)
            out[n, f] = center + side * clip * a
            d_shift[f] += g if signed else 0.0
            d_scale += g * side * clip
        d_pre[n, f] = g * slope * passes
    return out, d_pre, d_threshold, torch.tensor(d_scale, dtype=pre.dtype), d_shift


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def draw_mask(*shape: int, seed: int = 1) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) < 0.5


# weights


@pytest.mark.parametrize("surrogate", SURROGATES)
@pytest.mark.parametrize("clip", [1.0, 2.0], ids=["clip1", "clip2"])
@pytest.mark.parametrize("window", [0.5, 1.5, 100.0])
def test_weight_value_and_gradient_equal_the_definition(surrogate: str, clip: float, window: float) -> None:
    w, mask, upstream = draw(5, 13).requires_grad_(), draw_mask(5, 13), draw(5, 13, seed=2)
    scale = torch.tensor([[0.3], [0.5], [0.7], [1.1], [0.02]], dtype=torch.float64)
    out = masked_binary_weight(w, mask, scale, clip, surrogate, window)
    out.backward(upstream)
    expected, grad = reference_weight(w.detach(), mask, scale, clip, surrogate, upstream, window)
    torch.testing.assert_close(out.detach(), expected, rtol=1e-15, atol=0)
    assert torch.equal(w.grad, grad)


@pytest.mark.parametrize("surrogate", SURROGATES)
def test_weight_on_the_edge_of_the_clip_range_still_passes_the_gradient(surrogate: str) -> None:
    w = torch.tensor([[1.5, -1.5, 1.5000001, -1.5000001]], requires_grad=True)
    mask = torch.zeros(1, 4, dtype=torch.bool)
    masked_binary_weight(w, mask, torch.tensor([[0.5]]), 3.0, surrogate).sum().backward()
    assert w.grad.tolist() == [[1.0, 1.0, 0.0, 0.0]]


@pytest.mark.parametrize("surrogate", SURROGATES)
def test_a_row_of_zeros_has_a_finite_gradient(surrogate: str) -> None:
    w = torch.zeros(2, 4, requires_grad=True)
    masked_binary_weight(w, torch.ones(2, 4, dtype=torch.bool), torch.zeros(2, 1), 3.0, surrogate).sum().backward()
    assert torch.isfinite(w.grad).all()


@pytest.mark.parametrize("surrogate", SURROGATES)
def test_the_window_is_the_clip_range_unless_another_is_given(surrogate: str) -> None:
    w, mask, scale = draw(8, 32), draw_mask(8, 32), torch.full((8, 1), 0.5, dtype=torch.float64)
    grads = []
    for window in (None, 1.5):
        latent, pre = w.clone().requires_grad_(), w.clone().requires_grad_()
        masked_binary_weight(latent, mask, scale, 1.5, surrogate, window).sum().backward()
        zeros, level = torch.zeros(32, dtype=torch.float64), torch.tensor(0.5, dtype=torch.float64)
        arguments = mask[0], zeros, level, zeros, 1.5, surrogate
        masked_binary_activation(pre, pre, *arguments, window=window).sum().backward()
        grads.append((latent.grad, pre.grad))
    assert all(torch.equal(*pair) for pair in zip(*grads, strict=True))


def test_frozen_weights_pass_no_gradient_without_ste() -> None:
    w, mask = draw(8, 32, dtype=torch.float32).requires_grad_(), draw_mask(8, 32)
    out = masked_binary_weight(w, mask, weight_scale(w, "row"), 3.0, "none")
    # A loss that would reach the scale, too, if the scale were part of the graph.
    (out.square().sum() + out.sum()).backward()
    assert torch.count_nonzero(w.grad[mask]) == 0
    assert torch.count_nonzero(w.grad[~mask]) > 0


@pytest.mark.parametrize("kind", WEIGHT_SCALES)
def test_no_gradient_flows_through_the_weight_scale(kind: str) -> None:
    w = draw(3, 5, dtype=torch.float32).requires_grad_()
    scale = weight_scale(w, kind)
    assert not scale.requires_grad
    full = torch.ones(3, 5, dtype=torch.bool)
    masked_binary_weight(w, full, scale, 3.0, "ste").backward(torch.full((3, 5), 2.0))
    assert torch.equal(w.grad, torch.full((3, 5), 2.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_weight_keeps_its_dtype_and_takes_the_scale_rounded_to_it(dtype: torch.dtype) -> None:
    w, mask = draw(4, 9, dtype=dtype).requires_grad_(), draw_mask(4, 9)
    scale = weight_scale(w, "row")
    out = masked_binary_weight(w, mask, scale, 3.0, "ste")
    out.sum().backward()
    assert out.dtype == w.grad.dtype == dtype
    assert scale.dtype == torch.float32
    expected, _ = reference_weight(w.detach(), mask, scale.to(dtype), 3.0, "ste", torch.ones(4, 9))
    assert torch.equal(out[mask], expected[mask])
    torch.testing.assert_close(out, expected)


# signs


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_sign_of_minus_zero_is_plus_one(dtype: torch.dtype) -> None:
    tiny = torch.finfo(dtype).tiny
    x = torch.tensor([[-0.0, 0.0, tiny, -tiny, math.inf, -math.inf]], dtype=dtype)
    frozen = masked_binary_weight(x, torch.ones_like(x, dtype=torch.bool), torch.ones(1, 1), 3.0, "ste")
    assert frozen.tolist() == [[1, 1, 1, -1, 1, -1]]
    assert frozen.dtype == dtype


def test_minus_zero_takes_the_upper_level() -> None:
    zero, frozen = torch.tensor([[-0.0]]), torch.ones(1, dtype=torch.bool)
    assert masked_binary_weight(zero, frozen[None], torch.tensor([[0.25]]), 3.0, "ste").item() == 0.25
    parameters = torch.zeros(1), torch.tensor(0.25), torch.zeros(1)
    assert masked_binary_activation(zero, zero, frozen, *parameters, 3.0, "ste").item() == 0.25


@pytest.mark.parametrize("levels", ["signed", "zero_one"])
def test_level_follows_the_input_of_gelu_where_its_output_rounds_to_minus_zero(levels: str) -> None:
    pre = torch.tensor([[-7.0], [7.0]])
    value = F.gelu(pre)
    assert value[0].item() == 0 and torch.signbit(value[0])
    frozen, zero = torch.ones(1, dtype=torch.bool), torch.zeros(1)
    out = masked_binary_activation(value, pre, frozen, zero, torch.tensor(0.5), zero, 3.0, "ste", levels)
    assert out.flatten().tolist() == ([-0.5, 0.5] if levels == "signed" else [0.0, 0.5])


# activations


@pytest.mark.parametrize("surrogate", SURROGATES)
@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("with_gelu", [False, True], ids=["identity", "gelu"])
@pytest.mark.parametrize("window", [0.5, 1.5, 3.0])
def test_activation_value_and_every_gradient_equal_the_definition(
    surrogate: str, levels: str, with_gelu: bool, window: float
) -> None:
    pre, upstream = (3 * draw(24, 6)).requires_grad_(), draw(24, 6, seed=3)
    mask = torch.tensor([True, False, True, False, True, False])
    threshold, shift = draw(6, seed=4).requires_grad_(), (0.5 * draw(6, seed=5)).requires_grad_()
    scale = torch.tensor(0.9, dtype=torch.float64, requires_grad=True)
    arguments = mask, threshold, scale, shift, 1.5, surrogate, levels
    out = masked_binary_activation(F.gelu(pre) if with_gelu else pre, pre, *arguments, window)
    out.backward(upstream)
    expected, *gradients = reference_activation(pre.detach(), *arguments, with_gelu, upstream, window)
    close = {"rtol": 1e-12, "atol": 1e-13}
    torch.testing.assert_close(out.detach(), expected, **close)
    for name, tensor, gradient in zip(
        ["pre-activation", "threshold", "scale", "shift"], [pre, threshold, scale, shift], gradients, strict=True
    ):
        got = torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
        torch.testing.assert_close(got, gradient, **close, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("surrogate", ["clipped_ste", "polynomial"])
def test_a_frozen_value_that_is_nan_is_outside_every_window(surrogate: str) -> None:
    pre, frozen = torch.tensor([[math.nan, 0.25]], requires_grad=True), torch.ones(2, dtype=torch.bool)
    out = masked_binary_activation(pre, pre, frozen, torch.zeros(2), torch.tensor(1.0), torch.zeros(2), 3.0, surrogate)
    out.sum().backward()
    assert pre.grad[0, 0] == 0 and pre.grad[0, 1] > 0


@pytest.mark.parametrize("with_gelu", [False, True], ids=["identity", "gelu"])
def test_frozen_features_pass_no_gradient_without_ste(with_gelu: bool) -> None:
    pre, mask = draw(4, 3, 8, dtype=torch.float32).requires_grad_(), draw_mask(8)
    threshold = torch.zeros(8, requires_grad=True)
    value = F.gelu(pre) if with_gelu else pre
    out = masked_binary_activation(value, pre, mask, threshold, torch.tensor(1.0), torch.zeros(8), 3.0, "none")
    out.square().sum().backward()
    assert torch.count_nonzero(pre.grad[..., mask]) == 0
    assert torch.count_nonzero(threshold.grad) == 0
    assert torch.count_nonzero(pre.grad[..., ~mask]) > 0


@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("surrogate", ["ste", "polynomial"])
def test_activation_in_half_precision_keeps_its_dtype_and_float32_parameter_gradients(
    surrogate: str, dtype: torch.dtype, levels: str
) -> None:
    pre, mask = draw(64, 6, dtype=dtype).requires_grad_(), draw_mask(6)
    upstream = draw(64, 6, seed=2, dtype=dtype)
    threshold, shift = torch.full((6,), 0.25, requires_grad=True), torch.full((6,), 0.5, requires_grad=True)
    scale = torch.tensor(0.75, requires_grad=True)
    arguments = mask, threshold, scale, shift, 2.0, surrogate, levels
    out = masked_binary_activation(pre, pre, *arguments)
    out.backward(upstream)
    exact = pre.detach().double()
    expected, d_pre, d_threshold, d_scale, d_shift = reference_activation(
        exact, mask, *(t.detach().double() for t in arguments[1:4]), 2.0, surrogate, levels, False, upstream.double()
    )
    assert out.dtype == pre.grad.dtype == dtype
    torch.testing.assert_close(out, expected.to(dtype))
    torch.testing.assert_close(pre.grad, d_pre.to(dtype))
    assert threshold.grad.dtype == scale.grad.dtype == torch.float32
    torch.testing.assert_close(threshold.grad, d_threshold.float())
    torch.testing.assert_close(scale.grad, d_scale.float())
    if levels == "signed":
        assert shift.grad.dtype == torch.float32
        torch.testing.assert_close(shift.grad, d_shift.float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_zero_one_levels_are_zero_and_the_scale_in_every_dtype(dtype: torch.dtype) -> None:
    pre, frozen = torch.tensor([[-1.0], [1.0]], dtype=dtype), torch.ones(1, dtype=torch.bool)
    for scale in torch.linspace(0.1, 2.0, 50):
        out = masked_binary_activation(pre, pre, frozen, torch.zeros(1), scale, torch.zeros(1), 3.0, "ste", "zero_one")
        assert out.flatten().tolist() == [0.0, scale.to(dtype).item()]


# scales


def test_row_scale_is_the_mean_magnitude_of_each_row() -> None:
    w = draw(6, 100, dtype=torch.float32)
    expected = [math.fsum(abs(x) for x in row) / len(row) for row in w.tolist()]
    assert torch.equal(weight_scale(w, "row"), torch.tensor(expected, dtype=torch.float32).unsqueeze(1))


def test_tensor_scale_is_the_mean_magnitude_of_the_tensor_in_every_row() -> None:
    w = draw(6, 100, dtype=torch.float32)
    expected = math.fsum(abs(x) for x in w.flatten().tolist()) / w.numel()
    assert torch.equal(weight_scale(w, "tensor"), torch.full((6, 1), expected, dtype=torch.float32))


def test_scale_none_is_one() -> None:
    assert torch.equal(weight_scale(draw(6, 100, dtype=torch.bfloat16), "none"), torch.ones(6, 1))


@pytest.mark.parametrize("kind", ["row", "tensor"])
@pytest.mark.parametrize("in_features", [1, 3, 7, 255, 768, 3072, 4999])
def test_scale_of_equal_magnitudes_is_exactly_that_magnitude(in_features: int, kind: str) -> None:
    signs = torch.where(draw(5, in_features, dtype=torch.float32) >= 0, 1.0, -1.0)
    for value in [0.1, 1 / 3, 0.0397, 1.0000001, 16777215.0, 1e-38, 1e-44, 3.4e38, *draw(20).abs().tolist()]:
        magnitude = torch.full((5, 1), value, dtype=torch.float32)
        assert torch.equal(weight_scale(signs * magnitude, kind), magnitude), value


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_scale_is_float32_for_every_weight_dtype(dtype: torch.dtype) -> None:
    w = draw(4, 33, dtype=dtype)
    expected = [math.fsum(abs(x) for x in row) / 33 for row in w.tolist()]
    assert torch.equal(weight_scale(w, "row"), torch.tensor(expected, dtype=torch.float32).unsqueeze(1))
