"""
Tests of the Triton kernels, interpreted on the CPU. Run by test_triton.py in a process of its own: Triton decides on
import whether it interprets.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hf_stompp.ops import SURROGATES, triton
from hf_stompp.ops.operators import on_kernels


reference, kernels = on_kernels("cpu", None), on_kernels("triton", triton)

SHAPES = [(0, 5), (1, 1), (3, 7), (5, 64), (9, 65), (17, 770), (2, 3, 100), (70, 33)]
DTYPES = [torch.float32, torch.float16]


def draw_mask(*shape: int) -> Tensor:
    return torch.rand(shape) < 0.5


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weight_and_its_gradients_equal_the_reference(shape: Any, dtype: Any) -> None:
    weight, grad, mask = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype), draw_mask(*shape)
    scale = weight.float().abs().mean(-1, keepdim=True)

    for output in DTYPES:
        arguments = weight, mask, scale, 1.3, output
        assert torch.equal(kernels.masked_weight(*arguments), reference.masked_weight(*arguments))
    for surrogate in SURROGATES:
        arguments = grad, weight, mask, scale, 1.3, surrogate, 0.9
        found, expected = (where.masked_weight_grad(*arguments) for where in (kernels, reference))
        assert torch.equal(found, expected), surrogate


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("surrogate", SURROGATES)
def test_activation_and_its_gradient_equal_the_reference(shape: Any, dtype: Any, surrogate: str) -> None:
    features = shape[-1]
    value, pre, grad = (torch.randn(shape).to(dtype) for _ in range(3))
    mask, vectors = draw_mask(features), [0.1 * torch.randn(features) for _ in range(3)]
    amplitude, bound, window = torch.tensor(0.7), torch.tensor(1.1), torch.tensor(0.9)
    arguments = value, pre, mask, vectors[0], vectors[1], amplitude, vectors[2], bound, surrogate, window

    expected = reference.masked_activation(*arguments)
    assert all(torch.equal(a, b) for a, b in zip(kernels.masked_activation(*arguments), expected, strict=True))

    found = kernels.masked_activation_grad(grad, expected[1], expected[2], mask)
    passed, sums = reference.masked_activation_grad(grad, expected[1], expected[2], mask)
    assert torch.equal(found[0], passed)
    torch.testing.assert_close(found[1], sums, rtol=1e-12, atol=1e-12)


def test_bfloat16_differs_by_no_more_than_the_rounding_of_the_interpreter() -> None:
    # Triton's interpreter cuts a float32 off where a GPU rounds to the nearest.
    weight, mask = torch.randn(9, 65).bfloat16(), draw_mask(9, 65)
    arguments = weight, mask, weight.float().abs().mean(-1, keepdim=True), 1.3, torch.bfloat16

    torch.testing.assert_close(
        kernels.masked_weight(*arguments), reference.masked_weight(*arguments), rtol=2**-7, atol=0
    )


def test_dtypes_and_surrogates_that_the_kernels_do_not_know_run_in_plain_pytorch() -> None:
    weight, mask = torch.randn(3, 5, dtype=torch.float64), draw_mask(3, 5)
    arguments = weight, mask, torch.ones(3, 1), 1.3, torch.float64
    assert torch.equal(kernels.masked_weight(*arguments), reference.masked_weight(*arguments))
