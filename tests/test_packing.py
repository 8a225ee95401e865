from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor

from hf_stompp import StoMPPConfig, binarize, commit, pack, unpack
from hf_stompp.model.modules import masked_modules, packed_modules
from hf_stompp.nn import MaskedBinaryActivation, PackedBinaryLinear


CONFIGS = {
    "bnn": {},
    "bnn-zero_one": {"feed_forward_levels": "zero_one"},
    "bnn-tensor_scale": {"weight_scale": "tensor"},
    "bnn-no_scale": {"weight_scale": "none"},
    "bnn-centered": {"weight_scale": "tensor", "weight_center": "tensor"},
    "bnn-fixed": {"activation_scale": "fixed", "activation_shift": "fixed"},
    "bnn-no_shift": {"activation_shift": "none"},
    "bnn-zero_one-no_shift": {"feed_forward_levels": "zero_one", "activation_shift": "none"},
    "bnn-embeddings": {"word_embeddings": "binary"},
    "bnn-int8_embeddings": {"word_embeddings": "int8"},
    "bwn": {"mode": "bwn"},
    "bwn-tensor_scale": {"mode": "bwn", "weight_scale": "tensor"},
    "bwn-no_scale": {"mode": "bwn", "weight_scale": "none"},
    "bwn-centered": {"mode": "bwn", "weight_center": "row"},
    "bwn-embeddings": {"mode": "bwn", "word_embeddings": "binary"},
    "bwn-int8_embeddings": {"mode": "bwn", "word_embeddings": "int8"},
    "bwn-float_inputs": {"mode": "bwn", "activation_bits": None},
    "mixed-attention": {"modes": {"attention|attn": "bwn"}},
    "mixed-layers": {"mode": "bwn", "modes": {r"layers?\.0": "bnn"}},
    "mixed-float": {"modes": {"attention|attn": "float", r"layers?\.1\.(?!attention|attn).*": "bwn"}},
}
all_configs = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def config_for(family: str, config: dict) -> StoMPPConfig:
    # A vision model has no word embeddings.
    is_vision = family == "vit"
    return StoMPPConfig(**{name: v for name, v in config.items() if not (is_vision and name == "word_embeddings")})


def assert_same_state(model: torch.nn.Module, other: torch.nn.Module) -> None:
    expected, state = other.state_dict(), model.state_dict()
    assert list(state) == list(expected)
    for name, value in expected.items():
        assert state[name].dtype == value.dtype and torch.equal(state[name], value), name


@all_configs
def test_packed_logits_are_the_committed_ones_bit_for_bit(tiny_committed, logits, family, config):
    model = tiny_committed(family, config_for(family, config))

    packed = pack(model)

    assert type(packed) is type(model)
    assert not packed.training
    for batch, length in ((2, 10), (1, 1), (5, 7)):
        assert torch.equal(
            logits(packed, family, batch=batch, length=length), logits(model, family, batch=batch, length=length)
        )


def test_packed_logits_are_those_of_the_trainable_arithmetic_up_to_rounding(tiny_committed, tiny_inputs, family):
    model = tiny_committed(family)

    # With gradients, the committed model computes with float levels instead of integers.
    expected = model(**tiny_inputs(family)).logits.detach()

    torch.testing.assert_close(pack(model)(**tiny_inputs(family)).logits, expected, atol=1e-4, rtol=1e-4)


class PackedBert:
    """A packed BERT encoder in float64 NumPy, from the tensors in its state dict alone."""

    def __init__(self, state: dict[str, Tensor], config) -> None:
        self.state = {name: tensor.numpy() for name, tensor in state.items()}
        self.heads, self.eps = config.num_attention_heads, config.layer_norm_eps
        self.plan = config.quantization_config.plan
        self.activation_bits = config.quantization_config.activation_bits

    def rounded(self, x: np.ndarray) -> np.ndarray:
        """Float inputs, of which each row is rounded to its own 255 levels."""
        if self.activation_bits is None:
            return x
        step = np.abs(x).max(-1, keepdims=True) / 127
        return np.round(x / step) * step

    def signs(self, x: np.ndarray, name: str) -> np.ndarray:
        return np.where(x >= self.state[f"{name}.threshold"], 1.0, -1.0)

    def linear(self, x: np.ndarray, name: str) -> np.ndarray:
        """Of a binary input, if the layer has one; that of the feed-forward activation comes signed."""
        entry = self.plan.get(name)
        if entry is None:
            return x @ self.state[f"{name}.weight"].T.astype(np.float64) + self.state[f"{name}.bias"]
        source = entry.input
        if source is None:
            x = self.rounded(x)
        elif self.plan[source].is_linear:
            x = self.signs(x, f"{source}.input_activation")
        packed, scale, bias = (self.state[f"{name}.{tensor}"] for tensor in ("packed_weight", "scale", "bias"))
        bits = np.unpackbits(packed, axis=1, bitorder="little")[:, : x.shape[-1]]
        return x @ (2.0 * bits - 1).T * scale.astype(np.float64) + bias

    def norm(self, x: np.ndarray, name: str) -> np.ndarray:
        centered = x - x.mean(-1, keepdims=True)
        normal = centered / np.sqrt((centered**2).mean(-1, keepdims=True) + self.eps)
        return normal * self.state[f"{name}.weight"] + self.state[f"{name}.bias"]

    def attention(self, x: np.ndarray, mask: np.ndarray, name: str) -> np.ndarray:
        batch, length, hidden = x.shape
        query, key, value = (
            self.linear(x, f"{name}.self.{part}").reshape(batch, length, self.heads, -1).transpose(0, 2, 1, 3)
            for part in ("query", "key", "value")
        )
        scores = query @ key.transpose(0, 1, 3, 2) / np.sqrt(hidden // self.heads)
        scores = np.where(mask[:, None, None, :] == 1, scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        context = (weights @ value).transpose(0, 2, 1, 3).reshape(batch, length, hidden)
        return self.norm(self.linear(context, f"{name}.output.dense") + x, f"{name}.output.LayerNorm")

    def layer(self, x: np.ndarray, mask: np.ndarray, name: str) -> np.ndarray:
        x = self.attention(x, mask, f"{name}.attention")
        inner = self.linear(x, f"{name}.intermediate.dense")
        if f"{name}.intermediate.intermediate_act_fn" in self.plan:
            inner = self.signs(inner, f"{name}.intermediate.intermediate_act_fn")
        else:
            inner = torch.nn.functional.gelu(torch.from_numpy(inner)).numpy()
        return self.norm(self.linear(inner, f"{name}.output.dense") + x, f"{name}.output.LayerNorm")


@pytest.mark.parametrize(
    "config",
    [
        *({}, {"feed_forward_levels": "zero_one"}, {"weight_scale": "tensor"}, {"mode": "bwn"}),
        {"mode": "bwn", "activation_bits": None},
        {"modes": {"attention": "bwn"}, "activation_bits": None},
        {"modes": {"query": "bwn"}},
        {"modes": {"query": "float", "key": "bwn"}},
        {"modes": {"intermediate": "bwn"}},
        {"modes": {r"(?<!attention\.)output": "bwn"}},
        {"modes": {r"layer\.0": "bwn", r"layer\.1\.intermediate": "float"}},
    ],
    ids=str,
)
def test_packed_bert_layers_equal_a_float64_reference_of_the_saved_tensors(tiny_packed, tiny_inputs, config):
    packed = tiny_packed("bert", StoMPPConfig(**config))
    inputs = tiny_inputs("bert", batch=3)

    with torch.no_grad():
        states = packed(**inputs, output_hidden_states=True).hidden_states

    reference = PackedBert(packed.state_dict(), packed.config)
    for i in range(2):
        # Each layer from the model's own input: a rounded value at a threshold would change what follows.
        expected = reference.layer(
            states[i].double().numpy(), inputs["attention_mask"].numpy(), f"bert.encoder.layer.{i}"
        )
        np.testing.assert_allclose(states[i + 1].numpy(), expected, atol=1e-5, rtol=1e-5)


def test_word_embeddings_equal_a_float64_reference_of_the_saved_tensors(tiny_committed):
    model = tiny_committed("bert", StoMPPConfig(word_embeddings="binary"))
    table = model.bert.embeddings.word_embeddings.weight.detach().double().numpy()
    packed = pack(model)

    state = packed.bert.embeddings.word_embeddings.state_dict()
    bits = np.unpackbits(state["packed_weight"].numpy(), axis=1, bitorder="little")
    assert set(state) == {"packed_weight", "scale"}
    assert (bits[:, :36] == (table >= 0)).all()
    assert not bits[:, 36:].any()
    np.testing.assert_allclose(state["scale"].numpy(), np.abs(table).mean(1), rtol=1e-6)
    ids = torch.tensor([[0, 3, 63]])
    expected = (2.0 * bits[ids[0], :36] - 1) * state["scale"].numpy()[ids[0]][:, None]
    np.testing.assert_allclose(packed.bert.embeddings.word_embeddings(ids)[0].numpy(), expected, rtol=1e-6)


def test_int8_word_embeddings_equal_a_float64_reference_and_pass_their_gradient_straight_through(tiny_committed):
    model = tiny_committed("bert", StoMPPConfig(word_embeddings="int8"))
    latent = model.bert.embeddings.word_embeddings
    with torch.no_grad():
        latent.weight[7] = 0
        # Halves of a step: to the even code.
        latent.weight[8] = torch.tensor([127.0, 0.5, 1.5, -2.5] * 9)
    table = latent.weight.detach().double().numpy()
    step = np.abs(table).max(1, keepdims=True) / 127
    codes = np.divide(table, step, out=np.zeros_like(table), where=step > 0).round()
    packed = pack(model).bert.embeddings.word_embeddings
    state = packed.state_dict()
    assert set(state) == {"int8_weight", "scale"} and state["int8_weight"].dtype == torch.int8
    # A quotient near a half may fall to either side in float32.
    assert (np.abs(state["int8_weight"].numpy() - codes) <= 1).all()
    assert (state["int8_weight"].numpy() == codes).mean() > 0.99
    assert state["int8_weight"][8, :4].tolist() == [127, 0, 2, -2] and not state["int8_weight"][7].any()
    np.testing.assert_allclose(state["scale"].numpy(), step[:, 0], rtol=1e-6)
    ids = torch.tensor([[5, 7, 8, 63]])
    np.testing.assert_allclose(packed(ids)[0].numpy(), table[ids[0]], atol=step[ids[0]].max() / 2 * 1.001)
    rows = latent.train()(ids)
    assert torch.equal(latent.eval()(ids), packed(ids)) and torch.equal(rows, packed(ids))
    rows.backward(torch.arange(float(rows.numel())).reshape(rows.shape))
    np.testing.assert_array_equal(latent.weight.grad[ids[0]].numpy().ravel(), np.arange(rows.numel()))


def test_int8_word_embeddings_take_no_part_in_the_progression(tiny_committed):
    config = tiny_committed("bert", StoMPPConfig(word_embeddings="int8")).config.quantization_config
    assert config.plan["bert.embeddings.word_embeddings"].kind == "int8_embedding"
    assert config.units == ["bert.encoder.layer.0", "bert.encoder.layer.1"]


def test_pack_leaves_the_model_as_it_was(tiny_committed, logits):
    model = tiny_committed("bert", StoMPPConfig(word_embeddings="binary"))
    before, expected = copy.deepcopy(model), logits(model)

    packed = pack(model)
    for tensor in packed.state_dict().values():
        tensor.zero_()

    assert_same_state(model, before)
    assert torch.equal(logits(model), expected)
    assert model.config.quantization_config.state == "latent"
    assert model.hf_quantizer.quantization_config.state == "latent"


def test_unpack_leaves_the_model_as_it_was(tiny_packed, logits):
    model = tiny_packed("bert", StoMPPConfig(feed_forward_levels="zero_one", word_embeddings="binary"))
    before, expected = copy.deepcopy(model), logits(model)

    latent = unpack(model)
    with torch.no_grad():
        for tensor in latent.state_dict().values():
            tensor.zero_()

    assert_same_state(model, before)
    assert torch.equal(logits(model), expected)
    assert model.config.quantization_config.to_dict() == before.config.quantization_config.to_dict()


def test_pack_refuses_a_model_that_is_not_committed_and_names_the_units(tiny_committed):
    model = tiny_committed("bert", StoMPPConfig(unit="sublayer", word_embeddings="binary"))
    modules = masked_modules(model)
    modules["bert.encoder.layer.1.output.dense"].freeze_mask[-1, -1] = False
    modules["bert.embeddings.word_embeddings"].freeze_mask[0, 0] = False

    units = r"bert.embeddings.word_embeddings, bert.encoder.layer.1.intermediate\+output\."
    with pytest.raises(ValueError, match=rf"these units are not: {units}.*commit"):
        pack(model)


def test_pack_refuses_a_free_activation_behind_committed_weights(tiny_committed):
    model = tiny_committed("bert")
    masked_modules(model)["bert.encoder.layer.0.intermediate.intermediate_act_fn"].freeze_mask[3] = False

    with pytest.raises(ValueError, match=r"these units are not: bert.encoder.layer.0\."):
        pack(model)


def test_pack_refuses_activations_that_saw_no_batch(tiny_model):
    with pytest.raises(ValueError, match=r"query.input_activation has no scale yet.*run the model"):
        pack(commit(binarize(tiny_model("bert"))))


def test_pack_of_bwn_needs_no_batch(tiny_model, logits):
    model = commit(binarize(tiny_model("bert"), StoMPPConfig(mode="bwn")))

    assert torch.equal(logits(pack(model)), logits(model))


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ({}, "bert.encoder.layer.1.output.dense.weight"),
        ({}, "bert.encoder.layer.1.output.dense.bias"),
        ({}, "bert.encoder.layer.0.intermediate.intermediate_act_fn.threshold"),
        ({}, "bert.encoder.layer.0.intermediate.dense.input_activation.scale"),
        ({"activation_scale": "fixed"}, "bert.encoder.layer.0.intermediate.dense.input_activation.scale"),
        ({"activation_shift": "fixed"}, "bert.encoder.layer.0.intermediate.dense.input_activation.shift"),
        ({"word_embeddings": "binary"}, "bert.embeddings.word_embeddings.weight"),
        ({}, "bert.encoder.layer.0.output.LayerNorm.weight"),
    ],
    ids=["weight", "bias", "threshold", "scale", "fixed-scale", "fixed-shift", "embedding", "LayerNorm"],
)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_pack_refuses_tensors_that_are_not_finite_and_names_them(tiny_committed, config, name, value):
    model = tiny_committed("bert", StoMPPConfig(**config))
    model.state_dict()[name].flatten()[-1] = value

    with pytest.raises(ValueError, match=rf"{name} holds NaN or infinity"):
        pack(model)


def test_pack_of_a_packed_model_is_refused(tiny_packed):
    with pytest.raises(ValueError, match="packed already"):
        pack(tiny_packed("bert"))


def test_unpack_of_a_latent_model_is_refused(tiny_committed):
    with pytest.raises(ValueError, match="is not packed"):
        unpack(tiny_committed("bert"))


@all_configs
def test_pack_of_unpack_gives_the_same_bits(tiny_packed, logits, family, config):
    packed = tiny_packed(family, config_for(family, config))

    latent = unpack(packed)

    assert torch.equal(logits(latent, family), logits(packed, family))
    assert_same_state(pack(latent), packed)


@pytest.mark.parametrize("name", ["bert", "modernbert", "deberta_v2"])
@pytest.mark.parametrize(
    "config",
    [{}, {"feed_forward_levels": "zero_one", "word_embeddings": "binary"}, {"word_embeddings": "int8"}],
    ids=["bnn", "01", "int8"],
)
def test_unpacked_model_survives_the_disk(tiny_packed, tmp_path, name, config):
    packed = tiny_packed(name, StoMPPConfig(**config))
    latent = unpack(packed)
    latent.save_pretrained(tmp_path)

    loaded = type(packed).from_pretrained(tmp_path)

    assert_same_state(loaded, latent)
    assert_same_state(pack(loaded), packed)


@all_configs
def test_unpacked_model_computes_the_same_with_gradients(tiny_packed, tiny_inputs, config):
    # With gradients, float inputs are not rounded.
    packed = tiny_packed("bert", StoMPPConfig(**{**config, "activation_bits": None}))
    expected = packed(**tiny_inputs("bert")).logits

    output = unpack(packed)(**tiny_inputs("bert")).logits

    torch.testing.assert_close(output.detach(), expected.detach(), atol=1e-4, rtol=1e-4)
    assert output.requires_grad


@pytest.mark.parametrize(
    "config", [{}, {"mode": "bwn"}, {"word_embeddings": "binary"}], ids=["bnn", "bwn", "embeddings"]
)
def test_unpacked_half_precision_model_trains(tiny_packed, tiny_inputs, config):
    model = unpack(tiny_packed("bert", StoMPPConfig(**config), dtype=torch.bfloat16)).train()

    model(**tiny_inputs("bert"), labels=torch.tensor([0, 1])).loss.backward()

    assert bool(torch.isfinite(model.bert.encoder.layer[0].output.dense.weight.grad).all())


def test_unpack_refuses_int8_word_embeddings_in_half_precision(tiny_packed):
    packed = tiny_packed("bert", StoMPPConfig(word_embeddings="int8"), dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="word_embeddings is torch.bfloat16.*dtype=torch.float32 to unpack"):
        unpack(packed)


@pytest.mark.parametrize("kind", ["int8", "binary"])
def test_packed_word_embeddings_refuse_an_id_out_of_range(tiny_packed, kind):
    table = tiny_packed("bert", StoMPPConfig(word_embeddings=kind)).bert.embeddings.word_embeddings
    with pytest.raises(IndexError):
        table(torch.tensor([64]))
    if kind == "int8":
        with pytest.raises(IndexError):
            table(torch.tensor([-1]))


def test_unpack_gives_the_activation_function_and_the_padding_row_back(tiny_packed):
    latent = unpack(tiny_packed("bert", StoMPPConfig(word_embeddings="binary")))

    activation = latent.bert.encoder.layer[0].intermediate.intermediate_act_fn
    assert isinstance(activation, MaskedBinaryActivation)
    assert type(activation.activation).__name__ == "GELUActivation"
    assert latent.bert.embeddings.word_embeddings.padding_idx == latent.config.pad_token_id


def test_copy_of_a_packed_model_shares_nothing_with_it(tiny_packed, logits):
    packed = tiny_packed("bert")
    expected = logits(packed)

    copied = copy.deepcopy(packed)

    attention = copied.bert.encoder.layer[0].attention.self
    assert attention.query.input_activation is attention.key.input_activation is attention.value.input_activation
    assert torch.equal(logits(copied), expected)
    for module in packed_modules(copied).values():
        for buffer in module.buffers():
            buffer.zero_()
    assert torch.equal(logits(packed), expected)
    assert not torch.equal(logits(copied), expected)


def test_packed_model_survives_pickle_of_its_state_dict(tiny_packed, tmp_path, logits):
    packed = tiny_packed("bert")
    expected = logits(packed)
    torch.save(packed.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    for module in packed_modules(packed).values():
        for buffer in module.buffers(recurse=False):
            buffer.zero_()

    packed.load_state_dict(state)

    assert torch.equal(logits(packed), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@all_configs
def test_half_precision_models_pack_exactly(tiny_model, tiny_inputs, logits, dtype, config):
    model = binarize(tiny_model("bert").to(dtype), StoMPPConfig(**config))
    logits(model)
    commit(model)

    packed = pack(model)

    assert torch.equal(logits(packed), logits(model))
    linears = [module for module in packed.modules() if isinstance(module, PackedBinaryLinear)]
    assert {module.packed_weight.dtype for module in linears} == {torch.uint8}
    assert {module.scale.dtype for module in linears} == {torch.float32}
    if config.get("word_embeddings") != "int8":
        # Which unpack refuses in half precision.
        assert_same_state(pack(unpack(packed)), packed)


@pytest.mark.parametrize("zero", [0.0, -0.0], ids=["+0", "-0"])
@pytest.mark.parametrize("config", [{}, {"mode": "bwn"}], ids=["bnn", "bwn"])
def test_zero_weights_pack_as_plus_one(tiny_committed, logits, config, zero):
    model = tiny_committed("bert", StoMPPConfig(**config))
    with torch.no_grad():
        model.bert.encoder.layer[0].output.dense.weight[:, ::3] = zero
        model.bert.encoder.layer[1].output.dense.weight[2] = zero

    packed = pack(model)

    bits = packed.bert.encoder.layer[0].output.dense.packed_weight.numpy()
    assert np.unpackbits(bits, axis=1, bitorder="little")[:, :76:3].all()
    assert packed.bert.encoder.layer[1].output.dense.scale[2] == 0
    assert torch.equal(logits(packed), logits(model))


@pytest.mark.usefixtures("permissions_hold")
def test_saving_to_a_read_only_folder_says_so_and_leaves_the_model_that_is_there(tiny_committed, tmp_path):
    committed = tiny_committed("bert")
    committed.save_pretrained(tmp_path / "model")
    (tmp_path / "model").chmod(0o555)
    (tmp_path / "model" / "config.json").chmod(0o444)
    before = {path: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    tmp_path.chmod(0o555)
    for model in (committed, pack(committed)):
        for name in ("model", "new"):
            with pytest.raises(PermissionError, match=f"{tmp_path}/{name}"):
                model.save_pretrained(tmp_path / name)
    assert {path: path.read_bytes() for path in (tmp_path / "model").iterdir()} == before
