"""The methods of the training recipe: what each sets, what goes with it, and what it trains with by default."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from .config import StoMPPConfig
from .progression import SCHEDULES


FLOAT_DEFAULTS: dict[str, Any] = {
    "learning_rate": 5e-5,
    "num_train_epochs": 4.0,
    "warmup_steps": 0.1,
    "train_sampling_strategy": "group_by_length",
}
"""Training arguments of a float run where nothing else is asked for."""

BINARY_DEFAULTS: dict[str, Any] = {**FLOAT_DEFAULTS, "learning_rate": 2e-4}
"""The same of the binary stage."""

FLOAT_STAGE_LEARNING_RATE: float = FLOAT_DEFAULTS["learning_rate"]
"""Of the float fine-tuning that comes before the binary stage."""


@dataclass(frozen=True)
class Method:
    """
    One way to train.

    Args:
        help (`str`): what it does, for the command line and the documentation.
        config (`dict[str, tuple]`): fields of `StoMPPConfig`, and the values of each that go with the method; the
            first is set where none is asked for.
        training (`dict[str, tuple]`): the same for `StoMPPTrainingArguments`.
        defaults (`dict[str, Any]`): training arguments where nothing else is asked for; any value goes with the
            method.
    """

    help: str
    config: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    training: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=lambda: BINARY_DEFAULTS)


AT_ONCE = {"progression_schedule": ("immediate",)}
PROGRESSIVE = {"progression_schedule": tuple(name for name in SCHEDULES if name != "immediate")}

METHODS: dict[str, Method] = {
    "float": Method("no binarization", defaults=FLOAT_DEFAULTS),
    "ste": Method(
        "everything binary from the first step, straight-through gradient",
        {"surrogate": ("ste", "clipped_ste")},
        AT_ONCE,
    ),
    "stompp": Method(
        "layer by layer through growing masks, frozen entries have no gradient", {"surrogate": ("none",)}, PROGRESSIVE
    ),
    "stompp_ste": Method(
        "layer by layer through growing masks, straight-through gradient of frozen entries",
        {"surrogate": ("ste", "clipped_ste")},
        PROGRESSIVE,
    ),
    "bit": Method(
        "BiT's elastic binarization: everything binary from the first step, clipped straight-through gradient, one "
        "weight scale a matrix, {0, a} behind the feed-forward activation",
        {"surrogate": ("clipped_ste",), "weight_scale": ("tensor",), "feed_forward_levels": ("zero_one",)},
        AT_ONCE,
    ),
}
"""Every method by its name. `float` alone binarizes nothing."""

DEFAULT_METHOD = "stompp_ste"

METHODS_HELP = "; ".join(f"{name}: {method.help}" for name, method in METHODS.items())


def method_config(method: str, given: Mapping[str, Any] | None = None) -> StoMPPConfig | None:
    """
    What a method binarizes and how.

    Args:
        method (`str`): a key of [`METHODS`].
        given (`dict[str, Any]`, *optional*): fields of `StoMPPConfig` that are asked for.

    Returns:
        `StoMPPConfig`, or `None` for the method `float`.

    Raises:
        ValueError: there is no such method, a field contradicts it, or a field has a bad value.
    """
    given = given or {}
    fields = {**_own(method, _method(method).config, given), **given}
    if method != "float":
        return StoMPPConfig(**fields)
    refuse_for_float(fields)
    return None


def training_settings(method: str, given: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """
    Training arguments of a method.

    Args:
        method (`str`): a key of [`METHODS`].
        given (`dict[str, Any]`, *optional*): training arguments that are asked for.

    Returns:
        `dict[str, Any]`: the method's defaults, what it sets, and what is given.

    Raises:
        ValueError: there is no such method, or an argument contradicts it.
    """
    given = given or {}
    found = _method(method)
    return {**found.defaults, **_own(method, found.training, given), **given}


def refuse_for_float(given: Iterable[str]) -> None:
    """
    Refuses settings of binarization for the method `float`.

    Args:
        given (`Iterable[str]`): names of the settings that are asked for.

    Raises:
        ValueError: there are any.
    """
    if names := sorted(given):
        raise ValueError(
            f"--method float binarizes nothing and is contradicted by --{', --'.join(names)}. Drop them, or choose "
            f"the method {', '.join(name for name in METHODS if name != 'float')}. The epochs and the learning rate "
            "of a float run are those of training."
        )


def _method(name: str) -> Method:
    if name not in METHODS:
        raise ValueError(f"--method {name} is unknown. Give {', '.join(METHODS)}.")
    return METHODS[name]


def _own(method: str, table: Mapping[str, tuple[Any, ...]], given: Mapping[str, Any]) -> dict[str, Any]:
    """What a method sets; refuses what contradicts it."""
    for name, values in table.items():
        if name in given and given[name] not in values:
            raise ValueError(
                f"--method {method} is contradicted by --{name} {given[name]}; it goes with {' or '.join(values)}. "
                f"Drop --{name}, or choose another method."
            )
    return {name: values[0] for name, values in table.items()}
