"""
Prints the table of accuracy in `docs/benchmarks.md` from `results/accuracy.jsonl`:

    python benchmarks/accuracy_table.py
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


RESULTS = Path(__file__).parent / "results" / "accuracy.jsonl"

TASKS = {
    "sst2": "SST-2, accuracy",
    "mrpc": "MRPC, accuracy",
    "cola": "CoLA, Matthews correlation",
    "stsb": "STS-B, Spearman",
    "rte": "RTE, accuracy",
}
"""Task -> column. The first measure of each; the others are in the lines."""

ROWS = {
    "float": ("float",),
    "`bwn`": ("bwn",),
    "`bwn`, text first": ("bwn-distilled",),
    "bytes in attention": ("ste-bwn-attention",),
    "bytes in attention, text first": ("bwn-attention-distilled-2-epochs", "bwn-attention-distilled"),
    "`bnn`": ("ste",),
    "`bnn`, StoMPP+STE, wide clip ranges": ("stompp-ste-window",),
    "`bnn`, four epochs": ("ste-4-epochs",),
    "`bnn`, StoMPP+STE, four epochs": ("stompp-ste-clip-1-4-epochs",),
    "`bnn`, StoMPP (STE-free), four epochs": ("stompp-clip-1-4-epochs",),
    "`bnn`, teacher's attention learned, no text": ("ste-attentions",),
    "`bnn`, StoMPP+STE, teacher's attention learned, no text": ("stompp-ste-attentions",),
    "`bnn`, text first": ("ste-distilled-4-epochs", "ste-distilled"),
    "`bnn`, text first, film reviews beside it": ("ste-distilled-reviews",),
    "`bnn`, text first, teacher's attention learned": (
        "ste-distilled-all-attentions-4-epochs",
        "ste-distilled-all-attentions",
    ),
    "the row above, 20 epochs": ("ste-distilled-all-attentions-20-epochs",),
    "`bnn`, clean text first, teacher's attention learned": ("text-ste",),
    "the row above, text learned by StoMPP+STE": ("text-stompp-ste",),
    "the row above, 44,464 more pairs": ("text-stompp-ste-answered",),
    "`bnn`, clean text twice, by StoMPP+STE, teacher's attention learned": ("text-stompp-ste-2-epochs",),
    "bag of words": ("tfidf",),
    "most frequent answer": ("majority",),
}
"""Row -> cells of the grid, the first that was run for a task."""


def read_results() -> list[dict[str, Any]]:
    """The lines of models with all their layers, on the development sets."""
    lines = [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if line["split"] == "validation" and line.get("layers") is None]


def table(lines: Iterable[Mapping[str, Any]]) -> str:
    """Markdown: means over the seeds, their number where it is not 1; what was not run is a dash."""
    found: dict[tuple[str, str], list[float]] = {}
    for line in lines:
        # The packed model counts; what is float has no other figure.
        first, *_ = (line["packed"] or line["float"]).values()
        found.setdefault((line["task"], line["cell"]), []).append(first)

    def text(task: str, cells: tuple[str, ...]) -> str:
        measured = next((found[task, cell] for cell in cells if (task, cell) in found), None)
        if measured is None:
            return "-"
        mean = f"{statistics.mean(measured):.1f}"
        return mean if len(measured) == 1 else f"{mean} ({len(measured)})"

    rows = [f"| model | {' | '.join(TASKS.values())} |", f"|{'---|' * (len(TASKS) + 1)}"]
    rows += [f"| {name} | {' | '.join(text(task, cells) for task in TASKS)} |" for name, cells in ROWS.items()]
    return "\n".join(rows)


if __name__ == "__main__":
    print(table(read_results()))
