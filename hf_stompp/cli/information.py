"""`hf-stompp info`."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

import accelerate
import torch
import transformers

from ..ops import build, cpu, cuda
from ..version import __version__


def information() -> dict[str, Any]:
    """What `hf-stompp info` tells: versions, and which kernel runs and why the others do not."""
    native = cpu.native_kernels()
    try:
        compiler: str | None = build.compiler_version(build.find_compiler())
    except build.BuildError as error:
        compiler = str(error)
    return {
        "versions": {
            "hf_stompp": __version__,
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
        reason = "can run here, but " + (f"HF_STOMPP_CPU={native.kernel}" if native.kernel else "another is preferred")
    return reason


def _lines(info: dict[str, Any]) -> Iterator[str]:
    yield "  ".join(f"{name} {version}" for name, version in info["versions"].items())
    yield f"CPU kernel: {info['cpu']['runs']}, {info['cpu']['threads']} threads"
    if info["cpu"]["why_reference"]:
        yield f"  the reference in plain PyTorch, many times slower, because: {info['cpu']['why_reference']}"
    for kernel, reason in info["cpu"]["why_not"].items():
        yield f"  {kernel}: {reason}"
    yield f"  library: {info['cpu']['library']}"
    yield f"  compiler: {info['cpu']['compiler']}"
    devices = info["cuda"]["devices"]
    if not devices:
        yield "CUDA: no device"
    for index, device in enumerate(devices):
        yield f"CUDA device {index}: {device['name']} ({device['capability']}), products of {device['product']}"
        if device["why_not"]:
            yield f"  without kernels of its own, because: {device['why_not']}"
        yield f"  library: {device['library']}"
    yield f"  nvcc: {info['cuda']['nvcc']}"


def run(arguments: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Runs `hf-stompp info`."""
    info = information()
    return info, "\n".join(_lines(info))
