"""The operators on a GPU, against the reference on the CPU. Run by `make gpu-check`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hf_stompp.ops import cuda, reference


pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")]

SHAPES = [(0, 5), (1, 1), (3, 7), (9, 65), (17, 770), (2, 3, 100), (2048, 768)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape).to(dtype)


def on_gpu(*arguments: Any) -> list[Any]:
    return [argument.cuda() if isinstance(argument, Tensor) else argument for argument in arguments]


def test_triton_runs_on_this_gpu() -> None:
    assert cuda.kernels() is not reference


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("surrogate", reference.SURROGATES)
def test_weight_and_its_gradient_equal_the_reference(shape: Any, dtype: torch.dtype, surrogate: str) -> None:
    weight, grad, mask = draw(*shape, dtype=dtype), draw(*shape, dtype=dtype), torch.rand(shape) < 0.5
    scale = weight.float().abs().mean(-1, keepdim=True)

    value = torch.ops.hf_stompp.masked_weight(*on_gpu(weight, mask, scale, 1.3, dtype))
    assert torch.equal(value.cpu(), reference.masked_weight(weight, mask, scale, 1.3, dtype))
    passed = torch.ops.hf_stompp.masked_weight_grad(*on_gpu(grad, weight, mask, scale, 1.3, surrogate))
    assert torch.equal(passed.cpu(), reference.masked_weight_grad(grad, weight, mask, scale, 1.3, surrogate))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("surrogate", reference.SURROGATES)
def test_activation_and_its_gradient_equal_the_reference(shape: Any, dtype: torch.dtype, surrogate: str) -> None:
    value, pre, grad = (draw(*shape, dtype=dtype) for _ in range(3))
    mask, (threshold, offset, center) = torch.rand(shape[-1]) < 0.5, (0.1 * draw(shape[-1]) for _ in range(3))
    amplitude, bound = torch.tensor(0.7), torch.tensor(1.1)
    arguments = value, pre, mask, threshold, offset, amplitude, center, bound, surrogate

    expected = reference.masked_activation(*arguments)
    found = torch.ops.hf_stompp.masked_activation(*on_gpu(*arguments))
    assert all(torch.equal(a.cpu(), b) for a, b in zip(found, expected, strict=True))

    passed, sums = torch.ops.hf_stompp.masked_activation_grad(*on_gpu(grad, *expected[1:], mask))
    expected_passed, expected_sums = reference.masked_activation_grad(grad, *expected[1:], mask)
    assert torch.equal(passed.cpu(), expected_passed)
    torch.testing.assert_close(sums.cpu(), expected_sums, rtol=1e-10, atol=1e-10)
