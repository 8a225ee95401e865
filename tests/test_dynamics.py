from __future__ import annotations

import json
import math
import re
import shutil
import sys
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainerCallback, TrainingArguments

from hf_stompp import StoMPPConfig, StoMPPTrainer, StoMPPTrainingArguments, binarize
from hf_stompp.model.modules import frozen_counts
from hf_stompp.reports.drawing import draw, png, report, short_names
from hf_stompp.reports.dynamics import Dynamics, dynamics_of, read_dynamics
from hf_stompp.training.progression import plan_progression


HISTORY = Path(__file__).parent.parent / "benchmarks" / "results" / "sst2_stompp_history.json"
LAYERS = 3


def make_trainer(folder: Path, kind: Any = StoMPPTrainer, callbacks: Any = None, **arguments: Any) -> Trainer:
    torch.manual_seed(0)
    sizes = {"hidden_size": 36, "num_hidden_layers": LAYERS, "num_attention_heads": 4, "intermediate_size": 76}
    model = BertForSequenceClassification(BertConfig(vocab_size=64, max_position_embeddings=40, **sizes))
    ids = torch.randint(3, 64, (32, 10), generator=torch.Generator().manual_seed(0))
    dataset = Dataset.from_dict({"input_ids": ids.tolist(), "labels": (ids[:, 0] > 32).long().tolist()})
    settings = {"max_steps": 12, "per_device_train_batch_size": 4, "learning_rate": 1e-3, "logging_steps": 2}
    settings |= {"eval_strategy": "steps", "eval_steps": 4, "save_strategy": "no", "report_to": "none"}
    settings |= {"use_cpu": True, "disable_tqdm": True}
    is_binary = kind is StoMPPTrainer
    return kind(
        model=binarize(model, StoMPPConfig()) if is_binary else model,
        args=(StoMPPTrainingArguments if is_binary else TrainingArguments)(str(folder), **{**settings, **arguments}),
        train_dataset=dataset,
        eval_dataset=dataset.select(range(16)),
        compute_metrics=lambda p: {"accuracy": float((p.predictions.argmax(-1) == p.label_ids).mean())},
        callbacks=callbacks,
    )


class FullUnits(TrainerCallback):
    """Keeps which units are wholly frozen after every step."""

    def __init__(self) -> None:
        self.seen: list[set[str]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        counts = frozen_counts(model, model.config.quantization_config)
        self.seen.append({unit for unit, (frozen, entries) in counts.items() if frozen == entries})


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[StoMPPTrainer, Path, list[set[str]]]:
    """A run that was saved without and with checkpoints, and which units were full after each of its steps."""
    folder = tmp_path_factory.mktemp("run")
    units = FullUnits()
    trainer: Any = make_trainer(folder, callbacks=[units], save_strategy="steps", save_steps=9)
    trainer.train()
    trainer.save_state()
    return trainer, folder, units.seen


def synthetic(units: list[str], steps: int = 600, every: int = 20, **extra: Any) -> dict[str, Any]:
    """A state as a Trainer saves it: keys sorted."""
    progression = plan_progression(units, steps)
    log = []
    for step in range(every, steps + 1, every):
        fractions = [progression.fraction(index, step - 1) for index in range(len(units))]
        share = sum(fractions) / len(fractions)
        entry = {"loss": 0.5 + 0.1 * math.sin(step), "grad_norm": 10.0 ** math.sin(step), "learning_rate": 1e-4}
        entry |= {f"frozen_fraction/{unit}": value for unit, value in zip(units, fractions, strict=True)}
        log.append({"step": step, "frozen_fraction/all": share, **entry})
        if step % (5 * every) == 0:
            log.append({"step": step, "eval_accuracy": 0.5 + 0.3 * share, "eval_loss": 0.6, "eval_runtime": 1.0})
            if share < 1:
                log.append({"step": step, "eval_mixed_accuracy": 0.9 - 0.1 * share})
    callbacks = {"ProgressionCallback": {"args": {}, "attributes": {"progression": progression.to_dict()}}}
    return json.loads(json.dumps({"log_history": log, "stateful_callbacks": callbacks, **extra}, sort_keys=True))


LAYERS_OF = {count: [f"bert.encoder.layer.{layer}" for layer in range(count)] for count in (1, 2, 6, 12, 24)}


def dynamics(count: int = 6, **extra: Any) -> Dynamics:
    metrics = {"metrics": {"float": {"eval_accuracy": 0.92}}}
    return dynamics_of(synthetic(LAYERS_OF[count], **extra), "example", summary=metrics)


def test_no_logged_name_is_what_another_has_before_a_slash(trained: Any) -> None:
    names = {name for entry in trained[0].state.log_history for name in entry}
    folders = {name.rpartition("/")[0] for name in names} - {""}
    # A store that keeps a metric in a file has a folder of that name.
    assert folders and not folders & names


# --- reading ---------------------------------------------------------------------------------------------------------


def test_series_are_what_the_trainer_logged(trained: Any) -> None:
    trainer, folder, _ = trained
    found = read_dynamics(folder)
    log = trainer.state.log_history

    def pairs(key: str) -> list[tuple[int, float]]:
        return [(entry["step"], entry[key]) for entry in log if key in entry]

    for series, key in (
        (found.loss, "loss"),
        (found.grad_norm, "grad_norm"),
        (found.learning_rate, "learning_rate"),
        (found.fully_binary, "eval_accuracy"),
        (found.mixed, "eval_mixed_accuracy"),
        *((unit.frozen, f"frozen_fraction/{unit.name}") for unit in found.units),
    ):
        assert list(zip(series.steps, series.values, strict=True)) == pairs(key), key
        assert series, key
    assert (found.metric, found.steps, len(found.units)) == ("accuracy", 12, LAYERS)


def test_unit_is_committed_after_the_step_from_which_its_masks_are_full(trained: Any) -> None:
    _, folder, full_units = trained
    found = read_dynamics(folder)
    for unit in found.units:
        # Full at the end of a step: full in that step already, that is after those before it.
        assert unit.committed_step == next(step for step, full in enumerate(full_units) if unit.name in full)
    assert found.is_exact and found.committed_step == max(unit.committed_step for unit in found.units)


def test_last_checkpoint_is_read_where_the_run_has_not_ended(trained: Any, tmp_path: Path) -> None:
    trainer, folder, _ = trained
    for name in ("checkpoint-9", "checkpoint-12"):
        shutil.copytree(folder / name, tmp_path / name)
    shutil.copytree(folder / "checkpoint-9", tmp_path / "checkpoint-100-old")
    assert read_dynamics(tmp_path).source == str(tmp_path / "checkpoint-12" / "trainer_state.json")
    shutil.rmtree(tmp_path / "checkpoint-12")

    found = read_dynamics(tmp_path)

    assert found.steps == 8 and found.units[0].committed_step is not None
    # Committed after step 8 or later: not in this log.
    progression = trainer.progression_callback.progression
    assert progression.committed_step < 8 or found.committed_step is None


def test_units_keep_the_order_of_the_network_where_json_has_sorted_them() -> None:
    state = synthetic(LAYERS_OF[12])
    assert [unit.name for unit in dynamics_of(state, "run").units] == LAYERS_OF[12]
    del state["stateful_callbacks"]
    assert [unit.name for unit in dynamics_of(state, "run").units] == LAYERS_OF[12]


def test_log_without_the_progression_tells_the_first_logged_step_of_a_full_unit() -> None:
    found = read_dynamics(HISTORY)
    log = json.loads(HISTORY.read_text())["log_history"]
    for unit in found.units:
        key = f"frozen_fraction/{unit.name}"
        assert unit.committed_step == min(entry["step"] for entry in log if entry.get(key) == 1.0)
    assert not found.is_exact


def test_summary_of_the_run_gives_the_float_model_and_the_packed_one(trained: Any, tmp_path: Path) -> None:
    _, folder, _ = trained
    shutil.copy(folder / "trainer_state.json", tmp_path)
    metrics = {
        "float": {"eval_accuracy": 0.9, "eval_loss": 0.3},
        "packed": {"eval_accuracy": 0.7},
        "binary_best": None,
    }
    settings = {"progression_schedule": "cubic", "progression_tail": 0.3}
    (tmp_path / "summary.json").write_text(json.dumps({"metrics": metrics, "progression": settings}))

    found = read_dynamics(tmp_path)

    assert found.float_value == 0.9 and found.results["packed"] == {"accuracy": 0.7}
    assert set(found.results) == {"float", "mixed", "binary", "packed"}
    assert found.progression["progression_tail"] == 0.3 and found.progression["optimizer steps"] == 12


def test_what_is_no_finite_number_is_left_out() -> None:
    rows = [(1, math.nan), (2, 0.5), (3, math.inf), (4, None), (5, "NaN"), (6, 0.25)]
    log = [{"step": step, "loss": value, "grad_norm": value, "learning_rate": 0.1} for step, value in rows]

    found = dynamics_of({"log_history": log}, "run")

    assert (found.loss.steps, found.loss.values) == ([2, 6], [0.5, 0.25]) and found.learning_rate.steps[-1] == 6


def test_of_two_evaluations_at_one_step_the_later_counts() -> None:
    log = [{"step": 4, "eval_accuracy": 0.5}, {"step": 8, "eval_accuracy": 0.6}, {"step": 8, "eval_accuracy": 0.7}]
    assert dynamics_of({"log_history": log}, "run").fully_binary.values == [0.5, 0.7]


def test_measure_can_be_chosen_and_loss_is_drawn_only_where_there_is_no_other() -> None:
    log = [{"step": 4, "eval_loss": 0.5, "eval_accuracy": 0.6, "eval_f1": 0.7, "eval_runtime": 1.0}]
    assert dynamics_of({"log_history": log}, "run").metric == "accuracy"
    assert dynamics_of({"log_history": log}, "run", metric="eval_f1").fully_binary.values == [0.7]
    assert dynamics_of({"log_history": [{"step": 4, "eval_loss": 0.5}]}, "run").metric == "loss"
    with pytest.raises(ValueError, match=r"no measure 'mcc': it has loss, accuracy, f1"):
        dynamics_of({"log_history": log}, "run", metric="mcc")


def damaged(**changes: Any) -> dict[str, Any]:
    """A state whose saved progression has other values; None: it lacks the field."""
    state = synthetic(LAYERS_OF[2])
    saved = state["stateful_callbacks"]["ProgressionCallback"]["attributes"]["progression"] | changes
    saved = {name: value for name, value in saved.items() if value is not None}
    return state | {"stateful_callbacks": {"ProgressionCallback": {"attributes": {"progression": saved}}}}


LOG = [{"step": 1, "loss": 0.5}]
WRONG = [5, "a", [], ["a"], [5], True, 1.5, [[0]], [[0, 1, 2]], [["a", 1]], {"a": 1}, [[0, 10**400]]]


@pytest.mark.parametrize(
    ("state", "cause"),
    [
        *((state, "holds no JSON object") for state in ([], 5, "a", None)),
        *(({"log_history": log}, "holds no log_history") for log in (None, 5, {}, ["a"], [[]], [{"loss": 0.5}])),
        *(
            ({"log_history": [{"step": step, "loss": 0.5}]}, "entries that each have a step")
            for step in (None, "1", 1.0, True, -1, [1], 10**400)
        ),
        *(({"log_history": LOG, "stateful_callbacks": value}, "its stateful_callbacks is no") for value in WRONG[:4]),
        *(
            ({"log_history": LOG, "stateful_callbacks": {"ProgressionCallback": value}}, "ProgressionCallback is no")
            for value in WRONG[:2]
        ),
        *(
            (
                {"log_history": LOG, "stateful_callbacks": {"ProgressionCallback": {"attributes": value}}},
                "attributes is no JSON object",
            )
            for value in WRONG[:2]
        ),
        *((damaged(units=value), "units of the progression") for value in [None, *WRONG[:3], *WRONG[4:]]),
        (damaged(units=["a"]), "windows of the progression"),
        *((damaged(windows=value), "windows of the progression") for value in [None, *WRONG]),
        *((damaged(total_steps=value), "total_steps of the progression") for value in [None, *WRONG[1:], 10**400]),
        *(
            (damaged(**{name: None}), f"{name} of the progression")
            for name in ("order", "schedule", "refresh_period", "seed")
        ),
        *(({"log_history": LOG, "metrics": value}, "metrics is no JSON object") for value in WRONG[:4]),
        *(({"log_history": LOG, "metrics": {"float": value}}, "float is no JSON object") for value in WRONG[:4]),
        *(({"log_history": LOG, "progression": value}, "progression is no JSON object") for value in WRONG[:4]),
    ],
)
def test_a_damaged_state_is_refused_with_the_file_and_the_cause(state: Any, cause: str, tmp_path: Path) -> None:
    file = tmp_path / "trainer_state.json"
    file.write_text(json.dumps(state))
    with pytest.raises(ValueError, match=cause) as error:
        read_dynamics(tmp_path)
    assert str(file) in str(error.value) and len(str(error.value)) < 1000


def test_a_state_that_is_nested_too_deeply_is_refused_with_the_file(tmp_path: Path) -> None:
    (tmp_path / "trainer_state.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"trainer_state\.json is no valid JSON"):
        read_dynamics(tmp_path)


def test_a_whole_number_that_no_float_holds_is_left_out() -> None:
    rows = [{"step": 1, "loss": 10**400, "eval_f1": 10**400}, {"step": 2, "loss": 0.5, "eval_f1": 0.5}]
    found = dynamics_of({"log_history": rows}, "run", summary={"metrics": {"float": {"eval_f1": 10**400}}})
    assert found.loss.values == [0.5] and found.fully_binary.values == [0.5] and found.float_value is None


# --- the picture -----------------------------------------------------------------------------------------------------


def panels(figure: Any) -> dict[str, Any]:
    return {axis.get_title(loc="left").split(" ")[0]: axis for axis in figure.axes if axis.get_title(loc="left")}


def test_picture_shows_the_values_of_the_log() -> None:
    pytest.importorskip("matplotlib")
    found = dynamics()
    shown = panels(draw(found))
    assert list(shown) == ["Frozen", "Evaluation:", "Training", "Gradient", "Learning"]
    mesh = shown["Frozen"].collections[0].get_array()
    assert mesh.tolist() == [unit.frozen.values for unit in found.units]
    assert [label.get_text() for label in shown["Frozen"].get_yticklabels()] == [f"layer.{i}" for i in range(6)]
    lines = {line.get_label().partition(" (")[0].partition(",")[0]: line for line in shown["Evaluation:"].lines}
    assert lines["fully binary"].get_ydata().tolist() == found.fully_binary.values
    # The mixed network becomes the fully binary one: its line ends there.
    steps = zip(found.fully_binary.steps, found.fully_binary.values, strict=True)
    joined = next(value for step, value in steps if step > found.mixed.steps[-1])
    assert lines["mixed"].get_ydata().tolist() == [*found.mixed.values, joined]
    assert set(lines["float"].get_ydata()) == {0.92}
    assert shown["Gradient"].get_yscale() == "log"
    assert shown["Gradient"].lines[-1].get_ydata().tolist() == found.grad_norm.values
    assert shown["Training"].lines[-1].get_ydata().tolist() == found.loss.values
    assert shown["Learning"].lines[-1].get_ydata().tolist() == found.learning_rate.values
    marked = {line.get_xdata()[0] for line in shown["Training"].lines[:-1]}
    assert marked == {unit.committed_step for unit in found.units}


@pytest.mark.parametrize("count", LAYERS_OF)
@pytest.mark.parametrize("dark", [False, True])
def test_no_text_of_the_picture_covers_another_or_leaves_it(count: int, dark: bool) -> None:
    pytest.importorskip("matplotlib")
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure = draw(dynamics(count), dark)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    boxes = [(text.get_text(), text.get_window_extent()) for text in drawn_texts(figure)]
    assert len(boxes) > 20
    for (one, a), (other, b) in combinations(boxes, 2):
        assert not (a.x0 < b.x1 and b.x0 < a.x1 and a.y0 < b.y1 and b.y0 < a.y1), (one, other)
    width, height = canvas.get_width_height()
    for text, box in boxes:
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height, text


def drawn_texts(figure: Any) -> list[Any]:
    """All texts of a picture, but labels of ticks that are not in view, or that axes share with the lowest one."""
    from matplotlib.text import Text

    labels, shown = set(), []
    for axis in figure.axes:
        for which, (low, high) in ((axis.xaxis, axis.get_xlim()), (axis.yaxis, axis.get_ylim())):
            ticks = [*which.get_major_ticks(), *which.get_minor_ticks()]
            labels |= {label for tick in ticks for label in (tick.label1, tick.label2)}
            if which is axis.yaxis or axis is figure.axes[-1]:
                shown += [tick.label1 for tick in which.get_major_ticks() if low <= tick.get_loc() <= high]
    shown += [text for text in figure.findobj(Text) if text not in labels]
    return [text for text in shown if text.get_text().strip() and text.get_visible()]


def test_run_that_ended_before_its_units_were_committed_is_drawn() -> None:
    pytest.importorskip("matplotlib")
    state = synthetic(LAYERS_OF[6])
    state["log_history"] = [entry for entry in state["log_history"] if entry["step"] <= 200]
    found = dynamics_of(state, "run")
    assert png(found).startswith(b"\x89PNG") and png(found) != png(found, dark=True)
    assert ">never<" in report(found) and "not fully binary at the end of the log" in report(found)


def test_seventy_two_units_are_drawn_with_as_many_labels_as_there_is_room_for() -> None:
    pytest.importorskip("matplotlib")
    names = [f"bert.encoder.layer.{i}.{part}.dense" for i in range(12) for part in "abcdef"]
    axis = panels(draw(dynamics_of(synthetic(names, steps=720), "run")))["Frozen"]
    assert len(axis.get_yticks()) == 24 and len(axis.collections[0].get_array()) == 72


def test_plain_trainer_is_drawn_without_what_it_did_not_log(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    trainer = make_trainer(tmp_path, Trainer)
    trainer.train()
    trainer.save_state()

    found = read_dynamics(tmp_path)

    assert list(panels(draw(found))) == ["Evaluation:", "Training", "Gradient", "Learning"]
    assert not found.units and not found.mixed and found.committed_step is None
    page = report(found)
    assert "binary" not in page and "unit" not in page


def test_short_names_drop_what_all_have_in_common() -> None:
    assert short_names(["bert.encoder.layer.0", "bert.encoder.layer.10"]) == ["layer.0", "layer.10"]
    assert short_names(["a.layer.0.attention", "a.layer.0.output"]) == ["attention", "output"]
    assert short_names(["bert.embeddings.word", "bert.encoder.layer.0"]) == ["embeddings.word", "encoder.layer.0"]
    assert short_names(["layer.0"]) == ["layer.0"] and short_names(["0", "1"]) == ["0", "1"]


@pytest.mark.parametrize("name", ["a$x$", "a$\\frac{$b", "$"])
def test_a_dollar_in_a_name_is_drawn_as_it_is(name: str) -> None:
    pytest.importorskip("matplotlib")
    state = synthetic([name, f"{name}.other"])
    state["log_history"].append({"step": 600, f"eval_{name}": 0.5})

    found = dynamics_of(state, name, metric=name)
    figure = draw(found)

    assert png(found).startswith(b"\x89PNG")
    figure.canvas.draw()
    shown = [text for text in drawn_texts(figure) if "$" in text.get_text()]
    assert len(shown) == 4 and not any(text.get_parse_math() for text in shown)


# --- the report ------------------------------------------------------------------------------------------------------


def test_report_needs_no_other_file() -> None:
    pytest.importorskip("matplotlib")
    page = report(dynamics())
    links = re.findall(r'(?:src|href|srcset)="([^"]{0,40})', page)
    assert links and all(link.startswith("data:image/png;base64,") for link in links)
    assert "<script" not in page and "http" not in page and "@import" not in page and "url(" not in page


def test_report_has_units_settings_and_results_in_tables() -> None:
    pytest.importorskip("matplotlib")
    found = dynamics()
    cells = re.findall(r"<t[dh][^>]*>([^<]*)</t[dh]>", report(found))
    for unit in found.units:
        assert cells[cells.index(unit.name) + 1] == str(unit.committed_step)
    assert cells[cells.index("progression_schedule") + 1] == "cubic"
    assert cells[cells.index("optimizer steps") + 1] == "600"
    assert "0.920" in cells and f"{found.fully_binary.values[-1]:.3f}" in cells


def test_report_says_where_steps_are_those_of_the_log() -> None:
    pytest.importorskip("matplotlib")
    assert "up to a logging interval late" in report(read_dynamics(HISTORY))
    assert "up to a logging interval late" not in report(dynamics())


def test_names_in_the_report_are_text_and_no_markup() -> None:
    pytest.importorskip("matplotlib")
    page = report(dynamics_of({"log_history": [{"step": 1, "loss": 0.5, "eval_<b>": 1.0}]}, "<script>x</script>"))
    assert "<script>" not in page and "<b>" not in page and "&lt;script&gt;" in page


# --- the model card --------------------------------------------------------------------------------------------------


def test_model_card_shows_the_dynamics_beside_it(trained: Any) -> None:
    pytest.importorskip("matplotlib")
    trainer, folder, _ = trained
    trainer.create_model_card()
    text = (folder / "README.md").read_text()
    assert text.count("(dynamics.png)") == 1
    assert text.index("### Training dynamics") < text.index("(dynamics.png)") < text.index("### Framework versions")
    assert (folder / "dynamics.png").read_bytes().startswith(b"\x89PNG")
    trainer.create_model_card()
    assert (folder / "README.md").read_text() == text


def test_model_card_has_no_picture_without_matplotlib(trained: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, folder, _ = trained
    (folder / "dynamics.png").unlink(missing_ok=True)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    trainer.create_model_card()
    text = (folder / "README.md").read_text()
    assert "dynamics" not in text.lower() and "### Framework versions" in text
    assert not (folder / "dynamics.png").exists()


def test_model_card_of_a_model_that_was_not_trained_has_no_picture(tmp_path: Path) -> None:
    make_trainer(tmp_path).create_model_card()
    assert not (tmp_path / "dynamics.png").exists() and "dynamics.png" not in (tmp_path / "README.md").read_text()
