"""Sphinx: the pages of docs/ and the reference, which is read from the docstrings."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from typing import Any


sys.path.insert(0, str(Path(__file__).parent.parent))

import hf_stompp
from hf_stompp.ops import activations, bits, folding, integers, norm, products, signs, weights


project = "hf_stompp"
author = "the hf_stompp authors"
release = version = hf_stompp.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["requirements.txt"]
myst_heading_anchors = 3

html_theme = "furo" if importlib.util.find_spec("furo") else "alabaster"
html_title = f"hf_stompp {release}"
html_show_sphinx = False
html_copy_source = False

autodoc_typehints = "none"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
# Of what a class has from Transformers, the text is in the documentation of Transformers.
autodoc_inherit_docstrings = False
napoleon_numpy_docstring = False
napoleon_use_rtype = False

REFERENCE = re.compile(r"\[`(~?)([\w.]+)`\]")
LITERAL = re.compile(r"(?<![`:\w])`([^`]+)`(?!`)")
SECTION = re.compile(r"^(\s*)(Returns|Raises):$")
BARE_ARGUMENT = re.compile(r"^(\s+\w+(?:, \w+)* \(`.*\))\.$")
FENCE = re.compile(r"^(\s*)```(\w*)\s*$")
# Names that docstrings use without their module, by where the reference documents them: of modules that have a name,
# the last.
OPERATORS = {
    name: f"{module.__name__}.{name}"
    for module in (activations, norm, products, folding, weights, signs, integers, bits)
    for name in vars(module)
}


def full_name(name: str) -> str:
    """The name under which the reference documents what a docstring calls `name`."""
    if "." in name:
        return name
    return f"hf_stompp.{name}" if name in hf_stompp.__all__ else OPERATORS.get(name, name)


def link(match: re.Match[str]) -> str:
    """The cross reference of Hugging Face's doc-builder as one of Sphinx."""
    short, name = match.groups()
    shown = name.rpartition(".")[2] if short else name
    return f":py:obj:`{shown} <{full_name(name)}>`"


def joined(lines: list[str]) -> list[str]:
    """Lines that go on with an entry of `Returns` or `Raises`, indented further, join it; else they become quotes."""
    out: list[str] = []
    entry = None
    for line in lines:
        indent = len(line) - len(line.lstrip())
        if found := SECTION.match(line):
            entry = len(found[1]) + 4
        elif entry is not None and line and indent < entry:
            entry = None
        if entry is not None and line and indent > entry:
            out[-1] = f"{out[-1]} {line.lstrip()}"
        else:
            out.append(line)
    return out


def to_restructured_text(lines: list[str]) -> list[str]:
    """A docstring in the style of Hugging Face (Markdown) as one that napoleon reads (reStructuredText)."""
    out: list[str] = []
    fence = None
    text = []
    for line in joined(lines):
        if found := FENCE.match(line):
            out += spans(text)
            text = []
            fence = None if fence is not None else found[1]
            if fence is not None:
                out += ["", f"{fence}.. code-block:: {found[2] or 'text'}", ""]
            else:
                out.append("")
        elif fence is not None:
            out.append(f"    {line}")
        else:
            # An argument that needs no description, and the heading of a group of arguments.
            line = BARE_ARGUMENT.sub(r"\1:", line)
            text.append(re.sub(r"^(\s*)> (.*)$", r"\1**\2**", line))
    return out + spans(text)


def spans(lines: list[str]) -> list[str]:
    """Links and literals; both may run over the end of a line."""
    text = "\n".join(lines)
    links: list[str] = []

    def keep(match: re.Match[str]) -> str:
        links.append(link(match))
        return f"\0{len(links) - 1}\0"

    text = LITERAL.sub(r"``\1``", REFERENCE.sub(keep, text))
    return re.sub("\0(\\d+)\0", lambda match: links[int(match[1])], text).split("\n") if lines else []


def convert_docstring(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    lines[:] = to_restructured_text(lines)


def setup(app: Any) -> None:
    # Before napoleon, whose priority is 500.
    app.connect("autodoc-process-docstring", convert_docstring, priority=400)
