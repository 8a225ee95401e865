"""How packed layers work together: what they share, what they skip, and that it changes nothing."""

from __future__ import annotations

import copy
import pickle
import weakref
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from hf_stompp import StoMPPConfig
from hf_stompp.nn import PackedBinaryActivation, PackedBinaryLinear, packed
from hf_stompp.ops import integer_linear, pack_bits, unpack_signs


DTYPES = [torch.float32, torch.bfloat16, torch.float16]


class Operators(TorchDispatchMode):
    """Counts the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count[func.name()] += 1
        return func(*args, **(kwargs or {}))


def one_by_one(model: nn.Module) -> nn.Module:
    """A copy in which every layer signs its own input, and puts out floats."""
    plain = copy.deepcopy(model)
    for module in plain.modules():
        if isinstance(module, PackedBinaryLinear):
            module.output_activation = None
        elif isinstance(module, PackedBinaryActivation):
            module.shared_bits = module.kept_bits = lambda input, reader: None
    return plain


def linear(in_features: int, out_features: int, binary_input: bool = True) -> PackedBinaryLinear:
    layer = PackedBinaryLinear(in_features, out_features, binary_input=binary_input)
    layer.packed_weight.copy_(pack_bits(torch.randn(out_features, in_features)))
    layer.scale.uniform_(0.5, 1.5)
    layer.bias.normal_()
    return layer


def feed_forward(features: int = 24, hidden: int = 40, function: nn.Module | None = None) -> nn.Sequential:
    """Two layers with an activation function between them, wired as in a packed model."""
    first, second = linear(features, hidden), linear(hidden, features)
    own = PackedBinaryActivation(features)
    own.threshold.normal_()
    first.set_input_activation(own, owned=True)
    activation = PackedBinaryActivation(hidden, nn.GELU() if function is None else function)
    activation.threshold.normal_()
    second.set_input_activation(activation, owned=False, upstream=True)
    first.put_out_signs_of(activation)
    return nn.Sequential(first, activation, second).eval()


def by_hand(layers: nn.Sequential, x: Tensor) -> Tensor:
    """Two integer products with a threshold before each, on floats; rounded to the dtype of `x` after each."""
    first, activation, second = layers

    def product(layer: PackedBinaryLinear, above: Tensor) -> Tensor:
        weight = unpack_signs(layer.packed_weight, layer.in_features).double()
        sums = torch.where(above, 1.0, -1.0).double() @ weight.T
        return (sums.float() * layer.scale + layer.bias).to(x.dtype)

    hidden = product(first, x.float() >= first.input_activation.threshold)
    return product(second, hidden.float() >= activation.threshold)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logits_do_not_depend_on_what_layers_share(tiny_packed, family, tiny_inputs, dtype) -> None:
    model = tiny_packed(family).to(dtype)
    inputs = {key: v.to(dtype) if v.is_floating_point() else v for key, v in tiny_inputs(family).items()}

    with torch.no_grad():
        found, expected = model(**inputs).logits, one_by_one(model)(**inputs).logits

    assert found.dtype == dtype
    assert torch.equal(found, expected)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=lambda mode: mode.__name__)
def test_bert_signs_each_tensor_once_and_runs_no_activation_function(tiny_packed, tiny_inputs, mode) -> None:
    model = tiny_packed("bert", num_hidden_layers=3)

    with mode(), Operators() as operators:
        model(**tiny_inputs("bert"))

    # Per layer: the input of query, key and value is packed once; the attention's output is signed within its product;
    # the first feed-forward product puts out bits, which the second takes.
    assert operators.count["hf_stompp::pack_sign"] == 3
    assert operators.count["hf_stompp::binary_linear_sign"] == 3
    assert operators.count["hf_stompp::binary_linear"] == 3 * 5
    assert not [name for name in operators.count if "gelu" in name]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_feed_forward_layers_that_exchange_bits_equal_a_computation_by_hand(dtype) -> None:
    layers, x = feed_forward(), torch.randn(2, 5, 24).to(dtype)

    with torch.no_grad():
        found = layers(x)

    assert found.dtype == dtype and torch.equal(found, by_hand(layers, x))


def test_sign_is_that_of_the_pre_activation_where_gelu_rounds_to_minus_zero() -> None:
    layers = feed_forward()
    first, activation, _ = layers
    first.bias.fill_(-60.0)
    activation.threshold.zero_()
    x = torch.randn(3, 24)
    with torch.no_grad():
        hidden = one_by_one(layers)[0](x)
        assert hidden.max() < -6 and torch.equal(nn.GELU()(hidden), torch.zeros_like(hidden))

        bits = layers[1](layers[0](x))

    assert not bits.any()


def test_dropout_between_the_layers_gets_floats_in_training_mode() -> None:
    layers = feed_forward().train()
    x = torch.randn(3, 24)

    hidden = layers[1](layers[0](x))

    assert hidden.dtype == torch.float32 and set(hidden.unique().tolist()) <= {-1.0, 1.0}
    assert torch.equal(layers[2](hidden), by_hand(layers, x))


def shared_pair() -> tuple[PackedBinaryLinear, PackedBinaryLinear, PackedBinaryActivation]:
    first, second, activation = linear(24, 8), linear(24, 8), PackedBinaryActivation(24)
    first.set_input_activation(activation, owned=True)
    second.set_input_activation(activation, owned=False)
    return first, second, activation


@pytest.mark.parametrize("rows,packings", [(5, 0), (6, 1)])
def test_layers_that_read_few_elements_sign_them_within_their_products(monkeypatch, rows, packings) -> None:
    first, second, activation = shared_pair()
    monkeypatch.setattr(packed, "FEW_ELEMENTS", 6 * 24)
    x = torch.randn(rows, 24)

    with torch.no_grad(), Operators() as operators:
        found = first(x), second(x)

    assert operators.count["hf_stompp::pack_sign"] == packings
    signs = torch.where(x >= activation.threshold, 1.0, -1.0)
    assert all(
        torch.equal(output, signs @ unpack_signs(layer.packed_weight, 24).T * layer.scale + layer.bias)
        for output, layer in zip(found, (first, second), strict=True)
    )


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad], ids=lambda mode: mode.__name__)
def test_tensor_changed_in_place_between_its_readers_is_packed_anew(mode) -> None:
    first, second, _ = shared_pair()
    x = torch.randn(4, 24)

    with mode():
        first(x)
        x.neg_()
        found = second(x)

        assert torch.equal(found, second(x.clone()))


def test_tensor_that_inference_mode_reuses_for_the_next_batch_is_packed_anew() -> None:
    first, second, _ = shared_pair()
    with torch.inference_mode():
        x = torch.randn(4, 24)
        first(x), second(x)
        x.neg_()
        found = first(x), second(x)
        expected = first(x.clone()), second(x.clone())

    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_layer_that_comes_again_in_inference_mode_packs_anew() -> None:
    first, _, _ = shared_pair()
    with torch.inference_mode():
        x = torch.randn(4, 24)
        first(x)
        x.neg_()

        assert torch.equal(first(x), first(x.clone()))


def test_equal_but_different_tensors_do_not_share_bits() -> None:
    first, second, _ = shared_pair()
    x = torch.randn(4, 24)
    with torch.no_grad(), Operators() as operators:
        first(x)
        second(x.clone())

    assert operators.count["hf_stompp::pack_sign"] == 2


def test_shared_bits_keep_no_tensor_alive_and_end_with_it_whoever_has_not_asked() -> None:
    first, _, activation = shared_pair()
    x = torch.randn(4, 24)
    first(x)
    tensor, bits = activation._bits._last[0], weakref.ref(activation._bits._last[3])
    del x

    assert tensor() is None and bits() is None


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_copy_of_a_model_that_has_run_computes_the_same_and_is_wired_to_itself(
    tiny_packed, tiny_inputs, copied
) -> None:
    model = tiny_packed("bert")
    inputs = tiny_inputs("bert")
    with torch.no_grad():
        expected = model(**inputs).logits
        twin = copied(model)

        assert torch.equal(twin(**inputs).logits, expected)
    layer = twin.bert.encoder.layer[0]
    assert layer.intermediate.dense.output_activation is layer.intermediate.intermediate_act_fn
    assert layer.attention.self.key.input_activation is layer.attention.self.query.input_activation


def test_threads_that_run_one_model_get_what_each_would_alone(tiny_packed, tiny_inputs) -> None:
    model = tiny_packed("bert")
    batches = [tiny_inputs("bert", seed=seed) for seed in range(16)]

    def run(inputs: dict[str, Tensor]) -> Tensor:
        with torch.inference_mode():
            return model(**inputs).logits

    expected = [run(inputs) for inputs in batches]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(run, batches * 4))

    assert all(torch.equal(a, b) for a, b in zip(found, expected * 4, strict=True))


def test_model_compiles_without_a_graph_break_to_the_same_logits(tiny_packed, tiny_inputs) -> None:
    model = tiny_packed("bert")
    inputs = tiny_inputs("bert")
    with torch.no_grad():
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)

        assert torch.equal(compiled(**inputs).logits, model(**inputs).logits)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["bnn", "bwn"])
def test_model_compiles_with_the_default_backend(tiny_packed, tiny_inputs, mode) -> None:
    model = tiny_packed("bert", config=StoMPPConfig(mode=mode))
    inputs = tiny_inputs("bert")
    with torch.no_grad():
        found, expected = torch.compile(model, fullgraph=True)(**inputs).logits, model(**inputs).logits

    # LayerNorm is summed in another order there, which can turn the sign of a value next to its threshold.
    assert found.shape == expected.shape and (found - expected).abs().median() < 1e-5


def test_exported_model_computes_the_same(tiny_packed, tiny_inputs) -> None:
    model = tiny_packed("bert")
    inputs = tiny_inputs("bert")
    with torch.no_grad():
        exported = torch.export.export(model, args=(), kwargs=inputs).module()

        assert torch.equal(exported(**inputs).logits, model(**inputs).logits)


def test_no_gradient_passes_through_a_layer_with_binary_inputs() -> None:
    layers = feed_forward()
    x = torch.randn(3, 24, requires_grad=True)

    assert not layers(x).requires_grad


class TestFloatInputs:
    """Mode `bwn`: the weight as floats is kept between calls."""

    def weight_by_hand(self, layer: PackedBinaryLinear) -> Tensor:
        return unpack_signs(layer.packed_weight, layer.in_features) * layer.scale.unsqueeze(-1)

    def test_output_is_the_product_with_the_scaled_signs(self) -> None:
        layer, x = linear(24, 8, binary_input=False), torch.randn(4, 24)

        expected = nn.functional.linear(x, self.weight_by_hand(layer), layer.bias)

        assert torch.equal(layer(x), expected) and torch.equal(layer(x), expected)

    def test_weight_is_unpacked_once(self) -> None:
        layer = linear(24, 8, binary_input=False)

        assert layer.float_weight(torch.float32) is layer.float_weight(torch.float32)

    @pytest.mark.parametrize("name", ["packed_weight", "scale"])
    def test_weight_follows_a_change_of_what_it_was_made_of(self, name) -> None:
        layer, x = linear(24, 8, binary_input=False), torch.randn(4, 24)
        before = layer(x)

        getattr(layer, name).copy_(getattr(linear(24, 8), name))

        assert not torch.equal(layer(x), before)
        assert torch.equal(layer(x), nn.functional.linear(x, self.weight_by_hand(layer), layer.bias))

    def test_weight_follows_the_dtype_of_the_input(self) -> None:
        layer = linear(24, 8, binary_input=False)

        assert [layer(torch.randn(2, 24).to(dtype)).dtype for dtype in DTYPES] == DTYPES

    def test_weight_made_in_inference_mode_serves_in_training(self) -> None:
        layer, x = linear(24, 8, binary_input=False), torch.randn(4, 24, requires_grad=True)
        with torch.inference_mode():
            layer(x)

        layer(x).sum().backward()

        assert torch.allclose(x.grad, self.weight_by_hand(layer).sum(dim=0).expand(4, 24), atol=1e-5)

    def test_weight_is_neither_saved_nor_pickled(self) -> None:
        layer = linear(24, 8, binary_input=False)
        layer(torch.randn(2, 24))

        assert sorted(layer.state_dict()) == ["bias", "packed_weight", "scale"]
        assert pickle.loads(pickle.dumps(layer))._float_weight is None


def test_reference_of_the_product_rounds_scale_and_bias_one_after_the_other() -> None:
    signs, weight = torch.ones(1, 3), torch.ones(1, 3)
    scale, bias = torch.tensor([1 / 3]), torch.tensor([-1.0])

    # One rounding, as in a fused multiply-add, would leave the error of float32's third.
    assert integer_linear(signs, weight, scale, bias).item() == 0.0
