"""Programs of the repository that are in no package: examples, benchmarks, and what tests start."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType


def write_program(path: Path, script: str) -> Path:
    """A shell script that can be run."""
    path.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    path.chmod(0o755)
    return path


def load(path: Path) -> ModuleType:
    """The program of a file as a module, made anew."""
    spec = importlib.util.spec_from_file_location(f"program_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Data classes and pydantic look their module up.
    sys.modules[spec.name] = module
    # As Python does: files beside a program can be imported.
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    spec.loader.exec_module(module)
    return module
