from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import pytest


ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_glue_table_is_what_the_result_files_say() -> None:
    spec = importlib.util.spec_from_file_location("glue_table", ROOT / "benchmarks" / "glue_table.py")
    glue_table = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(glue_table)
    assert glue_table.table(glue_table.read_results()) in README


def test_the_tables_of_cpu_speed_are_what_the_result_file_says() -> None:
    spec = importlib.util.spec_from_file_location("cpu_table", ROOT / "benchmarks" / "cpu_table.py")
    cpu_table = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(cpu_table)
    results = cpu_table.read_results()
    assert len(results) == 1
    assert all(table in README for table in cpu_table.tables(results[0]))


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks" / "results").glob("*.json")), ids=lambda path: path.name)
def test_every_result_file_says_how_and_where_it_was_made(path: Path) -> None:
    summary = json.loads(path.read_text(encoding="utf-8"))
    training = ("metrics", "bytes", "seconds") if "task" in summary else ()
    for field in ("command", "seed", "machine", "versions", *training):
        assert summary[field] is not None, field
    assert not re.search(r"/(root|home|tmp|work)/", path.read_text(encoding="utf-8"))
    if training and summary["method"] != "float":
        assert summary["metrics"]["packed"] is not None and summary["metrics"]["binary_final"] is not None


def test_every_file_that_the_readme_links_to_is_there() -> None:
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if not link.startswith("http")]
    assert links and not [link for link in links if not (ROOT / link).exists()]
