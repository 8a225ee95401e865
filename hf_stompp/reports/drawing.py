"""Training dynamics for people: a picture, and a page that holds it with tables."""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .dynamics import MODELS, Dynamics, Series, UnitDynamics, dynamics_of


if TYPE_CHECKING:
    from transformers import TrainerState


# More dotted lines would hide what they cross.
MOST_LINES = 12


@dataclass(frozen=True)
class _Theme:
    background: str
    ink: str
    muted: str
    grid: str
    binary: str
    mixed: str
    fractions: tuple[str, ...]


LIGHT = _Theme(
    background="#ffffff",
    ink="#1f2328",
    muted="#656d76",
    grid="#d8dee4",
    binary="#0b5cad",
    mixed="#d9730d",
    fractions=("#eef2f6", "#9cc3e6", "#0b5cad", "#08305c"),
)
DARK = _Theme(
    background="#15181d",
    ink="#e6e8eb",
    muted="#9aa4af",
    grid="#39414a",
    binary="#6cb6ff",
    mixed="#f0a04b",
    fractions=("#242a31", "#24527f", "#4b96dd", "#c5e2ff"),
)


def can_draw() -> bool:
    """Whether matplotlib is installed."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        return False
    return True


def short_names(units: Sequence[str]) -> list[str]:
    """Names of units without what all of them begin with; a bare number keeps the word before it."""
    if len(units) < 2:
        return list(units)
    parts = [unit.split(".") for unit in units]
    same = 0
    while all(len(part) > same + 1 and part[same] == parts[0][same] for part in parts):
        same += 1
    if same and any(part[same].isdigit() for part in parts):
        same -= 1
    return [".".join(part[same:]) for part in parts]


def _mesh(units: Sequence[UnitDynamics], steps: int) -> tuple[list[float], list[list[float]]]:
    """Edges of cells along the steps, and a row of values for each unit; each logged step is amid its cell."""
    logged = sorted({step for unit in units for step in unit.frozen.steps})
    edges = [0.0, *((a + b) / 2 for a, b in pairwise(logged)), float(max(steps, logged[-1]))]
    rows = []
    for unit in units:
        values = dict(zip(unit.frozen.steps, unit.frozen.values, strict=True))
        rows.append([values.get(step, math.nan) for step in logged])
    return edges, rows


def draw(dynamics: Dynamics, dark: bool = False) -> Any:
    """
    Draws the dynamics, one panel below the other over the same steps: frozen fraction of each unit, evaluation,
    training loss, gradient norm, learning rate. What was not logged has no panel.

    Returns a `matplotlib.figure.Figure`. Raises an ImportError without matplotlib, a ValueError where nothing that was
    logged is a finite number.
    """
    from matplotlib import rc_context

    # Names of units and measures may hold a `$`, which is no formula.
    with rc_context({"text.parse_math": False}):
        return _figure(dynamics, DARK if dark else LIGHT)


def _figure(dynamics: Dynamics, theme: _Theme) -> Any:
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    units = [unit for unit in dynamics.units if unit.frozen]
    panels: list[tuple[float, Any]] = []
    if units:
        panels.append((_units_height(len(units)), _draw_units))
    if dynamics.fully_binary or dynamics.mixed:
        panels.append((1.9, _draw_evaluation))
    if dynamics.loss:
        panels.append((1.2, _draw_loss))
    if any(value > 0 for value in dynamics.grad_norm.values):
        panels.append((1.2, _draw_grad_norm))
    if dynamics.learning_rate:
        panels.append((0.9, _draw_learning_rate))

    if not panels:
        raise ValueError(f"{dynamics.source} holds no finite number to draw: the run may have diverged from its start")
    heights = [height for height, _ in panels]
    layout = ConstrainedLayoutEngine(h_pad=0.06, hspace=0.03)
    # Beside the panels themselves: a title above each, and the steps below.
    figure = Figure(figsize=(8.6, sum(heights) + 0.52 * len(panels) + 0.95), layout=layout, dpi=120)
    figure.set_facecolor(theme.background)
    axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
    for axis, (_, panel) in zip(axes, panels, strict=True):
        axis.set_facecolor(theme.background)
        axis.tick_params(colors=theme.muted, labelcolor=theme.ink, labelsize=8.5)
        axis.spines[["top", "right"]].set_visible(False)
        axis.spines[["bottom", "left"]].set_color(theme.muted)
        if panel is not _draw_units:
            axis.grid(axis="y", color=theme.grid, linewidth=0.6)
            axis.set_axisbelow(True)
            _mark_commits(axis, dynamics, theme)
        panel(axis, dynamics, theme)
    axes[-1].set_xlim(0, max(dynamics.steps, 1))
    axes[-1].set_xlabel("optimizer steps done", color=theme.ink, fontsize=9.5)
    figure.suptitle(
        f"Training dynamics of {dynamics.name}", x=0.012, ha="left", color=theme.ink, fontsize=13, weight="bold"
    )
    if units and len(panels) > 1:
        notes = ["dotted: a unit is committed, frozen for good"] if len(units) <= MOST_LINES else []
        if dynamics.committed_step is not None:
            notes.append("shaded: every unit is, the model is fully binary" if notes else "shaded: fully binary")
        figure.supxlabel(";  ".join(notes), color=theme.muted, fontsize=8.5, x=0.012, ha="left")
    return figure


def _units_height(count: int) -> float:
    """Inches of a panel with a row for each unit."""
    return min(max(0.8, 0.21 * count), 4.0)


def _title(axis: Any, text: str, theme: _Theme) -> None:
    # y is given, or it would make way for whatever else is above the panel.
    axis.set_title(text, loc="left", y=1.0, pad=6, fontsize=10.5, color=theme.ink)


def _mark_commits(axis: Any, dynamics: Dynamics, theme: _Theme) -> None:
    steps = {unit.committed_step for unit in dynamics.units if unit.committed_step is not None}
    if len(steps) <= MOST_LINES:
        for step in steps:
            axis.axvline(step, color=theme.muted, linewidth=0.7, linestyle=":", alpha=0.8, zorder=0.5)
    if dynamics.committed_step is not None:
        axis.axvspan(dynamics.committed_step, dynamics.steps, color=theme.binary, alpha=0.10, linewidth=0, zorder=0.4)


def _draw_units(axis: Any, dynamics: Dynamics, theme: _Theme) -> None:
    from matplotlib.colors import LinearSegmentedColormap

    units = [unit for unit in dynamics.units if unit.frozen]
    colors = LinearSegmentedColormap.from_list("frozen_fraction", theme.fractions)
    edges, rows = _mesh(units, dynamics.steps)
    mesh = axis.pcolormesh(
        edges, [row - 0.5 for row in range(len(units) + 1)], rows, cmap=colors, vmin=0, vmax=1, rasterized=True
    )
    every = math.ceil(len(units) / 24)
    names = short_names([unit.name for unit in units])
    ticks = range(0, len(units), every)
    axis.set_yticks(list(ticks), [names[row] for row in ticks], fontsize=8)
    axis.tick_params(axis="y", length=0)
    for row in range(1, len(units) if every == 1 else 0):
        axis.axhline(row - 0.5, color=theme.background, linewidth=0.8)
    axis.spines[["left", "bottom"]].set_visible(False)
    _title(axis, "Frozen fraction of each unit, input at the bottom", theme)
    # Above the panel: beside it, its steps would no longer be in line with those below.
    inches = _units_height(len(units))
    bar = axis.inset_axes((0.72, 1 + 0.09 / inches, 0.18, 0.10 / inches))
    scale = axis.figure.colorbar(mesh, cax=bar, orientation="horizontal", ticks=[])
    scale.outline.set_visible(False)
    middle = 1 + 0.14 / inches
    style = {"transform": axis.transAxes, "va": "center", "fontsize": 8.5, "color": theme.muted}
    axis.text(0.71, middle, "0, float", ha="right", **style)
    axis.text(0.91, middle, "1, binary", ha="left", **style)


def _draw_evaluation(axis: Any, dynamics: Dynamics, theme: _Theme) -> None:
    binary, mixed = dynamics.fully_binary, dynamics.mixed
    marker = {"marker": "o", "markersize": 3.5 if len(binary.steps) <= 40 else 0, "linewidth": 1.6, "clip_on": False}
    if dynamics.float_value is not None:
        label = f"float ({_number(dynamics.float_value)})"
        axis.axhline(dynamics.float_value, color=theme.ink, linewidth=1.2, linestyle="--", label=label)
    if mixed:
        # From then on it is the same network, and is evaluated once.
        joined = next(
            (pair for pair in zip(binary.steps, binary.values, strict=True) if pair[0] > mixed.steps[-1]), None
        )
        steps, values = [*mixed.steps], [*mixed.values]
        if joined is not None:
            steps, values = [*steps, joined[0]], [*values, joined[1]]
        axis.plot(
            steps,
            values,
            color=theme.mixed,
            label=f"mixed, as in training (last {_number(mixed.values[-1])})",
            **marker,
        )
    if binary:
        label = "fully binary" if dynamics.units else "model"
        label += f" (last {_number(binary.values[-1])})"
        axis.plot(binary.steps, binary.values, color=theme.binary, label=label, **marker)
    _title(axis, f"Evaluation: {str(dynamics.metric).replace('_', ' ')}", theme)
    axis.margins(y=0.12)
    axis.legend(
        loc="lower right",
        bbox_to_anchor=(1.0, 1.0),
        ncols=3,
        frameon=False,
        fontsize=8.5,
        labelcolor=theme.ink,
        borderaxespad=0.1,
        columnspacing=1.4,
        handlelength=1.6,
    )


def _line(axis: Any, series: Series, color: str) -> None:
    # A single value has no line to be seen.
    axis.plot(series.steps, series.values, color=color, linewidth=1.4, marker="o" if len(series.steps) == 1 else None)


def _draw_loss(axis: Any, dynamics: Dynamics, theme: _Theme) -> None:
    _line(axis, dynamics.loss, theme.mixed)
    _title(axis, "Training loss", theme)
    axis.margins(y=0.12)


def _draw_grad_norm(axis: Any, dynamics: Dynamics, theme: _Theme) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    pairs = zip(dynamics.grad_norm.steps, dynamics.grad_norm.values, strict=True)
    positive = Series.of((step, value) for step, value in pairs if value > 0)
    _line(axis, positive, theme.mixed)
    axis.set_yscale("log")
    lowest, highest = min(positive.values), max(positive.values)
    axis.yaxis.set_major_locator(LogLocator(subs=(1.0,) if highest / lowest > 100 else (1.0, 2.0, 5.0)))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())
    axis.tick_params(axis="y", which="minor", color=theme.muted)
    _title(axis, "Gradient norm (log axis)", theme)
    axis.margins(y=0.12)


def _draw_learning_rate(axis: Any, dynamics: Dynamics, theme: _Theme) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    _line(axis, dynamics.learning_rate, theme.muted)
    axis.yaxis.set_major_locator(MaxNLocator(3))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_ylim(bottom=0)
    _title(axis, "Learning rate", theme)


def png(dynamics: Dynamics, dark: bool = False) -> bytes:
    """The picture that [`draw`] gives, as a PNG file. Arguments and errors are those of [`draw`]."""
    buffer = io.BytesIO()
    draw(dynamics, dark).savefig(buffer, format="png")
    return buffer.getvalue()


# --- the report ------------------------------------------------------------------------------------------------------

STYLE = """\
:root { color-scheme: light dark; --ink: #1f2328; --muted: #656d76; --line: #d8dee4; --paper: #ffffff; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e8eb; --muted: #9aa4af; --line: #39414a; --paper: #15181d; }
}
body { margin: 2rem auto; max-width: 66rem; padding: 0 1rem; background: var(--paper); color: var(--ink);
       font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin-bottom: 0; } h2 { font-size: 1.1rem; margin: 2rem 0 .4rem; }
p { margin: .3rem 0 1rem; } .note { color: var(--muted); }
img { width: 100%; height: auto; }
.tables { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(24rem, 100%), 1fr)); gap: 0 3rem; }
.table { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem 1.2rem .25rem 0; text-align: left; white-space: nowrap;
         border-bottom: 1px solid var(--line); }
td.number, th.number { text-align: right; }
code { font-family: ui-monospace, monospace; }
"""


def _number(value: float) -> str:
    return f"{value:.3f}" if 1e-3 <= abs(value) < 1e4 or value == 0 else f"{value:.3g}"


def _table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    def cell(tag: str, value: Any, is_number: bool) -> str:
        return f"<{tag}{' class=number' if is_number else ''}>{html.escape(str(value))}</{tag}>"

    lines = ["".join(cell("th", name, position > 0) for position, name in enumerate(header))]
    lines += ["".join(cell("td", value, position > 0) for position, value in enumerate(row)) for row in rows]
    return "<div class=table><table>" + "\n".join(f"<tr>{line}</tr>" for line in lines) + "</table></div>"


def report(dynamics: Dynamics) -> str:
    """The dynamics as one HTML page that needs no other file: the picture, for light and dark screens, and tables."""
    light, dark = (base64.b64encode(png(dynamics, dark)).decode() for dark in (False, True))
    parts = [
        f"<h1>Training dynamics of {html.escape(dynamics.name)}</h1>",
        f"<p class=note>{html.escape(_sentence(dynamics))}</p>",
        '<picture><source media="(prefers-color-scheme: dark)" srcset="data:image/png;base64,'
        f'{dark}"><img alt="{html.escape(_sentence(dynamics))}" src="data:image/png;base64,{light}"></picture>',
        "<div class=tables>",
    ]
    for title, note, table in _tables(dynamics):
        parts.append(f"<section><h2>{title}</h2><p class=note>{note}</p>{table}</section>")
    body = "\n".join([*parts, "</div>"])
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>Training dynamics of {html.escape(dynamics.name)}</title>\n<style>\n{STYLE}</style>\n</head>\n"
        f"<body>\n{body}\n</body>\n</html>\n"
    )


def _sentence(dynamics: Dynamics) -> str:
    """The run in one sentence."""
    text = f"{dynamics.steps} optimizer steps"
    if dynamics.units:
        done = dynamics.committed_step
        state = f"fully binary after {done} of them" if done is not None else "not fully binary at the end of the log"
        text += f", {len(dynamics.units)} units, {state}"
    if dynamics.fully_binary:
        text += f"; {dynamics.metric} {_number(dynamics.fully_binary.values[-1])} at the last evaluation"
    return text + "."


def _tables(dynamics: Dynamics) -> list[tuple[str, str, str]]:
    """Title, note and table of each part of the report that the run has something for."""
    tables = []
    rows: list[list[Any]]
    if dynamics.results:
        names = list(dict.fromkeys(name for measures in dynamics.results.values() for name in measures))
        calls = MODELS if dynamics.units else MODELS | {"binary": "model"}
        rows = [
            [calls[model], *(_number(measures[name]) if name in measures else "" for name in names)]
            for model, measures in dynamics.results.items()
        ]
        tables.append(("Results", "On the evaluation set.", _table(["model", *names], rows)))
    if dynamics.units:
        late = "" if dynamics.is_exact else " From the log: up to a logging interval late."
        rows = [
            [unit.name, "never" if unit.committed_step is None else unit.committed_step] for unit in dynamics.units
        ]
        note = f"From input to output. Committed: frozen for good, after so many optimizer steps.{late}"
        tables.append(("Units", note, _table(["unit", "committed after step"], rows)))
    if dynamics.progression:
        rows = [[name, value] for name, value in dynamics.progression.items()]
        note = "Named as in <code>StoMPPTrainingArguments</code>, where they are settings."
        tables.append(("Progression", note, _table(["setting", "value"], rows)))
    if dynamics.fully_binary:
        mixed = dict(zip(dynamics.mixed.steps, dynamics.mixed.values, strict=True))
        rows = [
            [step, _number(value), _number(mixed[step]) if step in mixed else ""]
            for step, value in zip(dynamics.fully_binary.steps, dynamics.fully_binary.values, strict=True)
        ]
        columns = 3 if mixed else 2
        header = ["step", "fully binary" if dynamics.units else "model", "mixed"][:columns]
        note = f"{html.escape(str(dynamics.metric))} at each evaluation. Mixed: the model as it was in training."
        table = _table(header, [row[:columns] for row in rows])
        tables.append(("Evaluations", note if mixed else note.partition(".")[0] + ".", table))
    return tables


def add_dynamics(card: Path, state: TrainerState) -> None:
    """
    Draws the training dynamics beside a model card, and shows them in it. Without matplotlib, or for a trainer that
    logged nothing, the card stays as it is.
    """
    if not can_draw() or not any("loss" in entry for entry in state.log_history):
        return
    dynamics = dynamics_of(
        {"log_history": state.log_history, "stateful_callbacks": state.stateful_callbacks}, "the run"
    )
    (card.parent / "dynamics.png").write_bytes(png(dynamics))
    text, heading, after = card.read_text(encoding="utf-8").partition("\n### Framework versions")
    section = "\n### Training dynamics\n\n![Frozen fraction of each unit, evaluation and loss by step](dynamics.png)\n"
    card.write_text(f"{text}{section}{heading}{after}", encoding="utf-8")
