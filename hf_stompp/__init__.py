"""
Binary BERT fine-tuning for Transformers: StoMPP (arXiv 2606.27759), packed 1-bit models.

Importing this package registers the loader, so that `from_pretrained` reads binarized and packed models.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .adapters import register_lora
from .binarization import binarization_report, binarize, commit
from .config import StoMPPConfig
from .packing import pack, unpack


if TYPE_CHECKING:
    from .callbacks import MaskScheduler, ProgressionCallback
    from .trainer import StoMPPTrainer
    from .training_args import StoMPPTrainingArguments


__version__ = "0.1.0.dev0"

__all__ = [
    "MaskScheduler",
    "ProgressionCallback",
    "StoMPPConfig",
    "StoMPPTrainer",
    "StoMPPTrainingArguments",
    "binarization_report",
    "binarize",
    "commit",
    "pack",
    "register_lora",
    "unpack",
]

# Who only loads models should not wait for the Trainer, and what that needs.
_FOR_TRAINING = {
    "MaskScheduler": "callbacks",
    "ProgressionCallback": "callbacks",
    "StoMPPTrainer": "trainer",
    "StoMPPTrainingArguments": "training_args",
}


def __getattr__(name: str) -> Any:
    if name in _FOR_TRAINING:
        return getattr(importlib.import_module(f".{_FOR_TRAINING[name]}", __name__), name)
    if name in _FOR_TRAINING.values():
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
