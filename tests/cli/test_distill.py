from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import transformers
from huggingface_hub import ModelCard
from interruption import assert_same_tensors, interrupted
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer, BertTokenizer

from hf_stompp import StoMPPConfig, cli
from hf_stompp.model.modules import masked_modules, packed_modules


SHORT = ["--batch_size", "8", "--max_length", "16", "--cpu", "--learning_rate", "3e-3"]
TEXTS = ["word1 word2", "word3", "word4 word5 word6 word7 word8"]


def texts(count: int, seed: int = 0) -> list[str]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 9, (count,), generator=generator).tolist()
    return [
        " ".join(f"word{i}" for i in torch.randint(59, (length,), generator=generator).tolist()) for length in lengths
    ]


@pytest.fixture
def corpus(tmp_path: Path) -> str:
    path = tmp_path / "corpus.txt"
    path.write_text("\n".join(texts(96)) + "\n")
    return str(path)


@pytest.fixture
def encoder(tiny_model: Callable, saved: Callable) -> str:
    return saved(tiny_model("bert", AutoModel), "encoder")


@pytest.fixture
def sentence_encoder(encoder: str) -> str:
    """As Sentence Transformers 2 wrote it, which most models on the Hub are."""
    folder = Path(encoder)
    kinds = {"": "Transformer", "1_Pooling": "Pooling", "2_Normalize": "Normalize"}
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(kinds.items())
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    pooling = {"word_embedding_dimension": 36, "pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 32, "do_lower_case": false}')
    return encoder


def numbers(table: str, row: str) -> list[str]:
    return next(line for line in table.splitlines() if line.startswith(row)).split()[1:]


def test_run_ends_in_a_packed_encoder_that_has_learned_from_text_alone(
    encoder: str, corpus: str, tmp_path: Path, printed: Callable
) -> None:
    output = tmp_path / "run"
    words = [encoder, output, "--text", corpus, *SHORT, "--max_steps", 40, "--mode", "bwn"]
    table = printed("distill", *words)
    summary = json.loads((output / "summary.json").read_text())
    losses = {name: found["eval_loss"] for name, found in summary["metrics"].items() if found is not None}
    assert losses["packed"] == pytest.approx(losses["binary_final"], rel=1e-3)
    assert losses["packed"] < 0.8 * losses["untrained"]
    assert numbers(table, "packed")[0] == f"{losses['packed']:.4f}" and "saved: " in table
    model = AutoModel.from_pretrained(output / "packed")
    assert packed_modules(model) and type(model).__name__ == "BertModel"
    assert model.config.quantization_config.mode == "bwn"
    assert summary["bytes"]["packed"] < summary["bytes"]["float"]
    # A fifth of 96, which is less than 200.
    assert summary["examples"] == {"train": 77, "validation": 19}
    assert summary["losses"] == {"normalized_hidden_states": 1.0}
    assert summary["command"] == shlex.join(["hf-stompp", "distill", *map(str, words)])
    assert "import hf_stompp" in ModelCard.load(output / "packed" / "README.md").text


@pytest.mark.slow
@pytest.mark.parametrize("family", ["roberta", "distilbert", "electra", "deberta_v2", "mpnet", "modernbert"])
def test_encoders_of_other_families_are_distilled(
    tiny_model: Callable, saved: Callable, corpus: str, tmp_path: Path, printed: Callable, family: str
) -> None:
    # That of the tokenizer: positions are counted from it.
    model = saved(tiny_model(family, AutoModel, pad_token_id=0), "encoder")
    AutoTokenizer.from_pretrained(model, model_input_names=["input_ids", "attention_mask"]).save_pretrained(model)
    words = [model, tmp_path / "run", "--text", corpus, *SHORT, "--max_steps", 4, "--json"]
    metrics = json.loads(printed("distill", *words))["metrics"]
    assert metrics["packed"]["eval_loss"] == pytest.approx(metrics["binary_final"]["eval_loss"], rel=1e-3)
    assert packed_modules(AutoModel.from_pretrained(tmp_path / "run" / "packed"))


def test_similarity_is_that_of_the_embeddings_of_texts_that_were_held_out(
    encoder: str, tmp_path: Path, printed: Callable
) -> None:
    # Nothing to choose: of two texts one is learned from, and the other must be the one that is measured on.
    lines = ["word1 word2 word3", "word4 word5"]
    (tmp_path / "two.txt").write_text("\n".join(lines))
    words = [encoder, tmp_path / "run", "--text", tmp_path / "two.txt", *SHORT, "--max_steps", 3, "--json"]
    result = json.loads(printed("distill", *words))
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    similarities = []
    for line in lines:
        means = []
        for folder in (encoder, tmp_path / "run" / "packed"):
            with torch.no_grad():
                outputs = AutoModel.from_pretrained(folder).eval()(**tokenizer(line, return_tensors="pt"))
            means.append(outputs.last_hidden_state[0].double().mean(0))
        similarities.append(torch.nn.functional.cosine_similarity(*means, dim=0).item())
    found = result["metrics"]["packed"]["eval_cosine_similarity"]
    assert found in [pytest.approx(value, rel=1e-4) for value in similarities]


def test_sentence_encoder_is_one_again_and_gives_the_packed_models_embeddings(
    sentence_encoder: str, corpus: str, tmp_path: Path, printed: Callable
) -> None:
    library: Any = pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
    output = tmp_path / "run"
    result = json.loads(
        printed("distill", sentence_encoder, output, "--text", corpus, *SHORT, "--max_steps", 4, "--json")
    )
    assert result["losses"] == {"normalized_hidden_states": 1.0, "mean_embeddings": 1.0}
    loaded = library.SentenceTransformer(str(output / "packed"), device="cpu")
    assert packed_modules(loaded)
    model, tokenizer = AutoModel.from_pretrained(output / "packed"), AutoTokenizer.from_pretrained(output / "packed")
    for text, embedding in zip(TEXTS, loaded.encode(TEXTS, batch_size=1, convert_to_tensor=True), strict=True):
        with torch.no_grad():
            mean = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0)
        torch.testing.assert_close(embedding, mean / mean.norm(), rtol=1e-4, atol=1e-5)
    card = ModelCard.load(output / "packed" / "README.md")
    assert "SentenceTransformer(" in card.text and card.data.pipeline_tag == "sentence-similarity"
    assert "sentence-transformers" in card.data.tags


def test_latent_model_is_committed_and_starts_a_classifier(
    encoder: str, corpus: str, tmp_path: Path, printed: Callable
) -> None:
    printed("distill", encoder, tmp_path / "run", "--text", corpus, *SHORT, "--max_steps", 4)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "latent", num_labels=3)
    masked = masked_modules(model)
    assert masked and all(bool(module.freeze_mask.all()) for module in masked.values())
    scales = load_file(tmp_path / "run" / "latent" / "model.safetensors")
    found = model.state_dict()
    learned = [name for name in scales if name.endswith("input_activation.scale")]
    assert learned and all(torch.equal(found[f"bert.{name}"], scales[name]) for name in learned)
    assert all(bool((scales[name] > 0).all()) for name in learned)


def test_method_embeddings_and_losses_are_those_asked_for(
    encoder: str, corpus: str, tmp_path: Path, printed: Callable
) -> None:
    losses = '{"hidden_states": 0.5, "cls_embeddings": 2}'
    words = ["--method", "ste", "--word_embeddings", "binary", "--losses", losses, "--max_steps", 3]
    result = json.loads(printed("distill", encoder, tmp_path / "run", "--text", corpus, *SHORT, *words, "--json"))
    config: StoMPPConfig = AutoModel.from_pretrained(tmp_path / "run" / "packed").config.quantization_config
    assert config.word_embeddings == "binary" and config.plan["embeddings.word_embeddings"].kind == "embedding"
    assert result["progression"]["progression_schedule"] == "immediate" and result["method"] == "ste"
    assert result["losses"] == {"hidden_states": 0.5, "cls_embeddings": 2.0}


def test_texts_are_cut_into_sentences_and_to_a_number_and_a_length(
    encoder: str, tmp_path: Path, printed: Callable
) -> None:
    rows = [f"Word{i} word2. Word3 word{i}? word4 word5 word6 word7 word8" for i in range(40)]
    datasets.Dataset.from_dict({"id": range(40), "review": rows}).to_parquet(tmp_path / "reviews.parquet")
    words = ["--text", tmp_path / "reviews.parquet", "--split_sentences", "--max_texts", 20, "--max_length", 5]
    words += ["--validation_share", 0.5, "--max_steps", 3, "--batch_size", 4, "--cpu", "--json"]
    result = json.loads(printed("distill", encoder, tmp_path / "run", *words))
    # The third part begins with a lower-case letter.
    assert result["examples"] == {"train": 20, "validation": 20}


@pytest.mark.slow
def test_a_latent_encoder_goes_on_with_pairs_and_stays_binary(
    encoder: str, corpus: str, tmp_path: Path, printed: Callable
) -> None:
    printed("distill", encoder, tmp_path / "first", "--text", corpus, *SHORT, "--max_steps", 20)
    pairs = {"left": texts(60, seed=1), "right": [*texts(50, seed=2), *[""] * 10]}
    datasets.Dataset.from_dict(pairs).to_parquet(tmp_path / "pairs.parquet")
    words = ["--text", tmp_path / "pairs.parquet", "--text_columns", "left", "right", *SHORT, "--max_steps", 20]
    words += ["--student", tmp_path / "first" / "latent"]
    result = json.loads(printed("distill", encoder, tmp_path / "second", *words, "--json"))
    assert result["method"] == "ste" and result["progression"]["progression_schedule"] == "immediate"
    assert result["metrics"]["packed"]["eval_loss"] < result["metrics"]["untrained"]["eval_loss"]
    first, second = (load_file(tmp_path / run / "latent" / "model.safetensors") for run in ("first", "second"))
    masks = [name for name in first if name.endswith("freeze_mask")]
    assert masks and all(torch.equal(first[name], second[name]) for name in masks)
    # It began where the first run ended, not at the float model: in 20 steps signs change, but few.
    name = "encoder.layer.0.attention.self.query.weight"
    start = load_file(Path(encoder) / "model.safetensors")[name]
    distance = [(second[name] - other[name]).abs().mean().item() for other in (first, {name: start})]
    assert 0 < distance[0] < distance[1]


@pytest.mark.slow
def test_interrupted_run_goes_on_to_the_same_weights(
    encoder: str, corpus: str, tmp_path: Path, printed: Callable
) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    words = ["--text", corpus, *SHORT, "--epochs", "8"]
    printed("distill", encoder, whole, *words)
    command = interrupted(["distill", encoder, str(cut), *words], cut / "latent")
    assert not (cut / "packed").exists()
    printed(*command)
    for folder in ("packed", "latent"):
        assert_same_tensors(whole / folder, cut / folder)


class TestBadInput:
    """Each is refused before anything is written."""

    @pytest.fixture
    def out(self, tmp_path: Path) -> Any:
        yield tmp_path / "out"
        assert not (tmp_path / "out").exists()

    def test_model_that_is_binary_already(
        self,
        tiny_packed: Callable,
        tiny_committed: Callable,
        saved: Callable,
        corpus: str,
        out: Path,
        refused: Callable,
    ) -> None:
        for state, make in (("packed", tiny_packed), ("latent", tiny_committed)):
            message = refused("distill", saved(make("bert"), state), out, "--text", corpus)
            assert f"{state} is {state}, binary already: name the float model" in message

    def test_student_that_is_not_latent_or_binarized_otherwise(
        self,
        encoder: str,
        tiny_packed: Callable,
        tiny_model: Callable,
        saved: Callable,
        corpus: str,
        out: Path,
        refused: Callable,
        printed: Callable,
        tmp_path: Path,
    ) -> None:
        words = [encoder, out, "--text", corpus]
        assert "is float: name the latent encoder" in refused("distill", *words, "--student", encoder)
        packed = saved(tiny_packed("bert"), "packed")
        assert "is packed: name the latent encoder" in refused("distill", *words, "--student", packed)
        printed("distill", encoder, tmp_path / "bwn", "--text", corpus, *SHORT, "--max_steps", 3, "--mode", "bwn")
        message = refused("distill", *words, "--student", tmp_path / "bwn" / "latent", "--mode", "bnn")
        assert "binarized with mode='bwn', and 'bnn' is asked for" in message

    def test_student_that_does_not_fit_the_model_is_refused_before_anything_is_written(
        self,
        encoder: str,
        tiny_model: Callable,
        saved: Callable,
        corpus: str,
        out: Path,
        tmp_path: Path,
        printed: Callable,
        refused: Callable,
    ) -> None:
        latent = tmp_path / "first" / "latent"
        printed("distill", encoder, tmp_path / "first", "--text", corpus, *SHORT, "--max_steps", 3)
        words = ["--text", corpus, "--student", latent]
        other = saved(tiny_model("bert", AutoModel, num_hidden_layers=1), "other")
        assert "num_hidden_layers=1, the student" in refused("distill", other, out, *words)
        reverse = [line for line in reversed(AutoTokenizer.from_pretrained(encoder).get_vocab())]
        BertTokenizer(vocab={word: row for row, word in enumerate(reverse)}).save_pretrained(encoder)
        assert "has another tokenizer than" in refused("distill", encoder, out, *words)

    def test_student_that_was_trained_without_a_gradient(
        self, encoder: str, corpus: str, out: Path, tmp_path: Path, printed: Callable, refused: Callable
    ) -> None:
        words = ["--method", "stompp", "--max_steps", 20]
        printed("distill", encoder, tmp_path / "first", "--text", corpus, *SHORT, *words)
        message = refused("distill", encoder, out, "--text", corpus, "--student", tmp_path / "first" / "latent")
        assert "without a gradient behind its signs" in message

    def test_model_without_a_tokenizer(
        self, tiny_model: Callable, saved: Callable, corpus: str, out: Path, refused: Callable
    ) -> None:
        model = saved(tiny_model("bert", AutoModel), "bare", tokenizer=False)
        assert "has no tokenizer" in refused("distill", model, out, "--text", corpus)

    def test_model_of_images(
        self, tiny_model: Callable, saved: Callable, corpus: str, out: Path, refused: Callable
    ) -> None:
        message = refused("distill", saved(tiny_model("vit", AutoModel)), out, "--text", corpus)
        assert "takes pixel_values, not text" in message

    def test_decoder_whose_tokenizer_does_not_pad(
        self, encoder: str, saved: Callable, corpus: str, tmp_path: Path, out: Path, refused: Callable
    ) -> None:
        config = transformers.GPT2Config(vocab_size=64, n_embd=36, n_layer=2, n_head=4, n_positions=40)
        model = saved(transformers.GPT2Model(config), "gpt2")
        tokenizer = tmp_path / "gpt2" / "tokenizer_config.json"
        settings = json.loads(tokenizer.read_text())
        message = refused("distill", model, out, "--text", corpus)
        assert "its layers are Conv1D, and only nn.Linear and nn.Conv2d become binary" in message
        tokenizer.write_text(json.dumps({**settings, "pad_token": None}))
        assert "no padding token" in refused("distill", model, out, "--text", corpus)

    def test_two_stacks_of_layers(self, saved: Callable, corpus: str, out: Path, refused: Callable) -> None:
        config = transformers.BartConfig(
            vocab_size=64,
            d_model=36,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=76,
            decoder_ffn_dim=76,
            max_position_embeddings=40,
        )
        message = refused("distill", saved(transformers.BartModel(config), "bart"), out, "--text", corpus)
        assert "has several stacks of layers" in message

    def test_checkpoint_that_lacks_a_layer(self, encoder: str, corpus: str, out: Path, refused: Callable) -> None:
        weights = Path(encoder) / "model.safetensors"
        tensors = {name: tensor for name, tensor in load_file(weights).items() if "layer.1." not in name}
        save_file(tensors, weights, {"format": "pt"})
        assert "lacks encoder.layer.1." in refused("distill", encoder, out, "--text", corpus)

    def test_sentence_encoder_that_pools_in_another_way(
        self, sentence_encoder: str, corpus: str, out: Path, refused: Callable
    ) -> None:
        (Path(sentence_encoder) / "1_Pooling" / "config.json").write_text('{"pooling_mode_max_tokens": true}')
        message = refused("distill", sentence_encoder, out, "--text", corpus)
        assert "pools by max" in message and "mean or cls" in message

    def test_text_that_cannot_be_used(self, encoder: str, tmp_path: Path, out: Path, refused: Callable) -> None:
        good, bad = tmp_path / "good.txt", tmp_path / "bad.txt"
        good.write_text("word1\nword2\n")
        assert "no file" in refused("distill", encoder, out, "--text", good, tmp_path / "gone.txt")
        bad.write_bytes(b"")
        assert f"{bad} is empty" in refused("distill", encoder, out, "--text", good, bad)
        bad.write_bytes(b"fine\ncaf\xe9\n")
        assert "byte 0xe9 at 4 of line 2" in refused("distill", encoder, out, "--text", good, bad)
        bad.write_bytes(b"\n \n")
        assert "holds no text" in refused("distill", encoder, out, "--text", good, bad)
        bad.write_bytes(b"same\nsame\n")
        assert "at least two different texts" in refused("distill", encoder, out, "--text", bad)
        table = tmp_path / "table.csv"
        table.write_text("title,body\na,b\n")
        assert "--text_columns" in refused("distill", encoder, out, "--text", table)
        message = refused("distill", encoder, out, "--text", table, "--text_columns", "words")
        assert "no column 'words'" in message
        pair = ["--text_columns", "title", "body", "--split_sentences"]
        assert "cuts texts, not pairs" in refused("distill", encoder, out, "--text", table, *pair)

    @pytest.mark.parametrize(
        ("losses", "message"),
        [
            ("hidden_states", "is no JSON"),
            ('{"hidden": 1}', "must give a weight to some of"),
            ('{"hidden_states": 0}', "must be a number above 0"),
            ('{"logits": 1}', "an encoder without a head has no logits; name some of hidden_states"),
            ('{"hidden_states": 1, "labels": 1}', "has no labels"),
        ],
    )
    def test_losses_that_an_encoder_does_not_have(
        self, encoder: str, corpus: str, out: Path, refused: Callable, losses: str, message: str
    ) -> None:
        assert message in refused("distill", encoder, out, "--text", corpus, "--losses", losses)

    def test_schedule_that_cannot_finish(self, encoder: str, corpus: str, out: Path, refused: Callable) -> None:
        message = refused("distill", encoder, out, "--text", corpus, "--max_steps", 1)
        assert "the schedule cannot finish" in message

    def test_output_that_is_taken(self, encoder: str, corpus: str, tmp_path: Path, refused: Callable) -> None:
        (tmp_path / "kept").mkdir()
        (tmp_path / "kept" / "notes.txt").write_text("mine")
        assert "--resume" in refused("distill", encoder, tmp_path / "kept", "--text", corpus)
        assert [path.name for path in (tmp_path / "kept").iterdir()] == ["notes.txt"]
        assert "is a file" in refused("distill", encoder, tmp_path / "kept" / "notes.txt", "--text", corpus)

    def test_nothing_to_resume(self, encoder: str, corpus: str, out: Path, refused: Callable) -> None:
        assert "no run to resume" in refused("distill", encoder, out, "--text", corpus, "--resume")

    def test_resumed_with_other_options(
        self, encoder: str, corpus: str, tmp_path: Path, printed: Callable, refused: Callable
    ) -> None:
        words = [encoder, tmp_path / "run", "--text", corpus, *SHORT, "--max_steps", 3]
        printed("distill", *words)
        with open(corpus, "a") as file:
            file.write("word1\n")
        assert "examples was 96, is 97" in refused("distill", *words, "--resume")
        message = refused("distill", *words, "--max_length", 8, "--resume")
        assert "belongs to another run: max_length was 16, is 8" in message

    @pytest.mark.parametrize("option", ["--validation_share=1", "--max_texts=0", "--epochs=-1", "--method=float"])
    def test_numbers_out_of_range(
        self, encoder: str, corpus: str, option: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with pytest.raises(SystemExit) as caught:
            cli.main(["distill", encoder, "out", "--text", corpus, option])
        assert caught.value.code == 2 and option.split("=")[0] in capsys.readouterr().err
