"""`make gpu-check` as far as it goes without a GPU: the benchmark, what runs the checkers, the order of the parts."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from programs import load, write_program


ROOT = Path(__file__).resolve().parent.parent
BENCHMARK = ROOT / "benchmarks" / "gpu.py"
CHECKERS = ROOT / "benchmarks" / "sanitizer_cases.py"
PARTS = ["ceilings", "op", "layer_norm", "models", "frozen_layer", "batches"]


@pytest.fixture(scope="module")
def benchmark() -> Any:
    return load(BENCHMARK)


@pytest.fixture
def trial(benchmark: Any) -> Any:
    """A run of the tiny cases on the CPU, before its first part."""
    device = torch.device("cpu")
    result: dict[str, Any] = {
        "gpu": benchmark.device_properties(device),
        "operators": benchmark.operators_in_use(device),
        **{"seconds": {}, "skipped": [], "errors": {}},
    }
    return benchmark.Run(device, benchmark.TINY, benchmark.Clock(device), result)


# ----- The benchmark -----


@pytest.mark.slow
def test_whole_benchmark_runs_on_a_cpu(tmp_path: Path) -> None:
    output = tmp_path / "new" / "result.json"
    command = [sys.executable, str(BENCHMARK), "--quick", "--device", "cpu", "--seed", "3", "--output", str(output)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout

    result = json.loads(output.read_text())
    assert result["method"] == "cuda_benchmark" and result["seed"] == 3 and not result["errors"]
    assert result["command"].startswith("python benchmarks/gpu.py --quick")
    assert {"machine", "versions", "gpu", "operators"} <= result.keys()
    assert list(result["seconds"]) == PARTS
    assert result["ceilings"]["copy_bytes_per_second"] > 0
    assert {(c["rows"], c["in_features"], c["out_features"]) for c in result["op"]} == {
        (rows, *shape) for rows in (8, 24) for shape in ((64, 48), (96, 32))
    }
    for case in result["op"]:
        assert set(case["exact"].values()) == {True} and len(case["exact"]) == 3
        for name in ("bf16", "pack", "product", "pack_product", "product_bits"):
            found = case["variants"][name]
            assert set(found["seconds"]) == {"eager_rotated", "eager_warm"}
            for seconds in found["seconds"].values():
                assert 0 < seconds["minimum"] <= seconds["median"]
            assert found["memory_floor"] > 0 and found["share_of_memory_floor"]["eager_warm"] > 0
    assert {row["mode"] for row in result["op_means"]} == {"eager_rotated", "eager_warm"}
    assert all(case["speedups"]["eager_warm"] > 0 for case in result["layer_norm"])
    assert [(case["batch"], case["length"]) for case in result["models"]] == [(2, 16), (1, 16)]
    for case in result["models"]:
        assert set(case["variants"]) == {"bf16_eager", "packed_eager"}
    assert set(result["frozen_layer"]["speedups"]) == {"forward_eager", "step_eager"}
    skipped = {entry["what"].split(", ")[-1] for entry in result["skipped"]}
    assert {"bf16_compiled", "bf16_reduce_overhead", "packed_graph", "packed_reduce_overhead"} <= skipped
    for heading in ("Linear layers", "LayerNorm", "Whole encoders", "training step", "left out"):
        assert heading in printed


@pytest.mark.slow
def test_cpu_is_for_trials_alone(tmp_path: Path) -> None:
    result = subprocess.run([sys.executable, str(BENCHMARK), "--device", "cpu"], capture_output=True, text=True)
    assert result.returncode == 2 and "--quick" in result.stderr


def test_part_that_fails_keeps_no_other_from_running(
    benchmark: Any, trial: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(run: Any) -> None:
        raise RuntimeError("no such luck")

    ran: list[str] = []
    parts = {name: (lambda run, name=name: ran.append(name)) for name in PARTS}
    monkeypatch.setattr(benchmark, "PARTS", parts | {"op": fail})
    saved: list[list[str]] = []
    benchmark.measure(trial, 60, lambda result: saved.append(list(result["seconds"])))

    assert ran == [name for name in PARTS if name != "op"]
    assert saved == [PARTS[: i + 1] for i in range(len(PARTS))]
    assert "no such luck" in trial.result["errors"]["op"] and benchmark.is_wrong(trial.result)
    assert "op ended early: RuntimeError: no such luck" in benchmark.table(trial.result)


def test_what_there_is_no_time_for_is_told(benchmark: Any, trial: Any) -> None:
    start = time.monotonic()
    benchmark.measure(trial, 0, lambda result: None)
    assert time.monotonic() - start < 20
    assert not trial.result["errors"] and not trial.result["op"] and not trial.result["models"]
    assert {entry["part"] for entry in trial.result["skipped"]} >= {"op", "layer_norm", "models"}
    assert "the time of this part was spent" in benchmark.table(trial.result)


def test_variant_that_raises_is_recorded_beside_the_others(benchmark: Any, trial: Any) -> None:
    def fail(i: int) -> None:
        raise NotImplementedError("not on this device")

    trial.result["ceilings"] = {"copy_bytes_per_second": 1e9, "operations_per_second": {"bf16": 1e10}}
    found = benchmark.time_variants(
        trial, {"bad": benchmark.Variant(fail, 10), "good": benchmark.Variant(lambda i: i, 2000, 50, "bf16")}
    )
    assert found["bad"] == {"error": "NotImplementedError: not on this device"}
    assert found["good"]["memory_floor"] == pytest.approx(2e-6)
    assert found["good"]["arithmetic_floor"] == pytest.approx(5e-9)
    median = found["good"]["seconds"]["eager_warm"]["median"]
    assert found["good"]["share_of_memory_floor"]["eager_warm"] == pytest.approx(2e-6 / median)


def test_product_that_is_not_exact_is_found(benchmark: Any, trial: Any) -> None:
    linear = benchmark.Linear(trial, 8, 64, 48)
    variants = linear.variants()
    assert set(linear.exact(variants).values()) == {True}
    right = variants["product"].call
    variants["product"].call = lambda i: right(i) + 1
    assert linear.exact(variants) == {"product": False, "pack_product": True, "product_bits": True}


def test_rotated_tensors_are_twice_the_cache(benchmark: Any) -> None:
    cache = 50 * 2**20
    for moved in (2**20, 10**7, 2 * cache):
        copies = benchmark.copies_beyond_cache(moved, cache)
        assert copies >= 2 and copies * moved >= 2 * cache and (copies - 2) * moved < 2 * cache
    assert benchmark.copies_beyond_cache(1, cache) == benchmark.MOST_COPIES
    taken: list[int] = []
    benchmark.repeated(taken.append, 3, 7)()
    assert taken == [0, 1, 2, 0, 1, 2, 0]


def measured(benchmark: Any) -> dict[str, Any]:
    """A result as of a GPU, with one time of bf16 everywhere."""
    modes = {"graph_rotated": {"median": 6e-6, "minimum": 5e-6}}
    ours = {"graph_rotated": {"median": 2e-6, "minimum": 5e-6 / 3}}
    cases = []
    for k, n in benchmark.SHAPES:
        packed = {"seconds": ours, "memory_floor": 1e-6, "share_of_memory_floor": {"graph_rotated": 0.8}}
        variants = {"bf16": {"seconds": modes}, "pack_product": packed, "product_mma_64x64": {"seconds": ours}}
        case = {"rows": 4096, "in_features": k, "out_features": n, "kernel": "mma_64x64", "exact": {"product": True}}
        cases.append(case | {"variants": variants, "speedups": benchmark.speedups(variants)})
    seconds = {"bf16_compiled": 1.2, "bf16_reduce_overhead": 1.0, "packed_graph": 0.5}
    encoders = {
        name: {"seconds": {"median": s, "minimum": s}, "difference": 0.0, "preparation": 1.0}
        for name, s in seconds.items()
    }
    models = [
        {"model": name, "batch": 32, "length": 128, "variants": {**encoders}}
        for name in (benchmark.BASE, benchmark.LARGE)
    ]
    return {
        "gpu": {"name": "NVIDIA H200"},
        "operators": {"product": "bits"},
        "op": cases,
        "models": models,
        "frozen_layer": {"seconds": {}, "speedups": {"forward_graph": 2.5, "forward_eager": 1.0}},
        **{"skipped": [], "errors": {}},
    }


def test_table_shows_the_fastest_kernel_and_the_means(benchmark: Any) -> None:
    result = measured(benchmark)
    result["op"][3]["exact"]["product"] = False
    text = benchmark.table(result)
    assert "NVIDIA H200" in text and "Products of ready bits by kernel" in text
    means = next(line for line in text.splitlines() if line.split()[:3] == ["4096", "graph_rotated", "9"])
    assert means.split()[3] == "3.00x"
    assert "4096 x 768 -> 768, product: not exact" in text and benchmark.is_wrong(result)


def test_encoders_are_compared_where_both_kinds_were_timed(benchmark: Any) -> None:
    result = measured(benchmark)
    del result["models"][1]["variants"]["packed_graph"]
    *_, base, large = benchmark.encoder_table(result).splitlines()
    # Over the faster of the compiled float models.
    assert base.split(" | ")[-1] == "2.0x |" and large.split(" | ")[-1] == "- |"
    del result["models"]
    assert len(benchmark.encoder_table(result).splitlines()) == 2
    assert "Whole encoders" not in benchmark.table(result)


# ----- The checkers -----


def run_checkers(folder: Path, script: str | None, *arguments: str) -> subprocess.CompletedProcess[str]:
    """With a `compute-sanitizer` on the PATH that is this script, or none."""
    folder.mkdir(exist_ok=True)
    if script is not None:
        write_program(folder / "compute-sanitizer", script)
    environment = {**os.environ, "PATH": os.pathsep.join([str(folder), "/usr/bin", "/bin"])}
    command = [sys.executable, str(CHECKERS), *arguments, "--tool", "memcheck", "--tool", "racecheck"]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("script", "status", "told"),
    [
        ("echo 'all kernels ran: 3 calls'; echo '===== ERROR SUMMARY: 0 errors'", 0, "3 calls; ERROR SUMMARY: 0"),
        ("echo 'all kernels ran: 3 calls'; echo '===== Invalid __global__ write'; exit 1", 1, "Invalid __global__"),
        ("echo '===== Error: Device not supported'; echo 'RuntimeError: 999'; exit 1", 0, "refuses this device"),
        # What ends early without a word has not been checked.
        ("exit 0", 1, "failed, exit status 0"),
        ("exec sleep 30", 1, "not done after 1 s"),
    ],
    ids=["clean", "found", "refused", "silent", "slow"],
)
@pytest.mark.skipif(not Path("/bin/sh").exists(), reason="there is no /bin/sh")
def test_what_a_checker_finds_fails_and_what_it_refuses_does_not(
    tmp_path: Path, script: str, status: int, told: str
) -> None:
    result = run_checkers(tmp_path / "bin", script, "--limit", "1" if "sleep" in script else "30")
    assert result.returncode == status, result.stdout + result.stderr
    assert told in result.stdout
    # One that fails keeps the next from nothing.
    assert "memcheck: " in result.stdout and "racecheck: " in result.stdout


def test_missing_checker_is_told(tmp_path: Path) -> None:
    if any(Path(folder, "compute-sanitizer").exists() for folder in ("/usr/bin", "/bin")):
        pytest.skip("there is a compute-sanitizer")
    result = run_checkers(tmp_path / "bin", None)
    assert result.returncode == 0 and result.stdout.count("not checked, there is no compute-sanitizer") == 2


def test_checked_program_loads_no_more_than_the_operators() -> None:
    program = (
        f"import sys; sys.path.insert(0, {str(CHECKERS.parent)!r}); import sanitizer_cases\n"
        "print(sanitizer_cases.load_operators().KERNELS, 'transformers' in sys.modules)"
    )
    printed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert "wgmma_64x128" in printed and printed.strip().endswith("False")


# ----- The Makefile -----


@pytest.mark.skipif(not all(map(shutil.which, ["make", "timeout"])), reason="there is no make or no timeout")
@pytest.mark.parametrize("failing", ["--build", "pytest", "--tool", "benchmarks/gpu.py", "bert-large", None], ids=str)
def test_gpu_check_runs_every_part_and_tells_of_one_that_failed(tmp_path: Path, failing: str | None) -> None:
    log = tmp_path / "log"
    python = write_program(
        tmp_path / "python",
        'case "$*" in *get_device_name*) echo nvidia_h200; exit;; esac\n'
        f'echo "$*" >>{log}\ncase "$*" in *{failing or "nothing"}*) exit 1;; esac',
    )
    # What a make around the tests was told is not for this one.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    command = ["make", "gpu-check", f"PYTHON={python}"]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (result.returncode == 0) == (failing is None), result.stderr
    calls = log.read_text().splitlines()
    for call, word in zip(
        calls, ["--build", "pytest", "racecheck", "cuda_nvidia_h200.json", "bert-base", "bert-large"], strict=True
    ):
        assert word in call
