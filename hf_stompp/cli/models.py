"""Reads models for the commands: what they are, without their weights where that will do."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import huggingface_hub
import torch
import transformers
from huggingface_hub import snapshot_download
from transformers import AutoConfig, PreTrainedConfig

from ..config import QUANT_METHOD, StoMPPConfig
from ..model.modules import frozen_counts, masked_modules
from .errors import CommandError, hub_errors


if TYPE_CHECKING:
    # It takes longer to import than --help should take.
    from transformers import PreTrainedModel


WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json")

TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "chat_template*",
    "preprocessor_config.json",
    "processor_config.json",
)
"""What turns texts or images into inputs: copied from model to model as it is."""


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """
    Within the block, keeps the notes of Transformers off stderr, where a command's only line is its error. Where
    nobody is watching, also what the Hub's client says while it tries again, and progress bars.
    """
    loggers = [transformers.logging] if sys.stderr.isatty() else [transformers.logging, huggingface_hub.logging]
    before = [logger.get_verbosity() for logger in loggers]

    def bar(factory: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        return factory(*args, **{**options, "delay": 2, "leave": False, "disable": None})

    hook = transformers.logging.set_tqdm_hook(bar)
    try:
        for logger in loggers:
            logger.set_verbosity_error()
        yield
    finally:
        transformers.logging.set_tqdm_hook(hook)
        for logger, verbosity in zip(loggers, before, strict=True):
            logger.set_verbosity(verbosity)


def read_config(model: str) -> PreTrainedConfig:
    """The configuration of a model, a folder or a name on the Hub."""
    folder = Path(model).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise CommandError(f"{model} has no config.json: name a folder that save_pretrained wrote")
        for path in [folder / "config.json", *folder.glob("*.safetensors")]:
            if not os.access(path, os.R_OK):
                # The readers would call it missing or damaged.
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
    elif folder.is_file():
        raise CommandError(f"{model} is a file: name the folder it is in")
    elif folder.is_absolute() or model.count("/") > 1 or model.startswith((".", "~")):
        raise CommandError(f"there is no folder {model}: check the path, or give a name on the Hub, user/model")
    with hub_errors("model", model):
        return AutoConfig.from_pretrained(folder if folder.is_dir() else model, trust_remote_code=False)


def state_of(config: PreTrainedConfig, model: str) -> str:
    """`"float"`, `"latent"` or `"packed"`; any other quantization is refused. `model` is the name in messages."""
    quantization: Any = getattr(config, "quantization_config", None)
    if quantization is None:
        return "float"
    fields = quantization if isinstance(quantization, dict) else quantization.to_dict()
    if fields.get("quant_method") != QUANT_METHOD:
        raise CommandError(
            f"{model} is quantized by {fields.get('quant_method')}: name the float model that it was made from"
        )
    return StoMPPConfig(**fields).state


def model_class(config: PreTrainedConfig, model: str) -> type[PreTrainedModel]:
    """The class of Transformers that a checkpoint was saved from; `model` is the name in messages."""
    from transformers import PreTrainedModel

    name = first_architecture(config)
    if name is None:
        raise CommandError(
            f"the config.json of {model} names no model class: save the model with save_pretrained, or set "
            '"architectures" to a list such as ["BertForSequenceClassification"]'
        )
    found = getattr(transformers, name, None)
    if not (isinstance(found, type) and issubclass(found, PreTrainedModel)):
        raise CommandError(
            f"{model} is a {name}, which this Transformers does not have as a class of models: upgrade transformers, "
            "or load it in Python (this command runs no code from a repository)"
        )
    return found


def first_architecture(config: PreTrainedConfig) -> str | None:
    """The name of the class that a checkpoint was saved from; None where its config names none."""
    names: Any = config.architectures
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        return None
    return names[0]


def load(model: str, config: PreTrainedConfig) -> PreTrainedModel:
    """A model with its weights, each of which the checkpoint must hold; an error names one that is missing."""
    made_by: Any = model_class(config, model)
    with hub_errors("model", model):
        loaded, report = made_by.from_pretrained(
            Path(model).expanduser() if Path(model).expanduser().is_dir() else model, output_loading_info=True
        )
    missing = sorted(report["missing_keys"])
    if missing:
        raise CommandError(
            f"{model} lacks {missing[0]}{f' and {len(missing) - 1} more' if len(missing) > 1 else ''}, which a "
            f"{type(loaded).__name__} has: train it first, or name another checkpoint"
        )
    return loaded.eval()


def empty_model(config: PreTrainedConfig, model: str, device: str) -> PreTrainedModel:
    """
    A float model of a checkpoint's shapes and dtype, with none of its weights. On the device `"meta"`, nothing is
    computed or allocated; `model` is the name in messages.
    """
    with torch.device(device):
        made: Any = model_class(config, model)(config)
    dtype: Any = config.dtype
    return made.eval().to(dtype if isinstance(dtype, torch.dtype) else torch.float32)


def local_folder(model: str) -> Path:
    """A model's folder: itself, or the one in the cache that its weights and tokenizer are downloaded to."""
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    with hub_errors("model", model):
        return Path(snapshot_download(model, allow_patterns=["config.json", *WEIGHT_FILES, *TOKENIZER_FILES]))


def frozen_fractions(model: PreTrainedModel) -> dict[str, float]:
    """Share of a latent model's entries that are frozen, by unit; empty for a float or packed model."""
    config: Any = getattr(model.config, "quantization_config", None)
    if config is None or not masked_modules(model):
        return {}
    return {unit: frozen / entries for unit, (frozen, entries) in frozen_counts(model, config).items()}


def megabytes(count: float) -> str:
    """A size for people: 10^6 bytes are 1 MB."""
    return f"{count / 1e6:,.2f} MB"
