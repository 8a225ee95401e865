from __future__ import annotations

import shlex
from pathlib import Path

from hf_stompp.machine import command_line


def test_a_recorded_command_can_be_run_again_and_says_nothing_of_where_files_were(tmp_path: Path) -> None:
    paths = [
        f"{tmp_path}/m",
        f"float, 6 layers={tmp_path}/runs/float",
        f"--output={tmp_path}/out=1.json",
        f"{tmp_path}/a=b",
    ]
    kept = ["runs/packed", "bwn=runs/packed", "../glue", '{"rope": "a/b"}', "--seed", "3", "a/b=c d"]

    found = command_line(["python", "benchmarks/any.py", *paths, *kept])

    expected = ["m", "float, 6 layers=float", "--output=out=1.json", "a=b"]
    assert shlex.split(found) == ["python", "benchmarks/any.py", *expected, *kept]
    # As it was recorded, so it stays.
    assert command_line(shlex.split(found)) == found
