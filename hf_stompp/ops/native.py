"""Native libraries: where those that are built on first use are kept, how they come there, and what they are given."""

from __future__ import annotations

import ctypes
import hashlib
import os
import struct
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import Tensor


# enum hf_stompp_dtype; and enum hf_stompp_cuda_dtype, which has the floats alone.
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.uint8: 3}

_NUMBERS: dict[Any, int] = {None: 0, **DTYPES}


def call(function: Callable[[bytes], int], layout: struct.Struct, fields: Iterable[Any]) -> int:
    """
    Calls a function of a library on a record, whose fields have 64 bits, and returns the status.

    Fields are numbers; dtypes, which have one; tensors, for the address of their elements (of a copy, where they are
    not dense); None for the address NULL.
    """
    numbers, dense = [], []
    for value in fields:
        if isinstance(value, Tensor):
            # A copy must live until the call returns.
            dense.append(value.contiguous())
            numbers.append(dense[-1].data_ptr())
        else:
            numbers.append(_NUMBERS[value] if value is None or isinstance(value, torch.dtype) else value)
    return function(layout.pack(*numbers))


_lock = threading.Lock()


def loading_lock() -> threading.Lock:
    """What a thread holds while it finds or builds what this process loads once; not to be taken twice."""
    return _lock


def _renew_lock() -> None:
    global _lock
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    # In a child no thread is left that would release it.
    os.register_at_fork(after_in_child=_renew_lock)


def cache_folder() -> Path:
    """
    Where libraries built on first use are kept: `HF_STOMPP_CACHE`, or `hf_stompp` in the user's cache folder. Raises
    an OSError if the user has no home folder, and the variable names none.
    """
    named = os.environ.get("HF_STOMPP_CACHE")
    try:
        if named:
            return Path(named).expanduser()
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hf_stompp"
    except RuntimeError as error:
        raise OSError(f"no folder to compile them in: {error}; name one in HF_STOMPP_CACHE") from error


def check_origin(native: ctypes.CDLL, prefix: str, source_hash: str) -> None:
    """
    Checks that a library, whose functions' names begin with `prefix`, was built from the sources of this package.
    Raises an OSError if it was built from others, or is no library of ours.
    """
    try:
        hash_of = getattr(native, f"{prefix}_source_hash")
        hash_of.restype = ctypes.c_char_p
    except AttributeError as error:
        raise OSError(f"{native._name} is no library of hf_stompp ({error})") from error
    if hash_of().decode() != source_hash:
        raise OSError(f"{native._name} was built from other sources than those of this hf_stompp")


OpenLibrary = Callable[[Path, int | None], ctypes.CDLL]
"""Declares the functions of the library at a path; given a handle, of the one that is loaded already."""


def _check_private(path: Path, found: os.stat_result) -> None:
    """Refuses what other users may have put there: code in it would run as this one."""
    if hasattr(os, "geteuid") and (found.st_uid not in (0, os.geteuid()) or found.st_mode & 0o022):
        raise OSError(
            f"{path} belongs to another user or can be written to by others, and no code is run from there: "
            "`chmod go-w` it, or name a folder of your own in HF_STOMPP_CACHE"
        )


def _check_folders(target: Path) -> None:
    """Checks the folder of a library and the cache that it is in."""
    for folder in (target.parent.parent, target.parent):
        _check_private(folder, folder.lstat())


def _open_checked(path: Path, open_library: OpenLibrary) -> ctypes.CDLL:
    """Opens a file that may be damaged, where to load half a library would end the process, or not be ours."""
    _check_folders(path)
    digest = path.with_suffix(".sha256").read_bytes()
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0))
    try:
        _check_private(path, os.fstat(descriptor))
        with open(descriptor, "rb", closefd=False) as file:
            if hashlib.sha256(file.read()).hexdigest().encode() != digest:
                raise OSError(f"{path} is damaged")
        name = Path(f"/proc/self/fd/{descriptor}")
        if not name.exists():
            if not os.path.samestat(os.fstat(descriptor), path.lstat()):
                raise OSError(f"{path} was replaced while it was read: try again")
            name = path
        handle = ctypes.CDLL(str(name))._handle
    except OSError:
        os.close(descriptor)
        raise
    # The descriptor stays open: the loader takes a name that it has seen before for the same library.
    return open_library(path, handle)


def open_or_build(
    kind: str, key: str, name: str, open_library: OpenLibrary, build: Callable[[Path], object]
) -> ctypes.CDLL:
    """
    A library from the cache, built there where it is missing. The name of its folder begins with `kind`, and `key` is
    all that it depends on. `open_library` raises an OSError for one that does not fit, `build` writes it to a path.

    Raises an OSError if the cache cannot be written, others can write to it, or what was built cannot be loaded, and
    what `build` raises.
    """
    # Without links, which might lead elsewhere after the check.
    cache = Path(os.path.realpath(cache_folder()))
    target = cache / f"{kind}-{hashlib.sha256(key.encode()).hexdigest()[:16]}" / name
    try:
        # Without the lock, which needs permission to write.
        return _open_checked(target, open_library)
    except OSError:
        cache.mkdir(mode=0o700, parents=True, exist_ok=True)
        target.parent.mkdir(mode=0o700, exist_ok=True)
        _check_folders(target)
    with FileLock(target.parent / "lock"):
        try:
            # Another process may have built it meanwhile.
            return _open_checked(target, open_library)
        except OSError:
            build(target)
            # Whatever the umask is.
            target.chmod(0o700)
            digest = hashlib.sha256(target.read_bytes()).hexdigest()
            target.with_suffix(".sha256").write_text(digest, encoding="ascii")
        return _open_checked(target, open_library)
