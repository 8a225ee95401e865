from __future__ import annotations

import copy
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, BertConfig

from hf_stompp import StoMPPConfig
from hf_stompp.config import CHOICES, FORMAT_VERSION, matches
from hf_stompp.plan import KINDS, in_short


LINEAR = {"name": "encoder.layer.0.dense", "kind": "linear", "unit": "encoder.layer.0", "input": None, "bias": True}

OTHER_VALUES = {
    "mode": "bwn",
    "modes": {"attention": "bnn"},
    "activation_bits": 8,
    "surrogate": "none",
    "weight_scale": "tensor",
    "weight_center": "tensor",
    "weight_clip": 2.0,
    "weight_window": 1.5,
    "activation_scale": "fixed",
    "initial_activation_scale": 2.0,
    "activation_shift": "none",
    "activation_clip": 1.5,
    "activation_window": 0.5,
    "feed_forward_levels": "zero_one",
    "activation_functions": "sign",
    "unit": "sublayer",
    "modules_to_not_convert": ["pooler"],
    "word_embeddings": "int8",
    "layer_stack": "encoder.layer",
    "state": "packed",
    "modules": [LINEAR],
}
"""A value other than the default for every field that may have one."""


def twelve_layers() -> list[dict[str, object]]:
    entries: list[dict[str, object]] = []
    for i in range(12):
        unit = f"bert.encoder.layer.{i}"
        # Neither by name nor by first appearance of a letter is this the sorted order.
        for name in ("attention.self.query", "attention.self.key", "intermediate.dense", "output.dense"):
            linear = f"{unit}.{name}"
            entries.append({"name": linear, "kind": "linear", "unit": unit, "input": linear, "bias": True})
    return entries


def test_the_defaults_that_decide_what_trains() -> None:
    config = StoMPPConfig()
    assert (config.mode, config.surrogate) == ("bnn", "clipped_ste")
    assert (config.weight_clip, config.activation_clip) == (1.0, 1.0)
    assert (config.weight_window, config.activation_window) == (3.0, 2.0)


# bad values


@pytest.mark.parametrize("field", CHOICES)
@pytest.mark.parametrize("value", ["", "BNN", None, True, 1, ["bnn"]], ids=repr)
def test_a_choice_that_does_not_exist_is_refused_by_name_with_what_there_is(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"StoMPPConfig.{field} must be one of") as error:
        StoMPPConfig(**{field: value})
    assert all(repr(choice) in str(error.value) for choice in CHOICES[field])
    assert repr(value) in str(error.value)


@pytest.mark.parametrize("field", ["weight_clip", "activation_clip"])
@pytest.mark.parametrize("value", [0, 0.99, -3.0, math.nan, math.inf, 10**400, "3", None, True, [3.0]], ids=in_short)
def test_a_clip_range_below_one_or_not_finite_is_refused(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"StoMPPConfig.{field} must be a finite number of at least 1"):
        StoMPPConfig(**{field: value})


@pytest.mark.parametrize("value", [0, -1.0, math.nan, math.inf, 10**400, "2", True, None], ids=in_short)
def test_an_initial_scale_that_is_not_above_zero_or_not_finite_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match="StoMPPConfig.initial_activation_scale must be a finite number above 0"):
        StoMPPConfig(initial_activation_scale=value)


@pytest.mark.parametrize("field", ["weight_window", "activation_window"])
@pytest.mark.parametrize("value", [0, -3.0, math.nan, math.inf, 10**400, "3", True, [3.0]], ids=in_short)
def test_a_window_that_is_not_above_zero_or_not_finite_is_refused(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"StoMPPConfig.{field} must be a finite number above 0"):
        StoMPPConfig(surrogate="clipped_ste", **{field: value})


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("binary_word_embeddings", "yes", "must be True or False, got 'yes'"),
        ("binary_word_embeddings", 1, "must be True or False, got 1"),
        ("word_embeddings", "int4", "must be one of"),
        ("layer_stack", 3, "must be a module name or None, got 3"),
        ("layer_stack", "", "must be a module name or None, got ''"),
        ("layer_stack", "encoder layer", "must be a module name or None, got 'encoder layer'"),
        ("layer_stack", "encoder\x1b[2J", "must be a module name or None"),
        ("modules_to_not_convert", "pooler", "must be a list of strings, got 'pooler'"),
        ("modules_to_not_convert", ["pooler", 3], "must be a list of strings"),
        ("quant_method", "gptq", "must be 'stompp', got 'gptq'"),
        ("activation_bits", 4, "must be 8 or None, got 4"),
        ("activation_bits", 8.0, "must be 8 or None, got 8.0"),
        ("activation_bits", True, "must be 8 or None, got True"),
        ("format_version", 0, "must be a whole number from 1 on, got 0"),
        ("format_version", "1", "must be a whole number from 1 on, got '1'"),
        ("format_version", True, "must be a whole number from 1 on, got True"),
        ("format_version", 1.0, "must be a whole number from 1 on, got 1.0"),
    ],
    ids=lambda value: repr(value) if not isinstance(value, str) else value[:20],
)
def test_a_bad_value_is_refused_by_name_with_what_it_may_be(field: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=f"StoMPPConfig.{field} {message}"):
        StoMPPConfig(**{field: value})


@pytest.mark.parametrize("field", ["modules_to_not_convert", "modes"])
@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("pooler(", "is no regular expression"),
        ("a)|(b", "is no regular expression"),
        ("(?x:a # )", "is no regular expression"),
        ("a{99999999999}", "is no regular expression"),
        ("(" * 20_000 + ")" * 20_000, "is no regular expression"),
        (f"(?P={'x' * 10_000})", "is no regular expression"),
        ("pooler\x1b[2J", "holds characters that cannot be printed"),
        ("pooler\n\n# Heading", "holds characters that cannot be printed"),
        ("pooler\x9b31m", "holds characters that cannot be printed"),
        ("pooler\ud800", "holds characters that cannot be printed"),
    ],
    ids=lambda value: ascii(value)[1:20],
)
def test_a_pattern_that_could_not_be_run_or_printed_is_refused(field: str, pattern: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"StoMPPConfig.{field}: .* {message}") as error:
        StoMPPConfig(**{field: [pattern] if field == "modules_to_not_convert" else {pattern: "bwn"}})
    assert str(error.value).isprintable() and len(str(error.value)) < 1000


@pytest.mark.skipif(sys.version_info < (3, 11), reason="older versions of Python take such flags for all of a pattern")
def test_flags_of_a_pattern_belong_in_a_group() -> None:
    with pytest.raises(ValueError, match=r"flags belong in a group, as in '\(\?i:query\)'"):
        StoMPPConfig(modules_to_not_convert=["(?i)QUERY"])
    assert matches("layer.0.query", StoMPPConfig(modules_to_not_convert=["(?i:QUERY)"]).modules_to_not_convert[0])


def test_groups_of_a_pattern_keep_their_numbers() -> None:
    assert matches("layer.aa", r"(a)\1") and not matches("layer.a.a", r"(a)\1")


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        ({"name": "a"}, "must be a list of entries"),
        (["a"], "must be a list of entries"),
        ([{**LINEAR, "name": None}], "must have a name, a kind of"),
        (
            [{**LINEAR, "kind": "conv"}],
            r"a kind of \['linear', 'convolution', 'activation', 'sign', 'embedding', 'int8_embedding'\]",
        ),
        ([{**LINEAR, "unit": None}], "the name of a unit"),
        ([{name: value for name, value in LINEAR.items() if name != "bias"}], "bias of 'encoder.layer.0.dense'"),
        ([{**LINEAR, "bias": 1}], "must be true or false, got 1"),
        (
            [{**LINEAR, "input": "elsewhere"}],
            "input 'elsewhere' of 'encoder.layer.0.dense' is none that binarize writes",
        ),
        ([{"name": "e", "kind": "embedding", "unit": "e"}, {**LINEAR, "input": "e"}], "input 'e' of .* is none"),
        ([LINEAR, LINEAR], "encoder.layer.0.dense"),
        (
            [
                {"name": "act", "kind": "activation", "unit": "e", "input": "act"},
                {**LINEAR, "input": "act"},
            ],
            "input 'act' of 'act' is none that binarize writes",
        ),
        ([{"name": "act", "kind": "activation", "unit": "e", "input": None}], "that no linear layer reads"),
    ],
    ids=[
        *("dict", "names", "no-name", "kind", "no-unit", "no-bias", "bias", "input", "input-kind", "duplicate"),
        *("activation-input", "activation-without-reader"),
    ],
)
def test_a_bad_table_of_modules_is_refused(modules: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StoMPPConfig(modules=modules)


def test_an_unknown_field_is_refused_by_name_with_the_fields_there_are() -> None:
    with pytest.raises(ValueError, match=r"StoMPPConfig has no fields \['weight_clips'\]: ") as error:
        StoMPPConfig(weight_clips=3.0)
    assert "weight_clip," in str(error.value)


MILLIONS = [["a" * 100]] * 10**6


@pytest.mark.parametrize(
    "fields",
    [
        *({field: value} for field in [*OTHER_VALUES, "format_version"] for value in (MILLIONS, {"a": MILLIONS})),
        {"modules": [dict.fromkeys(LINEAR, MILLIONS)]},
        {"modules": [{**LINEAR, "name": "\n" * 10**6}]},
        {"modules": [{**LINEAR, "name": f"a{number % 1000}"} for number in range(2000)]},
        {f"field{number}": number for number in range(1000)},
        {"a" * 10**6: 1},
    ],
    ids=lambda fields: ",".join(fields)[:30],
)
def test_a_value_of_millions_of_entries_makes_a_short_message(fields: dict[str, object]) -> None:
    with pytest.raises(ValueError) as error:
        StoMPPConfig(**fields)
    assert len(str(error.value)) < 2000


ESCAPE = "\x1b[2J\x1b]0;title\x07"
DAMAGED = [
    *([], ["a"], [[]], [None], [ESCAPE], {}, {"a": 1}, {ESCAPE: "bwn"}, {"a": ["bwn"]}, None, True, 0, -1, 1.5),
    *(10**400, -(10**400), math.nan, math.inf, "", "a", ESCAPE, "\ud800", "a" * 10**5, "(" * 10**5),
]


def loads_or_is_refused(fields: dict[str, object]) -> None:
    # Any other exception ends the test.
    try:
        config = StoMPPConfig.from_dict(fields)
    except ValueError as error:
        assert str(error).isprintable() and len(str(error)) < 2000
    else:
        # What is taken can be written, printed and read again.
        saved = json.loads(json.dumps(config.to_dict()))
        assert repr(saved).isprintable() and ESCAPE not in str(config)
        assert StoMPPConfig.from_dict(saved).to_dict() == config.to_dict()


SAVED = [
    {"mode": "bnn", "modes": {"key": "bwn"}, "word_embeddings": "int8", "modules": twelve_layers()},
    {"modules": [{**LINEAR, "kind": "convolution", "input": LINEAR["name"]}], "activation_functions": "sign"},
]


@pytest.mark.parametrize("values", SAVED, ids=["linear", "convolution"])
@pytest.mark.parametrize("field", [*OTHER_VALUES, "format_version", "quant_method", "binary_word_embeddings", ESCAPE])
def test_a_config_with_a_damaged_field_loads_or_is_refused(values: dict[str, object], field: str) -> None:
    saved = StoMPPConfig(**copy.deepcopy(values)).to_dict()
    for value in DAMAGED:
        loads_or_is_refused({**saved, field: value})
    loads_or_is_refused({name: value for name, value in saved.items() if name != field})


@pytest.mark.parametrize("field", [*LINEAR, ESCAPE])
def test_a_config_with_a_damaged_entry_loads_or_is_refused(field: str) -> None:
    activation = {"name": "encoder.layer.0.act", "kind": "activation", "unit": "encoder.layer.0", "input": None}
    sign = {**activation, "kind": "sign"}
    words = {"name": "words", "kind": "embedding", "unit": "words"}
    for entry in (LINEAR, {**LINEAR, "kind": "convolution"}, activation, sign, words):
        for value in [*DAMAGED, *KINDS, *(other["name"] for other in (LINEAR, activation, words))]:
            loads_or_is_refused({"mode": "bwn", "modules": [words, LINEAR, activation, {**entry, field: value}]})
            loads_or_is_refused({"mode": "bwn", "modules": [{**entry, field: value}]})


def test_a_newer_format_is_refused_with_what_to_do_even_with_fields_unknown_here() -> None:
    with pytest.raises(ValueError, match=f"format version {FORMAT_VERSION + 1}; .* upgrade hf_stompp"):
        StoMPPConfig(format_version=FORMAT_VERSION + 1, a_field_of_the_future=1)


def test_a_change_to_the_excluded_modules_of_one_config_leaves_the_default() -> None:
    StoMPPConfig().modules_to_not_convert.append("lm_head")
    assert StoMPPConfig().modules_to_not_convert == ["embeddings", "pooler", "classifier"]


@pytest.mark.parametrize(
    ("values", "bits", "version"),
    [
        ({}, None, 1),
        ({"activation_bits": 8}, None, 1),
        ({"mode": "bwn"}, 8, 3),
        ({"mode": "bwn", "activation_bits": None}, None, 1),
        ({"modes": {"attention": "bwn"}}, 8, 3),
        ({"modes": {"attention": "bwn"}, "activation_bits": None}, None, 2),
        ({"modes": {"attention": "float"}}, None, 2),
        ({"word_embeddings": "int8"}, None, 4),
        ({"word_embeddings": "int8", "mode": "bwn"}, 8, 4),
        ({"word_embeddings": "binary"}, None, 1),
        # Files from before there were such roundings.
        ({"mode": "bwn", "format_version": 1}, None, 1),
        ({"modes": {"attention": "bwn"}, "format_version": 2}, None, 2),
    ],
)
def test_inputs_are_rounded_where_some_are_float_and_the_file_is_new_enough(
    values: dict[str, object], bits: int | None, version: int
) -> None:
    config = StoMPPConfig(**values)
    assert (config.activation_bits, config.format_version) == (bits, version)
    assert StoMPPConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()


@pytest.mark.parametrize(
    ("values", "newer"),
    [
        ({}, set()),
        ({"modes": {"attention": "float"}}, {"modes"}),
        ({"mode": "bwn"}, {"modes", "activation_bits"}),
        ({"mode": "bwn", "activation_bits": None}, set()),
        ({"word_embeddings": "binary"}, set()),
        ({"word_embeddings": "int8"}, {"modes", "activation_bits", "word_embeddings"}),
        (
            {"modules": [{**LINEAR, "kind": "convolution", "input": LINEAR["name"]}]},
            {"modes", "activation_bits", "word_embeddings"},
        ),
    ],
    ids=["1", "2", "3", "1-bwn", "1-binary", "4", "5"],
)
def test_a_file_has_only_the_fields_that_readers_of_its_version_know(
    values: dict[str, object], newer: set[str]
) -> None:
    saved = StoMPPConfig(**values).to_dict()
    assert {"modes", "activation_bits", "word_embeddings"} & set(saved) == newer
    # Until version 3 the word embeddings went by another name.
    assert saved.get("binary_word_embeddings") == (
        None if "word_embeddings" in newer else values.get("word_embeddings") == "binary"
    )


def test_binary_word_embeddings_is_the_older_name_of_word_embeddings() -> None:
    assert StoMPPConfig(binary_word_embeddings=True).word_embeddings == "binary"
    assert StoMPPConfig(binary_word_embeddings=False).word_embeddings == "float"
    assert StoMPPConfig(binary_word_embeddings=True, word_embeddings="binary").word_embeddings == "binary"
    with pytest.raises(ValueError, match="contradict each other: drop the latter"):
        StoMPPConfig(binary_word_embeddings=False, word_embeddings="int8")


def test_convolutions_need_the_format_that_knows_them() -> None:
    modules = [{**LINEAR, "kind": "convolution", "input": LINEAR["name"]}]

    assert StoMPPConfig(modules=modules).format_version == 5
    with pytest.raises(ValueError, match="modules needs format version 5, got 4"):
        StoMPPConfig(modules=modules, format_version=4)


@pytest.mark.parametrize(
    ("field", "value", "version"),
    [("activation_functions", "sign", 6), ("word_embeddings", "int8", 4), ("modes", {"query": "float"}, 2)],
)
def test_a_field_that_the_given_format_version_does_not_know_is_named(field: str, value: Any, version: int) -> None:
    assert StoMPPConfig(**{field: value}, format_version=version).format_version == version
    with pytest.raises(ValueError, match=f"StoMPPConfig.{field} needs format version {version}, got {version - 1}"):
        StoMPPConfig(**{field: value}, format_version=version - 1)


def test_signs_need_the_format_that_knows_them() -> None:
    convolution = {**LINEAR, "kind": "convolution", "input": LINEAR["name"]}
    sign = {"name": "encoder.layer.0.activation", "kind": "sign", "unit": "encoder.layer.0", "input": LINEAR["name"]}

    assert StoMPPConfig(modules=[convolution, sign], activation_functions="sign").format_version == 6
    assert "activation_functions" not in StoMPPConfig(modules=[convolution]).to_dict()


# round trips


def test_other_values_name_every_field_and_differ_from_the_defaults() -> None:
    defaults = dict(StoMPPConfig().__dict__) | {"modules": None}
    # What `modules` are once they are read.
    del defaults["plan"]
    # These are set by the library, or never saved.
    assert set(OTHER_VALUES) == set(defaults) - {"quant_method", "format_version", "example_inputs"}
    assert all(defaults[field] != value for field, value in OTHER_VALUES.items())


@pytest.mark.parametrize("values", [{}, OTHER_VALUES], ids=["defaults", "others"])
def test_a_config_survives_json(values: dict[str, object]) -> None:
    config = StoMPPConfig(**copy.deepcopy(values))
    saved = json.loads(json.dumps(config.to_dict(), sort_keys=True))
    # Only what needs a newer version is written in it.
    assert saved["quant_method"] == "stompp" and saved["format_version"] == (6 if values else 1)
    loaded = StoMPPConfig.from_dict(saved)
    assert type(loaded) is StoMPPConfig
    assert loaded.to_dict() == config.to_dict()
    assert {field: getattr(loaded, field) for field in values} == values


@pytest.mark.parametrize("as_dict", [False, True], ids=["object", "dict"])
def test_a_model_config_saves_and_loads_it(as_dict: bool, tmp_path: Path) -> None:
    config = StoMPPConfig(**copy.deepcopy(OTHER_VALUES))
    bert = BertConfig(num_hidden_layers=1)
    bert.quantization_config = config.to_dict() if as_dict else config
    bert.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path).quantization_config
    assert StoMPPConfig.from_dict(loaded).to_dict() == config.to_dict()


def test_units_stay_in_order_of_depth_in_a_saved_model_config(tmp_path: Path) -> None:
    depth = [f"bert.encoder.layer.{i}" for i in range(12)]
    config = StoMPPConfig(modules=twelve_layers())
    assert config.units == depth != sorted(depth)
    bert = BertConfig()
    bert.quantization_config = config
    # Transformers sorts the keys of config.json.
    bert.save_pretrained(tmp_path)
    loaded = StoMPPConfig.from_dict(AutoConfig.from_pretrained(tmp_path).quantization_config)
    assert loaded.units == depth
    assert list(loaded.plan) == [entry["name"] for entry in twelve_layers()] != sorted(loaded.plan)


def test_a_fresh_config_has_no_units() -> None:
    assert StoMPPConfig().units == [] and StoMPPConfig().plan == {}


def test_a_config_is_read_and_changed_like_other_configs_of_transformers() -> None:
    config = StoMPPConfig(modules=twelve_layers())
    assert dict(config) == config.to_dict() and StoMPPConfig(**dict(config)).plan == config.plan
    entry = {**LINEAR, "input": LINEAR["name"]}
    assert config.update(modules=[entry]) == {} and config.modules == [entry]
    assert StoMPPConfig.from_dict({"mode": "bwn"}, modules=None).plan == {}


def test_a_deep_copy_is_independent() -> None:
    config = StoMPPConfig(modules=twelve_layers())
    copy.deepcopy(config).plan.clear()
    assert len(config.modules) == 48
