from __future__ import annotations

from pathlib import Path

from hf_stompp.hub import add_section, usage_section


def test_the_section_imports_the_package_before_it_loads_the_model() -> None:
    section = usage_section("BertForSequenceClassification", "me/tiny")
    code = section.split("```python\n")[1].split("```")[0]
    assert code.index("import hf_stompp") < code.index('BertForSequenceClassification.from_pretrained("me/tiny")')
    compile(code, "card", "exec")


def test_the_section_comes_before_the_others_and_keeps_them(tmp_path: Path) -> None:
    card = tmp_path / "README.md"
    card.write_text("---\ntags: []\n---\n# tiny\n\nText.\n\n## First\n\n## Second\n")
    add_section(card, "## Mine\n")
    assert [line for line in card.read_text().splitlines() if line.startswith("#")] == [
        "# tiny",
        "## Mine",
        "## First",
        "## Second",
    ]


def test_a_card_without_sections_gets_one_at_its_end(tmp_path: Path) -> None:
    card = tmp_path / "README.md"
    card.write_text("# tiny\n")
    add_section(card, "## Mine\n")
    assert card.read_text().endswith("## Mine\n")
