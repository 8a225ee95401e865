"""The model card: what a reader of the Hub must know to load a packed model."""

from __future__ import annotations

from pathlib import Path


TAGS = ["stompp", "binary", "1-bit"]


def usage_section(model_class: str, name: str) -> str:
    """
    The card's section on loading.

    Args:
        model_class (`str`): class of the packed model, e.g. `"BertForSequenceClassification"`.
        name (`str`): repository or folder to load it from.
    """
    return (
        "## How to load it\n\n"
        "The encoder of this model has 1-bit weights. `pip install hf_stompp`; the import registers the loader. "
        "Without it Transformers only warns and leaves the encoder at random weights.\n\n"
        "```python\n"
        "import hf_stompp\n"
        f"from transformers import {model_class}\n\n"
        f'model = {model_class}.from_pretrained("{name}")\n'
        "```\n"
    )


def add_section(card: Path, section: str) -> None:
    """Puts a section before the first second-level heading of a model card, or at its end."""
    text = card.read_text(encoding="utf-8")
    before, heading, after = text.partition("\n## ")
    card.write_text(f"{before}\n{section}{heading}{after}", encoding="utf-8")
