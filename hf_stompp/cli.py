"""The `hf-stompp` command."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import accelerate
import torch
import transformers

import hf_stompp

from . import benchmark
from .ops import build, cpu, cuda


def information() -> dict[str, Any]:
    """What `hf-stompp info` tells: versions, and which kernel runs and why the others do not."""
    native = cpu.native_kernels()
    try:
        compiler: str | None = build.compiler_version(build.find_compiler())
    except build.BuildError as error:
        compiler = str(error)
    return {
        "versions": {
            "hf_stompp": hf_stompp.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "accelerate": accelerate.__version__,
        },
        "cpu": {
            "library": None if native is None else str(native.path),
            "runs": "reference" if native is None else _kernels_by_rows(native),
            "why_reference": cpu.why_reference(),
            "why_not": {} if native is None else {k: reason for k in cpu.KERNELS if (reason := _why_not(native, k))},
            "threads": torch.get_num_threads() if native is None or native.has_threads else 1,
            "compiler": compiler,
        },
        "cuda": {"devices": [_cuda_device(index) for index in range(torch.cuda.device_count())], "nvcc": _nvcc()},
    }


def _cuda_device(index: int) -> dict[str, Any]:
    device = cuda.device(torch.device("cuda", index))
    return {
        "name": torch.cuda.get_device_name(index),
        "capability": "{}.{}".format(*torch.cuda.get_device_capability(index)),
        "product": device.product,
        "library": None if device.native is None else str(device.native.path),
        "why_not": device.why_not,
    }


def _nvcc() -> str:
    try:
        return build.nvcc_version(build.find_nvcc())
    except build.BuildError as error:
        return str(error)


def _kernels_by_rows(native: cpu.NativeKernels) -> str:
    few, many = native.chosen(1), native.chosen(1 << 20)
    return few if few == many else f"{many} for large batches, {few} for small ones"


def _why_not(native: cpu.NativeKernels, kernel: str) -> str | None:
    """Why a kernel does not run; None if it does."""
    reason = native.unavailable(kernel)
    if reason is None and kernel not in (native.chosen(1), native.chosen(1 << 20)):
        reason = "can run here, but " + (f"HF_STOMPP_CPU={native.kernel}" if native.kernel else "another is faster")
    return reason


def _print_information(info: dict[str, Any]) -> None:
    print("  ".join(f"{name} {version}" for name, version in info["versions"].items()))
    print(f"CPU kernel: {info['cpu']['runs']}, {info['cpu']['threads']} threads")
    if info["cpu"]["why_reference"]:
        print(f"  the reference in plain PyTorch, many times slower, because: {info['cpu']['why_reference']}")
    for kernel, reason in info["cpu"]["why_not"].items():
        print(f"  {kernel}: {reason}")
    print(f"  library: {info['cpu']['library']}")
    print(f"  compiler: {info['cpu']['compiler']}")
    devices = info["cuda"]["devices"]
    if not devices:
        print("CUDA: no device")
    for index, device in enumerate(devices):
        print(f"CUDA device {index}: {device['name']} ({device['capability']}), products of {device['product']}")
        if device["why_not"]:
            print(f"  without kernels of its own, because: {device['why_not']}")
        print(f"  library: {device['library']}")
    print(f"  nvcc: {info['cuda']['nvcc']}")


def _info(arguments: argparse.Namespace) -> None:
    info = information()
    if arguments.json:
        print(json.dumps(info, indent=2))
    else:
        _print_information(info)


def _bench(arguments: argparse.Namespace) -> None:
    levels = ["op", "model", "loading"] if arguments.level == "all" else [arguments.level]
    # A path would tell whose machine it was.
    command = shlex.join(["hf-stompp", *(Path(word).name if "/" in word else word for word in arguments.words)])
    if arguments.output is not None:
        # Now, not when ten minutes of measuring are done.
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
    result = benchmark.run(levels, arguments.threads, arguments.kernels, command, arguments.quick)
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2) if arguments.json else benchmark.table(result))


def _count(text: str) -> int:
    count = int(text)
    if count < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return count


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    root = argparse.ArgumentParser(
        prog="hf-stompp", description="1-bit BERT for Transformers: what runs here, and how fast."
    )
    commands = root.add_subparsers(dest="command", required=True, metavar="COMMAND")
    info = commands.add_parser("info", help="versions, the kernel that runs, and why the others do not")
    info.add_argument("--json", action="store_true", help="print JSON")
    info.set_defaults(run=_info)
    bench = commands.add_parser(
        "bench",
        help="time packed layers and models against torch's fp32, bf16 and int8",
        description="Times packed layers and models against torch's fp32, bf16 and dynamic int8 in one process, in "
        "turn. Takes about ten minutes; --quick takes seconds and shows that it works. Close what else runs on the "
        "machine.",
    )
    bench.add_argument(
        "--level",
        choices=["op", "model", "loading", "all"],
        default="all",
        help="single linear layers, whole encoders, loading time and memory, or all (default)",
    )
    bench.add_argument(
        "--threads",
        type=_count,
        nargs="+",
        default=[1],
        help="numbers of threads for whole encoders; single layers run on the first (default: 1)",
    )
    bench.add_argument(
        "--kernels",
        nargs="*",
        choices=cpu.KERNELS,
        default=[],
        help="kernels to time beside the one that is chosen automatically",
    )
    bench.add_argument("--output", type=Path, help="write the result to this JSON file")
    bench.add_argument("--quick", action="store_true", help="a few small cases")
    bench.add_argument("--json", action="store_true", help="print JSON instead of tables")
    bench.set_defaults(run=_bench)
    return root


def main(words: Sequence[str] | None = None) -> int:
    """
    Runs a command.

    Args:
        words (`Sequence[str]`, *optional*): the command line without the program's name; that of the process when not
            given.

    Returns:
        `int`: the exit status.
    """
    words = sys.argv[1:] if words is None else list(words)
    arguments = parser().parse_args(words, argparse.Namespace(words=words))
    try:
        arguments.run(arguments)
    except (OSError, RuntimeError, ValueError) as error:
        print(f"hf-stompp: {error}", file=sys.stderr)
        return 1
    return 0
