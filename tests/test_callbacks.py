"""The progression outside StoMPPTrainer: in other Trainers, in loops of one's own, in a hyperparameter search."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from accelerate import Accelerator
from datasets import Dataset
from torch import Tensor, nn
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

from hf_stompp import (
    MaskScheduler,
    ProgressionCallback,
    StoMPPConfig,
    StoMPPTrainer,
    StoMPPTrainingArguments,
    binarize,
    commit,
    pack,
    unpack,
)
from hf_stompp.model.cautions import FEW_STEPS, few_steps
from hf_stompp.model.modules import binarized_part, fully_binary, masked_modules
from hf_stompp.training.freezing import initialize_activations
from hf_stompp.training.progression import plan_progression


STEPS = 12
ARGUMENTS: dict[str, Any] = {
    "max_steps": STEPS,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-2,
    "lr_scheduler_type": "constant",
    "weight_decay": 0.0,
    "max_grad_norm": 0.0,
    "train_sampling_strategy": "sequential",
    "save_steps": 6,
    "eval_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
    "disable_tqdm": True,
}


@pytest.fixture
def latent(tiny_model: Callable) -> Callable[..., Any]:
    """`latent(surrogate="clipped_ste")`: a latent classifier without dropout, the same at every call."""

    def make(surrogate: str = "clipped_ste") -> Any:
        model = tiny_model("bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        return binarize(model, StoMPPConfig(surrogate=surrogate))

    return make


@pytest.fixture
def dataset() -> Dataset:
    ids = torch.randint(3, 60, (16, 6), generator=torch.Generator().manual_seed(0))
    return Dataset.from_dict({"input_ids": ids.tolist(), "labels": (ids[:, 0] % 3).tolist()})


def plain_trainer(model: Any, dataset: Dataset, folder: Path, **settings: Any) -> Trainer:
    args = TrainingArguments(str(folder), **ARGUMENTS)
    return Trainer(model, args, train_dataset=dataset, callbacks=[ProgressionCallback(**settings)])


def initialized(model: Any, dataset: Dataset) -> Any:
    """The model after its first batch, which sets the scales of its activations."""
    initialize_activations(model, batches(dataset, 1)[0])
    return model


def batches(dataset: Dataset, count: int = STEPS) -> list[dict[str, Tensor]]:
    rows = list(DataLoader(dataset.with_format("torch"), batch_size=4))
    return [rows[step % len(rows)] for step in range(count)]


def same(one: nn.Module, other: nn.Module) -> bool:
    states = one.state_dict(), other.state_dict()
    return states[0].keys() == states[1].keys() and all(torch.equal(states[0][n], states[1][n]) for n in states[0])


@pytest.mark.parametrize("surrogate", ["clipped_ste", "none"])
def test_three_ways_to_train_end_in_the_same_weights(
    latent: Callable, dataset: Dataset, tmp_path: Path, surrogate: str
) -> None:
    args = StoMPPTrainingArguments(str(tmp_path / "own"), **ARGUMENTS)
    own = StoMPPTrainer(latent(surrogate), args, train_dataset=dataset)
    own.train()
    assert own.is_committed

    plain = plain_trainer(latent(surrogate), dataset, tmp_path / "plain", seed=args.seed)
    plain.train()
    assert same(plain.model, own.model)

    model = latent(surrogate).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0, fused=True)
    scheduler = MaskScheduler(model, optimizer, STEPS, seed=args.seed)
    for batch in batches(dataset):
        model(**batch).loss.backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    assert scheduler.is_committed
    assert same(model, own.model)


@pytest.mark.parametrize(
    "start", ["binarized", "loaded", "unpacked", pytest.param("compiled", marks=pytest.mark.slow), "head alone"]
)
def test_training_that_nothing_advances_the_masks_of_is_told_once(
    latent: Callable, dataset: Dataset, tmp_path: Path, caplog: pytest.LogCaptureFixture, start: str
) -> None:
    model = latent()
    if start == "loaded":
        model.save_pretrained(tmp_path / "latent")
        model = type(model).from_pretrained(tmp_path / "latent")
    if start == "unpacked":
        # Its masks are full: vanilla STE needs nobody to advance them.
        model = unpack(pack(commit(initialized(model, dataset))))
    if start == "head alone":
        model.base_model.requires_grad_(False)
    # What is compiled is traced; machine code makes no difference here.
    backend = "eager" if start == "compiled" else None
    args = TrainingArguments(str(tmp_path), **{**ARGUMENTS, "max_steps": 2, "torch_compile_backend": backend})
    with caplog.at_level(logging.WARNING, "hf_stompp"):
        Trainer(model, args, train_dataset=dataset).train()
    told = [record.message for record in caplog.records if "nothing advances its masks" in record.message]
    assert len(told) == (1 if start in ("binarized", "loaded") else 0)
    assert all("ProgressionCallback()" in message for message in told)


def test_training_that_advances_the_masks_warns_of_nothing(
    latent: Callable, dataset: Dataset, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "hf_stompp"):
        plain_trainer(latent(), dataset, tmp_path).train()
        model = latent().train()
        MaskScheduler(model, torch.optim.SGD(model.parameters(), lr=0.05), STEPS)
        model(**batches(dataset, 1)[0]).loss.backward()
        assert not pack(commit(initialized(latent(), dataset)))._forward_pre_hooks
    assert "masks" not in caplog.text


@pytest.mark.parametrize("start", ["bnn", "bwn", "binary", "resumed"])
def test_a_run_that_is_short_for_binary_activations_is_told_so(
    tiny_model: Callable, dataset: Dataset, tmp_path: Path, caplog: pytest.LogCaptureFixture, start: str
) -> None:
    model = binarize(tiny_model("bert"), StoMPPConfig(mode="bwn" if start == "bwn" else "bnn"))
    if start == "binary":
        commit(initialized(model, dataset))
    if start == "resumed":
        plain_trainer(model, dataset, tmp_path).train()
        caplog.clear()
    with caplog.at_level(logging.WARNING, "hf_stompp"):
        plain_trainer(model, dataset, tmp_path).train(resume_from_checkpoint=start == "resumed")
    told = f"{STEPS} optimizer steps are few for binary activations" in caplog.text
    assert told == (start == "bnn")
    assert few_steps(FEW_STEPS) is None and few_steps(FEW_STEPS - 1) is not None


def test_a_trainer_with_the_callback_goes_on_where_it_stopped(
    latent: Callable, dataset: Dataset, tmp_path: Path
) -> None:
    whole = plain_trainer(latent(), dataset, tmp_path)
    whole.train()
    resumed = plain_trainer(latent(), dataset, tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert same(resumed.model, whole.model)
    other = plain_trainer(latent(), dataset, tmp_path, order="reverse")
    with pytest.raises(ValueError, match="another progression.*order: 'forward' -> 'reverse'"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))


def test_a_loop_goes_on_where_it_stopped(latent: Callable, dataset: Dataset) -> None:
    def start(model: Any) -> tuple[Any, MaskScheduler]:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        return optimizer, MaskScheduler(model, optimizer, STEPS)

    def run(model: Any, optimizer: Any, scheduler: MaskScheduler, rows: list[dict[str, Tensor]]) -> None:
        for batch in rows:
            model.train()(**batch).loss.backward()
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()

    rows = batches(dataset)
    whole = latent()
    run(whole, *start(whole), rows)
    first = latent()
    optimizer, scheduler = start(first)
    run(first, optimizer, scheduler, rows[:7])
    saved = copy.deepcopy((first.state_dict(), scheduler.state_dict()))

    second = latent()
    optimizer, scheduler = start(second)
    second.load_state_dict(saved[0])
    for module in masked_modules(second).values():
        module.refresh_flags()
    scheduler.load_state_dict(saved[1])
    run(second, optimizer, scheduler, rows[7:])
    assert same(second, whole)

    # The order of a user who loads a checkpoint: the model has its masks before there is a scheduler.
    third = latent()
    third.load_state_dict(saved[0])
    for module in masked_modules(third).values():
        module.refresh_flags()
    optimizer, scheduler = start(third)
    scheduler.load_state_dict(saved[1])
    run(third, optimizer, scheduler, rows[7:])
    assert same(third, whole)

    wrong = copy.deepcopy(saved[1])
    name = next(iter(wrong["masks"]))
    wrong["masks"][name].logical_not_()
    with pytest.raises(ValueError, match=f"{name}.freeze_mask is corrupted"):
        start(latent())[1].load_state_dict(wrong)


def test_steps_that_the_optimizer_does_not_take_do_not_count(latent: Callable, dataset: Dataset) -> None:
    accelerator = Accelerator(gradient_accumulation_steps=3, cpu=True)
    model = latent()
    loader = DataLoader(dataset.with_format("torch"), batch_size=4)
    model, optimizer, loader = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.05), loader)
    scheduler = MaskScheduler(model, optimizer, 4, tail=0)
    expected = plan_progression(scheduler.progression.units, 4, tail=0)
    taken = 0
    for _ in range(3):
        for batch in loader:
            with accelerator.accumulate(model):
                accelerator.backward(model(**batch).loss)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            taken += accelerator.sync_gradients
            assert scheduler.updates == taken
            unit = expected.units[0]
            masks = [m.freeze_mask for name, m in masked_modules(model).items() if name.startswith(f"{unit}.")]
            frozen = sum(int(mask.sum()) for mask in masks) / sum(mask.numel() for mask in masks)
            assert frozen == pytest.approx(expected.fraction(0, taken), abs=0.05)
    assert scheduler.is_committed


@pytest.mark.parametrize("is_fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("surrogate", ["clipped_ste", "none"])
def test_a_step_that_a_gradient_scaler_leaves_out_does_not_count(
    latent: Callable, dataset: Dataset, surrogate: str, is_fused: bool
) -> None:
    overflowing = (2, 3, 7)

    def run(enabled: bool) -> tuple[Any, MaskScheduler]:
        model = latent(surrogate).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.5, fused=is_fused)
        scheduler = MaskScheduler(model, optimizer, STEPS)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, enabled=enabled)
        for step, batch in enumerate(batches(dataset, STEPS + len(overflowing))):
            if step in overflowing and not enabled:
                continue
            scaler.scale(model(**batch).loss).backward()
            if step in overflowing:
                model.classifier.weight.grad[0, 0] = float("inf")
            scaler.step(optimizer)
            scaler.update()
            scheduler.step()
            optimizer.zero_grad()
        return model, scheduler

    found, scheduler = run(enabled=True)
    # Powers of two scale without rounding, and a batch that was left out might as well not have been there.
    expected, _ = run(enabled=False)
    assert scheduler.updates == STEPS and scheduler.is_committed
    assert same(found, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("surrogate", ["clipped_ste", "none"])
def test_a_loop_in_half_precision_ends_binary_and_finite(
    latent: Callable, dataset: Dataset, surrogate: str, dtype: torch.dtype
) -> None:
    model = latent(surrogate).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scheduler = MaskScheduler(model, optimizer, STEPS)
    # Scaled so far that the first steps overflow float16.
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24, enabled=dtype == torch.float16)
    taken, tried = 0, 0
    while taken < STEPS:
        scale = scaler.get_scale()
        with torch.autocast("cpu", dtype):
            loss = model(**batches(dataset, tried + 1)[-1]).loss
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        scheduler.step()
        optimizer.zero_grad()
        tried += 1
        taken += scaler.get_scale() >= scale
        assert scheduler.updates == taken
    assert (tried > taken) == (dtype == torch.float16)
    assert scheduler.is_committed
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())
    pack(model)


def test_what_is_frozen_stays_in_a_loop_without_a_gradient(latent: Callable, dataset: Dataset) -> None:
    model = latent("none")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.5)
    scheduler = MaskScheduler(model, optimizer, STEPS)
    moved = 0
    for batch in batches(dataset):
        modules = {name: m for name, m in masked_modules(model).items() if hasattr(m, "weight")}
        before = {name: (m.freeze_mask.clone(), m.weight.detach().clone()) for name, m in modules.items()}
        model.train()(**batch).loss.backward()
        optimizer.step()
        for name, (mask, weight) in before.items():
            assert torch.equal(modules[name].weight[mask], weight[mask])
            moved += int((modules[name].weight != weight)[~mask].sum())
        scheduler.step()
        optimizer.zero_grad()
    assert moved > 0


class Own(transformers.PreTrainedModel):
    """An encoder in a model of one's own."""

    config_class = transformers.BertConfig
    _supports_sdpa = True

    def __init__(self, encoder: Any) -> None:
        super().__init__(encoder.config)
        self.inner = nn.Sequential(encoder)
        self.head = nn.Linear(encoder.config.hidden_size, 3)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Any:
        logits = self.head(self.inner[0](input_ids=input_ids).last_hidden_state[:, 0])
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return {"loss": loss, "logits": logits}


def test_an_encoder_inside_a_model_of_ones_own_becomes_binary(
    tiny_model: Callable, dataset: Dataset, tmp_path: Path
) -> None:
    encoder = binarize(tiny_model("bert", transformers.AutoModel))
    model = Own(encoder)
    assert binarized_part(model) is encoder
    # Half of its masks are full in the evaluation of the binary network, and as before behind it.
    with fully_binary(model):
        assert all(module.committed for module in masked_modules(model).values())
    plain_trainer(model, dataset, tmp_path).train()
    packed = pack(encoder.eval())
    ids = torch.tensor(dataset["input_ids"][:2])
    with torch.no_grad():
        expected, found = encoder(input_ids=ids).last_hidden_state, packed(input_ids=ids).last_hidden_state
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_model_without_or_with_several_binarized_parts_is_refused(tiny_model: Callable) -> None:
    with pytest.raises(ValueError, match="Linear holds no binarized model"):
        binarized_part(nn.Linear(2, 2))
    two = nn.ModuleList([binarize(tiny_model("bert")), binarize(tiny_model("bert"))])
    with pytest.raises(ValueError, match=r"holds several binarized models, \['0', '1'\]"):
        MaskScheduler(two, torch.optim.SGD(two.parameters(), lr=0.1), 10)


@pytest.mark.parametrize(
    ("settings", "error"),
    [({"odrer": "reverse"}, TypeError), ({"order": "up"}, ValueError), ({"tail": -1}, ValueError)],
)
def test_bad_settings_are_refused_when_the_callback_is_made(settings: dict[str, Any], error: type) -> None:
    with pytest.raises(error):
        ProgressionCallback(**settings)


def test_a_sentence_encoder_trains_with_its_own_trainer(tiny_model: Callable, tmp_path: Path) -> None:
    sentence_transformers = pytest.importorskip("sentence_transformers")
    losses = pytest.importorskip("sentence_transformers.sentence_transformer.losses")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"word{i}" for i in range(59))]
    tiny_model("bert", transformers.AutoModel).save_pretrained(tmp_path / "float")
    transformers.BertTokenizer(vocab={w: i for i, w in enumerate(words)}).save_pretrained(tmp_path / "float")
    model = sentence_transformers.SentenceTransformer(str(tmp_path / "float"), device="cpu")
    binarize(model[0].model)
    pairs = {"anchor": [f"word{i} word{i + 1}" for i in range(16)], "positive": [f"word{i}" for i in range(16)]}
    arguments = {name: value for name, value in ARGUMENTS.items() if name != "train_sampling_strategy"}
    args = sentence_transformers.SentenceTransformerTrainingArguments(str(tmp_path / "run"), **arguments)
    trainer = sentence_transformers.SentenceTransformerTrainer(
        model,
        args,
        train_dataset=Dataset.from_dict(pairs),
        loss=losses.MultipleNegativesRankingLoss(model),
        callbacks=[ProgressionCallback()],
    )
    trainer.train()
    assert all(module.committed for module in masked_modules(model).values())
    expected = model.encode(["word3 word4"])
    model[0].model = pack(model[0].model)
    torch.testing.assert_close(
        torch.tensor(model.encode(["word3 word4"])), torch.tensor(expected), rtol=1e-3, atol=1e-3
    )
    model.save_pretrained(str(tmp_path / "packed"))
    loaded = sentence_transformers.SentenceTransformer(str(tmp_path / "packed"), device="cpu")
    assert (loaded.encode(["word3 word4"]) == model.encode(["word3 word4"])).all()


def test_every_trial_of_a_search_trains_a_new_model(latent: Callable, dataset: Dataset, tmp_path: Path) -> None:
    made: list[Any] = []

    def model_init() -> Any:
        made.append(latent())
        return made[-1]

    args = StoMPPTrainingArguments(str(tmp_path), **{**ARGUMENTS, "save_strategy": "no"})
    trainer = StoMPPTrainer(None, args, train_dataset=dataset, model_init=model_init)
    # What Trainer.hyperparameter_search does for each trial.
    for tail in (0.3, 0.5):
        trainer.model = trainer.model_wrapped = None
        trainer.args.progression_tail = tail
        trainer.train()
        assert trainer.model is made[-1] and trainer.is_committed
        expected = plan_progression(trainer.progression_callback.progression.units, STEPS, tail=tail, seed=args.seed)
        assert trainer.progression_callback.progression == expected
    assert len(made) == 3


def test_settings_that_train_nothing_are_refused_everywhere(
    latent: Callable, dataset: Dataset, tmp_path: Path
) -> None:
    model = latent("none")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="nothing in the encoder would be trained"):
        MaskScheduler(model, optimizer, STEPS, schedule="immediate")
    with pytest.raises(ValueError, match="train_committed=False needs"):
        plain_trainer(latent(), dataset, tmp_path, train_committed=False).train()
    args = StoMPPTrainingArguments(str(tmp_path), **ARGUMENTS)
    with pytest.raises(ValueError, match="has a ProgressionCallback of its own"):
        StoMPPTrainer(latent(), args, train_dataset=dataset, callbacks=[ProgressionCallback()])


def test_a_search_with_a_teacher_compares_attentions_of_every_model(
    latent: Callable, tiny_model: Callable, dataset: Dataset, tmp_path: Path
) -> None:
    args = StoMPPTrainingArguments(
        str(tmp_path), **{**ARGUMENTS, "save_strategy": "no"}, distillation_losses={"attentions": 1.0}
    )
    # Rows without a class: the teacher answers.
    rows = dataset.map(lambda row: {"labels": -1})
    trainer = StoMPPTrainer(None, args, train_dataset=rows, model_init=lambda: latent(), teacher=tiny_model("bert"))
    trainer.train()
    assert trainer.is_committed


def test_a_packed_model_that_is_made_later_can_be_evaluated(
    tiny_packed: Callable, dataset: Dataset, tmp_path: Path
) -> None:
    args = StoMPPTrainingArguments(str(tmp_path), **ARGUMENTS)
    trainer = StoMPPTrainer(None, args, eval_dataset=dataset, model_init=lambda: tiny_packed("bert"))
    assert "eval_loss" in trainer.evaluate()
    trainer.train_dataset = dataset
    with pytest.raises(ValueError, match="a packed model cannot be trained"):
        trainer.train()


def test_several_processes_or_gpus_are_refused(latent: Callable, dataset: Dataset, tmp_path: Path) -> None:
    trainer = plain_trainer(latent(), dataset, tmp_path)
    # As on a machine with two GPUs, which Trainer would use by nn.DataParallel.
    trainer.args._n_gpu = 2
    callback = next(one for one in trainer.callback_handler.callbacks if isinstance(one, ProgressionCallback))
    with pytest.raises(ValueError, match="one process on one GPU, here are 1 and 2"):
        callback.on_train_begin(trainer.args, trainer.state, trainer.control, model=trainer.model)


def test_a_loop_in_several_processes_is_refused() -> None:
    # A group whose other process is not there; the package refuses before anything would be sent to it.
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        with pytest.raises(ValueError, match="one process on one GPU, here are 2 and 1"):
            MaskScheduler(nn.Linear(2, 2), None, 10)
    finally:
        torch.distributed.destroy_process_group()
