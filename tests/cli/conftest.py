"""Fixtures of the `hf-stompp` command's tests: saved models, and what a command printed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers

from hf_stompp import cli


WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"word{i}" for i in range(59))]
"""A vocabulary of the size that the tiny models have."""


@pytest.fixture
def saved(tmp_path: Path) -> Callable[..., str]:
    """`saved(model, name="model", tokenizer=True)`: the folder it was saved to."""

    def save(model: Any, name: str = "model", tokenizer: bool = True) -> str:
        folder = tmp_path / name
        model.save_pretrained(folder)
        if tokenizer:
            vocabulary = tmp_path / "vocab.txt"
            vocabulary.write_text("\n".join(WORDS))
            transformers.BertTokenizer(vocab=str(vocabulary)).save_pretrained(folder)
        return str(folder)

    return save


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """`refused(*words)`: runs a command that must fail, and returns its one line on stderr."""

    def run(*words: Any) -> str:
        capsys.readouterr()
        assert cli.main([str(word) for word in words]) == 2
        printed = capsys.readouterr()
        assert printed.out == ""
        assert printed.err.startswith("hf-stompp: ") and printed.err.count("\n") == 1, printed.err
        return printed.err.removeprefix("hf-stompp: ").rstrip("\n")

    return run


@pytest.fixture
def printed(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """`printed(*words)`: runs a command that must succeed; on stderr it may say that the run is short. Its output."""

    def run(*words: Any) -> str:
        capsys.readouterr()
        status = cli.main([str(word) for word in words])
        out, err = capsys.readouterr()
        assert (status, [line for line in err.splitlines() if "optimizer steps are few" not in line]) == (0, [])
        return out

    return run
