"""
Holds examples out of a training set, so that choices are not made on the set that is reported.

No held-out text is in the training set that is left, nor a part of one, word for word: SST-2's training set holds the
phrases of its sentences, and a model that has learned the phrases knows the sentence.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import NamedTuple


LEAST_WORDS = 8
"""What is held out of a set of phrases is at least this long: the phrases above are whole sentences."""


class Split(NamedTuple):
    """Row numbers of what is left to train on and of what is held out. The rest is part of what is held out."""

    train: list[int]
    held_out: list[int]


def split(texts: Sequence[Sequence[str]], count: int, seed: int = 0) -> Split:
    """
    Splits a training set, of each example its one or two texts: `count` examples are held out, a few more where
    examples share a text. Raises a ValueError where fewer can be, or nothing would be left to train on.
    """
    rows = [tuple(" ".join(text.split()) for text in row) for row in texts]
    order = list(range(len(rows)))
    random.Random(seed).shuffle(order)
    found = _split_phrases(rows, order, count) if len(rows[0]) == 1 else _split_pairs(rows, order, count)
    if len(found.held_out) < count or not found.train:
        raise ValueError(
            f"only {len(found.held_out)} of {len(rows)} examples can be held out with {len(found.train)} left to "
            f"train on; hold out fewer than {count}"
        )
    return found


def parts(text: str) -> Iterator[str]:
    """Every run of words of a text, the whole one included."""
    words = text.split()
    for begin in range(len(words)):
        for end in range(begin + 1, len(words) + 1):
            yield " ".join(words[begin:end])


def _split_phrases(rows: list[tuple[str, ...]], order: list[int], count: int) -> Split:
    texts = {row[0] for row in rows}
    inner = {part for text in texts for part in parts(text) if part != text}
    whole = texts - inner
    # Few are parts of others where examples are sentences anyway.
    least = LEAST_WORDS if len(whole) < len(texts) / 2 else 1
    held = [i for i in order if rows[i][0] in whole and len(rows[i][0].split()) >= least][:count]
    gone = {part for i in held for part in parts(rows[i][0])}
    return Split([i for i in range(len(rows)) if rows[i][0] not in gone], sorted(held))


def _split_pairs(rows: list[tuple[str, ...]], order: list[int], count: int) -> Split:
    """Holds out pairs with all the pairs that share a text with them, and so on."""
    by_text: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        for text in row:
            by_text.setdefault(text, []).append(i)
    held: set[int] = set()
    for first in order:
        if len(held) >= count:
            break
        group, waiting = {first}, [first]
        while waiting and len(group) <= count:
            new = {i for text in rows[waiting.pop()] for i in by_text[text]} - group
            group |= new
            waiting += new
        # A group that is larger than what is to be held out stays in the training set, whole.
        if len(group) <= count:
            held |= group
    return Split([i for i in range(len(rows)) if i not in held], sorted(held))
