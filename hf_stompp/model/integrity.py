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
import zipfile
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor


logger = logging.getLogger(__name__)

METADATA_PREFIX = "sha256:"

DTYPES = {"freeze_mask": (torch.bool,), "packed_weight": (torch.uint8,), "int8_weight": (torch.int8,)}
"""What tensors of these names are stored as. Transformers would cast others to it without a word."""

FLOATS = ("scale", "threshold", "shift")
"""Names of tensors that are stored as one of the floating point types."""

RESUMED_FROM = ("optimizer.pt", "scheduler.pt", "rng_state*.pth")
"""Files of a checkpoint without which a run that is resumed would not be the one that was stopped."""

SCALER = "scaler.pt"
"""One more of a run in float16, which scales its loss."""


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
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            (header_size,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(min(header_size, size)))
        ends = {name: int(entry["data_offsets"][1]) for name, entry in header.items() if name != "__metadata__"}
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError, RecursionError, struct.error):
        return "its header"
    cut = [name for name in sorted(ends, key=ends.__getitem__) if 8 + header_size + ends[name] > size]
    return f"tensor {cut[0]!r} and {len(cut) - 1} more" if cut else "its header"


def verify_files(files: Iterable[str | Path]) -> dict[str, Path]:
    """
    Checks safetensors files, and returns the file of each tensor by the tensor's name. Raises a `ValueError` for a
    file that is not safetensors or is cut, and for a tensor that was altered, is in another file too, or has a type
    that its name rules out.
    """
    paths = [Path(file) for file in files]
    names = _names_in(paths)
    _verify_tensors(paths)
    return names


class Verification:
    """
    [`verify_files`] for files that are loaded meanwhile: the longer part, hashing, runs in a thread of its own. A file
    that is not safetensors, or is cut, raises a `ValueError` at once. `files` has the file of each tensor by its name.
    """

    def __init__(self, files: Iterable[str | Path]) -> None:
        paths = [Path(file) for file in files]
        self._states = {path: _state_of(path) for path in paths}
        self.files = _names_in(paths)
        for path in paths:
            with safe_open(path, framework="pt") as handle:
                if not any(key.startswith(METADATA_PREFIX) for key in handle.metadata() or {}):
                    logger.warning("%s holds no digests: nothing tells whether it was altered after saving", path)
        executor = ThreadPoolExecutor(max_workers=1)
        self._hashing = executor.submit(_verify_tensors, paths)
        executor.shutdown(wait=False)

    def finish(self) -> None:
        """
        Waits for the hashes. To be called when all that was read is in memory of its own. Raises a `ValueError` if a
        tensor was altered, or a file was written while it was read.
        """
        self._hashing.result()
        for path, state in self._states.items():
            if _state_of(path) != state:
                raise ValueError(
                    f"{path} was replaced or written while it was loaded: load it again. To update a model in use, "
                    "write a new folder, then rename it"
                )


def _state_of(path: Path) -> tuple[int, ...] | None:
    """Changes when a file is replaced or written."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _names_in(paths: Iterable[Path]) -> dict[str, Path]:
    names: dict[str, Path] = {}
    for path in paths:
        if path.suffix != ".safetensors":
            raise ValueError(
                f"{path}: only safetensors files are read, never pickles; save the model again with save_pretrained"
            )
        try:
            with safe_open(path, framework="pt") as handle:
                keys = handle.keys()
        except FileNotFoundError:
            # safetensors says so of a file that may not be read, too.
            path.open("rb").close()
            raise
        except SafetensorError as error:
            raise ValueError(
                f"{path} is damaged: {_first_cut_tensor(path)} cannot be read ({error}); download or copy it again"
            ) from error
        for name in keys:
            if name in names:
                raise ValueError(
                    f"{path} and {names[name]} both hold a tensor {name!r}: they are not of one model; download or "
                    "copy the folder again"
                )
            names[name] = path
    return names


def _verify_tensors(files: Iterable[Path]) -> None:
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


def _verify_tensor(name: str, tensor: Tensor, allowed: set[str], file: Path) -> None:
    """`allowed`: its digest; all there are where Transformers saved it under another name than the model's."""
    if allowed and tensor_digest(tensor) not in allowed:
        raise ValueError(
            f"{file}: tensor {name!r} was altered after it was saved (its SHA-256 is not the one in the file's "
            "metadata); download or copy the file again"
        )
    kind = name.rpartition(".")[2]
    if tensor.dtype not in DTYPES.get(kind, (tensor.dtype,)) or (kind in FLOATS and not tensor.is_floating_point()):
        raise ValueError(
            f"{file}: tensor {name!r} is corrupted: it is {tensor.dtype}, which a {kind} never is; download or copy "
            "the file again"
        )
    if kind == "freeze_mask" and bool((tensor.flatten().view(torch.uint8) > 1).any()):
        raise ValueError(
            f"{file}: tensor {name!r} is corrupted: it holds other values than 0 and 1; use another checkpoint"
        )


def last_whole_checkpoint(output_dir: str | Path, world_size: int = 1, scales_loss: bool = False) -> str | None:
    """
    The checkpoint of a training run to go on from: the last one that was written to its end. One that was not, because
    the run was killed meanwhile, is named in a warning. `output_dir` holds folders `checkpoint-<step>`; the other
    arguments are those of [`check_whole`].
    """
    folders = {}
    for folder in Path(output_dir).glob("checkpoint-*"):
        step = re.fullmatch(r"checkpoint-(\d+)", folder.name, re.ASCII)
        if step is not None and folder.is_dir():
            folders[int(step[1])] = folder
    for _, folder in sorted(folders.items(), reverse=True):
        try:
            check_whole(folder, world_size, scales_loss)
        except (OSError, ValueError) as error:
            logger.warning("%s was not written to its end, and is passed over: %s", folder, error)
        else:
            return str(folder)
    return None


def check_whole(folder: Path, world_size: int = 1, scales_loss: bool = False) -> dict[str, Path]:
    """
    Checks that a checkpoint of a Trainer holds all that a run goes on from, its weights unaltered, and returns the
    file of each tensor by the tensor's name. Each of `world_size` processes has a random state; `scales_loss` says
    that the run has a `GradScaler`, as in float16. The `ValueError` names what is missing, cut or altered.
    """
    names = verify_files(checkpoint_files(folder))
    # One process writes one without a number: nothing is missing there, and the Trainer refuses other processes.
    is_of_one = world_size == 1 or (folder / "rng_state.pth").is_file()
    states = () if is_of_one else (f"rng_state_{rank}.pth" for rank in range(world_size))
    for pattern in (*RESUMED_FROM, *states, *([SCALER] if scales_loss else [])):
        files = sorted(folder.glob(pattern))
        if not files:
            raise ValueError(
                f"{folder} holds no {pattern}: a run that goes on from it would not be the one that was stopped (was "
                "it saved with save_only_model, or by fewer processes?); use another checkpoint, or start a new run "
                "from its weights"
            )
        for file in files:
            if not zipfile.is_zipfile(file):
                raise ValueError(f"{file} is damaged or was not written to its end; use another checkpoint")
    for name in ("config.json", "trainer_state.json"):
        read_json(folder / name)
    return names


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of a checkpoint; raises a `ValueError` if that is missing or holds something else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read ({error}): the checkpoint is incomplete; use another one") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds no JSON object: the checkpoint is damaged; use another one")
    return found


def checkpoint_files(folder: str | Path) -> list[Path]:
    """
    The safetensors files of a model folder, sharded or not. Raises a `ValueError` if there are none, a shard is
    missing, or the index is damaged.
    """
    folder = Path(folder)
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            outside = [shard for shard in shards if Path(shard).name != shard]
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise ValueError(f"{index} is damaged ({error!r}); download or copy the folder again") from error
        if outside:
            raise ValueError(
                f"{index} names {outside[0]!r}, which is not a file of its folder: do not use this folder"
            )
        missing = [shard for shard in shards if not (folder / shard).is_file()]
        if missing:
            raise ValueError(
                f"{folder}: the index names {missing}, which are not there; download or copy the folder again"
            )
        return [folder / shard for shard in shards]
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    raise ValueError(f"{folder} holds no model.safetensors")
