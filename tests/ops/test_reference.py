from __future__ import annotations

import math
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from hf_stompp.ops import fold, integer_linear, layer_norm_sign, pack_bits, pack_sign, packed_bytes, unpack_signs


IN_FEATURES = [1, 7, 8, 63, 64, 65, 255, 256, 257, 768]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def draw_signs(*shape: int, seed: int = 0) -> Tensor:
    return torch.where(draw(*shape, seed=seed) >= 0, 1.0, -1.0)


@pytest.mark.parametrize(
    ("in_features", "expected"), [(1, 32), (255, 32), (256, 32), (257, 64), (768, 96), (3072, 384), (5000, 640)]
)
def test_rows_are_padded_to_256_bits(in_features: int, expected: int) -> None:
    assert packed_bytes(in_features) == expected


@pytest.mark.parametrize("in_features", IN_FEATURES)
def test_bit_k_of_a_row_is_bit_k_modulo_8_of_byte_k_div_8(in_features: int) -> None:
    w = draw(3, in_features)
    packed = pack_bits(w)
    assert packed.dtype == torch.uint8
    for row, bytes_of_row in zip(w.tolist(), packed.tolist(), strict=True):
        expected = [0] * (32 * math.ceil(in_features / 256))
        for k, value in enumerate(row):
            if value >= 0:
                expected[k // 8] |= 1 << (k % 8)
        assert bytes_of_row == expected


def test_first_weight_is_the_least_significant_bit() -> None:
    w = torch.tensor([[1.0, -1, -1, -1, -1, -1, -1, -1, -1, 1.0, -1]])
    assert pack_bits(w)[0, :3].tolist() == [1, 2, 0]


@pytest.mark.parametrize("in_features", IN_FEATURES)
def test_tail_of_a_row_is_zero(in_features: int) -> None:
    packed = pack_bits(torch.ones(2, in_features))
    whole, rest = divmod(in_features, 8)
    expected = [255] * whole + ([2**rest - 1] if rest else [])
    assert packed.tolist() == [expected + [0] * (packed_bytes(in_features) - len(expected))] * 2


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_minus_zero_is_packed_as_plus_one(dtype: torch.dtype) -> None:
    w = torch.tensor([[-0.0, 0.0, -1.0]], dtype=dtype)
    assert pack_bits(w)[0, 0].item() == 0b011


@pytest.mark.parametrize("in_features", IN_FEATURES)
def test_unpacking_inverts_packing(in_features: int) -> None:
    signs = draw_signs(5, in_features)
    unpacked = unpack_signs(pack_bits(signs), in_features)
    assert unpacked.dtype == torch.float32
    assert torch.equal(unpacked, signs)
    assert torch.equal(pack_bits(unpacked), pack_bits(signs))


def test_unpacking_takes_leading_dimensions() -> None:
    packed = pack_bits(draw_signs(6, 70))
    assert torch.equal(unpack_signs(packed.view(2, 3, -1), 70).flatten(0, 1), unpack_signs(packed, 70))


@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("one_offset", [True, False], ids=["offset-per-tensor", "offset-per-feature"])
def test_folded_product_equals_the_linear_layer_on_the_levels(with_bias: bool, one_offset: bool) -> None:
    signs, weight_signs, row_scale = draw_signs(4, 37), draw_signs(9, 37, seed=1), draw(9, 1, seed=2).abs()
    offset = torch.tensor(0.3) if one_offset else draw(37, seed=3)
    amplitude, bias = torch.tensor(0.7), draw(9, seed=4) if with_bias else None
    scale, constant = fold(pack_bits(weight_signs), row_scale, offset, amplitude, bias, 37)
    assert scale.dtype == constant.dtype == torch.float32
    offsets = [offset.item()] * 37 if one_offset else offset.tolist()
    for o in range(9):
        a, row = row_scale[o].item(), weight_signs[o].tolist()
        b = bias[o].item() if with_bias else 0.0
        assert scale[o].item() == pytest.approx(a * amplitude.item(), rel=1e-7)
        assert constant[o].item() == pytest.approx(
            b + a * math.fsum(v * c for v, c in zip(row, offsets, strict=True)), rel=1e-7
        )
        for n in range(4):
            levels = [c + amplitude.item() * s for c, s in zip(offsets, signs[n].tolist(), strict=True)]
            expected = b + math.fsum(a * v * u for v, u in zip(row, levels, strict=True))
            integer = int((signs[n] * weight_signs[o]).sum())
            assert scale[o].item() * integer + constant[o].item() == pytest.approx(expected, rel=1e-5, abs=1e-5)


def test_fold_adds_in_float64_and_rounds_once() -> None:
    # In float32 the sum would lose every 1: 2^25 - 2^25 + 1 + 1 + 1.
    weight_signs = torch.ones(1, 5)
    offset = torch.tensor([2.0**25, 1.0, 1.0, 1.0, -(2.0**25)])
    _, constant = fold(pack_bits(weight_signs), torch.ones(1, 1), offset, torch.tensor(1.0), torch.tensor([0.5]), 5)
    assert constant.item() == 3.5


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("in_features", [1, 65, 257, 768, 3072, 5000])
def test_product_is_the_exact_integer(in_features: int, autocast: bool) -> None:
    signs, weight_signs = draw_signs(6, in_features), draw_signs(11, in_features, seed=1)
    # The largest sums of both signs, and one that bfloat16 cannot hold.
    signs[0], weight_signs[0], weight_signs[1], weight_signs[2] = 1, 1, -1, 1
    weight_signs[2, 0] = -1
    with torch.autocast("cpu", dtype=torch.bfloat16) if autocast else nullcontext():
        product = integer_linear(signs, weight_signs, torch.ones(11), torch.zeros(11))
    assert product.dtype == torch.float32
    assert torch.equal(product.long(), signs.long() @ weight_signs.long().T)
    assert product[0, :3].tolist() == [in_features, -in_features, in_features - 2]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_product_of_half_precision_signs_is_rounded_once_at_the_end(dtype: torch.dtype) -> None:
    signs, weight_signs, scale, bias = draw_signs(3, 3071), draw_signs(4, 3071, seed=1), draw(4).abs(), draw(4, seed=2)
    # 3071 is no bfloat16 and no float16, 71 is both.
    weight_signs[0], scale[0], bias[0] = signs[0], 1.0, -3000.0
    out = integer_linear(signs.to(dtype), weight_signs, scale, bias)
    exact = (signs.long() @ weight_signs.long().T).float() * scale + bias
    assert out[0, 0].item() == 71
    assert torch.equal(out, exact.to(dtype))


def test_scale_and_bias_are_those_of_the_row() -> None:
    out = integer_linear(
        torch.ones(1, 2, 3), draw_signs(2, 3).abs(), torch.tensor([0.5, 2.0]), torch.tensor([1.0, -1.0])
    )
    assert out.tolist() == [[[2.5, 5.0], [2.5, 5.0]]]


@pytest.mark.parametrize("shape", [(0, 65), (2, 0, 65)], ids=str)
def test_no_rows_give_no_rows(shape: tuple[int, ...]) -> None:
    out = integer_linear(torch.ones(shape), draw_signs(4, 65), torch.ones(4), torch.zeros(4))
    assert out.shape == (*shape[:-1], 4)


@pytest.mark.parametrize("features", IN_FEATURES)
@pytest.mark.parametrize("with_residual", [True, False], ids=["residual", "no-residual"])
def test_layer_norm_equals_a_computation_by_hand_in_float64(features: int, with_residual: bool) -> None:
    x, residual = draw(3, features), draw(3, features, seed=1) if with_residual else None
    weight, bias = draw(features, seed=2), draw(features, seed=3)
    output, _ = layer_norm_sign(x, residual, weight, bias, 1e-3, None)
    total = x if residual is None else x + residual
    for found, row in zip(output.tolist(), total.tolist(), strict=True):
        mean = math.fsum(row) / features
        deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in row) / features + 1e-3)
        expected = [
            (value - mean) / deviation * w + b for value, w, b in zip(row, weight.tolist(), bias.tolist(), strict=True)
        ]
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_bits_of_layer_norm_are_those_of_the_rounded_output(dtype: torch.dtype) -> None:
    x, weight, bias = draw(5, 257).to(dtype), draw(257, seed=1), draw(257, seed=2)
    output, bits = layer_norm_sign(x, None, weight, bias, 1e-5, None)
    assert torch.equal(bits, pack_sign(output)[0])
    # Half of the first row lies below its rounding, which is on the threshold and hence has its bit set.
    threshold = output[0].float()
    again, bits = layer_norm_sign(x, None, weight, bias, 1e-5, threshold)
    assert torch.equal(again, output)
    assert torch.equal(bits, pack_sign(output, threshold)[0])
    assert torch.equal(bits[0], pack_bits(torch.ones(1, 257))[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_layer_norm_of_one_dtype_is_that_of_torch_bit_for_bit(dtype: torch.dtype) -> None:
    x, residual = (3 * draw(40, 768)).to(dtype), draw(40, 768, seed=1).to(dtype)
    weight, bias = draw(768, seed=2).to(dtype), draw(768, seed=3).to(dtype)
    output, _ = layer_norm_sign(x, residual, weight, bias, 1e-12, None)
    assert torch.equal(output, F.layer_norm(x + residual, (768,), weight, bias, 1e-12))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_layer_norm_with_float32_weights_is_rounded_once(dtype: torch.dtype) -> None:
    x, residual = (3 * draw(40, 768)).to(dtype), draw(40, 768, seed=1).to(dtype)
    weight, bias = draw(768, seed=2), draw(768, seed=3)
    output, _ = layer_norm_sign(x, residual, weight, bias, 1e-12, None)
    assert output.dtype == dtype
    assert torch.equal(output, F.layer_norm((x + residual).float(), (768,), weight, bias, 1e-12).to(dtype))


def test_sum_in_front_of_layer_norm_is_rounded_to_the_dtype_of_the_input() -> None:
    # 256 + 1 is 256 in bfloat16: both elements are the mean.
    x, residual = torch.tensor([[256.0, 256.0]]).bfloat16(), torch.tensor([[1.0, 0.0]]).bfloat16()
    output, _ = layer_norm_sign(x, residual, torch.ones(2), torch.tensor([0.5, -0.5]), 1e-5, None)
    assert output.tolist() == [[0.5, -0.5]]


def test_layer_norm_has_no_gradient_of_its_own() -> None:
    x, weight = draw(2, 8).requires_grad_(), draw(8, seed=1).requires_grad_()
    output, bits = layer_norm_sign(x, x, weight, weight, 1e-5, None)
    assert not bits.requires_grad
    assert not output.detach().requires_grad and "LayerNorm" not in type(output.grad_fn).__name__
