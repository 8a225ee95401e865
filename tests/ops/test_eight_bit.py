"""Products of +-1 in 8-bit types, run by PyTorch on the CPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from hf_stompp.ops import eight_bit, pack_bits, packed_bytes


CPU = torch.device("cpu")

SHAPES = [
    (1, 1, 1),
    (1, 256, 16),
    (3, 7, 5),
    (16, 255, 17),
    (17, 257, 33),
    (33, 1000, 770),
    (40, 4096, 64),
    (2, 5000, 3),
]


def draw(rows: int, in_features: int, out_features: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows + in_features)
    input, weight = (torch.randn(n, in_features, generator=generator) for n in (rows, out_features))
    return input, weight, torch.rand(out_features, generator=generator), torch.randn(out_features, generator=generator)


def by_hand(input: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    signs, weight_signs = (torch.where(t >= 0, 1.0, -1.0).double() for t in (input, weight))
    scaled = (signs @ weight_signs.T).float() * scale
    return (scaled if bias is None else scaled + bias).to(dtype)


@pytest.mark.parametrize("product", eight_bit.PRODUCTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_equals_the_product_of_integers(
    product: str, shape: tuple[int, int, int], with_bias: bool, dtype: torch.dtype
) -> None:
    input, weight, scale, bias = draw(*shape)
    given = bias if with_bias else None
    found = eight_bit.binary_linear(
        product, eight_bit.unpack, pack_bits(input), pack_bits(weight), shape[1], scale, given, dtype
    )
    assert found.dtype == dtype
    assert torch.equal(found, by_hand(input, weight, scale, given, dtype))


@pytest.mark.parametrize("product", eight_bit.PRODUCTS)
def test_takes_leading_dimensions_and_no_rows_at_all(product: str) -> None:
    input, weight, scale, _ = draw(6, 20, 4)
    layer = pack_bits(weight), 20, scale, None, torch.float32
    found = eight_bit.binary_linear(product, eight_bit.unpack, pack_bits(input).view(2, 3, -1), *layer)
    assert torch.equal(found, by_hand(input, weight, scale, None, torch.float32).view(2, 3, 4))
    empty = torch.empty(0, packed_bytes(20), dtype=torch.uint8)
    assert eight_bit.binary_linear(product, eight_bit.unpack, empty, *layer).shape == (0, 4)


@pytest.mark.parametrize("product", eight_bit.PRODUCTS)
@pytest.mark.parametrize("shape", [(1, 7, 1), (16, 300, 17), (33, 257, 770)], ids=str)
def test_products_get_no_sizes_that_a_gpu_refuses(
    product: str, shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    # The processor takes any. A GPU wants more than 16 rows, and the other two sizes in multiples of 16.
    dtype, multiply = eight_bit.PRODUCTS[product]
    sizes: list[tuple[int, int, int]] = []

    def recorded(signs: Tensor, weight_signs: Tensor) -> Tensor:
        sizes.append((signs.shape[0], signs.shape[1], weight_signs.shape[0]))
        assert signs.dtype == weight_signs.dtype == dtype and signs.is_contiguous() and weight_signs.is_contiguous()
        return multiply(signs, weight_signs)

    monkeypatch.setitem(eight_bit.PRODUCTS, product, (dtype, recorded))
    input, weight, scale, bias = draw(*shape)
    eight_bit.binary_linear(
        product, eight_bit.unpack, pack_bits(input), pack_bits(weight), shape[1], scale, bias, torch.float32
    )
    ((rows, in_features, columns),) = sizes
    assert rows > 16 and in_features % 16 == 0 and columns % 16 == 0


def test_sums_longer_than_those_that_were_tried_out_are_taken_in_integers(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(signs: Tensor, weight_signs: Tensor) -> Tensor:
        raise AssertionError("float8 was not tried with so many terms")

    monkeypatch.setitem(eight_bit.PRODUCTS, "float8", (torch.float8_e4m3fn, refuse))
    input, weight, scale, bias = draw(2, 4097, 3)
    layer = pack_bits(weight), 4097, scale, bias, torch.float32
    found = eight_bit.binary_linear("float8", eight_bit.unpack, pack_bits(input), *layer)
    assert torch.equal(found, by_hand(input, weight, scale, bias, torch.float32))


def test_signs_are_zero_beyond_the_features() -> None:
    signs = eight_bit.unpack(pack_bits(torch.tensor([[0.5, -0.5, 0.0]])), 3, torch.int8)
    assert signs.shape == (1, 256)
    assert signs[0, :4].tolist() == [1, -1, 1, 0] and not signs[0, 3:].any()


@pytest.mark.parametrize("product", eight_bit.PRODUCTS)
def test_both_products_are_exact_on_this_processor(product: str) -> None:
    assert eight_bit.why_not(product, CPU) is None


@pytest.fixture
def inexact_float8(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensor cores that keep twelve bits of a sum."""
    dtype, multiply = eight_bit.PRODUCTS["float8"]

    def truncated(signs: Tensor, weight_signs: Tensor) -> Tensor:
        return (multiply(signs, weight_signs) / 4).round() * 4

    monkeypatch.setitem(eight_bit.PRODUCTS, "float8", (dtype, truncated))


def times(**seconds: float) -> Callable[[str, torch.device], float]:
    return lambda product, device: seconds[product]


def test_the_faster_product_is_chosen() -> None:
    assert eight_bit.choose(CPU, times(int8=1.0, float8=2.0)) == "int8"
    assert eight_bit.choose(CPU, times(int8=2.0, float8=1.0)) == "float8"


def test_a_product_that_rounds_is_not_chosen_however_fast(inexact_float8: None) -> None:
    assert eight_bit.choose(CPU, times(int8=2.0, float8=1.0)) == "int8"
    assert eight_bit.why_not("float8", CPU) == "its sums are not exact there"


def test_a_product_that_does_not_run_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(signs: Tensor, weight_signs: Tensor) -> Tensor:
        raise RuntimeError("no such tensor cores")

    monkeypatch.setattr(
        eight_bit, "PRODUCTS", {name: (dtype, refuse) for name, (dtype, _) in eight_bit.PRODUCTS.items()}
    )
    assert eight_bit.choose(CPU, times(int8=1.0, float8=1.0)) is None
    assert eight_bit.why_not("int8", CPU) == "no such tensor cores"
