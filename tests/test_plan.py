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
    plan = read_plan(ENTRIES, lambda name: "bnn")
    assert [entry.to_dict() for entry in plan.values()] == ENTRIES
    assert [name for name, entry in plan.items() if entry.reads_bits] == ["a", "b", "c", "d"]


def test_units_are_in_order_of_depth_without_what_is_only_rounded() -> None:
    assert units_of(read_plan(ENTRIES, lambda name: "bnn")) == ["layer.0", "layer.1"]
    binary = [{**WORDS, "kind": "embedding"}, *ENTRIES[1:]]
    assert units_of(read_plan(binary, lambda name: "bnn")) == ["words", "layer.0", "layer.1"]


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([linear("a", "a"), linear("a", "a")], r"must name every module once; \['a'\] are there more often"),
        ([linear("a", ["a"])], "input of 'a' must be the name of a module"),
        ([linear("a", {"b": 1})], "input of 'a' must be the name of a module"),
        ([linear("a", None)], "input None of 'a' does not fit mode 'bnn'"),
        ([linear("a", "b")], "input of 'a' must name a linear layer or an activation of the same list, got 'b'"),
        ([{**WORDS, "name": ["words"]}], "an entry must have a name"),
        ([{**WORDS, "kind": ["embedding"]}], "an entry must have a name, a kind of"),
    ],
)
def test_entries_that_contradict_each_other_are_refused(entries: list[dict], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StoMPPConfig(modules=entries)


def test_every_name_of_an_entry_follows_a_new_prefix() -> None:
    plan = renamed(read_plan(ENTRIES, lambda name: "bnn"), lambda name: f"bert.{name}")
    assert plan["bert.c"] == PlannedModule("bert.c", "linear", "bert.layer.0", "bert.act", True)
    assert plan["bert.words"].input is None
    assert list(plan) == [f"bert.{entry['name']}" for entry in ENTRIES]


def test_what_lies_in_a_unit_begins_with_its_name_and_a_dot() -> None:
    assert unit_prefixes("encoder.layer.1") == ("encoder.layer.1.",)
    unit = sublayer_unit("encoder.layer.1", ["intermediate", "output"])
    assert unit_prefixes(unit) == ("encoder.layer.1.intermediate.", "encoder.layer.1.output.")
    assert not "encoder.layer.10.output.dense".startswith(unit_prefixes("encoder.layer.1"))
