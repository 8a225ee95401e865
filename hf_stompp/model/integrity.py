"""
Checks of checkpoint files: whole, unaltered, complete.

Every tensor that is saved leaves its SHA-256 in the file's safetensors metadata, and no model is handed out before its
files have been checked against that. Nothing is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import struct
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor


logger = logging.getLogger(__name__)

METADATA_PREFIX = "sha256:"


def tensor_digest(tensor: Tensor) -> str:
    """SHA-256 of a tensor's dtype, shape and bytes, hexadecimal."""
    digest = hashlib.sha256(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def digests(state_dict: Mapping[str, Tensor]) -> dict[str, str]:
    """Safetensors metadata with the digest of every tensor of a state dict."""
    return {f"{METADATA_PREFIX}{name}": tensor_digest(tensor) for name, tensor in state_dict.items()}


def _first_cut_tensor(path: Path) -> str:
    """Name of the first tensor whose bytes the file does not hold, from its header."""
    content = path.read_bytes()
    if len(content) < 8:
        return "its header"
    (header_size,) = struct.unpack("<Q", content[:8])
    try:
        header = json.loads(content[8 : 8 + header_size])
        ends = {name: int(entry["data_offsets"][1]) for name, entry in header.items() if name != "__metadata__"}
    except (ValueError, TypeError, KeyError, IndexError, AttributeError):
        return "its header"
    cut = [name for name in sorted(ends, key=ends.__getitem__) if 8 + header_size + ends[name] > len(content)]
    return f"tensor {cut[0]!r} and {len(cut) - 1} more" if cut else "its header"


def verify_files(files: Iterable[str | Path]) -> dict[str, Path]:
    """
    Checks checkpoint files.

    Args:
        files (`Iterable[str | Path]`): safetensors files; others raise.

    Returns:
        `dict[str, Path]`: tensor name -> the file that holds it.

    Raises:
        ValueError: a file is not safetensors, is cut, or holds a tensor that was altered or a mask that is not
            boolean; names the tensor.
    """
    return start_verification(files).result()


def start_verification(files: Iterable[str | Path]) -> Future[dict[str, Path]]:
    """
    [`verify_files`] of which the longer part, hashing, runs in a thread of its own while the model is loaded.

    Args:
        files (`Iterable[str | Path]`): safetensors files; others raise.

    Returns:
        `Future[dict[str, Path]]`: its `result()` is what `verify_files` returns, or raises for a tensor that was
            altered.

    Raises:
        ValueError: a file is not safetensors, or is cut.
    """
    paths = [Path(file) for file in files]
    names: dict[str, Path] = {}
    for path in paths:
        if path.suffix != ".safetensors":
            raise ValueError(
                f"{path}: only safetensors files are read, never pickles; save the model again with save_pretrained"
            )
        try:
            with safe_open(path, framework="pt") as handle:
                names.update(dict.fromkeys(handle.keys(), path))
        except SafetensorError as error:
            raise ValueError(
                f"{path} is damaged: {_first_cut_tensor(path)} cannot be read ({error}); download or copy it again"
            ) from error
    executor = ThreadPoolExecutor(max_workers=1)
    future = executor.submit(_verify_tensors, paths, names)
    executor.shutdown(wait=False)
    return future


def _verify_tensors(files: Iterable[Path], names: dict[str, Path]) -> dict[str, Path]:
    for file in files:
        with safe_open(file, framework="pt") as handle:
            metadata = handle.metadata() or {}
            digest_of = {
                key.removeprefix(METADATA_PREFIX): digest
                for key, digest in metadata.items()
                if key.startswith(METADATA_PREFIX)
            }
            known = set(digest_of.values())
            for name in handle.keys():
                tensor = handle.get_tensor(name)
                _verify_tensor(name, tensor, {digest_of[name]} if name in digest_of else known, file)
    return names


def _verify_tensor(name: str, tensor: Tensor, allowed: set[str], file: Path) -> None:
    """`allowed`: its digest; all there are where Transformers saved it under another name than the model's."""
    if allowed and tensor_digest(tensor) not in allowed:
        raise ValueError(
            f"{file}: tensor {name!r} was altered after it was saved (its SHA-256 is not the one in the file's "
            f"metadata); download or "
            "copy the file again"
        )
    if name.endswith("freeze_mask") and (
        tensor.dtype != torch.bool or bool((tensor.flatten().view(torch.uint8) > 1).any())
    ):
        raise ValueError(
            f"{file}: freeze mask {name!r} is corrupted: it holds other values than 0 and 1; use another checkpoint"
        )


def last_whole_checkpoint(output_dir: str | Path) -> str | None:
    """
    The checkpoint of a training run to go on from: the last one that was written to its end. One that was not, because
    the run was killed meanwhile, is named in a warning.

    Args:
        output_dir (`str` or `Path`): of the run, with folders `checkpoint-<step>`.

    Returns:
        `str`, *optional*: the folder.
    """
    folders = {}
    for folder in Path(output_dir).glob("checkpoint-*"):
        step = re.fullmatch(r"checkpoint-(\d+)", folder.name, re.ASCII)
        if step is not None and folder.is_dir():
            folders[int(step[1])] = folder
    for _, folder in sorted(folders.items(), reverse=True):
        try:
            checkpoint_files(folder)
            # Transformers writes it last.
            json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            logger.warning("%s was not written to its end, and is passed over: %s", folder, error)
        else:
            return str(folder)
    return None


def checkpoint_files(folder: str | Path) -> list[Path]:
    """
    The safetensors files of a model folder, sharded or not.

    Raises:
        ValueError: there are none, or a shard is missing.
    """
    folder = Path(folder)
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{index} is damaged ({error!r}); download or copy the folder again") from error
        missing = [shard for shard in shards if not (folder / shard).is_file()]
        if missing:
            raise ValueError(
                f"{folder}: the index names {missing}, which are not there; download or copy the folder again"
            )
        return [folder / shard for shard in shards]
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    raise ValueError(f"{folder} holds no model.safetensors")
