from __future__ import annotations

import gc
import json
import math
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)
from transformers.core_model_loading import WeightRenaming

from hf_stompp import StoMPPConfig, binarize, commit, pack
from hf_stompp.config import FORMAT_VERSION
from hf_stompp.model import quantizer
from hf_stompp.model.checkpoint import guard_name, leave_files
from hf_stompp.model.modules import first_nonfinite, masked_modules, packed_modules
from hf_stompp.nn import (
    MaskedBinaryActivation,
    PackedBinaryActivation,
    PackedBinaryEmbedding,
    PackedBinaryLinear,
    PackedInt8Embedding,
)


TEXT_FAMILIES = ("bert", "roberta", "distilbert", "electra", "deberta_v2", "mpnet", "modernbert")
LAYER = "bert.encoder.layer.1"
load = AutoModelForSequenceClassification.from_pretrained


def read(file: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    with safe_open(file, framework="pt") as handle:
        return {name: handle.get_tensor(name).clone() for name in handle.keys()}, handle.metadata()


def edit_tensors(folder: Path, edit: Callable[[dict], None], keep_digests: bool = True) -> None:
    tensors, metadata = read(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata=metadata if keep_digests else {"format": "pt"})


def edit_config(folder: Path, edit: Callable[[dict], None]) -> None:
    config = json.loads((folder / "config.json").read_text())
    edit(config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config))


def assert_same_state(model: torch.nn.Module, other: torch.nn.Module) -> None:
    expected, state = other.state_dict(), model.state_dict()
    assert list(state) == list(expected)
    for name, value in expected.items():
        assert state[name].dtype == value.dtype and torch.equal(state[name], value), name
    # Position ids and rotary frequencies are not in the file: they must be computed anew.
    buffers = dict(model.named_buffers())
    for name, value in other.named_buffers():
        assert torch.equal(buffers[name], value), name


@pytest.fixture
def packed_folder(tiny_packed, tmp_path) -> Path:
    tiny_packed("bert").save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture
def latent_folder(tiny_committed, tmp_path) -> Path:
    tiny_committed("bert").save_pretrained(tmp_path)
    return tmp_path


# Round trips


@pytest.mark.parametrize("config", [{}, {"mode": "bwn"}], ids=["bnn", "bwn"])
@pytest.mark.parametrize("state", ["latent", "packed"])
def test_saved_and_loaded_model_is_the_same_bit_for_bit(tiny_committed, logits, tmp_path, family, state, config):
    model = tiny_committed(family, StoMPPConfig(**config))
    model = pack(model) if state == "packed" else model
    model.save_pretrained(tmp_path)

    loaded = type(model).from_pretrained(tmp_path)

    assert_same_state(loaded, model)
    assert torch.equal(logits(loaded, family), logits(model, family))
    assert loaded.config.quantization_config.to_dict() == model.config.quantization_config.to_dict()
    assert not loaded.training


@pytest.mark.parametrize("name", TEXT_FAMILIES)
@pytest.mark.parametrize("state", ["latent", "packed"])
@pytest.mark.parametrize("kind", ["int8", "binary"])
def test_small_word_embeddings_are_saved_and_loaded(tiny_committed, logits, tmp_path, name, state, kind):
    model = tiny_committed(name, StoMPPConfig(word_embeddings=kind))
    model = pack(model) if state == "packed" else model
    model.save_pretrained(tmp_path)

    loaded = load(tmp_path)

    assert_same_state(loaded, model)
    assert torch.equal(logits(loaded, name), logits(model, name))


@pytest.mark.parametrize("kind", ["int8", "binary"])
def test_small_word_embeddings_that_a_head_shares_are_refused_on_loading(tiny_committed, tmp_path, kind):
    tiny_committed("bert", StoMPPConfig(word_embeddings=kind)).bert.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"word_embeddings.weight is tied to .*decoder.*word_embeddings='float'"):
        AutoModelForMaskedLM.from_pretrained(tmp_path)


def test_half_trained_model_keeps_its_masks_and_flags(tiny_model, logits, tmp_path):
    model = binarize(tiny_model("bert"))
    logits(model)
    for index, module in enumerate(masked_modules(model).values()):
        if index % 3:
            module.freeze_mask.copy_(torch.rand(module.freeze_mask.shape) < 0.5)
        else:
            module.commit()
        module.refresh_flags()
    model.save_pretrained(tmp_path)

    loaded = load(tmp_path)

    assert_same_state(loaded, model)
    flags = [{n: m.committed for n, m in masked_modules(m).items()} for m in (loaded, model)]
    assert flags[0] == flags[1]
    assert set(flags[0].values()) == {True, False}
    assert torch.equal(logits(loaded), logits(model))


def test_loaded_model_that_saw_no_batch_initialises_from_the_first(tiny_model, logits, tmp_path):
    model = binarize(tiny_model("bert"))
    model.save_pretrained(tmp_path)

    loaded = load(tmp_path)

    assert not any(m.initialized for m in loaded.modules() if isinstance(m, MaskedBinaryActivation))
    assert torch.equal(logits(loaded), logits(model))
    assert_same_state(loaded, model)


def test_loaded_latent_model_is_trainable(latent_folder, tiny_inputs):
    model = load(latent_folder).train()

    model(**tiny_inputs("bert"), labels=torch.tensor([0, 1])).loss.backward()

    weights = [module.weight for module in masked_modules(model).values() if hasattr(module, "weight")]
    assert weights
    assert all(weight.requires_grad and bool(weight.grad.any()) for weight in weights)


def test_layers_share_activations_after_loading(packed_folder):
    attention = load(packed_folder).bert.encoder.layer[0].attention.self

    assert attention.query.input_activation is attention.key.input_activation is attention.value.input_activation


@pytest.mark.parametrize("state", ["latent", "packed"])
def test_sharded_checkpoint_loads(tiny_committed, tmp_path, state):
    model = tiny_committed("bert")
    model = pack(model) if state == "packed" else model
    model.save_pretrained(tmp_path, max_shard_size="10KB")

    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert_same_state(load(tmp_path), model)


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}], ids=["cpu", "auto", "dict"])
@pytest.mark.parametrize("state", ["latent", "packed"])
def test_device_map_loads(tiny_committed, logits, tmp_path, state, device_map):
    model = tiny_committed("bert")
    model = pack(model) if state == "packed" else model
    model.save_pretrained(tmp_path)

    loaded = load(tmp_path, device_map=device_map)

    assert_same_state(loaded, model)
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("state", ["latent", "packed"])
def test_second_round_trip_writes_the_same_files(tiny_committed, tmp_path, state):
    model = tiny_committed("bert", StoMPPConfig(word_embeddings="binary"))
    model = pack(model) if state == "packed" else model
    model.save_pretrained(tmp_path / "first")

    load(tmp_path / "first").save_pretrained(tmp_path / "second")

    assert read(tmp_path / "first/model.safetensors")[1] == read(tmp_path / "second/model.safetensors")[1]
    first, second = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("first", "second"))
    assert first == second
    assert_same_state(load(tmp_path / "second"), model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize(
    "config",
    [{}, {"mode": "bwn"}, {"mode": "bwn", "word_embeddings": "binary"}, {"mode": "bwn", "word_embeddings": "int8"}],
    ids=["bnn", "bwn", "embeddings", "int8"],
)
def test_packed_model_in_half_precision_keeps_bits_and_scales(tiny_packed, logits, tmp_path, dtype, config):
    packed = tiny_packed("bert", StoMPPConfig(**config))
    packed.save_pretrained(tmp_path)

    loaded = load(tmp_path, dtype=dtype)

    modules, originals = packed_modules(loaded), packed_modules(packed)
    for name, module in modules.items():
        if isinstance(module, PackedBinaryActivation):
            assert module.threshold.dtype == torch.float32
        else:
            stored = "int8_weight" if isinstance(module, PackedInt8Embedding) else "packed_weight"
            assert torch.equal(getattr(module, stored), getattr(originals[name], stored))
        if isinstance(module, PackedBinaryLinear):
            assert module.scale.dtype == module.bias.dtype == torch.float32
            assert torch.equal(module.scale, originals[name].scale)
        if isinstance(module, PackedBinaryEmbedding | PackedInt8Embedding):
            assert module.scale.dtype == dtype
    output = logits(loaded)
    assert output.dtype == dtype
    assert bool(torch.isfinite(output).all())
    if config:
        torch.testing.assert_close(output.float(), logits(packed), atol=0.1, rtol=0.05)


def test_dtype_auto_keeps_the_saved_dtypes(tiny_packed, logits, tmp_path):
    packed = tiny_packed("bert", dtype=torch.bfloat16)
    packed.save_pretrained(tmp_path)

    loaded = load(tmp_path, dtype="auto")

    assert_same_state(loaded, packed)
    assert torch.equal(logits(loaded), logits(packed))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_latent_model_in_half_precision_keeps_float32_activation_scales(latent_folder, logits, dtype):
    loaded = load(latent_folder, dtype=dtype)

    activations = [module for module in loaded.modules() if isinstance(module, MaskedBinaryActivation)]
    assert {tensor.dtype for m in activations for tensor in (m.scale, m.shift, m.threshold)} == {torch.float32}
    assert {module.freeze_mask.dtype for module in masked_modules(loaded).values()} == {torch.bool}
    assert bool(torch.isfinite(logits(loaded)).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_packed_model_cast_after_loading_is_the_one_loaded_so(packed_folder, logits, dtype):
    # Trainer's bf16_full_eval casts. What decides signs, and scales, are not rounded by it.
    model = load(packed_folder).to(dtype)

    assert_same_state(model, load(packed_folder, dtype=dtype))
    assert torch.equal(logits(model), logits(load(packed_folder, dtype=dtype)))


def test_tied_masked_language_model_is_saved_and_loaded(tiny_packed, logits, tmp_path):
    packed = tiny_packed("bert", auto_class=AutoModelForMaskedLM)
    packed.save_pretrained(tmp_path)

    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path)

    assert loaded.cls.predictions.decoder.weight is loaded.bert.embeddings.word_embeddings.weight
    assert torch.equal(logits(loaded), logits(packed))


# What is in the files


def test_packed_file_holds_no_float_weights_of_the_encoder(packed_folder):
    tensors, _ = read(packed_folder / "model.safetensors")

    encoder = {name: tensor for name, tensor in tensors.items() if name.startswith("bert.encoder.")}
    # What stops a process that cannot read it: see test_hub.py.
    assert encoder.pop(guard_name(load(packed_folder))).numel() == 0
    assert {tensor.dtype for tensor in encoder.values() if tensor.dim() > 1} == {torch.uint8}
    kinds = {name.rsplit(".", 1)[1] for name in encoder if "LayerNorm" not in name}
    assert kinds == {"packed_weight", "scale", "bias", "threshold"}


def test_config_holds_plain_json_that_gives_the_same_config_back(packed_folder, tiny_packed):
    saved = json.loads((packed_folder / "config.json").read_text())["quantization_config"]

    config = tiny_packed("bert").config.quantization_config
    assert StoMPPConfig.from_dict(saved).to_dict() == saved == config.to_dict()
    assert saved["state"] == "packed"
    assert saved["format_version"] == 1
    assert [entry["name"] for entry in saved["modules"]] == list(config.plan)


def test_every_tensor_has_a_digest_in_every_shard(tiny_packed, tmp_path):
    tiny_packed("bert").save_pretrained(tmp_path, max_shard_size="10KB")

    for shard in tmp_path.glob("*.safetensors"):
        tensors, metadata = read(shard)
        assert metadata["format"] == "pt"
        assert {f"sha256:{name}" for name in tensors} <= set(metadata)


@pytest.mark.parametrize("at_loading", [False, True], ids=["binarize", "quantization_config"])
def test_gamma_and_beta_of_old_checkpoints_are_saved_as_weight_and_bias(tiny_model, logits, tmp_path, at_loading):
    # bert-base-uncased is such a checkpoint. Trainer resumes with load_state_dict, which knows no renaming.
    tiny_model("bert").save_pretrained(tmp_path / "old")

    def rename(tensors: dict) -> None:
        for name in [name for name in tensors if "LayerNorm" in name]:
            new = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
            tensors[new] = tensors.pop(name)

    edit_tensors(tmp_path / "old", rename)
    if at_loading:
        model = load(tmp_path / "old", quantization_config=StoMPPConfig())
    else:
        model = binarize(load(tmp_path / "old"))
    assert torch.equal(model.bert.embeddings.LayerNorm.weight, tiny_model("bert").bert.embeddings.LayerNorm.weight)
    logits(model)
    commit(model)

    model.save_pretrained(tmp_path / "new")

    assert set(read(tmp_path / "new/model.safetensors")[0]) == set(model.state_dict())
    assert_same_state(load(tmp_path / "new"), model)
    pack(model).save_pretrained(tmp_path / "packed")
    assert torch.equal(logits(load(tmp_path / "packed")), logits(model))


# Loading in a fresh process


PROGRAM = """
import sys
if sys.argv[2] == "import":
    import hf_stompp
import torch
from transformers import AutoModelForSequenceClassification
model = AutoModelForSequenceClassification.from_pretrained(sys.argv[1])
print(type(model.bert.encoder.layer[0].output.dense).__name__)
with torch.no_grad():
    print(model(input_ids=torch.arange(3, 11).unsqueeze(0)).logits.tolist())
"""


def run_fresh(folder: Path, what: str) -> tuple[list[str], str]:
    command = [sys.executable, "-c", PROGRAM, str(folder), what]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode == 0) == (what == "import"), done.stderr
    return done.stdout.splitlines(), done.stderr


@pytest.mark.slow
def test_fresh_process_that_imports_the_package_loads(packed_folder):
    (layer, output), _ = run_fresh(packed_folder, "import")

    with torch.no_grad():
        expected = load(packed_folder)(input_ids=torch.arange(3, 11).unsqueeze(0)).logits
    assert layer == "PackedBinaryLinear"
    assert torch.equal(torch.tensor(json.loads(output)), expected)


@pytest.mark.slow
def test_fresh_process_that_does_not_import_the_package_gets_no_random_model(packed_folder):
    # Transformers has no plug-in discovery, and would go on after a warning: the guard in the file makes it raise.
    printed, log = run_fresh(packed_folder, "no import")

    assert printed == []
    assert "RuntimeError: You set `ignore_mismatched_sizes` to `False`" in log
    assert "Unknown quantization type, got stompp" in log


# Damage


PACKED_TENSORS = [
    f"{LAYER}.output.dense.packed_weight",
    f"{LAYER}.output.dense.scale",
    f"{LAYER}.output.dense.bias",
    f"{LAYER}.attention.self.query.input_activation.threshold",
    f"{LAYER}.intermediate.intermediate_act_fn.threshold",
    f"{LAYER}.output.LayerNorm.weight",
    "bert.embeddings.position_embeddings.weight",
]
LATENT_TENSORS = [
    f"{LAYER}.output.dense.weight",
    f"{LAYER}.output.dense.bias",
    f"{LAYER}.output.dense.freeze_mask",
    f"{LAYER}.attention.self.query.input_activation.scale",
    f"{LAYER}.attention.self.query.input_activation.freeze_mask",
    f"{LAYER}.intermediate.intermediate_act_fn.threshold",
    f"{LAYER}.output.LayerNorm.bias",
]


@pytest.mark.parametrize("name", PACKED_TENSORS)
@pytest.mark.parametrize("keep_digests", [True, False], ids=["digests", "no-digests"])
def test_packed_checkpoint_without_a_tensor_is_refused_by_name(packed_folder, name, keep_digests):
    edit_tensors(packed_folder, lambda tensors: tensors.pop(name), keep_digests)

    with pytest.raises(ValueError, match=rf"lacks 1 tensors of BertForSequenceClassification.*'{name}'"):
        load(packed_folder)


@pytest.mark.parametrize("name", LATENT_TENSORS)
def test_latent_checkpoint_without_a_tensor_is_refused_by_name(latent_folder, name):
    edit_tensors(latent_folder, lambda tensors: tensors.pop(name))

    with pytest.raises(ValueError, match=rf"lacks 1 tensors of BertForSequenceClassification.*'{name}'"):
        load(latent_folder)


@pytest.mark.parametrize("dtype", [torch.float16, "auto"], ids=["fp16", "auto"])
@pytest.mark.parametrize("device_map", [None, "cpu"])
def test_missing_tensor_is_found_however_the_model_is_loaded(packed_folder, dtype, device_map):
    edit_tensors(packed_folder, lambda tensors: tensors.pop(PACKED_TENSORS[1]))

    with pytest.raises(ValueError, match=PACKED_TENSORS[1]):
        load(packed_folder, dtype=dtype, device_map=device_map)


def test_missing_shard_is_refused(tiny_packed, tmp_path):
    tiny_packed("bert").save_pretrained(tmp_path, max_shard_size="10KB")
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    shard.unlink()

    with pytest.raises((ValueError, OSError), match=shard.name):
        load(tmp_path)


@pytest.mark.parametrize(
    ("auto_class", "options"),
    [
        (AutoModelForQuestionAnswering, {"num_labels": 2}),
        (AutoModelForTokenClassification, {"num_labels": 5, "ignore_mismatched_sizes": True}),
    ],
    ids=["question-answering", "token-classification"],
)
def test_checkpoint_for_another_head_loads_with_a_new_head(packed_folder, tiny_inputs, auto_class, options):
    model = auto_class.from_pretrained(packed_folder, **options)

    with torch.no_grad():
        expected = load(packed_folder).bert(**tiny_inputs("bert")).last_hidden_state
        assert torch.equal(model.bert(**tiny_inputs("bert")).last_hidden_state, expected)
        outputs = model(**tiny_inputs("bert"))
    assert all(bool(torch.isfinite(value).all()) for value in outputs.values())


def test_missing_head_is_new_but_half_a_pooler_is_refused(packed_folder):
    edit_tensors(packed_folder, lambda tensors: tensors.pop("classifier.weight"))

    assert bool(torch.isfinite(load(packed_folder).classifier.weight).all())

    edit_tensors(packed_folder, lambda tensors: tensors.pop("bert.pooler.dense.weight"))
    with pytest.raises(ValueError, match=r"'bert.pooler.dense.weight'"):
        load(packed_folder)


@pytest.mark.parametrize("name", ["bert", "roberta", "modernbert"])
def test_pretrained_encoder_is_quantized_at_loading_with_a_new_head(tiny_model, logits, tmp_path, name):
    encoder = tiny_model(name, AutoModel)
    encoder.save_pretrained(tmp_path)

    model = load(tmp_path, quantization_config=StoMPPConfig())

    state, expected = model.base_model.state_dict(), encoder.state_dict()
    layers = [key for key in expected if not key.startswith("pooler")]
    assert all(torch.equal(state[key], expected[key]) for key in layers)
    assert bool(torch.isfinite(logits(commit(model), name)).all())


@pytest.mark.parametrize("state", ["packed", "latent"])
def test_base_model_loads_from_the_checkpoint_of_a_model_with_a_head_and_back(
    tiny_committed, tiny_inputs, tmp_path, state
):
    model = tiny_committed("bert")
    model = pack(model) if state == "packed" else model
    model.save_pretrained(tmp_path / "head")
    base = AutoModel.from_pretrained(tmp_path / "head")
    inputs = tiny_inputs("bert")
    with torch.no_grad():
        assert torch.equal(base(**inputs).last_hidden_state, model.bert(**inputs).last_hidden_state)

    base.save_pretrained(tmp_path / "base")
    again = load(tmp_path / "base")
    with torch.no_grad():
        assert torch.equal(again.bert(**inputs).last_hidden_state, base(**inputs).last_hidden_state)
    assert again.config.quantization_config.units == model.config.quantization_config.units


def test_a_whole_missing_pooler_is_new(packed_folder):
    edit_tensors(
        packed_folder, lambda tensors: [tensors.pop(f"bert.pooler.dense.{name}") for name in ("weight", "bias")]
    )

    assert bool(torch.isfinite(load(packed_folder).bert.pooler.dense.weight).all())


@pytest.mark.parametrize("name", [*PACKED_TENSORS, "classifier.weight"])
def test_altered_tensor_is_refused_by_name(packed_folder, name):
    def flip(tensors: dict) -> None:
        tensors[name].flatten().view(torch.uint8)[-1] ^= 1

    edit_tensors(packed_folder, flip)

    with pytest.raises(ValueError, match=rf"tensor '{name}' was altered"):
        load(packed_folder)


def test_altered_tensor_in_a_shard_is_refused_by_name(tiny_packed, tmp_path):
    tiny_packed("bert").save_pretrained(tmp_path, max_shard_size="10KB")
    shard = sorted(tmp_path.glob("model-*.safetensors"))[-1]
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(bytes(content))

    with pytest.raises(ValueError, match=rf"{shard.name}: tensor '.*' was altered"):
        load(tmp_path)


@pytest.mark.parametrize("part", [0.0, 0.0001, 0.1, 0.5, 0.9, 0.9999])
@pytest.mark.parametrize("dtype", ["auto", torch.float32], ids=["auto", "fp32"])
def test_cut_file_is_refused_by_name(packed_folder, part, dtype):
    file = packed_folder / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: int(part * len(content))])

    with pytest.raises(ValueError, match=r"model.safetensors is damaged: .*(its header|tensor '.*') .*cannot be read"):
        load(packed_folder, dtype=dtype)


def test_bits_beyond_the_columns_are_refused(packed_folder):
    name = f"{LAYER}.output.dense.packed_weight"

    def set_tail(tensors: dict) -> None:
        tensors[name][3, 9] |= 0b0001_0000

    edit_tensors(packed_folder, set_tail, keep_digests=False)

    with pytest.raises(ValueError, match=rf"'{name}' has bits beyond its 76 columns"):
        load(packed_folder)


@pytest.mark.parametrize(
    "name",
    [PACKED_TENSORS[1], PACKED_TENSORS[4], f"{LAYER}.output.LayerNorm.weight"],
    ids=["scale", "threshold", "layer_norm"],
)
def test_packed_tensor_that_is_not_finite_is_refused(packed_folder, name):
    edit_tensors(packed_folder, lambda tensors: tensors[name][0].fill_(float("nan")), keep_digests=False)

    with pytest.raises(ValueError, match=rf"'{name}' holds NaN or infinity"):
        load(packed_folder)


@pytest.mark.parametrize("ignore", [False, True], ids=["default", "ignore_mismatched_sizes"])
def test_tensor_of_another_shape_is_refused(packed_folder, ignore):
    name = f"{LAYER}.output.dense.packed_weight"
    edit_tensors(
        packed_folder, lambda tensors: tensors.update({name: tensors[name][:, :10].contiguous()}), keep_digests=False
    )

    with pytest.raises((ValueError, RuntimeError)):
        load(packed_folder, ignore_mismatched_sizes=ignore)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.int8, torch.bool, torch.complex64])
def test_packed_tensor_of_another_dtype_is_refused(packed_folder, dtype):
    name = f"{LAYER}.output.dense.packed_weight"
    edit_tensors(packed_folder, lambda tensors: tensors.update({name: tensors[name].to(dtype)}), keep_digests=False)

    # Transformers cannot read every type.
    with pytest.raises((ValueError, NotImplementedError), match="is corrupted|not implemented"):
        load(packed_folder)


def test_file_without_digests_loads_with_a_warning(packed_folder, caplog):
    load(packed_folder)
    assert "digests" not in caplog.text

    edit_tensors(packed_folder, lambda tensors: None, keep_digests=False)
    load(packed_folder)
    assert "holds no digests: nothing tells whether it was altered" in caplog.text


@pytest.mark.parametrize("state", ["packed", "latent"])
def test_file_that_is_overwritten_later_does_not_change_a_model_in_use(request, tmp_path, tiny_inputs, state):
    folder = request.getfixturevalue(f"{state}_folder")
    model, inputs = load(folder).eval(), tiny_inputs("bert")
    file = folder / "model.safetensors"
    with torch.no_grad():
        before = model(**inputs).logits
        with file.open("r+b") as stream:
            stream.seek(file.stat().st_size // 8)
            stream.write(bytes(file.stat().st_size * 7 // 8))
        after = model(**inputs).logits

    assert torch.equal(before, after)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux")
@pytest.mark.parametrize("state", ["packed", "latent"])
def test_file_does_not_stay_in_memory_beside_a_model_that_was_loaded_from_it(request, state):
    folder = request.getfixturevalue(f"{state}_folder")
    model = load(folder)

    gc.collect()
    assert str(folder) not in Path("/proc/self/maps").read_text(), f"{type(model).__name__} keeps its file mapped"


def test_buffer_that_two_modules_share_is_copied_once() -> None:
    first, second = torch.nn.Module(), torch.nn.Module()
    shared = torch.ones(3)
    for module in (first, second):
        module.register_buffer("table", shared)
    leave_files(torch.nn.Sequential(first, second))

    assert first.table is second.table and first.table is not shared and torch.equal(first.table, shared)


def test_a_sum_that_overflows_is_no_damage() -> None:
    large, damaged = torch.full((4,), 3e38), torch.tensor([0.0, math.nan])
    named = [("count", torch.ones(2, dtype=torch.long)), ("large", large)]
    assert first_nonfinite(named) is None
    assert first_nonfinite([*named, ("damaged", damaged)]) == "damaged"


def test_file_that_is_replaced_while_it_is_loaded_is_refused(packed_folder, monkeypatch):
    file = packed_folder / "model.safetensors"
    swap_in = quantizer.swap_in_packed

    def replaced(*arguments, **settings):
        # The files are open by now, and nothing of them is read yet.
        edit_tensors(packed_folder, lambda tensors: tensors[PACKED_TENSORS[0]].bitwise_not_())
        swap_in(*arguments, **settings)

    monkeypatch.setattr(quantizer, "swap_in_packed", replaced)
    with pytest.raises(ValueError, match=rf"{file}.* was (replaced or written while it was loaded|altered)"):
        load(packed_folder)


def test_pickle_is_not_read(packed_folder):
    class Bomb:
        def __reduce__(self):
            return (exec, (f"open({str(packed_folder / 'boom')!r}, 'w')",))

    (packed_folder / "model.safetensors").unlink()
    (packed_folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))

    with pytest.raises(ValueError, match=r"pytorch_model.bin: only safetensors files are read"):
        load(packed_folder)
    assert not (packed_folder / "boom").exists()


def test_sound_pytorch_file_is_not_read_either(packed_folder, tiny_packed):
    (packed_folder / "model.safetensors").unlink()
    torch.save(tiny_packed("bert").state_dict(), packed_folder / "pytorch_model.bin")

    with pytest.raises(ValueError, match=r"pytorch_model.bin: only safetensors files are read"):
        load(packed_folder)


# Configs that do not fit


def test_newer_format_is_refused(packed_folder):
    edit_config(packed_folder, lambda config: config.update(format_version=FORMAT_VERSION + 1))

    newer = f"format version {FORMAT_VERSION + 1}; this hf_stompp reads up to {FORMAT_VERSION}: upgrade"
    with pytest.raises(ValueError, match=newer):
        load(packed_folder)


def test_unknown_field_is_refused(packed_folder):
    edit_config(packed_folder, lambda config: config.update(weight_groups=4))

    with pytest.raises(ValueError, match=r"no fields \['weight_groups'\].*newer hf_stompp"):
        load(packed_folder)


def test_newer_format_is_named_before_its_unknown_fields(packed_folder):
    future = {"format_version": FORMAT_VERSION + 1, "weight_groups": 4, "mode": "ternary"}
    edit_config(packed_folder, lambda config: config.update(future))

    with pytest.raises(ValueError, match=rf"format version {FORMAT_VERSION + 1}.*upgrade"):
        load(packed_folder)


@pytest.mark.parametrize("state", ["latent", "packed"])
@pytest.mark.parametrize(
    ("name", "what"),
    [("bert.encoder.layer.7.output.dense", "no such module"), (f"{LAYER}.output.LayerNorm", "a LayerNorm")],
    ids=["missing", "other-kind"],
)
def test_table_that_does_not_fit_is_refused_by_module_name(tiny_committed, tmp_path, state, name, what):
    model = tiny_committed("bert")
    model = pack(model) if state == "packed" else model
    model.save_pretrained(tmp_path)
    edit_config(tmp_path, lambda config: config["modules"][-1].update(name=name))

    with pytest.raises(ValueError, match=rf"{name}: .*BertForSequenceClassification has {what} there"):
        load(tmp_path)


@pytest.mark.parametrize("state", ["latent", "packed"])
@pytest.mark.parametrize("name", ["bert", LAYER, f"{LAYER}.output.LayerNorm", "classifier"])
def test_activation_that_is_no_function_is_refused_by_name(tiny_committed, tmp_path, state, name):
    model = tiny_committed("bert")
    model = pack(model) if state == "packed" else model
    model.save_pretrained(tmp_path)

    def edit(config: dict) -> None:
        *_, activation, reader = config["modules"]
        activation["name"] = reader["input"] = name
        activation["input"] = None

    edit_config(tmp_path, edit)

    with pytest.raises(ValueError, match=rf"{name}: .* says it is an activation function, but .* tensors of its own"):
        load(tmp_path)


@pytest.mark.parametrize("modules", [None, []])
def test_checkpoint_without_a_table_is_refused(packed_folder, modules):
    edit_config(packed_folder, lambda config: config.update(modules=modules))

    with pytest.raises(ValueError, match="has no modules: it was not written"):
        load(packed_folder)


@pytest.mark.parametrize("state", ["latent", "packed"])
def test_threshold_that_by_the_table_nobody_has_is_refused(tiny_committed, tmp_path, state):
    model = tiny_committed("bert")
    (pack(model) if state == "packed" else model).save_pretrained(tmp_path)

    def read_what_another_reads(config: dict) -> None:
        # The first product of a feed-forward block has a threshold of its own, and so has what comes before it.
        entries = {entry["name"]: entry for entry in config["modules"]}
        block = "bert.encoder.layer.1."
        entries[f"{block}intermediate.dense"]["input"] = entries[f"{block}attention.output.dense"]["input"]

    edit_config(tmp_path, read_what_another_reads)
    with pytest.raises(ValueError, match=r"intermediate\.dense\.input_activation\.[a-z_]+', but the modules in its"):
        load(tmp_path)


@pytest.mark.parametrize(("written", "claimed"), [("packed", "latent"), ("latent", "packed")])
def test_state_that_is_not_the_files_is_refused(tiny_committed, tmp_path, written, claimed):
    model = tiny_committed("bert")
    model = pack(model) if written == "packed" else model
    model.save_pretrained(tmp_path)
    edit_config(tmp_path, lambda config: config.update(state=claimed))

    message = r"lacks [0-9]+ tensors" if claimed == "packed" else r"packed tensor .*config\.json says 'latent'"
    with pytest.raises(ValueError, match=message):
        load(tmp_path)


def remove_input(config: dict) -> None:
    config["modules"][0]["input"] = None


def remove_reader(config: dict) -> None:
    # The linear layer behind the feed-forward activation now binarizes for itself: nobody reads the activation.
    config["modules"][-1]["input"] = config["modules"][-1]["name"]


def drop_last(config: dict) -> None:
    del config["modules"][-1]


def repeat_last(config: dict) -> None:
    config["modules"].append({**config["modules"][-1], "unit": "elsewhere"})


@pytest.mark.parametrize(
    "edit",
    [lambda config: config.update(mode="bwn"), remove_input, remove_reader, drop_last, repeat_last],
    ids=["other-mode", "no-input", "no-reader", "entry-dropped", "entry-twice"],
)
def test_altered_table_is_refused(packed_folder, edit):
    edit_config(packed_folder, edit)

    with pytest.raises(ValueError, match=r"bert\.encoder\.layer|StoMPPConfig"):
        load(packed_folder)


@pytest.mark.parametrize("auto_class", [AutoModelForSequenceClassification, AutoModel])
def test_mask_of_a_layer_that_the_table_leaves_out_is_refused(latent_folder, auto_class):
    # That of the first key, which no other entry names.
    edit_config(latent_folder, lambda config: config["modules"].pop(1))

    with pytest.raises(ValueError, match=r"self\.key\.freeze_mask', but the modules in its config\.json lack"):
        auto_class.from_pretrained(latent_folder)


def test_bias_that_the_table_does_not_know_is_refused(tiny_packed, tmp_path):
    tiny_packed("bert", StoMPPConfig(mode="bwn")).save_pretrained(tmp_path)
    edit_config(tmp_path, lambda config: config["modules"][-1].update(bias=False))

    with pytest.raises(ValueError, match=rf"{LAYER}.output.dense"):
        load(tmp_path)


@pytest.mark.parametrize(
    "used",
    [{"state": "packed"}, {"modules": [{"name": "a", "kind": "linear", "unit": "a", "input": "a", "bias": True}]}],
    ids=["packed", "plan"],
)
def test_quantizing_at_loading_takes_only_a_fresh_latent_config(tiny_model, tmp_path, used):
    tiny_model("bert").save_pretrained(tmp_path)

    with pytest.raises(ValueError, match="takes a fresh StoMPPConfig"):
        load(tmp_path, quantization_config=StoMPPConfig(**used))


def test_names_of_a_file_are_kept_whether_transformers_names_the_model_or_not(packed_folder):
    model = AutoModelForSequenceClassification.from_pretrained(packed_folder)
    renames, keeps = WeightRenaming("query", "q"), WeightRenaming("gamma", "weight")
    for arguments in ((), (model,)):
        assert model.hf_quantizer.update_weight_conversions([renames, keeps], *arguments) == [keeps]


def test_config_of_the_checkpoint_wins_over_one_at_loading(packed_folder, tiny_packed):
    loaded = load(packed_folder, quantization_config=StoMPPConfig(mode="bwn"))

    assert loaded.config.quantization_config.mode == "bnn"
    assert_same_state(loaded, tiny_packed("bert"))


# Compilers


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["bnn", "bwn"])
def test_packed_model_compiles_into_one_graph(tiny_packed, tiny_inputs, logits, mode):
    packed = tiny_packed("bert", StoMPPConfig(mode=mode))
    expected = logits(packed)

    compiled = torch.compile(packed, fullgraph=True, backend="eager")

    with torch.no_grad():
        assert torch.equal(compiled(**tiny_inputs("bert")).logits, expected)


@pytest.mark.slow
def test_committed_model_compiles_into_one_graph(tiny_committed, tiny_inputs, logits):
    model = tiny_committed("bert")
    expected = logits(model)

    compiled = torch.compile(model, fullgraph=True, backend="eager")

    with torch.no_grad():
        assert torch.equal(compiled(**tiny_inputs("bert")).logits, expected)


@pytest.mark.slow
def test_packed_model_exports(tiny_packed, tiny_inputs, logits):
    packed = tiny_packed("bert")
    inputs = tiny_inputs("bert")

    with torch.no_grad():
        program = torch.export.export(packed, (), inputs)
        output = program.module()(**inputs).logits

    assert torch.equal(output, logits(packed))
