"""Sentence encoders: what the folder of a Sentence Transformers model says, and the embeddings of texts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from torch import Tensor
from transformers import PreTrainedModel

from ..data.text import Text
from ..output import copy_file
from .distillation import POOLINGS, pooled


MODULES = "modules.json"

FILES = (MODULES, "config_sentence_transformers.json", "sentence_*_config.json", "[0-9]*_*/*")
"""What a Sentence Transformers model has beside its encoder: the list of its modules, and a folder for each."""


def modules_folder(model: str) -> Path | None:
    """
    The folder that holds the files of a Sentence Transformers model beside its encoder: itself, or the one in the
    cache that they are downloaded to. None for any other model.

    Args:
        model (`str`): a folder, or a name on the Hub.
    """
    folder = Path(model).expanduser()
    if not folder.is_dir():
        folder = Path(snapshot_download(model, allow_patterns=["config.json", *FILES]))
    return folder if (folder / MODULES).is_file() else None


def pooling_of(folder: Path) -> str:
    """
    How a Sentence Transformers model makes one embedding of a text's tokens.

    Args:
        folder (`Path`): from [`modules_folder`].

    Returns:
        `str`: a key of [`~hf_stompp.training.distillation.POOLINGS`].

    Raises:
        ValueError: it pools in another way, or the files do not say how.
    """
    file, modes = folder / MODULES, []
    try:
        modules = json.loads(file.read_text(encoding="utf-8"))
        path = next((entry["path"] for entry in modules if entry["type"].endswith("Pooling")), None)
        if path is not None:
            file = folder / path / "config.json"
            modes = _modes(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"how {folder} pools cannot be read from {file} ({error}): copy the folder again, or take {MODULES} out "
            "of it"
        ) from error
    if len(modes) != 1 or modes[0] not in POOLINGS:
        raise ValueError(
            f"{folder} is a sentence encoder that pools by {', '.join(modes) or 'nothing'}: only "
            f"{' or '.join(POOLINGS)} pooling can be distilled; without its {MODULES} it is taken for a plain encoder"
        )
    return modes[0]


def _modes(config: dict[str, Any]) -> list[str]:
    """Names of the ways of pooling, whichever version of Sentence Transformers wrote them."""
    if "pooling_mode" in config:
        mode = config["pooling_mode"]
        return [mode] if isinstance(mode, str) else [str(name) for name in mode]
    flags = [name for name, is_on in config.items() if name.startswith("pooling_mode_") and is_on]
    return [name.removeprefix("pooling_mode_").removesuffix("_tokens").removesuffix("_token") for name in flags]


def copy_modules(folder: Path, target: Path) -> None:
    """
    Makes the folder of an encoder that of a Sentence Transformers model.

    Args:
        folder (`Path`): from [`modules_folder`].
        target (`Path`): where the encoder was saved.

    Raises:
        ValueError: a file is a link that leads out of the folder.
    """
    for pattern in FILES:
        for path in folder.glob(pattern):
            if path.is_symlink() or not path.is_dir():
                copy = target / path.relative_to(folder)
                copy.parent.mkdir(exist_ok=True)
                copy_file(path, folder, copy)


def tokenize(tokenizer: Any, texts: Sequence[Text], max_length: int) -> dict[str, list[list[int]]]:
    """Token ids, and what else the tokenizer makes, of texts and pairs of texts; what is longer is cut off."""
    return dict(tokenizer(list(texts), truncation=True, max_length=max_length))


@torch.inference_mode()
def embed(
    model: PreTrainedModel,
    tokenizer: Any,
    texts: Sequence[Text],
    pooling: str = "mean",
    max_length: int = 128,
    batch_size: int = 32,
) -> Tensor:
    """
    Embeddings of texts.

    Args:
        model (`PreTrainedModel`): an encoder without a head; float, latent or packed.
        tokenizer (`PreTrainedTokenizerBase`).
        texts (`Sequence[str | tuple[str, str]]`): texts, or pairs of texts.
        pooling (`str`, *optional*, defaults to `"mean"`): a key of [`~hf_stompp.training.distillation.POOLINGS`].
        max_length (`int`, *optional*, defaults to 128): tokens of a text; the rest is cut off.
        batch_size (`int`, *optional*, defaults to 32).

    Returns:
        `Tensor` of shape `(len(texts), hidden_size)`: float32, on the CPU, not normalised.
    """
    model.eval()
    # Texts of like length share a batch, which wastes no time on padding.
    tokenized = tokenize(tokenizer, texts, max_length)
    order = sorted(range(len(texts)), key=lambda index: -len(tokenized["input_ids"][index]))
    embeddings = torch.empty(len(texts), model.config.hidden_size)
    for first in range(0, len(order), batch_size):
        rows = order[first : first + batch_size]
        batch = {name: [values[row] for row in rows] for name, values in tokenized.items()}
        inputs = tokenizer.pad(batch, return_tensors="pt").to(model.device)
        embeddings[rows] = pooled(model(**inputs).last_hidden_state, inputs["attention_mask"], pooling).cpu()
    return embeddings
