from __future__ import annotations

import copy
import json
import math
from pathlib import Path

import pytest
from transformers import AutoConfig, BertConfig

from hf_stompp import StoMPPConfig
from hf_stompp.config import CHOICES, FORMAT_VERSION


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


# bad values


@pytest.mark.parametrize("field", CHOICES)
@pytest.mark.parametrize("value", ["", "BNN", None, True, 1, ["bnn"]], ids=repr)
def test_a_choice_that_does_not_exist_is_refused_by_name_with_what_there_is(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"StoMPPConfig.{field} must be one of") as error:
        StoMPPConfig(**{field: value})
    assert all(repr(choice) in str(error.value) for choice in CHOICES[field])
    assert repr(value) in str(error.value)


@pytest.mark.parametrize("field", ["weight_clip", "activation_clip"])
@pytest.mark.parametrize("value", [0, 0.99, -3.0, math.nan, math.inf, "3", None, True, [3.0]], ids=repr)
def test_a_clip_range_below_one_or_not_finite_is_refused(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"StoMPPConfig.{field} must be a finite number of at least 1"):
        StoMPPConfig(**{field: value})


@pytest.mark.parametrize("value", [0, -1.0, math.nan, math.inf, "2", True, None], ids=repr)
def test_an_initial_scale_that_is_not_above_zero_or_not_finite_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match="StoMPPConfig.initial_activation_scale must be a finite number above 0"):
        StoMPPConfig(initial_activation_scale=value)


@pytest.mark.parametrize("field", ["weight_window", "activation_window"])
@pytest.mark.parametrize("value", [0, -3.0, math.nan, math.inf, "3", True, [3.0]], ids=repr)
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


def test_a_pattern_that_is_no_regular_expression_is_refused() -> None:
    with pytest.raises(ValueError, match="StoMPPConfig.modules_to_not_convert"):
        StoMPPConfig(modules_to_not_convert=["pooler("])


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
        ([{**LINEAR, "input": "elsewhere"}], "input of 'encoder.layer.0.dense' must name .* got 'elsewhere'"),
        ([{"name": "e", "kind": "embedding", "unit": "e"}, {**LINEAR, "input": "e"}], "must name a linear layer"),
        ([LINEAR, LINEAR], "encoder.layer.0.dense"),
        (
            [
                {"name": "act", "kind": "activation", "unit": "e", "input": "act"},
                {**LINEAR, "input": "act"},
            ],
            "input of the activation 'act' must name a linear layer",
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
    with pytest.raises(ValueError, match="StoMPPConfig has no field weight_clips: ") as error:
        StoMPPConfig(weight_clips=3.0)
    assert "weight_clip," in str(error.value)


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
