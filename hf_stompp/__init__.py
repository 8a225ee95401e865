"""
Binary BERT fine-tuning for Transformers: StoMPP (arXiv 2606.27759), packed 1-bit models.

Importing this package registers the loader, so that `from_pretrained` reads binarized and packed models.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .config import StoMPPConfig
from .model.adapters import register_lora
from .model.conversion import binarization_report, binarize, commit, pack, unpack
from .version import __version__


if TYPE_CHECKING:
    from .training.arguments import StoMPPTrainingArguments
    from .training.callbacks import MaskScheduler, ProgressionCallback
    from .training.trainer import StoMPPTrainer


__all__ = [
    "MaskScheduler",
    "ProgressionCallback",
    "StoMPPConfig",
    "StoMPPTrainer",
    "StoMPPTrainingArguments",
    "__version__",
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
    "StoMPPTrainingArguments": "arguments",
}


def __getattr__(name: str) -> Any:
    if name in _FOR_TRAINING:
        return getattr(importlib.import_module(f".training.{_FOR_TRAINING[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
