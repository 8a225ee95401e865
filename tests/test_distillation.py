from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor
from transformers import (
    AutoModel,
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    PreTrainedModel,
)

from hf_stompp import StoMPPConfig, StoMPPTrainer, StoMPPTrainingArguments, binarize, commit, pack
from hf_stompp.training.distillation import (
    LOSSES,
    Comparison,
    attentions_loss,
    check_losses,
    check_teacher,
    embeddings_loss,
    hidden_states_loss,
    logits_loss,
    pooled,
)


VOCABULARY = 64
HIDDEN = {"normalized_hidden_states": 1.0}


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# the losses, in Python's floats


def softmax(values: list[float]) -> list[float]:
    powers = [math.exp(value) for value in values]
    return [power / sum(powers) for power in powers]


def test_the_loss_of_logits_is_the_soft_cross_entropy_times_the_temperature_squared() -> None:
    student, teacher = draw(5, 3), draw(5, 3, seed=1)
    for temperature in (1.0, 2.5):
        total = 0.0
        for s, t in zip(student.tolist(), teacher.tolist(), strict=True):
            p, q = (softmax([x / temperature for x in row]) for row in (t, s))
            total -= sum(a * math.log(b) for a, b in zip(p, q, strict=True))
        loss = logits_loss(student, teacher, temperature=temperature)
        assert loss.item() == pytest.approx(temperature**2 * total / 5, rel=1e-5)


def test_the_loss_of_logits_of_a_regression_is_the_squared_error() -> None:
    student, teacher = draw(6, 1), draw(6, 1, seed=1)
    squares = [(s - t) ** 2 for s, t in zip(student.flatten().tolist(), teacher.flatten().tolist(), strict=True)]
    assert logits_loss(student, teacher, temperature=3.0).item() == pytest.approx(sum(squares) / 6, rel=1e-5)


def test_the_loss_of_multi_label_logits_is_the_binary_cross_entropy_of_each() -> None:
    student, teacher = draw(4, 3), draw(4, 3, seed=1)
    total = 0.0
    for s, t in zip(student.flatten().tolist(), teacher.flatten().tolist(), strict=True):
        p, q = 1 / (1 + math.exp(-t / 2)), 1 / (1 + math.exp(-s / 2))
        total -= p * math.log(q) + (1 - p) * math.log(1 - q)
    loss = logits_loss(student, teacher, temperature=2.0, multi_label=True)
    assert loss.item() == pytest.approx(4 * total / 12, rel=1e-5)


def test_logits_of_padding_do_not_count() -> None:
    student, teacher, mask = draw(2, 4, 3), draw(2, 4, 3, seed=1), torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0]])
    kept = logits_loss(torch.cat([student[0], student[1, :1]]), torch.cat([teacher[0], teacher[1, :1]]))
    student[1, 1:] = 100.0
    torch.testing.assert_close(logits_loss(student, teacher, mask), kept)


def test_the_loss_of_hidden_states_is_a_sum_of_means_over_the_positions_that_count() -> None:
    student = tuple(draw(2, 3, 4, seed=seed) for seed in range(3))
    teacher = tuple(draw(2, 3, 4, seed=seed) * seed for seed in range(5, 8))
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    plain = normalized = 0.0
    for s, t in zip(student, teacher, strict=True):
        pairs = [
            (s[row, position, k].item(), t[row, position, k].item())
            for row in range(2)
            for position in range(3)
            for k in range(4)
            if mask[row, position]
        ]
        error = sum((a - b) ** 2 for a, b in pairs) / len(pairs)
        plain += error
        normalized += error / (sum(b**2 for _, b in pairs) / len(pairs))
    assert hidden_states_loss(student, teacher, mask).item() == pytest.approx(plain, rel=1e-5)
    assert hidden_states_loss(student, teacher, mask, normalized=True).item() == pytest.approx(normalized, rel=1e-5)


def test_the_normalized_loss_of_hidden_states_does_not_depend_on_the_units_of_a_layer() -> None:
    student, teacher = (draw(2, 3, 4),), (draw(2, 3, 4, seed=1),)
    larger = tuple(1000 * tensor for tensor in student), tuple(1000 * tensor for tensor in teacher)
    torch.testing.assert_close(
        hidden_states_loss(*larger, normalized=True), hidden_states_loss(student, teacher, normalized=True)
    )


def test_the_loss_of_attentions_is_the_divergence_from_the_teacher_without_padding() -> None:
    student, teacher = (draw(2, 2, 3, 3, seed=seed) for seed in (0, 1))
    # The last key of the second example is padding.
    student[1, ..., 2] = teacher[1, ..., 2] = -math.inf
    student, teacher = student.softmax(-1), teacher.softmax(-1)
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    divergences = []
    for row in range(2):
        for head in range(2):
            for query in range(3):
                pairs = zip(teacher[row, head, query].tolist(), student[row, head, query].tolist(), strict=True)
                if mask[row, query]:
                    divergences.append(sum(p * math.log(p / q) for p, q in pairs if p > 0))
    loss = attentions_loss((student, student), (teacher, teacher), mask)
    assert loss.item() == pytest.approx(2 * sum(divergences) / len(divergences), rel=1e-4)
    assert attentions_loss((teacher,), (teacher,), mask).item() == 0.0


def cosine(one: list[float], other: list[float]) -> float:
    product = sum(a * b for a, b in zip(one, other, strict=True))
    return product / math.sqrt(sum(a * a for a in one) * sum(b * b for b in other))


def test_an_embedding_is_the_mean_or_the_first_of_the_tokens_that_are_no_padding() -> None:
    states, mask = draw(3, 4, 5), torch.tensor([[1, 1, 1, 0], [0, 0, 1, 1], [1, 0, 0, 0]])
    means, firsts = pooled(states, mask, "mean"), pooled(states, mask, "cls")
    for row, (first, last) in enumerate([(0, 3), (2, 4), (0, 1)]):
        expected = [sum(column) / (last - first) for column in zip(*states[row, first:last].tolist(), strict=True)]
        assert means[row].tolist() == pytest.approx(expected, rel=1e-5)
        assert firsts[row].tolist() == states[row, first].tolist()
    torch.testing.assert_close(pooled(states), states.mean(1))
    # Half precision is summed in float32.
    torch.testing.assert_close(pooled(states.bfloat16(), mask), pooled(states.bfloat16().float(), mask))


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_the_loss_of_embeddings_is_their_mean_distance_from_a_cosine_of_one(pooling: str) -> None:
    student, teacher, mask = draw(3, 4, 5), draw(3, 4, 5, seed=1), torch.ones(3, 4)
    mask[0, 3] = 0
    mine, target = (pooled(states, mask, pooling).tolist() for states in (student, teacher))
    expected = sum(1 - cosine(a, b) for a, b in zip(mine, target, strict=True)) / 3
    loss = embeddings_loss(student, teacher, mask, pooling)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    # What sentence encoders are compared by does not depend on the length of an embedding, nor on padding.
    student[0, 3] = 100.0
    torch.testing.assert_close(embeddings_loss(3.0 * student, teacher, mask, pooling), loss)
    outputs = {"hidden_states": (draw(3, 4, 5, seed=7), student)}, {"hidden_states": (draw(3, 4, 5, seed=8), teacher)}
    torch.testing.assert_close(LOSSES[f"{pooling}_embeddings"](*outputs, Comparison(mask)), loss)


@pytest.mark.parametrize("encoder", ["bert", "roberta", "distilbert", "electra", "deberta_v2", "mpnet", "modernbert"])
def test_the_last_of_the_hidden_states_is_what_an_encoder_puts_out(
    tiny_model: Any, tiny_inputs: Any, encoder: str
) -> None:
    with torch.no_grad():
        outputs = tiny_model(encoder, AutoModel)(**tiny_inputs(encoder), output_hidden_states=True)
    assert torch.equal(outputs.hidden_states[-1], outputs.last_hidden_state)


# training


def config(**overrides: Any) -> BertConfig:
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 36,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 76,
        "max_position_embeddings": 40,
        "num_labels": 2,
        # What the student puts out is then a function of its weights alone.
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    return BertConfig(**{**sizes, **overrides})


def make_teacher(kind: type[PreTrainedModel] = BertForSequenceClassification, **overrides: Any) -> PreTrainedModel:
    torch.manual_seed(3)
    teacher = kind(config(**overrides))
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return teacher


def make_student(teacher: PreTrainedModel, **settings: Any) -> PreTrainedModel:
    return binarize(copy.deepcopy(teacher), StoMPPConfig(**settings))


def texts(rows: int = 16, **columns: Any) -> Dataset:
    ids = torch.randint(3, VOCABULARY, (rows, 8), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[::2, 5:] = 0
    return Dataset.from_dict({"input_ids": ids.tolist(), "attention_mask": mask.tolist(), **columns})


def make_trainer(
    folder: Path, student: PreTrainedModel, teacher: PreTrainedModel | None, data: Dataset, **arguments: Any
) -> StoMPPTrainer:
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "learning_rate": 3e-3,
        "progression_tail": 0.2,
        "refresh_period": 5,
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "report_to": "none",
    }
    args = StoMPPTrainingArguments(**{**settings, **arguments})
    return StoMPPTrainer(model=student, args=args, train_dataset=data, eval_dataset=data, teacher=teacher)


def test_the_loss_of_training_is_the_weighted_sum_of_those_named(tmp_path: Path) -> None:
    teacher = make_teacher()
    student, data = make_student(teacher), texts(labels=[0, 1] * 8)
    # Another model than the teacher, and all of it binary.
    commit(student)
    weights = {"logits": 2.0, "hidden_states": 0.5, "labels": 3.0}
    trainer = make_trainer(tmp_path, student, teacher, data, distillation_losses=weights, distillation_temperature=2.0)
    batch = {name: torch.tensor(data[name][:4]) for name in ("input_ids", "attention_mask", "labels")}
    found = trainer.compute_loss(student.train(), dict(batch))
    mine = student(**batch, output_hidden_states=True)
    with torch.no_grad():
        target = teacher(**batch, output_hidden_states=True)
    mask = batch["attention_mask"]
    expected = (
        2.0 * logits_loss(mine.logits, target.logits, temperature=2.0)
        + 0.5 * hidden_states_loss(mine.hidden_states, target.hidden_states, mask)
        + 3.0 * mine.loss
    )
    torch.testing.assert_close(found, expected)


def test_evaluation_reports_the_loss_on_the_labels_and_without_labels_that_of_distillation(tmp_path: Path) -> None:
    teacher = make_teacher()
    student = commit(make_student(teacher))
    labelled, unlabelled = texts(labels=[0, 1] * 8), texts()
    trainer = make_trainer(tmp_path, student, teacher, labelled, per_device_eval_batch_size=16)
    found = trainer.evaluate()["eval_loss"]
    batch = {name: torch.tensor(labelled[name][:]) for name in ("input_ids", "attention_mask", "labels")}
    with torch.no_grad():
        assert found == pytest.approx(student(**batch).loss.item(), rel=1e-5)

    encoder = make_teacher(BertModel)
    learner = commit(make_student(encoder))
    trainer = make_trainer(
        tmp_path, learner, encoder, unlabelled, per_device_eval_batch_size=16, distillation_losses=HIDDEN
    )
    found = trainer.evaluate()["eval_loss"]
    del batch["labels"]
    with torch.no_grad():
        states = [model(**batch, output_hidden_states=True).hidden_states for model in (learner, encoder)]
    expected = hidden_states_loss(*states, batch["attention_mask"], normalized=True)
    assert found == pytest.approx(expected.item(), rel=1e-5)


def test_an_encoder_learns_from_text_without_labels(tmp_path: Path) -> None:
    teacher = make_teacher(BertModel)
    trainer = make_trainer(tmp_path, make_student(teacher), teacher, texts(), max_steps=60, distillation_losses=HIDDEN)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.is_committed
    assert trainer.evaluate()["eval_loss"] < 0.8 * before


def test_the_teacher_stays_as_it_was_and_is_in_no_checkpoint(tmp_path: Path) -> None:
    teacher = make_teacher().train()
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    student = make_student(teacher)
    names = set(student.state_dict())
    trainer = make_trainer(tmp_path, student, teacher, texts(labels=[0, 1] * 8), save_strategy="steps", save_steps=3)
    trainer.train()
    assert not teacher.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert set(trainer.model.state_dict()) == names
    saved = (tmp_path / "checkpoint-3" / "model.safetensors").stat().st_size
    trainer.save_model(str(tmp_path / "alone"))
    assert (tmp_path / "alone" / "model.safetensors").stat().st_size == saved


def test_a_run_that_is_resumed_with_its_teacher_ends_in_the_same_weights(tmp_path: Path) -> None:
    teacher = make_teacher()
    options = {"save_strategy": "steps", "save_steps": 3}
    whole = make_trainer(tmp_path / "a", make_student(teacher), teacher, texts(labels=[0, 1] * 8), **options)
    whole.train()
    resumed = make_trainer(tmp_path / "b", make_student(teacher), teacher, texts(labels=[0, 1] * 8), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
    expected = whole.model.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in resumed.model.state_dict().items())


@pytest.mark.parametrize(
    ("kind", "overrides", "labels"),
    [
        (BertForSequenceClassification, {"num_labels": 1, "problem_type": "regression"}, [0.5, -1.0] * 8),
        (
            BertForSequenceClassification,
            {"num_labels": 3, "problem_type": "multi_label_classification"},
            [[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]] * 8,
        ),
        (BertForTokenClassification, {"num_labels": 3}, [[0, 1, 2, -100, 0, 1, 2, 0]] * 16),
    ],
    ids=["regression", "multi_label", "token_classification"],
)
@pytest.mark.parametrize("losses", [None, {"logits": 1.0, "labels": 1.0}], ids=["default", "with_labels"])
def test_other_tasks_are_distilled(
    tmp_path: Path, kind: type[PreTrainedModel], overrides: dict[str, Any], labels: list[Any], losses: Any
) -> None:
    teacher = make_teacher(kind, **overrides)
    trainer = make_trainer(tmp_path, make_student(teacher), teacher, texts(labels=labels), distillation_losses=losses)
    assert math.isfinite(trainer.train().training_loss)
    assert trainer.is_committed and math.isfinite(trainer.evaluate()["eval_loss"])


def test_attentions_are_learned(tmp_path: Path) -> None:
    teacher = make_teacher()
    trainer = make_trainer(
        tmp_path, make_student(teacher), teacher, texts(), max_steps=40, distillation_losses={"attentions": 1.0}
    )
    batch = {name: torch.tensor(texts()[name][:]) for name in ("input_ids", "attention_mask")}

    def divergence() -> float:
        with torch.no_grad():
            maps = [model.eval()(**batch, output_attentions=True).attentions for model in (trainer.model, teacher)]
        return attentions_loss(*maps, batch["attention_mask"]).item()

    commit(trainer.model)
    before = divergence()
    trainer.train()
    assert divergence() < 0.8 * before


def test_labels_are_smoothed_beside_a_teacher_and_refused_where_nothing_looks_at_them(tmp_path: Path) -> None:
    teacher, data = make_teacher(), texts(labels=[0, 1] * 8)
    losses = {"logits": 1.0, "labels": 1.0}
    options: dict[str, Any] = {"distillation_losses": losses, "label_smoothing_factor": 0.2}
    student = commit(make_student(teacher))
    trainer = make_trainer(tmp_path, student, teacher, data, **options)
    batch = {name: torch.tensor(data[name][:4]) for name in ("input_ids", "attention_mask", "labels")}
    found = trainer.compute_loss(student.train(), dict(batch))
    logits, targets = student(**batch).logits, teacher(**batch).logits
    hard = torch.nn.functional.cross_entropy(logits, batch["labels"], label_smoothing=0.2)
    torch.testing.assert_close(found, logits_loss(logits, targets) + hard)

    with pytest.raises(ValueError, match="label_smoothing_factor"):
        make_trainer(tmp_path, make_student(teacher), teacher, data, label_smoothing_factor=0.2)


@pytest.mark.slow
def test_gradients_are_accumulated_to_those_of_the_whole_batch(tmp_path: Path) -> None:
    teacher, data = make_teacher(), texts(labels=[0, 1] * 8)
    ends = []
    for steps, batch in ((1, 8), (2, 4)):
        trainer = make_trainer(
            tmp_path / str(steps),
            make_student(teacher),
            teacher,
            data.remove_columns("attention_mask"),
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=steps,
            max_steps=1,
            optim="sgd",
            progression_schedule="immediate",
        )
        # The same first batch initialises scales and thresholds.
        trainer._initialize_activations({"input_ids": torch.tensor(data["input_ids"][:8])})
        trainer.train()
        ends.append(trainer.model.state_dict())
    for name, tensor in ends[0].items():
        torch.testing.assert_close(tensor, ends[1][name], rtol=1e-4, atol=1e-6)


# what is refused


@pytest.mark.parametrize(
    ("losses", "message"),
    [
        ({"logit": 1.0}, "must give a weight to some of"),
        ("logits", "is no JSON"),
        ('["logits"]', "must give a weight to some of"),
        ({"logits": 0}, "the weight of 'logits' must be a number above 0"),
        ({"logits": -1.0}, "must be a number above 0"),
        ({"logits": math.nan}, "must be a number above 0"),
        ({"logits": True}, "must be a number above 0"),
        ({"logits": "1"}, "must be a number above 0"),
        ({"labels": 1.0}, "asks nothing of a teacher"),
        ({}, "asks nothing of a teacher"),
    ],
    ids=str,
)
def test_losses_that_do_not_exist_or_weigh_nothing_are_refused(tmp_path: Path, losses: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StoMPPTrainingArguments(output_dir=str(tmp_path), distillation_losses=losses)


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.inf, math.nan])
def test_a_temperature_that_is_not_positive_is_refused(tmp_path: Path, temperature: float) -> None:
    with pytest.raises(ValueError, match="distillation_temperature"):
        StoMPPTrainingArguments(output_dir=str(tmp_path), distillation_temperature=temperature)


def test_losses_are_read_from_json_and_written_to_it(tmp_path: Path) -> None:
    args = StoMPPTrainingArguments(output_dir=str(tmp_path), distillation_losses='{"logits": 2, "labels": 0.5}')
    assert args.distillation_losses == {"logits": 2.0, "labels": 0.5}
    assert json.loads(args.to_json_string())["distillation_losses"] == {"logits": 2.0, "labels": 0.5}
    assert check_losses(args.distillation_losses) == args.distillation_losses


@pytest.mark.parametrize(
    ("overrides", "losses", "message"),
    [
        ({"vocab_size": 65}, {"logits": 1.0}, "vocab_size=65, the student vocab_size=64.*tokenizer"),
        ({"num_labels": 3}, {"logits": 1.0}, "num_labels=3.*same labels"),
        ({"problem_type": "multi_label_classification"}, {"logits": 1.0}, "problem_type=multi.*same kind of labels"),
        ({"num_hidden_layers": 3}, HIDDEN, r"num_hidden_layers=3.*\{'logits': 1.0\}"),
        ({"hidden_size": 40}, HIDDEN, r"hidden_size=40.*'attentions'"),
        ({"num_attention_heads": 2}, {"attentions": 1.0}, "num_attention_heads=2"),
        ({"hidden_size": 40}, {"mean_embeddings": 1.0}, r"hidden_size=40.*embeddings compare feature with feature"),
        ({"hidden_size": 40}, {"cls_embeddings": 1.0}, "hidden_size=40"),
        ({"id2label": {0: "good", 1: "bad"}}, {"logits": 1.0}, "good.*same order"),
    ],
    ids=str,
)
def test_a_teacher_that_does_not_fit_is_refused_with_a_way_out(
    overrides: dict[str, Any], losses: dict[str, float], message: str
) -> None:
    student = make_student(make_teacher(id2label={0: "bad", 1: "good"}, problem_type="single_label_classification"))
    with pytest.raises(ValueError, match=message):
        check_teacher(student, make_teacher(**overrides), losses)


def test_a_teacher_of_another_shape_is_taken_for_its_logits_alone() -> None:
    student = make_student(make_teacher())
    check_teacher(student, make_teacher(hidden_size=40, num_hidden_layers=3), {"logits": 1.0})


def test_a_teacher_with_more_layers_is_taken_for_its_embeddings() -> None:
    check_teacher(make_student(make_teacher()), make_teacher(num_hidden_layers=3), {"mean_embeddings": 1.0})


def test_a_packed_teacher_and_the_student_itself_are_refused(tmp_path: Path) -> None:
    teacher = make_teacher()
    student = make_student(teacher)
    inputs = {"input_ids": torch.tensor(texts()["input_ids"][:])}
    committed = commit(make_student(teacher))
    committed(**inputs)
    with pytest.raises(ValueError, match="is packed: name the float model"):
        check_teacher(student, pack(committed), {"logits": 1.0})
    with pytest.raises(ValueError, match="the teacher is the student itself"):
        make_trainer(tmp_path, student, student, texts())


def test_the_card_names_the_teacher_and_what_was_learned_from_it(tmp_path: Path) -> None:
    teacher = make_teacher()
    teacher.name_or_path = "somebody/a-float-model"
    trainer = make_trainer(tmp_path, make_student(teacher), teacher, texts(), distillation_losses=HIDDEN)
    trainer.train()
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert "| teacher | somebody/a-float-model |" in card
    assert "| distillation_losses | {'normalized_hidden_states': 1.0} |" in card
    assert "`activation_window=2.0`" in card
