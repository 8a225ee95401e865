from __future__ import annotations

import pytest

from hf_stompp import StoMPPConfig
from hf_stompp.plan import PlannedModule, read_plan, renamed, sublayer_unit, unit_prefixes, units_of


def linear(name: str, source: str | None, unit: str = "layer.0") -> dict:
    return {"name": name, "kind": "linear", "unit": unit, "input": source, "bias": True}


WORDS = {"name": "words", "kind": "int8_embedding", "unit": "words"}
ACTIVATION = {"name": "act", "kind": "activation", "unit": "layer.0", "input": "a"}
ENTRIES = [WORDS, linear("a", "a"), linear("b", "a"), ACTIVATION, linear("c", "act"), linear("d", "d", "layer.1")]


def test_a_plan_is_saved_as_it_was_read() -> None:
    plan = read_plan(ENTRIES)
    assert [entry.to_dict() for entry in plan.values()] == ENTRIES
    assert [name for name, entry in plan.items() if entry.reads_bits] == ["a", "b", "c", "d"]


def test_units_are_in_order_of_depth_without_what_is_only_rounded() -> None:
    assert units_of(read_plan(ENTRIES)) == ["layer.0", "layer.1"]
    binary = [{**WORDS, "kind": "embedding"}, *ENTRIES[1:]]
    assert units_of(read_plan(binary)) == ["words", "layer.0", "layer.1"]


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([linear("a", "a"), linear("a", "a")], r"must name every module once; \['a'\] are there more often"),
        ([linear("a", ["a"])], "input of 'a' must be the name of a module"),
        ([linear("a", {"b": 1})], "input of 'a' must be the name of a module"),
        ([linear("a", None)], "input None of 'a' is that of mode 'bwn', which neither mode nor modes have"),
        ([{**WORDS, "name": ["words"]}], "an entry must have a name"),
        ([{**WORDS, "kind": ["embedding"]}], "an entry must have a name, a kind of"),
        ([{**linear("a", "a"), "scale": 2}], "'a' has no 'scale'"),
        ([{**WORDS, 3: 4}], "has no 3"),
    ],
)
def test_entries_that_contradict_each_other_are_refused(entries: list[dict], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StoMPPConfig(modules=entries)


@pytest.mark.parametrize("field", ["name", "unit", "input"])
@pytest.mark.parametrize(
    "name", ["", "a b", "a\nb", "a\x1b[2J", "a|b", "![x](http://e/i.png)", "<b>", "ä", "`a`", "a/b"]
)
def test_a_name_that_would_be_more_than_text_on_a_terminal_or_in_a_card_is_refused(field: str, name: str) -> None:
    with pytest.raises(ValueError, match=f"{field} of .* must be the name of a module") as error:
        read_plan([{**linear("a", "a"), field: name}])
    assert str(error.value).isprintable()


def in_layer(layer: int, name: str, source: str | None) -> dict:
    return linear(f"layer.{layer}.{name}", source, f"layer.{layer}")


QUERY, KEY = in_layer(0, "query", "layer.0.query"), in_layer(0, "key", "layer.0.query")
FUNCTION = {"name": "layer.0.act", "kind": "activation", "unit": "layer.0", "input": "layer.0.query"}
CONVOLUTION = {**QUERY, "kind": "convolution", "name": "layer.0.conv", "input": "layer.0.conv"}
SIGN = {**FUNCTION, "kind": "sign", "input": "layer.0.conv"}
READER = in_layer(0, "output", "layer.0.act")


@pytest.mark.parametrize(
    "entries",
    [
        [in_layer(0, "query", "layer.0.key"), KEY],
        [in_layer(0, "query", "layer.0.key"), in_layer(0, "key", "layer.0.key")],
        [in_layer(0, "query", "layer.1.query"), in_layer(1, "query", "layer.1.query")],
        [QUERY, in_layer(1, "query", "layer.0.query")],
        [QUERY, {**in_layer(1, "query", "layer.0.query"), "unit": "layer.0"}],
        [QUERY, KEY, in_layer(0, "value", "layer.0.key")],
        [in_layer(0, "query", None), KEY],
        [in_layer(0, "query", "elsewhere")],
        [QUERY, READER, FUNCTION],
        [READER, {**FUNCTION, "input": "layer.0.output"}],
        [QUERY, FUNCTION, {**FUNCTION, "name": "layer.0.other", "input": "layer.0.act"}, READER],
        [QUERY, {**FUNCTION, "name": "layer.1.act"}, in_layer(1, "output", "layer.1.act")],
        [CONVOLUTION, {**CONVOLUTION, "name": "layer.0.second"}],
        [CONVOLUTION, {**QUERY, "input": "layer.0.conv"}],
        [QUERY, {**CONVOLUTION, "input": "layer.0.query"}],
        [CONVOLUTION, {**FUNCTION, "input": "layer.0.conv"}, READER],
        [QUERY, {**SIGN, "input": "layer.0.query"}],
        [{**SIGN, "input": None}],
        [CONVOLUTION, SIGN, {**QUERY, "input": "layer.0.act"}],
        [WORDS, linear("a", "words")],
        [QUERY, {**WORDS, "input": "layer.0.query"}],
        [{**WORDS, "input": "words"}],
    ],
    ids=[
        *("cycle", "behind", "in-a-later-layer", "in-an-earlier-layer", "in-an-earlier-layer-of-one-unit", "chain"),
        *("of-float-input", "nowhere", "activation-behind", "cycle-with-activation", "activation-of-activation"),
        *("activation-of-an-earlier-layer", "two-convolutions", "linear-reads-convolution"),
        *("convolution-reads-linear", "activation-reads-convolution", "sign-reads-linear", "sign-of-nothing"),
        *("linear-reads-sign", "reads-words", "words-read", "words-read-themselves"),
    ],
)
def test_an_input_that_binarize_never_writes_is_refused_by_name(entries: list[dict]) -> None:
    with pytest.raises(ValueError, match="is none that binarize writes") as error:
        read_plan(entries)
    assert any(f"of {entry['name']!r}" in str(error.value) for entry in entries)


@pytest.mark.parametrize(
    "entries",
    [
        [QUERY, KEY, FUNCTION, READER],
        [QUERY, {**KEY, "unit": "layer.0.key"}],
        # The function that ends a layer may be read by the first linear layer of the next.
        [{**FUNCTION, "input": None}, in_layer(1, "query", "layer.0.act")],
        [in_layer(0, "query", None), FUNCTION, READER],
        [CONVOLUTION, SIGN, {**CONVOLUTION, "name": "layer.1.conv", "input": "layer.0.act"}],
    ],
    ids=["layer", "units", "function-of-the-layer-before", "float-input", "sign-of-the-block-before"],
)
def test_an_input_that_binarize_writes_is_read(entries: list[dict]) -> None:
    assert [entry.to_dict() for entry in read_plan(entries).values()] == entries


def test_every_name_of_an_entry_follows_a_new_prefix() -> None:
    plan = renamed(read_plan(ENTRIES), lambda name: f"bert.{name}")
    assert plan["bert.c"] == PlannedModule("bert.c", "linear", "bert.layer.0", "bert.act", True)
    assert plan["bert.words"].input is None
    assert list(plan) == [f"bert.{entry['name']}" for entry in ENTRIES]


def test_what_lies_in_a_unit_begins_with_its_name_and_a_dot() -> None:
    assert unit_prefixes("encoder.layer.1") == ("encoder.layer.1.",)
    unit = sublayer_unit("encoder.layer.1", ["intermediate", "output"])
    assert unit_prefixes(unit) == ("encoder.layer.1.intermediate.", "encoder.layer.1.output.")
    assert not "encoder.layer.10.output.dense".startswith(unit_prefixes("encoder.layer.1"))
    assert unit_prefixes("word_embedding") == ("word_embedding.",)
