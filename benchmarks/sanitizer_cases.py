"""
Every CUDA kernel on small shapes under NVIDIA's checkers, and the library that they come from.

    python benchmarks/sanitizer_cases.py --build
    python benchmarks/sanitizer_cases.py --tool memcheck --tool racecheck
    compute-sanitizer --tool memcheck --error-exitcode 1 python benchmarks/sanitizer_cases.py

`--build` builds the library where it is missing, and tells where it lies. With `--tool` this program runs itself under
`compute-sanitizer`, once a tool: what that finds fails it; where there is no `compute-sanitizer`, or it refuses the
device, as it does in some virtual machines, this is said and nothing fails. Without either it runs the kernels. The
package itself is not imported, since that would load Transformers.
"""

from __future__ import annotations

import argparse
import itertools
import os
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import Any


FOLDER = Path(__file__).resolve().parent.parent / "hf_stompp"

REFUSED = "Device not supported"

FINISHED = "all kernels ran"

DEVICE = "cuda"


def load_operators() -> Any:
    """`hf_stompp.ops.cuda`, without running what the package imports beside it."""
    if "hf_stompp" not in sys.modules:
        package = types.ModuleType("hf_stompp")
        package.__path__ = [str(FOLDER)]
        sys.modules["hf_stompp"] = package
    from hf_stompp.ops import cuda

    return cuda


def kernels_of_this_device(cuda: Any) -> Any:
    """The library on the first device. Without it there is nothing to check: an error, not a fallback."""
    import torch

    return cuda.NativeKernels(cuda.find_or_build(torch.cuda.get_device_capability(0)), 0)


def run_cases(cuda: Any, native: Any) -> int:
    """Runs every kernel, in each type, around the edges of its tiles. How many calls there were."""
    import torch

    from hf_stompp.ops import pack_bits, products
    from hf_stompp.ops.operators import on_kernels

    # Its errors are not passed over.
    device = cuda.Device(native, "bits", forced=True)
    operators = on_kernels("cuda", device)
    generator = torch.Generator().manual_seed(0)
    count = 0

    def draw(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        # Drawn on the CPU: on the device, kernels that are not ours would be checked too.
        return torch.randn(shape, generator=generator).to(dtype).to(DEVICE)

    def draw_bits(rows: int, features: int) -> torch.Tensor:
        return pack_bits(torch.randn(rows, features, generator=generator)).to(DEVICE)

    floats = (torch.float32, torch.bfloat16, torch.float16)
    for dtype, (rows, features), thresholds in itertools.product(
        floats, [(1, 7), (9, 64), (17, 257), (65, 768)], [False, True]
    ):
        operators.pack_sign(draw(rows, features, dtype=dtype), draw(features) if thresholds else None)
        count += 1
    for dtype, (rows, features) in itertools.product(
        (torch.int8, torch.float8_e4m3fn), [(1, 7), (9, 64), (65, 257), (3, 768)]
    ):
        products.unpack_on_cuda(device, draw_bits(rows, features), features, dtype)
        count += 1
    # 65: less than a step of 256 features. 1024, 768 and 1280: whole stages of four, three and one of them.
    sizes = itertools.product([65, 768, 1024, 1280], [(1, 1), (65, 129), (130, 264), (128, 256)])
    for in_features, (rows, out_features) in sizes:
        bits, weight = draw_bits(rows, in_features), draw_bits(out_features, in_features)
        scale, bias, threshold = (draw(out_features) for _ in range(3))
        for name in cuda.KERNELS:
            if not native.has_kernel(name):
                continue
            kernel = cuda.NativeKernels(native.native, native.index, name, native._stream)
            forced = on_kernels("cuda", cuda.Device(kernel, "bits", forced=True))
            for dtype in floats:
                forced.binary_linear(bits, None, weight, in_features, scale, bias, dtype)
            forced.binary_linear_sign(bits, None, weight, in_features, scale, None, torch.bfloat16, threshold)
            count += 4
    for dtype, (rows, features) in itertools.product(floats, [(1, 8), (5, 264), (9, 768), (3, 1032), (4, 4096)]):
        x, residual = (draw(rows, features, dtype=dtype) for _ in range(2))
        for parameters in {dtype, torch.float32}:
            weight, bias = (draw(features, dtype=parameters) for _ in range(2))
            operators.layer_norm_sign(x, residual, weight, bias, 1e-12, draw(features))
            operators.layer_norm_sign(x, None, weight, bias, 1e-12, None)
            count += 2
    for (out_features, in_features), transposed in itertools.product([(1, 1), (9, 33), (130, 770)], [False, True]):
        vector = torch.randn(out_features if transposed else in_features, generator=generator, dtype=torch.float64)
        operators.sign_product(draw_bits(out_features, in_features), in_features, vector.to(DEVICE), transposed)
        count += 1
        levels = draw(out_features, 1), draw(in_features), draw(1)[0], draw(out_features)
        operators.fold(draw_bits(out_features, in_features), *levels, in_features)
        count += 1
    return count


def check(tool: str, limit: float) -> bool:
    """
    Runs this program under a tool of compute-sanitizer, `limit` seconds at most, and prints what came of it. Whether
    nothing was found, or nothing could be checked.
    """
    program = shutil.which("compute-sanitizer")
    if program is None:
        print(f"{tool}: not checked, there is no compute-sanitizer on the PATH")
        return True
    command = [program, "--tool", tool, "--error-exitcode", "1", sys.executable, str(Path(__file__).resolve())]
    # Every tensor in memory of its own, whose bounds the tool knows.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    start = time.monotonic()
    # Its own session, so that the program under the tool ends with it.
    process = subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    is_late = False
    try:
        output, _ = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        is_late = True
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    if REFUSED in output:
        print(f"{tool}: not checked, compute-sanitizer refuses this device ({REFUSED})")
        return True
    if is_late:
        print(f"{output[-4000:]}\n{tool}: failed, not done after {limit:.0f} s")
        return False
    if process.returncode != 0 or FINISHED not in output:
        print(f"{output[-8000:]}\n{tool}: failed, exit status {process.returncode}")
        return False
    summary = [line for line in output.splitlines() if FINISHED in line or "SUMMARY" in line]
    print(f"{tool}: " + "; ".join(line.strip("= ") for line in summary) + f" ({time.monotonic() - start:.0f} s)")
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--build", action="store_true", help="build the library if need be, and tell where it lies")
    parser.add_argument("--tool", action="append", default=[], help="run under this tool of compute-sanitizer")
    parser.add_argument("--limit", type=float, default=60, help="seconds for each tool")
    arguments = parser.parse_args()
    if arguments.tool:
        sys.exit(not all([check(tool, arguments.limit) for tool in arguments.tool]))
    import torch

    cuda = load_operators()
    start = time.monotonic()
    native = kernels_of_this_device(cuda)
    if arguments.build:
        names = [name for name in cuda.KERNELS if native.has_kernel(name)]
        print(f"{torch.cuda.get_device_name(0)}: {native.path}, ready after {time.monotonic() - start:.1f} s")
        print(f"kernels that run there: {', '.join(names) or 'none'}")
        return
    count = run_cases(cuda, native)
    torch.cuda.synchronize()
    print(f"{FINISHED}: {count} calls")


if __name__ == "__main__":
    main()
