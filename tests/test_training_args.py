from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from transformers import HfArgumentParser

from hf_stompp import StoMPPTrainingArguments
from hf_stompp.training.progression import ORDERS, SCHEDULES


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("progression_order", "backward", r"must be one of \['forward', .*'reverse'\], got 'backward'"),
        ("progression_schedule", "quartic", r"must be one of \['cosine', 'cubic', .*\], got 'quartic'"),
        ("progression_warmup", -0.1, "must be a share of all steps in .*, got -0.1"),
        ("progression_tail", -1, "must be a share of all steps in .*, got -1"),
        ("progression_overlap", 1.0, r"must lie in \[0, 1\), got 1.0"),
        ("progression_overlap", -0.1, r"must lie in \[0, 1\), got -0.1"),
        ("progression_overlap", math.nan, r"must lie in \[0, 1\), got nan"),
        ("refresh_period", 0.5, "must be at least 1 step, got 0.5"),
        ("refresh_period", math.nan, "must be at least 1 step, got nan"),
        ("activation_learning_rate", 0.0, "must be a finite number above 0, got 0.0"),
        ("activation_learning_rate", math.inf, "must be a finite number above 0, got inf"),
        ("progression_warmup", math.nan, ""),
        ("progression_tail", 1.5, ""),
    ],
    ids=lambda value: repr(value) if isinstance(value, float | int) else value.partition("must")[0],
)
def test_a_bad_value_is_refused_by_name_with_what_it_may_be(
    field: str, value: object, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=f"{field} {message}"):
        StoMPPTrainingArguments(output_dir=str(tmp_path), **{field: value})


@pytest.mark.parametrize("order", ORDERS)
def test_every_order_is_accepted(order: str, tmp_path: Path) -> None:
    assert StoMPPTrainingArguments(str(tmp_path), progression_order=order).progression_order == order


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_is_accepted(schedule: str, tmp_path: Path) -> None:
    assert StoMPPTrainingArguments(str(tmp_path), progression_schedule=schedule).progression_schedule == schedule


def test_the_command_line_takes_every_field(tmp_path: Path) -> None:
    given = {
        "progression_order": "reverse",
        "progression_schedule": "linear",
        "progression_warmup": 0.1,
        "progression_tail": 20.0,
        "progression_overlap": 0.5,
        "refresh_period": 10.0,
        "mask_seed": 7,
        "eval_mixed": False,
    }
    line = [f"--{name}={value}" for name, value in {"output_dir": tmp_path, **given}.items()]
    (arguments,) = HfArgumentParser(StoMPPTrainingArguments).parse_args_into_dataclasses(line)
    assert {name: getattr(arguments, name) for name in given} == given


def test_the_command_line_refuses_an_unknown_order(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        HfArgumentParser(StoMPPTrainingArguments).parse_args_into_dataclasses(
            [f"--output_dir={tmp_path}", "--progression_order=backward"]
        )
    assert "invalid choice: 'backward'" in capsys.readouterr().err


def test_arguments_survive_json(tmp_path: Path) -> None:
    arguments = StoMPPTrainingArguments(str(tmp_path), progression_order="random", mask_seed=3)
    saved = json.loads(arguments.to_json_string())
    assert (saved["progression_order"], saved["mask_seed"], saved["progression_tail"]) == ("random", 3, 0.3)


def test_a_run_stays_itself_whether_its_card_is_timed(tmp_path: Path) -> None:
    plain, timed = (StoMPPTrainingArguments(str(tmp_path), use_cpu=True, card_speed=asked) for asked in (False, True))
    assert plain.own_arguments() == timed.own_arguments() and "progression_tail" in plain.own_arguments()
