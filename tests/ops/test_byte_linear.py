"""Products of 1-bit weights with floats that are rounded to 8 bits, against NumPy."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from hf_stompp.ops import byte_linear, eight_bit, pack_bits, products, quantize_rows
from hf_stompp.ops.products import MAX_BYTE_FEATURES


DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROWS = [0, 1, 3, 7, 8, 17, 65, 130]
IN_FEATURES = [1, 7, 63, 64, 65, 255, 257, 384, 1000, 4200]
OUT_FEATURES = [1, 5, 16, 17, 33, 70]


def rounded(input: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Codes as float64 and the scale of each row, by NumPy."""
    values = input.float().numpy()
    largest = np.abs(values).max(-1, keepdims=True)
    with np.errstate(all="ignore"):
        inverse = np.float32(127) / largest
        codes = np.rint(values * inverse).astype(np.float64)
        scale = largest / np.float32(127)
    codes = np.where(np.isfinite(largest) & np.isfinite(inverse), codes, 0.0)
    scale = np.where(np.isfinite(inverse), scale, np.float32(0))
    return codes, np.where(np.isfinite(largest), scale, np.float32(np.nan))


def expected(input: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    codes, row_scale = rounded(input)
    sums = (codes @ np.where(weight.numpy() >= 0, 1.0, -1.0).T).astype(np.float32)
    output = sums * row_scale * scale.numpy()
    return torch.from_numpy(output if bias is None else output + bias.numpy()).to(dtype)


def draw(rows: int, in_features: int, out_features: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows + 7 * in_features + 31 * out_features)
    input = torch.randn(rows, in_features, generator=generator)
    # Quarters of a row whose largest magnitude is 127 / 4 lie between two codes.
    input[1::3] = (4 * input[1::3]).round().clamp(-127, 127) / 8
    input[1::3, 0] = 127 / 4
    weight = torch.randn(out_features, in_features, generator=generator)
    scale, bias = torch.rand(out_features, generator=generator), torch.randn(out_features, generator=generator)
    return input.to(dtype), weight, scale, bias


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("in_features", IN_FEATURES)
def test_every_kernel_gives_the_bits_of_the_definition(
    kernels: SimpleNamespace, rows: int, in_features: int, restore_threads: None
) -> None:
    for number, out_features in enumerate(OUT_FEATURES):
        dtype, output_dtype = DTYPES[number % 3], DTYPES[(number + rows) % 3]
        torch.set_num_threads(1 + number % 2)
        input, weight, scale, bias = draw(rows, in_features, out_features, dtype)
        given = bias if number % 2 else None
        found = kernels.byte_linear(input, pack_bits(weight), in_features, scale, given, output_dtype)
        assert found.dtype == output_dtype
        assert torch.equal(found, expected(input, weight, scale, given, output_dtype)), out_features


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_without_a_scale_gives_the_bias_and_one_with_nan_or_infinity_gives_nan(
    kernels: SimpleNamespace, dtype: torch.dtype
) -> None:
    input, weight, scale, bias = draw(20, 100, 40, dtype)
    input[2], input[3], input[4] = 0.0, -0.0, 1e-38
    input[5, 3], input[6, 99], input[19, 0] = math.nan, math.inf, -math.inf
    found = kernels.byte_linear(input, pack_bits(weight), 100, scale, bias, torch.float32)

    assert torch.equal(found[2:4], bias.expand(2, -1)) and torch.equal(found[4], bias)
    assert bool(found[[5, 6, 19]].isnan().all())
    whole = [row for row in range(20) if row not in (5, 6, 19)]
    assert torch.equal(found[whole], expected(input[whole], weight, scale, bias, torch.float32))


def test_sums_that_no_float32_holds_are_exact(kernels: SimpleNamespace) -> None:
    in_features = 150_001
    input, weight, scale, bias = draw(2, in_features, 3, torch.float32)
    input[0], weight[0] = 1.0, 1.0
    input[0, 0] = -1.0
    found = kernels.byte_linear(input, pack_bits(weight), in_features, scale, bias, torch.float32)
    assert torch.equal(found, expected(input, weight, scale, bias, torch.float32))


def test_arguments_need_not_be_contiguous_and_leading_dimensions_are_kept(
    kernels: SimpleNamespace,
) -> None:
    input, weight, scale, bias = draw(24, 70, 9, torch.float32)
    strided = input.T.contiguous().T.view(2, 3, 4, 70)
    found = kernels.byte_linear(strided, pack_bits(weight), 70, scale.repeat(2)[:9], bias, torch.float32)
    assert torch.equal(found, expected(input, weight, scale, bias, torch.float32).view(2, 3, 4, 9))


def test_halves_are_rounded_to_even_codes() -> None:
    row = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, 3.49]])
    codes, scale = quantize_rows(row)
    assert codes.dtype == torch.int8 and codes.tolist() == [[127, 0, 2, 2, 0, -2, 3]] and scale.tolist() == [[1.0]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_value_moves_by_more_than_half_a_step(dtype: torch.dtype) -> None:
    values = torch.randn(50, 300).to(dtype)
    codes, scale = quantize_rows(values)
    error = (codes.double() * scale.double() - values.double()).abs()
    assert bool((error <= 0.5001 * values.double().abs().amax(-1, keepdim=True) / 127).all())


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 7, 5), (17, 257, 33), (40, 4200, 64)], ids=str)
def test_int8_products_of_pytorch_give_the_same_bits(shape: tuple[int, int, int]) -> None:
    in_features = shape[1]
    for dtype, output_dtype in itertools.product(DTYPES, DTYPES):
        input, weight, scale, bias = draw(*shape, dtype)
        layer = pack_bits(weight), in_features, scale, bias, output_dtype
        found = eight_bit.byte_linear(eight_bit.unpack, input, *layer)
        assert torch.equal(found, products.byte_linear(input, *layer))


@pytest.mark.parametrize("rows", [0, 1, 20])
def test_operator_passes_the_checks_of_pytorch(rows: int) -> None:
    input, weight, scale, bias = draw(rows, 70, 9, torch.float32)
    torch.library.opcheck(byte_linear, (input, pack_bits(weight), 70, scale, bias, torch.bfloat16))


def test_more_features_than_int32_holds_sums_of_are_refused() -> None:
    wide = MAX_BYTE_FEATURES + 1
    input = torch.empty(1, wide, device="meta")
    weight = torch.empty(1, 32 * math.ceil(wide / 256), dtype=torch.uint8, device="meta")
    with pytest.raises(ValueError, match=f"in_features must be at most {MAX_BYTE_FEATURES}, or sums may exceed int32"):
        byte_linear(input, weight, wide, torch.empty(1, device="meta"), None, torch.float32)


def test_inputs_that_are_no_floats_are_refused() -> None:
    bits = torch.zeros(1, 32, dtype=torch.uint8)
    with pytest.raises(TypeError, match=r"byte_linear: input must be float32, bfloat16 or float16, got torch\.uint8"):
        byte_linear(bits, bits, 1, torch.ones(1), None, torch.float32)
