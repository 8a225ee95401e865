from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from hf_stompp.reports.dynamics import read_dynamics


HISTORY = Path(__file__).parent.parent.parent / "benchmarks" / "results" / "sst2_stompp_history.json"


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """A folder of a run, with the log of a real one."""
    folder = tmp_path / "run"
    folder.mkdir()
    shutil.copy(HISTORY, folder / "trainer_state.json")
    return folder


def write(folder: Path, content: Any) -> Path:
    (folder / "trainer_state.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


@pytest.fixture
def matplotlib() -> None:
    pytest.importorskip("matplotlib")


@pytest.mark.usefixtures("matplotlib")
def test_plot_writes_a_picture_and_a_page_into_the_run(run_folder, printed):
    output = printed("plot", run_folder)

    picture, page = run_folder / "dynamics.png", run_folder / "dynamics.html"
    assert picture.read_bytes().startswith(b"\x89PNG") and page.read_text().startswith("<!doctype html>")
    assert "1500 optimizer steps" in output and "units: 6, 6 committed, fully binary after step 1050" in output
    assert "accuracy: 0.6709 fully binary" in output and "accuracy: 0.7741 mixed, last evaluation" in output
    assert f"picture: {picture}\n" in output and f"report: {page}\n" in output


@pytest.mark.usefixtures("matplotlib")
def test_json_has_the_series_and_the_files(run_folder, printed, tmp_path):
    result = json.loads(printed("plot", run_folder, "--output", tmp_path / "deep" / "figures", "--json"))

    found = read_dynamics(run_folder)
    assert result["loss"] == {"steps": found.loss.steps, "values": found.loss.values}
    assert [unit["name"] for unit in result["units"]] == [unit.name for unit in found.units]
    assert (result["run"], result["steps"], result["committed_step"], result["metric"]) == (
        "run",
        1500,
        1050,
        "accuracy",
    )
    assert Path(result["picture"]).is_file() and Path(result["report"]).is_file()
    assert Path(result["picture"]).parent == tmp_path / "deep" / "figures"


@pytest.mark.usefixtures("matplotlib")
def test_file_with_a_history_is_drawn_beside_it(printed, tmp_path):
    file = Path(shutil.copy(HISTORY, tmp_path / "my.history.json"))

    result = json.loads(printed("plot", file, "--json"))

    assert (result["run"], result["source"]) == ("my.history", str(file))
    assert Path(result["picture"]) == tmp_path / "dynamics.png"


@pytest.mark.usefixtures("matplotlib")
def test_history_in_a_folder_without_a_trainer_state_is_found(printed, tmp_path):
    (tmp_path / "a.json").write_text("{")
    shutil.copy(HISTORY, tmp_path / "history.json")

    assert json.loads(printed("plot", tmp_path, "--json"))["source"] == str(tmp_path / "history.json")


@pytest.mark.usefixtures("matplotlib")
def test_files_that_are_there_are_replaced_only_by_force(run_folder, printed, refused):
    printed("plot", run_folder)
    (run_folder / "dynamics.html").write_text("mine")

    assert "dynamics.png is there already" in refused("plot", run_folder)
    assert "--output" in refused("plot", run_folder) and "--force" in refused("plot", run_folder)
    assert (run_folder / "dynamics.html").read_text() == "mine"
    printed("plot", run_folder, "--force")
    assert (run_folder / "dynamics.html").read_text() != "mine"


@pytest.mark.usefixtures("matplotlib")
@pytest.mark.parametrize("name", ["dynamics.png", "dynamics.html"])
def test_link_in_the_place_of_a_file_is_there_and_not_written_through(run_folder, printed, refused, tmp_path, name):
    (run_folder / name).symlink_to(tmp_path / "elsewhere")

    assert f"{name} is there already" in refused("plot", run_folder)
    printed("plot", run_folder, "--force")

    assert (run_folder / name).is_file() and not (run_folder / name).is_symlink()
    assert sorted(os.listdir(run_folder)) == ["dynamics.html", "dynamics.png", "trainer_state.json"]
    assert not (tmp_path / "elsewhere").exists()


def test_missing_matplotlib_is_named_with_what_installs_it(run_folder, refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)

    assert 'not installed: pip install "hf_stompp[plot]"' in refused("plot", run_folder)
    assert os.listdir(run_folder) == ["trainer_state.json"]


@pytest.mark.usefixtures("matplotlib")
def test_what_is_no_run_is_refused(refused, tmp_path):
    assert f"there is no run {tmp_path / 'missing'}: name the output_dir" in refused("plot", tmp_path / "missing")
    message = refused("plot", tmp_path)
    assert f"{tmp_path} holds no trainer_state.json" in message and "trainer.save_state()" in message
    (tmp_path / "summary.json").write_text("{}")
    assert "holds no trainer_state.json" in refused("plot", tmp_path)


@pytest.mark.usefixtures("matplotlib")
@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('{"log_history": [', "is no valid JSON"),
        ("[]", "holds no JSON object"),
        ({}, "holds no log_history"),
        ({"log_history": [{"loss": 1.0}]}, "holds no log_history"),
        ({"log_history": []}, "is empty: nothing was logged before the run ended; set logging_steps"),
        ({"log_history": [{"step": 5, "train_runtime": 1.0, "train_loss": 0.5}]}, "is empty"),
        ('{"log_history": [{"step": 1, "loss": NaN}]}', "no finite number to draw"),
    ],
)
def test_log_that_cannot_be_drawn_is_refused_by_its_file(refused, tmp_path, content, expected):
    message = refused("plot", write(tmp_path, content))

    assert str(tmp_path / "trainer_state.json") in message and expected in message
    assert os.listdir(tmp_path) == ["trainer_state.json"]


@pytest.mark.usefixtures("matplotlib")
def test_unknown_measure_is_refused_with_those_that_are_there(run_folder, refused):
    assert "no measure 'f1': it has" in refused("plot", run_folder, "--metric", "f1")
    assert "accuracy" in refused("plot", run_folder, "--metric", "f1")


@pytest.mark.usefixtures("matplotlib")
def test_output_that_is_a_file_is_refused(run_folder, refused, tmp_path):
    (tmp_path / "file").write_text("")

    assert "is a file: name a folder" in refused("plot", run_folder, "--output", tmp_path / "file")
