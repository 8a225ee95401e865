"""The output block of packed models: recognised by what it is, and fused without a change of any result."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import Tensor, nn
from transformers.models.bert.modeling_bert import BertSelfOutput

from hf_stompp.nn import PackedBinaryActivation, PackedBinaryLinear, PackedResidualNorm
from hf_stompp.nn.residual_norm import is_residual_norm
from hf_stompp.ops import pack_bits, pack_sign


MODES = [torch.no_grad, torch.inference_mode]
modes = pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.__name__)


class Block(nn.Module):
    """BERT's."""

    def __init__(self, features: int = 24, has_dropout: bool = True) -> None:
        super().__init__()
        self.dense = PackedBinaryLinear(40, features)
        self.dense.packed_weight.copy_(pack_bits(torch.randn(features, 40)))
        self.dense.scale.uniform_(0.5, 1.5)
        self.dense.bias.normal_()
        self.dense.set_input_activation(PackedBinaryActivation(40), owned=True)
        self.LayerNorm = nn.LayerNorm(features)
        nn.init.normal_(self.LayerNorm.weight)
        nn.init.normal_(self.LayerNorm.bias)
        if has_dropout:
            self.dropout = nn.Dropout(0.5)

    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        hidden_states = self.dense(hidden_states)
        if hasattr(self, "dropout"):
            hidden_states = self.dropout(hidden_states)
        return self.LayerNorm(hidden_states + input_tensor)


def linear(activation: PackedBinaryActivation, owned: bool, features: int = 24) -> PackedBinaryLinear:
    layer = PackedBinaryLinear(features, 8)
    layer.packed_weight.copy_(pack_bits(torch.randn(8, features)))
    layer.scale.uniform_(0.5, 1.5)
    layer.set_input_activation(activation, owned=owned)
    return layer


class Pair:
    """A block, and the layers that read what it puts out."""

    def __init__(self, readers: int = 1, has_dropout: bool = True) -> None:
        self.activation = PackedBinaryActivation(24)
        self.activation.threshold.normal_()
        self.readers = [linear(self.activation, owned=i == 0).eval() for i in range(readers)]
        self.block = PackedResidualNorm(Block(has_dropout=has_dropout).eval())
        self.block.followed_by(self.activation)
        self.inputs = torch.randn(3, 5, 40), torch.randn(3, 5, 24)

    def expected(self, output: Tensor) -> list[Tensor]:
        """What the readers make of a tensor that nothing is known of."""
        return [reader(output.clone()) for reader in self.readers]


# ----- What it computes -----


@modes
@pytest.mark.parametrize("has_dropout", [True, False], ids=["dropout", "no-dropout"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_fused_output_is_that_of_the_block_bit_for_bit(fused, operators, dtype, has_dropout, mode) -> None:
    pair = Pair(has_dropout=has_dropout)
    block = pair.block.to(dtype)
    inputs = [value.to(dtype) for value in pair.inputs]
    with mode():
        expected = block.restored()(*inputs)
        with operators() as run:
            found = block(*inputs)

    assert run.count["hf_stompp::layer_norm_sign"] == 1
    assert found.dtype == dtype and torch.equal(found, expected)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_block_with_gradients_is_computed_as_by_the_model(fused, operators, training) -> None:
    pair = Pair()
    block, inputs = pair.block.train(training), [value.requires_grad_() for value in pair.inputs]
    outputs, gradients = [], []
    for module in (block, block.restored()):
        torch.manual_seed(0)
        with operators() as run:
            outputs.append(module(*inputs))
        outputs[-1].square().sum().backward()
        gradients.append([inputs[1].grad, module.LayerNorm.weight.grad])
        inputs[1].grad = module.LayerNorm.weight.grad = None
        assert not run.count["hf_stompp::layer_norm_sign"]

    assert torch.equal(*outputs)
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def hook_layer_norm(pair: Pair) -> None:
    pair.block.LayerNorm.register_forward_hook(lambda module, args, output: output + 1)


def hook_dropout(pair: Pair) -> None:
    pair.block.dropout.register_forward_pre_hook(lambda module, args: (args[0] * 2,))


def wrap_layer_norm(pair: Pair) -> None:
    forward = pair.block.LayerNorm.forward
    pair.block.LayerNorm.forward = lambda input: forward(input) - 1


def replace_layer_norm(pair: Pair) -> None:
    class Other(nn.LayerNorm):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input).neg()

    pair.block.LayerNorm = Other(24)


def drop_out(pair: Pair) -> None:
    pair.block.dropout.train()


def widen_the_residual(pair: Pair) -> None:
    pair.inputs = pair.inputs[0], pair.inputs[1].double()
    pair.block.LayerNorm.double()


def broadcast_the_residual(pair: Pair) -> None:
    pair.inputs = pair.inputs[0], pair.inputs[1][:, :1]


@pytest.mark.parametrize(
    "change",
    [
        hook_layer_norm,
        hook_dropout,
        wrap_layer_norm,
        replace_layer_norm,
        drop_out,
        widen_the_residual,
        broadcast_the_residual,
    ],
    ids=lambda change: change.__name__,
)
def test_children_run_where_they_are_more_than_sum_and_layer_norm(fused, operators, change) -> None:
    pair = Pair()
    change(pair)
    with torch.no_grad(), operators() as run:
        torch.manual_seed(0)
        found = pair.block(*pair.inputs)
    with torch.no_grad():
        torch.manual_seed(0)
        hidden_states = pair.block.dropout(pair.block.dense(pair.inputs[0]))
        expected = pair.block.LayerNorm(hidden_states + pair.inputs[1])

    assert not run.count["hf_stompp::layer_norm_sign"]
    assert torch.equal(found, expected)


def test_children_run_in_training_mode(fused, operators) -> None:
    pair = Pair(has_dropout=False)
    with torch.no_grad(), operators() as run:
        pair.block.train()(*pair.inputs)

    assert run.count["aten::native_layer_norm"] == 1 and not run.count["hf_stompp::layer_norm_sign"]


def test_children_run_under_autocast(fused, operators) -> None:
    pair = Pair()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16), operators() as run:
        found, expected = pair.block(*pair.inputs), pair.block.restored()(*pair.inputs)

    assert not run.count["hf_stompp::layer_norm_sign"]
    assert torch.equal(found, expected)


def test_hook_on_all_modules_sees_the_children(fused) -> None:
    seen = []
    handle = torch.nn.modules.module.register_module_forward_hook(lambda module, *rest: seen.append(type(module)))
    try:
        pair = Pair()
        with torch.no_grad():
            pair.block(*pair.inputs)
    finally:
        handle.remove()

    assert nn.LayerNorm in seen and nn.Dropout in seen


# ----- What its readers make of it -----


@modes
@pytest.mark.parametrize("readers", [1, 3])
def test_readers_take_the_bits_and_pack_nothing(fused, operators, readers, mode) -> None:
    pair = Pair(readers)
    with mode():
        output = pair.block(*pair.inputs)
        with operators() as run:
            found = [reader(output) for reader in pair.readers]

        assert not run.count["hf_stompp::pack_sign"]
        assert run.inputs["hf_stompp::binary_linear"] == [torch.uint8] * readers
        assert all(torch.equal(a, b) for a, b in zip(found, pair.expected(output), strict=True))


@modes
@pytest.mark.parametrize("readers", [1, 3])
@pytest.mark.parametrize("after", [0, 1])
def test_output_written_in_place_is_signed_anew(fused, readers, after, mode) -> None:
    pair = Pair(readers)
    with mode():
        output = pair.block(*pair.inputs)
        for reader in pair.readers[:after]:
            reader(output)
        output.neg_()
        found = [reader(output) for reader in pair.readers]

        assert all(torch.equal(a, b) for a, b in zip(found, pair.expected(output), strict=True))


@modes
@pytest.mark.parametrize("readers", [1, 3])
def test_hook_that_replaces_or_writes_the_output_is_followed(fused, readers, mode) -> None:
    def replace(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        return output.neg()

    def write(module: nn.Module, args: tuple, output: Tensor) -> None:
        output.neg_()

    for hook in (replace, write):
        pair = Pair(readers)
        pair.block.register_forward_hook(hook)
        with mode():
            output = pair.block(*pair.inputs)
            found = [reader(output) for reader in pair.readers]

            assert all(torch.equal(a, b) for a, b in zip(found, pair.expected(output), strict=True))


@modes
@pytest.mark.parametrize("readers", [1, 3])
def test_reader_that_comes_twice_gets_the_same(fused, readers, mode) -> None:
    pair = Pair(readers)
    with mode():
        output = pair.block(*pair.inputs)
        first, second = ([reader(output) for reader in pair.readers] for _ in range(2))

        for found in (first, second):
            assert all(torch.equal(a, b) for a, b in zip(found, pair.expected(output), strict=True))


@pytest.mark.parametrize("readers", [1, 3])
def test_nothing_is_kept_once_the_last_reader_has_read(fused, readers) -> None:
    pair = Pair(readers)
    with torch.no_grad():
        output = pair.block(*pair.inputs)
        kept = weakref.ref(pair.activation._bits._last[3])
        for reader in pair.readers:
            assert kept() is not None
            reader(output)

    gc.collect()
    assert kept() is None and pair.activation._bits._last is None


def test_output_that_nobody_read_is_not_kept_alive(fused) -> None:
    pair = Pair()
    with torch.no_grad():
        output = weakref.ref(pair.block(*pair.inputs))

    assert output() is None
    # Nor are its bits.
    assert pair.activation._bits._last is None


def test_bits_are_not_kept_for_a_tensor_that_counts_no_writes() -> None:
    activation = PackedBinaryActivation(24)
    reader = linear(activation, owned=True)
    with torch.inference_mode():
        x = torch.randn(4, 24)
        activation.keep(x, pack_sign(x)[0])
        x.neg_()

        assert torch.equal(reader(x), reader(x.clone()))


def test_wrong_hint_changes_no_result(fused, operators) -> None:
    pair, other = Pair(), Pair()
    pair.block.followed_by(other.activation)
    with torch.no_grad(), operators() as run:
        output = pair.block(*pair.inputs)
        found = pair.readers[0](output)

    assert run.count["hf_stompp::layer_norm_sign"] == 1
    assert torch.equal(found, pair.expected(output)[0])


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_copy_of_block_and_reader_is_wired_to_itself(fused, operators, copied) -> None:
    pair = Pair()
    with torch.no_grad():
        output = pair.block(*pair.inputs)
        expected = pair.readers[0](output)
        block, reader = copied(nn.ModuleList([pair.block, pair.readers[0]]))
        with operators() as run:
            found = reader(block(*pair.inputs))

    assert block._following is reader.input_activation is not pair.activation
    assert block.restored().dense is block.dense
    assert run.inputs["hf_stompp::binary_linear"] == [torch.float32, torch.uint8]
    assert torch.equal(found, expected)


# ----- What it takes the place of -----


def test_block_is_given_back_with_the_children_of_now() -> None:
    block = Block()
    block.config = "first"
    module = PackedResidualNorm(block)
    assert module.config == "first"
    assert list(module.state_dict()) == list(block.state_dict())
    module.dense, module.config = nn.Linear(40, 24), "second"

    restored = module.train(False).restored()

    assert restored is block and block.dense is module.dense and block.config == "second" and not block.training
    assert [name for name, _ in block.named_children()] == ["dense", "LayerNorm", "dropout"]


class Keyword(Block):
    def forward(self, hidden_states: Tensor, residual: Tensor) -> Tensor:
        return super().forward(hidden_states, residual)


class Scaled(Block):
    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        return self.LayerNorm(self.dropout(self.dense(hidden_states)) + 0.5 * input_tensor)


class NormFirst(Block):
    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        return self.dropout(self.dense(self.LayerNorm(hidden_states))) + input_tensor


class DropoutLast(Block):
    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        return self.LayerNorm(self.dropout(self.dense(hidden_states) + input_tensor))


class NoDropout(Block):
    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        return self.LayerNorm(self.dense(hidden_states) + input_tensor)


class Float32Norm(Block):
    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        total = self.dropout(self.dense(hidden_states)) + input_tensor
        weight, bias, epsilon = self.LayerNorm.weight, self.LayerNorm.bias, self.LayerNorm.eps
        return nn.functional.layer_norm(total.float(), weight.shape, weight.float(), bias.float(), epsilon)


class Configured(Block):
    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        return super().forward(hidden_states, input_tensor) * self.config


def with_another_child(block: nn.Module) -> None:
    block.intermediate = nn.Identity()


def with_a_parameter(block: nn.Module) -> None:
    block.gamma = nn.Parameter(torch.ones(24))


def with_a_hook(block: nn.Module) -> None:
    block.register_forward_hook(lambda module, args, output: output)


def with_a_wrapped_forward(block: nn.Module) -> None:
    block.forward = lambda hidden_states, input_tensor: hidden_states


def with_float_inputs(block: nn.Module) -> None:
    block.dense = PackedBinaryLinear(40, 24, binary_input=False)


def with_a_float_layer(block: nn.Module) -> None:
    block.dense = nn.Linear(40, 24)


def with_another_norm(block: nn.Module) -> None:
    block.LayerNorm = nn.RMSNorm(24)


def without_a_bias(block: nn.Module) -> None:
    block.LayerNorm = nn.LayerNorm(24, bias=False)


def with_two_dimensions(block: nn.Module) -> None:
    block.LayerNorm = nn.LayerNorm((5, 24))


def with_another_dropout(block: nn.Module) -> None:
    block.dropout = nn.AlphaDropout(0.5)


@pytest.mark.parametrize("make", [Block, lambda: Block(has_dropout=False)], ids=["dropout", "no-dropout"])
def test_block_of_any_name_is_recognised(make) -> None:
    assert not isinstance(make(), BertSelfOutput)
    assert is_residual_norm(make())


@pytest.mark.parametrize("kind", [Keyword, Scaled, NormFirst, DropoutLast, NoDropout, Float32Norm, Configured])
def test_class_that_computes_something_else_is_not_recognised(kind) -> None:
    block = kind()
    block.config = 2.0

    assert not is_residual_norm(block)


@pytest.mark.parametrize(
    "change",
    [
        with_another_child,
        with_a_parameter,
        with_a_hook,
        with_a_wrapped_forward,
        with_float_inputs,
        with_a_float_layer,
        with_another_norm,
        without_a_bias,
        with_two_dimensions,
        with_another_dropout,
    ],
    ids=lambda change: change.__name__,
)
def test_block_that_is_built_otherwise_is_not_recognised(change) -> None:
    block = Block()
    change(block)

    assert not is_residual_norm(block)


def test_trying_a_class_leaves_random_numbers_alone_and_needs_no_device() -> None:
    class Fresh(Block):
        pass

    block = Fresh()
    before = torch.get_rng_state()
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"), torch.inference_mode():
            recognised = is_residual_norm(block)
    finally:
        torch.set_default_dtype(default)

    assert recognised and torch.equal(torch.get_rng_state(), before)
