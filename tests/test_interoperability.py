"""What a Transformers user does with a packed model beside calling it."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForSequenceClassification

from hf_stompp import StoMPPConfig, StoMPPTrainer, StoMPPTrainingArguments
from hf_stompp.model.modules import packed_modules


WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"word{i}" for i in range(59))]
TEXTS = ["word1 word2", "word3", "word4 word5 word6 word7 word8", ""]
DISK = {
    "bert.embeddings": "cpu",
    "bert.encoder.layer.0": "cpu",
    "bert.encoder.layer.1": "disk",
    "bert.pooler": "disk",
    "classifier": "cpu",
}

both_modes = pytest.mark.parametrize("config", [{}, {"mode": "bwn"}], ids=["bnn", "bwn"])


@pytest.fixture
def tokenizer(tmp_path: Path) -> transformers.PreTrainedTokenizerBase:
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS))
    return transformers.BertTokenizer(vocab=str(tmp_path / "vocab.txt"), model_max_length=40)


@pytest.fixture
def folder(tiny_packed: Callable, tokenizer: Any, tmp_path: Path) -> str:
    """A packed classifier with its tokenizer, saved."""
    tiny_packed("bert").save_pretrained(tmp_path / "packed")
    tokenizer.save_pretrained(tmp_path / "packed")
    return str(tmp_path / "packed")


@pytest.fixture
def compiler() -> Iterator[Callable]:
    torch.compiler.reset()
    yield torch.compile
    torch.compiler.reset()


@torch.no_grad()
def run(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    return model(**inputs).logits


def devices(model: nn.Module) -> set[str]:
    return {tensor.device.type for tensor in [*model.parameters(), *model.buffers()]}


# Pipelines and the Trainer


def test_pipeline_of_a_packed_model_gives_the_probabilities_of_its_logits(tiny_packed, tokenizer):
    model = tiny_packed("bert")

    found = transformers.pipeline("text-classification", model=model, tokenizer=tokenizer, top_k=None)(TEXTS)

    for text, scores in zip(TEXTS, found, strict=True):
        expected = run(model, tokenizer(text, return_tensors="pt")).softmax(-1)[0]
        by_label = {score["label"]: score["score"] for score in scores}
        torch.testing.assert_close(torch.tensor([by_label[f"LABEL_{i}"] for i in range(3)]), expected)


def test_pipeline_from_a_folder_equals_that_of_the_model(tiny_packed, tokenizer, folder):
    in_memory = transformers.pipeline("text-classification", model=tiny_packed("bert"), tokenizer=tokenizer)

    from_folder = transformers.pipeline("text-classification", model=folder)

    assert packed_modules(from_folder.model)
    assert from_folder(TEXTS, batch_size=2) == in_memory(TEXTS, batch_size=2)


@pytest.mark.parametrize(
    ("trainer_class", "arguments_class"),
    [(transformers.Trainer, transformers.TrainingArguments), (StoMPPTrainer, StoMPPTrainingArguments)],
    ids=["Trainer", "StoMPPTrainer"],
)
def test_trainer_predicts_with_a_packed_model(
    tiny_packed, tiny_inputs, logits, tmp_path, trainer_class, arguments_class
):
    model, inputs = tiny_packed("bert"), tiny_inputs("bert", batch=5)
    labels = torch.tensor([0, 1, 2, 1, 0])
    dataset = [{**{name: t[i].tolist() for name, t in inputs.items()}, "labels": int(labels[i])} for i in range(5)]
    arguments = arguments_class(tmp_path, per_device_eval_batch_size=2, report_to=[], use_cpu=True, disable_tqdm=True)

    result = trainer_class(model, arguments).predict(dataset)

    expected = logits(model, batch=5)
    torch.testing.assert_close(torch.from_numpy(result.predictions), expected, rtol=1e-5, atol=1e-6)
    loss = torch.nn.functional.cross_entropy(expected, labels)
    assert result.metrics["test_loss"] == pytest.approx(float(loss), abs=1e-4)


# Compilers


@pytest.mark.slow
@both_modes
def test_packed_model_compiled_for_any_shape_runs_as_one_graph(tiny_packed, logits, compiler, config):
    model = tiny_packed("bert", StoMPPConfig(**config))

    compiled = compiler(model, fullgraph=True, dynamic=True)

    for batch, length in [(2, 10), (3, 17)]:
        expected = logits(model, batch=batch, length=length)
        found = logits(compiled, batch=batch, length=length)
        # LayerNorm is summed in another order there, which can turn the sign of a value next to its threshold.
        assert found.shape == expected.shape and float((found - expected).abs().median()) < 1e-5


@pytest.mark.slow
def test_committed_latent_model_compiled_runs_as_one_graph(tiny_committed, logits, compiler):
    model = tiny_committed("bert").eval()

    compiled = compiler(model, fullgraph=True)

    found, expected = logits(compiled), logits(model)
    assert found.shape == expected.shape and float((found - expected).abs().median()) < 1e-5


# Accelerate


@both_modes
def test_parameters_on_disk_are_fetched_for_each_call(tiny_packed, logits, tmp_path, config):
    model = tiny_packed("bert", StoMPPConfig(**config))
    model.save_pretrained(tmp_path / "packed")

    loaded = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "packed", device_map=DISK, offload_folder=tmp_path / "offload"
    )

    assert "meta" in devices(loaded)
    for _ in range(2):
        assert torch.equal(logits(loaded), logits(model))


def test_device_map_of_too_little_memory_is_made_and_runs(folder, tiny_packed, logits, tmp_path):
    loaded = AutoModelForSequenceClassification.from_pretrained(
        folder, device_map="auto", max_memory={"cpu": 30_000}, offload_folder=tmp_path / "offload"
    )

    assert set(loaded.hf_device_map.values()) == {"cpu", "disk"}
    assert torch.equal(logits(loaded), logits(tiny_packed("bert")))


def test_tensor_that_the_file_lacks_is_missed_on_disk_too(folder, tmp_path):
    path, name = Path(folder, "model.safetensors"), "bert.encoder.layer.1.output.LayerNorm.weight"
    tensors = load_file(path)
    del tensors[name]
    save_file(tensors, path, {"format": "pt"})

    with pytest.raises(ValueError, match=rf"the checkpoint lacks .*{name}"):
        AutoModelForSequenceClassification.from_pretrained(
            folder, device_map=DISK, offload_folder=tmp_path / "offload"
        )


def test_offloaded_buffers_are_refused_when_loading(folder, tmp_path):
    with pytest.raises(ValueError, match=r"is offloaded.*offload_buffers=False"):
        AutoModelForSequenceClassification.from_pretrained(
            folder, device_map=DISK, offload_folder=tmp_path / "offload", offload_buffers=True
        )


@pytest.mark.parametrize("where", ["cpu", "disk"])
@pytest.mark.parametrize("buffers", [False, True])
def test_accelerate_offloads_a_packed_model(tiny_packed, logits, tmp_path, where, buffers):
    model = tiny_packed("bert")
    expected = logits(model)
    # Layers read thresholds of other modules, which whole encoder layers are loaded for.
    options = {"offload_buffers": True, "preload_module_classes": model._no_split_modules} if buffers else {}

    if where == "cpu":
        accelerate.cpu_offload(model, torch.device("cpu"), **options)
    else:
        accelerate.disk_offload(model, tmp_path / "offload", torch.device("cpu"), **options)

    assert "meta" in devices(model)
    assert model.bert.encoder.layer[0].output.dense.packed_weight.is_meta == buffers
    assert torch.equal(logits(model), expected) and torch.equal(logits(model), expected)


def test_inferred_device_map_keeps_layers_whole_and_dispatches(tiny_packed, logits, tmp_path):
    model = tiny_packed("bert")
    expected = logits(model)
    sizes = accelerate.utils.compute_module_sizes(model)
    memory = {"cpu": sizes["bert.embeddings"] + int(2.1 * sizes["bert.encoder.layer.0"]), "disk": 10**9}

    device_map = accelerate.infer_auto_device_map(
        model, max_memory=memory, no_split_module_classes=model._no_split_modules
    )
    accelerate.dispatch_model(model, device_map, main_device="cpu", offload_dir=tmp_path, force_hooks=True)

    assert "disk" in device_map.values()
    assert all(len(name.split(".")) <= 4 for name in device_map)
    assert torch.equal(logits(model), expected)


# Copies, casts, devices


@both_modes
def test_pickled_and_copied_model_computes_the_same_before_and_after_it_was_called(tiny_packed, logits, config):
    model = tiny_packed("bert", StoMPPConfig(**config))
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    expected = logits(model)
    saved = io.BytesIO()
    torch.save(model, saved)
    saved.seek(0)
    copies += [copy.deepcopy(model), torch.load(saved, weights_only=False)]

    for copied in copies:
        assert torch.equal(logits(copied), expected)
        assert not {t.data_ptr() for t in copied.state_dict().values()} & {
            t.data_ptr() for t in model.state_dict().values()
        }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_cast_model_equals_one_that_was_loaded_in_that_dtype(tiny_packed, folder, logits, dtype):
    model = tiny_packed("bert").to(dtype)

    loaded = AutoModelForSequenceClassification.from_pretrained(folder, dtype=dtype)

    assert logits(model).dtype == dtype and torch.equal(logits(model), logits(loaded))
    dense = model.bert.encoder.layer[0].output.dense
    assert (dense.packed_weight.dtype, dense.scale.dtype, dense.bias.dtype) == (torch.uint8, *2 * [torch.float32])
    cast = tiny_packed("bert").bfloat16()
    assert torch.equal(logits(cast), logits(tiny_packed("bert").to(torch.bfloat16)))


def test_half_is_refused_by_transformers_as_of_every_quantized_model(tiny_packed):
    with pytest.raises(ValueError, match=r"half\(\)` is not supported for quantized model"):
        tiny_packed("bert").half()


def test_model_on_the_meta_device_takes_its_weights_back(tiny_packed, tiny_inputs, logits):
    model = tiny_packed("bert")
    expected, whole = logits(model), copy.deepcopy(model)

    model.to("meta")

    with pytest.raises((RuntimeError, NotImplementedError)):
        run(model, tiny_inputs("bert"))
    model.to_empty(device="cpu")
    for name, buffer in whole.named_buffers():
        # Those that no state dict holds, such as position ids.
        model.get_buffer(name).copy_(buffer)
    model.load_state_dict(whole.state_dict())
    assert torch.equal(logits(model), expected)


# Sentence Transformers


@both_modes
def test_sentence_transformer_of_a_packed_encoder_gives_its_pooled_embeddings(
    tiny_packed, tokenizer, tmp_path, config
):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    model = tiny_packed("bert", StoMPPConfig(**config), auto_class=AutoModel)
    model.save_pretrained(tmp_path / "packed")
    tokenizer.save_pretrained(tmp_path / "packed")
    inputs = tokenizer(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden, mask = model(**inputs).last_hidden_state, inputs["attention_mask"].unsqueeze(-1)
    expected = (hidden * mask).sum(1) / mask.sum(1)

    encoder = Transformer(str(tmp_path / "packed"))
    embedder = sentence_transformers.SentenceTransformer(
        modules=[encoder, Pooling(36, pooling_mode="mean")], device="cpu"
    )
    embedder.save_pretrained(str(tmp_path / "saved"))
    loaded = sentence_transformers.SentenceTransformer(str(tmp_path / "saved"), device="cpu")

    # Without a pooling of its own, a folder gets the mean.
    bare = sentence_transformers.SentenceTransformer(str(tmp_path / "packed"), device="cpu")

    found = embedder.encode(TEXTS, convert_to_tensor=True)
    assert torch.equal(bare.encode(TEXTS, convert_to_tensor=True), found)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(loaded.encode(TEXTS, convert_to_tensor=True), found)
    assert packed_modules(loaded)
    sizes = [Path(tmp_path, name, "model.safetensors").stat().st_size for name in ("packed", "saved")]
    assert sizes[1] == pytest.approx(sizes[0], rel=0.01)
