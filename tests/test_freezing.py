"""What freezing does to training: committed units stop costing and stop moving, and nothing else changes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification, PreTrainedModel, TrainerCallback

from hf_stompp import StoMPPConfig, StoMPPTrainer, StoMPPTrainingArguments, binarize
from hf_stompp.model.modules import config_of, masked_modules, unit_modules, unit_parameters
from hf_stompp.nn import MaskedBinaryActivation
from hf_stompp.ops import cpu
from hf_stompp.training.freezing import Freezing
from hf_stompp.training.progression import plan_progression


LAYERS = 3
ROWS = 4


def make_model(hidden_dropout_prob: float = 0.1, **config: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    dropout = {"hidden_dropout_prob": hidden_dropout_prob, "attention_probs_dropout_prob": hidden_dropout_prob}
    sizes = {"hidden_size": 36, "num_hidden_layers": LAYERS, "num_attention_heads": 4, "intermediate_size": 76}
    model = BertForSequenceClassification(BertConfig(vocab_size=64, max_position_embeddings=40, **sizes, **dropout))
    return binarize(model, StoMPPConfig(**{"surrogate": "none", **config}))


def make_batch(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 64, (ROWS, 10), generator=generator)
    return {"input_ids": ids, "labels": (ids[:, 0] > 32).long()}


def initialized(model: PreTrainedModel) -> PreTrainedModel:
    with torch.no_grad():
        model.eval()(**make_batch())
    return model.train()


def commit_units(model: PreTrainedModel, count: int) -> None:
    for modules in list(unit_modules(model, config_of(model)).values())[:count]:
        for module in modules.values():
            module.commit()


def latent_weights(model: PreTrainedModel, units: int) -> dict[str, Tensor]:
    found = list(unit_modules(model, config_of(model)).values())[:units]
    return {
        name: module.weight
        for modules in found
        for name, module in modules.items()
        if not isinstance(module, MaskedBinaryActivation)
    }


def make_trainer(folder: Path, model: PreTrainedModel, **arguments: Any) -> StoMPPTrainer:
    callbacks = arguments.pop("callbacks", None)
    rows = [make_batch(seed) for seed in range(8)]
    data = {name: torch.cat([row[name] for row in rows]).tolist() for name in rows[0]}
    settings = {"max_steps": 12, "per_device_train_batch_size": ROWS, "learning_rate": 1e-3, "weight_decay": 0.1}
    return StoMPPTrainer(
        model=model,
        args=StoMPPTrainingArguments(
            str(folder),
            **{**settings, **arguments},
            save_strategy="no",
            logging_steps=1,
            use_cpu=True,
            disable_tqdm=True,
            report_to="none",
        ),
        train_dataset=Dataset.from_dict(data),
        callbacks=callbacks,
    )


class AfterEachStep(TrainerCallback):
    def __init__(self, look: Any) -> None:
        self.look, self.seen = look, []

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.seen.append(self.look(model))


# gradients and updates


@pytest.mark.parametrize("mode", ["bnn", "bwn"])
def test_committed_weights_get_no_gradient_and_still_require_one(mode: str) -> None:
    model = initialized(make_model(mode=mode))
    commit_units(model, 2)
    model(**make_batch()).loss.backward()

    for name, weight in latent_weights(model, LAYERS).items():
        is_committed = ".layer.2." not in name
        assert weight.requires_grad
        assert (weight.grad is None) == is_committed, name


def test_what_cannot_reach_the_loss_any_more_gets_no_gradient() -> None:
    model = initialized(make_model())
    commit_units(model, LAYERS)
    model(**make_batch()).loss.backward()
    without = {name for name, p in model.named_parameters() if p.grad is None}

    layer = "bert.encoder.layer.0"
    # Their outputs are read through signs only.
    for module in ("attention.self.query", "attention.self.key", "attention.self.value", "intermediate.dense"):
        assert f"{layer}.{module}.bias" in without
    for tensor in ("attention.output.dense.bias", "output.dense.bias", "output.LayerNorm.weight"):
        assert f"{layer}.{tensor}" not in without
    # The residual connections carry a gradient down to the embeddings.
    assert "bert.embeddings.word_embeddings.weight" not in without
    # Thresholds decide signs, which have no slope.
    assert all(name in without for name, _ in model.named_parameters() if name.endswith("threshold"))


def test_committed_latent_weights_do_not_move_whatever_the_optimizer_does(tmp_path: Path) -> None:
    model = make_model()
    seen = AfterEachStep(lambda model: {n: w.detach().clone() for n, w in latent_weights(model, LAYERS).items()})
    trainer = make_trainer(tmp_path, model, weight_decay=0.5, callbacks=[seen])
    trainer.train()
    progression = trainer.progression_callback.progression
    for unit, (_, end) in enumerate(progression.windows):
        names = [name for name in seen.seen[0] if f".layer.{unit}." in name]
        before, after = seen.seen[end - 2], seen.seen[-1]
        assert all(torch.equal(after[name], before[name]) for name in names), unit
        assert any(not torch.equal(seen.seen[0][name], before[name]) for name in names) or end < 3


@pytest.mark.parametrize("train_committed", [True, False])
def test_what_is_float_in_a_committed_unit_learns_on_only_if_asked_to(tmp_path: Path, train_committed: bool) -> None:
    name = "bert.encoder.layer.0.output.LayerNorm.weight"
    seen = AfterEachStep(lambda model: dict(model.named_parameters())[name].detach().clone())
    trainer = make_trainer(tmp_path, make_model(), train_committed=train_committed, callbacks=[seen])
    trainer.train()
    end = trainer.progression_callback.progression.windows[0][1]

    assert torch.equal(seen.seen[end - 1], seen.seen[-1]) != train_committed
    # The embeddings lie in no unit, and learn through the residual connections either way.
    assert dict(trainer.model.named_parameters())["bert.embeddings.LayerNorm.weight"].grad is None


def test_stopping_committed_units_is_refused_with_a_straight_through_estimator(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, make_model(surrogate="ste"), train_committed=False)
    with pytest.raises(ValueError, match=r"train_committed=False needs StoMPPConfig\(surrogate='none'\)"):
        trainer.train()


# memory


def test_optimizer_state_of_committed_weights_is_let_go(tmp_path: Path) -> None:
    def count_states(model: PreTrainedModel) -> int:
        with_state = {id(p) for p, state in trainer.optimizer.state.items() if state}
        return sum(id(weight) in with_state for weight in latent_weights(model, LAYERS).values())

    seen = AfterEachStep(count_states)
    trainer = make_trainer(tmp_path, make_model(), callbacks=[seen])
    trainer.train()
    per_unit = len(latent_weights(trainer.model, 1))
    windows = trainer.progression_callback.progression.windows
    for step, count in enumerate(seen.seen):
        committed = sum(step >= end - 1 for _, end in windows)
        assert count == per_unit * (LAYERS - committed), step


def test_committed_layers_keep_no_activations_for_the_backward_pass() -> None:
    if cpu.native_kernels() is None:
        pytest.skip("without native kernels committed layers train on floats")
    model = initialized(make_model())
    commit_units(model, LAYERS)
    linear = model.bert.encoder.layer[0].output.dense
    kept: list[Tensor] = []
    bits = model.bert.encoder.layer[0].intermediate
    hidden = torch.randn(ROWS, 10, 36, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        linear(bits(hidden))

    assert {t.dtype for t in kept if t.numel() > 100} <= {torch.uint8}
    assert not any(t.is_floating_point() and t.numel() >= ROWS * 10 * 36 for t in kept)


def test_binarized_weights_are_not_kept_for_the_backward_pass() -> None:
    model = initialized(make_model(surrogate="ste"))
    linear = model.bert.encoder.layer[0].intermediate.dense
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        linear(torch.randn(ROWS, 10, 36))

    pointers = {p.data_ptr() for p in model.parameters()}
    assert not any(
        t.shape == linear.weight.shape and t.is_floating_point() and t.data_ptr() not in pointers for t in kept
    )


def test_a_binary_weight_takes_seventeen_bytes_while_it_trains() -> None:
    model = initialized(make_model(surrogate="ste"))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randint(0, 9, (ROWS, 10)), labels=torch.zeros(ROWS, dtype=torch.long)).loss.backward()
    optimizer.step()

    layer = model.bert.encoder.layer[0].intermediate.dense
    state = [tensor for tensor in optimizer.state[layer.weight].values() if tensor.shape == layer.weight.shape]
    everything = [layer.weight, layer.weight.grad, *state, layer.freeze_mask]
    tensors = [*layer.parameters(), *layer.buffers()]
    assert {id(t) for t in tensors if t.shape == layer.weight.shape} == {id(layer.weight), id(layer.freeze_mask)}
    assert sum(tensor.nbytes for tensor in everything) == 17 * layer.weight.numel()


# the same training


@pytest.mark.slow
@pytest.mark.parametrize(
    ("unit", "mode"), [("layer", "bnn"), ("module", "bnn"), ("sublayer", "bnn"), ("layer", "bwn")]
)
def test_loss_on_bits_is_that_of_float_products_within_rounding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unit: str, mode: str
) -> None:
    if cpu.native_kernels() is None:
        pytest.skip(f"no native kernels: {cpu.why_reference()}")
    losses, steps = [], 40 if unit == "module" else 12
    for loaded in (cpu._loaded, (None, "to compare with float products")):
        monkeypatch.setattr(cpu, "_loaded", loaded)
        trainer = make_trainer(tmp_path, make_model(unit=unit, mode=mode), max_steps=steps)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])

    assert len(losses[0]) == steps
    # One rounding that falls on a threshold flips a sign, and from there on differences grow.
    assert losses[0][:12] == pytest.approx(losses[1][:12], rel=2e-4)
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


@pytest.mark.parametrize("committed", range(LAYERS + 1))
@pytest.mark.parametrize("settings", [{}, {"feed_forward_levels": "zero_one"}, {"unit": "module"}], ids=str)
def test_loss_and_gradients_on_bits_are_those_of_float64(committed: int, settings: dict[str, Any]) -> None:
    on_bits = initialized(make_model(hidden_dropout_prob=0.0, **settings))
    # Bits stand for no float64: there everything runs on float products.
    in_float64 = copy.deepcopy(on_bits).double()
    commit = committed * (6 if settings.get("unit") == "module" else 1)
    for model in (on_bits, in_float64):
        commit_units(model, commit)
        model(**make_batch()).loss.backward()
    losses = [model(**make_batch()).loss.item() for model in (on_bits, in_float64)]

    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for (name, found), (_, expected) in zip(on_bits.named_parameters(), in_float64.named_parameters(), strict=True):
        assert (found.grad is None) == (expected.grad is None), name
        if found.grad is not None:
            scale = expected.grad.abs().max().item()
            torch.testing.assert_close(found.grad.double(), expected.grad, rtol=1e-3, atol=1e-4 * scale + 1e-9)


@pytest.mark.slow
def test_compiled_training_equals_eager_as_units_commit() -> None:
    torch._dynamo.reset()
    eager, compiled = (initialized(make_model(hidden_dropout_prob=0.0)) for _ in range(2))
    run = torch.compile(compiled, backend="aot_eager")
    for count in range(LAYERS + 1):
        losses = []
        for model, forward in ((eager, eager), (compiled, run)):
            commit_units(model, count)
            model.zero_grad()
            loss = forward(**make_batch(count)).loss
            loss.backward()
            losses.append(loss.item())
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)
        for (name, a), (_, b) in zip(eager.named_parameters(), compiled.named_parameters(), strict=True):
            assert (a.grad is None) == (b.grad is None), (count, name)
            if a.grad is not None:
                torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_masks_drawn_ahead_are_those_drawn_in_time() -> None:
    ahead, anew = make_model(), make_model()
    progression = plan_progression(config_of(ahead).units, 12, seed=3)
    carried = Freezing(ahead, progression)
    for step in range(12):
        carried.begin_step(step)
        # A new object has drawn nothing ahead.
        Freezing(anew, progression).begin_step(step)
        masks = zip(masked_modules(ahead).items(), masked_modules(anew).items(), strict=True)
        assert all(torch.equal(a.freeze_mask, b.freeze_mask) for (_, a), (_, b) in masks), step
    assert all(module.committed for module in masked_modules(ahead).values())


@pytest.mark.parametrize("unit", ["layer", "sublayer", "module"])
def test_parameters_of_units_are_those_under_their_names(unit: str) -> None:
    model = make_model(unit=unit)
    parameters = unit_parameters(model, config_of(model))
    found = [{id(p) for p in unit} for unit in parameters]

    # No parameter lies in two units.
    assert sum(map(len, found)) == len(set().union(*found))
    for own, modules in zip(found, unit_modules(model, config_of(model)).values(), strict=True):
        assert {id(m.weight) for m in modules.values() if not isinstance(m, MaskedBinaryActivation)} <= own
    if unit != "module":
        inside = {id(p) for name, p in model.named_parameters() if ".encoder.layer." in name}
        assert set().union(*found) == inside
