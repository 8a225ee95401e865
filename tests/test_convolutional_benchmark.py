"""The benchmark of a packed ResNet-18: it runs, and its page quotes its file."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from programs import load


ROOT = Path(__file__).resolve().parent.parent


def test_benchmark_times_both_models_in_both_formats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    convolutional = load(ROOT / "benchmarks" / "convolutional.py")
    output = tmp_path / "times.json"
    monkeypatch.setattr(sys, "argv", ["convolutional", "--output", str(output), "--size", "32", "--rounds", "1"])

    convolutional.main()

    result = json.loads(output.read_text())
    assert set(result["seconds"]) == {
        f"{model}_{form}" for model in ("fp32", "packed") for form in ("contiguous", "channels_last")
    }
    assert set(result["packed_channels_last_over"]) == {"fp32_contiguous", "fp32_channels_last"}


def test_page_quotes_the_committed_times() -> None:
    result = json.loads((ROOT / "benchmarks" / "results" / "convolutional_amd_epyc_zen5.json").read_text())
    page = " ".join((ROOT / "docs" / "howto" / "convolutional_networks.md").read_text().split())

    for times in result["seconds"].values():
        assert f"{1e3 * times['median']:.1f} ms" in page
    fast, slow = (
        f"{result['packed_channels_last_over'][f'fp32_{form}']:.1f}" for form in ("channels_last", "contiguous")
    )
    assert f"{fast} and {slow} times as long" in page
