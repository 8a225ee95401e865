"""The training recipe: its table of methods, its stages, and what happens to a run that is started again."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, DataCollatorWithPadding, HfArgumentParser

from hf_stompp import StoMPPTrainingArguments, binarize, cli
from hf_stompp.config import StoMPPConfig
from hf_stompp.model.modules import masked_modules, packed_modules
from hf_stompp.training.methods import METHODS, RecipeArguments
from hf_stompp.training.recipe import SETTINGS, Recipe
from hf_stompp.training.stages import evaluate_model, make_trainer, run_recipe, write_card
from hf_stompp.training.summary import compared_with_float, save_metrics, summarize, summary_table


datasets = pytest.importorskip("datasets")

BINARY_METHODS = [name for name in METHODS if name != "float"]
CLASSES = 3
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"word{i}" for i in range(59))]
README = Path(__file__).parent.parent / "examples" / "glue" / "README.md"


def examples(count: int, seed: int) -> Any:
    """Token ids of 3 to 12 tokens; the first tells the class."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (count,), generator=generator).tolist()
    lengths = torch.randint(2, 12, (count,), generator=generator).tolist()
    ids = [
        [2, 5 + label, *torch.randint(8, 64, (length - 1,), generator=generator).tolist()]
        for label, length in zip(labels, lengths, strict=True)
    ]
    return datasets.Dataset.from_dict({"input_ids": ids, "label": labels})


def accuracy(prediction: transformers.EvalPrediction) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


@pytest.fixture
def model(tiny_model: Callable) -> transformers.PreTrainedModel:
    return tiny_model("bert")


@pytest.fixture
def tokenizer(tmp_path: Path) -> Any:
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS))
    return transformers.BertTokenizer(vocab=str(tmp_path / "vocab.txt"))


@pytest.fixture
def recipe(tmp_path: Path, tokenizer: Any) -> Callable[..., Recipe]:
    """`recipe(method, folder="run", prepare=..., asked={...}, **training)`."""

    def make(
        method: str = "stompp_ste",
        folder: str = "run",
        prepare: Callable[[Any], None] = lambda trainer: None,
        asked: dict[str, Any] | None = None,
        **training: Any,
    ) -> Recipe:
        recipe_arguments = RecipeArguments(method, **(asked or {}))
        given = {"max_steps": 10, **training}
        args = StoMPPTrainingArguments(
            output_dir=str(tmp_path / folder),
            per_device_train_batch_size=8,
            save_steps=2,
            logging_steps=2,
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
            **given,
        )
        recipe_arguments.complete(args, given)
        return Recipe(
            recipe_arguments,
            args,
            tmp_path / folder,
            tokenizer,
            train_dataset=examples(32, 0),
            eval_datasets={"eval": examples(16, 1)},
            data_collator=DataCollatorWithPadding(tokenizer),
            compute_metrics=accuracy,
            prepare=prepare,
        )

    return make


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def assert_equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


class TestMethods:
    @pytest.mark.parametrize("method", BINARY_METHODS)
    def test_a_run_ends_fully_binary_and_packs_to_the_same_numbers(
        self, method: str, recipe: Callable, model: Any, logits: Callable, tmp_path: Path
    ) -> None:
        results = run_recipe(recipe(method), model)

        trained = results.trainer.model.eval()
        assert all(bool(module.freeze_mask.all()) for module in masked_modules(trained).values())
        loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "packed")
        assert packed_modules(loaded)
        torch.testing.assert_close(logits(loaded), logits(trained), rtol=1e-4, atol=1e-5)
        assert results.metrics["packed"]["eval_accuracy"] == results.metrics["binary_final"]["eval_accuracy"]
        assert results.steps == {"float": 0, "binary": 10} and results.packed_weights == "final"
        assert results.bytes["packed"] < results.bytes["float"] < results.bytes["latent"]

    @pytest.mark.parametrize(
        ("method", "config", "schedule"),
        [
            ("ste", {"surrogate": "clipped_ste"}, "immediate"),
            ("stompp", {"surrogate": "none"}, "cubic"),
            ("stompp_ste", {"surrogate": "clipped_ste"}, "cubic"),
            (
                "bit",
                {
                    "surrogate": "clipped_ste",
                    "weight_scale": "tensor",
                    "weight_center": "tensor",
                    "weight_window": 1000.0,
                    "activation_window": 1.0,
                    "initial_activation_scale": 2.0,
                    "feed_forward_levels": "zero_one",
                },
                "immediate",
            ),
        ],
    )
    def test_a_method_sets_what_its_name_says(
        self, method: str, config: dict[str, str], schedule: str, recipe: Callable
    ) -> None:
        made = recipe(method)
        expected = StoMPPConfig(**config).to_dict()
        assert made.config.to_dict() == expected and made.args.progression_schedule == schedule

    def test_the_table_is_what_the_command_lines_offer_and_the_text_lists(self) -> None:
        commands = next(
            action for action in cli.parser()._actions if isinstance(action, argparse._SubParsersAction)
        ).choices
        for parser in (commands["train"], HfArgumentParser(RecipeArguments)):
            method = next(action for action in parser._actions if "--method" in action.option_strings)
            assert list(method.choices) == list(METHODS)
            assert all(entry.help in method.help for entry in METHODS.values())
        row = next(line for line in README.read_text().splitlines() if line.startswith("| `--method` |"))
        assert all(f"`{name}`" in row for name in METHODS)

    def test_every_value_in_the_table_is_one_that_the_library_knows(self) -> None:
        for method in METHODS.values():
            for name, values in method.config.items():
                assert all(getattr(StoMPPConfig(**{name: value}), name) == value for value in values)
            StoMPPTrainingArguments("unused", **{name: values[0] for name, values in method.training.items()})
            StoMPPTrainingArguments("unused", **method.defaults)

    @pytest.mark.parametrize(
        ("method", "asked", "training", "message"),
        [
            ("sgd", {}, {}, "--method sgd is unknown. Give float, ste, stompp, stompp_ste, bit"),
            ("stompp", {"surrogate": "ste"}, {}, "--surrogate ste; it goes with none"),
            ("bit", {"weight_scale": "row"}, {}, "--weight_scale row; it goes with tensor"),
            ("bit", {"activation_window": 2.0}, {}, "--activation_window 2.0; it goes with 1.0"),
            ("bit", {}, {"progression_schedule": "cubic"}, "--progression_schedule cubic; it goes with immediate"),
            ("stompp_ste", {}, {"progression_schedule": "immediate"}, "goes with cubic or linear"),
            ("float", {"mode": "bwn"}, {}, "contradicted by --mode"),
            ("float", {}, {"progression_tail": 0.2}, "contradicted by --progression_tail"),
            ("stompp", {"float_num_train_epochs": -1.0}, {}, "is negative"),
        ],
    )
    def test_what_contradicts_the_method_is_refused(
        self, method: str, asked: dict, training: dict, message: str, recipe: Callable
    ) -> None:
        with pytest.raises(ValueError, match=message):
            recipe(method, asked=asked, **training)

    def test_what_is_asked_for_wins_over_the_defaults(self, recipe: Callable) -> None:
        args = recipe("ste", learning_rate=3e-3, train_sampling_strategy="random").args
        assert (args.learning_rate, args.train_sampling_strategy) == (3e-3, "random")
        assert recipe("ste").args.learning_rate == METHODS["ste"].defaults["learning_rate"]


class TestStages:
    @pytest.mark.slow
    def test_the_float_stage_is_what_a_float_run_does(
        self, recipe: Callable, tiny_model: Callable, tmp_path: Path
    ) -> None:
        float_run = run_recipe(
            recipe("float", "alone", learning_rate=1e-3, num_train_epochs=2.0, max_steps=-1), tiny_model("bert")
        )
        asked = {"float_num_train_epochs": 2.0, "float_learning_rate": 1e-3}
        results = run_recipe(recipe("ste", asked=asked), tiny_model("bert"))
        assert results.steps == {"float": 8, "binary": 10}
        assert_equal(weights(tmp_path / "alone"), weights(tmp_path / "run" / "float"))
        assert results.metrics["float"] == float_run.metrics["float"]

    def test_an_untrained_head_is_not_measured_and_teaches_nothing(self, recipe: Callable, model: Any) -> None:
        results = run_recipe(recipe(), model, head_is_trained=False)
        assert results.metrics["float"] is None and results.teacher is None

    def test_no_results_are_written_as_transformers_does_which_a_kill_would_cut(
        self, recipe: Callable, model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delattr(transformers.Trainer, "save_metrics")
        run_recipe(recipe(), model)
        found = {file.stem: json.loads(file.read_text()) for file in (tmp_path / "run").glob("*_results.json")}
        # Times tell the evaluation of the latent model from that of the packed one.
        assert found["all_results"] == found["train_results"] | found["eval_results"]

    def test_a_latent_model_is_trained_as_it_is(self, recipe: Callable, model: Any) -> None:
        latent = binarize(model, StoMPPConfig(mode="bwn"))
        results = run_recipe(recipe(), latent)
        assert results.trainer.model is latent and results.model.config.quantization_config.mode == "bwn"
        assert "float" not in results.metrics

    def test_a_packed_model_is_evaluated_and_not_trained(self, recipe: Callable, tiny_packed: Callable) -> None:
        packed = tiny_packed("bert")
        with pytest.raises(ValueError, match="cannot be trained"):
            run_recipe(recipe(), packed)
        assert set(evaluate_model(recipe(), packed).metrics["binary"]) == {"eval_loss", "eval_accuracy"}

    def test_summary_and_card_tell_the_run(self, recipe: Callable, model: Any, tmp_path: Path) -> None:
        made = recipe("bit", asked={"teacher": "none"})
        results = run_recipe(made, model)
        summary = summarize(made, results, task="words", model="tiny", examples={"train": 32}, command="run")
        assert json.loads(json.dumps(summary)) == summary
        assert (summary["method"], summary["teacher"], summary["config"]["weight_scale"]) == ("bit", None, "tensor")
        assert "words, bit, seed 42, tiny" in summary_table(summary)
        write_card(made, results, "tiny")
        card = (tmp_path / "run" / "packed" / "README.md").read_text()
        packed, before = (results.metrics[name]["eval_accuracy"] for name in ("packed", "float"))
        assert "# tiny" in card
        assert f"| measure | value | float model |\n|---|---|---|\n| accuracy | {packed:.4f} | {before:.4f} |" in card

    def test_what_is_far_below_float_is_told_with_what_helps(self) -> None:
        def told(packed: float, teacher: str | None = "float", mode: str = "bnn") -> str:
            metrics = {
                "float": {"eval_loss": 0.1, "eval_accuracy": 0.9},
                "packed": {"eval_loss": 0.5, "eval_accuracy": packed},
            }
            return compared_with_float({"metrics": metrics, "teacher": teacher, "config": {"mode": mode}})

        assert told(0.8).startswith(
            "accuracy: 0.8000 packed, 0.9000 float, 10.0 points below\nwhat helps: more epochs;"
        )
        assert "mode bwn" in told(0.8) and "teacher" not in told(0.8)
        assert "mode bwn" not in told(0.8, mode="bwn") and "teacher" in told(0.8, teacher=None)
        assert told(0.895) == "accuracy: 0.8950 packed, 0.9000 float, 0.5 points below"
        assert told(0.9) == "accuracy: 0.9000 packed, 0.9000 float, 0.0 points below"
        assert told(float("nan")) == ""
        assert told(0.91) == "accuracy: 0.9100 packed, 0.9000 float, 1.0 points above"
        # A new head is not measured.
        assert compared_with_float({"metrics": {"float": None, "packed": {"eval_accuracy": 0.5}}}) == ""


class Killed(Exception):
    pass


class KillAfter(transformers.TrainerCallback):
    """
    Ends the process, as far as a test can, after a step of one stage, whose last checkpoint is older; after step 10,
    when the last checkpoint is written and the model is not.
    """

    def __init__(self, trainer: Any, folder: str, step: int) -> None:
        self.is_meant, self.step = Path(trainer.args.output_dir).name == folder, step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.is_meant and state.global_step == self.step < 10:
            raise Killed

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.is_meant and self.step == 10:
            raise Killed


class TestRestart:
    @pytest.mark.slow
    @pytest.mark.parametrize("stage", ["float", "cut"])
    @pytest.mark.parametrize("method", ["stompp", "ste"])
    def test_a_run_killed_within_an_epoch_gives_the_same_weights_when_started_again(
        self, method: str, stage: str, recipe: Callable, tiny_model: Callable, tmp_path: Path
    ) -> None:
        # An epoch has 4 steps, and every second one leaves a checkpoint: the killed run goes on from step 6.
        asked = {"float_num_train_epochs": 3.0}
        run_recipe(recipe(method, "whole", asked=asked), tiny_model("bert"))
        killed = recipe(method, "cut", lambda trainer: trainer.add_callback(KillAfter(trainer, stage, 7)), asked=asked)
        with pytest.raises(Killed):
            run_recipe(killed, tiny_model("bert"))
        assert not (tmp_path / "cut" / "packed").exists()
        torch.manual_seed(123)
        run_recipe(recipe(method, "cut", asked=asked), tiny_model("bert"))
        for folder in ("float", ".", "packed"):
            assert_equal(weights(tmp_path / "whole" / folder), weights(tmp_path / "cut" / folder))

    @pytest.mark.slow
    @pytest.mark.parametrize("method", ["float", "stompp_ste"])
    def test_a_run_killed_after_its_last_step_takes_no_more(
        self, method: str, recipe: Callable, tiny_model: Callable, tmp_path: Path
    ) -> None:
        run_recipe(recipe(method, "whole"), tiny_model("bert"))
        with pytest.raises(Killed):
            run_recipe(
                recipe(method, "cut", lambda trainer: trainer.add_callback(KillAfter(trainer, "cut", 10))),
                tiny_model("bert"),
            )
        assert not (tmp_path / "cut" / "model.safetensors").exists()
        assert run_recipe(recipe(method, "cut"), tiny_model("bert")).trainer.state.global_step == 10
        assert_equal(weights(tmp_path / "whole"), weights(tmp_path / "cut"))

    def test_a_finished_float_model_is_not_trained_again(
        self, recipe: Callable, tiny_model: Callable, tmp_path: Path
    ) -> None:
        first = run_recipe(recipe("float"), tiny_model("bert"))
        written = (tmp_path / "run" / "model.safetensors").stat().st_mtime_ns
        second = run_recipe(recipe("float"), tiny_model("bert"))
        assert (tmp_path / "run" / "model.safetensors").stat().st_mtime_ns == written
        assert second.metrics == first.metrics and second.steps == first.steps == {"float": 10}
        assert second.trainer.state.log_history[: len(first.trainer.state.log_history) - 1]

    @pytest.fixture
    def killed(self, recipe: Callable, tiny_model: Callable, tmp_path: Path) -> Path:
        """The folder of a run that was killed after three steps."""
        run = recipe(prepare=lambda trainer: trainer.add_callback(KillAfter(trainer, "run", 3)))
        with pytest.raises(Killed):
            run_recipe(run, tiny_model("bert"))
        return tmp_path / "run"

    @pytest.mark.parametrize(
        ("other", "difference"),
        [
            ({"method": "ste"}, "method was 'stompp_ste', is 'ste'"),
            ({"asked": {"mode": "bwn"}}, "binarization was"),
            ({"asked": {"teacher": "none"}}, "teacher was 'float', is 'none'"),
            ({"learning_rate": 1.0}, "learning_rate was 0.0002, is 1.0"),
            ({"seed": 7}, "seed was 42, is 7"),
            ({"bf16": True}, "bf16 was False, is True"),
        ],
    )
    def test_the_folder_of_another_run_is_refused(
        self, killed: Path, other: dict, difference: str, recipe: Callable, tiny_model: Callable
    ) -> None:
        before = {path: path.stat().st_mtime_ns for path in killed.rglob("*")}
        with pytest.raises(ValueError, match=f"belongs to another run: .*{difference}"):
            run_recipe(recipe(**other), tiny_model("bert"))
        assert {path: path.stat().st_mtime_ns for path in killed.rglob("*")} == before

    def test_a_setting_that_an_earlier_version_did_not_record_is_no_difference(
        self, killed: Path, recipe: Callable, tiny_model: Callable
    ) -> None:
        file = killed / SETTINGS
        settings = json.loads(file.read_text(encoding="utf-8"))
        file.write_text(json.dumps({name: settings[name] for name in settings if name != "world_size"}))

        assert run_recipe(recipe(), tiny_model("bert")).metrics["packed"]

    def test_another_number_of_processes_is_a_difference(
        self, killed: Path, recipe: Callable, tiny_model: Callable
    ) -> None:
        file = killed / SETTINGS
        file.write_text(json.dumps({**json.loads(file.read_text(encoding="utf-8")), "world_size": 2}))

        with pytest.raises(ValueError, match="belongs to another run: world_size was 2, is 1"):
            run_recipe(recipe(), tiny_model("bert"))


class TestOrderOfExamples:
    def test_batches_are_grouped_by_length_and_depend_on_seed_and_epoch_alone(
        self, recipe: Callable, model: Any
    ) -> None:
        trainer = make_trainer(dataclasses.replace(recipe(), train_dataset=examples(256, 0)), model, train=True)
        sampler = trainer._get_train_sampler()
        first = list(sampler)
        torch.manual_seed(5)
        assert list(sampler) == first and sorted(first) == list(range(256))
        trainer.state.epoch = 1.25
        second = list(sampler)
        trainer.state.epoch = 1.0
        assert list(sampler) == second != first
        lengths = torch.tensor([len(trainer.train_dataset[i]["input_ids"]) for i in first]).view(-1, 8)
        spread = (lengths.amax(1) - lengths.amin(1)).float().mean()
        unsorted = torch.tensor([len(row) for row in trainer.train_dataset["input_ids"]]).view(-1, 8)
        assert spread < 0.5 * (unsorted.amax(1) - unsorted.amin(1)).float().mean()

    def test_predictions_come_in_the_order_of_the_data_set(self, recipe: Callable, model: Any) -> None:
        made = recipe()
        predictions = make_trainer(made, model).predict(made.eval_datasets["eval"])
        assert predictions.label_ids.tolist() == made.eval_datasets["eval"]["label"][:]


class TestTeacher:
    @pytest.fixture
    def folder(self, tiny_model: Callable, tmp_path: Path) -> str:
        tiny_model("bert", seed=3).save_pretrained(tmp_path / "teacher")
        return str(tmp_path / "teacher")

    @pytest.mark.parametrize(("teacher", "expected"), [("float", "float"), ("none", None)])
    def test_the_float_model_teaches_unless_told_otherwise(
        self, teacher: str, expected: str | None, recipe: Callable, model: Any
    ) -> None:
        assert run_recipe(recipe(asked={"teacher": teacher}), model).teacher == expected

    def test_a_named_model_teaches(self, folder: str, recipe: Callable, model: Any) -> None:
        assert run_recipe(recipe(asked={"teacher": folder}), model, head_is_trained=False).teacher == folder

    def test_a_teacher_that_cannot_teach_is_refused_before_anything_is_trained(
        self, recipe: Callable, model: Any, tiny_model: Callable, tiny_packed: Callable, tmp_path: Path
    ) -> None:
        tiny_model("bert", transformers.AutoModel).save_pretrained(tmp_path / "headless")
        tiny_packed("bert").save_pretrained(tmp_path / "packed")
        for name, message in (("headless", "no trained head"), ("packed", "is binarized")):
            with pytest.raises(ValueError, match=message):
                run_recipe(recipe(asked={"teacher": str(tmp_path / name), "float_num_train_epochs": 1.0}), model)
        assert not (tmp_path / "run" / "float").exists()

    def test_the_code_of_a_teacher_is_not_run(
        self, recipe: Callable, model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "evil").mkdir()
        (tmp_path / "evil" / "evil.py").write_text("raise SystemExit")
        config = {"model_type": "evil", "auto_map": {"AutoConfig": "evil.C"}}
        (tmp_path / "evil" / "config.json").write_text(json.dumps(config))
        monkeypatch.setattr("builtins.input", lambda question: "y")
        with pytest.raises(ValueError, match="comes with code of its own, which is not run"):
            run_recipe(recipe(asked={"teacher": str(tmp_path / "evil")}), model)

    def test_a_teacher_with_another_tokenizer_is_refused_before_anything_is_trained(
        self, folder: str, recipe: Callable, model: Any
    ) -> None:
        words = [*WORDS[:5], *reversed(WORDS[5:])]
        (Path(folder) / "vocab.txt").write_text("\n".join(words))
        transformers.BertTokenizer(vocab=str(Path(folder) / "vocab.txt")).save_pretrained(folder)
        with pytest.raises(ValueError, match="has another tokenizer than the student"):
            run_recipe(recipe(asked={"teacher": folder}), model)

    def test_the_trainer_gets_the_teacher(self, recipe: Callable, model: Any) -> None:
        student = binarize(copy.deepcopy(model))
        assert make_trainer(recipe(), student, train=True, teacher=model).teacher is model


class TestStart:
    def test_word_embeddings_that_are_not_trained_stay_as_they_were(self, recipe: Callable, model: Any) -> None:
        before = model.get_input_embeddings().weight.detach().clone()
        results = run_recipe(recipe(asked={"train_word_embeddings": False}, learning_rate=1e-2), model)
        trained = results.trainer.model
        assert torch.equal(trained.get_input_embeddings().weight, before)
        assert not torch.equal(trained.classifier.weight, model.classifier.weight)

    def test_dropout_is_that_which_is_asked_for_and_that_of_the_model_otherwise(
        self, recipe: Callable, model: Any
    ) -> None:
        for asked, expected in ((None, 0.1), (0.0, 0.0)):
            folder = f"dropout-{asked}"
            trained = run_recipe(recipe(folder=folder, asked={"dropout": asked}), copy.deepcopy(model)).trainer.model
            assert {m.p for m in trained.modules() if isinstance(m, torch.nn.Dropout)} == {expected}

    def test_a_latent_model_is_trained_on_as_it_was_binarized(
        self, recipe: Callable, model: Any, tmp_path: Path
    ) -> None:
        config = {"feed_forward_levels": "zero_one", "activation_window": 1.5}
        first = run_recipe(recipe("ste", asked=config), copy.deepcopy(model))
        latent = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run")
        scales = {name: value.clone() for name, value in latent.state_dict().items() if name.endswith(".scale")}
        model.save_pretrained(tmp_path / "teacher")
        asked = {**config, "teacher": str(tmp_path / "teacher")}
        # So slow that nothing moves: what is not learned must be there from the start.
        second = run_recipe(recipe("ste", folder="second", asked=asked, learning_rate=1e-12), latent)
        assert "float" not in second.metrics and second.teacher == asked["teacher"]
        assert second.metrics["packed"]["eval_loss"] == pytest.approx(first.metrics["packed"]["eval_loss"], rel=1e-4)
        state = second.trainer.model.state_dict()
        for name, value in scales.items():
            torch.testing.assert_close(state[name], value)
        assert second.config.feed_forward_levels == "zero_one"

    @pytest.mark.parametrize(
        ("method", "asked", "message"),
        [
            ("stompp", {}, "binarized with surrogate='clipped_ste', and 'none' is asked for"),
            ("ste", {"mode": "bwn"}, "binarized with mode='bnn', and 'bwn' is asked for"),
            ("ste", {"float_num_train_epochs": 1.0}, "has no float stage"),
            ("float", {}, "has no float stage"),
        ],
    )
    def test_a_latent_model_that_was_binarized_otherwise_is_refused(
        self, method: str, asked: dict[str, Any], message: str, recipe: Callable, model: Any
    ) -> None:
        with pytest.raises(ValueError, match=message):
            run_recipe(recipe(method, asked=asked), binarize(model))


@pytest.fixture
def float_trainer(tmp_path: Path) -> transformers.Trainer:
    args = StoMPPTrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    return transformers.Trainer(torch.nn.Linear(1, 1), args)


def test_results_that_cannot_be_written_whole_leave_those_that_are_there(
    float_trainer: transformers.Trainer, tmp_path: Path
) -> None:
    resource = pytest.importorskip("resource")
    save_metrics(float_trainer, "train", {"loss": 1.0})
    _, hard = before = resource.getrlimit(resource.RLIMIT_FSIZE)
    # Enough for eval_results.json, not for all_results.json.
    resource.setrlimit(resource.RLIMIT_FSIZE, (30, hard))
    try:
        with pytest.raises(OSError):
            save_metrics(float_trainer, "eval", {"eval_loss": 2.0})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert json.loads((tmp_path / "all_results.json").read_text()) == {"loss": 1.0}
    assert json.loads((tmp_path / "eval_results.json").read_text()) == {"eval_loss": 2.0}
    save_metrics(float_trainer, "eval", {"eval_loss": 2.0})
    assert json.loads((tmp_path / "all_results.json").read_text()) == {"loss": 1.0, "eval_loss": 2.0}


def test_results_are_saved_as_the_trainer_saves_them(
    float_trainer: transformers.Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def written(save: Callable[..., None]) -> dict[str, Any]:
        save("train", {"train_loss": 1.0, "epoch": 2})
        # Of a run that is started again.
        save("train", {"train_loss": 0.5, "epoch": 3})
        save("eval_float", {"eval_float_loss": 3.0}, combined=False)
        with monkeypatch.context() as elsewhere:
            elsewhere.setattr(float_trainer, "is_world_process_zero", lambda: False)
            save("eval", {"eval_loss": 4.0})
        files = {file.name: list(json.loads(file.read_text()).items()) for file in tmp_path.iterdir()}
        for file in tmp_path.iterdir():
            file.unlink()
        return files

    assert written(functools.partial(save_metrics, float_trainer)) == written(float_trainer.save_metrics)


@pytest.mark.parametrize("content", ['{"train_loss": 1.', "3", "[]", "[" * 100_000], ids=["cut", "3", "[]", "nested"])
def test_damaged_results_of_an_earlier_start_are_begun_anew(
    float_trainer: transformers.Trainer, tmp_path: Path, caplog: pytest.LogCaptureFixture, content: str
) -> None:
    (tmp_path / "all_results.json").write_text(content)
    save_metrics(float_trainer, "eval", {"eval_loss": 2.0})
    assert json.loads((tmp_path / "all_results.json").read_text()) == {"eval_loss": 2.0}
    assert "all_results.json is damaged" in caplog.text
