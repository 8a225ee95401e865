"""
Times packed layers and models on the CPU against torch's float and int8 ones, for `hf-stompp bench` and others.

All variants of a case run in one process, in turn, so that other load on the machine meets each of them alike. The
times of a packed layer include signing and packing its input.
"""

from __future__ import annotations

import copy
import json
import logging
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import BertConfig, BertModel

from .config import StoMPPConfig
from .model.conversion import binarize, commit, pack
from .ops import binary_linear, byte_linear, cpu, pack_bits
from .ops.operators import on_kernels


logger = logging.getLogger(__name__)

# (in_features, out_features): the linear layers of MiniLM, BERT-base and BERT-large.
SHAPES = [
    *((384, 384), (384, 1536), (1536, 384)),
    *((768, 768), (768, 3072), (3072, 768)),
    *((1024, 1024), (1024, 4096), (4096, 1024)),
]

MINILM: dict[str, Any] = {
    "hidden_size": 384,
    "num_hidden_layers": 6,
    "num_attention_heads": 12,
    "intermediate_size": 1536,
}
"""What all-MiniLM-L6-v2 has other than BERT-base."""

ROWS = [1, 32, 128, 512, 4096]

# (batch, sequence length)
BATCHES = [(1, 32), (1, 128), (4, 128), (16, 128)]

ROUNDS = 7

SAMPLE_SECONDS = 2e-3
"""A sample repeats its function for about this long: shorter ones would measure the clock."""


def interleave(functions: dict[str, Callable[[], Any]], rounds: int = ROUNDS) -> dict[str, dict[str, float]]:
    """
    Times functions in turn, `rounds` samples of each after one call that is not counted. Returns the `median` and
    `minimum` seconds of a call, by name.
    """
    repeats = {}
    for name, function in functions.items():
        function()
        start = time.perf_counter()
        function()
        repeats[name] = max(1, math.ceil(SAMPLE_SECONDS / max(time.perf_counter() - start, 1e-7)))
    samples: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            start = time.perf_counter()
            for _ in range(repeats[name]):
                function()
            samples[name].append((time.perf_counter() - start) / repeats[name])
    return {name: {"median": statistics.median(s), "minimum": min(s)} for name, s in samples.items()}


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Runs torch, and with it the packed layers, on `count` threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def dynamic_int8(model: nn.Module) -> nn.Module:
    """A copy with torch's dynamically quantized int8 linear layers."""
    with warnings.catch_warnings():
        # Deprecated in favour of a package of its own, but still what plain torch has.
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear}, dtype=torch.qint8)


def linear_case(rows: int, in_features: int, out_features: int, kernels: list[str]) -> dict[str, Callable[[], Any]]:
    """The variants of one linear layer; each of `kernels` forces a CPU kernel, beside the one chosen by default."""
    input = torch.randn(rows, in_features)
    layer = nn.Linear(in_features, out_features).requires_grad_(False)
    half_input, half = input.bfloat16(), copy.deepcopy(layer).bfloat16()
    int8 = dynamic_int8(nn.Sequential(layer))
    threshold, scale = torch.zeros(in_features), torch.rand(out_features)
    packed = threshold, pack_bits(layer.weight), in_features, scale, layer.bias.detach()
    functions: dict[str, Callable[[], Any]] = {
        "fp32": lambda: F.linear(input, layer.weight, layer.bias),
        "bf16": lambda: F.linear(half_input, half.weight, half.bias),
        "int8": lambda: int8(input),
        "packed_fp32": lambda: binary_linear(input, *packed, torch.float32),
        "packed_bf16": lambda: binary_linear(half_input, *packed, torch.bfloat16),
        "packed_bwn": lambda: byte_linear(input, *packed[1:], torch.float32),
    }
    native = cpu.native_kernels()
    if native is not None:
        for kernel in kernels:
            forced = on_kernels("cpu", cpu.NativeKernels(native.native, kernel))
            functions[f"packed_{kernel}"] = partial(forced.binary_linear, input, *packed, torch.float32)
    return functions


@torch.inference_mode()
def bench_linear(shapes: list[tuple[int, int]], rows: list[int], kernels: list[str]) -> list[dict[str, Any]]:
    """Times single layers: one entry a shape and number of rows, seconds and operations a second."""
    results = []
    native = cpu.native_kernels()
    cases = [(m, k, n) for m in rows for k, n in shapes]
    for m, k, n in tqdm(cases, desc="linear layers", unit="shape", leave=False):
        times = interleave(linear_case(m, k, n, kernels))
        results.append(
            {
                "rows": m,
                "in_features": k,
                "out_features": n,
                "kernel": "reference" if native is None else native.chosen(m),
                "packed_operations_per_second": 2 * m * k * n / times["packed_fp32"]["median"],
                "seconds": times,
            }
        )
    return results


def speedups(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Geometric means over the shapes: how many times faster packed layers are, by number of rows and baseline."""
    packed = [name for name in results[0]["seconds"] if name.startswith("packed_")]
    table = []
    for rows in dict.fromkeys(result["rows"] for result in results):
        cases = [result["seconds"] for result in results if result["rows"] == rows]
        row: dict[str, Any] = {"rows": rows}
        for name in packed:
            for baseline in ["bf16"] if name == "packed_bf16" else ["fp32", "int8"]:
                ratios = [case[baseline]["median"] / case[name]["median"] for case in cases]
                row[f"{name}/{baseline}"] = statistics.geometric_mean(ratios)
        table.append(row)
    return table


def bert_base() -> nn.Module:
    """BERT-base with random weights."""
    return BertModel(BertConfig(), add_pooling_layer=False).eval()


def minilm() -> nn.Module:
    """all-MiniLM-L6-v2 with random weights."""
    return BertModel(BertConfig(**MINILM), add_pooling_layer=False).eval()


def packed_copy(model: nn.Module, mode: str = "bnn", **options: Any) -> Any:
    """A packed copy, committed without training: what it computes is of no use, how fast is what counts."""
    packed = copy.deepcopy(model)
    commit(binarize(packed, StoMPPConfig(mode=mode, **options)))
    with torch.no_grad():
        packed(input_ids=_token_ids(model, 4, 32))
    return pack(packed)


def _token_ids(model: Any, batch: int, length: int) -> Tensor:
    return torch.randint(model.config.vocab_size, (batch, length))


def variants_of(model: nn.Module) -> dict[str, Any]:
    """A model as it is, in other dtypes, packed in both modes, and with bits in the feed-forward blocks alone."""
    packed = packed_copy(model)
    return {
        "fp32": model,
        "bf16": copy.deepcopy(model).bfloat16(),
        "int8": dynamic_int8(model),
        "packed_fp32": packed,
        "packed_bf16": copy.deepcopy(packed).bfloat16(),
        "packed_bwn": packed_copy(model, "bwn"),
        "packed_mixed": packed_copy(model, "bnn", modes={"attention": "bwn"}),
    }


@torch.inference_mode()
def layer_seconds(layers: Mapping[str, nn.Linear], rows: int) -> dict[str, dict[str, float]]:
    """Median seconds of layers on this CPU for `rows` tokens: layer -> mode -> seconds. One shape is timed once."""
    variants = {"bnn": "packed_fp32", "bwn": "packed_bwn", "float": "fp32"}
    shapes = {name: (layer.in_features, layer.out_features) for name, layer in layers.items()}
    by_shape = {}
    for shape in dict.fromkeys(shapes.values()):
        case = linear_case(rows, *shape, kernels=[])
        times = interleave({mode: case[variant] for mode, variant in variants.items()})
        by_shape[shape] = {mode: time["median"] for mode, time in times.items()}
    return {name: by_shape[shape] for name, shape in shapes.items()}


@torch.inference_mode()
def model_seconds(models: Mapping[str, Any], length: int) -> dict[str, float]:
    """Seconds that models of one vocabulary take for a text of `length` tokens on this CPU: name -> median."""
    ids = _token_ids(next(iter(models.values())), 1, length)
    times = interleave({name: partial(model, input_ids=ids) for name, model in models.items()})
    return {name: time["median"] for name, time in times.items()}


@torch.inference_mode()
def bench_model(name: str, model: Any, batches: list[tuple[int, int]], threads: list[int]) -> list[dict[str, Any]]:
    """Times whole encoders: one entry a batch size, sequence length and number of threads."""
    with torch.inference_mode(False):
        variants = variants_of(model)
    results = []
    for count in threads:
        with torch_threads(count):
            for batch, length in tqdm(batches, desc=f"{name}, {count} threads", unit="batch", leave=False):
                ids = _token_ids(model, batch, length)
                times = interleave({key: partial(variant, input_ids=ids) for key, variant in variants.items()})
                case = {"model": name, "batch": batch, "length": length, "threads": count}
                results.append(case | {"seconds": times})
    return results


_MEASURE_LOADING = """
import glob, json, os, sys, time
import torch, transformers, hf_stompp
small, folder, model_class, cold = *sys.argv[1:3], getattr(transformers, sys.argv[3]), sys.argv[4] == "cold"
def resident():
    fields = dict(line.split(":") for line in open("/proc/self/status"))
    return int(fields["VmRSS"].split()[0]) * 1024
torch.set_num_threads(1)
ids = torch.zeros(1, 128, dtype=torch.long)
# What is imported on the first use of a model is no part of loading this one.
with torch.inference_mode():
    model_class.from_pretrained(small)(input_ids=ids)
if cold:
    for path in glob.glob(f"{folder}/*.safetensors"):
        file = os.open(path, os.O_RDONLY)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)
before = resident()
start = time.perf_counter()
model = model_class.from_pretrained(folder).eval()
loaded = time.perf_counter()
with torch.inference_mode():
    model(input_ids=ids)
answered = time.perf_counter()
with torch.inference_mode():
    model(input_ids=ids)
# A float file is mapped: what no batch has read yet is not in memory, but will be.
for tensor in [*model.parameters(), *model.buffers()]:
    tensor.sum()
print(json.dumps({"load_seconds": loaded - start, "load_and_first_batch_seconds": answered - start,
    "resident_bytes": resident() - before, "resident_bytes_before": before}))
"""


LOADING_TIMES = ("load_seconds", "load_and_first_batch_seconds")


def bench_loading(model: Any, rounds: int = 5) -> dict[str, Any] | None:
    """
    Time to load a float model from its folder, time to its first answer (weights of a float file are read when they
    are first used), and resident memory once all weights have been used, each time in a fresh process; with the file
    in the system's cache (`warm`) and not (`cold`).

    Returns `float` and `packed` -> `warm` and `cold` -> medians of `rounds` processes; None where the system does not
    tell memory.
    """
    if not Path("/proc/self/status").exists() or not hasattr(os, "posix_fadvise"):
        return None
    kinds = [(name, cache) for name in ("float", "packed") for cache in ("warm", "cold")]
    samples: dict[tuple[str, str], list[dict[str, float]]] = {kind: [] for kind in kinds}
    with tempfile.TemporaryDirectory() as folder:
        config = copy.deepcopy(model.config)
        config.num_hidden_layers, config.vocab_size = 1, 128
        for prefix, source in (("", model), ("small-", type(model)(config))):
            source.save_pretrained(f"{folder}/{prefix}float")
            packed_copy(source).save_pretrained(f"{folder}/{prefix}packed")
        for _ in tqdm(range(rounds), desc="loading", unit="round", leave=False):
            for name, cache in kinds:
                arguments = [f"{folder}/small-{name}", f"{folder}/{name}", type(model).__name__, cache]
                output = subprocess.run(
                    [sys.executable, "-c", _MEASURE_LOADING, *arguments], check=True, capture_output=True, text=True
                ).stdout
                samples[name, cache].append(json.loads(output.splitlines()[-1]))
        result: dict[str, Any] = {
            name: {"file_bytes": Path(folder, name, "model.safetensors").stat().st_size} for name, _ in kinds
        }
    for (name, cache), results in samples.items():
        result[name][cache] = {key: statistics.median(sample[key] for sample in results) for key in results[0]}
    return result


@torch.inference_mode()
def compare_with_float(packed: Any, batches: Sequence[int] = (1, 8)) -> list[dict[str, Any]]:
    """
    Times a packed text model beside a float one of its shapes, dtype and device. The float one's weights are random:
    how fast it is does not depend on them.

    Returns a dict for each number of sequences in `batches`, of 128 tokens or as many as the model takes: `batch`,
    `length` and the median seconds of `float` and `packed`. There is none for a model that takes no token ids, or
    without memory for a float one.
    """
    if packed.main_input_name != "input_ids":
        return []
    try:
        return _compare_with_float(packed, batches)
    # On the CPU running out of memory is no class of its own.
    except (RuntimeError, MemoryError) as error:
        logger.warning("No times for the model card, a float model could not be run beside the packed one: %s", error)
        return []


def _compare_with_float(packed: Any, batches: Sequence[int]) -> list[dict[str, Any]]:
    config = copy.deepcopy(packed.config)
    del config.quantization_config
    device, training = packed.device, packed.training
    with torch.inference_mode(False), torch.random.fork_rng(devices=[]), device:
        plain = type(packed)(config).to(packed.dtype).eval()
    positions = getattr(config, "max_position_embeddings", 0)
    # XLNet has no limit, and says -1; RoBERTa's positions begin behind the padding token's.
    length = min(128, positions - 2) if positions > 0 else 128

    def timed(model: Any, ids: Tensor) -> Callable[[], None]:
        def run() -> None:
            model(input_ids=ids)
            if device.type == "cuda":
                torch.cuda.synchronize(device)

        return run

    results = []
    packed.eval()
    try:
        for batch in batches:
            ids = torch.full((batch, length), config.vocab_size - 1, device=device)
            found = interleave({"float": timed(plain, ids), "packed": timed(packed, ids)})
            medians = {name: times["median"] for name, times in found.items()}
            results.append({"batch": batch, "length": length, **medians})
    finally:
        packed.train(training)
    return results


def instruction_limits() -> dict[str, float]:
    """
    What the inner instructions of each kernel could do on registers alone: operations a second on one thread, two to a
    pair of bits.
    """
    native = cpu.native_kernels()
    limits: dict[str, float] = {}
    if native is None:
        return limits
    for kernel in cpu.KERNELS:
        if native.unavailable(kernel) or not native.run_limit(kernel, 1):
            continue
        steps, best = 200_000, math.inf
        for _ in range(9):
            start = time.perf_counter()
            pairs = native.run_limit(kernel, steps)
            best = min(best, (time.perf_counter() - start) / pairs)
        limits[kernel] = 2 / best
    return limits
