"""
What a training step costs, over a whole run: float fine-tuning, vanilla STE, StoMPP STE-free and StoMPP+STE, and the
last with a teacher beside it.

    python benchmarks/training.py --model minilm --output benchmarks/results/training_minilm_fp32.json
    python benchmarks/training.py --plot benchmarks/results/training_*.json

All methods train in one process, a step of each in turn, on the same random batches. A step is what the Trainer does:
masks, forward, backward, clipping of the gradient norm, AdamW. Windows are a share of the run, so that a short run
goes through the same phases as a long one.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import itertools
import json
import os
import statistics
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import BertConfig, BertForSequenceClassification

from hf_stompp import binarize
from hf_stompp.benchmark import MINILM, torch_threads
from hf_stompp.machine import command_line, surroundings
from hf_stompp.ops import cpu
from hf_stompp.training.arguments import DEFAULT_LOSSES
from hf_stompp.training.distillation import Comparison, distillation_loss
from hf_stompp.training.freezing import Freezing, initialize_activations
from hf_stompp.training.methods import METHODS, RecipeArguments
from hf_stompp.training.progression import Progression, plan_progression


TEACHER = "_teacher"
"""Ends the name of a method that is measured with a teacher."""

LABELS = {
    "float": "float",
    "ste": "vanilla STE",
    "stompp": "StoMPP, STE-free",
    "stompp_ste": "StoMPP+STE",
    "stompp_ste_teacher": "StoMPP+STE, teacher",
}

SIZES = {
    "minilm": BertConfig(**MINILM),
    "bert-base": BertConfig(),
    "bert-large": BertConfig(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096),
}

CATEGORIES = {
    # Vector norms are row scales, and in all methods the clipping of the gradient norm.
    "masks": ("hf_stompp::masked", "hf_stompp::sign_product", "aten::linalg_vector_norm"),
    "products": ("hf_stompp::", "aten::mm", "aten::addmm", "aten::mkldnn", "aten::linear", "mkldnn"),
    "attention": ("aten::scaled_dot", "aten::_scaled_dot", "aten::bmm", "aten::baddbmm", "aten::_softmax"),
    "optimizer": ("aten::_fused_adamw", "aten::_foreach", "Optimizer."),
}
"""Which part of a step an operator belongs to, by the beginning of its name; the first that fits."""


def load_model(name: str) -> nn.Module:
    """A float classifier with random weights."""
    return BertForSequenceClassification(copy.deepcopy(SIZES[name]))


class LiveBytes:
    """Samples how much memory is allocated, in a thread; `with` it, then read `peak`."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.peak = 0
        if device.type == "cpu":

            class MallInfo(ctypes.Structure):
                _fields_ = [
                    (name, ctypes.c_size_t)
                    for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
                ]

            self.mallinfo = ctypes.CDLL(None).mallinfo2
            self.mallinfo.restype = MallInfo

    def now(self) -> int:
        """Bytes that are allocated at the moment, by the whole process."""
        if self.device.type == "cuda":
            return torch.cuda.memory_allocated(self.device)
        information = self.mallinfo()
        return information.uordblks + information.hblkhd

    def __enter__(self) -> LiveBytes:
        self.start = self.peak = self.now()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            return self
        self.running = True
        self.thread = threading.Thread(target=self._sample, daemon=True)
        self.thread.start()
        return self

    def _sample(self) -> None:
        while self.running:
            self.peak = max(self.peak, self.now())
            time.sleep(0.004)

    def __exit__(self, *exception: Any) -> None:
        if self.device.type == "cuda":
            self.peak = torch.cuda.max_memory_allocated(self.device)
            return
        self.running = False
        self.thread.join()


class Run:
    """One method: a model, its optimizer, and how far its masks are."""

    def __init__(self, method: str, model: nn.Module, steps: int, device: torch.device, dtype: torch.dtype) -> None:
        self.method, self.device, self.dtype = method, device, dtype
        self.model = copy.deepcopy(model)
        self.progression: Progression | None = None
        if method != "float":
            known = method.removesuffix(TEACHER)
            binarize(self.model, RecipeArguments(known).config())
            units = self.model.config.quantization_config.units
            schedule = METHODS[known].training["progression_schedule"][0]
            self.progression = plan_progression(units, steps, schedule=schedule)
            self.freezing = Freezing(self.model, self.progression)
        self.model.to(device).train()
        self.teacher = model.to(device).eval() if method.endswith(TEACHER) else None
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, fused=True)

    def persistent_bytes(self) -> int:
        """What outlives a step: weights, masks and the optimizer's state."""
        tensors = [*self.model.parameters(), *self.model.buffers()]
        tensors += [t for state in self.optimizer.state.values() for t in state.values() if torch.is_tensor(t)]
        return sum(t.numel() * t.element_size() for t in tensors)

    def step(self, step: int, batch: dict[str, torch.Tensor]) -> dict[str, float]:
        """Takes a step; seconds of its parts."""
        marks = [self._now()]
        if self.progression is not None:
            self.freezing.begin_step(step, self.optimizer)
        marks.append(self._now())
        if self.progression is not None and step == 0:
            initialize_activations(self.model, batch)
            marks[0] += self._now() - marks[-1]
            marks[-1] = self._now()
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            loss = self._loss(batch)
        marks.append(self._now())
        loss.backward()
        marks.append(self._now())
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        if self.progression is not None:
            self.freezing.before_update(step)
        self.optimizer.step()
        if self.progression is not None:
            self.freezing.after_update()
        self.optimizer.zero_grad()
        marks.append(self._now())
        parts = ["masks_advance", "forward", "backward", "update"]
        return dict(zip(parts, (b - a for a, b in itertools.pairwise(marks)), strict=True))

    def _loss(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        if self.teacher is None:
            return self.model(**batch).loss
        texts = {name: tensor for name, tensor in batch.items() if name != "labels"}
        with torch.no_grad():
            target = self.teacher(**texts, output_hidden_states=True)
        return distillation_loss(self.model(**texts, output_hidden_states=True), target, DEFAULT_LOSSES, Comparison())

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def shares(run: Run, step: int, batch: dict[str, torch.Tensor]) -> dict[str, float]:
    """Takes a step under the profiler; the share of each of `CATEGORIES` in the time of all operators."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    is_cuda = run.device.type == "cuda"
    if is_cuda:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        run.step(step, batch)
    seconds = dict.fromkeys([*CATEGORIES, "other"], 0.0)
    for event in profile.key_averages():
        own = event.self_device_time_total if is_cuda else event.self_cpu_time_total
        category = next((name for name, starts in CATEGORIES.items() if event.key.startswith(starts)), "other")
        seconds[category] += own
    whole = sum(seconds.values())
    return {name: value / whole for name, value in seconds.items()}


def profiled_steps(progression: Progression) -> dict[int, str]:
    """Steps that are profiled and left out of the times: one in the first window, one in the last, one after it."""
    (first, _), (last, end) = progression.windows[0], progression.windows[-1]
    return {
        first + 1: "first window",
        last: "last window",
        min(end + 1, progression.total_steps - 1): "after the last",
    }


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Runs all methods in turn."""
    torch.manual_seed(0)
    device = torch.device(arguments.device)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[arguments.dtype]
    model = load_model(arguments.model)
    steps = arguments.steps
    runs = {method: Run(method, model, steps, device, dtype) for method in arguments.methods}
    plan = plan_progression([f"layer {i}" for i in range(model.config.num_hidden_layers)], steps, schedule="cubic")
    profiled = profiled_steps(plan)
    records: dict[str, list[dict[str, Any]]] = {method: [] for method in runs}
    parts: dict[str, dict[str, Any]] = {method: {} for method in runs}
    live = LiveBytes(device)
    load_before = os.getloadavg()
    vocabulary = model.config.vocab_size
    for step in tqdm(range(steps), desc=f"{arguments.model} {arguments.dtype}", unit="step"):
        ids = torch.randint(vocabulary, (arguments.batch, arguments.length), device=device)
        batch = {"input_ids": ids, "labels": torch.randint(2, (arguments.batch,), device=device)}
        for method, run in runs.items():
            if step in profiled:
                parts[method][profiled[step]] = shares(run, step, batch)
                continue
            held = run.persistent_bytes()
            with live:
                seconds = run.step(step, batch)
            peak = held + live.peak - live.start
            records[method].append({"step": step, **seconds, "seconds": sum(seconds.values()), "peak_bytes": peak})
    return {
        "method": "training_benchmark",
        "command": command_line(["python", "benchmarks/training.py", *sys.argv[1:]]),
        "model": arguments.model,
        "dtype": arguments.dtype,
        "device": device.type,
        **surroundings(),
        "threads": torch.get_num_threads(),
        "kernel": "reference" if cpu.native_kernels() is None else cpu.native_kernels().chosen(1 << 20),
        "seed": 0,
        "batch": arguments.batch,
        "length": arguments.length,
        "steps": steps,
        "windows": plan.windows,
        "load_average": {"before": load_before, "after": os.getloadavg()},
        "profiled_steps": profiled,
        "shares": parts,
        "summary": summarize(records, plan, arguments.batch * arguments.length),
        "records": records,
    }


def summarize(records: dict[str, list[dict[str, Any]]], plan: Progression, tokens: int) -> dict[str, Any]:
    """Whole-run cost and cost by phase of each method, and its ratio to float's over the same steps."""
    seconds = {method: {r["step"]: r["seconds"] for r in rows} for method, rows in records.items()}
    last_start, last_end = plan.windows[-1]
    summary: dict[str, Any] = {}
    for method, rows in records.items():
        mine = seconds[method]

        def ratio(steps: list[int], mine: dict[int, float] = mine) -> float | None:
            known = [step for step in steps if step in mine]
            if not known or "float" not in seconds:
                return None
            # Step by step, since both ran one after the other.
            return statistics.median(mine[step] / seconds["float"][step] for step in known)

        phases = []
        for unit, (start, end) in enumerate(plan.windows):
            spans = {"before": range(start), "during": range(start, end), "after": range(end, plan.total_steps)}
            milliseconds = {
                name: 1e3 * statistics.mean(found) if (found := [mine[s] for s in span if s in mine]) else None
                for name, span in spans.items()
            }
            phases.append({"unit": unit, **{f"{name}_ms": value for name, value in milliseconds.items()}})
        whole = sum(mine.values())
        summary[method] = {
            "milliseconds_a_step": {"mean": 1e3 * whole / len(mine), "median": 1e3 * statistics.median(mine.values())},
            "tokens_a_second": tokens * len(mine) / whole,
            "whole_run_over_float": whole / sum(seconds["float"].values()) if "float" in seconds else None,
            "median_step_over_float": ratio(list(mine)),
            "last_window_over_float": ratio(list(range(last_start, last_end))),
            "after_last_window_over_float": ratio(list(range(last_end, plan.total_steps))),
            "advance_share": statistics.mean(r["masks_advance"] / r["seconds"] for r in rows),
            "peak_bytes": max(r["peak_bytes"] for r in rows),
            "peak_over_float": max(r["peak_bytes"] for r in rows) / max(r["peak_bytes"] for r in records["float"])
            if "float" in records
            else None,
            "peak_bytes_of_last_step": rows[-1]["peak_bytes"],
            "phases": phases,
        }
    return summary


def table(result: dict[str, Any]) -> str:
    """Markdown: one row a method."""
    lines = [
        "{model}, {dtype}, {batch} x {length} tokens, {steps} steps:".format(**result),
        "",
        "| method | ms a step | whole run / float | step / float | last window / float | after it / float | "
        "masks advance | peak GB | peak / float |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for method, row in result["summary"].items():
        ratios = ["whole_run", "median_step", "last_window", "after_last_window"]
        cells = [
            f"{row[f'{name}_over_float']:.2f}" if row[f"{name}_over_float"] is not None else "-" for name in ratios
        ]
        lines.append(
            f"| {LABELS[method]} | {row['milliseconds_a_step']['mean']:.0f} | "
            + " | ".join(cells)
            + f" | {100 * row['advance_share']:.2f} % | {row['peak_bytes'] / 1e9:.2f} | "
            + (f"{row['peak_over_float']:.2f} |" if row["peak_over_float"] is not None else "- |")
        )
    return "\n".join(lines)


def plot(path: Path) -> Path:
    """Step time and peak memory over the run, as a PNG beside `docs/figures`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    result = json.loads(path.read_text(encoding="utf-8"))
    figure, (times, memory) = pyplot.subplots(2, 1, figsize=(8, 6), sharex=True, layout="constrained")
    colors = dict(zip(LABELS, ("#444444", "#d08a28", "#2a78b5", "#3f9c5a", "#8a5a9c"), strict=True))
    for method, rows in result["records"].items():
        steps = [row["step"] for row in rows]
        style: dict[str, Any] = {"color": colors[method], "label": LABELS[method], "linewidth": 1.6}
        times.plot(steps, [1e3 * row["seconds"] for row in rows], **style)
        memory.plot(steps, [row["peak_bytes"] / 1e9 for row in rows], **style)
    for axis in (times, memory):
        for unit, (start, end) in enumerate(result["windows"]):
            axis.axvspan(start - 0.5, end - 0.5, color="#000000", alpha=0.03 if unit % 2 else 0.08, linewidth=0)
        axis.set_ylim(bottom=0)
        axis.spines[["top", "right"]].set_visible(False)
    times.set_ylabel("milliseconds a step")
    memory.set_ylabel("peak memory of a step, GB")
    memory.set_xlabel("optimizer step (shaded: the windows of the encoder layers, in turn)")
    times.set_title(f"{result['model']}, {result['dtype']}, {result['batch']} x {result['length']} tokens", loc="left")
    handles, names = times.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=5, frameon=False)
    target = Path(__file__).parent.parent / "docs" / "figures" / f"{path.stem}.png"
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=110)
    return target


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--model", choices=list(SIZES), default="minilm")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32", help="bf16: autocast")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--methods", nargs="+", choices=list(LABELS), default=list(LABELS))
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--output", type=Path, help="write the result to this JSON file")
    parser.add_argument("--plot", type=Path, nargs="+", help="only print and draw these results, into docs/figures")
    arguments = parser.parse_args()
    if arguments.plot:
        for path in arguments.plot:
            print(f"{table(json.loads(path.read_text(encoding='utf-8')))}\n\n{plot(path)}\n")
        return
    if arguments.output is not None:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
    with torch_threads(arguments.threads or torch.get_num_threads()):
        result = measure(arguments)
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(result) + "\n", encoding="utf-8")
    print(table(result))


if __name__ == "__main__":
    main()
