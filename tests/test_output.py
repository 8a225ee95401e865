"""What is written: whole or not at all, and nothing from outside of a folder."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from hf_stompp.output import copy_file, printable, replacing, text_columns, write_json


def test_a_file_that_is_not_written_to_its_end_leaves_the_earlier_one(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    write_json(path, {"a": 1})
    with pytest.raises(KeyboardInterrupt), replacing(path) as partial:
        partial.write_text("half")
        raise KeyboardInterrupt
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
    assert os.listdir(tmp_path) == ["file.json"]


def test_a_link_in_the_place_of_a_file_is_replaced_and_not_followed(tmp_path: Path) -> None:
    (tmp_path / "file.json").symlink_to(tmp_path / "elsewhere")
    write_json(tmp_path / "file.json", 1)
    assert (tmp_path / "file.json").read_text() == "1\n" and not (tmp_path / "file.json").is_symlink()
    assert not (tmp_path / "elsewhere").exists()


def test_a_file_has_the_permissions_of_any_other(tmp_path: Path) -> None:
    (tmp_path / "other").touch()
    write_json(tmp_path / "file.json", 1)
    assert (tmp_path / "file.json").stat().st_mode == (tmp_path / "other").stat().st_mode


HUB = Path("hub", "models--me--model")

# The folder, what the file in it leads to, and whether it is copied.
LINKS = {
    "another file of the folder": (Path("model"), "other.json", True),
    "a folder beside": (Path("model"), "../secret", False),
    "nothing": (Path("model"), "missing", False),
    "the folder itself": (Path("model"), ".", False),
    "a pipe": (Path("model"), "pipe", False),
    "the contents in the Hub's cache": (HUB / "snapshots" / "main", "../../blobs/5f", True),
    "contents that repositories share": (HUB / "snapshots" / "main", "../../../blobs/5f", True),
    "a file beside the Hub's cache": (HUB / "snapshots" / "main", "../../../../secret", False),
    "another repository of the Hub's cache": (HUB / "snapshots" / "main", "../../../models--a--b/blobs/5f", False),
    "contents beside a folder of another name": (Path("received", "snapshots", "main"), "../../blobs/5f", False),
}


def test_a_cache_of_the_hub_may_keep_contents_on_another_disk(tmp_path: Path) -> None:
    folder, disk = tmp_path / HUB / "snapshots" / "main", tmp_path / "disk"
    folder.mkdir(parents=True)
    disk.mkdir()
    (disk / "5f").write_text("content")
    (tmp_path / HUB / "blobs").symlink_to(disk)
    (folder / "tokenizer.json").symlink_to("../../blobs/5f")

    copy_file(folder / "tokenizer.json", folder, tmp_path / "copy")

    assert (tmp_path / "copy").read_text() == "content"


@pytest.mark.parametrize(("place", "link", "is_copied"), LINKS.values(), ids=LINKS.keys())
def test_a_file_is_copied_from_within_a_folder_alone(tmp_path: Path, place: Path, link: str, is_copied: bool) -> None:
    folder, target = tmp_path / place, tmp_path / "copy"
    folder.mkdir(parents=True)
    path = folder / "tokenizer.json"
    path.symlink_to(link)
    os.mkfifo(folder / "pipe")
    if link not in ("missing", ".", "pipe"):
        (folder / link).parent.mkdir(parents=True, exist_ok=True)
        (folder / link).write_text("content")
    if is_copied:
        copy_file(path, folder, target)
        assert target.read_text() == "content" and not target.is_symlink()
    else:
        with pytest.raises(ValueError, match="tokenizer.json leads to .*delete the link"):
            copy_file(path, folder, target)
        assert not target.exists()


def test_a_folder_behind_a_link_is_read(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "vocab.txt").write_text("word")
    (tmp_path / "link").symlink_to("model")
    copy_file(tmp_path / "link" / "vocab.txt", tmp_path / "link", tmp_path / "copy")
    assert (tmp_path / "copy").read_text() == "word"


def test_what_a_terminal_would_obey_is_escaped() -> None:
    assert printable("layer.0 é 模") == "layer.0 é 模"
    assert printable("a\x1b[2J\n\r\u202e\x9b\u2028b") == "a\\x1b[2J\\n\\r\\u202e\\x9b\\u2028b"
    everything = "".join(map(chr, range(0x3000)))
    assert printable(everything).isprintable()


def test_columns_are_as_wide_as_their_widest_cell_and_lines_end_in_no_space() -> None:
    rows = [["name", "n"], ["a", "1,000"], ["longer", ""]]
    assert text_columns(rows) == ["  name      n", "-------------", "     a  1,000", "longer"]
    assert text_columns(rows, left=1) == ["name        n", "-------------", "a       1,000", "longer"]
    assert text_columns(rows, left=2) == ["name    n", "---------", "a       1,000", "longer"]
