"""The accuracy harness: its grid, its files, its split and its report; and a grid of tiny runs from end to end."""

from __future__ import annotations

import dataclasses
import importlib
import json
import random
import re
import shutil
import statistics
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers
import yaml


ROOT = Path(__file__).resolve().parent.parent
KNOWN = {
    *("method", "mode", "learning_rate", "num_train_epochs", "max_seq_length", "distillation_losses"),
    "model_name_or_path",
}
GRID: dict[str, Any] = {
    "model": "minilm",
    "seeds": [0, 1],
    "all": {"max_seq_length": 64},
    "float": {"learning_rate": "5e-5"},
    "binary": {"learning_rate": "5e-4"},
    "tasks": {"sst2": None, "mrpc": {"all": {"max_seq_length": 128}, "binary": {"num_train_epochs": 20}}},
    "cells": {"ste": {"method": "ste"}, "bwn": {"method": "ste", "mode": "bwn", "learning_rate": "3e-4"}},
}


def load(name: str) -> ModuleType:
    # As for a script, whose folder is where it finds the modules beside it.
    if str(ROOT / "benchmarks") not in sys.path:
        sys.path.append(str(ROOT / "benchmarks"))
    return importlib.import_module(name)


@pytest.fixture(scope="module")
def accuracy() -> Any:
    pytest.importorskip("datasets")
    return load("accuracy")


def written(folder: Path, grid: Any) -> Path:
    file = folder / "grid.yaml"
    file.write_text(yaml.safe_dump(grid, sort_keys=False))
    return file


# --- the grid ---


def test_a_cell_gets_what_all_runs_its_kind_its_task_and_itself_ask_for_the_last_winning(
    accuracy: Any, tmp_path: Path
) -> None:
    cells = accuracy.cells_of(accuracy.read_grid(written(tmp_path, GRID), KNOWN))
    assert [(cell.task, cell.seed, cell.name) for cell in cells] == [
        (task, seed, name) for task in ("sst2", "mrpc") for seed in (0, 1) for name in ("float", "ste", "bwn")
    ]
    flags = {(cell.task, cell.name): cell.flags for cell in cells}
    assert flags["sst2", "float"] == {"max_seq_length": 64, "learning_rate": "5e-5", "method": "float"}
    assert flags["mrpc", "ste"] == {
        "max_seq_length": 128,
        "learning_rate": "5e-4",
        "num_train_epochs": 20,
        "method": "ste",
    }
    assert flags["sst2", "bwn"]["learning_rate"] == "3e-4"


def test_a_command_starts_from_the_float_model_of_its_task_and_seed_and_holds_no_absolute_path(accuracy: Any) -> None:
    flags = {"method": "ste", "distillation_losses": {"logits": 1.0}}
    cell = accuracy.Cell("sst2", "ste", 1, {}, flags, {"method": "float"})
    words = accuracy.command_of(cell, "validation", "minilm")
    start = cell.start.folder("validation")
    assert start.startswith("validation-sst2-float-seed1-")
    assert words[words.index("--model_name_or_path") + 1] == start
    assert words[words.index("--distillation_losses") + 1] == '{"logits": 1.0}'
    assert words[words.index("--dataset_dir") + 1] == "glue"
    assert "--do_train" in words and not any(word.startswith("/") for word in words)
    words = accuracy.command_of(cell.start, "held_out", "minilm")
    assert words[words.index("--model_name_or_path") + 1] == "minilm"
    assert words[words.index("--dataset_dir") + 1] == "held_out"
    # A start of its own, and the float model teaches all the same.
    own = dataclasses.replace(cell, flags={**flags, "model_name_or_path": "distilled/latent"})
    words = accuracy.command_of(own, "validation", "minilm")
    assert words.count("--model_name_or_path") == 1
    assert words[words.index("--model_name_or_path") + 1] == "distilled/latent"
    assert words[words.index("--teacher") + 1] == own.start.folder("validation")
    # A file of the task.
    words = accuracy.command_of(dataclasses.replace(cell, flags={"unlabelled_file": "more/{task}.csv"}), "x", "minilm")
    assert words[words.index("--unlabelled_file") + 1] == "more/sst2.csv"
    # Whatever starts from another float model, or asks for something else, works elsewhere.
    others = [
        dataclasses.replace(cell, float_flags={"method": "float", "seed": 3}),
        dataclasses.replace(cell, flags={}),
        dataclasses.replace(cell, layers=2),
    ]
    assert len({one.folder("validation") for one in (cell, *others)}) == 4


def test_every_depth_has_a_float_model_of_its_own(accuracy: Any, tmp_path: Path) -> None:
    grid = accuracy.read_grid(
        written(tmp_path, GRID | {"layers": [2, 4], "seeds": [0], "tasks": {"sst2": None}}), KNOWN
    )
    cells = accuracy.cells_of(grid)
    assert [(cell.layers, cell.name) for cell in cells] == [
        (layers, name) for layers in (2, 4) for name in ("float", "ste", "bwn")
    ]
    words = accuracy.command_of(cells[0], "validation", "minilm")
    assert words[words.index("--model_name_or_path") + 1] == "minilm-2-layers"
    words = accuracy.command_of(cells[4], "validation", "minilm")
    assert words[words.index("--model_name_or_path") + 1] == cells[3].folder("validation")


def test_a_model_is_cut_to_its_first_layers_once(accuracy: Any, tmp_path: Path) -> None:
    config = transformers.BertConfig(
        vocab_size=64, hidden_size=8, num_hidden_layers=3, num_attention_heads=2, intermediate_size=8
    )
    model = transformers.BertModel(config)
    model.save_pretrained(tmp_path / "tiny")
    tokenizer = transformers.BertTokenizer(vocab={"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4})
    tokenizer.save_pretrained(tmp_path / "tiny")
    accuracy.cut(tmp_path, "tiny", 2)
    found = transformers.AutoModel.from_pretrained(tmp_path / "tiny-2-layers")
    assert found.config.num_hidden_layers == len(found.encoder.layer) == 2
    expected = {name: value for name, value in model.state_dict().items() if ".layer.2." not in name}
    assert found.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in found.state_dict().items())
    written_at = (tmp_path / "tiny-2-layers" / "model.safetensors").stat().st_mtime_ns
    accuracy.cut(tmp_path, "tiny", 2)
    assert (tmp_path / "tiny-2-layers" / "model.safetensors").stat().st_mtime_ns == written_at
    with pytest.raises(accuracy.GridError, match="tiny has fewer than 4"):
        accuracy.cut(tmp_path, "tiny", 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"modle": "minilm"}, "the grid has modle"),
        ({"all": {"learning_rat": 1}}, "all has learning_rat"),
        ({"all": [1]}, "all must be a mapping"),
        ({"tasks": {"sst2": {"binray": {}}}}, "tasks: sst2 has binray"),
        ({"tasks": {"sst2": {"float": {"seed": 1}}}}, "tasks: sst2: float has seed"),
        ({"cells": {"ste": {"methd": "ste"}}}, "cells: ste has methd"),
        ({"cells": {"float": {}}}, "a cell cannot be named float"),
        ({"cells": {"ste": {"model_name_or_path": 3}}}, "cells: ste: model_name_or_path must be a name or folder"),
        ({"layers": [0]}, "layers must be a list of whole numbers"),
        ({"cells": {}}, "cells is missing"),
        ({"seeds": 3}, "seeds is missing, or no list"),
        ({"baselines": ["bert"]}, "baselines: .'bert'. do not exist"),
    ],
    ids=str,
)
def test_what_does_not_exist_is_refused_with_file_and_key(
    accuracy: Any, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(accuracy.GridError, match=f"grid.yaml: {message}"):
        accuracy.read_grid(written(tmp_path, GRID | change), KNOWN)


def test_a_value_that_run_glue_refuses_is_refused_with_its_cell(accuracy: Any, tmp_path: Path) -> None:
    known = accuracy.known_flags()
    for flags, message in (
        ({"method": "bitt"}, "sst2, ste: .*bitt"),
        ({"method": "ste", "mode": "three"}, "sst2, ste: .*three"),
        ({"method": "ste", "distillation_losses": {"logit": 1}}, "sst2, ste: distillation_losses must"),
        ({"method": "ste", "progression_schedule": "cubic"}, "sst2, ste: .*contradicted"),
    ):
        grid = accuracy.read_grid(written(tmp_path, GRID | {"cells": {"ste": flags}, "tasks": {"sst2": None}}), known)
        with pytest.raises(accuracy.GridError, match=message):
            accuracy.check_values(accuracy.cells_of(grid), "minilm")


def test_examples_made_of_what_is_held_out_are_refused_with_select(
    accuracy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    cells = {"made": {"method": "ste", "unlabelled_file": "more/{task}.csv"}}
    file = written(tmp_path, GRID | {"cells": cells, "tasks": {"sst2": None}})
    monkeypatch.setattr(sys, "argv", ["accuracy.py", str(file), "--dataset_dir", str(tmp_path), "--select"])
    with pytest.raises(SystemExit):
        accuracy.main()
    assert "the unlabelled_file of made holds copies of what is held out" in capsys.readouterr().err


def test_a_file_that_is_no_yaml_is_refused(accuracy: Any, tmp_path: Path) -> None:
    (tmp_path / "grid.yaml").write_text("a: [")
    with pytest.raises(accuracy.GridError, match="cannot be read"):
        accuracy.read_grid(tmp_path / "grid.yaml", KNOWN)


@pytest.mark.parametrize(
    "name", ["accuracy", "accuracy_ablations", "accuracy_depth", "accuracy_smoke", "accuracy_teachers"]
)
def test_the_grids_of_the_project_ask_for_what_exists(accuracy: Any, name: str) -> None:
    grid = accuracy.read_grid(ROOT / "benchmarks" / f"{name}.yaml", accuracy.known_flags())
    accuracy.check_values(accuracy.cells_of(grid), grid["model"])


# --- results ---


def test_a_line_that_was_cut_off_is_moved_aside_and_the_next_one_stands_alone(
    accuracy: Any, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    file = tmp_path / "results.jsonl"
    accuracy.append_line(file, {"a": 1})
    with open(file, "a") as stream:
        stream.write('{"a": 2, "b')
    assert accuracy.read_lines(file) == [{"a": 1}]
    assert "cut off" in capsys.readouterr().out
    accuracy.append_line(file, {"a": 3})
    # Cut while another process runs, which has read the file before.
    with open(file, "a") as stream:
        stream.write('{"a": 4')
    accuracy.append_line(file, {"a": 5})
    assert accuracy.read_lines(file) == [{"a": 1}, {"a": 3}, {"a": 5}]
    assert Path(f"{file}.cut").read_text() == '{"a": 2, "b\n{"a": 4\n'


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_full_disk_is_told_and_loses_nothing(accuracy: Any, tmp_path: Path) -> None:
    file = tmp_path / "results.jsonl"
    file.symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        accuracy.append_line(file, {"a": 1})


def test_lines_of_other_splits_seeds_and_flags_are_other_runs(accuracy: Any) -> None:
    line = {"split": "validation", "task": "sst2", "cell": "ste", "seed": 0, "flags": {"a": 1, "b": 2}}
    line["float_flags"] = {}
    same = line | {"flags": {"b": 2, "a": 1}, "packed": {}}
    assert accuracy.key_of(line) == accuracy.key_of(same)
    for change in (
        {"split": "held_out"},
        {"seed": 1},
        {"flags": {"a": 1}},
        {"float_flags": {"a": 1}},
        {"cell": "bwn"},
        {"task": "mrpc"},
    ):
        assert accuracy.key_of(line) != accuracy.key_of(line | change)


# --- the split ---


def is_part(inner: str, outer: str) -> bool:
    a, b = inner.split(), outer.split()
    return any(b[i : i + len(a)] == a for i in range(len(b) - len(a) + 1))


def test_no_phrase_that_is_left_is_part_of_a_held_out_sentence_or_the_other_way() -> None:
    split = load("held_out").split
    generator = random.Random(0)
    sentences = [" ".join(generator.choices("abcdefgh", k=generator.randint(9, 14))) for _ in range(30)]
    phrases = []
    for sentence in sentences:
        words = sentence.split()
        for _ in range(8):
            begin = generator.randrange(len(words))
            phrases.append(" ".join(words[begin : begin + generator.randint(1, 6)]))
    texts = [(text,) for text in generator.sample([*sentences, *phrases], len(sentences) + len(phrases))]
    train, held_out = split(texts, 10)
    assert len(held_out) == 10 and set(train).isdisjoint(held_out)
    for held in held_out:
        assert len(texts[held][0].split()) >= 8
        assert not any(is_part(texts[i][0], texts[held][0]) or is_part(texts[held][0], texts[i][0]) for i in train)
    # Nothing else is lost.
    lost = set(range(len(texts))) - set(train) - set(held_out)
    assert all(any(is_part(texts[i][0], texts[held][0]) for held in held_out) for i in lost)


def test_pairs_that_share_a_sentence_stay_together() -> None:
    split = load("held_out").split
    generator = random.Random(1)
    pairs = [(f"s{generator.randrange(60)}", f"s{generator.randrange(60, 120)}") for _ in range(60)]
    train, held_out = split(pairs, 5)
    assert sorted([*train, *held_out]) == list(range(60)) and len(held_out) >= 5
    seen = {text for i in train for text in pairs[i]}
    assert all(text not in seen for i in held_out for text in pairs[i])
    assert split(pairs, 5) == (train, held_out) != split(pairs, 5, seed=1)


def test_more_than_can_be_held_out_is_refused() -> None:
    with pytest.raises(ValueError, match="only 0 of 2 examples can be held out"):
        load("held_out").split([("a", "b"), ("a", "c")], 1)


# --- the report ---


def line(cell: str, seed: int, packed: float | None, task: str = "sst2", **others: Any) -> dict[str, Any]:
    found = None if packed is None else {"accuracy": packed}
    is_float = cell in ("float", "tfidf")
    return {
        **{"split": "validation", "task": task, "cell": cell, "seed": seed, "model": "minilm", "mode": "bnn"},
        **{"options": {}, "flags": {}, "float_flags": {}},
        **{"embeddings": "float", "teacher": True, "examples": {"train": 99}, "steps": {"binary": 7, "float": 3}},
        "float": found if is_float else {"accuracy": 88.0},
        "packed": None if is_float else found,
        "packed_best": None if is_float else {"accuracy": packed + 1},
        "bytes": {"packed": 5 * 2**20, "float": 2**20},
        **others,
    }


def test_the_report_gives_mean_and_deviation_over_seeds_and_draws_them(tmp_path: Path) -> None:
    report = load("accuracy_report")
    values = [80.0, 81.0, 83.5]
    lines = [line("ste", seed, value) for seed, value in enumerate(values)]
    # A seed that was run again counts once, as it was last.
    lines = [line("ste", 0, 10.0), *lines, line("float", 0, 88.0), line("tfidf", 0, 81.3)]
    report.write_report(lines, tmp_path)
    text = (tmp_path / "accuracy_validation.md").read_text()
    expected = f"{sum(values) / 3:.1f} ± {statistics.stdev(values):.1f}"
    best = f"{sum(values) / 3 + 1:.1f} ± {statistics.stdev(values):.1f}"
    assert f"| ste | bnn | float | yes | 3 | 99 | 7 | {expected} | {best} | 5.0 |" in text
    assert text.index("| tfidf") < text.index("| float |") < text.index("| ste |")
    assert "| 88.0 | - | 1.0 |" in text and "average" not in text
    assert (tmp_path / "accuracy_validation.png").read_bytes().startswith(b"\x89PNG")


def test_the_report_averages_what_every_task_has_and_keeps_other_settings_apart(tmp_path: Path) -> None:
    report = load("accuracy_report")
    lines = [line("ste", 0, 80.0), line("ste", 0, 60.0, task="rte"), line("ste", 1, 62.0, task="rte")]
    lines += [line("bwn", 0, 90.0), line("ste", 0, 10.0, flags={"learning_rate": 1})]
    report.write_report(lines, tmp_path)
    text = (tmp_path / "accuracy_validation.md").read_text()
    assert "| ste | 70.5 |" in text and "| bwn | 90.0 |" not in text
    assert re.search(r"\| ste \(2\) .*\| 10.0 \|", text) and re.search(r"\| ste \| .*\| 80.0 \|", text)


# --- from end to end ---


@pytest.mark.slow
def test_a_grid_is_run_skips_what_is_finished_and_survives_a_run_that_fails(
    accuracy: Any, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    from transformers import BertConfig, BertModel, BertTokenizer

    sentences = [
        f"a {word} {noun} number{i}" for i in range(6) for noun in ("film", "play") for word in ("good", "bad")
    ]
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted({w for text in sentences for w in text.split()})]
    folder = tmp_path / "data" / "sst2"
    folder.mkdir(parents=True)
    table = pyarrow.table({"sentence": sentences, "label": [i % 2 for i in range(len(sentences))]})
    for name in ("train", "validation"):
        parquet.write_table(table, folder / f"{name}.parquet")
    model = tmp_path / "work" / "tiny"
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    BertModel(BertConfig(vocab_size=len(words), max_position_embeddings=32, **sizes)).save_pretrained(model)
    BertTokenizer(vocab={word: i for i, word in enumerate(words)}, model_max_length=32).save_pretrained(model)
    grid = {
        "model": "tiny",
        "seeds": [0],
        "baselines": ["majority", "tfidf"],
        "all": {"max_steps": 6, "use_cpu": True, "eval_strategy": "steps", "eval_steps": 3, "report_to": "none"},
        "tasks": {"sst2": None},
        "cells": {"ste": {"method": "ste"}, "fails": {"method": "stompp", "progression_tail": 100}},
    }
    results = tmp_path / "results.jsonl"
    command = [str(written(tmp_path, grid)), "--dataset_dir", str(tmp_path / "data"), "--results", str(results)]
    command += ["--work", str(tmp_path / "work")]
    assert accuracy.main([*command, "--jobs", "2"]) == 1
    work = tmp_path / "work"
    assert re.search(r"fails-seed0-\w+: failed with status 1", capsys.readouterr().out)
    assert "the schedule cannot finish" in next(work.glob("validation-sst2-fails-seed0-*.log")).read_text()
    assert not list(work.glob("*/checkpoint-*"))
    lines = accuracy.read_lines(results)
    assert [entry["cell"] for entry in lines] == ["majority", "tfidf", "float", "ste"]
    assert lines[0]["float"] == {"accuracy": 50.0}
    summary = json.loads(next(work.glob("validation-sst2-ste-seed0-*/summary.json")).read_text())
    assert lines[3]["packed"]["accuracy"] == pytest.approx(100 * summary["metrics"]["packed"]["eval_accuracy"])
    assert lines[3]["float"] == lines[2]["float"] and lines[3]["teacher"] and lines[3]["packed_best"] is not None
    required = "task model method mode teacher embeddings seed options examples steps float packed packed_best bytes"
    assert all({*required.split(), "seconds", "machine", "command"} <= set(entry) for entry in lines)

    assert accuracy.main([*command, "--cell", "ste"]) == 0
    assert accuracy.read_lines(results) == lines
    # The float model is made again for a run that needs it, on a machine that has the results file alone.
    results.write_text("".join(json.dumps(entry) + "\n" for entry in lines[:3]))
    shutil.rmtree(next(path for path in work.glob("validation-sst2-float-seed0-*") if path.is_dir()))
    assert accuracy.main([*command, "--cell", "ste"]) == 0
    assert [entry["cell"] for entry in accuracy.read_lines(results)] == [entry["cell"] for entry in lines]
    assert accuracy.main([*command, "--cell", "ste", "--select", "--held_out", "4", "--time-budget", "0"]) == 0
    assert "left out: held_out-sst2-ste-seed0-" in capsys.readouterr().out
    kept = parquet.read_table(tmp_path / "work" / "held_out" / "sst2" / "train.parquet")["sentence"].to_pylist()
    held = parquet.read_table(tmp_path / "work" / "held_out" / "sst2" / "validation.parquet")["sentence"].to_pylist()
    assert sorted(kept + held) == sorted(sentences) and len(held) == 4
