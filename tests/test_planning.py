from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForMaskedLM, T5Config, T5Model

from hf_stompp import StoMPPConfig
from hf_stompp.model.example_inputs import example_inputs
from hf_stompp.model.planning import is_excluded, plan_modules
from hf_stompp.model.stack import find_layer_stack
from hf_stompp.plan import Plan, read_plan


BERT_LAYER = {
    "attention.self.query": "attention.self.query",
    "attention.self.key": "attention.self.query",
    "attention.self.value": "attention.self.query",
    "attention.output.dense": "attention.output.dense",
    "intermediate.dense": "intermediate.dense",
    "intermediate.intermediate_act_fn": "intermediate.dense",
    "output.dense": "intermediate.intermediate_act_fn",
}
BERT_SUBLAYERS = ["attention", "intermediate+output"]
FEED_FORWARD = {name: BERT_LAYER[name] for name in list(BERT_LAYER)[4:]}

# Family -> stack, modules of a layer in execution order with what binarizes their input (linear layers) or what they
# alone read (activation functions), sub-layers.
EXPECTED: dict[str, tuple[str, dict[str, str | None], list[str]]] = {
    "bert": ("bert.encoder.layer", BERT_LAYER, BERT_SUBLAYERS),
    "roberta": ("roberta.encoder.layer", BERT_LAYER, BERT_SUBLAYERS),
    "electra": ("electra.encoder.layer", BERT_LAYER, BERT_SUBLAYERS),
    "deberta_v2": (
        "deberta.encoder.layer",
        {
            "attention.self.query_proj": "attention.self.query_proj",
            "attention.self.key_proj": "attention.self.query_proj",
            "attention.self.value_proj": "attention.self.query_proj",
            "attention.output.dense": "attention.output.dense",
            **FEED_FORWARD,
        },
        BERT_SUBLAYERS,
    ),
    "mpnet": (
        "mpnet.encoder.layer",
        {
            "attention.attn.q": "attention.attn.q",
            "attention.attn.k": "attention.attn.q",
            "attention.attn.v": "attention.attn.q",
            "attention.attn.o": "attention.attn.o",
            **FEED_FORWARD,
        },
        BERT_SUBLAYERS,
    ),
    "distilbert": (
        "distilbert.transformer.layer",
        {
            "attention.q_lin": "attention.q_lin",
            "attention.k_lin": "attention.q_lin",
            "attention.v_lin": "attention.q_lin",
            "attention.out_lin": "attention.out_lin",
            "ffn.lin1": "ffn.lin1",
            "ffn.activation": "ffn.lin1",
            "ffn.lin2": "ffn.activation",
        },
        ["attention", "ffn"],
    ),
    # Its activation is multiplied by a gate before the linear layer behind it: nothing to fuse.
    "modernbert": (
        "model.layers",
        {"attn.Wqkv": "attn.Wqkv", "attn.Wo": "attn.Wo", "mlp.Wi": "mlp.Wi", "mlp.Wo": "mlp.Wo"},
        ["attn", "mlp"],
    ),
    "vit": (
        "vit.layers",
        {
            "attention.q_proj": "attention.q_proj",
            "attention.k_proj": "attention.q_proj",
            "attention.v_proj": "attention.q_proj",
            "attention.o_proj": "attention.o_proj",
            "mlp.fc1": "mlp.fc1",
            "mlp.activation_fn": "mlp.fc1",
            "mlp.fc2": "mlp.activation_fn",
        },
        ["attention", "mlp"],
    ),
}


class Block(nn.Module):
    """A feed-forward layer; `between` is called on the activation function's output."""

    def __init__(self, size: int = 8, between: nn.Module | None = None) -> None:
        super().__init__()
        self.up, self.act, self.down = nn.Linear(size, 2 * size), nn.GELU(), nn.Linear(2 * size, size)
        self.between = between

    def forward(self, x):
        hidden = self.act(self.up(x))
        return x + self.down(hidden if self.between is None else self.between(hidden))


class Encoder(nn.Module):
    def __init__(self, layers: int = 2, decoder_layers: int = 0, **block) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(**block) for _ in range(layers))
        self.decoder = nn.ModuleList(Block(**block) for _ in range(decoder_layers))

    def forward(self, x):
        for layer in [*self.layers, *self.decoder]:
            x = layer(x)
        return x


def plan(model: nn.Module, inputs: dict | None = None, **config) -> Plan:
    found = plan_modules(model, StoMPPConfig(**config), inputs)
    # Whatever is planned must be read again from a file.
    assert read_plan([entry.to_dict() for entry in found.values()]) == found
    return found


def plan_encoder(model: nn.Module, **config) -> Plan:
    return plan(model, {"x": torch.randn(2, 3, 8)}, **config)


def units(entries: Plan) -> list[str]:
    return list(dict.fromkeys(entry.unit for entry in entries.values()))


def test_modules_are_found_in_order_of_depth_with_their_inputs(tiny_model, family):
    stack, layer, _ = EXPECTED[family]

    entries = plan(tiny_model(family, num_hidden_layers=3))

    expected = {
        f"{stack}.{i}.{name}": source and f"{stack}.{i}.{source}" for i in range(3) for name, source in layer.items()
    }
    assert {name: entry.input for name, entry in entries.items()} == expected
    assert list(entries) == list(expected)


def test_units_are_layers_sublayers_or_modules(tiny_model, family):
    stack, _, sublayers = EXPECTED[family]
    model = tiny_model(family)
    linears = [name for name, entry in plan(model).items() if entry.is_linear]

    assert units(plan(model, unit="layer")) == [f"{stack}.0", f"{stack}.1"]
    assert units(plan(model, unit="sublayer")) == [f"{stack}.{i}.{name}" for i in range(2) for name in sublayers]
    assert units(plan(model, unit="module")) == linears


def test_modules_are_in_the_unit_named_after_them(tiny_model, family):
    stack = EXPECTED[family][0]

    entries = plan(tiny_model(family), unit="sublayer")

    for name, entry in entries.items():
        layer, child = name.removeprefix(f"{stack}.").split(".")[:2]
        assert child in entry.unit.removeprefix(f"{stack}.{layer}.").split("+")


def test_activation_belongs_to_the_unit_of_the_linear_layer_that_reads_it(tiny_model):
    entries = plan(tiny_model("bert"), unit="module")

    name = "bert.encoder.layer.0.intermediate.intermediate_act_fn"
    assert entries[name].to_dict() == {
        "name": name,
        "kind": "activation",
        "unit": "bert.encoder.layer.0.output.dense",
        "input": "bert.encoder.layer.0.intermediate.dense",
    }


def test_bwn_has_no_input_activations(tiny_model, family):
    entries = plan(tiny_model(family), mode="bwn")

    assert {entry.kind for entry in entries.values()} == {"linear"}
    assert {entry.input for entry in entries.values()} == {None}


def test_bias_is_recorded(tiny_model):
    assert all(entry.bias for entry in plan(tiny_model("bert")).values() if entry.is_linear)
    assert not any(entry.bias for entry in plan(tiny_model("modernbert")).values())


def test_more_than_ten_layers_keep_numeric_order(tiny_model):
    model = tiny_model("bert", num_hidden_layers=12, hidden_size=4, num_attention_heads=1, intermediate_size=4)

    assert units(plan(model)) == [f"bert.encoder.layer.{i}" for i in range(12)]


def test_one_layer_is_a_stack(tiny_model):
    assert units(plan(tiny_model("bert", num_hidden_layers=1))) == ["bert.encoder.layer.0"]


@pytest.mark.parametrize(
    ("name", "pattern", "excluded"),
    [
        ("bert.encoder.layer.1.output.dense", r"layer\.1", True),
        ("bert.encoder.layer.11.output.dense", r"layer\.1", False),
        ("bert.encoder.layer.0.output.dense", "output", True),
        ("bert.encoder.layer.0.my_output.dense", "output", False),
        ("bert.encoder.layer.0.output_2.dense", "output", False),
        ("classifier", "classifier", True),
        ("bert.pooler.dense", "classifier|pooler", True),
        ("bert.poolers.dense", "classifier|pooler", False),
        ("bert.encoder.layer.3.output", r"layer\.[0-3]\.output", True),
        ("bert.encoder.layer.1.output", r"layer.1", True),
    ],
)
def test_patterns_match_whole_parts_of_a_name(name, pattern, excluded):
    assert is_excluded(name, [pattern]) is excluded


def test_excluded_modules_are_left_out_of_the_plan(tiny_model):
    model = tiny_model("bert", num_hidden_layers=11, hidden_size=4, num_attention_heads=1, intermediate_size=4)

    entries = plan(model, modules_to_not_convert=[r"layer\.1", "value"])

    assert units(entries) == [f"bert.encoder.layer.{i}" for i in range(11) if i != 1]
    assert not any(name.endswith("value") for name in entries)


def test_excluding_the_first_reader_gives_the_activation_to_the_next(tiny_model):
    entries = plan(tiny_model("bert"), modules_to_not_convert=["query"])

    attention = "bert.encoder.layer.0.attention.self"
    assert entries[f"{attention}.key"].input == entries[f"{attention}.value"].input == f"{attention}.key"


@pytest.mark.parametrize("pattern", ["act", r"layers\.0"])
def test_excluded_activation_function_stays_float(pattern):
    entries = plan_encoder(Encoder(), modules_to_not_convert=[pattern])

    assert "layers.0.act" not in entries
    if pattern == "act":
        assert entries["layers.0.down"].input == "layers.0.down"


class WritingBlock(nn.Module):
    """Two linear layers read one tensor, which is written to in between."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        y = x.clone()
        first = self.first(y)
        y.neg_()
        return first + self.second(y)


def test_readers_of_a_tensor_that_is_written_to_in_between_share_nothing():
    model = Encoder()
    model.layers = nn.ModuleList(WritingBlock() for _ in range(2))

    entries = plan_encoder(model)

    assert entries["layers.0.second"].input == "layers.0.second"


def test_excluding_everything_is_refused(tiny_model):
    with pytest.raises(ValueError, match=r"nothing to binarize.*encoder"):
        plan(tiny_model("bert"), modules_to_not_convert=["encoder"])


def test_shared_layers_are_refused_with_the_reason(tiny_model):
    with pytest.raises(ValueError, match=r"AlbertFor\w+ shares its layers.*run more than once.*not supported"):
        plan(tiny_model("albert"))


def test_one_module_twice_in_the_list_is_refused():
    model = Encoder(layers=1)
    model.layers.append(model.layers[0])

    with pytest.raises(ValueError, match="shares its layers"):
        plan_encoder(model)


def test_model_without_a_stack_is_refused_and_told_of_layer_stack():
    with pytest.raises(ValueError, match=r"Sequential has no stack of layers.*layer_stack"):
        plan(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), {"input": torch.randn(1, 4)})


def test_encoder_and_decoder_are_ambiguous():
    model = T5Model(T5Config(vocab_size=16, d_model=8, d_kv=4, d_ff=12, num_layers=2, num_heads=2))

    with pytest.raises(ValueError, match=r"several stacks.*decoder.block.*encoder.block.*layer_stack"):
        find_layer_stack(model)
    assert find_layer_stack(model, "encoder.block") == ("encoder.block", list(model.encoder.block))


def test_layer_stack_resolves_an_ambiguity():
    model = Encoder(layers=2, decoder_layers=2)

    with pytest.raises(ValueError, match="several stacks"):
        plan_encoder(model)
    assert units(plan_encoder(model, layer_stack="decoder")) == ["decoder.0", "decoder.1"]


def test_a_much_smaller_second_stack_is_not_ambiguous():
    model = Encoder(layers=12, decoder_layers=1)

    assert find_layer_stack(model)[0] == "layers"


@pytest.mark.parametrize("name", ["encoder", "layers.0"])
def test_layer_stack_that_names_no_list_is_refused_with_the_lists_there_are(name):
    with pytest.raises(ValueError, match=rf"layer_stack='{name}' names no list of layers in Encoder.*'layers'"):
        plan_encoder(Encoder(), layer_stack=name)


def test_activation_is_fused_with_the_linear_layer_that_reads_it():
    entries = plan_encoder(Encoder())

    assert entries["layers.0.down"].input == "layers.0.act"


class EndingInFunction(Block):
    """A layer whose output is that of its activation function."""

    def forward(self, x):
        return self.act(self.up(self.down(x)))


def test_function_that_ends_a_layer_is_fused_with_the_linear_layer_of_the_next():
    model = Encoder()
    model.layers = nn.ModuleList(EndingInFunction() for _ in range(2))
    for layer in model.layers:
        layer.down, layer.up = nn.Linear(8, 16), nn.Linear(16, 8)

    entries = plan_encoder(model)

    assert entries["layers.1.down"].input == "layers.0.act"


def test_name_that_no_config_may_hold_is_refused_before_training():
    class Named(nn.ModuleDict):
        def forward(self, x):
            return self["up/down"](x)

    model = Encoder()
    model.layers = nn.ModuleList(Named({"up/down": nn.Linear(8, 8)}) for _ in range(2))

    with pytest.raises(ValueError, match="name of 'layers.0.up/down' must be the name of a module"):
        plan_encoder(model)


class GatedBlock(Block):
    """A feed-forward layer in which the output of one module is read twice."""

    def __init__(self, twice: str, **kwargs) -> None:
        super().__init__(**kwargs)
        self.twice = twice
        self.gate = nn.Linear(16, 8)

    def forward(self, x):
        up = self.up(x)
        hidden = self.act(up)
        return x + self.down(hidden) + self.gate({"up": up, "act": hidden}[self.twice] * 0.5)


def test_activation_whose_output_is_also_read_elsewhere_is_not_fused():
    model = Encoder()
    model.layers = nn.ModuleList(GatedBlock("act") for _ in range(2))

    entries = plan_encoder(model)

    assert entries["layers.0.down"].input == "layers.0.down"
    assert "layers.0.act" not in entries


def test_activation_is_fused_unless_a_layer_that_stays_float_reads_it_too():
    class TwoReaders(Block):
        def __init__(self, **kwargs) -> None:
            super().__init__(**kwargs)
            self.other = nn.Linear(16, 8)

        def forward(self, x):
            hidden = self.act(self.up(x))
            return self.down(hidden) + self.other(hidden)

    model = Encoder()
    model.layers = nn.ModuleList(TwoReaders() for _ in range(2))

    assert plan_encoder(model)["layers.0.down"].input == "layers.0.act"
    entries = plan_encoder(model, modules_to_not_convert=["other"])
    assert entries["layers.0.down"].input == "layers.0.down"


def test_linear_layer_whose_output_is_also_read_elsewhere_is_no_input_of_the_activation():
    model = Encoder()
    model.layers = nn.ModuleList(GatedBlock("up") for _ in range(2))

    entries = plan_encoder(model)

    assert entries["layers.0.down"].input == "layers.0.act"
    assert entries["layers.0.act"].input is None


class FunctionalDropout(nn.Module):
    def forward(self, x):
        return F.dropout(x, 0.1, self.training)


@pytest.mark.parametrize("dropout", [nn.Dropout(0.1), FunctionalDropout()], ids=["module", "function"])
def test_dropout_behind_the_activation_prevents_fusing(dropout):
    entries = plan_encoder(Encoder(between=dropout))

    assert entries["layers.0.down"].input == "layers.0.down"
    assert "layers.0.act" not in entries


def test_activation_that_is_not_elementwise_is_not_fused():
    model = Encoder()
    for layer in model.layers:
        layer.act = nn.Softmax(-1)

    assert plan_encoder(model)["layers.0.down"].input == "layers.0.down"


def test_one_activation_module_used_by_all_layers_is_not_fused():
    model = Encoder()
    model.layers[1].act = model.layers[0].act

    entries = plan_encoder(model)

    assert {entry.kind for entry in entries.values()} == {"linear"}


def test_planning_keeps_mode_hooks_and_random_state(tiny_model):
    model = tiny_model("bert").train()
    model.bert.encoder.layer[0].eval()
    modes = {name: module.training for name, module in model.named_modules()}
    before = torch.get_rng_state()

    plan(model)

    assert {name: module.training for name, module in model.named_modules()} == modes
    assert torch.equal(torch.get_rng_state(), before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_embeddings_and_decoder_of_a_tied_model_stay_out(tiny_model):
    entries = plan(tiny_model("bert", AutoModelForMaskedLM))

    assert all(name.startswith("bert.encoder.layer.") for name in entries)


def test_binary_word_embeddings_are_a_unit_before_the_first_layer(tiny_model):
    entries = plan(tiny_model("bert"), word_embeddings="binary")

    assert units(entries)[:2] == ["bert.embeddings.word_embeddings", "bert.encoder.layer.0"]


def test_binary_word_embeddings_of_a_tied_model_are_refused(tiny_model):
    with pytest.raises(ValueError, match=r"word_embeddings.weight is tied to .*decoder.*word_embeddings='float'"):
        plan(tiny_model("bert", AutoModelForMaskedLM), word_embeddings="binary")


def test_binary_word_embeddings_of_a_vision_model_are_refused(tiny_model):
    with pytest.raises(ValueError, match="input embeddings of ViTForImageClassification"):
        plan(tiny_model("vit"), word_embeddings="binary")


def test_tied_linear_layers_are_refused(tiny_model):
    model = tiny_model("bert")
    model.bert.encoder.layer[1].output.dense.weight = model.bert.encoder.layer[0].output.dense.weight

    with pytest.raises(ValueError, match=r"layer.0.output.dense.weight is tied to .*layer.1.*modules_to_not_convert"):
        plan(model)


def test_no_example_for_unknown_inputs():
    with pytest.raises(ValueError, match=r"Encoder takes .*example_inputs="):
        example_inputs(Encoder())
