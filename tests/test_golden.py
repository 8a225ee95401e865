"""Models that earlier versions saved, in `tests/golden/`: every later version loads them, and gives their answers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from hf_stompp import pack, unpack
from hf_stompp.config import FORMAT_VERSION


FOLDERS = sorted(file.parent for file in (Path(__file__).parent / "golden").glob("*/config.json"))
folders = pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)


@folders
def test_a_model_of_an_earlier_version_gives_its_answer(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    answer = load_file(folder / "answer.safetensors")
    logits = answer.pop("logits")
    state, version = folder.name.split("-")[:2]

    model = getattr(transformers, config["architectures"][0]).from_pretrained(folder).eval()

    saved = config["quantization_config"]
    assert (saved["state"], saved["format_version"]) == (state, int(version))
    with torch.no_grad():
        assert torch.allclose(model(**answer).logits, logits, atol=1e-4)
        if state == "packed":
            assert torch.allclose(pack(unpack(model))(**answer).logits, logits, atol=1e-4)


def test_there_is_a_model_of_every_version_of_the_format() -> None:
    versions = {int(folder.name.split("-")[1]) for folder in FOLDERS}

    assert versions == set(range(1, FORMAT_VERSION + 1))
