from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import datasets
import pytest
import torch
import transformers
from huggingface_hub import ModelCard
from interruption import assert_same_tensors, interrupted
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from hf_stompp import StoMPPConfig, StoMPPTrainer, StoMPPTrainingArguments, binarize, cli, commit
from hf_stompp.cli import progress
from hf_stompp.model.example_inputs import example_inputs
from hf_stompp.model.modules import packed_modules
from hf_stompp.training.summary import compared_with_float


CLASSES = ["bad", "fair", "good"]
SHORT = ["--batch_size", "8", "--max_length", "16", "--logging_steps", "2", "--cpu"]


def write(path: Path, count: int, seed: int, labels: Callable[[int], object] = lambda label: CLASSES[label]) -> Path:
    """Texts whose first word tells the class."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, (count,), generator=generator).tolist()
    words = torch.randint(3, 59, (count, 6), generator=generator).tolist()
    texts = [" ".join(f"word{i}" for i in [label, *row]) for label, row in zip(ids, words, strict=True)]
    datasets.Dataset.from_dict({"text": texts, "label": [labels(label) for label in ids]}).to_csv(path)
    return path


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    names = write(tmp_path / "train.csv", 64, 0), write(tmp_path / "dev.csv", 32, 1)
    return ["--train_file", str(names[0]), "--validation_file", str(names[1])]


@pytest.fixture
def float_model(tiny_model: Callable, saved: Callable) -> str:
    return saved(tiny_model("bert"), "float")


def train(*words: object) -> int:
    return cli.main(["train", *map(str, words)])


@pytest.mark.parametrize("binary", [False, True])
@pytest.mark.parametrize("watched", [False, True])
def test_training_shows_a_bar_on_a_terminal_and_lines_elsewhere(
    tiny_model: Callable, tmp_path: Path, binary: bool, watched: bool
) -> None:
    model = tiny_model("bert")
    kind, arguments = transformers.Trainer, transformers.TrainingArguments
    if binary:
        model, kind, arguments = binarize(model, StoMPPConfig()), StoMPPTrainer, StoMPPTrainingArguments
    args = arguments(str(tmp_path), disable_tqdm=not watched, use_cpu=True)
    trainer = kind(model, args, train_dataset=datasets.Dataset.from_dict({"labels": [0]}))
    progress.quiet(trainer)

    bar = progress.QuietUnitBar if binary else progress.QuietBar
    shown = transformers.ProgressCallback, transformers.PrinterCallback, progress.ProgressLines
    found = [one for one in trainer.callback_handler.callbacks if isinstance(one, shown)]
    assert [type(one) for one in found] == [bar if watched else progress.ProgressLines]


def test_lines_tell_step_loss_and_time_left_and_come_once_a_minute_at_most(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    logged = [(0, 100), (30, 600), (61, 1100), (90, 1600), (122, 2000)]
    clock = iter([0, *(second for second, _ in logged)] * 2)
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    for is_first in (True, False):
        state = transformers.TrainerState(global_step=100, max_steps=6100, is_world_process_zero=is_first)
        lines = progress.ProgressLines()
        lines.on_train_begin(None, state, None)
        for _, state.global_step in logged:
            lines.on_log(None, state, None, logs={"loss": 1.23456})

    # 1,000 steps in 61 seconds, 5,000 to go: 305 seconds. 1,900 in 122, 4,100 to go: 263. Other ranks are silent.
    expected = ["step 1,100 of 6,100, loss 1.23, 5 min left", "step 2,000 of 6,100, loss 1.23, 4 min left"]
    assert capsys.readouterr().err.splitlines() == expected


def test_run_ends_in_a_packed_model_that_eval_finds_as_good(
    float_model: str, files: list[str], tmp_path: Path, printed: Callable
) -> None:
    output = tmp_path / "run"
    words = [float_model, output, *files, *SHORT, "--float_epochs", 1, "--epochs", 3]
    table = printed("train", *words)
    assert re.search(r"float +\d\.\d+", table) and re.search(r"packed +\d\.\d+", table) and "saved: " in table
    summary = json.loads((output / "summary.json").read_text())
    model = AutoModelForSequenceClassification.from_pretrained(output / "packed")
    assert packed_modules(model) and model.config.label2id == {name: i for i, name in enumerate(CLASSES)}
    found = json.loads(printed("eval", output / "packed", "--file", files[3], "--json", "--max_length", 16))
    accuracies = {name: metrics["eval_accuracy"] for name, metrics in summary["metrics"].items()}
    assert found["accuracy"] == accuracies["packed"] == accuracies["binary_final"]
    assert summary["examples"] == {"train": 64, "validation": 32}
    assert summary["command"] == shlex.join(["hf-stompp", "train", *map(str, words)])
    card = ModelCard.load(output / "packed" / "README.md").text
    assert "import hf_stompp" in card and f"the {Path(files[1]).name} data set" in card
    assert f"| accuracy | {accuracies['packed']:.4f} | {accuracies['float']:.4f} |" in card
    assert compared_with_float(summary) in table


@pytest.mark.parametrize("committed", [True, False])
def test_latent_encoder_gets_a_head_and_stays_binary_if_it_is(
    tiny_model: Callable, saved: Callable, files: list[str], tmp_path: Path, printed: Callable, committed: bool
) -> None:
    config = StoMPPConfig(activation_scale="fixed")
    model = binarize(tiny_model("bert", transformers.AutoModel), config)
    model(**example_inputs(model))
    encoder = saved(commit(model) if committed else model, "latent")
    # A learning rate that changes nothing.
    words = [encoder, tmp_path / "run", *files, *SHORT, "--epochs", 2, "--learning_rate", 1e-30]
    summary = json.loads(printed("train", *words, "--json"))
    assert summary["method"] == ("ste" if committed else "stompp_ste") and summary["teacher"] is None
    before, after = (load_file(path / "model.safetensors") for path in (Path(encoder), tmp_path / "run" / "binary"))
    weights = [name for name in before if name.endswith("query.weight")]
    assert weights and all(torch.equal(before[name], after[f"bert.{name}"]) for name in weights)
    packed = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "packed")
    assert packed_modules(packed) and list(packed.config.label2id) == CLASSES


def test_classifier_keeps_the_head_that_knows_the_classes(
    float_model: str, files: list[str], tmp_path: Path, printed: Callable
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    printed("train", float_model, first, *files, *SHORT, "--method", "float", "--epochs", 1)
    before = load_file(first / "model" / "model.safetensors")
    # A learning rate that changes nothing.
    options = ["--method", "float", "--epochs", 1, "--float_learning_rate", 1e-30]
    printed("train", first / "model", second, *files, *SHORT, *options)
    after = load_file(second / "model" / "model.safetensors")
    assert torch.equal(before["classifier.weight"], after["classifier.weight"])


def test_a_head_that_was_trained_for_other_classes_is_no_teacher(
    tiny_model: Callable, saved: Callable, files: list[str], tmp_path: Path, printed: Callable
) -> None:
    for names, teacher in [(CLASSES, "float"), (["one", "two", "three"], None)]:
        labels = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
        model = saved(tiny_model("bert", **labels), "-".join(names))
        words = [model, tmp_path / names[0], *files, *SHORT, "--epochs", 1, "--method", "ste", "--json"]
        assert json.loads(printed("train", *words))["teacher"] == teacher


def test_json_is_all_that_is_printed(float_model: str, files: list[str], tmp_path: Path, printed: Callable) -> None:
    result = json.loads(
        printed("train", float_model, tmp_path / "run", *files, *SHORT, "--epochs", 3, "--json", "--method", "stompp")
    )
    assert result["method"] == "stompp" and set(result["metrics"]) == {"float", "binary_final", "packed"}
    assert result["bytes"]["packed"] < result["bytes"]["float"]


def test_losses_are_those_asked_for(
    float_model: str, files: list[str], tmp_path: Path, printed: Callable, refused: Callable
) -> None:
    losses = {"logits": 0.5, "attentions": 2.0}
    words = [float_model, tmp_path / "run", *files, *SHORT, "--epochs", 3, "--losses", json.dumps(losses)]
    printed("train", *words, "--float_epochs", 1)
    settings = json.loads((tmp_path / "run" / "run_settings.json").read_text())
    assert settings["progression"]["distillation_losses"] == losses
    words[1] = tmp_path / "other"
    assert "there is none: give --float_epochs" in refused("train", *words, "--teacher", "none")
    assert "is no JSON" in refused("train", *words[:-1], "{logits", "--float_epochs", 1)
    assert "drop --losses" in refused("train", *words, "--method", "float")
    # A model that is binary already has no float one beside it.
    words[0] = tmp_path / "run" / "binary"
    assert "there is none: give --float_epochs" in refused("train", *words)
    assert not words[1].exists()


def test_method_says_gradient_and_schedule(
    float_model: str, files: list[str], tmp_path: Path, printed: Callable
) -> None:
    for method, surrogate, schedule in [("ste", "clipped_ste", "immediate"), ("stompp", "none", "cubic")]:
        output = tmp_path / method
        printed("train", float_model, output, *files, *SHORT, "--epochs", 3, "--method", method, "--mode", "bwn")
        state = json.loads(next(output.glob("binary/checkpoint-*/trainer_state.json")).read_text())
        progression = state["stateful_callbacks"]["ProgressionCallback"]["attributes"]["progression"]
        config = json.loads((output / "packed" / "config.json").read_text())["quantization_config"]
        assert (config["surrogate"], config["mode"], progression["schedule"]) == (surrogate, "bwn", schedule)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["float", "binary"])
def test_interrupted_run_goes_on_to_the_same_weights(
    float_model: str, files: list[str], tmp_path: Path, printed: Callable, stage: str
) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    words = [*files, *SHORT, "--float_epochs", "3", "--epochs", "6"]
    printed("train", float_model, whole, *words)
    # The end of the first epoch leaves a checkpoint.
    command = interrupted(["train", float_model, str(cut), *words], cut / stage)
    assert not (cut / "packed").exists()
    printed(*command)
    assert_same_tensors(whole / "packed", cut / "packed")


class TestBadInput:
    def test_packed_model(self, tiny_packed: Callable, saved: Callable, files: list[str], refused: Callable) -> None:
        message = refused("train", saved(tiny_packed("bert")), "out", *files)
        assert "packed, which cannot be trained" in message and "hf-stompp unpack" in message

    def test_no_data(self, float_model: str, files: list[str], refused: Callable) -> None:
        assert "--train_file and --validation_file, or a --task" in refused("train", float_model, "out")
        assert "--task" in refused("train", float_model, "out", *files[:2])
        assert "exclude each other" in refused("train", float_model, "out", *files, "--task", "sst2")

    def test_file_that_is_not_there(self, float_model: str, files: list[str], refused: Callable) -> None:
        message = refused("train", float_model, "out", "--train_file", "nowhere.csv", *files[2:])
        assert "no file nowhere.csv" in message

    def test_output_that_is_taken(self, float_model: str, files: list[str], tmp_path: Path, refused: Callable) -> None:
        (tmp_path / "kept").mkdir()
        (tmp_path / "kept" / "notes.txt").write_text("mine")
        assert "--resume" in refused("train", float_model, tmp_path / "kept", *files)
        assert [path.name for path in (tmp_path / "kept").iterdir()] == ["notes.txt"]
        assert "is a file" in refused("train", float_model, tmp_path / "kept" / "notes.txt", *files)

    def test_nothing_to_resume(self, float_model: str, files: list[str], tmp_path: Path, refused: Callable) -> None:
        assert "no run to resume" in refused("train", float_model, tmp_path / "new", *files, "--resume")
        assert not (tmp_path / "new").exists()

    def test_labels_that_are_no_classes(
        self, float_model: str, files: list[str], tmp_path: Path, refused: Callable
    ) -> None:
        numbers = write(tmp_path / "numbers.csv", 8, 0, lambda label: label + 0.25)
        message = refused("train", float_model, tmp_path / "out", "--train_file", numbers, *files[2:])
        assert "no classes, such as " in message and "--problem_type regression (numbers)" in message
        other = write(tmp_path / "other.csv", 8, 0, lambda label: f"other{label}")
        message = refused("train", float_model, tmp_path / "out", *files[:2], "--validation_file", other)
        assert "other" in message and "bad, fair, good" in message

    def test_schedule_that_cannot_finish(
        self, float_model: str, files: list[str], tmp_path: Path, refused: Callable
    ) -> None:
        message = refused("train", float_model, tmp_path / "out", *files, "--epochs", 1, "--batch_size", 64, "--cpu")
        assert "the schedule cannot finish" in message

    @pytest.mark.parametrize("option", ["--epochs=0", "--learning_rate=-1", "--batch_size=none", "--epochs=inf"])
    def test_numbers_out_of_range(
        self, float_model: str, files: list[str], option: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with pytest.raises(SystemExit) as caught:
            train(float_model, "out", *files, option)
        assert caught.value.code == 2 and option.split("=")[0] in capsys.readouterr().err

    def test_options_that_contradict_the_method(
        self, float_model: str, files: list[str], tmp_path: Path, refused: Callable
    ) -> None:
        words = [float_model, tmp_path / "out", *files, "--method", "float", "--mode", "bwn", "--teacher", "none"]
        assert "drop --mode, --teacher" in refused("train", *words)

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["--mode", "bwn"], "binarized with mode='bnn', and 'bwn' is asked for"),
            (["--modes", "attention=bwn"], "binarized with modes=None, and {'attention': 'bwn'} is asked for"),
            (["--word_embeddings", "int8"], "binarized with word_embeddings='float', and 'int8' is asked for"),
            (["--float_epochs", 1], "it has no float stage"),
            (["--method", "float"], "it has no float stage"),
        ],
    )
    def test_latent_model_that_is_to_be_made_otherwise(
        self,
        tiny_model: Callable,
        saved: Callable,
        files: list[str],
        tmp_path: Path,
        refused: Callable,
        words: list,
        message: str,
    ) -> None:
        latent = saved(binarize(tiny_model("bert")), "latent")
        assert message in refused("train", latent, tmp_path / "out", *files, *SHORT, *words)
        assert not (tmp_path / "out").exists()

    def test_resumed_with_other_options(
        self, float_model: str, files: list[str], tmp_path: Path, printed: Callable, refused: Callable
    ) -> None:
        words = [float_model, tmp_path / "run", *files, *SHORT, "--method", "ste", "--epochs", 1]
        printed("train", *words)
        message = refused("train", *words, "--learning_rate", 1, "--resume")
        assert "belongs to another run: learning_rate was 0.0002, is 1.0" in message
        # The same name, other examples.
        write(Path(files[3]), 32, 2)
        assert "belongs to another run: validation_examples was" in refused("train", *words, "--resume")

    def test_label_that_is_empty(self, float_model: str, files: list[str], tmp_path: Path, refused: Callable) -> None:
        other = write(tmp_path / "other.csv", 8, 0, lambda label: "" if label == 2 else CLASSES[label])
        message = refused("train", float_model, tmp_path / "out", "--train_file", other, *files[2:])
        assert "has no label in column label of row" in message

    def test_label_among_the_texts(
        self, float_model: str, files: list[str], tmp_path: Path, refused: Callable
    ) -> None:
        words = ["train", float_model, tmp_path / "out", *files, "--text_columns", "text", "label"]
        assert "label is among --text_columns: the model would read the answer" in refused(*words)
