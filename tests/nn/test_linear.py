from __future__ import annotations

import copy
import math

import pytest
import torch
from masks import advance
from torch import Tensor, nn
from torch.nn import functional as F

from hf_stompp.nn import (
    MaskedBinaryActivation,
    MaskedBinaryEmbedding,
    MaskedBinaryLinear,
    PackedBinaryActivation,
    PackedBinaryEmbedding,
    PackedBinaryLinear,
)
from hf_stompp.nn.mask import mask_generator
from hf_stompp.nn.plain import plain_module
from hf_stompp.ops import pack_bits


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def make_linear(in_features: int = 13, out_features: int = 5, binary_input: bool = True, **settings: object):
    """A layer with random weights; with a binary input, its activation is initialised."""
    layer = MaskedBinaryLinear(in_features, out_features, **settings)
    with torch.no_grad():
        layer.weight.copy_(0.05 * draw(out_features, in_features))
        if layer.bias is not None:
            layer.bias.copy_(draw(out_features, seed=1))
    if binary_input:
        activation = MaskedBinaryActivation(in_features, surrogate=layer.surrogate)
        activation.initialize(draw(64, in_features, seed=2) + draw(in_features, seed=3))
        layer.set_input_activation(activation, owned=True)
    return layer


def commit(layer: MaskedBinaryLinear) -> MaskedBinaryLinear:
    layer.commit()
    if layer.input_activation is not None:
        layer.input_activation.commit()
    return layer


def pack_by_hand(layer: MaskedBinaryLinear, upstream: bool = False) -> PackedBinaryLinear:
    binary_input = layer.input_activation is not None
    packed = PackedBinaryLinear(layer.in_features, layer.out_features, layer.bias is not None, binary_input)
    packed.packed_weight.copy_(pack_bits(layer.centered_weight()))
    scale, bias = layer.folded() if binary_input else (layer.row_scale().flatten(), layer.bias)
    packed.scale.copy_(scale)
    if packed.bias is not None:
        packed.bias.copy_(bias)
    if binary_input:
        activation = PackedBinaryActivation(layer.in_features)
        activation.threshold.copy_(layer.input_activation.threshold)
        packed.set_input_activation(activation, owned=not upstream, upstream=upstream)
    return packed.eval()


# values


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_an_empty_mask_gives_the_linear_layer_with_clipped_weights(bias: bool) -> None:
    layer, x = make_linear(binary_input=False, bias=bias, clip=1.5), draw(4, 13)
    bound = 1.5 * layer.weight.abs().mean(dim=1, keepdim=True)
    assert (layer.weight.abs() > bound).any()
    expected = F.linear(x, layer.weight.clamp(-bound, bound), layer.bias)
    torch.testing.assert_close(layer(x), expected)


def test_an_empty_mask_clips_the_input_about_its_shift() -> None:
    layer, x = make_linear(clip=100.0), 20 * draw(4, 13)
    activation = layer.input_activation
    bound = activation.clip * activation.scale
    clipped = activation.shift + (x - activation.shift).clamp(-bound, bound)
    assert not torch.equal(clipped, x)
    torch.testing.assert_close(layer(x), F.linear(clipped, layer.weight, layer.bias))


def test_by_default_what_lies_beyond_one_scale_does_not_move_when_it_freezes() -> None:
    layer = make_linear(binary_input=False, bias=False)
    activation = MaskedBinaryActivation(13)
    inputs = draw(64, 13, seed=2)
    activation.initialize(inputs)
    scale = layer.weight.abs().mean(dim=1, keepdim=True)
    for module, argument, is_beyond in (
        (layer, torch.eye(13), (layer.weight.abs() > scale).T),
        (activation, inputs, (inputs - activation.shift).abs() > activation.scale),
    ):
        free = module(argument)
        module.commit()
        frozen = module(argument)
        assert 0.2 < is_beyond.float().mean() < 0.6
        torch.testing.assert_close(free[is_beyond], frozen[is_beyond])
        assert not torch.isclose(free[~is_beyond], frozen[~is_beyond]).any()


@pytest.mark.parametrize("binary_input", [True, False], ids=["bnn", "bwn"])
@pytest.mark.parametrize("scale", ["row", "tensor", "none"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("center", ["none", "row", "tensor"])
def test_a_full_mask_gives_the_product_of_the_levels(binary_input: bool, scale: str, bias: bool, center: str) -> None:
    layer, x = commit(make_linear(11, 3, binary_input, bias=bias, scale=scale, center=center)), draw(2, 11)
    w = layer.weight.tolist()
    row_means = [math.fsum(row) / 11 for row in w]
    middle = {"none": [0.0] * 3, "row": row_means, "tensor": [sum(row_means) / 3] * 3}[center]
    w = [[value - mean for value in row] for row, mean in zip(w, middle, strict=True)]
    means = [math.fsum(abs(v) for v in row) / 11 for row in w]
    scales = {"row": means, "tensor": [sum(means) / 3] * 3, "none": [1.0] * 3}[scale]
    values = x.tolist()
    if binary_input:
        a, shift = layer.input_activation.scale.item(), layer.input_activation.shift.tolist()
        threshold = layer.input_activation.threshold.tolist()
        values = [[c + (a if v >= t else -a) for v, c, t in zip(row, shift, threshold, strict=True)] for row in values]
    expected = [
        [
            (layer.bias[o].item() if bias else 0.0)
            + math.fsum(math.copysign(scales[o], w[o][k]) * row[k] for k in range(11))
            for o in range(3)
        ]
        for row in values
    ]
    out = {"training": layer(x), "evaluation with gradients": layer.eval()(x)}
    with torch.no_grad():
        out["evaluation"] = layer(x)
    for name, tensor in out.items():
        torch.testing.assert_close(
            tensor.detach(),
            torch.tensor(expected),
            rtol=1e-5,
            atol=1e-5,
            msg=lambda text, name=name: f"{name}: {text}",
        )


# gradients


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
def test_frozen_weights_pass_no_gradient_without_ste(autocast: bool) -> None:
    layer, x = make_linear(surrogate="none"), draw(8, 13).requires_grad_()
    advance(layer, 0.0, 0.5, 10, mask_generator(0, "unit", "linear", 0))
    advance(layer.input_activation, 0.0, 0.5, 10, mask_generator(0, "unit", "activation", 0))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        layer(x).float().square().sum().backward()
    features = layer.input_activation.freeze_mask
    assert features.any() and not features.all()
    assert torch.count_nonzero(layer.weight.grad[layer.freeze_mask]) == 0
    assert torch.count_nonzero(x.grad[:, features]) == 0
    assert torch.count_nonzero(layer.weight.grad[~layer.freeze_mask]) > 0
    assert torch.count_nonzero(x.grad[:, ~features]) > 0


def test_the_slope_of_a_surrogate_reaches_the_weight() -> None:
    layer, x, upstream = make_linear(surrogate="polynomial", binary_input=False), draw(8, 13), draw(8, 5, seed=4)
    advance(layer, 0.0, 0.5, 10, mask_generator(0, "unit", "linear", 0))
    layer(x).backward(upstream)

    weight = layer.weight.detach().double()
    reach = layer.clip * weight.abs().mean(dim=1, keepdim=True)
    slope = torch.where(layer.freeze_mask, 2 - 2 * weight.abs() / reach, 1.0) * (weight.abs() <= reach)
    expected = slope * (upstream.double().T @ x.double())
    assert 0 < layer.freeze_mask.sum() < weight.numel()
    torch.testing.assert_close(layer.weight.grad.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("surrogate", ["clipped_ste", "polynomial"])
def test_gradients_of_a_compiled_layer_are_those_of_the_layer(surrogate: str) -> None:
    torch.compiler.reset()
    layer, x = make_linear(surrogate=surrogate), draw(8, 13)
    for module in (layer, layer.input_activation):
        advance(module, 0.0, 0.5, 10, mask_generator(0, "unit", "linear", 0))
    found = []
    for run in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        layer.zero_grad()
        run(x).sum().backward()
        found.append([parameter.grad.clone() for parameter in layer.parameters()])
    for eager, compiled in zip(*found, strict=True):
        torch.testing.assert_close(compiled, eager)


def test_autocast_computes_in_bfloat16_and_keeps_float32_gradients() -> None:
    layer, x = make_linear(64, 5), draw(8, 64)
    advance(layer, 0.0, 0.5, 10, mask_generator(0, "unit", "linear", 0))
    expected = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer(x)
    out.float().sum().backward()
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), expected, rtol=0.02, atol=0.02)
    for name, parameter in layer.named_parameters():
        assert parameter.grad.dtype == torch.float32 and torch.isfinite(parameter.grad).all(), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_half_precision_layer_trains_in_its_dtype(dtype: torch.dtype) -> None:
    layer, x = make_linear(dtype=dtype), draw(8, 13, dtype=dtype)
    advance(layer, 0.0, 0.5, 10, mask_generator(0, "unit", "linear", 0))
    advance(layer.input_activation, 0.0, 0.5, 10, mask_generator(0, "unit", "activation", 0))
    out = layer(x)
    out.sum().backward()
    assert out.dtype == layer.weight.grad.dtype == dtype
    assert layer.input_activation.scale.grad.dtype == torch.float32
    torch.testing.assert_close(out.float(), layer.float()(x.float()), rtol=0.02, atol=0.02)


def test_compiles_as_one_graph_and_is_not_recompiled_when_the_mask_grows() -> None:
    torch.compiler.reset()
    layer, x = make_linear(binary_input=False), draw(4, 13)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), layer(x))
    with torch.compiler.set_stance("fail_on_recompile"):
        advance(layer, 0.0, 0.5, 10, mask_generator(0, "unit", "linear", 0))
        assert torch.equal(compiled(x), layer(x))
        layer.commit()
        assert torch.equal(compiled(x), layer(x))
    torch.compiler.reset()


@pytest.mark.parametrize("committed", [False, True], ids=["free", "committed"])
def test_zero_rows_pass_forward_and_backward(committed: bool) -> None:
    layer = make_linear()
    if committed:
        commit(layer)
    x = torch.zeros(0, 13, requires_grad=True)
    out = layer(x)
    out.sum().backward()
    assert out.shape == (0, 5) and x.grad.shape == (0, 13)
    assert torch.count_nonzero(layer.weight.grad) == 0
    with torch.no_grad():
        assert layer.eval()(x).shape == (0, 5)


# committed and packed


@pytest.mark.parametrize("shape", [(4,), (1,), (0,), (2, 3)], ids=str)
@pytest.mark.parametrize("in_features", [1, 7, 65, 256, 768, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_committed_evaluation_equals_the_packed_layer_bit_for_bit(
    in_features: int, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    layer = commit(make_linear(in_features, 9)).eval()
    packed, x = pack_by_hand(layer), draw(*shape, in_features, dtype=dtype)
    with torch.no_grad():
        assert layer(x).dtype == dtype
        assert torch.equal(packed(x), layer(x))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(packed(x), layer(x))


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_committed_evaluation_on_float_inputs_equals_the_packed_layer_bit_for_bit(bias: bool) -> None:
    layer, x = commit(make_linear(65, 9, binary_input=False, bias=bias)).eval(), draw(4, 65)
    with torch.no_grad():
        assert torch.equal(pack_by_hand(layer)(x), layer(x))


@pytest.mark.parametrize("center", ["row", "tensor"])
def test_a_committed_layer_of_centred_weights_equals_the_packed_layer_bit_for_bit(center: str) -> None:
    layer, x = commit(make_linear(70, 9, center=center)).eval(), draw(4, 70)
    with torch.no_grad():
        # As if training had moved every weight up: the signs of the weights themselves would all be +.
        layer.weight.add_(1.0)
        assert torch.equal(pack_by_hand(layer)(x), layer(x))
    assert 0.2 < (layer.centered_weight() >= 0).float().mean() < 0.8


def test_the_gradient_of_a_centred_weight_is_centred() -> None:
    layer = commit(make_linear(11, 3, surrogate="ste", center="row"))
    upstream = draw(2, 3, seed=5)
    layer(draw(2, 11)).backward(upstream)
    free = commit(make_linear(11, 3, surrogate="ste"))
    with torch.no_grad():
        free.weight.copy_(layer.centered_weight())
    free(draw(2, 11)).backward(upstream)
    expected = free.weight.grad - free.weight.grad.mean(dim=1, keepdim=True)
    torch.testing.assert_close(layer.weight.grad, expected)


def test_a_layer_without_bias_gets_the_folded_offset_when_packed() -> None:
    layer, x = commit(make_linear(65, 9, bias=False)).eval(), draw(4, 65)
    with torch.no_grad():
        assert torch.equal(pack_by_hand(layer)(x), layer(x))
        assert torch.count_nonzero(pack_by_hand(layer).bias) == 9


@pytest.mark.parametrize("levels", ["signed", "zero_one"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_binarized_upstream_gives_the_packed_product(levels: str, dtype: torch.dtype) -> None:
    layer, x = make_linear(65, 9, binary_input=False), draw(6, 65, seed=5, dtype=dtype)
    x[0] = -7.0
    activation = MaskedBinaryActivation(65, nn.GELU(), levels=levels)
    activation.initialize(draw(64, 65, seed=2))
    layer.set_input_activation(activation, owned=False, upstream=True)
    commit(layer).eval()
    activation.eval()
    packed = pack_by_hand(layer, upstream=True)
    trained = layer(activation(x.float()))
    with torch.no_grad():
        out = layer(activation(x))
        assert torch.equal(packed(packed.input_activation(x)), out)
    torch.testing.assert_close(out.float(), trained.detach(), rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=1e-2)


@pytest.mark.parametrize("missing", ["weight", "activation"])
def test_evaluation_of_a_partly_free_layer_is_that_of_training(missing: str) -> None:
    layer, x = make_linear(65, 9), draw(4, 65)
    (layer.input_activation if missing == "weight" else layer).commit()
    expected = layer(x)
    with torch.no_grad():
        assert torch.equal(layer.eval()(x), expected)


def test_evaluation_with_gradients_has_gradients() -> None:
    layer = commit(make_linear(surrogate="ste")).eval()
    layer(draw(3, 13)).sum().backward()
    assert torch.count_nonzero(layer.weight.grad) > 0


def test_a_layer_committed_before_its_first_batch_initializes_in_evaluation() -> None:
    layer, x = make_linear(binary_input=False), draw(16, 13)
    layer.set_input_activation(MaskedBinaryActivation(13), owned=True)
    commit(layer).eval()
    with torch.no_grad():
        out = layer(x)
    assert layer.input_activation.initialized
    torch.testing.assert_close(out, layer.train()(x).detach(), rtol=1e-5, atol=1e-5)


# shared activations


class Attention(nn.Module):
    """Two layers that read one tensor and share the activation that the first one owns."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key = make_linear(), make_linear(binary_input=False)
        self.key.set_input_activation(self.query.input_activation, owned=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.query(x) + self.key(x)


def test_a_shared_activation_is_neither_saved_nor_counted_twice() -> None:
    model = Attention()
    expected = {"freeze_mask", "scale", "shift", "threshold"}
    assert {name for name in model.state_dict() if "activation" in name} == {
        f"query.input_activation.{name}" for name in expected
    }
    assert sum(isinstance(module, MaskedBinaryActivation) for module in model.modules()) == 1
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    assert sum("activation" in name for name in names) == 3
    assert model.key.input_activation is model.query.input_activation


def test_a_shared_activation_is_loaded_once_for_all_its_readers() -> None:
    saved, model = Attention(), Attention()
    with torch.no_grad():
        saved.query.input_activation.scale.mul_(2)
    saved.query.input_activation.commit()
    model.load_state_dict(saved.state_dict())
    assert model.key.input_activation.committed
    assert torch.equal(model(draw(3, 13)), saved(draw(3, 13)))


def test_a_deep_copy_keeps_the_sharing_and_shares_nothing_with_the_original() -> None:
    model = Attention()
    clone = copy.deepcopy(model)
    assert clone.key.input_activation is clone.query.input_activation
    assert clone.key.input_activation is not model.key.input_activation
    clone.query.input_activation.commit()
    assert clone.key.input_activation.committed and not model.key.input_activation.committed
    assert not torch.equal(clone(draw(3, 13)), model(draw(3, 13)))


def test_gradients_of_all_readers_add_up_in_a_shared_activation() -> None:
    model, x = Attention(), draw(6, 13)
    model.query.input_activation.commit()
    grads = []
    for layers in ([model.query], [model.key], [model.query, model.key]):
        model.zero_grad()
        sum(layer(x) for layer in layers).sum().backward()
        grads.append(model.query.input_activation.shift.grad.clone())
    torch.testing.assert_close(grads[0] + grads[1], grads[2])


def test_state_survives_a_save_and_load_of_a_layer() -> None:
    saved, fresh = commit(make_linear()), make_linear()
    fresh.load_state_dict(saved.state_dict())
    assert fresh.committed and fresh.input_activation.committed


# embeddings


def make_embedding(**settings: object) -> MaskedBinaryEmbedding:
    table = MaskedBinaryEmbedding(12, 19, **settings)
    with torch.no_grad():
        table.weight.copy_(0.05 * draw(12, 19))
    return table


def test_an_embedding_looks_up_the_masked_rows() -> None:
    table, ids = make_embedding(clip=1.5), torch.tensor([[3, 0, 3], [11, 7, 1]])
    advance(table, 0.0, 0.5, 10, mask_generator(0, "unit", "embedding", 0))
    w, mask = table.weight.tolist(), table.freeze_mask.tolist()
    out = table(ids)
    assert out.shape == (2, 3, 19)
    for i, j in [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]:
        row, frozen = w[ids[i, j]], mask[ids[i, j]]
        a = math.fsum(abs(x) for x in row) / 19
        expected = [
            math.copysign(a, x) if f else max(-1.5 * a, min(1.5 * a, x)) for x, f in zip(row, frozen, strict=True)
        ]
        assert out[i, j].tolist() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("surrogate", ["none", "ste"])
def test_an_embedding_passes_gradients_to_the_rows_it_looked_up(surrogate: str) -> None:
    table, ids = make_embedding(surrogate=surrogate, padding_idx=0), torch.tensor([0, 3, 3, 7])
    advance(table, 0.0, 0.5, 10, mask_generator(0, "unit", "embedding", 0))
    table(ids).sum().backward()
    looked_up = torch.tensor([row in (3, 7) for row in range(12)])
    assert torch.count_nonzero(table.weight.grad[~looked_up]) == 0
    frozen = table.weight.grad[3][table.freeze_mask[3]]
    assert torch.equal(frozen, torch.full_like(frozen, 2.0 if surrogate == "ste" else 0.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_committed_embedding_equals_the_packed_one_bit_for_bit(dtype: torch.dtype) -> None:
    table = make_embedding(dtype=dtype)
    table.commit()
    packed, ids = PackedBinaryEmbedding(12, 19, dtype=dtype), torch.tensor([[3, 0], [11, 7]])
    packed.packed_weight.copy_(pack_bits(table.weight))
    packed.scale.copy_(table.row_scale().flatten())
    assert packed(ids).dtype == dtype
    assert torch.equal(packed(ids), table(ids))


@pytest.mark.parametrize("plain", [False, True], ids=["packed", "plain"])
@pytest.mark.parametrize("id", [-1, -12, 12])
def test_an_id_that_is_not_in_the_table_is_refused_as_by_an_embedding_of_floats(id: int, plain: bool) -> None:
    packed = PackedBinaryEmbedding(12, 19)
    table = plain_module(packed) if plain else packed
    for embedding in (nn.Embedding(12, 19), table):
        with pytest.raises(IndexError, match="out of range"):
            embedding(torch.tensor([[3, id]]))
