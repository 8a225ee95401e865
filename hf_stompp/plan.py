"""
The plan: which modules of a model become what, in which unit, reading what. `config.json` keeps it, so that loading a
model runs none of its code.
"""

from __future__ import annotations

import re
import reprlib
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace
from typing import Any, TypeAlias


EMBEDDING_KINDS = {"binary": "embedding", "int8": "int8_embedding"}
"""The kind of word embeddings that are not float, by `StoMPPConfig.word_embeddings`."""

LAYER_KINDS = ("linear", "convolution")
"""The kinds of layers that multiply by a binary weight: a convolution is a linear layer on patches."""

FUNCTION_KINDS = ("activation", "sign")
"""The kinds in the place of an activation function: one before a linear layer, and one that the sign replaces."""

KINDS = (*LAYER_KINDS, *FUNCTION_KINDS, *EMBEDDING_KINDS.values())
"""
What a planned module may be: such a layer, an activation function before one, an activation function that the sign
replaces, or the word embeddings.
"""

SOURCES: dict[str, tuple[str, ...]] = {
    "linear": ("linear", "activation"),
    "convolution": ("sign",),
    "activation": ("linear",),
    "sign": ("convolution",),
}
"""What the `input` of a planned module may be, by their kinds; linear layers and convolutions may name themselves."""

_NAME = re.compile(r"[A-Za-z0-9_.+-]+")

LONGEST = 400
"""Characters of a value in a message."""

_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = 200
_repr.maxdict = 8


def in_short(value: Any) -> str:
    """The `repr` of a value for a message, cut where it is long: a file may hold a list of millions of entries."""
    text = _repr.repr(value)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."


def is_module_name(name: Any) -> bool:
    """
    Whether something can be the name of a module: letters and digits of ASCII, `_`, `.`, `-`, `+`. Names come from
    files, and end on terminals and in model cards.
    """
    return isinstance(name, str) and _NAME.fullmatch(name) is not None


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

    Raises:
        ValueError: see [`is_module_name`].
    """

    name: str
    kind: str
    unit: str
    input: str | None = None
    bias: bool = False

    def __post_init__(self) -> None:
        for field in ("name", "unit", "input"):
            value = getattr(self, field)
            if not is_module_name(value) and not (field == "input" and value is None):
                raise ValueError(
                    f"StoMPPConfig.modules: {field} of {in_short(self.name)} must be the name of a module, of letters "
                    f"and digits of ASCII and '_', '.', '-', '+', got {in_short(value)}"
                )

    @property
    def is_linear(self) -> bool:
        """Whether it is a linear layer, or a convolution, which is one on patches."""
        return self.kind in LAYER_KINDS

    @property
    def is_function(self) -> bool:
        """Whether it stands in the place of an activation function."""
        return self.kind in FUNCTION_KINDS

    @property
    def is_embedding(self) -> bool:
        """Whether it is the word embeddings."""
        return self.kind in EMBEDDING_KINDS.values()

    @property
    def reads_bits(self) -> bool:
        """Whether it is a linear layer with a binary input."""
        return self.is_linear and self.input is not None

    @property
    def mode(self) -> str:
        """Of a linear layer: `"bnn"` with a binary input, `"bwn"` with a float one."""
        return "bwn" if self.input is None else "bnn"

    def to_dict(self) -> dict[str, Any]:
        """As `config.json` has it."""
        own = ("input", "bias") if self.is_linear else ("input",) if self.is_function else ()
        return {field: getattr(self, field) for field in ("name", "kind", "unit", *own)}


Plan: TypeAlias = dict[str, PlannedModule]
"""Planned modules by name, from input to output."""


def units_of(plan: Plan) -> list[str]:
    """Names of the units, from input to output. What is only rounded takes no part in the progression."""
    return list(dict.fromkeys(e.unit for e in plan.values() if e.kind != EMBEDDING_KINDS["int8"]))


def sublayer_unit(layer: str, children: Iterable[str]) -> str:
    """Name of the unit of several children of a layer: `encoder.layer.0.intermediate+output`."""
    return f"{layer}.{'+'.join(children)}"


def unit_prefixes(unit: str) -> tuple[str, ...]:
    """What the names of everything in a unit begin with: the inverse of [`sublayer_unit`], and of a module's name."""
    layer, dot, children = unit.rpartition(".")
    return tuple(f"{layer}{dot}{child}." for child in children.split("+"))


def renamed(plan: Plan, rename: Callable[[str], str]) -> Plan:
    """The same plan for a model whose modules have other names; `rename` takes names of modules and of units."""
    entries = (
        replace(e, name=rename(e.name), unit=rename(e.unit), input=None if e.input is None else rename(e.input))
        for e in plan.values()
    )
    return {entry.name: entry for entry in entries}


def read_plan(entries: Any) -> Plan:
    """
    The plan in a `config.json`, a list of dicts with the fields of [`PlannedModule`]. Raises a ValueError where an
    entry is no such dict, has a field that none has, or reads what it cannot read.
    """
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError(f"StoMPPConfig.modules must be a list of entries, got {in_short(entries)}")
    planned = [_read_entry(entry) for entry in entries]
    twice = [name for name, count in Counter(entry.name for entry in planned).items() if count > 1]
    if twice:
        raise ValueError(f"StoMPPConfig.modules must name every module once; {in_short(twice)} are there more often")
    read = {entry.input for entry in planned if entry.is_linear}
    plan: Plan = {}
    for entry in planned:
        if not _may_read(entry, plan):
            kinds = " or ".join(SOURCES.get(entry.kind, ())) or "no other module"
            raise ValueError(
                f"StoMPPConfig.modules: input {in_short(entry.input)} of {in_short(entry.name)} is none that binarize "
                f"writes: of the kind {entry.kind} it names {kinds}, before it in the list and in the same layer, and "
                "what it names reads no further one: the config is damaged or was changed; take the original"
            )
        if entry.kind == "activation" and entry.name not in read:
            raise ValueError(
                f"StoMPPConfig.modules: {in_short(entry.name)} is an activation that no linear layer reads"
            )
        plan[entry.name] = entry
    return plan


def _read_entry(entry: dict[str, Any]) -> PlannedModule:
    name, kind, unit, source = (entry.get(field) for field in ("name", "kind", "unit", "input"))
    if not isinstance(name, str) or kind not in KINDS or not isinstance(unit, str):
        raise ValueError(
            f"StoMPPConfig.modules: an entry must have a name, a kind of {list(KINDS)} and the name of a unit, got "
            f"{in_short(entry)}"
        )
    bias = entry.get("bias")
    if kind in LAYER_KINDS and not isinstance(bias, bool):
        raise ValueError(f"StoMPPConfig.modules: bias of {in_short(name)} must be true or false, got {in_short(bias)}")
    unknown = sorted(entry.keys() - {field.name for field in fields(PlannedModule)}, key=str)
    if unknown:
        raise ValueError(
            f"StoMPPConfig.modules: {in_short(name)} has no {in_short(unknown[0])}: it may come from a newer "
            "hf_stompp (then upgrade), or the config is damaged or was changed (then take the original)"
        )
    return PlannedModule(name, kind, unit, source, bias is True)


def _may_read(entry: PlannedModule, before: Plan) -> bool:
    """Whether the input of an entry is one that [`binarize`] writes."""
    if entry.input is None:
        return entry.kind != "sign"
    if entry.input == entry.name:
        return entry.is_linear
    source = before.get(entry.input)
    if source is None or source.kind not in SOURCES.get(entry.kind, ()):
        return False
    if not source.is_linear:
        return True
    # Layers that read one tensor are in one layer of the stack, and so are a layer and the function behind it.
    return _layer_of(entry.name) == _layer_of(source.name) and (not entry.is_linear or source.input == source.name)


def _layer_of(name: str) -> str:
    """What the names of all modules in one layer begin with: the name up to its first number."""
    number = re.search(r"(?:^|\.)\d+(?=\.|$)", name)
    return "" if number is None else name[: number.end()]
