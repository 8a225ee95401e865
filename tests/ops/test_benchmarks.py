"""Benchmarks that call kernels themselves, on what is small or emulated."""

from __future__ import annotations

from pathlib import Path

import pytest
from programs import load

from hf_stompp.ops import cpu, cuda


BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def test_overhead_of_a_call_is_measured_on_the_record_that_the_operator_makes(
    native: cpu.NativeKernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = load(BENCHMARKS / "call_overhead.py")
    # Calls each function once, and tells what it returned.
    monkeypatch.setattr(program, "microseconds", lambda function: function())
    measured = program.measure_shape(native, 65, 33)
    assert measured["fp32"].shape == measured["operator"].shape == (1, 33)
    assert measured["native_function"] == measured["native_function_without_rows"] == 0


@pytest.mark.slow
def test_cases_of_the_sanitizers_run(emulated_cuda: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = load(BENCHMARKS / "sanitizer_cases.py")
    monkeypatch.setattr(program, "DEVICE", "cpu")
    native = cuda.NativeKernels(cuda.open_library(emulated_cuda), 0, stream=lambda device: 0)
    assert program.run_cases(cuda, native) > 300
