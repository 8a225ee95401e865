"""
The plan: which modules of a model become what, in which unit, reading what. `config.json` keeps it, so that loading a
model runs none of its code.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, TypeAlias


EMBEDDING_KINDS = {"binary": "embedding", "int8": "int8_embedding"}
"""The kind of word embeddings that are not float, by `StoMPPConfig.word_embeddings`."""

LAYER_KINDS = ("linear", "convolution")
"""The kinds of layers that multiply by a binary weight: a convolution is a linear layer on patches."""

KINDS = (*LAYER_KINDS, "activation", "sign", *EMBEDDING_KINDS.values())
"""
What a planned module may be: such a layer, an activation function before one, an activation function that the sign
replaces, or the word embeddings.
"""


@dataclass(frozen=True)
class PlannedModule:
    """
    What becomes of one module.

    Args:
        name (`str`): in the model.
        kind (`str`): one of [`KINDS`].
        unit (`str`): name of the unit that it freezes with.
        input (`str`, *optional*):
            Of a linear layer, the module that binarizes its input: itself, the first of the linear layers that read
            the same tensor, or an activation function; `None` where the input stays float. Of an activation function,
            the linear layer whose output it alone reads, if there is one. Of a sign, the convolution before it, which
            has its channels.
        bias (`bool`, *optional*, defaults to `False`): whether a linear layer has one.
    """

    name: str
    kind: str
    unit: str
    input: str | None = None
    bias: bool = False

    @property
    def is_linear(self) -> bool:
        """Whether it is a linear layer, or a convolution, which is one on patches."""
        return self.kind in LAYER_KINDS

    @property
    def is_activation(self) -> bool:
        """Whether it is an activation function before a linear layer."""
        return self.kind == "activation"

    @property
    def reads_bits(self) -> bool:
        """Whether it is a linear layer with a binary input."""
        return self.is_linear and self.input is not None

    def to_dict(self) -> dict[str, Any]:
        """As `config.json` has it."""
        own = ("input", "bias") if self.is_linear else ("input",) if self.kind in ("activation", "sign") else ()
        return {field: getattr(self, field) for field in ("name", "kind", "unit", *own)}


Plan: TypeAlias = dict[str, PlannedModule]
"""Planned modules by name, from input to output."""


def units_of(plan: Plan) -> list[str]:
    """
    Names of the units, from input to output. What is only rounded takes no part in the progression.

    Args:
        plan (`dict[str, PlannedModule]`).
    """
    return list(dict.fromkeys(e.unit for e in plan.values() if e.kind != EMBEDDING_KINDS["int8"]))


def sublayer_unit(layer: str, children: Iterable[str]) -> str:
    """
    Name of the unit of several children of a layer: `encoder.layer.0.intermediate+output`.

    Args:
        layer (`str`): name of the layer.
        children (`Iterable[str]`): their names within it.
    """
    return f"{layer}.{'+'.join(children)}"


def unit_prefixes(unit: str) -> tuple[str, ...]:
    """
    What the names of everything in a unit begin with: the inverse of [`sublayer_unit`], and of any module's name.

    Args:
        unit (`str`): its name.
    """
    layer, _, children = unit.rpartition(".")
    return tuple(f"{layer}.{child}." for child in children.split("+"))


def renamed(plan: Plan, rename: Callable[[str], str]) -> Plan:
    """
    The same plan for a model whose modules have other names.

    Args:
        plan (`dict[str, PlannedModule]`).
        rename (`Callable`): gives the new name of a module or a unit.
    """
    entries = (
        replace(e, name=rename(e.name), unit=rename(e.unit), input=None if e.input is None else rename(e.input))
        for e in plan.values()
    )
    return {entry.name: entry for entry in entries}


def read_plan(entries: Any, mode_of: Callable[[str], str]) -> Plan:
    """
    The plan in a `config.json`.

    Args:
        entries (`list[dict]`): see [`PlannedModule`].
        mode_of (`Callable`): gives the mode of a linear layer by its name.

    Returns:
        `dict[str, PlannedModule]`.

    Raises:
        ValueError: an entry is no such dict, contradicts another one or the mode of its layer.
    """
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError(f"StoMPPConfig.modules must be a list of entries, got {entries!r}")
    planned = [_read_entry(entry) for entry in entries]
    plan = {entry.name: entry for entry in planned}
    if len(plan) < len(planned):
        twice = [name for name, count in Counter(entry.name for entry in planned).items() if count > 1]
        raise ValueError(f"StoMPPConfig.modules must name every module once; {twice} are there more often")
    read = {entry.input for entry in planned if entry.is_linear}
    for entry in planned:
        _check_entry(entry, plan, mode_of, is_read=entry.name in read)
    return plan


def _read_entry(entry: dict[str, Any]) -> PlannedModule:
    name, kind, unit, source = (entry.get(field) for field in ("name", "kind", "unit", "input"))
    if not isinstance(name, str) or kind not in KINDS or not isinstance(unit, str):
        raise ValueError(
            f"StoMPPConfig.modules: an entry must have a name, a kind of {list(KINDS)} and the name of a unit, got "
            f"{entry!r}"
        )
    if source is not None and not isinstance(source, str):
        raise ValueError(f"StoMPPConfig.modules: input of {name!r} must be the name of a module, got {source!r}")
    bias = entry.get("bias")
    if kind in LAYER_KINDS and not isinstance(bias, bool):
        raise ValueError(f"StoMPPConfig.modules: bias of {name!r} must be true or false, got {bias!r}")
    return PlannedModule(name, kind, unit, source, bias is True)


def _check_entry(entry: PlannedModule, plan: Plan, mode_of: Callable[[str], str], is_read: bool) -> None:
    name, source = entry.name, None if entry.input is None else plan.get(entry.input)
    if entry.is_linear:
        mode = mode_of(name)
        if mode == "float" or (entry.input is None) != (mode == "bwn"):
            raise ValueError(f"StoMPPConfig.modules: input {entry.input!r} of {name!r} does not fit mode {mode!r}")
    if entry.is_activation and not is_read:
        raise ValueError(f"StoMPPConfig.modules: {name!r} is an activation that no linear layer reads")
    if entry.input is not None and (source is None or source.kind in EMBEDDING_KINDS.values()):
        raise ValueError(
            f"StoMPPConfig.modules: input of {name!r} must name a linear layer or an activation of the same list, got "
            f"{entry.input!r}"
        )
    if (entry.kind == "sign" or (source is not None and source.kind == "sign")) and "convolution" not in (
        entry.kind,
        source.kind if source is not None else None,
    ):
        raise ValueError(
            f"StoMPPConfig.modules: a sign stands between convolutions of the same list; {name!r} with input "
            f"{entry.input!r} does not"
        )
    if entry.is_activation and source is not None and source.is_activation:
        raise ValueError(
            f"StoMPPConfig.modules: input of the activation {name!r} must name a linear layer of the same list or be "
            f"null, got {entry.input!r}"
        )
