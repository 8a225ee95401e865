"""Prints the GLUE table in `docs/findings.md` from `benchmarks/results/glue_*.json`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


RESULTS = Path(__file__).parent / "results"
METHODS = {"ste": "vanilla STE", "stompp": "StoMPP, STE-free", "stompp_ste": "StoMPP+STE"}
MEASURES = {"sst2": ["accuracy"], "mrpc": ["accuracy", "f1"]}


def read_results(folder: Path = RESULTS) -> list[dict[str, Any]]:
    """The summaries of the binary runs, by task, method and seed."""
    summaries = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("glue_*.json"))]
    binary = [summary for summary in summaries if summary["method"] in METHODS]
    order = list(METHODS)
    return sorted(binary, key=lambda s: (list(MEASURES).index(s["task"]), order.index(s["method"]), s["seed"]))


def percent(metrics: dict[str, float] | None, task: str) -> str:
    if metrics is None:
        return "-"
    return " / ".join(f"{100 * metrics[f'eval_{measure}']:.1f}" for measure in MEASURES[task])


def table(summaries: list[dict[str, Any]]) -> str:
    """Markdown: final checkpoint, best checkpoint and packed model beside the float model they started from."""
    lines = [
        "| task | method | seed | float | binary, final | binary, best | packed | MiB float -> packed |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for s in summaries:
        metrics = [
            percent(s["metrics"][kind], s["task"]) for kind in ("float", "binary_final", "binary_best", "packed")
        ]
        sizes = " -> ".join(f"{s['bytes'][kind] / 2**20:.1f}" for kind in ("float", "packed"))
        lines.append("| " + " | ".join([s["task"], METHODS[s["method"]], str(s["seed"]), *metrics, sizes]) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(read_results()))
