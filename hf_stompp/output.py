"""What is written: files that appear whole or not at all, copies that stay within a folder, text for a terminal."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """
    A file to write, which takes the place of another when the block ends well, and vanishes when it does not. Its
    folder must be there. A link is replaced, not followed.
    """
    with tempfile.TemporaryDirectory(prefix=".hf_stompp-", dir=path.parent) as folder:
        partial = Path(folder) / path.name
        yield partial
        partial.replace(path)


def write_json(path: Path, content: Any) -> None:
    """Writes a JSON file, whole or not at all."""
    with replacing(path) as partial:
        partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def copy_file(path: Path, folder: Path, target: Path) -> None:
    """
    Copies a file of a folder that somebody else may have made, and nothing from outside of it. A link may lead to
    another file there, or, in the Hub's cache, to where that keeps the contents of files. Raises a ValueError where it
    leads elsewhere, or to no file.
    """
    found, root = path.resolve(), folder.resolve()
    allowed = [root]
    repository = root.parent.parent
    if root.parent.name == "snapshots" and repository.name.startswith("models--"):
        # Of the repository, and shared by several.
        allowed += [(repository / "blobs").resolve(), (repository.parent / "blobs").resolve()]
    if not found.is_file() or not any(map(found.is_relative_to, allowed)):
        raise ValueError(
            f"{path} leads to {found}, which is no file within {folder}: put the file itself there, or delete the link"
        )
    shutil.copyfile(found, target)


def bytes_of_weights(folder: Path | str) -> int:
    """Bytes of the safetensors files of a saved model."""
    return sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))


def text_columns(rows: Sequence[Sequence[str]], left: int = 0) -> list[str]:
    """Lines of a table, a header first: `left` columns are set to the left, those behind them to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(width) if position < left else cell.rjust(width)
            for position, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return [lines[0], "-" * len(lines[0]), *lines[1:]]


def printable(text: str) -> str:
    """A text in one line, with what would move a terminal's cursor or change its colours as Python escapes it."""
    return "".join(character if character.isprintable() else ascii(character)[1:-1] for character in text)
