"""Models and data beyond BERT with a class a text: each trains, packs and loads, or is refused at the door."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import transformers
from safetensors import safe_open
from torch import Tensor, nn

from hf_stompp import StoMPPConfig, StoMPPTrainer, StoMPPTrainingArguments, binarize, commit, pack
from hf_stompp.model.example_inputs import example_inputs
from hf_stompp.model.modules import masked_modules


SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}
SOUND = {
    **SMALL,
    "conv_dim": (8, 8),
    "conv_stride": (5, 2),
    "conv_kernel": (10, 3),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "classifier_proj_size": 16,
}
T5 = {"vocab_size": 64, "d_model": 32, "d_ff": 48, "d_kv": 8, "num_layers": 2, "num_heads": 4}
NATIVE = {**SMALL, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 64}

TEXTS: dict[str, dict[str, Any]] = {
    "BertForTokenClassification": SMALL,
    "BertForQuestionAnswering": {**SMALL, "num_labels": 2},
    "BertForMaskedLM": SMALL,
    "BertForMultipleChoice": SMALL,
    # Its forward asks a linear layer for the dtype of its weight.
    "T5ForTokenClassification": T5,
    # Transformers would merge their queries, keys and values in files.
    "NomicBertForSequenceClassification": NATIVE,
    "JinaEmbeddingsV3ForTokenClassification": NATIVE,
    "GteForMaskedLM": NATIVE,
    # Divides the queries in place.
    "LongformerForSequenceClassification": {**SMALL, "attention_window": 4, "max_position_embeddings": 66},
    # Has no vocabulary.
    "CanineForSequenceClassification": {**SMALL, "num_hash_buckets": 16, "max_position_embeddings": 64},
}


def build(name: str, **fields: Any) -> Any:
    model_class = getattr(transformers, name)
    torch.manual_seed(0)
    return model_class(model_class.config_class(**fields)).eval()


def rows_for(name: str, count: int = 8, length: int = 8) -> datasets.Dataset:
    ids = torch.randint(5, 60, (count, length), generator=torch.Generator().manual_seed(0))
    columns: dict[str, Any] = {"input_ids": ids.tolist()}
    if name.endswith("SequenceClassification"):
        columns["labels"] = (ids[:, 0] % 2).tolist()
    elif name.endswith("TokenClassification"):
        columns["labels"] = (ids % 2).tolist()
    elif name.endswith("MaskedLM"):
        columns["labels"] = ids.tolist()
    elif name.endswith("MultipleChoice"):
        # Four choices: more than the model has labels.
        columns = {"input_ids": ids.unsqueeze(1).repeat(1, 4, 1).tolist(), "labels": [row % 4 for row in range(count)]}
    else:
        columns |= {"start_positions": [1] * count, "end_positions": [3] * count}
    return datasets.Dataset.from_dict(columns)


def config_for(name: str) -> StoMPPConfig:
    # CANINE has a stack of words and two of characters.
    return StoMPPConfig(layer_stack="canine.encoder.layer" if name.startswith("Canine") else None)


def trained(model: Any, dataset: Any, folder: Path, resume: bool = False) -> Any:
    args = StoMPPTrainingArguments(
        str(folder),
        max_steps=6,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        save_steps=3,
        eval_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = StoMPPTrainer(model, args, train_dataset=dataset)
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-3") if resume else None)
    return trainer.model.eval()


@pytest.mark.parametrize("name", TEXTS)
def test_a_head_trains_goes_on_packs_and_loads(name: str, tmp_path: Path) -> None:
    dataset = rows_for(name)
    model = trained(binarize(build(name, **TEXTS[name]), config_for(name)), dataset, tmp_path)
    inputs = {"input_ids": torch.tensor(dataset["input_ids"][:2])}

    def answer(other: Any) -> Tensor:
        with torch.no_grad():
            return other(**inputs)[0]

    again = trained(binarize(build(name, **TEXTS[name]), config_for(name)), dataset, tmp_path, resume=True)
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in model.state_dict().items())
    packed = pack(model)
    torch.testing.assert_close(answer(packed), answer(model), rtol=1e-4, atol=1e-5)
    for kind, saved in (("latent", model), ("packed", packed)):
        saved.save_pretrained(tmp_path / kind)
        loaded = type(model).from_pretrained(tmp_path / kind).eval()
        assert torch.equal(answer(loaded), answer(saved))


def test_a_latent_checkpoint_holds_the_names_of_the_model(tmp_path: Path) -> None:
    name = "NomicBertForSequenceClassification"
    model = trained(binarize(build(name, **NATIVE)), rows_for(name), tmp_path)
    with safe_open(tmp_path / "checkpoint-6" / "model.safetensors", "pt") as file:
        assert set(file.keys()) == set(model.state_dict())


@pytest.mark.parametrize("kind", ["streamed", "transformed"])
def test_data_that_is_made_row_by_row_trains(kind: str, tmp_path: Path) -> None:
    name = "BertForSequenceClassification"
    table = rows_for(name)
    if kind == "streamed":
        dataset: Any = table.to_iterable_dataset()
    else:
        dataset = table.with_transform(lambda rows: {**rows, "labels": rows["labels"]})
    model = trained(binarize(build(name, **SMALL)), dataset, tmp_path)
    assert all(module.committed for module in masked_modules(model).values())


@pytest.mark.parametrize("name", ["Wav2Vec2ForSequenceClassification", "WavLMForSequenceClassification"])
def test_a_sound_encoder_needs_no_example(name: str) -> None:
    model = build(name, **SOUND)
    inputs = {"input_values": torch.randn(2, 400, generator=torch.Generator().manual_seed(0))}
    with torch.no_grad():
        before = model(**inputs).logits
        binary = binarize(model, StoMPPConfig(activation_clip=1e4, weight_clip=1e4)).eval()
        torch.testing.assert_close(binary(**inputs).logits, before, rtol=1e-3, atol=1e-4)
        packed = pack(commit(binary))
        torch.testing.assert_close(packed(**inputs).logits, binary(**inputs).logits, rtol=1e-3, atol=1e-4)


def test_layers_that_never_run_stay_float_and_are_named(caplog: pytest.LogCaptureFixture) -> None:
    # Reads the weights of its queries, keys and values itself.
    model = build("WavLMForSequenceClassification", **SOUND)
    with caplog.at_level(logging.WARNING, "hf_stompp"):
        binarize(model)
    assert "8 linear layers stay float, because they do not run on the example input" in caplog.text
    assert "wavlm.encoder.layers.0.attention.k_proj" in caplog.text
    assert type(model.wavlm.encoder.layers[0].attention.q_proj) is nn.Linear
    assert "wavlm.encoder.layers.0.feed_forward.output_dense" in masked_modules(model)


def test_a_model_that_could_not_run_packed_is_refused_before_training() -> None:
    model = build("BertForSequenceClassification", **SMALL)

    class Reader(transformers.models.bert.modeling_bert.BertOutput):
        def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
            return super().forward(hidden_states, input_tensor) / self.dense.weight.shape[1]

    model.bert.encoder.layer[1].output.__class__ = Reader
    with pytest.raises(ValueError, match="could be trained, but not run as a packed model: .*modules_to_not_convert"):
        binarize(model)
    assert not masked_modules(model)


def test_an_example_that_the_model_does_not_take_is_explained() -> None:
    model = build("BertForSequenceClassification", **SMALL)
    with pytest.raises(
        ValueError, match=r"fails on the example .*'input_ids': \[1, 2, 3, 4\].*example_inputs="
    ) as error:
        binarize(model, example_inputs={"input_ids": torch.zeros(1, 2, 3, 4, dtype=torch.long)})
    assert error.value.__cause__ is not None


def test_from_pretrained_takes_the_example_from_the_config_and_saves_none(tmp_path: Path) -> None:
    build("BertForSequenceClassification", **SMALL).save_pretrained(tmp_path / "float")

    def load(ids: Tensor) -> Any:
        # A mask that a graph hangs on cannot be copied.
        mask = torch.ones(ids.shape[:2], requires_grad=True) * 1
        asked = StoMPPConfig(example_inputs=transformers.BatchEncoding({"input_ids": ids, "attention_mask": mask}))
        return transformers.BertForSequenceClassification.from_pretrained(
            tmp_path / "float", quantization_config=asked
        )

    with pytest.raises(ValueError, match=r"fails on the example .*'input_ids': \[1, 2, 3, 4\]"):
        load(torch.zeros(1, 2, 3, 4, dtype=torch.long))
    model = load(torch.zeros(1, 4, dtype=torch.long))
    assert masked_modules(model)
    model.save_pretrained(tmp_path / "latent")
    saved = json.loads((tmp_path / "latent" / "config.json").read_text())["quantization_config"]
    assert "example_inputs" not in saved and model.config.quantization_config.example_inputs is None
    for refused in (lambda: StoMPPConfig(example_inputs=[1]), lambda: binarize(model, example_inputs=[1])):
        with pytest.raises(ValueError, match="example_inputs must map names"):
            refused()


def test_examples_have_the_shape_that_the_config_tells() -> None:
    assert example_inputs(build("BertForMultipleChoice", **SMALL))["input_ids"].shape == (1, 2, 8)
    # A config may keep the separator of a larger vocabulary; Longformer wants three where it has one.
    assert int(example_inputs(build("BertModel", **SMALL, sep_token_id=102))["input_ids"].max()) < SMALL["vocab_size"]
    ids = example_inputs(build("BertModel", **SMALL, sep_token_id=60))["input_ids"]
    assert int((ids == 60).sum()) == 3
    assert example_inputs(build("Wav2Vec2Model", **SOUND))["input_values"].shape == (1, 320)
    fields = {**SMALL, "image_size": 16, "patch_size": 8, "num_channels": 1}
    assert example_inputs(build("ViTModel", **fields))["pixel_values"].shape == (1, 1, 16, 16)


# peft asks Transformers for what that has renamed.
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_adapters_must_be_merged_first() -> None:
    peft = pytest.importorskip("peft")
    model = build("BertForSequenceClassification", **SMALL)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["query"], init_lora_weights=False))
    with pytest.raises(ValueError, match="has adapters that are not merged.*merge_and_unload"):
        binarize(adapted)
    merged = adapted.merge_and_unload()
    assert len(masked_modules(binarize(merged))) == 12 + 2 * 4
