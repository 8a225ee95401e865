"""Libraries that are built on first use: whose folders and files are trusted, and what a fork does to the locks."""

from __future__ import annotations

import ctypes
import hashlib
import os
import signal
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from hf_stompp.ops.build import BuildError, find_compiler
from hf_stompp.ops.native import loading_lock, open_or_build


ANOTHER_USER = 12345
FOREIGN = 99
needs_another_user = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")


def compile_library(folder: Path, number: int, mark: Path) -> Path:
    """A library whose `number()` is this, and which leaves a file where it is loaded."""
    try:
        compiler = find_compiler()
    except BuildError as error:
        pytest.skip(str(error))
    source, library = folder / f"{number}.c", folder / f"{number}.so"
    source.write_text(
        f"#include <stdio.h>\nint number(void) {{ return {number}; }}\n"
        f'__attribute__((constructor)) static void load(void) {{ fclose(fopen("{mark}", "w")); }}\n'
    )
    subprocess.run([*compiler, "-shared", "-fPIC", str(source), "-o", str(library)], check=True)
    return library


@dataclass
class Cache:
    """A cache with a library that numbers itself 1, and others that may come to its place."""

    root: Path
    work: Path
    built: list[Path] = field(default_factory=list)
    refused: list[int] = field(default_factory=list)

    @property
    def mark(self) -> Path:
        return self.work / "loaded"

    @property
    def library(self) -> Path:
        [path] = self.root.glob("cpu-*/library.so")
        return path

    def build(self, target: Path) -> None:
        # A library that is loaded must not be written to.
        compile_library(self.work, len(self.built) + 1, self.mark).replace(target)
        self.built.append(target)

    def plant(self) -> None:
        """Puts another in its place, which was never loaded, with its digest."""
        content = compile_library(self.work, FOREIGN, self.mark).read_bytes()
        self.library.unlink()
        self.built[0].write_bytes(content)
        self.library.with_suffix(".sha256").write_text(hashlib.sha256(content).hexdigest())

    def open_library(self, path: Path, handle: int | None) -> ctypes.CDLL:
        library = ctypes.CDLL(str(path), handle=handle)
        if library.number() in self.refused:
            raise OSError("of other sources")
        return library

    def open(self) -> int:
        """The number of the library that is loaded."""
        return open_or_build("cpu", "key", "library.so", self.open_library, self.build).number()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cache:
    (tmp_path / "work").mkdir()
    made = Cache(tmp_path / "new" / "cache", tmp_path / "work")
    monkeypatch.setenv("HF_STOMPP_CACHE", str(made.root))
    assert made.open() == 1
    made.mark.unlink()
    return made


def give_away(path: Path) -> None:
    os.chown(path, ANOTHER_USER, ANOTHER_USER)


def open_to_all(path: Path) -> None:
    path.chmod(0o777)


def open_to_the_group(path: Path) -> None:
    path.chmod(0o770)


UNTRUSTED = [pytest.param(give_away, marks=needs_another_user), open_to_all, open_to_the_group]


@pytest.mark.parametrize("place", ["root", "folder"])
@pytest.mark.parametrize("change", UNTRUSTED)
def test_nothing_is_loaded_from_or_built_in_a_folder_that_others_can_write_to(
    cache: Cache, change: Callable[[Path], None], place: str
) -> None:
    cache.plant()
    folder = cache.root if place == "root" else cache.library.parent
    change(folder)
    with pytest.raises(OSError, match=f"{folder} belongs to another user or can be written to by others.*HF_STOMPP"):
        cache.open()
    assert not cache.mark.exists() and len(cache.built) == 1


@pytest.mark.parametrize("change", UNTRUSTED)
def test_a_library_that_others_can_write_to_is_built_anew_and_not_loaded(
    cache: Cache, change: Callable[[Path], None]
) -> None:
    cache.plant()
    change(cache.library)
    assert cache.open() == 2


def test_a_link_in_the_place_of_a_library_is_not_followed(cache: Cache) -> None:
    cache.plant()
    elsewhere = cache.library.rename(cache.work / "elsewhere.so")
    cache.built[0].symlink_to(elsewhere)
    assert cache.open() == 2
    assert not cache.library.is_symlink()


def test_a_library_that_does_not_fit_makes_way_for_the_one_that_is_built(cache: Cache) -> None:
    # The loader knows libraries by their names: what is loaded under the same one is the old library again.
    for last in (1, 2):
        cache.refused.append(last)
        assert cache.open() == last + 1


def test_a_library_of_this_user_in_a_folder_of_its_own_is_loaded(cache: Cache) -> None:
    cache.plant()
    assert cache.open() == FOREIGN and cache.mark.exists()


@pytest.mark.parametrize("damage", [b"", b"\xff" * 64])
def test_a_digest_that_is_damaged_is_made_anew(cache: Cache, damage: bytes) -> None:
    cache.library.with_suffix(".sha256").write_bytes(damage)
    assert cache.open() == 2


def test_folders_are_their_users_alone_whatever_the_umask_is(
    tmp_path: Path, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = Cache(tmp_path / "other" / "cache", cache.work)
    monkeypatch.setenv("HF_STOMPP_CACHE", str(other.root))
    before = os.umask(0)
    try:
        assert other.open() == 1
    finally:
        os.umask(before)
    assert [path.stat().st_mode & 0o077 for path in (other.root, other.library.parent, other.library)] == [0, 0, 0]
    # And the next process takes what this one has built.
    assert other.open() == 1 and len(other.built) == 1


def test_a_cache_behind_a_link_is_used(tmp_path: Path, cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "link").symlink_to(cache.root)
    monkeypatch.setenv("HF_STOMPP_CACHE", str(tmp_path / "link"))
    assert cache.open() == 1 and len(cache.built) == 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are not forked here")
def test_a_child_does_not_wait_for_a_lock_that_its_parent_held() -> None:
    with loading_lock():
        child = os.fork()
        if child == 0:
            signal.alarm(5)
            with loading_lock():
                os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
