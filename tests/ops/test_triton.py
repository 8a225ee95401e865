from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest


# Where the Makefile puts Triton, out of reach of torch.
BESIDE = Path(sys.prefix) / "triton"


@pytest.mark.slow
def test_kernels_interpreted_on_the_cpu_equal_the_reference() -> None:
    if importlib.util.find_spec("triton") is None and not BESIDE.is_dir():
        pytest.skip("Triton is not installed")
    path = os.pathsep.join(filter(None, [str(BESIDE), os.environ.get("PYTHONPATH")]))
    tests = str(Path(__file__).with_name("interpreted_triton.py"))
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", tests],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "82 passed" in result.stdout
