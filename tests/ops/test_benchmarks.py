"""Benchmarks that call kernels themselves, on what is small or emulated."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from hf_stompp.ops import cpu, cuda


def load(name: str) -> ModuleType:
    path = Path(__file__).resolve().parents[2] / "benchmarks" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", path)
    assert spec is not None and spec.loader is not None
    program = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(program)
    return program


def test_overhead_of_a_call_is_measured_on_the_record_that_the_operator_makes(
    native: cpu.NativeKernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = load("call_overhead")
    # Calls each function once, and tells what it returned.
    monkeypatch.setattr(program, "microseconds", lambda function: function())
    measured = program.measure_shape(native, 65, 33)
    assert measured["fp32"].shape == measured["operator"].shape == (1, 33)
    assert measured["native_function"] == measured["native_function_without_rows"] == 0


@pytest.mark.slow
def test_cases_of_the_sanitizers_run(emulated_cuda: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = load("sanitizer_cases")
    monkeypatch.setattr(program, "DEVICE", "cpu")
    native = cuda.NativeKernels(cuda.open_library(emulated_cuda), 0, stream=lambda device: 0)
    assert program.run_cases(cuda, native) > 300
