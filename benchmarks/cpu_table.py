"""
Prints the tables of CPU speed in `docs/kernels.md`: those of `hf-stompp bench`, from `benchmarks/results/cpu_*.json`
and `loading_*.json`, as Markdown.

    python benchmarks/cpu_table.py
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from hf_stompp.cli import benchmarking


RESULTS = Path(__file__).parent / "results"

TABLES: dict[str, Callable[[dict], benchmarking.Rows]] = {
    "models": benchmarking.model_rows,
    "linear": benchmarking.speedup_rows,
    "loading": benchmarking.loading_rows,
}
"""Each by the part of a result that it shows: `--level` may have left out the others."""


SHOWN = {"cpu_*.json": ("models", "linear", "linear_speedups"), "loading_*.json": ("loading",)}
"""Files, and what is shown of each."""


def read_results() -> list[dict]:
    """What is shown of the result files of `hf-stompp bench`, in the order of their names."""
    results = []
    for pattern, parts in SHOWN.items():
        for path in sorted(RESULTS.glob(pattern)):
            result = json.loads(path.read_text(encoding="utf-8"))
            results.append({name: result[name] for name in ("machine", *parts) if name in result})
    return results


def tables(result: dict) -> list[str]:
    """Whole encoders, single layers and loading, as Markdown."""
    texts = []
    for part, table in TABLES.items():
        if not result.get(part):
            continue
        header, *rows = table(result)
        texts.append("\n".join(f"| {' | '.join(row)} |" for row in [header, ["---"] * len(header), *rows]))
    return texts


def main() -> None:
    for result in read_results():
        print(result["machine"]["processor"]["name"], *tables(result), sep="\n\n")


if __name__ == "__main__":
    main()
