from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


SCRIPT = Path(__file__).parent.parent / "benchmarks" / "training.py"
METHODS = ["float", "ste", "stompp", "stompp_ste", "stompp_ste_teacher"]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_training_benchmark_measures_every_method_in_every_phase(tmp_path: Path, dtype: str) -> None:
    output = tmp_path / "new" / "result.json"
    settings = ["--dtype", dtype, "--steps", "14", "--batch", "2", "--length", "8", "--output", str(output)]
    printed = subprocess.run(
        [sys.executable, str(SCRIPT), *settings], capture_output=True, text=True, check=True
    ).stdout

    result = json.loads(output.read_text())
    assert list(result["records"]) == list(result["summary"]) == METHODS
    assert len(result["windows"]) == 6
    steps = set(range(14)) - {int(step) for step in result["profiled_steps"]}
    for method in METHODS:
        summary = result["summary"][method]
        assert {record["step"] for record in result["records"][method]} == steps
        assert all(record["seconds"] > 0 and record["peak_bytes"] > 0 for record in result["records"][method])
        assert len(summary["phases"]) == 6 and summary["tokens_a_second"] > 0
        for shares in result["shares"][method].values():
            assert sum(shares.values()) == pytest.approx(1.0)
            assert shares["products"] > 0 and shares["attention"] > 0
    assert result["summary"]["float"]["whole_run_over_float"] == pytest.approx(1.0)
    assert result["shares"]["float"]["first window"]["masks"] < result["shares"]["ste"]["first window"]["masks"]
    assert "StoMPP, STE-free" in printed and "Traceback" not in printed
