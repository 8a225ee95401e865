"""A training run that is interrupted, wherever that is, ends with the bits of one that was not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_run_that_is_killed_or_finds_a_full_disk_ends_with_the_same_bits_when_started_again(tmp_path: Path) -> None:
    program = Path(__file__).with_name("run.py")
    done = subprocess.run(
        [sys.executable, str(program), str(tmp_path), "20", "5"],
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    runs = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"kind"')]

    assert [run for run in runs if run["again"] or run["difference"]] == []
    assert len(runs) == 25 and sum(run["interrupted"] for run in runs) >= 15
    # In both stages.
    assert any("float" in run["left"] and "checkpoint-2" not in run["left"] for run in runs)
    assert any("checkpoint-2" in run["left"] or "checkpoint-4" in run["left"] for run in runs)
