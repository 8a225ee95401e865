from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from datasets import Dataset

from hf_stompp.data.text import hold_out, read_lines, read_texts, split_sentences


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


# reading


def test_a_text_file_holds_a_text_a_line_without_empty_and_repeated_ones(tmp_path: Path) -> None:
    file = write(tmp_path / "a.txt", "\ufeffone é\r\n\n   \ntwo\u2028three\none é\nlast")
    assert read_texts([file]) == ["one é", "two\u2028three", "last"]


@pytest.mark.parametrize("kind", ["csv", "tsv", "json", "jsonl", "parquet"])
def test_tables_of_every_kind_hold_the_same_texts(tmp_path: Path, kind: str) -> None:
    texts = ["NA", "a, b", " padded ", ""]
    file = tmp_path / f"table.{kind}"
    rows = [{"id": number, "text": text} for number, text in enumerate(texts)]
    if kind == "csv":
        Dataset.from_list(rows).to_csv(file)
    elif kind == "tsv":
        write(file, "id\ttext\n" + "".join(f"{row['id']}\t{row['text']}\n" for row in rows))
    elif kind == "parquet":
        Dataset.from_list(rows).to_parquet(file)
    else:
        write(file, json.dumps(rows) if kind == "json" else "\n".join(map(json.dumps, rows)))
    assert read_texts([file]) == ["NA", "a, b", "padded"]


def test_files_follow_each_other(tmp_path: Path) -> None:
    files = [write(tmp_path / "b.txt", "two\nthree\n"), write(tmp_path / "a.csv", "text\none\ntwo\n")]
    assert read_texts(files) == ["two", "three", "one"]


def test_missing_values_of_a_column_are_passed_over(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", '{"text": "one"}\n{"text": null}\n{"text": "two"}\n')
    assert read_texts([file]) == ["one", "two"]


def test_the_column_is_the_one_that_is_named_or_known_or_alone(tmp_path: Path) -> None:
    file = write(tmp_path / "a.csv", "title,text,number\nfirst,second,3\n")
    assert read_texts([file]) == ["second"]
    assert read_texts([file], ["title"]) == ["first"]
    alone = write(tmp_path / "b.csv", "number,words\n3,first\n")
    assert read_texts([alone]) == ["first"]


@pytest.mark.parametrize(
    ("columns", "asked", "message"),
    [
        (
            "title,body\na,b\n",
            None,
            "which column of .* is not clear: name one of title, body with --text_columns, or the two",
        ),
        ("one,two\n1,2\n", None, "no column with text: it has one, two"),
        ("one,two\na,2\n", "three", "no column 'three': it has one, two"),
        ("one,two\na,2\n", "two", "column 'two' of .* holds int64, not text"),
    ],
    ids=["several", "none", "unknown", "numbers"],
)
def test_a_column_that_is_not_clear_is_refused_by_name(
    tmp_path: Path, columns: str, asked: str | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        read_texts([write(tmp_path / "a.csv", columns)], [asked] if asked else [])


def test_two_columns_hold_pairs_and_a_row_with_one_of_them_empty_a_text(tmp_path: Path) -> None:
    rows = [("one ", "two"), ("two", "one"), ("one", "two"), ("three", ""), ("", "four"), (" ", None)]
    file = tmp_path / "a.jsonl"
    write(file, "\n".join(json.dumps({"a": first, "b": second}) for first, second in rows))
    lines = write(tmp_path / "b.txt", "five\nthree\n")
    assert read_texts([file, lines], ["a", "b"]) == [("one", "two"), ("two", "one"), "three", "four", "five"]
    assert read_texts([file], ["b", "a"])[0] == ("two", "one")
    with pytest.raises(ValueError, match="got 3: choose two"):
        read_texts([file], ["a", "b", "c"])


@pytest.mark.parametrize("name", ["a.txt", "a.csv", "a.jsonl"])
def test_a_file_that_is_not_utf8_is_refused_with_line_and_byte(tmp_path: Path, name: str) -> None:
    file = write(tmp_path / name, "text\nfine é\ncafé\n".encode().replace("caf\u00e9".encode(), b"caf\xe9"))
    with pytest.raises(ValueError, match=rf"{re.escape(str(file))} is not UTF-8: byte 0xe9 at 4 of line 3"):
        read_texts([file])


def test_lines_are_read_one_by_one(tmp_path: Path) -> None:
    lines = read_lines(write(tmp_path / "a.txt", b"fine\n\xff\n"))
    assert next(lines) == "fine\n"
    with pytest.raises(ValueError, match="line 2"):
        next(lines)


def test_files_without_text_are_refused_by_name(tmp_path: Path) -> None:
    good = write(tmp_path / "good.txt", "text\n")
    with pytest.raises(FileNotFoundError, match=r"no file .*gone\.txt"):
        read_texts([good, tmp_path / "gone.txt"])
    with pytest.raises(ValueError, match=r"empty\.txt is empty"):
        read_texts([good, write(tmp_path / "empty.txt", "")])
    with pytest.raises(ValueError, match=r"blank\.txt holds no text"):
        read_texts([good, write(tmp_path / "blank.txt", "\n \n")])
    with pytest.raises(ValueError, match=r"blank\.csv holds no text"):
        read_texts([good, write(tmp_path / "blank.csv", 'text,id\n"",1\n" ",2\n')])
    with pytest.raises(ValueError, match=r"a\.pdf is not of a known kind: .* \.txt, .*\.parquet"):
        read_texts([good, write(tmp_path / "a.pdf", "text")])
    with pytest.raises(ValueError, match=r"a\.parquet .*no valid parquet file"):
        read_texts([good, write(tmp_path / "a.parquet", "text")])


# sentences


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("One. Two!  Three?\nFour", ["One.", "Two!", "Three?", "Four"]),
        ('He said "No." Then (left.) And', ['He said "No."', "Then (left.)", "And"]),
        ("Version 1.5 of e.g. this, by J. R. Smith.", ["Version 1.5 of e.g. this, by J. R. Smith."]),
        ("Wait... what? 10 out of 10.", ["Wait... what?", "10 out of 10."]),
        ("好。很好。不好", ["好。", "很好。", "不好"]),
        ("Привет. Мир. ", ["Привет.", "Мир."]),
        ("no end", ["no end"]),
        (" ", []),
    ],
    ids=str,
)
def test_a_text_is_cut_behind_its_sentences(text: str, sentences: list[str]) -> None:
    assert split_sentences(text) == sentences


# holding out


def test_every_text_is_learned_from_or_measured_on_in_an_order_that_the_seed_decides() -> None:
    texts = [str(number) for number in range(1000)]
    learned, held_out = hold_out(texts, 0.3, seed=1)
    assert len(held_out) == 300 and sorted([*learned, *held_out]) == sorted(texts)
    assert (learned, held_out) == hold_out(texts, 0.3, seed=1) != hold_out(texts, 0.3, seed=2)
    assert texts == [str(number) for number in range(1000)]


@pytest.mark.parametrize(
    ("number", "share", "expected"),
    [(100_000, 0.02, 2000), (5000, 0.02, 200), (500, 0.02, 100), (5, 0.02, 1), (2, 0.02, 1), (2, 0.99, 1)],
)
def test_enough_texts_are_held_out_to_measure_on(number: int, share: float, expected: int) -> None:
    assert len(hold_out([str(index) for index in range(number)], share, seed=0)[1]) == expected


def test_no_more_texts_are_taken_than_asked_for() -> None:
    texts = [str(number) for number in range(100)]
    learned, held_out = hold_out(texts, 0.1, seed=0, max_texts=20)
    assert len(learned) == 16 and len(held_out) == 4
    assert max(map(int, learned + held_out)) > 20, "not the first ones"
    with pytest.raises(ValueError, match="at least two different texts.*got 1"):
        hold_out(texts, 0.1, seed=0, max_texts=1)
