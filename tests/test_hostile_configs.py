"""Whatever stands as `quantization_config` in the folder of a model: it loads with its tensors, or is refused."""

from __future__ import annotations

import copy
import json
import shutil
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification

import hf_stompp
from hf_stompp import StoMPPConfig, binarize, commit, pack


pytestmark = pytest.mark.slow
hypothesis = pytest.importorskip("hypothesis")
given, st = hypothesis.given, hypothesis.strategies

# The same in every run; no time limit, because a machine may be busy.
examples = hypothesis.settings(
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=400,
    suppress_health_check=list(hypothesis.HealthCheck),
)

IDS = torch.arange(24).view(2, 12)
DEEP = 100
"""From about 250 levels on Transformers itself ends in a RecursionError before it asks any quantizer."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A latent and a packed classifier, and the packed one with every optional field in use."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 36, "num_attention_heads": 4, "intermediate_size": 76, "num_hidden_layers": 2}
    model = BertForSequenceClassification(BertConfig(vocab_size=64, max_position_embeddings=16, **sizes)).eval()
    settings: dict[str, dict[str, Any]] = {
        "plain": {},
        "rich": {"modes": {"key": "bwn", "layer.1.output": "float"}, "word_embeddings": "int8", "unit": "sublayer"},
    }
    folders = {}
    for name, fields in settings.items():
        latent = commit(binarize(copy.deepcopy(model), StoMPPConfig(**fields)))
        latent(input_ids=IDS)
        for state, saved in (("latent", latent), ("packed", pack(latent))):
            folders[f"{state} {name}"] = tmp_path_factory.mktemp(f"{state}_{name}")
            saved.save_pretrained(folders[f"{state} {name}"])
    return folders


def nested(value: Any, levels: int, is_list: bool) -> Any:
    for _ in range(levels):
        value = [value] if is_list else {"a": value}
    return value


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every list or dict of a value, with each of its indices or keys."""
    for key in range(len(value)) if isinstance(value, list) else list(value):
        yield value, key
        if isinstance(value[key], list | dict):
            yield from places(value[key])


def depth_of(value: Any) -> int:
    deepest, level = 0, [value]
    while level:
        deepest += 1
        level = [i for v in level for i in (v.values() if isinstance(v, dict) else v if isinstance(v, list) else ())]
    return deepest


texts = st.one_of(st.text(max_size=20), st.sampled_from(["\x1b[2J", "\ud800", "..", "(" * 99, "a" * 100_000]))
scalars = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.sampled_from([10**400, -1, 0, 8]), texts)
values = st.one_of(
    scalars,
    st.recursive(scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3)),
    st.builds(nested, scalars, st.integers(1, 900), st.booleans()),
)


def altered(saved: dict[str, Any], draw: Any) -> Any:
    """A config with one to four values replaced, removed, added, doubled, renamed or exchanged."""
    holder = {"quantization_config": copy.deepcopy(saved)}
    for _ in range(draw(st.integers(1, 4))):
        every = list(places(holder["quantization_config"])) if isinstance(holder["quantization_config"], dict) else []
        if not every:
            break
        # One time in twenty all of it.
        at, key = (holder, "quantization_config") if draw(st.integers(0, 19)) == 0 else draw(st.sampled_from(every))
        other, other_key = draw(st.sampled_from(every))
        way = draw(st.sampled_from(["replace", "copy", "exchange", "remove", "add"]))
        if way == "replace" or at is holder:
            at[key] = draw(values)
        elif way == "copy":
            at[key] = copy.deepcopy(other[other_key])
        elif way == "exchange":
            at[key], other[other_key] = copy.deepcopy(other[other_key]), copy.deepcopy(at[key])
        elif way == "remove":
            del at[key]
        elif isinstance(at, list):
            at.insert(key, copy.deepcopy(at[key]) if draw(st.booleans()) else draw(values))
        else:
            at[draw(texts)] = draw(values)
    return holder["quantization_config"]


def altered_text(saved: dict[str, Any], draw: Any) -> str:
    """The JSON of a config with one to four characters replaced, removed or added."""
    text = json.dumps(saved)
    for _ in range(draw(st.integers(1, 4))):
        position = draw(st.integers(0, len(text) - 1))
        added, removed = draw(st.sampled_from(["", *'{}[]",:0-e.\\x'])), draw(st.integers(0, 1))
        text = text[:position] + added + text[position + removed :]
    return text


def is_ours(config: Any) -> bool:
    """Whether Transformers hands it to this package, unless it ends on the way: see `DEEP`."""
    return isinstance(config, dict) and config.get("quant_method") == "stompp"


def was_reached(error: BaseException) -> bool:
    package = str(Path(hf_stompp.__file__).parent)
    return any(frame.filename.startswith(package) for frame in traceback.extract_tb(error.__traceback__))


def names_its_cause(message: str) -> bool:
    causes = ("StoMPPConfig", "quantization_config", "format version", "tensor", "checkpoint lacks", "config.json")
    return message.isprintable() and len(message) < 3000 and any(cause in message for cause in causes)


def outcome(folder: Path, tensors: dict[str, Tensor], config: Any) -> str:
    """Loads a folder, and checks what comes of it."""
    try:
        model = BertForSequenceClassification.from_pretrained(folder)
    except (ValueError, OSError) as error:
        assert not was_reached(error) or names_its_cause(str(error)), str(error)
        return "refused" if was_reached(error) else "not reached"
    except Exception as error:
        # Of Transformers, which reads the file and looks for the method first.
        assert not (is_ours(config) and depth_of(config) <= DEEP) and not was_reached(error), repr(error)
        return "not reached"
    loaded = model.state_dict()
    # Without a config of ours it is Transformers' model. The empty tensor of packed files has no place in any.
    names = set(tensors) if is_ours(config) else set(BertForSequenceClassification(model.config).state_dict())
    assert set(loaded) == {name for name in names if tensors[name].numel()}
    assert [name for name, tensor in loaded.items() if not torch.equal(tensor, tensors[name])] == []
    with torch.no_grad():
        assert model(input_ids=IDS).logits.isfinite().all()
    return "loaded"


@pytest.mark.parametrize("is_text", [False, True], ids=["values", "text"])
@pytest.mark.parametrize("name", ["latent plain", "packed plain", "latent rich", "packed rich"])
def test_whatever_is_done_to_a_config_the_model_loads_as_it_was_saved_or_is_refused(
    folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory, name: str, is_text: bool
) -> None:
    folder = tmp_path_factory.mktemp("altered")
    shutil.copytree(folders[name], folder, dirs_exist_ok=True)
    tensors = load_file(folder / "model.safetensors")
    rest = json.loads((folder / "config.json").read_text())
    saved = rest.pop("quantization_config")
    head, outcomes = json.dumps(rest)[:-1], Counter[str]()

    @examples
    @given(st.data())
    def alter_and_load(data: Any) -> None:
        config = altered(saved, data.draw) if not is_text else None
        text = altered_text(saved, data.draw) if is_text else json.dumps(config)
        (folder / "config.json").write_text(f'{head}, "quantization_config": {text}}}')
        if is_text:
            try:
                config = json.loads(text)
            except ValueError:
                config = None
        outcomes[outcome(folder, tensors, config)] += 1

    alter_and_load()
    # Else nothing was tested.
    assert outcomes["refused"] > 50 and outcomes["loaded"] > 5, outcomes
