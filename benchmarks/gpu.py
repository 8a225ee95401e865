"""
What products of bits cost on a GPU: single operators beside cuBLAS in bf16, int8 and float8, LayerNorm with signs,
whole encoders, and a frozen layer in a training step.

    python benchmarks/gpu.py --output benchmarks/results/cuda_nvidia_h200.json
    python benchmarks/gpu.py --quick --device cpu
    python benchmarks/gpu.py --show benchmarks/results/cuda_nvidia_h100_80gb_hbm3.json

All variants of a case run in one process, in turn. Operators run four ways: in a CUDA graph and call by call
(`eager`); over one set of tensors (`warm`), and over as many sets as the second-level cache cannot hold (`rotated`),
results too. Beside each time stand two floors: the bytes that must move, each input read once and each output written
once, at the rate of a copy on this device, and the operations at the rate of the unit that does them. With `--device
cpu` tiny cases show that the program works, and nothing else.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import BertConfig, BertModel

from hf_stompp import StoMPPConfig, binarize, commit
from hf_stompp.benchmark import ROUNDS, SHAPES, packed_copy
from hf_stompp.machine import command_line, surroundings
from hf_stompp.ops import (
    binary_linear,
    binary_linear_sign,
    build,
    cuda,
    layer_norm_sign,
    pack_sign,
    packed_bytes,
    plus_minus_one,
)
from hf_stompp.ops.operators import on_kernels
from hf_stompp.output import text_columns


MODES = ("graph_rotated", "graph_warm", "eager_rotated", "eager_warm")

SECONDS = 190.0
"""For all parts together."""

SHARES = {"ceilings": 0.03, "op": 0.2, "layer_norm": 0.03, "models": 0.6, "frozen_layer": 0.05, "batches": 0.09}
"""Parts, in their order, and what each may take of the time; what one leaves goes to those behind it."""

SAMPLE_SECONDS = 5e-4
"""A sample repeats its function for about this long."""

CALLS = 10
"""Calls of an operator in a CUDA graph, at least."""

MOST_COPIES = 256

ONE_BIT_PER_INT8 = 8
"""One-bit products over int8 ones a second, by NVIDIA's figures for the A100 (4,992 and 624 TOPS)."""

BASE, LARGE = "BERT-base", "BERT-large"

MAIN_BATCH = (32, 128)


@dataclass(frozen=True)
class Plan:
    """What is measured."""

    shapes: list[tuple[int, int]]
    # The last are left out where time is short.
    rows: tuple[int, ...]
    widths: tuple[int, ...]
    models: dict[str, BertConfig]
    # (batch, sequence length); those beyond the first without compiled models.
    batches: list[tuple[int, int]]
    # Why no model is compiled.
    not_compiled: str | None
    layer: BertConfig
    copied_bytes: int
    product_size: int


FULL = Plan(
    shapes=SHAPES,
    rows=(4096, 512, 32768),
    widths=(384, 768, 1024),
    models={
        BASE: BertConfig(),
        LARGE: BertConfig(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096),
    },
    batches=[MAIN_BATCH, (4, 128), (256, 128)],
    not_compiled=None,
    layer=BertConfig(num_hidden_layers=1),
    copied_bytes=2**31,
    product_size=8192,
)

QUICK = Plan(
    shapes=[(768, 3072), (3072, 768)],
    rows=(4096, 512),
    widths=(768,),
    models={BASE: BertConfig()},
    batches=[MAIN_BATCH],
    not_compiled="a quick run compiles no model",
    layer=BertConfig(num_hidden_layers=1),
    copied_bytes=2**31,
    product_size=8192,
)

_SMALL: dict[str, Any] = {"vocab_size": 64, "hidden_size": 64, "num_attention_heads": 2, "intermediate_size": 96}

TINY = Plan(
    shapes=[(64, 48), (96, 32)],
    rows=(24, 8),
    widths=(64,),
    models={"tiny": BertConfig(num_hidden_layers=2, **_SMALL)},
    batches=[(2, 16), (1, 16)],
    not_compiled="a CPU compiles no model here",
    layer=BertConfig(num_hidden_layers=1, **_SMALL),
    copied_bytes=2**16,
    product_size=64,
)


# ----- Time -----


class Clock:
    """Times functions on one device. On a GPU by its own events, which see no more than what runs there."""

    def __init__(self, device: torch.device) -> None:
        self.is_gpu = device.type == "cuda"

    def seconds(self, function: Callable[[], Any], repeats: int) -> float:
        """How long so many calls take together."""
        if not self.is_gpu:
            start = time.perf_counter()
            for _ in range(repeats):
                function()
            return time.perf_counter() - start
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(repeats):
            function()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    def interleave(self, functions: dict[str, tuple[Callable[[], Any], int]]) -> dict[str, dict[str, float]]:
        """
        Times functions in turn, after one call of each that is not counted: name -> `median` and `minimum` seconds.
        Beside each stands how many calls of what is measured it makes.
        """
        repeats = {}
        for name, (function, _) in functions.items():
            self.seconds(function, 1)
            repeats[name] = max(1, math.ceil(SAMPLE_SECONDS / max(self.seconds(function, 1), 1e-7)))
        samples: dict[str, list[float]] = {name: [] for name in functions}
        for _ in range(ROUNDS):
            for name, (function, calls) in functions.items():
                samples[name].append(self.seconds(function, repeats[name]) / (repeats[name] * calls))
        return {name: {"median": statistics.median(s), "minimum": min(s)} for name, s in samples.items()}


def capture(function: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
    """A CUDA graph of a function: what replays it, and what the function returned, which each replay writes anew."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        for _ in range(2):
            function()
        torch.cuda.synchronize()
        # torch.cuda.graph would collect garbage and give back all memory besides, several hundred times.
        graph.capture_begin()
        try:
            output = function()
        finally:
            graph.capture_end()
    torch.cuda.current_stream().wait_stream(stream)
    return graph.replay, output


def describe(error: BaseException) -> str:
    """An error in one paragraph: torch.compile's run over pages."""
    text = f"{type(error).__name__}: {error}"
    return text if len(text) <= 2000 else f"{text[:1000]} [...] {text[-900:]}"


@dataclass
class Run:
    """What every part needs: where it runs, until when, and the result that it adds to."""

    device: torch.device
    plan: Plan
    clock: Clock
    result: dict[str, Any]
    deadline: float = math.inf
    # Those that were measured on the first batch.
    encoders: list[Encoders] = field(default_factory=list)

    @property
    def is_gpu(self) -> bool:
        return self.device.type == "cuda"

    def is_late(self, part: str, what: str) -> bool:
        """Whether the time of a part is spent; `what` is then recorded as left out."""
        if time.monotonic() < self.deadline:
            return False
        self.skip(part, what, "the time of this part was spent")
        return True

    def skip(self, part: str, what: str, reason: str) -> None:
        self.result["skipped"].append({"part": part, "what": what, "reason": reason})


# ----- Ceilings -----


def measure_ceilings(run: Run) -> None:
    """Rates of a copy in memory, bytes read and written, and of matrix products on random data."""
    device, size = run.device, run.plan.product_size
    source = torch.randint(256, (run.plan.copied_bytes,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    floats = [torch.randn(size, size, device=device).bfloat16() for _ in range(2)]
    bytes_ = [torch.randint(-128, 128, (size, size), dtype=torch.int8, device=device) for _ in range(2)]
    one = torch.ones((), device=device)
    functions: dict[str, Callable[[], Any]] = {
        "copy": lambda: target.copy_(source),
        "bf16": lambda: floats[0] @ floats[1].T,
        "int8": lambda: torch._int_mm(bytes_[0], bytes_[1].T),
    }
    try:
        float8 = [t.to(torch.float8_e4m3fn) for t in floats]
        functions["float8"] = lambda: torch._scaled_mm(
            float8[0], float8[1].T, one, one, out_dtype=torch.bfloat16, use_fast_accum=True
        )
    except (RuntimeError, NotImplementedError) as error:
        run.skip("ceilings", "float8", describe(error))
    runnable: dict[str, tuple[Callable[[], Any], int]] = {}
    for name, function in functions.items():
        try:
            function()
            runnable[name] = function, 1
        # What a device lacks, PyTorch tells in errors of several kinds.
        except Exception as error:
            run.skip("ceilings", name, describe(error))
    seconds = run.clock.interleave(runnable)
    amounts = {name: 2 * source.numel() if name == "copy" else 2 * size**3 for name in seconds}
    rates: dict[str, float] = {name: amounts[name] / seconds[name]["median"] for name in seconds}
    run.result["ceilings"] = {
        "copy_bytes_per_second": rates.pop("copy"),
        "operations_per_second": rates,
        "copied_bytes": source.numel(),
        "product_size": size,
    }
    if "int8" in rates:
        rates["one_bit"] = ONE_BIT_PER_INT8 * rates["int8"]
        stated = f"one_bit is not measured: {ONE_BIT_PER_INT8} times int8, as the instructions relate on an A100"
        run.result["ceilings"]["stated"] = stated


# ----- Operators -----


@dataclass
class Variant:
    """
    One way to compute something: `call` does, from one of several sets of arguments, by number. So many `bytes` must
    move; `unit`, of the rates in `ceilings`, does the `operations` of its product.
    """

    call: Callable[[int], Any]
    bytes: int
    operations: int = 0
    unit: str | None = None


def copies_beyond_cache(moved: int, cache: int) -> int:
    """How many sets of arguments hold twice as much as a cache: nothing of a set is left when its turn comes again."""
    return min(MOST_COPIES, max(2, math.ceil(2 * cache / moved)))


def repeated(call: Callable[[int], Any], copies: int, count: int) -> Callable[[], Any]:
    """`count` calls over `copies` sets of arguments. Results of several live on: each is written to its own memory."""
    if copies == 1:

        def over_one() -> None:
            for _ in range(count):
                call(0)

        return over_one
    kept: list[Any] = [None] * copies

    def in_turn() -> list[Any]:
        for i in range(count):
            kept[i % copies] = call(i % copies)
        return kept

    return in_turn


def cache_bytes(run: Run) -> int:
    return run.result["gpu"]["l2_bytes"] if run.is_gpu else 0


def time_variants(run: Run, variants: dict[str, Variant]) -> dict[str, dict[str, Any]]:
    """
    Times variants in all modes.

    Returns:
        `dict[str, dict]`: name -> `bytes`, `operations`, the two floors in seconds, seconds by mode and the share of
            the memory floor in them; or `error`.
    """
    results: dict[str, dict[str, Any]] = {}
    for name, variant in variants.items():
        try:
            variant.call(0)
            results[name] = {"bytes": variant.bytes, "operations": variant.operations, "seconds": {}}
        # A variant that a device or a version of PyTorch lacks is no reason to measure nothing.
        except Exception as error:
            results[name] = {"error": describe(error)}
    for mode in MODES:
        is_graph = mode.startswith("graph")
        if is_graph and not run.is_gpu:
            continue
        functions: dict[str, tuple[Callable[[], Any], int]] = {}
        for name, variant in variants.items():
            if "error" in results[name]:
                continue
            copies = copies_beyond_cache(variant.bytes, cache_bytes(run)) if mode.endswith("rotated") else 1
            count = max(CALLS, copies)
            function = repeated(variant.call, copies, count)
            try:
                functions[name] = (capture(function)[0] if is_graph else function), count
            except Exception as error:
                results[name] = {"error": f"{mode}: {describe(error)}"}
        for name, seconds in run.clock.interleave(functions).items():
            results[name]["seconds"][mode] = seconds
        # The graphs hold their memory.
        functions.clear()
        if is_graph:
            torch.cuda.empty_cache()
    ceilings = run.result.get("ceilings")
    for name, found in results.items():
        if "error" not in found and ceilings is not None:
            add_floors(found, variants[name].unit, ceilings)
    return results


def add_floors(found: dict[str, Any], unit: str | None, ceilings: dict[str, Any]) -> None:
    """Adds the two floors of a variant, and the share of its memory floor that it reaches."""
    found["memory_floor"] = found["bytes"] / ceilings["copy_bytes_per_second"]
    rate = ceilings["operations_per_second"].get(unit)
    found["arithmetic_floor"] = None if rate is None else found["operations"] / rate
    found["share_of_memory_floor"] = {
        mode: found["memory_floor"] / seconds["median"] for mode, seconds in found["seconds"].items()
    }


def forced_kernels(run: Run) -> dict[str, SimpleNamespace]:
    """The operators on each kernel that runs on the device, by name."""
    if not run.is_gpu:
        return {}
    native = cuda.device(run.device).native
    if native is None:
        return {}
    kernels = (
        cuda.NativeKernels(native.native, native.index, name) for name in cuda.KERNELS if native.has_kernel(name)
    )
    return {str(one.kernel): on_kernels("cuda", cuda.Device(one, "bits", forced=True)) for one in kernels}


def chosen_kernel(run: Run, rows: int, in_features: int, out_features: int) -> str:
    """What multiplies: a kernel, an 8-bit product or the reference."""
    if not run.is_gpu:
        return "cpu"
    on = cuda.device(run.device)
    if on.native is None or on.product != "bits":
        return on.product
    return on.native.chosen(rows, in_features, out_features) or on.product


class Linear:
    """The variants of one linear layer, over as many sets of its tensors as the smallest of them needs."""

    def __init__(self, run: Run, rows: int, in_features: int, out_features: int) -> None:
        self.run, self.rows, self.in_features, self.out_features = run, rows, in_features, out_features
        device = run.device
        self.x, self.weight = (
            torch.randn(count, in_features, device=device).bfloat16() for count in (rows, out_features)
        )
        self.scale, self.bias = torch.rand(out_features, device=device), torch.randn(out_features, device=device)
        self.threshold = torch.randn(out_features, device=device)
        self.signs = [plus_minus_one(t >= 0, torch.float32).to(torch.int8) for t in (self.x, self.weight)]
        smallest = min(variant.bytes for variant in self.variants().values())
        self.sets = [self._tensors()]
        for _ in range(copies_beyond_cache(smallest, cache_bytes(run)) - 1):
            self.sets.append({name: tensor.clone() for name, tensor in self.sets[0].items()})

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {
            "x": self.x,
            "weight": self.weight,
            "half_bias": self.bias.bfloat16(),
            "bits": pack_sign(self.x)[0],
            "packed_weight": pack_sign(self.weight)[0],
            "scale": self.scale,
            "bias": self.bias,
            "threshold": self.threshold,
            "int8": self.signs[0],
            "int8_weight": self.signs[1],
        }
        for name in ("int8", "int8_weight"):
            tensors[name.replace("int8", "float8")] = tensors[name].to(torch.float8_e4m3fn)
        return tensors

    def variants(self) -> dict[str, Variant]:
        """Name -> variant. The 8-bit products are bare ones of ready signs; ours scale, add the bias and round."""
        m, k, n = self.rows, self.in_features, self.out_features
        bits, weight_bits, operations = m * packed_bytes(k), n * packed_bytes(k), 2 * m * k * n
        one = torch.ones((), device=self.run.device)

        def packed(t: dict[str, Tensor]) -> tuple[Any, ...]:
            return t["packed_weight"], k, t["scale"], t["bias"], torch.bfloat16

        def bf16(i: int) -> Tensor:
            t = self.sets[i]
            return F.linear(t["x"], t["weight"], t["half_bias"])

        def int8(i: int) -> Tensor:
            t = self.sets[i]
            return torch._int_mm(t["int8"], t["int8_weight"].T)

        def float8(i: int) -> Tensor:
            t = self.sets[i]
            dtype = torch.bfloat16
            return torch._scaled_mm(t["float8"], t["float8_weight"].T, one, one, out_dtype=dtype, use_fast_accum=True)

        def pack(i: int) -> Any:
            return pack_sign(self.sets[i]["x"])

        def product(i: int) -> Tensor:
            t = self.sets[i]
            return binary_linear(t["bits"], None, *packed(t))

        def pack_product(i: int) -> Tensor:
            t = self.sets[i]
            return binary_linear(t["x"], None, *packed(t))

        def product_bits(i: int) -> Tensor:
            t = self.sets[i]
            return binary_linear_sign(t["bits"], None, *packed(t), t["threshold"])

        def forced(kernel: SimpleNamespace, i: int) -> Tensor:
            t = self.sets[i]
            return kernel.binary_linear(t["bits"], None, *packed(t))

        parameters, product_moved = 8 * n, bits + weight_bits + 8 * n + 2 * m * n
        variants = {
            "bf16": Variant(bf16, 2 * (m * k + n * k + n + m * n), operations, "bf16"),
            "int8_mm": Variant(int8, m * k + n * k + 4 * m * n, operations, "int8"),
            "float8_mm": Variant(float8, m * k + n * k + 2 * m * n, operations, "float8"),
            "pack": Variant(pack, 2 * m * k + bits + 4 * m),
            "product": Variant(product, product_moved, operations, "one_bit"),
            # The bits between the two are no input and no output: a single kernel would not move them.
            "pack_product": Variant(
                pack_product, 2 * m * k + weight_bits + parameters + 2 * m * n, operations, "one_bit"
            ),
            "product_bits": Variant(
                product_bits, bits + weight_bits + 12 * n + m * packed_bytes(n), operations, "one_bit"
            ),
        }
        for name, kernel in forced_kernels(self.run).items():
            variants[f"product_{name}"] = Variant(partial(forced, kernel), product_moved, operations, "one_bit")
        return variants

    def exact(self, variants: dict[str, Variant]) -> dict[str, bool]:
        """Whether products of bits equal those of int8, scaled and rounded in the same steps, bit for bit."""
        sums = torch._int_mm(self.signs[0], self.signs[1].T).float()
        expected = (sums * self.scale + self.bias).bfloat16()
        found = {}
        for name, variant in variants.items():
            if name.startswith(("product", "pack_product")):
                try:
                    output = variant.call(0)
                except Exception:
                    # It is among the results, with its error.
                    continue
                wanted = pack_sign(expected, self.threshold)[0] if name == "product_bits" else expected
                found[name] = torch.equal(output, wanted)
        return found


COMPARED = [
    *("pack_product/bf16", "product/bf16", "product_bits/bf16"),
    *("product/int8_mm", "product/float8_mm", "pack_product/float8_mm"),
]
"""Ours over theirs: how many times faster."""


def speedups(variants: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Mode -> pair of `COMPARED` -> how many times faster, of medians."""
    found: dict[str, dict[str, float]] = {}
    for pair in COMPARED:
        ours, theirs = (variants.get(name, {}).get("seconds", {}) for name in pair.split("/"))
        for mode in ours:
            if mode in theirs:
                found.setdefault(mode, {})[pair] = theirs[mode]["median"] / ours[mode]["median"]
    return found


@torch.inference_mode()
def measure_operators(run: Run) -> None:
    """One entry a shape and number of rows."""
    run.result["op"] = []
    cases = [(m, k, n) for m in run.plan.rows for k, n in run.plan.shapes]
    for m, k, n in tqdm(cases, desc="linear layers", unit="shape", leave=False):
        if run.is_late("op", f"{m} x {k} -> {n}"):
            continue
        linear = Linear(run, m, k, n)
        variants = linear.variants()
        case: dict[str, Any] = {"rows": m, "in_features": k, "out_features": n}
        case["kernel"] = chosen_kernel(run, m, k, n)
        case["exact"] = linear.exact(variants)
        case["variants"] = time_variants(run, variants)
        case["speedups"] = speedups(case["variants"])
        run.result["op"].append(case)


def operator_means(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Geometric means of the speed-ups over the shapes, by number of rows and mode."""
    table = []
    for rows in dict.fromkeys(case["rows"] for case in cases):
        for mode in MODES:
            ratios = [case["speedups"].get(mode, {}) for case in cases if case["rows"] == rows]
            means = {
                pair: statistics.geometric_mean(r[pair] for r in ratios)
                for pair in COMPARED
                if all(pair in r for r in ratios)
            }
            if means:
                table.append({"rows": rows, "mode": mode, "shapes": len(ratios), **means})
    return table


@torch.inference_mode()
def measure_layer_norm(run: Run) -> None:
    """Sum, LayerNorm and sign bits: in PyTorch's operations followed by `pack_sign`, and in one."""
    run.result["layer_norm"] = []
    for rows in run.plan.rows:
        for width in run.plan.widths:
            if run.is_late("layer_norm", f"{rows} x {width}"):
                continue
            case: dict[str, Any] = {"rows": rows, "features": width}
            case["variants"] = time_variants(run, layer_norms(run, rows, width))
            seconds = [case["variants"][name].get("seconds", {}) for name in ("separate", "fused")]
            case["speedups"] = {
                mode: seconds[0][mode]["median"] / seconds[1][mode]["median"]
                for mode in seconds[0]
                if mode in seconds[1]
            }
            run.result["layer_norm"].append(case)


def layer_norms(run: Run, rows: int, width: int) -> dict[str, Variant]:
    """The two variants, on bfloat16."""
    x, residual = (torch.randn(rows, width, device=run.device).bfloat16() for _ in range(2))
    weight, bias = (torch.randn(width, device=run.device).bfloat16() for _ in range(2))
    moved = 6 * rows * width + 4 * width + rows * packed_bytes(width)
    sets = [(x, residual)]
    for _ in range(copies_beyond_cache(moved, cache_bytes(run)) - 1):
        sets.append((x.clone(), residual.clone()))

    def separate(i: int) -> Any:
        output = F.layer_norm(sets[i][0] + sets[i][1], (width,), weight, bias, 1e-12)
        return output, pack_sign(output)[0]

    def fused(i: int) -> Any:
        return layer_norm_sign(*sets[i], weight, bias, 1e-12, None)

    return {"separate": Variant(separate, moved), "fused": Variant(fused, moved)}


# ----- Models -----


@dataclass
class Encoders:
    """One encoder with random weights on the device, in bfloat16: float and packed."""

    name: str
    float_model: Any
    packed: Any

    @classmethod
    def make(cls, run: Run, name: str, config: BertConfig) -> Encoders:
        try:
            # There because it takes a processor a minute to draw and pack the large one.
            with run.device:
                model = BertModel(config, add_pooling_layer=False).eval()
                packed = packed_copy(model)
        except Exception as error:
            run.skip("models", f"{name}, made on the device", describe(error))
            model = BertModel(config, add_pooling_layer=False).eval()
            packed = packed_copy(model)
        return cls(name, model.to(run.device).bfloat16(), packed.to(run.device).bfloat16())


def compiled(model: nn.Module, mode: str) -> Callable[[Tensor], Tensor]:
    """The model through torch.compile, as a function of token ids."""
    program: Any = torch.compile(model, mode=mode, dynamic=False)

    def run(ids: Tensor) -> Tensor:
        # Its outputs live until the next call.
        torch.compiler.cudagraph_mark_step_begin()
        return program(input_ids=ids).last_hidden_state

    return run


def relative_difference(output: Tensor, expected: Tensor) -> float:
    return float((output.double() - expected.double()).norm() / expected.double().norm())


@torch.inference_mode()
def measure_encoder(
    run: Run, part: str, encoders: Encoders, batch: int, length: int, compiles: bool
) -> dict[str, Any]:
    """
    Times an encoder in all its variants on one batch, without a mask.

    Returns:
        `dict[str, Any]`: `variants`: name -> seconds, how far its output is from that of the eager variant (relative,
            in norm) and how long it took to make; or `error`.
    """
    ids = torch.randint(encoders.float_model.config.vocab_size, (batch, length), device=run.device)

    def eager(model: Any) -> Callable[[], Tensor]:
        return lambda: model(input_ids=ids).last_hidden_state

    def graph(model: Any) -> Callable[[], Tensor]:
        replay, output = capture(eager(model))

        def replayed() -> Tensor:
            replay()
            return output

        return replayed

    def compile_with(model: Any, mode: str) -> Callable[[], Tensor]:
        return partial(compiled(model, mode), ids)

    float_model, packed = encoders.float_model, encoders.packed
    makers: dict[str, Callable[[], Callable[[], Tensor]]] = {
        "bf16_eager": lambda: eager(float_model),
        "packed_eager": lambda: eager(packed),
        "bf16_graph": lambda: graph(float_model),
        "packed_graph": lambda: graph(packed),
        "bf16_compiled": lambda: compile_with(float_model, "default"),
        "packed_reduce_overhead": lambda: compile_with(packed, "reduce-overhead"),
        "bf16_reduce_overhead": lambda: compile_with(float_model, "reduce-overhead"),
    }
    case: dict[str, Any] = {"model": encoders.name, "batch": batch, "length": length, "variants": {}}
    functions: dict[str, tuple[Callable[[], Any], int]] = {}
    expected: dict[str, Tensor] = {}
    for name, make in makers.items():
        what = f"{encoders.name}, {batch} x {length}, {name}"
        is_compiled = name.endswith(("compiled", "reduce_overhead"))
        if is_compiled and not compiles:
            continue
        if is_compiled and run.plan.not_compiled is not None:
            run.skip(part, what, run.plan.not_compiled)
            continue
        if name.endswith("graph") and not run.is_gpu:
            run.skip(part, what, "there are no CUDA graphs on a CPU")
            continue
        if run.is_late(part, what):
            continue
        start = time.monotonic()
        try:
            function = make()
            # A compiled model records its graph in the second call and replays it from the third on.
            for _ in range(3):
                output = function()
            kind = name.split("_")[0]
            difference = relative_difference(output, expected.setdefault(kind, output.clone()))
            case["variants"][name] = {"difference": difference, "preparation": time.monotonic() - start}
            functions[name] = function, 1
        # Not every version of PyTorch compiles everything.
        except Exception as error:
            case["variants"][name] = {"error": describe(error)}
    for name, seconds in run.clock.interleave(functions).items():
        case["variants"][name]["seconds"] = seconds
    return case


def measure_models(run: Run) -> None:
    """Encoders on the main batch; they are kept for other batches."""
    run.result["models"] = []
    for name, config in tqdm(run.plan.models.items(), desc="encoders", unit="model", leave=False):
        if run.is_late("models", name):
            continue
        encoders = Encoders.make(run, name, config)
        run.result["models"].append(measure_encoder(run, "models", encoders, *run.plan.batches[0], compiles=True))
        torch._dynamo.reset()
        run.encoders.append(encoders)


def measure_batches(run: Run) -> None:
    """The encoders on other batches, not compiled."""
    for batch, length in run.plan.batches[1:]:
        for encoders in run.encoders:
            if not run.is_late("batches", f"{encoders.name}, {batch} x {length}"):
                case = measure_encoder(run, "batches", encoders, batch, length, compiles=False)
                run.result.setdefault("models", []).append(case)


# ----- Training -----


def measure_frozen_layer(run: Run) -> None:
    """One layer in a training step under bf16 autocast: float, and committed without a straight-through estimator."""
    config = run.plan.layer
    batch, length = run.plan.batches[0]
    model: Any = BertModel(config, add_pooling_layer=False)
    frozen: Any = commit(binarize(copy.deepcopy(model), StoMPPConfig(surrogate="none")))
    ids = torch.randint(config.vocab_size, (batch, length), device=run.device)
    layers = {}
    for name, source in (("float", model), ("frozen", frozen)):
        source.to(run.device).train()
        # The first batch sets the scales of the activations.
        with torch.no_grad():
            source(input_ids=ids)
        layers[name] = source.encoder.layer[0]
    x = torch.randn(batch, length, config.hidden_size, device=run.device, requires_grad=True)
    grad = torch.randn(batch, length, config.hidden_size, device=run.device)

    def forward(layer: nn.Module) -> Tensor:
        # Its cache of cast weights must not outlive the graph that it was captured in.
        with torch.autocast(run.device.type, torch.bfloat16, cache_enabled=False):
            output = layer(x)
        return output if isinstance(output, Tensor) else output[0]

    def step(layer: nn.Module) -> Any:
        output = forward(layer)
        sources = [x, *(p for p in layer.parameters() if p.requires_grad)]
        return torch.autograd.grad(output, sources, grad.to(output.dtype), allow_unused=True)

    case: dict[str, Any] = {"batch": batch, "length": length, "seconds": {}, "errors": {}}
    run.result["frozen_layer"] = case
    functions: dict[str, tuple[Callable[[], Any], int]] = {}
    for what, function in (("forward", forward), ("step", step)):
        for name, layer in layers.items():
            for mode in ("eager", "graph"):
                if mode == "graph" and not run.is_gpu:
                    run.skip("frozen_layer", f"{what}, {name}", "there are no CUDA graphs on a CPU")
                    continue
                key = f"{what}_{name}_{mode}"
                call = partial(function, layer)
                try:
                    call()
                    functions[key] = (capture(call)[0] if mode == "graph" else call), 1
                except Exception as error:
                    case["errors"][key] = describe(error)
    case["seconds"] = run.clock.interleave(functions)
    case["speedups"] = {
        f"{what}_{mode}": case["seconds"][f"{what}_float_{mode}"]["median"]
        / case["seconds"][f"{what}_frozen_{mode}"]["median"]
        for what in ("forward", "step")
        for mode in ("eager", "graph")
        if {f"{what}_float_{mode}", f"{what}_frozen_{mode}"} <= case["seconds"].keys()
    }


# ----- What comes of it -----


FLOAT = ("bf16_eager", "bf16_graph", "bf16_compiled", "bf16_reduce_overhead")


def is_wrong(result: dict[str, Any]) -> bool:
    """Whether a part ended early or a product was not exact."""
    return bool(result["errors"]) or not all(all(case["exact"].values()) for case in result.get("op", []))


Rows = list[list[str]]
"""A table of text: its header, then its rows."""


def microseconds(variants: dict[str, Any], name: str, mode: str) -> str:
    seconds = variants.get(name, {}).get("seconds", {}).get(mode)
    return "-" if seconds is None else f"{1e6 * seconds['median']:.1f}"


def times(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}x"


def operator_rows(result: dict[str, Any], mode: str) -> Rows:
    """Linear layers: median microseconds, times faster, and the share of the memory floor, packing included."""
    names = ["bf16", "int8_mm", "float8_mm", "pack", "product", "pack_product", "product_bits"]
    rows = [["rows", "in", "out", "kernel", *names, "/bf16", "floor", "of floor", "exact"]]
    for case in result["op"]:
        variants = case["variants"]
        ours = variants["pack_product"]
        share = ours.get("share_of_memory_floor", {}).get(mode)
        rows.append(
            [
                *(str(case[key]) for key in ("rows", "in_features", "out_features", "kernel")),
                *(microseconds(variants, name, mode) for name in names),
                times(case["speedups"].get(mode, {}).get("pack_product/bf16")),
                "-" if "memory_floor" not in ours else f"{1e6 * ours['memory_floor']:.1f}",
                "-" if share is None else f"{share:.0%}",
                "yes" if all(case["exact"].values()) else "NO",
            ]
        )
    return rows


def kernel_rows(result: dict[str, Any], mode: str) -> Rows:
    """Products of ready bits by kernel: median microseconds; the fastest, and the one that is chosen."""
    rows = [["rows", "in", "out", *cuda.KERNELS, "fastest", "chosen"]]
    for case in result["op"]:
        found = {name: case["variants"].get(f"product_{name}", {}).get("seconds", {}) for name in cuda.KERNELS}
        medians = {name: seconds[mode]["median"] for name, seconds in found.items() if mode in seconds}
        if medians:
            rows.append(
                [
                    *(str(case[key]) for key in ("rows", "in_features", "out_features")),
                    *(f"{1e6 * medians[name]:.1f}" if name in medians else "-" for name in cuda.KERNELS),
                    min(medians, key=lambda name: medians[name]),
                    case["kernel"],
                ]
            )
    return rows


def mean_rows(result: dict[str, Any]) -> Rows:
    """Linear layers: times faster, geometric mean over the shapes."""
    rows = [["rows", "mode", "shapes", *COMPARED]]
    for row in operator_means(result["op"]):
        rows.append([str(row["rows"]), row["mode"], str(row["shapes"]), *(times(row.get(pair)) for pair in COMPARED)])
    return rows


def layer_norm_rows(result: dict[str, Any], mode: str) -> Rows:
    """Sum, LayerNorm and signs: median microseconds."""
    rows = [["rows", "features", "separate", "fused", "times faster", "floor", "of floor"]]
    for case in result["layer_norm"]:
        fused = case["variants"]["fused"]
        share = fused.get("share_of_memory_floor", {}).get(mode)
        rows.append(
            [
                *(str(case["rows"]), str(case["features"])),
                *(microseconds(case["variants"], name, mode) for name in ("separate", "fused")),
                times(case["speedups"].get(mode)),
                "-" if "memory_floor" not in fused else f"{1e6 * fused['memory_floor']:.1f}",
                "-" if share is None else f"{share:.0%}",
            ]
        )
    return rows


def model_rows(result: dict[str, Any]) -> Rows:
    """Whole encoders: median milliseconds a batch, and how far the output is from that of the eager variant."""
    rows = [["model", "batch", "variant", "ms", "minimum", "difference", "preparation, s"]]
    for case in result["models"]:
        for name, found in case["variants"].items():
            cells = ["failed", "", "", ""]
            if "seconds" in found:
                seconds = found["seconds"]
                cells = [f"{1e3 * seconds['median']:.3f}", f"{1e3 * seconds['minimum']:.3f}"]
                cells += [f"{found['difference']:.1e}", f"{found['preparation']:.1f}"]
            rows.append([case["model"], f"{case['batch']} x {case['length']}", name, *cells])
    return rows


def frozen_layer_rows(result: dict[str, Any]) -> Rows:
    """One layer in a training step: median microseconds."""
    case = result["frozen_layer"]
    rows = [["", "float", "frozen", "times faster"]]
    for what in ("forward", "step"):
        for mode in ("eager", "graph"):
            seconds = [case["seconds"].get(f"{what}_{name}_{mode}") for name in ("float", "frozen")]
            cells = ["-" if s is None else f"{1e6 * s['median']:.0f}" for s in seconds]
            rows.append([f"{what}, {mode}", *cells, times(case.get("speedups", {}).get(f"{what}_{mode}"))])
    return rows


def failures(result: dict[str, Any]) -> list[str]:
    """What failed and what was left out, one line each."""
    lines = [f"{part} ended early: {text}" for part, text in result["errors"].items()]
    for case in result.get("op", []):
        size = "{rows} x {in_features} -> {out_features}".format(**case)
        lines += [f"{size}, {name}: {v['error']}" for name, v in case["variants"].items() if "error" in v]
        lines += [f"{size}, {name}: not exact" for name, exact in case["exact"].items() if not exact]
    for case in result.get("layer_norm", []):
        lines += [f"LayerNorm, {name}: {v['error']}" for name, v in case["variants"].items() if "error" in v]
    for case in result.get("models", []):
        size = "{model}, {batch} x {length}".format(**case)
        lines += [f"{size}, {name}: {v['error']}" for name, v in case["variants"].items() if "error" in v]
    for name, text in result.get("frozen_layer", {}).get("errors", {}).items():
        lines.append(f"frozen layer, {name}: {text}")
    lines += ["left out: {part}, {what}: {reason}".format(**skipped) for skipped in result["skipped"]]
    # The same kernel fails alike on many shapes: a line is enough to know it.
    return [line.splitlines()[0][:200] for line in lines]


def table(result: dict[str, Any]) -> str:
    """The result as text."""
    gpu = result["gpu"]
    lines = [f"{gpu['name']}, products of bits: {result['operators']['product']}"]
    if "ceilings" in result:
        ceilings = result["ceilings"]
        rates = ", ".join(f"{unit} {rate / 1e12:.1f}" for unit, rate in ceilings["operations_per_second"].items())
        lines += [f"Copy {ceilings['copy_bytes_per_second'] / 1e12:.3f} TB/s; products, Tops/s: {rates}"]
    lines.append("")
    available = [mode for mode in MODES if any(mode in case["speedups"] for case in result.get("op", []))]
    for mode in available[:1]:
        lines += [f"Linear layers, {mode}, median microseconds", *text_columns(operator_rows(result, mode)), ""]
        if len(kernel_rows(result, mode)) > 1:
            lines += [f"Products of ready bits by kernel, {mode}", *text_columns(kernel_rows(result, mode)), ""]
        lines += ["Geometric mean over the shapes, times faster", *text_columns(mean_rows(result)), ""]
        if result.get("layer_norm"):
            lines += [f"Sum, LayerNorm and signs, {mode}", *text_columns(layer_norm_rows(result, mode)), ""]
    if result.get("models"):
        lines += ["Whole encoders", *text_columns(model_rows(result)), ""]
    if "frozen_layer" in result:
        lines += ["A layer in a training step, microseconds", *text_columns(frozen_layer_rows(result)), ""]
    found = failures(result)
    if found:
        lines += ["Failed or left out", *found[:40], *([f"and {len(found) - 40} more"] if len(found) > 40 else []), ""]
    return "\n".join(lines)


def encoder_table(result: dict[str, Any]) -> str:
    """The encoders in Markdown: milliseconds a batch, and how many times faster packed is than the fastest bf16."""
    lines = [
        "| model | batch | bf16, eager | bf16, CUDA graph | bf16, torch.compile | packed, eager | packed, CUDA graph "
        "| speed-up over fastest bf16 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for case in result.get("models", []):
        found = {name: v["seconds"]["median"] for name, v in case["variants"].items() if "seconds" in v}
        compiled_ones = [found[name] for name in ("bf16_compiled", "bf16_reduce_overhead") if name in found]
        seconds = [found.get("bf16_eager"), found.get("bf16_graph"), min(compiled_ones, default=None)]
        seconds += [found.get("packed_eager"), found.get("packed_graph")]
        cells = ["-" if value is None else f"{1e3 * value:.2f}" for value in seconds]
        fastest = min((found[name] for name in FLOAT if name in found), default=None)
        packed = found.get("packed_graph")
        ratio = "-" if fastest is None or packed is None else f"{fastest / packed:.1f}x"
        cells = [case["model"], f"{case['batch']} x {case['length']}", *cells, ratio]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


# ----- The program -----


def device_properties(device: torch.device) -> dict[str, Any]:
    if device.type != "cuda":
        return {"name": "no GPU: a trial on the CPU"}
    properties = torch.cuda.get_device_properties(device)
    try:
        compiler = build.nvcc_version(build.find_nvcc())
    except build.BuildError as error:
        compiler = str(error)
    return {
        "name": properties.name,
        "capability": [properties.major, properties.minor],
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "memory_bytes": properties.total_memory,
        "cuda": torch.version.cuda,
        "nvcc": compiler,
    }


def operators_in_use(device: torch.device) -> dict[str, Any]:
    if device.type != "cuda":
        return {"product": "cpu", "library": None, "why_not": "no GPU"}
    on = cuda.device(device)
    return {
        "product": on.product,
        "library": None if on.native is None else on.native.path.name,
        "why_not": on.why_not,
    }


PARTS: dict[str, Callable[[Run], None]] = {
    "ceilings": measure_ceilings,
    "op": measure_operators,
    "layer_norm": measure_layer_norm,
    "models": measure_models,
    "frozen_layer": measure_frozen_layer,
    "batches": measure_batches,
}


def measure(run: Run, seconds: float, save: Callable[[dict[str, Any]], None]) -> None:
    """Runs all parts in `seconds`; each adds to the result, which `save` is given after it."""
    result, begin, share = run.result, time.monotonic(), 0.0
    for name, part in PARTS.items():
        share += SHARES[name]
        run.deadline = begin + share * seconds
        start = time.monotonic()
        try:
            part(run)
        # What ends one part need not end the others, and what was measured is kept.
        except Exception as error:
            result["errors"][name] = describe(error)
        result["seconds"][name] = round(time.monotonic() - start, 1)
        # A launch that fails makes the operators go on without the kernels: what is measured then is something else.
        in_use = operators_in_use(run.device)
        if in_use != result["operators"]:
            result["errors"][name] = f"the operators are no longer those of the beginning, {result['operators']}"
            result["operators"] = in_use
        result["op_means"] = operator_means(result.get("op", []))
        save(result)
        print(f"{name}: {result['seconds'][name]} s", file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="two shapes and one encoder that is not compiled")
    parser.add_argument("--output", type=Path, help="write the result to this JSON file, after every part")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--device", choices=["cuda", "cpu"], default="cuda", help="cpu: tiny cases, to try the program"
    )
    parser.add_argument("--seconds", type=float, default=SECONDS, help="after which what is left is left out")
    parser.add_argument("--show", type=Path, metavar="FILE", help="only print the tables of a result")
    arguments = parser.parse_args()
    if arguments.show is not None:
        shown = json.loads(arguments.show.read_text(encoding="utf-8"))
        print(table(shown), encoder_table(shown), sep="\n")
        return
    if arguments.device == "cpu" and not arguments.quick:
        parser.error("--device cpu is there to try the program: add --quick")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device; --device cpu --quick tries the program without one")
    if arguments.output is not None:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(arguments.seed)
    device = torch.device(arguments.device)
    result: dict[str, Any] = {
        "method": "cuda_benchmark",
        "command": command_line(["python", "benchmarks/gpu.py", *sys.argv[1:]]),
        "seed": arguments.seed,
        **surroundings(),
        "gpu": device_properties(device),
        "operators": operators_in_use(device),
        "rounds": ROUNDS,
        "seconds": {},
        "skipped": [],
        "errors": {},
    }
    plan = (TINY if device.type == "cpu" else QUICK) if arguments.quick else FULL
    run = Run(device, plan, Clock(device), result)
    if not run.is_gpu:
        run.skip("op", "graph_rotated, graph_warm, forced kernels", "there are no CUDA graphs and kernels on a CPU")

    def save(result: dict[str, Any]) -> None:
        if arguments.output is not None:
            arguments.output.write_text(json.dumps(result) + "\n", encoding="utf-8")

    try:
        measure(run, arguments.seconds, save)
    finally:
        # Also of a run that was interrupted.
        print(table(result))
    sys.exit(is_wrong(result))


if __name__ == "__main__":
    main()
