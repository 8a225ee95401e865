"""The operator that folds the levels of an input into scale and bias: gradients, shapes, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hf_stompp.ops import fold, pack_bits


IN, OUT = 37, 9


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def levels(one_offset: bool, bias: torch.dtype | None) -> list[Any]:
    """Weight bits, row scale, offset, amplitude, bias, in_features."""
    offset = torch.tensor(0.3) if one_offset else draw(IN, seed=1)
    given = None if bias is None else draw(OUT, seed=2).to(bias)
    return [pack_bits(draw(OUT, IN)), draw(OUT, 1, seed=3).abs(), offset, torch.tensor(0.7), given, IN]


@pytest.mark.parametrize("compiles", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("one_offset", [False, True])
@pytest.mark.parametrize("bias", [None, torch.float32, torch.bfloat16], ids=str)
def test_gradients_are_those_of_the_definition(one_offset: bool, bias: torch.dtype | None, compiles: bool) -> None:
    arguments = levels(one_offset, bias)
    learned = [tensor.requires_grad_() for tensor in arguments[2:5] if tensor is not None]
    grads = draw(OUT, seed=4), draw(OUT, seed=5)

    torch.compiler.reset()
    function = torch.compile(fold, fullgraph=True, backend="aot_eager") if compiles else fold
    found = torch.autograd.grad(function(*arguments), learned, grads)

    signs = torch.where(draw(OUT, IN) >= 0, 1.0, -1.0).double()
    wide = [tensor.detach().double().requires_grad_() for tensor in learned]
    offset, amplitude, row_scale = wide[0], wide[1], arguments[1].double().flatten()
    constant = row_scale * (signs @ offset.expand(IN)) + (wide[2] if bias is not None else 0.0)
    expected = torch.autograd.grad((row_scale * amplitude, constant), wide, [grad.double() for grad in grads])
    for tensor, a, b in zip(learned, found, expected, strict=True):
        assert a.dtype == tensor.dtype and a.shape == tensor.shape
        torch.testing.assert_close(a, b.to(tensor.dtype))


def test_a_gradient_of_one_output_is_enough() -> None:
    arguments = levels(False, torch.float32)
    amplitude = arguments[3].requires_grad_()
    (grad,) = torch.autograd.grad(fold(*arguments)[0].sum(), amplitude)
    torch.testing.assert_close(grad, arguments[1].sum())


def test_what_needs_no_gradient_gets_none() -> None:
    arguments = levels(False, torch.float32)
    arguments[4].requires_grad_()
    scale, constant = fold(*arguments)
    (scale.sum() + constant.sum()).backward()
    assert torch.equal(arguments[4].grad, torch.ones(OUT)) and arguments[2].grad is arguments[3].grad is None


@pytest.mark.parametrize("one_offset", [False, True])
@pytest.mark.parametrize("learns", [False, True])
def test_operator_passes_opcheck(one_offset: bool, learns: bool) -> None:
    arguments = levels(one_offset, torch.float32)
    for tensor in arguments[2:5]:
        tensor.requires_grad_(learns)
    assert set(torch.library.opcheck(fold, tuple(arguments)).values()) == {"SUCCESS"}


def test_shapes_are_known_without_values() -> None:
    arguments = [a.to("meta") if isinstance(a, Tensor) else a for a in levels(False, torch.float32)]
    assert [(t.shape, t.dtype, t.device.type) for t in fold(*arguments)] == [((OUT,), torch.float32, "meta")] * 2


@pytest.mark.parametrize(
    ("index", "value", "error", "message"),
    [
        (0, torch.zeros(OUT, 32), TypeError, "packed_weight must be uint8"),
        (0, torch.zeros(OUT, 31, dtype=torch.uint8), ValueError, r"\(out_features, 32\) for in_features=37"),
        (1, torch.ones(OUT), ValueError, r"row_scale must have shape \(9, 1\), got \(9,\)"),
        (1, torch.ones(OUT, 1, dtype=torch.int64), TypeError, "row_scale must be floating"),
        (2, torch.ones(IN + 1), ValueError, r"offset must have shape \(\) or \(37,\), got \(38,\)"),
        (3, torch.ones(1), ValueError, r"amplitude must have shape \(\), got \(1,\)"),
        (4, torch.ones(OUT + 1), ValueError, r"bias must have shape \(9,\), got \(10,\)"),
        (4, torch.ones(OUT, device="meta"), ValueError, "bias is on meta, the input on cpu"),
        (5, 0, ValueError, "in_features=0"),
    ],
)
def test_arguments_that_do_not_fit_are_refused_by_name(
    index: int, value: Any, error: type[Exception], message: str
) -> None:
    arguments = levels(False, torch.float32)
    arguments[index] = value
    with pytest.raises(error, match=message):
        fold(*arguments)
