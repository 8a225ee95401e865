"""What masks, schedules, packed signs and configs promise for any arguments, on examples that hypothesis draws."""

from __future__ import annotations

import copy
import inspect
import itertools
import json
import math
import re
import string
import struct
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from masks import advance_mask_
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification

from hf_stompp import StoMPPConfig, binarize, commit, pack
from hf_stompp.config import CHOICES, MODES_OF_MODULES
from hf_stompp.model.modules import config_of
from hf_stompp.nn import MaskedBinaryEmbedding, MaskedBinaryModule
from hf_stompp.nn.mask import change_mask_, draw_changes, frozen_probability, mask_generator
from hf_stompp.ops import pack_bits, pack_sign, packed_bytes, signs, unpack_signs
from hf_stompp.plan import in_short
from hf_stompp.training.progression import (
    ORDERS,
    SCHEDULES,
    Progression,
    ProgressionSettings,
    plan_progression,
    plan_windows,
    steps_of,
)


hypothesis = pytest.importorskip("hypothesis")
assume, given, st = hypothesis.assume, hypothesis.given, hypothesis.strategies

# The same in every run; no time limit, because a machine may be busy.
examples = hypothesis.settings(derandomize=True, database=None, deadline=None, max_examples=60)
few_examples = hypothesis.settings(examples, max_examples=25)
many_examples = hypothesis.settings(examples, max_examples=200)

shares = st.floats(0, 1)
seeds = st.integers(0, 2**63 - 1)
periods = st.one_of(st.just(1.0), st.floats(1, 1e6), st.just(math.inf))


def is_binomial(successes: int, trials: int, probability: float) -> bool:
    """Within six standard deviations and one count: the examples are fixed, so this either always or never holds."""
    return abs(successes - trials * probability) <= 6 * math.sqrt(trials * probability * (1 - probability)) + 1


def bernoulli(entries: int, probability: float, seed: int) -> Tensor:
    return torch.rand(entries, generator=torch.Generator().manual_seed(seed)) < probability


# masks


@st.composite
def progressions(draw: Any) -> Progression:
    """One of up to four units, short enough to be walked through."""
    units, order = draw(st.integers(1, 4)), draw(st.sampled_from(sorted(ORDERS)))
    warmup, tail, within = draw(st.integers(0, 20)), draw(st.integers(0, 20)), draw(st.integers(units, 40))
    return plan_progression(
        [f"layer.{i}" for i in range(units)],
        warmup + within + tail,
        order=order,
        schedule=draw(st.sampled_from(sorted(SCHEDULES))),
        warmup=warmup,
        tail=tail,
        overlap=draw(st.floats(0, 1, exclude_max=True)),
        refresh_period=draw(st.floats(1, 1e6)),
        seed=draw(st.integers(0, 2**32)),
    )


@examples
@given(progressions(), seeds)
def test_a_mask_has_the_scheduled_share_of_frozen_entries_at_every_step(progression: Progression, seed: int) -> None:
    masks = [torch.zeros(1000, dtype=torch.bool) for _ in progression.units]
    for step in range(progression.total_steps):
        for unit, (name, mask) in enumerate(zip(progression.units, masks, strict=True)):
            previous = progression.fraction(unit, step - 1) if step else 0.0
            fraction = progression.fraction(unit, step)
            random = mask_generator(seed, name, "freeze_mask", step)
            advance_mask_(mask, previous, fraction, progression.refresh_period, random)
            assert is_binomial(int(mask.sum()), mask.numel(), fraction)
    assert all(mask.all() for mask in masks)


@examples
@given(st.lists(shares, min_size=2, max_size=12).map(sorted), seeds)
def test_without_a_refresh_no_entry_is_ever_freed(fractions: list[float], seed: int) -> None:
    mask = torch.zeros(500, dtype=torch.bool)
    for step in range(1, len(fractions)):
        before = mask.clone()
        advance_mask_(mask, fractions[step - 1], fractions[step], math.inf, mask_generator(seed, "u", "m", step))
        assert torch.equal(mask & before, before)


@examples
@given(shares, periods, seeds)
def test_a_refresh_keeps_the_share_of_frozen_entries(fraction: float, period: float, seed: int) -> None:
    mask = bernoulli(20_000, fraction, seed)
    advance_mask_(mask, fraction, fraction, period, mask_generator(seed, "layer.0", "freeze_mask", 0))
    assert is_binomial(int(mask.sum()), mask.numel(), fraction)


@examples
@given(shares, shares, periods)
def test_the_two_probabilities_lift_one_share_to_the_next(one: float, other: float, period: float) -> None:
    previous, fraction = sorted((one, other))
    if_free, if_frozen = frozen_probability(previous, fraction, period)
    assert 0 <= if_free <= if_frozen + 1e-15 and if_frozen <= 1
    # The rule of total probability.
    assert previous * if_frozen + (1 - previous) * if_free == pytest.approx(fraction, abs=1e-12)
    # Whatever was frozen, a redrawn entry is frozen with the share alone.
    assert 1 - if_frozen == pytest.approx((1 - fraction) / period, abs=1e-12)


@many_examples
@given(st.floats(), st.floats(), st.floats())
def test_a_share_that_falls_or_is_none_is_refused(previous: float, fraction: float, period: float) -> None:
    if previous >= 0 and previous <= fraction and fraction <= 1 and period >= 1:
        frozen_probability(previous, fraction, period)
    else:
        with pytest.raises(ValueError, match="a frozen fraction may only grow|refresh_period must be at least 1"):
            frozen_probability(previous, fraction, period)


@examples
@given(shares, shares, periods, seeds, st.text(), st.text(), st.integers(0, 10**9), st.integers(0, 2**32))
def test_the_same_seed_and_step_draw_the_same_mask_whatever_was_drawn_before(
    one: float, other: float, period: float, seed: int, unit: str, tensor: str, step: int, noise: int
) -> None:
    previous, fraction = sorted((one, other))
    masks = []
    for drawn_before in range(2):
        torch.manual_seed(noise + drawn_before)
        torch.rand(drawn_before)
        mask = bernoulli(200, previous, seed=3)
        masks.append(advance_mask_(mask, previous, fraction, period, mask_generator(seed, unit, tensor, step)))
    assert torch.equal(*masks)


@examples
@given(seeds, st.integers(0, 10**9), seeds, st.integers(0, 10**9))
def test_another_seed_or_step_draws_another_mask(seed: int, step: int, other_seed: int, other_step: int) -> None:
    assume((seed, step) != (other_seed, other_step))
    masks = [
        advance_mask_(torch.zeros(200, dtype=torch.bool), 0.0, 0.5, 100, mask_generator(s, "layer.0", "mask", t))
        for s, t in ((seed, step), (other_seed, other_step))
    ]
    assert not torch.equal(*masks)


@examples
@given(st.integers(0, 12), st.integers(1, 12), shares, shares, periods, seeds, st.booleans())
def test_a_step_changes_only_candidates_entry_by_entry_whatever_the_layout(
    rows: int, columns: int, one: float, other: float, period: float, seed: int, is_transposed: bool
) -> None:
    previous, fraction = sorted((one, other))
    changes = draw_changes(rows * columns, previous, fraction, period, torch.Generator().manual_seed(seed))
    mask = bernoulli(rows * columns, previous, seed).view(columns, rows).T
    mask = mask if is_transposed else mask.contiguous()
    expected = mask.flatten().tolist()
    candidates = range(len(expected)) if changes.candidates is None else changes.candidates.tolist()
    assert list(candidates) == sorted(set(candidates))
    for index, chance in zip(candidates, changes.chances, strict=True):
        # In float32, as the chances are.
        expected[index] = bool(chance < (1.0 - changes.free if expected[index] else changes.freeze))

    assert change_mask_(mask, changes) is mask
    assert mask.flatten().tolist() == expected


# schedules


@examples
@given(st.sampled_from(sorted(SCHEDULES)), shares, shares)
def test_a_schedule_rises_to_one(name: str, one: float, other: float) -> None:
    earlier, later = sorted((one, other))
    schedule = SCHEDULES[name]
    assert 0 <= schedule(earlier) <= schedule(later) <= schedule(1.0) == 1
    assert schedule(0.0) == (1 if name == "immediate" else 0)


@examples
@given(progressions())
def test_a_unit_is_float_before_its_window_full_behind_it_and_never_thaws(progression: Progression) -> None:
    for unit, (start, end) in enumerate(progression.windows):
        fractions = [progression.fraction(unit, step) for step in range(progression.total_steps)]
        assert fractions == sorted(fractions)
        assert set(fractions[:start]) <= {0.0}
        assert set(fractions[max(end - 1, start) :]) == {1.0}
        assert all(0 < fraction <= 1 for fraction in fractions[start:])
    committed = [step for step in range(progression.total_steps) if is_full(progression, step)]
    assert progression.committed_step == committed[0]
    partial = {
        step: [unit for unit in range(len(progression.units)) if 0 < progression.fraction(unit, step) < 1]
        for step in range(progression.total_steps)
    }
    assert all((progression.unit_in_transition(step) is None) == (not units) for step, units in partial.items())
    assert all(progression.unit_in_transition(step) in units for step, units in partial.items() if units)


def is_full(progression: Progression, step: int) -> bool:
    return all(progression.fraction(unit, step) == 1 for unit in range(len(progression.units)))


@examples
@given(
    *(st.integers(1, 20), st.integers(0, 100), st.sampled_from(sorted(ORDERS)), st.integers(0, 50)),
    *(st.integers(0, 50), st.just(0.0) | st.floats(0, 1, exclude_max=True), st.integers(0, 2**32)),
)
def test_windows_fill_the_steps_between_warmup_and_tail_or_cannot_finish(
    units: int, within: int, order: str, warmup: int, tail: int, overlap: float, seed: int
) -> None:
    steps = warmup + within + tail
    settings = ProgressionSettings(order, "cubic", warmup, tail, overlap, seed=seed)
    if within < (1 if order == "global" else units):
        with pytest.raises(ValueError, match="the schedule cannot finish"):
            plan_windows(units, steps, settings)
        return
    windows = plan_windows(units, steps, settings)
    assert len(windows) == units
    assert all(start < end for start, end in windows)
    assert min(start for start, _ in windows) == warmup
    assert max(end for _, end in windows) == steps - tail
    in_time = sorted(windows)
    # No step between the first and the last in which nothing is in its window.
    assert all(start <= end for (_, end), (start, _) in itertools.pairwise(in_time))
    if overlap == 0 and order != "global":
        assert all(start == end for (_, end), (start, _) in itertools.pairwise(in_time))
    if order in ("forward", "reverse"):
        assert windows == (in_time if order == "forward" else in_time[::-1])


@many_examples
@given(st.one_of(st.floats(), st.integers(-10, 10**6), st.floats(0, 1)), st.integers(0, 10**6))
@hypothesis.example(1.5, 10)
def test_a_setting_is_a_share_below_one_and_a_number_of_steps_from_one_on(value: float, total: int) -> None:
    if 0 <= value < 1:
        assert abs(steps_of(value, total, "progression_tail") - value * total) <= 0.5
    elif 1 <= value < math.inf and value % 1 == 0:
        assert steps_of(value, total, "progression_tail") == value
    else:
        with pytest.raises(ValueError, match=r"progression_tail must be a share of all steps in \[0, 1\) or a whole"):
            steps_of(value, total, "progression_tail")


# packed signs

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
SPECIAL = (0.0, -0.0, math.nan, math.inf, -math.inf, 5e-324, -5e-324, 1e-45, -1e-45, 6e-8, -6e-8, 1e30, -1e30, 65504.0)
numbers = st.one_of(st.sampled_from(SPECIAL), st.floats(width=32))


@st.composite
def tensors(draw: Any) -> Tensor:
    """Of any shape with a last dimension: a few numbers drawn, which recur in an order of their own."""
    shape = (*draw(st.lists(st.integers(0, 3), max_size=2)), draw(st.integers(1, 600)))
    values = torch.tensor(draw(st.lists(numbers, min_size=1, max_size=20)), dtype=torch.float64)
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    picked = torch.randint(len(values), shape, generator=random)
    return values[picked].to(draw(st.sampled_from(DTYPES)))


def packed_by_hand(rows: list[list[float]], thresholds: list[float]) -> list[bytes]:
    """Bit `k % 8` of byte `k // 8`, rows padded to 32 bytes."""
    packed = []
    for row in rows:
        number = sum(
            1 << k for k, (value, threshold) in enumerate(zip(row, thresholds, strict=True)) if value >= threshold
        )
        packed.append(number.to_bytes(-(-len(row) // 256) * 32, "little"))
    return packed


@examples
@given(tensors(), st.booleans(), st.integers(0, 2**32))
def test_packed_signs_are_those_of_plain_comparisons(x: Tensor, has_threshold: bool, seed: int) -> None:
    features = x.shape[-1]
    thresholds = [0.0] * features
    threshold = None
    if has_threshold:
        random = torch.Generator().manual_seed(seed)
        picked = torch.randint(len(SPECIAL), (features,), generator=random)
        threshold = torch.tensor(SPECIAL, dtype=torch.float32)[picked]
        thresholds = threshold.tolist()
    expected = packed_by_hand(x.double().reshape(-1, features).tolist(), thresholds)
    # The operator, which runs a kernel, takes no float64.
    for pack_signs in (signs.pack_sign,) if x.dtype == torch.float64 else (signs.pack_sign, pack_sign):
        bits, popcounts = pack_signs(x, threshold)
        assert bits.shape == (*x.shape[:-1], packed_bytes(features)) and popcounts.shape == x.shape[:-1]
        assert [bytes(row) for row in bits.reshape(-1, packed_bytes(features)).tolist()] == expected
        assert popcounts.flatten().tolist() == [int.from_bytes(row, "little").bit_count() for row in expected]


@examples
@given(tensors())
def test_unpacked_signs_are_plus_one_from_zero_on_and_minus_one_below_and_for_nan(x: Tensor) -> None:
    # -0.0 is 0, whose sign is +1.
    assert unpack_signs(pack_bits(x), x.shape[-1]).tolist() == signs_by_hand(x.tolist())


def signs_by_hand(values: Any) -> Any:
    return [signs_by_hand(v) for v in values] if isinstance(values, list) else 1.0 if values >= 0 else -1.0


@examples
@given(st.integers(1, 600), st.data())
def test_packing_what_was_unpacked_gives_the_same_bytes_whatever_the_last_one_holds(features: int, data: Any) -> None:
    number = data.draw(st.integers(0, 2**features - 1))
    packed = torch.tensor(list(number.to_bytes(packed_bytes(features), "little")), dtype=torch.uint8)
    assert torch.equal(pack_bits(unpack_signs(packed, features)), packed)


# packing extreme weights

# Of float32 both zeros, the smallest number, denormal and large ones.
EXTREME = (0.0, -0.0, 1e-45, -1e-45, 1e-39, -1e-39, 1e-30, -1e-30, 1.0, -1.0, 1e30, -1e30)


def zeros(shape: torch.Size, value: float, random: torch.Generator) -> Tensor:
    return torch.zeros(shape)


def constant(shape: torch.Size, value: float, random: torch.Generator) -> Tensor:
    return torch.full(shape, value)


def any_extremes(shape: torch.Size, value: float, random: torch.Generator) -> Tensor:
    return torch.tensor(EXTREME)[torch.randint(len(EXTREME), shape, generator=random)]


def one_huge(shape: torch.Size, value: float, random: torch.Generator) -> Tensor:
    row = torch.randn(shape, generator=random)
    row[-1] = value
    return row


@st.composite
def extreme_weights(draw: Any) -> Callable[[Tensor], Tensor]:
    """`fill(weight)`: rows, of several kinds in turn, in the shape of a weight."""
    kinds = draw(st.lists(st.sampled_from([zeros, constant, any_extremes, one_huge]), min_size=1, max_size=6))
    value, seed = draw(st.sampled_from(EXTREME)), draw(st.integers(0, 2**32))

    def fill(weight: Tensor) -> Tensor:
        random = torch.Generator().manual_seed(seed)
        rows = zip(weight, itertools.cycle(kinds), strict=False)
        return torch.stack([kind(row.shape, value, random) for row, kind in rows])

    return fill


@pytest.fixture(scope="module")
def encoder() -> BertForSequenceClassification:
    """A float classifier of one layer."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 36, "num_attention_heads": 4, "intermediate_size": 76, "num_hidden_layers": 1}
    return BertForSequenceClassification(BertConfig(vocab_size=64, max_position_embeddings=16, **sizes)).eval()


@few_examples
@given(
    extreme_weights(),
    st.fixed_dictionaries(
        {
            "mode": st.sampled_from(CHOICES["mode"]),
            "weight_scale": st.sampled_from(CHOICES["weight_scale"]),
            "activation_bits": st.sampled_from([None, 8]),
            "word_embeddings": st.sampled_from(CHOICES["word_embeddings"]),
        }
    ),
)
@torch.no_grad()
def test_a_model_of_extreme_weights_packs_to_their_signs_and_means_and_answers_the_same(
    encoder: BertForSequenceClassification, fill: Callable[[Tensor], Tensor], settings: dict[str, Any]
) -> None:
    model, ids = binarize(copy.deepcopy(encoder), StoMPPConfig(**settings)), torch.arange(24).view(2, 12)
    # Scales of activations come from ordinary weights.
    commit(model)(input_ids=ids)
    layers = {
        name: model.get_submodule(name) for name, entry in config_of(model).plan.items() if not entry.is_function
    }
    for layer in layers.values():
        layer.weight.copy_(fill(layer.weight))

    packed = pack(model)

    found, expected = packed(input_ids=ids).logits, model(input_ids=ids).logits
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.nan_to_num(), expected.nan_to_num())
    for name, layer in layers.items():
        if isinstance(layer, MaskedBinaryModule):
            rows, of = layer.weight.tolist(), packed.get_submodule(name)
            assert [bytes(row) for row in of.packed_weight.tolist()] == packed_by_hand(rows, [0.0] * len(rows[0]))
            factor = layer.input_levels()[1].item() if getattr(layer, "input_activation", None) else 1.0
            kind = "row" if isinstance(layer, MaskedBinaryEmbedding) else settings["weight_scale"]
            expected_scale = [float32(float32(scale) * factor) for scale in scales_by_hand(rows, kind)]
            assert of.scale.tolist() == pytest.approx(expected_scale, rel=1e-7, abs=1e-45)


def float32(value: float) -> float:
    return struct.unpack("f", struct.pack("f", value))[0]


def scales_by_hand(rows: list[list[float]], kind: str) -> list[float]:
    means = [math.fsum(map(abs, row)) / len(row) for row in rows]
    return {"row": means, "tensor": [math.fsum(means) / len(means)] * len(means), "none": [1.0] * len(means)}[kind]


@pytest.mark.parametrize("mode", CHOICES["mode"])
@torch.no_grad()
def test_a_model_that_would_be_infinite_once_packed_is_refused_with_the_tensor(
    encoder: BertForSequenceClassification, mode: str
) -> None:
    model = commit(binarize(copy.deepcopy(encoder), StoMPPConfig(mode=mode)))
    model(input_ids=torch.arange(24).view(2, 12))
    layer = model.bert.encoder.layer[0].intermediate.dense
    largest = torch.finfo(torch.float32).max
    layer.weight.fill_(largest)
    if mode == "bwn":
        # Products are of the inputs' own, and the scale itself is finite.
        assert pack(model).bert.encoder.layer[0].intermediate.dense.scale.tolist() == [largest] * 76
        return
    layer.input_activation.scale.fill_(2.0)
    with pytest.raises(ValueError, match=r"layer.0.intermediate.dense.scale would be infinite: .* nothing was packed"):
        pack(model)


# configs

# What a config.json may hold, valid or not.
json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.just(10**400)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=4), inner, max_size=3)),
    max_leaves=6,
)
large_numbers = st.one_of(st.floats(1, sys.float_info.max), st.integers(1, 10**300))
positive_numbers = st.one_of(st.floats(0, sys.float_info.max, exclude_min=True), st.integers(1, 10**300))
names = st.from_regex(r"[A-Za-z0-9_.+-]{1,12}", fullmatch=True)
patterns = st.one_of(names.map(re.escape), st.sampled_from(["layer.0", "attention|output", r"layer.\d+", "(?i:KEY)"]))

VALID = {
    **{field: st.sampled_from(choices) for field, choices in CHOICES.items()},
    **dict.fromkeys(("weight_clip", "activation_clip"), large_numbers),
    **dict.fromkeys(("weight_window", "activation_window"), st.none() | positive_numbers),
    "initial_activation_scale": positive_numbers,
    "modules_to_not_convert": st.lists(patterns, max_size=3),
    "layer_stack": st.none() | names,
    "modes": st.none() | st.dictionaries(patterns, st.sampled_from(MODES_OF_MODULES), max_size=3),
    "activation_bits": st.sampled_from([None, 8]),
}
"""Values by field that a user may give."""


BOUNDS = [0, 0.0, -1, 0.5, 0.99, 1, 1.0, 1.01, 8, 8.0, True, False, "", "none", 5e-324, sys.float_info.max, 10**309]
"""Values next to what a field may be, and those that Python takes for equal to others."""


def is_number(value: Any, least: float, is_least_one: bool) -> bool:
    if type(value) not in (int, float) or not least <= value <= sys.float_info.max:
        return False
    return is_least_one or value != least


def is_name(value: str) -> bool:
    return value != "" and set(value) <= set(f"{string.ascii_letters}{string.digits}_.+-")


MAY_BE: dict[str, Callable[[Any], bool]] = {
    **{field: lambda value, of=choices: type(value) is str and value in of for field, choices in CHOICES.items()},
    **dict.fromkeys(("weight_clip", "activation_clip"), lambda value: is_number(value, 1, True)),
    **dict.fromkeys(("weight_window", "activation_window"), lambda value: value is None or is_number(value, 0, False)),
    "initial_activation_scale": lambda value: is_number(value, 0, False),
    "layer_stack": lambda value: (
        value is None or (type(value) is str and bool(re.fullmatch(r"[\w.+-]+", value, re.A)))
    ),
    "activation_bits": lambda value: value is None or (type(value) is int and value == 8),
    "binary_word_embeddings": lambda value: value is None or type(value) is bool,
    "quant_method": lambda value: value == "stompp",
}
"""What a field may be, said once more."""


@st.composite
def plans(draw: Any) -> list[dict[str, Any]] | None:
    """Modules as `binarize` writes them, of layers with what reads what."""
    entries: list[dict[str, Any]] = []
    for layer in range(draw(st.integers(0, 3))):
        unit, before = f"encoder.layer.{layer}", []
        for name in draw(st.lists(st.sampled_from("abcdef"), max_size=4, unique=True)):
            linear = {"name": f"{unit}.{name}", "kind": "linear", "unit": unit, "bias": draw(st.booleans())}
            # Their own input, or that of an earlier one, which reads its own.
            linear["input"] = draw(st.sampled_from([linear["name"], *before]))
            before += [linear["name"]] if linear["input"] == linear["name"] else []
            entries.append(linear)
        if before and draw(st.booleans()):
            function = {"name": f"{unit}.act", "kind": "activation", "unit": unit, "input": before[-1]}
            entries += [function, {**entries[-1], "name": f"{unit}.last", "input": function["name"]}]
    return entries or None


@examples
@given(
    st.fixed_dictionaries({"mode": st.just("bnn")}, optional={n: s for n, s in VALID.items() if n != "mode"}), plans()
)
def test_a_config_is_the_same_after_json(values: dict[str, Any], modules: list[dict[str, Any]] | None) -> None:
    config = StoMPPConfig(**copy.deepcopy(values), modules=copy.deepcopy(modules))
    loaded = StoMPPConfig.from_dict(json.loads(json.dumps(config.to_dict(), sort_keys=True)))

    assert loaded.to_dict() == config.to_dict() and dict(loaded) == dict(config)
    assert loaded.plan == config.plan and loaded.units == config.units
    # 8 bits are kept where there are float inputs to round; no modes at all are none.
    others = {name: value for name, value in values.items() if name not in ("activation_bits", "modes")}
    assert {name: getattr(loaded, name) for name in others} == others
    assert (loaded.modes or None) == (values.get("modes") or None)
    assert loaded.modules == modules


def check_taken_or_refused(field: str, value: Any) -> None:
    fields = {"mode": "bwn", field: value}
    if MAY_BE[field](value):
        assert value is None or getattr(StoMPPConfig(**fields), field) == value
    else:
        with pytest.raises(ValueError, match=rf"StoMPPConfig\.{field}\b"):
            StoMPPConfig(**fields)


@pytest.mark.parametrize("field", sorted(MAY_BE))
def test_a_value_next_to_what_a_field_may_be_is_taken_as_it_is_or_refused_by_name(field: str) -> None:
    for value in BOUNDS:
        check_taken_or_refused(field, value)


@many_examples
@given(st.data(), st.sampled_from(sorted(MAY_BE)))
def test_a_field_is_taken_as_it_is_or_refused_by_name(data: Any, field: str) -> None:
    check_taken_or_refused(field, data.draw(st.one_of(json_values, VALID.get(field, json_values))))


@examples
@given(st.text(), json_values)
def test_a_field_that_there_is_not_is_refused_by_name(name: str, value: Any) -> None:
    assume(name not in inspect.signature(StoMPPConfig).parameters)
    with pytest.raises(ValueError, match=r"StoMPPConfig has no fields \[") as error:
        StoMPPConfig.from_dict({name: value})
    assert in_short([name]) in str(error.value)
