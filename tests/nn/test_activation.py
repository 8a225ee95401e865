from __future__ import annotations

import copy
import math
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from masks import advance
from torch import Tensor, nn

from hf_stompp.nn import MaskedBinaryActivation, MaskedBinaryLinear
from hf_stompp.nn.activation import PRE_ACTIVATION_RANGE
from hf_stompp.nn.mask import mask_generator
from hf_stompp.nn.module import as_bits
from hf_stompp.ops import unpack_signs


GRID_STEP = 2 * PRE_ACTIVATION_RANGE / 8192
"""Resolution of the threshold where an activation function is inverted."""


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def gelu(x: float) -> float:
    return 0.5 * x * math.erfc(-x / math.sqrt(2))


def inverse_gelu(value: float) -> float:
    low, high = -0.7517915, PRE_ACTIVATION_RANGE  # from the minimum of GELU
    for _ in range(60):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if gelu(middle) < value else (low, middle)
    return high


def initialized(features: int = 6, activation: nn.Module | None = None, **settings: object) -> MaskedBinaryActivation:
    module = MaskedBinaryActivation(features, activation, **settings)
    module.initialize(draw(32, features, seed=9))
    return module


# the first batch


@pytest.mark.parametrize("with_gelu", [False, True], ids=["identity", "gelu"])
def test_first_batch_sets_shift_to_the_mean_and_scale_to_the_mean_distance(with_gelu: bool) -> None:
    # The second feature has a mean below zero, which GELU reaches on either side of its minimum.
    batch = draw(2, 8, 4) + torch.tensor([2.0, -1.5, 0.0, 0.5])
    module = MaskedBinaryActivation(4, nn.GELU() if with_gelu else None)
    module(batch)
    rows = batch.double().reshape(-1, 4).tolist()
    columns = [[gelu(x) if with_gelu else x for x in column] for column in zip(*rows, strict=True)]
    means = [math.fsum(column) / 16 for column in columns]
    distances = [abs(x - mean) for column, mean in zip(columns, means, strict=True) for x in column]
    assert module.initialized
    assert module.scale.dtype == module.shift.dtype == module.threshold.dtype == torch.float32
    assert module.shift.tolist() == pytest.approx(means, rel=1e-5, abs=1e-6)
    assert module.scale.item() == pytest.approx(math.fsum(distances) / 64, rel=1e-6)
    if with_gelu:
        assert module.threshold.tolist() == pytest.approx([inverse_gelu(mean) for mean in means], abs=GRID_STEP)
    else:
        assert torch.equal(module.threshold, module.shift)


def test_first_batch_of_zero_one_levels_sets_scale_to_the_mean_of_the_positives() -> None:
    batch = draw(16, 3)
    module = MaskedBinaryActivation(3, nn.ReLU(), levels="zero_one")
    module(batch)
    positives = [x for x in batch.flatten().tolist() if x > 0]
    scale = math.fsum(positives) / len(positives)
    assert module.scale.item() == pytest.approx(scale, rel=1e-6)
    assert module.threshold.tolist() == pytest.approx([scale / 2] * 3, abs=GRID_STEP)
    assert torch.count_nonzero(module.shift) == 0


@pytest.mark.parametrize("levels", ["signed", "zero_one"])
def test_the_initial_scale_is_a_multiple_of_what_the_first_batch_says(levels: str) -> None:
    batch = draw(16, 3)
    modules = [MaskedBinaryActivation(3, nn.ReLU(), levels=levels, initial_scale=scale) for scale in (1.0, 2.0)]
    for module in modules:
        module(batch)
    assert modules[1].scale.item() == 2.0 * modules[0].scale.item()
    assert torch.equal(modules[1].shift, modules[0].shift)
    assert torch.equal(modules[1].threshold, modules[0].threshold)


def test_threshold_behind_relu_is_where_it_reaches_the_mean() -> None:
    module = MaskedBinaryActivation(3, nn.ReLU())
    module(torch.tensor([[1.0, -1.0, -5.0], [3.0, 2.0, -1.0]]))
    assert module.shift.tolist() == [2.0, 1.0, 0.0]
    assert module.threshold.tolist() == pytest.approx([2.0, 1.0, 0.0], abs=GRID_STEP)


@pytest.mark.parametrize("levels", ["signed", "zero_one"])
def test_initialization_over_two_ranks_equals_that_of_the_whole_batch(levels: str) -> None:
    batch, barrier, parts = draw(10, 4) + 0.5, threading.Barrier(2, timeout=20), [torch.empty(0)] * 2
    whole = MaskedBinaryActivation(4, nn.GELU(), levels)
    whole.initialize(batch)

    def initialize(rank: int) -> MaskedBinaryActivation:
        def reduce(statistic: Tensor) -> Tensor:
            parts[rank] = statistic
            barrier.wait()
            total = parts[0] + parts[1]
            barrier.wait()
            return total

        module = MaskedBinaryActivation(4, nn.GELU(), levels)
        module.initialize(batch[:3] if rank == 0 else batch[3:], reduce)
        return module

    with ThreadPoolExecutor(2) as pool:
        ranks = list(pool.map(initialize, range(2)))
    for name, tensor in whole.state_dict().items():
        assert torch.equal(ranks[0].state_dict()[name], ranks[1].state_dict()[name])
        torch.testing.assert_close(ranks[0].state_dict()[name], tensor, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("value", [0.0, 3.0, -2.0])
@pytest.mark.parametrize("levels", ["signed", "zero_one"])
def test_a_constant_input_gives_a_positive_scale_and_finite_levels(levels: str, value: float) -> None:
    module = MaskedBinaryActivation(3, levels=levels)
    out = module(torch.full((4, 3), value))
    assert module.scale.item() > 0
    assert torch.isfinite(out).all() and all(torch.isfinite(t).all() for t in module.two_levels())


def test_an_empty_first_batch_leaves_no_nan() -> None:
    module = MaskedBinaryActivation(3)
    assert module(torch.zeros(0, 3)).shape == (0, 3)
    assert torch.isfinite(module(draw(8, 3))).all()


def test_only_the_first_batch_initializes() -> None:
    module = MaskedBinaryActivation(4)
    module(draw(8, 4))
    before = copy.deepcopy(module.state_dict())
    module(100 * draw(8, 4, seed=1))
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


# what is learned


@pytest.mark.parametrize(
    ("settings", "learned"),
    [
        ({}, {"scale", "shift", "threshold"}),
        ({"scale": "fixed"}, {"shift", "threshold"}),
        ({"shift": "fixed"}, {"scale"}),
        ({"shift": "none"}, {"scale"}),
        ({"scale": "fixed", "shift": "fixed"}, set()),
        ({"levels": "zero_one"}, {"scale", "threshold"}),
        ({"levels": "zero_one", "shift": "none"}, {"scale"}),
    ],
    ids=lambda value: "-".join(f"{k}={v}" for k, v in value.items()) or "defaults" if isinstance(value, dict) else "",
)
def test_what_is_learned_is_a_parameter_and_the_rest_a_buffer(settings: dict[str, str], learned: set[str]) -> None:
    module = initialized(**settings)
    assert {name for name, _ in module.named_parameters()} == learned
    assert {name for name, _ in module.named_buffers()} == {"scale", "shift", "threshold", "freeze_mask"} - learned
    assert set(module.state_dict()) == {"scale", "shift", "threshold", "freeze_mask"}
    advance(module, 0.0, 0.5, 10, mask_generator(0, "unit", "mask", 0))
    module(draw(32, 6).requires_grad_()).square().sum().backward()
    assert all(torch.count_nonzero(parameter.grad) for parameter in module.parameters())


def test_a_fixed_shift_is_set_from_the_first_batch_and_none_stays_zero() -> None:
    assert torch.equal(initialized(shift="fixed").shift, initialized(shift="learned").shift)
    none = initialized(activation=nn.GELU(), shift="none")
    assert torch.count_nonzero(none.shift) == torch.count_nonzero(none.threshold) == 0


# masks and levels


def test_the_mask_has_one_entry_a_feature_whatever_the_batch() -> None:
    module = initialized(3, nn.GELU(), clip=10.0)
    module.restore(torch.tensor([True, False, True]))
    out = module(draw(5, 7, 3)).detach()
    middle, half = (t.detach() for t in module.two_levels())
    assert module.freeze_mask.shape == (3,) and not module.committed
    for feature in (0, 2):
        assert set(out[..., feature].flatten().tolist()) == {
            (middle - half)[feature].item(),
            (middle + half)[feature].item(),
        }
    assert len(set(out[..., 1].flatten().tolist())) == 35


def signs_of(module: MaskedBinaryActivation, pre: Tensor) -> Tensor:
    return unpack_signs(module.shared_bits(pre, module), module.features)


@pytest.mark.parametrize("levels", ["signed", "zero_one"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_signs_are_decided_by_the_threshold(levels: str, dtype: torch.dtype) -> None:
    module = initialized(6, nn.GELU(), levels=levels)
    with torch.no_grad():
        module.threshold.copy_(4 * draw(6, seed=1))  # as training may, beyond the levels
    pre = (3 * draw(50, 6)).to(dtype)
    pre[0] = -7.0
    signs = signs_of(module, pre)
    assert set(signs.flatten().tolist()) == {-1.0, 1.0}
    assert torch.equal(signs, torch.where(pre.float() >= module.threshold, 1.0, -1.0))


@pytest.mark.parametrize("missing", ["nothing", "reader", "activation", "eval", "no_grad"])
def test_signs_replace_levels_only_where_everything_behind_them_is_committed(missing: str) -> None:
    module = initialized(6, nn.GELU())
    readers = [MaskedBinaryLinear(6, 4), MaskedBinaryLinear(6, 4)]
    for reader in readers:
        nn.init.normal_(reader.weight), nn.init.zeros_(reader.bias)
        reader.set_input_activation(module, owned=False, upstream=True)
        reader.commit()
    module.commit()
    if missing == "reader":
        readers[1].reset()
    elif missing == "activation":
        module.reset()
    module.train(missing == "eval")
    pre = draw(20, 6)
    with torch.set_grad_enabled(missing == "no_grad"):
        out = module(pre)
    assert out.is_floating_point() == (missing != "nothing")
    if missing == "nothing":
        assert torch.equal(as_bits(out)[0], module.shared_bits(pre, readers[0])) and as_bits(out)[1] == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_levels_that_a_dtype_cannot_tell_apart_still_give_the_packed_product(dtype: torch.dtype) -> None:
    # A shift far above the scale: 30 - 0.05 and 30 + 0.05 are one number in bfloat16.
    module = MaskedBinaryActivation(3, nn.GELU())
    module(torch.tensor([[29.95, -0.05, 7.95], [30.05, 0.05, 8.05]]))
    linear = MaskedBinaryLinear(3, 2, dtype=dtype)
    nn.init.normal_(linear.weight), nn.init.zeros_(linear.bias)
    linear.set_input_activation(module, owned=False, upstream=True)
    for masked in (module, linear):
        masked.commit()
        masked.eval()
    pre = torch.tensor([[20.0, -1.0, 7.0], [40.0, 1.0, 9.0]], dtype=dtype)
    scale, bias = linear.folded()
    weight_signs = torch.where(linear.weight >= 0, 1.0, -1.0)
    expected = (signs_of(module, pre) @ weight_signs.T) * scale + bias
    with torch.no_grad():
        assert torch.equal(linear(module(pre)), expected.to(dtype))


def test_a_negative_learned_scale_keeps_the_upper_level_above() -> None:
    module = initialized(3)
    module.commit()
    expected = module(draw(8, 3))
    with torch.no_grad():
        module.scale.neg_()
    assert torch.equal(module(draw(8, 3)), expected)


# in the company of torch


@pytest.mark.parametrize("levels", ["signed", "zero_one"])
@pytest.mark.parametrize("with_gelu", [False, True], ids=["identity", "gelu"])
def test_compiles_as_one_graph_and_is_not_recompiled_when_the_mask_grows(with_gelu: bool, levels: str) -> None:
    torch.compiler.reset()
    module, batch = initialized(8, nn.GELU() if with_gelu else None, levels=levels), draw(4, 8)
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    assert torch.equal(compiled(batch), module(batch))
    with torch.compiler.set_stance("fail_on_recompile"):
        for step, (previous, fraction) in enumerate([(0.0, 0.5), (0.5, 0.8), (0.8, 1.0)]):
            advance(module, previous, fraction, 10, mask_generator(0, "unit", "mask", step))
            assert torch.equal(compiled(batch), module(batch))
    assert module.committed
    torch.compiler.reset()


def test_a_state_dict_restores_values_and_flags() -> None:
    saved, fresh = initialized(4), MaskedBinaryActivation(4)
    saved.commit()
    assert (fresh.initialized, fresh.committed) == (False, False)
    untouched = copy.deepcopy(fresh.state_dict())
    fresh.load_state_dict(saved.state_dict())
    assert (fresh.initialized, fresh.committed) == (True, True)
    assert torch.equal(fresh(draw(3, 4)), saved(draw(3, 4)))
    fresh.load_state_dict(untouched)
    assert (fresh.initialized, fresh.committed) == (False, False)


def test_a_deep_copy_is_equal_and_independent() -> None:
    module = initialized(4, nn.GELU())
    clone = copy.deepcopy(module)
    batch = draw(5, 4)
    assert clone.initialized and torch.equal(clone(batch), module(batch))
    clone.commit()
    assert not module.committed and not module.freeze_mask.any()
    assert not torch.equal(clone(batch), module(batch))


def test_flags_follow_every_way_to_write_the_mask() -> None:
    module = initialized(4)
    advance(module, 0.0, 1.0, 10, mask_generator(0, "unit", "mask", 0))
    assert module.committed
    advance(module, 0.0, 0.5, 10, mask_generator(0, "unit", "mask", 0))
    assert not module.committed and not module.freeze_mask.all()
    module.reset()
    assert not module.committed and not module.freeze_mask.any()
    module.restore(torch.ones(4, dtype=torch.bool))
    assert module.committed
    module.restore(torch.tensor([True, True, True, False]))
    assert not module.committed
