"""
What stands between a packed layer of one row and its kernel: the operator as models call it, the native function
alone, and the same without any rows, against torch's fp32. One thread, minimum of nine samples, microseconds.

    python benchmarks/call_overhead.py --output benchmarks/results/call_overhead_amd_epyc_zen5.json
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_stompp.benchmark import SHAPES
from hf_stompp.machine import command_line, surroundings
from hf_stompp.ops import binary_linear, cpu, pack_bits
from hf_stompp.ops.operators import on_kernels


CPP_OPERATOR_MICROSECONDS = 3.2
"""A call of an operator of torch's C++ extensions, as measured for a 64 x 64 layer when the package was designed."""


def microseconds(function: Callable[[], Any], samples: int = 9, calls: int = 700) -> float:
    best = math.inf
    for _ in range(samples):
        start = time.perf_counter()
        for _ in range(calls):
            function()
        best = min(best, (time.perf_counter() - start) / calls)
    return 1e6 * best


def record_of(native: cpu.NativeKernels, *arguments: Any) -> tuple[bytes, Tensor]:
    """What `binary_linear` gives to the native function, and the output that it tells the function to write."""
    kept: list[bytes] = []

    def keep(record: bytes) -> int:
        kept.append(record)
        return 0

    kernels = SimpleNamespace(number=native.number, native=SimpleNamespace(hf_stompp_binary_linear=keep))
    output = on_kernels("cpu", kernels).binary_linear(*arguments)
    return kept[0], output


@torch.inference_mode()
def measure_shape(native: cpu.NativeKernels, in_features: int, out_features: int) -> dict[str, float]:
    input, weight = torch.randn(1, in_features), torch.randn(out_features, in_features)
    bias, scale, threshold = torch.randn(out_features), torch.rand(out_features), torch.zeros(in_features)
    layer = threshold, pack_bits(weight), in_features, scale, bias, torch.float32
    function = native.native.hf_stompp_binary_linear
    (one, output), (none, _) = (record_of(native, input[:rows], *layer) for rows in (1, 0))
    assert function(one) == 0 and torch.equal(output, binary_linear(input, *layer))
    return {
        "fp32": microseconds(lambda: F.linear(input, weight, bias)),
        "operator": microseconds(lambda: binary_linear(input, *layer)),
        "native_function": microseconds(lambda: function(one)),
        "native_function_without_rows": microseconds(lambda: function(none)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Microseconds between a packed layer of one row and its kernel.")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    native = cpu.native_kernels()
    if native is None:
        sys.exit(f"there are no native kernels here: {cpu.why_reference()}")
    torch.manual_seed(0)
    torch.set_num_threads(1)
    shapes = {f"{k}x{n}": measure_shape(native, k, n) for k, n in SHAPES}

    def speedup(time_of: Callable[[dict[str, float]], float]) -> float:
        return statistics.geometric_mean(row["fp32"] / time_of(row) for row in shapes.values())

    def kernel(row: dict[str, float]) -> float:
        return row["native_function"] - row["native_function_without_rows"]

    result = {
        "method": "call_overhead",
        "command": command_line(["python", "benchmarks/call_overhead.py", *sys.argv[1:]]),
        "seed": 0,
        "load_average": os.getloadavg(),
        **surroundings(),
        "kernel": native.chosen(1),
        "microseconds": shapes,
        "geometric_mean_over_fp32": {
            "operator": speedup(lambda row: row["operator"]),
            "kernel_behind_a_cpp_operator": speedup(lambda row: kernel(row) + CPP_OPERATOR_MICROSECONDS),
            "kernel_alone": speedup(kernel),
        },
    }
    arguments.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result["geometric_mean_over_fp32"], indent=2))


if __name__ == "__main__":
    main()
