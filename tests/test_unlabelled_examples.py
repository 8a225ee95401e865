"""The program that writes more examples of a task, for a teacher to answer."""

from __future__ import annotations

import csv
import random
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from programs import load
from torch.nn import functional as F


ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def program() -> Any:
    return load(ROOT / "benchmarks" / "unlabelled_examples.py")


def test_single_texts_lose_some_words_or_have_two_swapped(program: Any) -> None:
    texts = [" ".join(f"w{number}" for number in range(20)), "alone"]
    made = [row[0] for row in program.copies(texts, random.Random(0))]
    assert len(made) == 2 * 2 * program.COPIES
    shorter, swapped = made[: program.COPIES], made[program.COPIES : 2 * program.COPIES]
    for text in shorter:
        words = iter(texts[0].split())
        # In the order in which they stood.
        assert 0 < len(text.split()) < 20 and all(word in words for word in text.split())
    for text in swapped:
        moved = [one != other for one, other in zip(text.split(), texts[0].split(), strict=True)]
        assert sum(moved) == 2 and sorted(text.split()) == sorted(texts[0].split())
    assert set(made[2 * program.COPIES :]) == {"alone"}


def test_pairs_join_a_text_with_near_ones_of_the_other_column_and_with_shorter_copies(program: Any) -> None:
    count = 60
    first, second = ([f"{name} {number} and more words" for number in range(count)] for name in "ab")
    # Around a circle: what is near by number is near by angle.
    angles = torch.arange(count) * 2 * torch.pi / count
    around = F.normalize(torch.stack([angles.cos(), angles.sin()], -1))
    made = program.pairs(first, second, around, around, random.Random(0))
    assert len(made) == count * (2 * program.DRAWN + 2)
    kinds = Counter()
    for one, other in made:
        if other in second:
            distance = abs(first.index(one) - second.index(other))
            assert min(distance, count - distance) <= program.NEAREST // 2
            kinds["near"] += 1
        else:
            assert one in first and set(other.split()) <= set(one.split()) | set(one.replace("a", "b", 1).split())
            kinds["shorter"] += 1
    assert kinds["near"] >= count * 2 * program.DRAWN


def test_what_the_training_set_holds_is_not_written_again(
    program: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets")
    texts = ["one two", "two one", "one two three"]
    (tmp_path / "cola").mkdir()
    datasets.Dataset.from_dict({"sentence": texts, "label": [0, 1, 0]}).to_parquet(tmp_path / "cola" / "train.parquet")
    words = [str(tmp_path / "more" / "cola.csv"), "--dataset_dir", str(tmp_path), "--task", "cola"]
    monkeypatch.setattr(sys, "argv", ["unlabelled_examples.py", *words])
    program.main()
    header, *rows = csv.reader((tmp_path / "more" / "cola.csv").open(newline=""))
    assert header == ["sentence"] and rows
    assert not {row[0] for row in rows} & set(texts) and len({row[0] for row in rows}) == len(rows)
