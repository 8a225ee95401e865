"""Where something was measured, and how: the machine, versions, the command."""

from __future__ import annotations

import os
import platform
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import transformers

from .version import __version__


def processor() -> dict[str, Any]:
    """Name and vector instructions of the processor, as the system tells them."""
    information = Path("/proc/cpuinfo")
    fields: dict[str, str] = {}
    if information.exists():
        lines = information.read_text(encoding="utf-8").split("\n\n")[0].splitlines()
        fields = {line.split(":")[0].strip(): line.partition(":")[2].strip() for line in lines}
    flags = fields.get("flags", fields.get("Features", "")).split()
    wanted = ("avx", "amx", "f16c", "fma", "popcnt", "asimd", "sve")
    return {
        "name": fields.get("model name") or platform.processor() or platform.machine(),
        "family_model_stepping": [fields.get(key) for key in ("cpu family", "model", "stepping")],
        "flags": [flag for flag in flags if flag.startswith(wanted)],
        "cores": os.cpu_count(),
    }


def surroundings() -> dict[str, Any]:
    """What a result file must say of where it was made: `machine` and `versions`."""
    found = processor()
    return {
        "machine": {
            "platform": platform.platform(),
            "cpu": found["name"],
            "processor": found,
            "threads": torch.get_num_threads(),
            "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        },
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "hf_stompp": __version__,
            "mkl": torch.backends.mkl.is_available(),
            "onednn": torch.backends.mkldnn.is_available(),
        },
    }


def command_line(words: Iterable[str]) -> str:
    """
    A command as a result file has it, quoted for a shell. Absolute paths, also those behind a `=`, would tell whose
    machine it was: only their last part stays.
    """
    return shlex.join(map(_without_folders, words))


def _without_folders(word: str) -> str:
    """A word whose absolute path, if it has one, is cut to its last part."""
    name, equals, path = ("", "", word) if Path(word).is_absolute() else word.partition("=")
    return f"{name}{equals}{Path(path).name}" if Path(path).is_absolute() else word
