"""Texts without labels: read from files, cut into sentences, and split into those to learn from and to measure on."""

from __future__ import annotations

import random
import re
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from .tables import READERS, read_table


LINES = ".txt"
"""Ending of files that hold a text a line. All others are tables, read by [`~hf_stompp.data.tables.read_table`]."""

COLUMNS = ("text", "sentence")
"""Columns that are taken for the text where several hold strings."""

Text: TypeAlias = str | tuple[str, str]
"""A text, or a pair of texts, which a tokenizer puts into one sequence."""

SENTENCE_END = re.compile(
    # Behind a mark and perhaps a closing quote or bracket; neither an initial nor before a lower-case letter.
    r"""(?:(?<=[.!?\u2026])|(?<=[.!?\u2026]["'\u201d\u2019)\]]))(?<!\b[A-Z]\.)\s+(?![a-z])"""
    # Chinese and Japanese have no space there.
    "|(?<=[\u3002\uff01\uff1f])"
)

SMALLEST_HELD_OUT = 200
"""So many texts are held out where they are no more than a fifth of all."""


def read_texts(files: Sequence[Path], columns: Sequence[str] = ()) -> list[Text]:
    """
    Reads texts, or pairs of texts. Those that are empty are dropped, and those that are there more than once are kept
    once. Where one text of a pair is empty, the other is a text alone.

    Args:
        files (`Sequence[Path]`): `.txt` with a text a line, or tables of the kinds in
            [`~hf_stompp.data.tables.READERS`].
        columns (`Sequence[str]`, *optional*):
            Of the tables: one that holds the text, or the two of a pair; found where one is clear.

    Returns:
        `list[str | tuple[str, str]]`: in the order of the files.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: more than two columns are named; or a file is of an unknown kind, empty, not UTF-8 or broken, has
            no such column or several that may be it, or there is no text in it.
    """
    if len(columns) > 2:
        raise ValueError(f"a text is one column or a pair of two, got {len(columns)}: choose two of --text_columns")
    texts: dict[Text, None] = {}
    for file in files:
        found = [text for text in map(_join, _read_file(file, columns)) if text]
        if not found:
            raise ValueError(f"{file} holds no text: every line or row of it is empty; drop it, or name another file")
        texts.update(dict.fromkeys(found))
    return list(texts)


def _join(row: Sequence[str]) -> Text:
    """A row of one or two values as a text or a pair; an empty text where all are empty."""
    first, *rest = [value for value in map(str.strip, row) if value] or [""]
    return (first, rest[0]) if rest else first


def _read_file(file: Path, columns: Sequence[str]) -> Iterable[Sequence[str]]:
    kinds = (LINES, *READERS)
    if file.suffix.lower() not in kinds:
        raise ValueError(f"{file} is not of a known kind: name a file that ends in {', '.join(kinds)}")
    if not file.is_file():
        raise FileNotFoundError(f"there is no file {file}: check the path")
    if file.stat().st_size == 0:
        raise ValueError(f"{file} is empty: drop it, or name another file")
    if file.suffix.lower() == LINES:
        return ((line,) for line in read_lines(file))
    if file.suffix.lower() != ".parquet":
        # The readers of tables do not tell the line.
        for _ in read_lines(file):
            pass
    return _read_columns(file, columns)


def read_lines(file: Path) -> Iterator[str]:
    """The lines of a UTF-8 file, with or without a byte order mark; of others a ValueError names line and byte."""
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{file} is not UTF-8: byte 0x{line[error.start]:02x} at {error.start + 1} of line {number}; "
                    "convert it, as by `iconv -f latin1 -t utf-8`"
                ) from error


def _read_columns(file: Path, columns: Sequence[str]) -> list[Sequence[str]]:
    with tempfile.TemporaryDirectory() as cache:
        table = read_table([file], cache_dir=cache)
        names = [text_column(table, file, name) for name in columns] or [text_column(table, file)]
        # They lie in the folder that ends here.
        return list(zip(*([value or "" for value in table[name][:]] for name in names), strict=True))


def text_column(table: Any, source: Path | str, column: str | None = None) -> str:
    """
    The column of a table that holds text: `column`, or the only one that may be meant. Raises a ValueError where it is
    missing, holds no text, or is not clear; `source` is the name of the table in messages.
    """
    kinds = {name: getattr(feature, "dtype", None) for name, feature in table.features.items()}
    strings = [name for name, kind in kinds.items() if kind in ("string", "large_string")]
    if column is not None:
        if column not in kinds:
            raise ValueError(f"{source} has no column {column!r}: it has {', '.join(kinds)}; name one of them")
        if column not in strings:
            raise ValueError(f"column {column!r} of {source} holds {kinds[column] or 'something else'}, not text")
        return column
    if not strings:
        raise ValueError(f"{source} has no column with text: it has {', '.join(kinds)}")
    known = [name for name in COLUMNS if name in strings]
    if not known and len(strings) > 1:
        raise ValueError(
            f"which column of {source} holds the text is not clear: name one of {', '.join(strings)} with "
            "--text_columns, or the two that make a pair"
        )
    return (known or strings)[0]


def split_sentences(text: str) -> list[str]:
    """
    Cuts a text into sentences, by a plain regular expression: behind `.`, `!` or `?` and a space, unless a lower-case
    letter follows or a capital stands alone before the full stop. Some abbreviations are taken for an end.

    Returns:
        `list[str]`: none of them empty.
    """
    return [sentence for sentence in map(str.strip, SENTENCE_END.split(text)) if sentence]


def hold_out(
    texts: Sequence[Text], share: float, seed: int, max_texts: int | None = None
) -> tuple[list[Text], list[Text]]:
    """
    Shuffles texts and splits them.

    Args:
        texts (`Sequence[str | tuple[str, str]]`): at least two.
        share (`float`): of the texts to hold out, in (0, 1). More are where that makes less than
            [`SMALLEST_HELD_OUT`], but then no more than a fifth.
        seed (`int`): of the order.
        max_texts (`int`, *optional*): take so many of them, and leave the rest.

    Returns:
        `tuple(list, list)`: what to learn from, and what to measure on.

    Raises:
        ValueError: there are fewer than two texts.
    """
    shuffled = list(texts)
    random.Random(seed).shuffle(shuffled)
    shuffled = shuffled[:max_texts]
    number = len(shuffled)
    if number < 2:
        raise ValueError(
            f"there must be at least two different texts, one to learn from and one to measure on; got {number}"
        )
    count = min(max(round(share * number), min(SMALLEST_HELD_OUT, number // 5), 1), number - 1)
    return shuffled[count:], shuffled[:count]
