"""`hf-stompp bench`, and the tables of what it measures."""

from __future__ import annotations

import argparse
import json
import os
from contextlib import nullcontext
from typing import Any

import torch

from ..benchmark import (
    BATCHES,
    LOADING_TIMES,
    ROUNDS,
    ROWS,
    SHAPES,
    bench_linear,
    bench_loading,
    bench_model,
    bert_base,
    instruction_limits,
    minilm,
    speedups,
    torch_threads,
)
from ..machine import command_line, surroundings
from ..ops import cpu
from ..output import text_columns
from .conversion import output_file


def _load_average() -> list[float]:
    return [round(load, 2) for load in os.getloadavg()] if hasattr(os, "getloadavg") else []


def measure(
    levels: list[str], threads: list[int], kernels: list[str], command: str, quick: bool = False
) -> dict[str, Any]:
    """
    Runs the benchmark, `levels` of `"op"`, `"model"` and `"loading"`, and returns what `--output` writes.

    Whole models run on each number of `threads`, single layers on the first of them, with `kernels` beside the default
    one. `quick` takes a few small cases, to see that it works.
    """
    torch.manual_seed(0)
    native = cpu.native_kernels()
    result: dict[str, Any] = {
        "method": "cpu_benchmark",
        "command": command,
        "seed": 0,
        "kernel": "reference" if native is None else native.kernel or "automatic",
        "kernels": {k: native.unavailable(k) or "runs" for k in cpu.KERNELS} if native is not None else {},
        "threads": threads,
        "rounds": ROUNDS,
        "load_average_before": _load_average(),
    }
    with torch_threads(threads[0]):
        if "op" in levels:
            result["limit_operations_per_second"] = instruction_limits()
            shapes, rows = (SHAPES[:1], [1, 32]) if quick else (SHAPES, ROWS)
            result["linear"] = bench_linear(shapes, rows, kernels)
            result["linear_speedups"] = speedups(result["linear"])
    batches = BATCHES[:1] if quick else BATCHES
    if "model" in levels:
        result["models"] = bench_model("MiniLM shape", minilm(), batches, threads)
        if not quick:
            result["models"] += bench_model("BERT-base shape", bert_base(), batches, threads)
    if "loading" in levels:
        result["loading"] = bench_loading(bert_base())
    result["load_average_after"] = _load_average()
    return result | surroundings()


Rows = list[list[str]]
"""A table of text: its header, then its rows."""


def linear_rows(result: dict[str, Any]) -> Rows:
    """Single layers: median microseconds, and the share of what the instructions of the kernel that ran could do."""
    names = list(result["linear"][0]["seconds"])
    rows = [["rows", "in", "out", *names, "Tops/s", "of limit"]]
    for case in result["linear"]:
        operations = case["packed_operations_per_second"]
        limit = result["limit_operations_per_second"].get(case["kernel"])
        rows.append(
            [
                *(str(case[key]) for key in ("rows", "in_features", "out_features")),
                *(f"{case['seconds'][name]['median'] * 1e6:.1f}" for name in names),
                f"{operations / 1e12:.2f}",
                "" if limit is None else f"{operations / limit:.0%}",
            ]
        )
    return rows


def speedup_rows(result: dict[str, Any]) -> Rows:
    """Single layers: times faster, geometric mean over the shapes, by number of rows."""
    means = result["linear_speedups"]
    keys = [key for key in means[0] if key != "rows"]
    return [["rows", *keys], *([str(row["rows"]), *(f"{row[key]:.1f}x" for key in keys)] for row in means)]


def model_rows(result: dict[str, Any]) -> Rows:
    """Whole encoders: median milliseconds a batch, and times faster."""
    names = list(result["models"][0]["seconds"])
    ratios = [("packed_fp32", "fp32"), ("packed_bf16", "bf16"), ("packed_fp32", "int8")]
    ratios += [("packed_bwn", "fp32"), ("packed_bwn", "int8"), ("packed_mixed", "fp32"), ("packed_mixed", "int8")]
    # Older results have fewer variants.
    ratios = [(packed, baseline) for packed, baseline in ratios if packed in names]
    rows = [["model", "batch", "threads", *names, *(f"{packed}/{baseline}" for packed, baseline in ratios)]]
    for case in result["models"]:
        seconds = {name: case["seconds"][name]["median"] for name in names}
        rows.append(
            [
                *(case["model"], f"{case['batch']} x {case['length']}", str(case["threads"])),
                *(f"{seconds[name] * 1e3:.1f}" for name in names),
                *(f"{seconds[baseline] / seconds[packed]:.1f}x" for packed, baseline in ratios),
            ]
        )
    return rows


def loading_rows(result: dict[str, Any]) -> Rows:
    """BERT-base in a fresh process, its file in the system's cache (warm) or not (cold)."""
    header = ["model", "file, MB", "resident, MB"]
    rows = [[*header, *(f"{what}, s, {cache}" for cache in ("warm", "cold") for what in ("load", "to first answer"))]]
    for name, values in result["loading"].items():
        sizes = values["file_bytes"], values["warm"]["resident_bytes"]
        seconds = [values[cache][key] for cache in ("warm", "cold") for key in LOADING_TIMES]
        rows.append([name, *(f"{size / 1e6:.0f}" for size in sizes), *(f"{time:.2f}" for time in seconds)])
    return rows


def table(result: dict[str, Any]) -> str:
    """The result as text."""
    processor = result["machine"]["processor"]
    lines = [
        f"{processor['name']}, threads {result['threads']}, kernel {result['kernel']}, load "
        f"{result['load_average_before']} to {result['load_average_after']}",
        f"flags: {' '.join(processor['flags'])}",
        "",
    ]
    if "linear" in result:
        limits = {kernel: f"{limit / 1e12:.2f}" for kernel, limit in result["limit_operations_per_second"].items()}
        lines += ["Linear layers, median microseconds", *text_columns(linear_rows(result))]
        lines += ["", f"Limit of the inner instructions, Tops/s: {limits}", ""]
        lines += ["Geometric mean over the shapes, times faster", *text_columns(speedup_rows(result)), ""]
    if result.get("models"):
        lines += ["Whole encoders, median milliseconds", *text_columns(model_rows(result)), ""]
    if result.get("loading"):
        lines += ["BERT-base in a fresh process", *text_columns(loading_rows(result)), ""]
    return "\n".join(lines)


def run(arguments: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Runs `hf-stompp bench`."""
    all_levels = ["op", "model"] if arguments.quick else ["op", "model", "loading"]
    levels = all_levels if arguments.level == "all" else [arguments.level]
    command = command_line(["hf-stompp", *arguments.words])
    with nullcontext() if arguments.output is None else output_file(arguments.output, force=True) as file:
        result = measure(levels, arguments.threads, arguments.kernels, command, arguments.quick)
        if file is not None:
            file.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return result, table(result)
