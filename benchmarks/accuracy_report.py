"""Tables and plots of the lines that `benchmarks/accuracy.py` writes."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


Line = Mapping[str, Any]

FLOAT_ROWS = ("majority", "tfidf", "float")
"""Cells whose figures are of no binary model, in the order of the table."""


def grouped(lines: Iterable[Line], split: str) -> dict[str, dict[str, list[Line]]]:
    """Lines of a split by task and cell, the cells that are not binary first; the last line of a seed counts."""
    by_seed: dict[tuple[Any, ...], Line] = {}
    variants: dict[tuple[str, str], list[str]] = {}
    for line in lines:
        if line["split"] == split:
            asked = json.dumps([line["flags"], line["float_flags"], line["model"]], sort_keys=True)
            layers = line.get("layers")
            cell = line["cell"] if layers is None else f"{line['cell']}, {layers} layers"
            by_seed[line["task"], cell, asked, line["seed"]] = line
            known = variants.setdefault((line["task"], cell), [])
            if asked not in known:
                known.append(asked)
    tasks: dict[str, dict[str, list[Line]]] = {}
    for (task, cell, asked, _), line in by_seed.items():
        # Runs of one name that were asked for something else are rows of their own.
        number = variants[task, cell].index(asked)
        tasks.setdefault(task, {}).setdefault(f"{cell} ({number + 1})" if number else cell, []).append(line)
    rank = {name: index for index, name in enumerate(FLOAT_ROWS)}
    return {
        task: dict(sorted(cells.items(), key=lambda item: rank.get(item[1][0]["cell"], len(FLOAT_ROWS))))
        for task, cells in tasks.items()
    }


def figures(lines: list[Line], kind: str, measure: str) -> list[float]:
    """A measure of each line, in percent; of a cell that is not binary there is the float figure alone."""
    kind = "float" if lines[0]["cell"] in FLOAT_ROWS else kind
    return [line[kind][measure] for line in lines if line[kind] is not None]


def cell_text(values: list[float]) -> str:
    """Mean, and with several seeds their standard deviation (of a sample)."""
    if not values:
        return "-"
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}"


def measures_of(lines: list[Line]) -> list[str]:
    """Names of the measures that the lines hold."""
    return list(next(line[kind] for line in lines for kind in ("packed", "float") if line[kind]))


def table(task: str, cells: Mapping[str, list[Line]]) -> str:
    """Markdown: a row a cell."""
    rows = [
        f"### {task}",
        "",
        "| cell | mode | embeddings | teacher | seeds | examples | steps | final, packed | best, packed | MiB |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, lines in cells.items():
        first, is_float = lines[0], lines[0]["cell"] in FLOAT_ROWS
        names = measures_of(lines)
        final, best = (
            " / ".join(cell_text(figures(lines, kind, measure)) for measure in names)
            for kind in ("packed", "packed_best")
        )
        size = first["bytes"].get("float" if is_float else "packed")
        texts = [
            *(name, first["mode"] or "-", first["embeddings"] or "-", "yes" if first["teacher"] else "no"),
            *(len(lines), first["examples"].get("train", "-")),
            first["steps"].get("float" if is_float else "binary", "-"),
            *(final, "-" if is_float else best, "-" if size is None else f"{size / 2**20:.1f}"),
        ]
        rows.append("| " + " | ".join(str(text) for text in texts) + " |")
    return "\n".join(rows)


def averages(tasks: Mapping[str, Mapping[str, list[Line]]]) -> str:
    """Markdown: the mean over tasks of the main measure, of the cells that every task has."""
    common = [name for name in next(iter(tasks.values())) if all(name in cells for cells in tasks.values())]
    rows = [f"### average of {', '.join(tasks)}", "", "| cell | final, packed |", "|---|---|"]
    for name in common:
        means = [
            statistics.mean(figures(cells[name], "packed", measures_of(cells[name])[0])) for cells in tasks.values()
        ]
        rows.append(f"| {name} | {statistics.mean(means):.1f} |")
    return "\n".join(rows)


def plot(tasks: Mapping[str, Mapping[str, list[Line]]], file: Path) -> None:
    """A panel a task: each seed of each binary cell a point, with float, bag of words and majority as lines."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = max(len(cells) for cells in tasks.values())
    size = (1.5 + 4.2 * len(tasks), 1.8 + 0.4 * rows)
    figure, axes = pyplot.subplots(1, len(tasks), figsize=size, squeeze=False, layout="constrained")
    styles = {"float": ("#444444", "-"), "tfidf": ("#d08a28", "--"), "majority": ("#999999", ":")}
    for axis, (task, cells) in zip(axes[0], tasks.items(), strict=True):
        measure = measures_of(next(iter(cells.values())))[0]
        binary = [name for name, lines in cells.items() if lines[0]["cell"] not in FLOAT_ROWS]
        for row, name in enumerate(binary):
            values = figures(cells[name], "packed", measure)
            axis.plot(values, [row] * len(values), "o", color="#2a78b5", alpha=0.5, markersize=6)
            axis.plot(statistics.mean(values), row, "|", color="#12466f", markersize=16, markeredgewidth=2)
        for name, (color, dashes) in styles.items():
            if name in cells:
                level = statistics.mean(figures(cells[name], "float", measure))
                axis.axvline(level, color=color, linestyle=dashes, linewidth=1.4, label=f"{name}, {level:.1f}")
        axis.set_yticks(range(len(binary)), binary)
        axis.set_ylim(len(binary) - 0.5, -0.5)
        axis.set_xlabel(f"{measure}, %")
        axis.set_title(task, loc="left")
        axis.legend(loc="upper left", bbox_to_anchor=(0, -0.28), frameon=False, fontsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


def write_report(lines: list[Line], folder: Path) -> None:
    """Writes `accuracy_<split>.md` and `accuracy_<split>.png` for each split that there are lines of."""
    folder.mkdir(parents=True, exist_ok=True)
    for split in dict.fromkeys(line["split"] for line in lines):
        tasks = grouped(lines, split)
        tables = [table(task, cells) for task, cells in tasks.items()]
        text = "\n\n".join([*tables, averages(tasks)] if len(tasks) > 1 else tables)
        (folder / f"accuracy_{split}.md").write_text(text + "\n", encoding="utf-8")
        print(text)
        drawn = {
            task: cells
            for task, cells in tasks.items()
            if any(lines[0]["cell"] not in FLOAT_ROWS for lines in cells.values())
        }
        if drawn:
            plot(drawn, folder / f"accuracy_{split}.png")
