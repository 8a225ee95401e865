"""
Binary BERT fine-tuning for Transformers: StoMPP (arXiv 2606.27759), packed 1-bit models.

Importing this package registers the loader, so that `from_pretrained` reads binarized and packed models.
"""

from __future__ import annotations

from .binarization import binarization_report, binarize, commit
from .callbacks import MaskScheduler, ProgressionCallback
from .config import StoMPPConfig
from .packing import pack, unpack
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
    "unpack",
]
