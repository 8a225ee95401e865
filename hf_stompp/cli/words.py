"""A class a word: which token answers for a word, and what its tags name together."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


IGNORED = -100
"""The label of a token that no loss counts, as in PyTorch's cross-entropy."""

PREFIXES = ("B", "I", "E", "S")
"""Of tags such as `B-PER`: a word begins, continues or ends what it names with others, or names it alone."""


def first_tokens(words: Sequence[int | None]) -> dict[int, int]:
    """
    The token that answers for each word, which is its first: word -> position. `words` has the word of each token, as
    `BatchEncoding.word_ids` gives it.
    """
    places: dict[int, int] = {}
    for place, word in enumerate(words):
        if word is not None:
            places.setdefault(word, place)
    return places


def token_labels(words: Sequence[int | None], classes: Sequence[int]) -> list[int]:
    """Labels of tokens: of a word's first token the class of the word, otherwise [`IGNORED`]."""
    labels = [IGNORED] * len(words)
    for word, place in first_tokens(words).items():
        labels[place] = classes[word]
    return labels


def word_logits(logits: Tensor, words: Sequence[int | None], count: int) -> Tensor:
    """
    Logits of words, `(count, num_labels)`, from those of tokens, `(tokens, num_labels)`; minus infinity for one
    without a token, such as a word behind the last that the model reads.
    """
    places = first_tokens(words)
    found = torch.full((count, logits.shape[-1]), -torch.inf, dtype=logits.dtype, device=logits.device)
    found[list(places)] = logits[list(places.values())]
    return found


def labels_of_read_words(labels: Sequence[Sequence[int]], logits: Tensor) -> Tensor:
    """
    Labels beside the logits of words, [`IGNORED`] for words that the model has not read: int64 of shape
    `(texts, words)`, padded like the logits from [`word_logits`], `(texts, words, num_labels)`.
    """
    rows = pad_sequence([torch.tensor(row) for row in labels], batch_first=True, padding_value=IGNORED)
    return rows.masked_fill(logits[..., 0].isneginf(), IGNORED)


def name_spans(classes: Sequence[str]) -> bool:
    """Whether classes are tags of spans: `O`, and others with one of [`PREFIXES`] before a hyphen."""
    kinds = set(classes) - {"O"}
    return "O" in classes and bool(kinds) and all(name[:2] in {f"{prefix}-" for prefix in PREFIXES} for name in kinds)


def spans(tags: Sequence[str]) -> set[tuple[int, int, str]]:
    """
    What the tags of one text name, as the CoNLL shared tasks count it: `(first word, last word, kind)`. A span ends
    where the next word begins another, is of another kind or names nothing; an `I-` behind nothing begins one.
    """
    found, start = set(), 0
    parts = [("O", ""), *((tag[:1], tag[2:]) for tag in tags), ("O", "")]
    for word, ((before, kind), (prefix, next_kind)) in enumerate(pairwise(parts)):
        is_border = kind != next_kind or before in ("O", "E", "S") or prefix in ("O", "B", "S")
        if is_border and before != "O":
            found.add((start, word - 1, kind))
        if is_border:
            start = word
    return found
