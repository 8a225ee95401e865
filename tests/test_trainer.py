from __future__ import annotations

import copy
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from masks import advance_mask_
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    BertForSequenceClassification,
    EarlyStoppingCallback,
    PreTrainedModel,
    TrainerCallback,
    TrainingArguments,
)

from hf_stompp import StoMPPConfig, StoMPPTrainer, StoMPPTrainingArguments, binarize, commit, pack, unpack
from hf_stompp.model.integrity import last_whole_checkpoint
from hf_stompp.model.modules import masked_modules
from hf_stompp.nn import MaskedBinaryActivation
from hf_stompp.nn.mask import mask_generator
from hf_stompp.training.callbacks import ProgressionCallback


# Older versions of Transformers call it gradient_checkpointing.
CHECKPOINTING = (
    "activation_checkpointing"
    if "activation_checkpointing" in TrainingArguments.__dataclass_fields__
    else "gradient_checkpointing"
)
VOCABULARY = 64
LAYERS = 3


def make_model(layers: int = LAYERS, **overrides: Any) -> PreTrainedModel:
    from transformers import BertConfig

    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 36,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "intermediate_size": 76,
        "max_position_embeddings": 40,
        "num_labels": 2,
    }
    return BertForSequenceClassification(BertConfig(**{**sizes, **overrides}))


def make_dataset(rows: int = 32, seed: int = 0) -> Dataset:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (rows, 10), generator=generator)
    return Dataset.from_dict({"input_ids": ids.tolist(), "labels": (ids[:, 0] > VOCABULARY // 2).long().tolist()})


def accuracy(prediction: Any) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def make_trainer(
    folder: Path | str, surrogate: str = "ste", model: PreTrainedModel | None = None, **arguments: Any
) -> StoMPPTrainer:
    callbacks = arguments.pop("callbacks", None)
    train_dataset = arguments.pop("train_dataset", make_dataset())
    model = binarize(make_model(), StoMPPConfig(surrogate=surrogate)) if model is None else model
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": 12,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "refresh_period": 5,
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "report_to": "none",
    }
    return StoMPPTrainer(
        model=model,
        args=StoMPPTrainingArguments(**{**settings, **arguments}),
        train_dataset=train_dataset,
        eval_dataset=make_dataset(16, seed=1),
        compute_metrics=accuracy,
        callbacks=callbacks,
    )


def state_of(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def assert_same_state(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


class Recorder(TrainerCallback):
    """Keeps what `look(model)` returns after every step."""

    def __init__(self, look: Any) -> None:
        self.look = look
        self.seen: list[Any] = []

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.seen.append(self.look(model))


def masks_of(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: module.freeze_mask.clone() for name, module in masked_modules(model).items()}


# --- the progression in the training loop ----------------------------------------------------------------------------


@pytest.mark.parametrize("accumulation", [1, 2])
def test_masks_advance_once_per_optimizer_step(tmp_path: Path, accumulation: int) -> None:
    recorder = Recorder(masks_of)
    trainer = make_trainer(tmp_path, gradient_accumulation_steps=accumulation, callbacks=[recorder])
    trainer.train()

    progression = trainer.progression_callback.progression
    units = {module: entry.unit for module, entry in trainer.model.config.quantization_config.plan.items()}
    for name in recorder.seen[0]:
        unit = units[name] if name in units else units[name.rpartition(".")[0]]
        index = progression.units.index(unit)
        mask = torch.zeros_like(recorder.seen[0][name])
        for step, seen in enumerate(recorder.seen):
            before, now = (progression.fraction(index, s) if s >= 0 else 0.0 for s in (step - 1, step))
            if 0.0 < now and before < 1.0:
                generator = mask_generator(progression.seed, unit, f"{name}.freeze_mask", step)
                advance_mask_(mask, before, now, 5, generator)
            assert torch.equal(seen[name], mask), (name, step)


def test_everything_is_frozen_before_the_last_step(tmp_path: Path) -> None:
    recorder = Recorder(lambda model: all(bool(m.freeze_mask.all()) for m in masked_modules(model).values()))
    trainer = make_trainer(tmp_path, callbacks=[recorder])
    trainer.train()
    first = trainer.progression_callback.progression.committed_step
    assert recorder.seen == [step >= first for step in range(12)]
    assert first < 11


def test_vanilla_ste_is_frozen_from_the_first_step(tmp_path: Path) -> None:
    recorder = Recorder(lambda model: all(m.committed for m in masked_modules(model).values()))
    make_trainer(tmp_path, progression_schedule="immediate", max_steps=3, callbacks=[recorder]).train()
    assert recorder.seen == [True, True, True]


def test_frozen_latent_weights_do_not_move_without_ste(tmp_path: Path) -> None:
    frozen_since: dict[str, tuple[Tensor, Tensor]] = {}

    def look(model: PreTrainedModel) -> None:
        for name, module in masked_modules(model).items():
            if isinstance(module, MaskedBinaryActivation):
                continue
            mask, value = frozen_since.setdefault(
                name, (torch.zeros_like(module.freeze_mask), module.weight.detach().clone())
            )
            assert torch.equal(module.weight[mask], value[mask]), name
            value.copy_(module.weight.detach())
            mask.copy_(module.freeze_mask)

    # Large momentum and decay, and no refresh that would thaw an entry.
    trainer = make_trainer(
        tmp_path, "none", weight_decay=0.5, learning_rate=1e-2, refresh_period=1e12, callbacks=[Recorder(look)]
    )
    before = state_of(trainer.model)
    trainer.train()
    moved = [name for name, value in trainer.model.named_parameters() if not torch.equal(value, before[name])]
    assert any(name.endswith("query.weight") for name in moved)


def test_gradients_flags_and_buffers_are_never_rebound(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, "none")
    pointers = {name: buffer.data_ptr() for name, buffer in trainer.model.named_buffers()}
    trainer.train()
    assert all(parameter.requires_grad for parameter in trainer.model.parameters())
    assert {name: buffer.data_ptr() for name, buffer in trainer.model.named_buffers()} == pointers


def test_activation_parameters_get_no_weight_decay(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    names = trainer.get_decay_parameter_names(trainer.model)
    assert not [name for name in names if name.rpartition(".")[2] in ("scale", "shift", "threshold")]
    assert any(name.endswith("query.weight") for name in names)


def test_activation_parameters_take_the_learning_rate_they_are_given(tmp_path: Path) -> None:
    settings = {"lr_scheduler_type": "constant", "progression_schedule": "immediate", "max_steps": 1}
    trainer = make_trainer(tmp_path, activation_learning_rate=1e-6, learning_rate=1e-2, weight_decay=0.1, **settings)
    trainer.evaluate()  # initialises scales, shifts and thresholds
    before = state_of(trainer.model)
    trainer.train()

    moved = {}
    for name, parameter in trainer.model.named_parameters():
        # The first step of Adam is the learning rate long, in every entry that has a gradient.
        moved[name] = (parameter.detach() - before[name]).abs().max().item()
    ours = {name for name in moved if name.rpartition(".")[2] in ("scale", "shift", "threshold")}
    assert max(moved[name] for name in ours) < 2e-6
    assert all(0 < moved[name] for name in ours if name.endswith("scale"))
    assert moved["bert.encoder.layer.0.attention.self.query.weight"] > 5e-3
    grouped = [parameter for group in trainer.optimizer.param_groups for parameter in group["params"]]
    assert len(grouped) == len({id(parameter) for parameter in grouped}) == len(moved)


def test_a_learning_rate_of_activations_is_refused_beside_an_optimizer_of_the_users_own(tmp_path: Path) -> None:
    model = binarize(make_model(), StoMPPConfig())
    optimizers = torch.optim.SGD(model.parameters(), lr=0.1), None
    args = StoMPPTrainingArguments(str(tmp_path), activation_learning_rate=1e-4, use_cpu=True, report_to="none")
    with pytest.raises(ValueError, match="activation_learning_rate is for the optimizer that StoMPPTrainer makes"):
        StoMPPTrainer(model=model, args=args, train_dataset=make_dataset(), optimizers=optimizers)


def test_same_seed_gives_the_same_weights(tmp_path: Path) -> None:
    states = []
    for run in range(2):
        torch.manual_seed(run)  # the masks must not depend on the global generator
        trainer = make_trainer(tmp_path / str(run), model=binarize(make_model(), StoMPPConfig()))
        trainer.train()
        states.append(state_of(trainer.model))
    assert_same_state(*states)


def test_another_mask_seed_gives_other_masks(tmp_path: Path) -> None:
    seen = []
    for seed in (0, 1):
        recorder = Recorder(masks_of)
        make_trainer(tmp_path, mask_seed=seed, callbacks=[recorder]).train()
        seen.append(recorder.seen[0])
    name = "bert.encoder.layer.0.output.dense"
    assert not torch.equal(seen[0][name], seen[1][name])


def test_logs_tell_the_frozen_fraction_of_each_unit(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    first = logs[0]["frozen_fraction/bert.encoder.layer.0"]
    assert 0.0 < first < 1.0 and logs[0]["frozen_fraction/bert.encoder.layer.2"] == 0.0
    assert logs[0]["frozen_fraction/all"] == pytest.approx(first / LAYERS)
    assert logs[-1]["frozen_fraction/all"] == 1.0


def test_progress_bar_names_the_unit_in_transition(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    make_trainer(tmp_path, disable_tqdm=False).train()
    shown = capfd.readouterr().err
    assert "bert.encoder.layer.1 " in shown and "% frozen" in shown and "fully binary" in shown


# --- evaluation ------------------------------------------------------------------------------------------------------


def test_eval_is_the_fully_binary_network_and_mixed_is_told_apart(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, max_steps=12)
    trainer.control.should_training_stop = False
    trainer.add_callback(StopAfter(5))
    trainer.train()
    assert not trainer.is_committed

    before = state_of(trainer.model)
    metrics = trainer.evaluate()
    assert_same_state(state_of(trainer.model), before)

    committed = commit(copy.deepcopy(trainer.model))
    reference = make_trainer(tmp_path / "reference", model=committed).evaluate()
    assert metrics["eval_loss"] == reference["eval_loss"]
    assert metrics["eval_mixed_loss"] != metrics["eval_loss"]
    assert "eval_mixed_loss" not in reference
    assert set(metrics) >= {"eval_accuracy", "eval_mixed_accuracy"}


class StopAfter(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = control.should_training_stop or state.global_step >= self.step


def test_predictions_are_those_of_the_fully_binary_network(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    trainer.add_callback(StopAfter(5))
    trainer.train()
    predicted = trainer.predict(trainer.eval_dataset).predictions
    committed = commit(copy.deepcopy(trainer.model)).eval()
    with torch.no_grad():
        expected = committed(input_ids=torch.tensor(trainer.eval_dataset["input_ids"][:])).logits
    torch.testing.assert_close(torch.tensor(predicted), expected)


def test_an_error_during_evaluation_leaves_the_masks_as_they_were(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    trainer.add_callback(StopAfter(5))
    trainer.train()
    before = state_of(trainer.model)

    def fail(prediction: Any) -> dict[str, float]:
        raise RuntimeError("metric failed")

    trainer.compute_metrics = fail
    with pytest.raises(RuntimeError, match="metric failed"):
        trainer.evaluate()
    assert_same_state(state_of(trainer.model), before)
    assert not trainer.is_committed


def test_the_best_model_is_never_a_mixed_one(tmp_path: Path) -> None:
    trainer = make_trainer(
        tmp_path,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        # Training makes it worse, so that the first checkpoints would be the best.
        learning_rate=0.1,
    )
    trainer.train()
    assert trainer.state.best_global_step > trainer.progression_callback.progression.committed_step
    assert trainer.is_committed
    assert all(bool(module.freeze_mask.all()) for module in masked_modules(trainer.model).values())
    assert trainer.evaluate()["eval_loss"] == pytest.approx(trainer.state.best_metric, rel=1e-6)


def test_early_stopping_waits_until_the_network_is_committed(tmp_path: Path) -> None:
    trainer = make_trainer(
        tmp_path,
        max_steps=40,
        progression_tail=0.6,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        save_total_limit=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        learning_rate=0.1,
        callbacks=[EarlyStoppingCallback(early_stopping_patience=2)],
    )
    trainer.train()
    committed = trainer.progression_callback.progression.committed_step
    assert committed + 2 < trainer.state.global_step < 40


# --- resuming --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("surrogate", ["none", "ste"])
@pytest.mark.parametrize("at", [3, 6, 10])
def test_a_resumed_run_ends_in_the_same_weights(tmp_path: Path, surrogate: str, at: int) -> None:
    whole = make_trainer(tmp_path / "whole", surrogate)
    whole.train()
    arguments = {"save_strategy": "steps", "save_steps": at}
    interrupted = make_trainer(tmp_path / "parts", surrogate, callbacks=[StopAfter(at)], **arguments)
    interrupted.train()

    resumed = make_trainer(tmp_path / "parts", surrogate, **arguments)
    resumed.train(resume_from_checkpoint=str(tmp_path / "parts" / f"checkpoint-{at}"))
    assert resumed.state.global_step == 12
    assert_same_state(state_of(resumed.model), state_of(whole.model))


def test_a_checkpoint_that_was_cut_off_is_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole = make_trainer(tmp_path / "whole")
    whole.train()
    arguments = {"save_strategy": "steps", "save_steps": 3}
    make_trainer(tmp_path / "parts", callbacks=[StopAfter(9)], **arguments).train()
    # As a kill while it was being written leaves it.
    (tmp_path / "parts" / "checkpoint-9" / "trainer_state.json").unlink()

    resumed = make_trainer(tmp_path / "parts", **arguments)
    resumed.train(resume_from_checkpoint=True)
    assert "checkpoint-9 was not written to its end" in caplog.text
    assert_same_state(state_of(resumed.model), state_of(whole.model))
    with pytest.raises(ValueError, match="holds no checkpoint to resume from"):
        make_trainer(tmp_path / "none", **arguments).train(resume_from_checkpoint=True)


@pytest.mark.parametrize("damage", ["missing", "cut"])
@pytest.mark.parametrize(
    "name", ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "config.json", "trainer_state.json"]
)
def test_a_run_resumes_from_the_last_checkpoint_that_is_whole(tmp_path: Path, name: str, damage: str) -> None:
    arguments = {"save_strategy": "steps", "save_steps": 3}
    make_trainer(tmp_path, callbacks=[StopAfter(6)], **arguments).train()
    file = tmp_path / "checkpoint-6" / name
    content = file.read_bytes()
    file.unlink()
    if damage == "cut":
        file.write_bytes(content[: len(content) // 2])

    with pytest.raises(ValueError, match=str(tmp_path / "checkpoint-6")):
        make_trainer(tmp_path, **arguments).train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert last_whole_checkpoint(tmp_path) == str(tmp_path / "checkpoint-3")


@pytest.mark.parametrize("content", ["[]", "5", "null", '{"stateful_callbacks": []}', "[" * 100_000], ids=str)
def test_a_trainer_state_that_is_none_is_refused(tmp_path: Path, content: str) -> None:
    checkpoint = saved_run(tmp_path)
    (checkpoint / "trainer_state.json").write_text(content)
    trainer = make_trainer(tmp_path)

    with pytest.raises(ValueError, match=r"trainer_state.json"):
        trainer._check_checkpoint(checkpoint)


def test_the_best_checkpoint_is_checked_before_it_is_loaded(tmp_path: Path) -> None:
    class Alter(TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == state.max_steps:
                file = Path(state.best_model_checkpoint) / "model.safetensors"
                content = file.read_bytes()
                file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))

    steps = {"eval_steps": 2, "save_steps": 2, "eval_strategy": "steps", "save_strategy": "steps"}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss"}
    trainer = make_trainer(tmp_path, callbacks=[Alter()], **steps, **best)
    with pytest.raises(ValueError, match=r"was altered after it was saved"):
        trainer.train()


def test_an_empty_evaluation_set_is_as_to_any_trainer(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)

    assert "eval_loss" not in trainer.evaluate(make_dataset().select([]))


class SkipStep(TrainerCallback):
    """A step without gradients."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step == self.step:
            model.zero_grad()


class BreakAfter(TrainerCallback):
    """What a step that diverges leaves."""

    def __init__(self, step: int, value: float) -> None:
        self.step, self.value = step, value

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step == self.step:
            model.classifier.bias.data[0] = self.value


@pytest.mark.parametrize(("save_steps", "left"), [(2, ["checkpoint-2"]), (3, ["checkpoint-3"])])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_run_that_diverges_stops_with_the_step_and_keeps_what_was_saved_before(
    tmp_path: Path, save_steps: int, left: list[str], value: float
) -> None:
    trainer = make_trainer(
        tmp_path, callbacks=[BreakAfter(4, value)], save_strategy="steps", save_steps=save_steps, save_total_limit=2
    )

    with pytest.raises(
        ValueError, match=r"after step 4 classifier.bias holds NaN .*encoder.layer.1 was in transition"
    ):
        trainer.train()
    assert sorted(folder.name for folder in tmp_path.glob("checkpoint-*")) == left


def test_a_checkpoint_whose_buffers_are_infinite_is_not_written(tmp_path: Path) -> None:
    class Overflow(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            if state.global_step == 5:
                model.recorded.fill_(math.inf)

    trainer = make_trainer(tmp_path, callbacks=[Overflow()], save_strategy="steps", save_steps=3)
    # As BatchNorm's, which no gradient reaches.
    trainer.model.register_buffer("recorded", torch.zeros(3))

    with pytest.raises(ValueError, match=r"after step 6 recorded holds NaN or infinity"):
        trainer.train()
    assert [folder.name for folder in tmp_path.glob("checkpoint-*")] == ["checkpoint-3"]


def test_a_loss_that_is_nan_once_does_not_end_a_run(tmp_path: Path) -> None:
    class Bad(StoMPPTrainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(*args, **kwargs)
            # As one batch may do in half precision, whose step is then left out.
            return loss * (torch.zeros(()) * math.inf) if self.state.global_step == 2 else loss

    trainer = make_trainer(tmp_path)
    trainer.__class__ = Bad
    trainer.add_callback(SkipStep(2))
    trainer.train()
    assert trainer.state.global_step == 12


class Close(TrainerCallback):
    """Makes the folder of a run read-only."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            Path(args.output_dir).chmod(0o555)


@pytest.mark.usefixtures("permissions_hold")
def test_a_run_whose_folder_becomes_read_only_says_so_and_goes_on_from_the_checkpoint_before(tmp_path: Path) -> None:
    arguments = {"save_strategy": "steps", "save_steps": 3}
    whole, run = make_trainer(tmp_path / "whole", **arguments), tmp_path / "run"
    whole.train()
    with pytest.raises(PermissionError, match=rf"Permission denied: '{run}/checkpoint-6'"):
        make_trainer(run, callbacks=[Close(5)], **arguments).train()

    run.chmod(0o755)
    resumed = make_trainer(run, **arguments)
    resumed.train(resume_from_checkpoint=True)
    assert_same_state(state_of(resumed.model), state_of(whole.model))


class Overflow(TrainerCallback):
    """A step whose gradients are not finite, as in float16 when the loss was scaled too far."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step == self.step:
            model.classifier.weight.grad.fill_(math.inf)


def scaled_trainer(folder: Path, surrogate: str = "ste", **arguments: Any) -> StoMPPTrainer:
    trainer = make_trainer(folder, surrogate, max_grad_norm=0.0, **arguments)
    # As Accelerate makes it for fp16=True on a GPU; on a CPU it makes none.
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)
    return trainer


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused"])
@pytest.mark.parametrize("surrogate", ["none", "ste"])
def test_a_step_that_overflows_moves_no_weight_and_the_masks_go_on_with_the_step(
    tmp_path: Path, surrogate: str, optim: str
) -> None:
    states, masks = Recorder(state_of), Recorder(masks_of)
    whole = Recorder(masks_of)
    trainer = scaled_trainer(tmp_path, surrogate, optim=optim, callbacks=[Overflow(5), states, masks])
    trainer.train()
    make_trainer(tmp_path / "whole", surrogate, callbacks=[whole]).train()

    assert trainer.state.global_step == 12 and trainer.is_committed
    # Those of a run without overflow: they follow the Trainer's steps, which counts one that was not taken.
    for found, expected in zip(masks.seen, whole.seen, strict=True):
        assert_same_state(found, expected)
    moved = {
        step
        for step, (before, after) in enumerate(zip(states.seen, states.seen[1:], strict=False), start=1)
        if any(not name.endswith("freeze_mask") and not torch.equal(before[name], after[name]) for name in before)
    }
    assert moved == set(range(1, 12)) - {5}
    assert trainer.accelerator.scaler.get_scale() < 2.0**10 * 2**4


def test_a_resumed_run_that_scales_its_loss_ends_in_the_same_weights(tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"save_strategy": "steps", "save_steps": 6}
    whole = scaled_trainer(tmp_path / "whole", callbacks=[Overflow(4)], **arguments)
    whole.train()
    scaled_trainer(tmp_path / "parts", callbacks=[Overflow(4), StopAfter(6)], **arguments).train()

    resumed = scaled_trainer(tmp_path / "parts", **arguments)
    resumed.train(resume_from_checkpoint=True)
    assert_same_state(state_of(resumed.model), state_of(whole.model))
    assert resumed.accelerator.scaler.state_dict() == whole.accelerator.scaler.state_dict()


@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_a_run_that_scales_its_loss_resumes_from_a_checkpoint_with_its_scale(tmp_path: Path, damage: str) -> None:
    arguments: dict[str, Any] = {"save_strategy": "steps", "save_steps": 3}
    scaled_trainer(tmp_path, callbacks=[StopAfter(6)], **arguments).train()
    file = tmp_path / "checkpoint-6" / "scaler.pt"
    content = file.read_bytes()
    file.unlink()
    if damage == "cut":
        file.write_bytes(content[: len(content) // 2])

    with pytest.raises(ValueError, match=f"{tmp_path / 'checkpoint-6'}.*scaler.pt"):
        scaled_trainer(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    steps = Recorder(lambda model: None)
    resumed = scaled_trainer(tmp_path, callbacks=[steps])
    resumed.train(resume_from_checkpoint=True)
    # From step 3 on.
    assert resumed.state.global_step == 12 and len(steps.seen) == 9


def test_resuming_a_finished_run_takes_no_step(tmp_path: Path) -> None:
    # 12 steps end in the middle of the second epoch of 8.
    trainer = make_trainer(tmp_path, save_strategy="steps", save_steps=12)
    trainer.train()
    resumed = make_trainer(tmp_path, save_strategy="steps", save_steps=12)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-12"))
    assert resumed.state.global_step == 12
    assert_same_state(state_of(resumed.model), state_of(trainer.model))


def saved_run(folder: Path, **arguments: Any) -> Path:
    make_trainer(folder, save_strategy="steps", save_steps=6, callbacks=[StopAfter(6)], **arguments).train()
    return folder / "checkpoint-6"


@pytest.mark.parametrize(
    "changed",
    [
        {"progression_schedule": "linear"},
        {"progression_order": "reverse"},
        {"progression_tail": 0.1},
        {"refresh_period": 50},
        {"mask_seed": 7},
        {"max_steps": 24},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_resuming_with_another_progression_is_refused(tmp_path: Path, changed: dict[str, Any]) -> None:
    checkpoint = saved_run(tmp_path)
    files = {path: path.read_bytes() for path in checkpoint.iterdir()}
    trainer = make_trainer(tmp_path, **changed)
    with pytest.raises(ValueError, match=r"another progression.*Saved -> now"):
        trainer.train(resume_from_checkpoint=str(checkpoint))
    assert {path: path.read_bytes() for path in checkpoint.iterdir()} == files


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"seed": 7}, "seed: 42 -> 7"),
        ({"data_seed": 7}, "data_seed: None -> 7"),
        ({"train_sampling_strategy": "sequential"}, "train_sampling_strategy: 'random' -> 'sequential'"),
        ({"per_device_train_batch_size": 8}, "per_device_train_batch_size: 4 -> 8"),
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps: 1 -> 2"),
        ({"bf16": True}, "mixed_precision: 'no' -> 'bf16'"),
        ({"model": torch.bfloat16}, "dtype: 'float32' -> 'bfloat16'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_resuming_with_another_order_or_batch_or_precision_is_refused(
    tmp_path: Path, changed: dict[str, Any], told: str
) -> None:
    # With a seed of its own for the masks nothing else would tell that the data come in another order.
    checkpoint = saved_run(tmp_path, mask_seed=5)
    if "model" in changed:
        changed = {"model": binarize(make_model(), StoMPPConfig(surrogate="ste")).to(changed["model"])}
    with pytest.raises(ValueError, match=rf"resume with the settings .* Saved -> now: {told}$"):
        make_trainer(tmp_path, mask_seed=5, **changed).train(resume_from_checkpoint=str(checkpoint))


def test_resuming_on_another_machine_warns_of_other_bits(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    checkpoint = saved_run(tmp_path)
    make_trainer(tmp_path).train(resume_from_checkpoint=str(checkpoint))
    assert "another machine" not in caplog.text
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    state["stateful_callbacks"][ProgressionCallback.__name__]["attributes"]["machine"] = "A64FX, torch 2.11.0"
    (checkpoint / "trainer_state.json").write_text(json.dumps(state))
    make_trainer(tmp_path).train(resume_from_checkpoint=str(checkpoint))
    assert "was written on another machine (A64FX, torch 2.11.0, here " in caplog.text


@pytest.mark.slow
def test_callbacks_restored_from_a_checkpoint_go_on_like_those_that_were_not(tmp_path: Path) -> None:
    whole = make_trainer(tmp_path / "whole")
    whole.train()
    checkpoint = saved_run(tmp_path / "cut")
    resumed = make_trainer(tmp_path / "cut", restore_callback_states_from_checkpoint=True)
    resumed.train(resume_from_checkpoint=str(checkpoint))

    assert resumed.progression_callback.trainer is resumed
    before, after = state_of(whole.model), state_of(resumed.model)
    assert [name for name in before if not torch.equal(before[name], after[name])] == []


def test_encoder_of_one_layer_trains_and_packs(tmp_path: Path, tiny_model: Any, tiny_inputs: Any) -> None:
    model = binarize(tiny_model("bert", num_hidden_layers=1, num_labels=2))
    trainer = make_trainer(tmp_path, model=model)
    trainer.train()
    packed = pack(trainer.model)
    inputs = tiny_inputs("bert")
    with torch.no_grad():
        assert torch.equal(packed(**inputs).logits, trainer.model.eval()(**inputs).logits)


def test_resuming_with_another_config_is_refused(tmp_path: Path) -> None:
    checkpoint = saved_run(tmp_path)
    trainer = make_trainer(tmp_path, surrogate="clipped_ste")
    with pytest.raises(ValueError, match=r"another StoMPPConfig.*surrogate: 'ste' -> 'clipped_ste'"):
        trainer.train(resume_from_checkpoint=str(checkpoint))


def rewrite(checkpoint: Path, change: Any) -> None:
    """Writes the checkpoint's tensors anew, without the digests that would tell."""
    file = checkpoint / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


MASK = "bert.encoder.layer.0.output.dense.freeze_mask"


def thaw_one(tensors: dict[str, Tensor]) -> None:
    tensors[MASK][0, 0] = False


def write_a_two(tensors: dict[str, Tensor]) -> None:
    tensors[MASK] = tensors[MASK].to(torch.uint8) * 2


def freeze_the_last(tensors: dict[str, Tensor]) -> None:
    tensors[MASK.replace("layer.0", "layer.2")].fill_(True)


@pytest.mark.parametrize("change", [thaw_one, write_a_two, freeze_the_last], ids=lambda change: change.__name__)
def test_a_corrupted_mask_is_refused(tmp_path: Path, change: Any) -> None:
    checkpoint = saved_run(tmp_path)
    rewrite(checkpoint, change)
    with pytest.raises(ValueError, match=r"layer\.[02]\.output\.dense\.freeze_mask.* corrupted"):
        make_trainer(tmp_path).train(resume_from_checkpoint=str(checkpoint))


def test_an_altered_checkpoint_is_refused(tmp_path: Path) -> None:
    checkpoint = saved_run(tmp_path)
    file = checkpoint / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match="was altered after it was saved"):
        make_trainer(tmp_path).train(resume_from_checkpoint=str(checkpoint))


def test_a_checkpoint_without_a_tensor_is_refused(tmp_path: Path) -> None:
    checkpoint = saved_run(tmp_path)
    rewrite(checkpoint, lambda tensors: tensors.pop("bert.encoder.layer.1.output.LayerNorm.weight"))
    with pytest.raises(ValueError, match=r"lacks 1 tensors.*layer\.1\.output\.LayerNorm\.weight"):
        make_trainer(tmp_path).train(resume_from_checkpoint=str(checkpoint))


@pytest.mark.parametrize("name", ["trainer_state.json", "config.json"])
def test_a_checkpoint_cut_off_while_it_was_written_is_refused(tmp_path: Path, name: str) -> None:
    checkpoint = saved_run(tmp_path)
    file = checkpoint / name
    file.write_text(file.read_text()[:40])
    with pytest.raises(ValueError, match=f"{name} cannot be read"):
        make_trainer(tmp_path).train(resume_from_checkpoint=str(checkpoint))


def test_a_checkpoint_of_another_trainer_is_refused(tmp_path: Path) -> None:
    checkpoint = saved_run(tmp_path)
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    del state["stateful_callbacks"][ProgressionCallback.__name__]
    (checkpoint / "trainer_state.json").write_text(json.dumps(state))
    with pytest.raises(ValueError, match="not written by StoMPPTrainer"):
        make_trainer(tmp_path).train(resume_from_checkpoint=str(checkpoint))


@pytest.mark.slow
def test_gamma_and_beta_of_an_old_checkpoint_survive_resuming(tmp_path: Path) -> None:
    old = tmp_path / "old"
    make_model().save_pretrained(old)
    tensors = load_file(old / "model.safetensors")
    renamed = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
        for name, tensor in tensors.items()
    }
    save_file(renamed, old / "model.safetensors", metadata={"format": "pt"})

    def load() -> PreTrainedModel:
        return binarize(BertForSequenceClassification.from_pretrained(old), StoMPPConfig())

    whole = make_trainer(tmp_path / "whole", model=load())
    whole.train()
    saved_run(tmp_path, model=load())
    assert any(name.endswith("LayerNorm.weight") for name in load_file(tmp_path / "checkpoint-6/model.safetensors"))
    resumed = make_trainer(tmp_path, model=load())
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert_same_state(state_of(resumed.model), state_of(whole.model))


def test_a_checkpoint_reloads_with_its_masks(tmp_path: Path) -> None:
    checkpoint = saved_run(tmp_path)
    loaded = BertForSequenceClassification.from_pretrained(checkpoint)
    saved = load_file(checkpoint / "model.safetensors")
    assert_same_state(state_of(loaded), saved)
    assert 0 < sum(int(module.freeze_mask.sum()) for module in masked_modules(loaded).values())


# --- the Trainer's other features ------------------------------------------------------------------------------------


def summed(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    """A loss as Transformers documents it: a sum over what all micro-batches hold, or the mean of one."""
    reduction = "mean" if num_items_in_batch is None else "sum"
    return F.cross_entropy(outputs.logits, labels, reduction=reduction) / (num_items_in_batch or 1)


@pytest.mark.parametrize("with_teacher", [False, True], ids=["labels", "teacher"])
@pytest.mark.parametrize("loss", [None, summed], ids=["of_the_model", "of_ones_own"])
def test_accumulated_micro_batches_give_the_loss_of_one_batch(tmp_path: Path, loss: Any, with_teacher: bool) -> None:

    # Without dropout the two must agree from the first step on.
    def run(name: str, **arguments: Any) -> dict[str, float]:
        teacher = make_model(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        # Fixed activation parameters: they would be initialised from micro-batches of another size.
        model = binarize(copy.deepcopy(teacher), StoMPPConfig(mode="bwn"))
        made = make_trainer(
            tmp_path / name,
            model=model,
            max_steps=4,
            distillation_losses={"labels": 1.0, "logits": 1.0},
            **arguments,
        )
        trainer = StoMPPTrainer(
            model,
            made.args,
            train_dataset=made.train_dataset,
            compute_loss_func=loss,
            teacher=teacher if with_teacher else None,
        )
        trainer.train()
        return trainer.state.log_history[0]

    one = run("one", per_device_train_batch_size=8)
    four = run("four", per_device_train_batch_size=2, gradient_accumulation_steps=4)
    assert four["loss"] == pytest.approx(one["loss"], rel=1e-5)
    assert four["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-4)


@pytest.mark.parametrize(
    "arguments",
    [
        {"bf16": True},
        {CHECKPOINTING: True},
        {CHECKPOINTING: True, f"{CHECKPOINTING}_kwargs": {"use_reentrant": True}},
        pytest.param({"torch_compile": True, "torch_compile_backend": "eager"}, marks=pytest.mark.slow),
        {"optim": "sgd"},
        {"max_grad_norm": 0.0},
    ],
    ids=["bf16", "checkpointing", "reentrant_checkpointing", "torch_compile", "sgd", "no_clipping"],
)
@pytest.mark.parametrize("surrogate", ["none", "ste"])
def test_trains_to_a_packable_model_with(tmp_path: Path, arguments: dict[str, Any], surrogate: str) -> None:
    trainer = make_trainer(tmp_path, surrogate, **arguments)
    trainer.train()
    assert all(math.isfinite(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry)
    packed = pack(trainer.model)
    metrics = make_trainer(tmp_path / "packed", model=packed).evaluate()
    assert metrics["eval_loss"] == pytest.approx(
        trainer.evaluate()["eval_loss"], rel=2e-2 if "bf16" in arguments else 1e-6
    )


@pytest.mark.slow
def test_activation_checkpointing_changes_no_weight(tmp_path: Path) -> None:
    states = []
    for name, arguments in {"plain": {}, "checkpointed": {CHECKPOINTING: True}}.items():
        trainer = make_trainer(tmp_path / name, **arguments)
        trainer.train()
        states.append(state_of(trainer.model))
    assert_same_state(*states)


@pytest.mark.slow
def test_a_compiled_model_is_not_recompiled_as_masks_grow(tmp_path: Path) -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    trainer = make_trainer(tmp_path, max_steps=12)
    model = trainer.model
    inputs = {"input_ids": torch.tensor(make_dataset()["input_ids"][:4]), "labels": torch.tensor([0, 1, 0, 1])}
    model.train()
    model(**inputs)
    compiled = torch.compile(model, backend=counter)
    for _ in range(4):
        compiled(**inputs).loss.backward()
        for module in masked_modules(model).values():
            module.freeze_mask.bernoulli_(0.5)
    once = counter.frame_count
    for module in masked_modules(model).values():
        module.commit()
    compiled(**inputs).loss.backward()
    assert counter.frame_count == once


class FailsOnLargeBatches(BertForSequenceClassification):
    def forward(self, input_ids: Tensor, labels: Tensor | None = None, **kwargs: Any) -> Any:
        if (
            self.training
            and input_ids.shape[0] > 2
            and any(m.freeze_mask.any() for m in masked_modules(self).values())
        ):
            self.failures = getattr(self, "failures", 0) + 1
            raise RuntimeError("CUDA out of memory.")
        return super().forward(input_ids=input_ids, labels=labels, **kwargs)


@pytest.mark.slow
def test_auto_find_batch_size_starts_again_with_empty_masks(tmp_path: Path) -> None:
    model = binarize(FailsOnLargeBatches(make_model().config), StoMPPConfig())
    recorder = Recorder(masks_of)
    # One example less fits.
    trainer = make_trainer(
        tmp_path, model=model, auto_find_batch_size=True, per_device_train_batch_size=3, callbacks=[recorder]
    )
    trainer.train()
    assert model.failures == 1
    assert trainer.is_committed
    last = MASK.replace("layer.0", "layer.2").removesuffix(".freeze_mask")
    assert not recorder.seen[0][last].any()


def test_a_packed_model_is_evaluated_but_not_trained(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    trainer.train()
    packed = make_trainer(tmp_path / "packed", model=pack(trainer.model))
    assert packed.evaluate()["eval_loss"] == trainer.evaluate()["eval_loss"]
    with pytest.raises(ValueError, match="packed model cannot be trained"):
        packed.train()


@pytest.mark.slow
def test_an_unpacked_model_trains_on(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, max_steps=6)
    trainer.train()
    again = make_trainer(tmp_path / "again", model=unpack(pack(trainer.model)), progression_schedule="immediate")
    again.train()
    pack(again.model)


def test_evaluation_before_training_initialises_the_activations(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, eval_strategy="steps", eval_steps=6, eval_on_start=True)
    trainer.train()
    evaluations = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert evaluations[0]["step"] == 0 and math.isfinite(evaluations[0]["eval_loss"])


def test_the_model_card_tells_how_to_load_the_model(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    trainer.train()
    trainer.create_model_card(model_name="tiny", tags="mine")
    card = (tmp_path / "README.md").read_text()
    assert "import hf_stompp\n" in card and "BertForSequenceClassification.from_pretrained(" in card
    assert all(f"- {tag}\n" in card for tag in ("mine", "stompp", "1-bit"))
    assert card.index("## How to load it") < card.index("## Training procedure")


@pytest.mark.parametrize("asked", [True, False])
def test_the_card_of_a_packed_model_tells_its_speed_where_that_is_asked_for(asked: bool, tmp_path: Path) -> None:
    model = commit(binarize(make_model()))
    # Initialises the activation scales.
    model(input_ids=torch.ones(2, 4, dtype=torch.long))
    packed = pack(model)
    args = StoMPPTrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none", card_speed=asked)
    StoMPPTrainer(model=packed, args=args).create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert ("## Speed" in card) == asked


# --- bad input -------------------------------------------------------------------------------------------------------


def test_a_float_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not binarized; call binarize"):
        make_trainer(tmp_path, model=make_model())


def test_plain_training_arguments_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="takes args=StoMPPTrainingArguments"):
        StoMPPTrainer(model=binarize(make_model()), args=TrainingArguments(output_dir=str(tmp_path), use_cpu=True))


def test_data_parallel_is_refused_and_says_what_to_use(tmp_path: Path) -> None:
    arguments = StoMPPTrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    arguments._n_gpu = 2
    with pytest.raises(ValueError, match=r"nn\.DataParallel \(2 GPUs.*accelerate launch"):
        StoMPPTrainer(model=binarize(make_model()), args=arguments)


@pytest.mark.parametrize("flag", ["is_fsdp_enabled", "is_deepspeed_enabled"])
def test_sharded_training_is_refused_and_says_what_to_use(tmp_path: Path, flag: str) -> None:
    trainer = make_trainer(tmp_path)
    # Neither starts on a CPU in one process; the flags are what Trainer sets when it does.
    setattr(trainer, flag, True)
    with pytest.raises(ValueError, match=r"FSDP or DeepSpeed.*accelerate launch --multi_gpu"):
        trainer._refuse_unsupported()


def test_an_empty_dataset_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="train_dataset is empty"):
        make_trainer(tmp_path, train_dataset=make_dataset().select([])).train()


class TrainerWithItsOwnLoss(StoMPPTrainer):
    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        labels = inputs.pop("labels").float()
        return (model(**inputs).logits[:, 0] - labels).square().mean()


@pytest.mark.parametrize("is_a_function", [True, False])
def test_labels_that_a_loss_of_ones_own_reads_are_not_taken_for_classes(tmp_path: Path, is_a_function: bool) -> None:
    rows = make_dataset().to_dict()
    rows["labels"] = list(range(len(rows["labels"])))
    ordinary = make_trainer(tmp_path, train_dataset=Dataset.from_dict(rows), max_steps=6)
    kind = StoMPPTrainer if is_a_function else TrainerWithItsOwnLoss
    options: dict[str, Any] = {}
    if is_a_function:
        options["compute_loss_func"] = lambda outputs, labels, **kwargs: (
            (outputs.logits[:, 0] - labels).square().mean()
        )
    trainer = kind(ordinary.model, ordinary.args, train_dataset=ordinary.train_dataset, **options)
    assert math.isfinite(trainer.train().training_loss)
    with pytest.raises(ValueError, match="label out of range"):
        ordinary.train()


@pytest.mark.parametrize("label", [2, -1, 5])
def test_a_label_out_of_range_is_refused_before_the_first_step(tmp_path: Path, label: int) -> None:
    rows = make_dataset().to_dict()
    rows["labels"][7] = label
    trainer = make_trainer(tmp_path, train_dataset=Dataset.from_dict(rows))
    with pytest.raises(ValueError, match=rf"row 7 .*labels={label}, the model has 2 classes"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_fewer_steps_than_units_is_refused_before_the_first_step(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, max_steps=2)
    before = state_of(trainer.model)
    with pytest.raises(ValueError, match=r"schedule cannot finish.*3 windows"):
        trainer.train()
    after = state_of(trainer.model)
    assert [name for name in before if not torch.equal(before[name], after[name])] == []


def test_a_schedule_that_cannot_finish_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="schedule cannot finish"):
        make_trainer(tmp_path, progression_warmup=0.6, progression_tail=0.5).train()


def test_freezing_everything_without_a_gradient_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nothing in the encoder would be trained.*surrogate='ste'"):
        make_trainer(tmp_path, "none", progression_schedule="immediate").train()


@pytest.mark.slow
def test_a_failed_resume_leaves_the_checkpoints(tmp_path: Path) -> None:
    checkpoint = saved_run(tmp_path)
    copied = tmp_path / "copy"
    shutil.copytree(checkpoint, copied)
    with pytest.raises(ValueError):
        make_trainer(tmp_path, mask_seed=5).train(resume_from_checkpoint=str(checkpoint))
    assert {p.name: p.read_bytes() for p in checkpoint.iterdir()} == {p.name: p.read_bytes() for p in copied.iterdir()}
