from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForSequenceClassification

import hf_stompp
from hf_stompp import StoMPPConfig, binarize, cli, commit, pack
from hf_stompp.model.modules import masked_modules, packed_modules


def load(folder: str | Path) -> nn.Module:
    return AutoModelForSequenceClassification.from_pretrained(folder).eval()


def contents(folder: str | Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


@pytest.fixture
def latent(tiny_committed, saved) -> str:
    return saved(tiny_committed("bert"), "latent")


@pytest.fixture
def packed(tiny_packed, saved) -> str:
    return saved(tiny_packed("bert"), "packed")


@pytest.mark.parametrize("exists", [False, True])
def test_pack_writes_the_packed_model_with_its_tokenizer(latent, logits, printed, tmp_path, exists):
    output = tmp_path / "deep" / "packed"
    if exists:
        output.mkdir(parents=True)

    printed("pack", latent, output)

    loaded = load(output)
    assert packed_modules(loaded)
    assert torch.equal(logits(loaded), logits(pack(load(latent))))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert contents(output)[name] == contents(latent)[name]
    names = {"README.md", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert set(contents(output)) == names
    card = contents(output)["README.md"].decode()
    assert "import hf_stompp" in card and 'from_pretrained("packed")' in card
    # The card may be published, and where the folder was is nobody's business.
    assert str(tmp_path) not in card
    assert [path.name for path in output.parent.iterdir()] == ["packed"]


def test_pack_tells_the_sizes_of_the_files(latent, printed, tmp_path):
    result = json.loads(printed("pack", latent, tmp_path / "packed", "--json"))
    output = printed("pack", latent, tmp_path / "again")

    before, after = (Path(folder, "model.safetensors").stat().st_size for folder in (latent, tmp_path / "packed"))
    assert (result["bytes_before"], result["bytes_after"]) == (before, after)
    assert result["files"] == sorted(contents(tmp_path / "packed"))
    assert (result["class"], result["mode"]) == ("BertForSequenceClassification", "bnn")
    assert f"before: {before / 1e6:.2f} MB  {latent}\n" in output
    assert f"after:  {after / 1e6:.2f} MB  {tmp_path / 'again'}, {before / after:.1f} times smaller\n" in output


def test_sharded_model_is_packed(tiny_committed, logits, printed, tmp_path):
    model = tiny_committed("bert")
    model.save_pretrained(tmp_path / "latent", max_shard_size="50KB")
    assert len(list((tmp_path / "latent").glob("*.safetensors"))) > 1

    printed("pack", tmp_path / "latent", tmp_path / "packed")

    assert torch.equal(logits(load(tmp_path / "packed")), logits(pack(model)))


def test_output_that_is_not_empty_is_refused_and_left_alone(latent, packed, refused):
    before = contents(packed)

    message = refused("pack", latent, packed)

    assert "is not empty" in message and "--force" in message
    assert contents(packed) == before


def test_force_replaces_the_model_and_keeps_what_is_not_the_models(latent, tiny_packed, logits, printed, tmp_path):
    output = tmp_path / "output"
    tiny_packed("bert", seed=5).save_pretrained(output, max_shard_size="20KB")
    for name in ("notes.txt", "README.md"):
        (output / name).write_text("mine")
    assert (output / "model.safetensors.index.json").is_file()

    printed("pack", latent, output, "--force")

    assert torch.equal(logits(load(output)), logits(pack(load(latent))))
    names = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "notes.txt", "README.md"}
    assert set(contents(output)) == names
    assert contents(output)["notes.txt"] == contents(output)["README.md"] == b"mine"


def test_force_takes_no_files_but_those_that_hold_weights(latent, printed, tmp_path):
    output = tmp_path / "output"
    output.mkdir()
    weights = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"]
    weights += ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json"]
    mine = ["model-of-my-thesis.safetensors", "model2.safetensors", "pytorch_model_notes.bin", "pytorch_model-1.bin"]
    mine += ["my-model.safetensors", "model.safetensors.txt", "model-00001-of-00002.safetensors.old"]
    for name in weights + mine:
        (output / name).write_text("mine")

    printed("pack", latent, output, "--force")

    found = contents(output)
    assert {name for name in found if found[name] == b"mine"} == {*mine}
    assert not {*weights} & {*found}


@pytest.mark.parametrize("moved", range(9))
def test_force_that_fails_on_its_way_leaves_the_earlier_model(
    latent, tiny_packed, refused, tmp_path, monkeypatch, moved
):
    output = tmp_path / "output"
    tiny_packed("bert", seed=5).save_pretrained(output, max_shard_size="40KB")
    (output / "tokenizer.json").write_text("earlier")
    before = contents(output)
    assert len(before) > 3
    replace, calls = Path.replace, []

    def fail_once(self, target):
        calls.append(target)
        if len(calls) == moved + 1:
            raise OSError(28, "No space left on device", str(target))
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", fail_once)

    assert "no space left" in refused("pack", latent, output, "--force")
    assert len(calls) > moved
    assert contents(output) == before


def test_folder_that_a_killed_run_left_blocks_nobody(latent, tiny_packed, printed, saved, tmp_path):
    output = Path(saved(tiny_packed("bert"), "output"))
    for name in (f".output.{os.getpid()}.partial", f".{output.name}.partial"):
        (output / name).mkdir()

    printed("pack", latent, output, "--force")

    assert packed_modules(load(output))


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.other.json", "vocab.txt", "chat_template.jinja"])
def test_link_that_leads_out_of_a_model_is_refused_by_name(latent, refused, tmp_path, name):
    (tmp_path / "secret").write_text("secret")
    Path(latent, name).unlink(missing_ok=True)
    Path(latent, name).symlink_to(tmp_path / "secret")

    message = refused("pack", latent, tmp_path / "output")

    assert f"{Path(latent, name)} leads to {tmp_path / 'secret'}" in message
    assert not (tmp_path / "output").exists()


def test_link_in_the_place_of_an_earlier_file_is_not_written_through(latent, printed, tmp_path):
    output = tmp_path / "output"
    output.mkdir()
    (tmp_path / "mine").write_text("mine")
    (output / "config.json").symlink_to(tmp_path / "mine")

    printed("pack", latent, output, "--force")

    assert (tmp_path / "mine").read_text() == "mine" and not (output / "config.json").is_symlink()


def test_model_is_never_replaced_by_its_own_result(latent, refused):
    before = contents(latent)

    assert "is the model that is read" in refused("pack", latent, f"{latent}/../latent", "--force")
    assert contents(latent) == before


def test_output_that_cannot_be_a_folder_is_refused(latent, refused, tmp_path):
    (tmp_path / "file").write_text("")

    assert "is a file: name a folder" in refused("pack", latent, tmp_path / "file")
    message = refused("pack", latent, tmp_path / "file" / "packed")
    assert "cannot write to" in message and "choose another folder" in message


@pytest.mark.usefixtures("permissions_hold")
def test_output_without_write_permission_is_refused(latent, refused, tmp_path):
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o555)

    for output in (closed, closed / "packed"):
        message = refused("pack", latent, output)
        assert "Permission denied" in message and "change its permissions" in message


@pytest.mark.usefixtures("permissions_hold")
def test_model_that_may_not_be_read_is_refused(latent, refused, tmp_path):
    path = Path(latent, "model.safetensors")
    path.chmod(0)

    assert f"no permission for {path}: change its permissions" in refused("pack", latent, tmp_path / "packed")
    assert not (tmp_path / "packed").exists()


def test_permission_that_ends_while_writing_is_one_line(latent, refused, tmp_path, monkeypatch):
    def save(*args, **kwargs):
        raise PermissionError(13, "Permission denied", "/closed/model.safetensors")

    monkeypatch.setattr("transformers.PreTrainedModel.save_pretrained", save)

    message = refused("pack", latent, tmp_path / "packed")

    assert message == ("no permission for /closed/model.safetensors: change its permissions, or choose another place")


@pytest.mark.parametrize(
    ("state", "command", "expected"),
    [
        ("float", "pack", "is a float model, and pack takes a committed latent one: train it with StoMPPTrainer"),
        ("packed", "pack", "is packed already: use it as it is, or `hf-stompp unpack "),
        ("float", "unpack", "is a float model: there is nothing to unpack"),
        ("latent", "unpack", "is latent already: use it as it is"),
    ],
)
def test_model_in_another_state_is_refused(
    tiny_model, latent, packed, refused, saved, tmp_path, state, command, expected
):
    model = {"float": lambda: saved(tiny_model("bert"), "float"), "latent": lambda: latent, "packed": lambda: packed}

    assert expected in refused(command, model[state](), tmp_path / "output")
    assert not (tmp_path / "output").exists()


def test_model_that_is_not_committed_is_refused_by_the_names_of_its_units(tiny_model, refused, saved, tmp_path):
    folder = saved(binarize(tiny_model("bert")))

    message = refused("pack", folder, tmp_path / "output")

    assert "these units are not: bert.encoder.layer.0, bert.encoder.layer.1. Train to the end" in message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "vocab.txt"]


def test_committed_model_that_saw_no_batch_is_refused(tiny_model, refused, saved, tmp_path):
    folder = saved(commit(binarize(tiny_model("bert"))))

    assert "has no scale yet" in refused("pack", folder, tmp_path / "output")


def test_latent_model_without_its_head_is_refused_by_the_name_of_a_tensor(tiny_committed, refused, saved, tmp_path):
    folder = saved(tiny_committed("bert"))
    path = Path(folder, "config.json")
    path.write_text(path.read_text().replace("ForSequenceClassification", "ForQuestionAnswering"))

    assert "lacks qa_outputs.bias and 1 more" in refused("pack", folder, tmp_path / "output")


@pytest.mark.parametrize("where", ["new", "there", "deep/in/new"])
def test_interrupted_run_leaves_nothing(latent, tmp_path, monkeypatch, capsys, where):
    output = tmp_path / where
    if where == "there":
        output.mkdir()
    before = sorted(path.name for path in tmp_path.iterdir())

    def save(self, folder, *args, **kwargs):
        Path(folder, "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr("transformers.PreTrainedModel.save_pretrained", save)

    assert cli.main(["pack", latent, str(output)]) == 130
    assert capsys.readouterr().err.strip() == "hf-stompp: interrupted"
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert where != "there" or not list(output.iterdir())


def test_unpack_gives_a_latent_model_that_packs_to_the_same_bits(packed, logits, printed, tmp_path):
    output = printed("unpack", packed, tmp_path / "latent")
    printed("pack", tmp_path / "latent", tmp_path / "again")

    model = load(tmp_path / "latent")
    assert masked_modules(model) and "times larger" in output
    torch.testing.assert_close(logits(model), logits(load(packed)), rtol=1e-5, atol=1e-5)
    bits, again = (load(folder).state_dict() for folder in (packed, tmp_path / "again"))
    names = [name for name in bits if name.endswith("packed_weight")]
    assert names and all(torch.equal(bits[name], again[name]) for name in names)
    assert (tmp_path / "latent" / "tokenizer.json").is_file()


@pytest.mark.parametrize("embeddings", ["float", "int8", "binary"])
def test_unpack_float_gives_a_plain_model_of_scaled_signs(tiny_packed, saved, logits, printed, tmp_path, embeddings):
    config = StoMPPConfig(mode="bwn", activation_bits=None, word_embeddings=embeddings)
    model = tiny_packed("bert", config)
    folder = saved(model)

    printed("unpack", folder, tmp_path / "float", "--float")

    assert "quantization_config" not in json.loads((tmp_path / "float" / "config.json").read_text())
    plain = load(tmp_path / "float")
    assert not masked_modules(plain) and not packed_modules(plain)
    torch.testing.assert_close(logits(plain), logits(model), rtol=1e-5, atol=1e-5)
    weight = plain.bert.encoder.layer[0].intermediate.dense.weight
    assert type(plain.bert.encoder.layer[0].intermediate.dense) is nn.Linear
    torch.testing.assert_close(weight.abs(), weight.abs()[:, :1].expand_as(weight))
    assert set(plain.state_dict()) == set(load(tmp_path / "float").state_dict())
    printed("inspect", tmp_path / "float")


def test_unpack_float_of_binary_activations_is_refused(packed, refused, tmp_path):
    message = refused("unpack", packed, tmp_path / "float", "--float")

    assert "binary activations" in message and "without --float" in message
    assert not (tmp_path / "float").exists()


@pytest.mark.slow
def test_model_of_the_hubs_cache_is_packed_with_its_tokenizer(latent, tmp_path):
    snapshot = tmp_path / "cache" / "models--user--model" / "snapshots" / ("0" * 40)
    shutil.copytree(latent, snapshot)
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text("0" * 40)
    # As downloads are kept.
    (snapshot.parent.parent / "blobs").mkdir()
    (snapshot / "tokenizer.json").rename(snapshot.parent.parent / "blobs" / "5f")
    (snapshot / "tokenizer.json").symlink_to("../../blobs/5f")
    run = "import sys; from hf_stompp.cli import main; sys.exit(main())"

    result = subprocess.run(
        [sys.executable, "-c", run, "pack", "user/model", str(tmp_path / "packed")],
        env={**os.environ, "HF_HUB_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        cwd=Path(hf_stompp.__file__).parent.parent,
    )

    assert (result.returncode, result.stderr) == (0, "")
    assert "MB  user/model\n" in result.stdout
    assert packed_modules(load(tmp_path / "packed")) and (tmp_path / "packed" / "tokenizer.json").is_file()
