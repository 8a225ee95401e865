from __future__ import annotations

import json
import pickle
import random
import re
import shutil
import struct
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from hf_stompp.model.integrity import (
    METADATA_PREFIX,
    check_whole,
    checkpoint_files,
    digests,
    last_whole_checkpoint,
    tensor_digest,
    verify_files,
)


TENSORS = {
    "a.weight": torch.arange(12.0).reshape(3, 4),
    "b.freeze_mask": torch.tensor([[True, False], [False, True]]),
    "c.packed_weight": torch.arange(64, dtype=torch.uint8).reshape(2, 32),
    "d.scale": torch.tensor(0.5),
}


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file(TENSORS, path, metadata={"format": "pt", **digests(TENSORS)})
    return path


def split(file) -> tuple[dict, bytes]:
    content = file.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def join(file, header: dict, data: bytes) -> None:
    text = json.dumps(header, separators=(",", ":")).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)


def test_whole_file_gives_the_file_of_each_tensor(file):
    assert verify_files([file]) == dict.fromkeys(TENSORS, file)
    assert verify_files([str(file)]) == dict.fromkeys(TENSORS, file)


def test_no_files_are_fine():
    assert verify_files([]) == {}


def test_file_without_digests_is_read(tmp_path):
    save_file(TENSORS, tmp_path / "plain.safetensors")

    assert set(verify_files([tmp_path / "plain.safetensors"])) == set(TENSORS)


def test_digest_depends_on_the_values_not_on_the_layout():
    tensor = torch.arange(6.0).reshape(2, 3)

    assert tensor_digest(tensor.T) == tensor_digest(tensor.T.contiguous())
    assert tensor_digest(tensor) != tensor_digest(tensor + 1)
    assert tensor_digest(torch.tensor(1.0)) == tensor_digest(torch.tensor([1.0]).squeeze())
    assert len(tensor_digest(torch.empty(0))) == 64


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool]
)
def test_digest_takes_every_dtype(dtype):
    assert tensor_digest(torch.zeros(3, dtype=dtype)) != tensor_digest(torch.ones(3, dtype=dtype))


def test_digest_of_a_tensor_in_a_larger_storage_is_that_of_its_values():
    assert tensor_digest(torch.arange(10.0)[2:4]) == tensor_digest(torch.tensor([2.0, 3.0]))


@pytest.mark.parametrize("name", TENSORS)
def test_altered_byte_names_the_tensor_and_the_file(file, name):
    header, data = split(file)
    start = header[name]["data_offsets"][0]
    join(file, header, data[:start] + bytes([data[start] ^ 1]) + data[start + 1 :])

    with pytest.raises(ValueError, match=rf"{file}: tensor '{name}' was altered"):
        verify_files([file])


def test_altered_tensor_whose_digest_was_removed_is_noticed(file):
    header, data = split(file)
    del header["__metadata__"][f"{METADATA_PREFIX}c.packed_weight"]
    begin = header["c.packed_weight"]["data_offsets"][0]
    join(file, header, data[:begin] + bytes([data[begin] ^ 1]) + data[begin + 1 :])

    with pytest.raises(ValueError, match="tensor 'c.packed_weight' was altered"):
        verify_files([file])


def test_tensor_saved_under_another_name_is_checked_all_the_same(file):
    header, data = split(file)
    header = {"c.renamed" if name == "c.packed_weight" else name: entry for name, entry in header.items()}
    join(file, header, data)
    assert "c.renamed" in verify_files([file])

    begin = header["c.renamed"]["data_offsets"][0]
    join(file, header, data[:begin] + bytes([data[begin] ^ 1]) + data[begin + 1 :])
    with pytest.raises(ValueError, match="'c.renamed' was altered"):
        verify_files([file])


def test_altered_digest_names_the_tensor(file):
    header, data = split(file)
    header["__metadata__"][f"{METADATA_PREFIX}d.scale"] = "0" * 64
    join(file, header, data)

    with pytest.raises(ValueError, match=r"tensor 'd.scale' was altered"):
        verify_files([file])


@pytest.mark.parametrize(("name", "field", "value"), [("a.weight", "dtype", "I32"), ("a.weight", "shape", [4, 3])])
def test_altered_dtype_or_shape_names_the_tensor(file, name, field, value):
    header, data = split(file)
    header[name][field] = value
    join(file, header, data)

    with pytest.raises(ValueError, match=rf"tensor '{name}' was altered"):
        verify_files([file])


def test_two_tensors_swapped_in_the_header_are_noticed(tmp_path):
    tensors = {"first": torch.zeros(4), "second": torch.ones(4)}
    file = tmp_path / "model.safetensors"
    save_file(tensors, file, metadata=digests(tensors))
    header, data = split(file)
    header["first"], header["second"] = header["second"], header["first"]
    join(file, header, data)

    with pytest.raises(ValueError, match="tensor 'first' was altered"):
        verify_files([file])


def test_cut_file_names_the_first_tensor_that_is_not_whole(file):
    header, data = split(file)
    ends = {name: entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"}
    order = sorted(ends, key=ends.get)
    head = file.stat().st_size - len(data)
    content = file.read_bytes()

    for kept, name in enumerate(order):
        file.write_bytes(content[: head + ends[name] - 1])
        with pytest.raises(
            ValueError, match=rf"damaged: tensor '{name}' and {len(order) - kept - 1} more cannot be read"
        ):
            verify_files([file])


@pytest.mark.parametrize("length", [0, 1, 7, 8, 9, 100])
def test_file_cut_in_its_header_says_so(file, length):
    file.write_bytes(file.read_bytes()[:length])

    with pytest.raises(ValueError, match=rf"{file} is damaged: its header cannot be read"):
        verify_files([file])


@pytest.mark.parametrize(
    "content",
    [
        b"\xff" * 200,
        b"\x00" * 200,
        pickle.dumps({"a": 1}),
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 4) + b"null",
    ],
    ids=["ones", "zeros", "pickle", "list", "null"],
)
def test_file_of_something_else_is_damaged(file, content):
    file.write_bytes(content)

    with pytest.raises(ValueError, match="is damaged"):
        verify_files([file])


@pytest.mark.parametrize("key", [b"data_offsets", b"dtype", b"shape"])
def test_damaged_key_in_the_header_is_a_damaged_file(file, key):
    file.write_bytes(file.read_bytes().replace(key, key[:-1] + b"_", 1))

    with pytest.raises(ValueError, match="is damaged"):
        verify_files([file])


def test_no_flipped_bit_goes_unnoticed(file):
    content = file.read_bytes()
    header_end = 8 + struct.unpack("<Q", content[:8])[0]
    # Digests themselves and the padding behind the JSON are not worth a thousand runs.
    text = content[:header_end]
    first_tensor = min(text.index(f'"{name}"'.encode()) for name in TENSORS)
    positions = [*range(8), *range(first_tensor, len(text.rstrip())), *range(header_end, len(content))]
    unnoticed = []
    for position in positions:
        altered = bytearray(content)
        altered[position] ^= 1 << (position % 8)
        file.write_bytes(bytes(altered))
        try:
            names = verify_files([file])
        except ValueError:
            continue
        # A tensor under another name is missing under its own: the loader refuses that.
        if set(names) == set(TENSORS):
            unnoticed.append((position, bytes(altered[max(0, position - 20) : position + 5])))

    assert unnoticed == []


@pytest.mark.parametrize(
    ("name", "dtypes"),
    [
        ("freeze_mask", [torch.uint8, torch.float32]),
        ("packed_weight", [torch.int8, torch.bool, torch.int64, torch.float32, torch.float8_e4m3fn]),
        ("int8_weight", [torch.uint8, torch.float32]),
        *((name, [torch.int64, torch.bool, torch.complex64]) for name in ("scale", "threshold", "shift")),
    ],
)
def test_tensor_of_a_type_that_its_name_rules_out_is_corrupted(tmp_path, name, dtypes):
    for dtype in dtypes:
        file = tmp_path / f"{dtype}.safetensors"
        tensors = {f"x.{name}": torch.zeros(4, dtype=torch.float32).to(dtype)}
        save_file(tensors, file, metadata=digests(tensors))

        with pytest.raises(ValueError, match=rf"tensor 'x.{name}' is corrupted: it is {dtype}"):
            verify_files([file])


def test_tensor_in_two_files_is_refused(tmp_path):
    files = [tmp_path / "model-00001-of-00002.safetensors", tmp_path / "model-00002-of-00002.safetensors"]
    for value, file in enumerate(files):
        save_file({"x.scale": torch.full((2,), float(value))}, file)

    with pytest.raises(ValueError, match=r"both hold a tensor 'x.scale'"):
        verify_files(files)


def test_mask_with_bytes_beyond_one_is_corrupted(tmp_path):
    file = tmp_path / "model.safetensors"
    join(file, {"x.freeze_mask": {"dtype": "BOOL", "shape": [4], "data_offsets": [0, 4]}}, b"\x00\x01\x02\x01")

    with pytest.raises(ValueError, match=r"tensor 'x.freeze_mask' is corrupted"):
        verify_files([file])


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.ckpt"])
def test_pickles_are_refused_unread(tmp_path, name):
    class Bomb:
        def __reduce__(self):
            return (exec, (f"open({str(tmp_path / 'boom')!r}, 'w')",))

    (tmp_path / name).write_bytes(pickle.dumps(Bomb()))

    with pytest.raises(ValueError, match=rf"{name}: only safetensors files are read"):
        verify_files([tmp_path / name])
    assert not (tmp_path / "boom").exists()


def test_files_of_a_folder_with_one_file(file, tmp_path):
    assert checkpoint_files(tmp_path) == [file]
    assert checkpoint_files(str(tmp_path)) == [file]


def test_files_of_a_sharded_folder_are_each_named_once(tmp_path):
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    index = {"weight_map": {"a": shards[0], "b": shards[1], "c": shards[0]}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    for shard in shards:
        save_file({"x": torch.zeros(1)}, tmp_path / shard)

    assert checkpoint_files(tmp_path) == [tmp_path / shard for shard in shards]

    (tmp_path / shards[1]).unlink()
    with pytest.raises(ValueError, match=rf"{tmp_path}: the index names .*{shards[1]}.*not there"):
        checkpoint_files(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        *("", "{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 5}}', '{"weight_map": null}', "[" * 100_000),
        *('{"weight_map": {"a": "../outside.safetensors"}}', '{"weight_map": {"a": "/etc/passwd"}}'),
    ],
    ids=lambda content: content[:40],
)
def test_damaged_index_names_the_folder(tmp_path, content):
    (tmp_path / "model.safetensors.index.json").write_text(content)

    with pytest.raises(ValueError, match=str(tmp_path)):
        checkpoint_files(tmp_path)


def test_folder_without_safetensors_is_refused(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"")

    with pytest.raises(ValueError, match=rf"{tmp_path} holds no model.safetensors"):
        checkpoint_files(tmp_path)


def test_last_checkpoint_that_was_written_to_its_end_is_taken(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def checkpoint(step: int, weights: bool, state: str | None) -> Path:
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
            torch.save({}, folder / name)
        (folder / "config.json").write_text("{}")
        if weights:
            save_file({"weight": torch.zeros(2)}, folder / "model.safetensors")
        if state is not None:
            (folder / "trainer_state.json").write_text(state)
        return folder

    assert last_whole_checkpoint(tmp_path) is None
    assert last_whole_checkpoint(tmp_path / "missing") is None
    checkpoint(9, True, "{}")
    whole = checkpoint(10, True, "{}")
    (tmp_path / "checkpoint-best").mkdir()
    # A copy that somebody kept.
    shutil.copytree(whole, tmp_path / "checkpoint-old-900")
    assert last_whole_checkpoint(tmp_path) == str(whole) and not caplog.text
    checkpoint(20, False, None)
    checkpoint(30, True, None)
    checkpoint(40, True, '{"epoch": 1')
    checkpoint(50, False, "{}")
    checkpoint(60, True, "[]")
    assert last_whole_checkpoint(tmp_path) == str(whole)
    for step in (20, 30, 40, 50, 60):
        assert f"checkpoint-{step} was not written to its end" in caplog.text


@pytest.mark.parametrize("missing", [0, 1])
def test_a_checkpoint_has_the_random_state_of_every_process(tmp_path, missing):
    tmp_path, run = tmp_path / "checkpoint-1", tmp_path
    tmp_path.mkdir()
    state = f"rng_state_{1 - missing}.pth"
    for name in ("optimizer.pt", "scheduler.pt", state):
        torch.save({}, tmp_path / name)
    for name in ("config.json", "trainer_state.json"):
        (tmp_path / name).write_text("{}")
    save_file({"weight": torch.zeros(2)}, tmp_path / "model.safetensors")

    assert set(check_whole(tmp_path)) == {"weight"}
    with pytest.raises(ValueError, match=rf"holds no rng_state_{missing}.pth.*by fewer processes"):
        check_whole(tmp_path, world_size=2)
    assert last_whole_checkpoint(run, world_size=2) is None
    # One process has one without a number: whole, so that the Trainer can say that there were fewer.
    (tmp_path / state).rename(tmp_path / "rng_state.pth")
    assert set(check_whole(tmp_path, world_size=2)) == {"weight"}


# hostile files


@pytest.mark.parametrize("offset", ["1e999", "-1", "null", "[" * 100_000], ids=lambda offset: offset[:8])
def test_header_that_makes_no_sense_is_refused(file, offset):
    header, data = split(file)
    text = json.dumps(header, separators=(",", ":")).replace('"data_offsets":[0', f'"data_offsets":[{offset}').encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)

    with pytest.raises(ValueError, match=rf"{file} is damaged: its header cannot be read"):
        verify_files([file])


def damaged(content: bytes, draw: random.Random) -> bytes:
    """A file with a few bytes, a number of its header, or its length changed."""
    (size,) = struct.unpack("<Q", content[:8])
    text = content[8 : 8 + size].decode()
    way = draw.randrange(5)
    if way == 0:
        return content[: draw.randrange(len(content))]
    if way == 1:
        position = draw.randrange(len(content))
        return content[:position] + bytes([draw.randrange(256)]) + content[position + 1 :]
    if way == 2:
        number = draw.choice(list(re.finditer(r"(?<=[\[,])\d+", text)))
        other = draw.choice(["-1", "1e999", "18446744073709551616", "null", "0.5", '"a"', str(draw.randrange(10**6))])
        text = text[: number.start()] + other + text[number.end() :]
    elif way == 3:
        old = draw.choice(["F32", "BOOL", "U8", "data_offsets", "shape", "__metadata__", "sha256:", "weight", ":"])
        text = text.replace(old, draw.choice(["F64", "I64", "", "{", "[" * 300, "\x1b[31m", "freeze_mask"]), 1)
    else:
        position = draw.randrange(len(text))
        text = text[:position] + draw.choice('{}[]",:0x\\') + text[position + 1 :]
    encoded = text.encode()
    length = draw.choice([len(encoded), len(encoded), len(encoded) + 1, 2**63, 0])
    return struct.pack("<Q", length) + encoded + content[8 + size :]


@pytest.mark.parametrize("count", [500, pytest.param(20_000, marks=pytest.mark.slow)])
def test_whatever_is_done_to_a_file_it_is_read_as_it_was_or_refused(file, tmp_path, count):
    content, draw, target = file.read_bytes(), random.Random(0), tmp_path / "damaged.safetensors"
    refused = 0
    for _ in range(count):
        target.write_bytes(damaged(content, draw))
        try:
            names = verify_files([target])
        except ValueError as error:
            refused += 1
            assert str(target) in str(error)
            continue
        with safe_open(target, framework="pt") as handle:
            known = {k: v for k, v in (handle.metadata() or {}).items() if k.startswith(METADATA_PREFIX)}
            for name in names:
                # What passes has a digest of the file, or no digest is left in it.
                assert not known or tensor_digest(handle.get_tensor(name)) in known.values()
    assert refused > count // 2
