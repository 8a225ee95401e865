from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hub_server import HubServer
from huggingface_hub import ModelCard, metadata_load
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError
from huggingface_hub.repocard_data import model_index_to_eval_results
from safetensors import safe_open
from safetensors.torch import load, save_file
from transformers import AutoModel, AutoModelForSequenceClassification
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.utils.hub import create_and_tag_model_card

from hf_stompp.model.card import (
    add_section,
    complete_card,
    is_repository,
    measures,
    model_card,
    usage_section,
)
from hf_stompp.output import printable
from hf_stompp.reports.dynamics import final_evaluation
from hf_stompp.training.pushing import explained, same_weights_kept


TESTS = Path(__file__).parent

# What every process below begins with: a run of twelve steps, and a tokenizer.
PRELUDE = """
import json, os, sys
from pathlib import Path
import torch
from datasets import Dataset
from huggingface_hub import ModelCard
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertConfig, BertForSequenceClassification
from transformers import BertTokenizer, pipeline
from hf_stompp import StoMPPConfig, StoMPPTrainer, StoMPPTrainingArguments, binarize, pack

IDS = torch.arange(5, 15).view(1, 10)
TEXT = "word7 word9 word30"

def make_trainer(folder, **arguments):
    torch.manual_seed(0)
    sizes = dict(hidden_size=36, num_hidden_layers=2, num_attention_heads=4, intermediate_size=76)
    model = BertForSequenceClassification(BertConfig(vocab_size=64, max_position_embeddings=40, **sizes))
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"word{index}" for index in range(5, 64))]
    tokenizer = BertTokenizer(vocab={word: index for index, word in enumerate(words)}, model_max_length=40)
    ids = torch.randint(5, 64, (32, 10), generator=torch.Generator().manual_seed(0))
    dataset = Dataset.from_dict({"input_ids": ids.tolist(), "labels": (ids[:, 0] > 32).long().tolist()})
    settings = dict(max_steps=12, per_device_train_batch_size=4, learning_rate=1e-3, refresh_period=5, use_cpu=True,
                    save_strategy="no", report_to="none", disable_tqdm=True, logging_steps=4)
    return StoMPPTrainer(
        model=binarize(model, StoMPPConfig()),
        args=StoMPPTrainingArguments(str(folder), **{**settings, **arguments}),
        train_dataset=dataset,
        eval_dataset=dataset.select(range(16)),
        processing_class=tokenizer,
        compute_metrics=lambda p: {"accuracy": float((p.predictions.argmax(-1) == p.label_ids).mean())},
    )

def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits

def failure(push):
    try:
        push()
    except Exception as error:
        return {"kind": [base.__name__ for base in type(error).__mro__], "message": str(error)}
    return None
"""

GLUE = (
    'dict(tasks="text-classification", dataset_tags="glue", dataset_args="sst2", dataset="GLUE SST2", language="en", '
    'finetuned_from="google-bert/bert-base-uncased")'
)


def run(hub: Any, folder: Path, code: str, token: str | None = "hf_writer", prelude: str = PRELUDE) -> Any:
    """Runs a process whose Hub is the server; what it leaves in `out` comes back."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(folder / "home"),
        # Its storage is another protocol, in a library of its own.
        "HF_HUB_DISABLE_XET": "1",
        "OMP_NUM_THREADS": "1",
        "NO_PROXY": "127.0.0.1,localhost",
    }
    if token is not None:
        environment["HF_TOKEN"] = token
    result = folder / "result.json"
    result.unlink(missing_ok=True)
    script = f"{prelude}\nout = {{}}\n{code}\nimport json\njson.dump(out, open({str(result)!r}, 'w'))\n"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return {**json.loads(result.read_text()), "stderr": done.stderr}


@pytest.fixture
def hub() -> Iterator[Any]:
    with HubServer() as server:
        yield server


@pytest.fixture(scope="module")
def pushed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, Path, Any]]:
    """A Hub with what one run pushed: `me/tiny` (packed on main, latent on its branch) and `me/alone`."""
    folder = tmp_path_factory.mktemp("pushed")
    with HubServer() as server:
        out = run(
            server,
            folder,
            f"""
trainer = make_trainer("run", hub_model_id="me/tiny", hub_token="hf_writer", card_speed=True)
out["too_early"] = failure(trainer.push_to_hub)
out["requests_before"] = {len(server.log)}
trainer.train()
trainer.save_model()
trainer.evaluate()
info = trainer.push_to_hub(commit_message="Packed", **{GLUE})
out["url"] = info.commit_url
ModelCard.load("me/tiny").validate()
latent = trainer.push_to_hub(latent=True, blocking=False, **{GLUE}).result()
packed = pack(trainer.model)
packed.push_to_hub("me/alone", tags=["mine"])
torch.save([logits(packed), trainer.model.state_dict()], "expected.pt")
out["after"] = [type(trainer.model).__name__, trainer.args.output_dir, trainer.args.hub_token]
trainer.push_to_hub(revision="trial", latent=False)
""",
        )
        yield server, folder, out


# --- text, without a Hub ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", ["packed", "latent"])
@pytest.mark.parametrize("revision", [None, "latent"])
def test_the_section_imports_the_package_before_it_loads_the_model(state: str, revision: str | None) -> None:
    section = usage_section("BertForSequenceClassification", "me/tiny", state, revision, "text-classification")
    blocks = [block.split("```")[0] for block in section.split("```python\n")[1:]]
    where = '"me/tiny"' if revision is None else '"me/tiny", revision="latent"'
    assert f"BertForSequenceClassification.from_pretrained({where})" in blocks[0]
    assert len(blocks) == (2 if state == "packed" else 1)
    for block in blocks:
        assert block.startswith("import hf_stompp\n")
        compile(block, "card", "exec")
    assert state == "latent" or f'pipeline("text-classification", model={where})' in blocks[1]


def test_a_task_without_a_pipeline_for_text_gets_none() -> None:
    assert "pipeline" not in usage_section("ViTForImageClassification", "me/tiny", task="image-classification")


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


def test_measures_are_those_of_the_binary_network() -> None:
    logged = {
        "eval_loss": 0.5,
        "eval_accuracy": 0.75,
        "eval_combined_score": 0.7,
        "eval_mixed_accuracy": 0.9,
        "eval_runtime": 1.0,
        "eval_samples_per_second": 3.0,
        "epoch": 2.0,
        "step": 12,
    }
    assert measures(logged) == {"accuracy": 0.75, "combined_score": 0.7}
    assert measures(None) == {}
    odd = {"eval_accuracy": np.float32(0.5), "eval_report": "good", "eval_by_class": [0.1], "eval_f1": None}
    assert measures({**odd, "eval_pearson": float("nan"), "eval_count": 3}) == {"accuracy": 0.5, "count": 3.0}


def evaluation(step: int, accuracy: float) -> dict[str, float]:
    return {"eval_loss": 1.0, "eval_accuracy": accuracy, "step": step}


END = {"train_runtime": 1.0, "step": 12}


@pytest.mark.parametrize(
    ("log", "best_step", "expected"),
    [
        ([evaluation(6, 0.6), evaluation(12, 0.7), END, evaluation(12, 0.8)], None, 0.8),
        ([evaluation(6, 0.6), evaluation(12, 0.7), END, evaluation(12, 0.8)], 6, 0.8),
        ([evaluation(6, 0.6), evaluation(12, 0.7), END], None, 0.7),
        ([evaluation(6, 0.6), evaluation(12, 0.7), END], 6, 0.6),
        ([evaluation(6, 0.6), END], None, None),
        ([END], None, None),
        ([], None, None),
    ],
    ids=["after", "after_the_best_was_loaded", "last_step", "best_step", "only_earlier", "never", "untrained"],
)
def test_reported_measures_are_those_of_the_model_that_is_held(
    log: list[dict[str, float]], best_step: int | None, expected: float | None
) -> None:
    assert final_evaluation(log, 12, best_step).get("eval_accuracy") == expected


def test_a_packed_model_that_was_only_evaluated_reports_that() -> None:
    assert final_evaluation([evaluation(0, 0.5)], 0, None)["eval_accuracy"] == 0.5


def test_folders_and_what_the_hub_would_refuse_are_no_repositories(tmp_path: Path) -> None:
    assert is_repository("google-bert/bert-base-uncased") and is_repository("gpt2")
    assert not any(is_repository(name) for name in ("", None, str(tmp_path), "/no/such/folder", "a/b/c", "-x-/y"))


@pytest.mark.parametrize("mode", ["bnn", "bwn"])
def test_a_card_of_the_model_alone_is_sound(tiny_packed: Any, tmp_path: Path, mode: str) -> None:
    from hf_stompp import StoMPPConfig, binarization_report

    packed = tiny_packed("bert", StoMPPConfig(mode=mode, word_embeddings="binary"))
    speed = [{"batch": 8, "length": 128, "float": 0.03, "packed": 0.004}]
    card = model_card(packed, "tiny", "me/tiny", tags=["mine"], speed=speed if mode == "bnn" else ())
    card.save(tmp_path / "README.md")
    assert metadata_load(tmp_path / "README.md")["tags"] == ["mine", "stompp", "binary", "1-bit"]
    again = ModelCard.load(tmp_path / "README.md")
    assert again.data.to_dict() == card.data.to_dict() and str(again) == str(card)
    text = str(card)
    total = binarization_report(packed).total
    assert f"{total.bytes_before:,} as a float model, {total.bytes_packed:,} packed" in text
    binary, rounded = ("binary: the activations that enter them", "rounded to 8 bits: the activations that enter them")
    assert ((binary in text), (rounded in text)) == (mode == "bnn", mode == "bwn")
    timed = re.search(r"8 x 128 tokens +\| 30.00 +\| 4.00 +\| 7.5 +\|\n\n.*: .+, \d+ threads, float32\.\n\n##", text)
    assert bool(timed) == ("## Speed" in text) == (mode == "bnn")
    assert "binary: the word embeddings" in text and "2606.27759" in text
    assert not any(word in text for word in ("None", "{{", "{%", "More information"))
    assert "\n\n\n" not in text


def test_a_card_that_somebody_wrote_keeps_its_text(tiny_packed: Any, tmp_path: Path) -> None:
    card = tmp_path / "README.md"
    card.write_text("---\nlicense: mit\ntags:\n- mine\n---\n# Mine\n\nMy words.\n\n## Data\n\nMine too.\n")
    complete_card(tiny_packed("bert"), card, "me/tiny")
    text = card.read_text()
    assert all(words in text for words in ("license: mit", "My words.", "Mine too.", "import hf_stompp"))
    assert metadata_load(card)["tags"] == ["mine", "stompp", "binary", "1-bit"]
    complete_card(tiny_packed("bert"), card, "me/tiny")
    assert card.read_text() == text


@pytest.fixture
def empty_form(monkeypatch: pytest.MonkeyPatch) -> str:
    """The card that Transformers makes for a repository that has none."""

    def missing(*args: Any, **kwargs: Any) -> None:
        raise EntryNotFoundError("there is no README.md")

    monkeypatch.setattr(ModelCard, "load", missing)
    card = str(create_and_tag_model_card("me/tiny", tags=["mine"]))
    monkeypatch.undo()
    return card


def test_an_empty_form_is_replaced_and_its_metadata_stay(tiny_packed: Any, tmp_path: Path, empty_form: str) -> None:
    card = tmp_path / "README.md"
    card.write_text(empty_form.replace("tags:", "license: mit\ntags:"))
    complete_card(tiny_packed("bert"), card, "me/tiny")
    assert "[More Information Needed]" not in card.read_text() and "## What is binary" in card.read_text()
    metadata = metadata_load(card)
    assert metadata["license"] == "mit" and metadata["tags"] == ["mine", "stompp", "binary", "1-bit"]


@pytest.mark.parametrize(
    ("form", "written"),
    [
        ("automatically generated.", "automatically generated. I trained it for three weeks."),
        ("## Uses\n", "## Uses\n\nAsk me first.\n"),
        ("# Model Card for Model ID", "# Card of the model that I trained"),
        ("### Direct Use", "Mine.\n\n### Direct Use"),
    ],
)
def test_an_empty_form_that_was_written_in_keeps_every_line(
    tiny_packed: Any, tmp_path: Path, empty_form: str, form: str, written: str
) -> None:
    card = tmp_path / "README.md"
    assert form in empty_form
    card.write_text(empty_form.replace(form, written))
    complete_card(tiny_packed("bert"), card, "me/tiny")
    text = ModelCard(card.read_text()).text
    lines = iter(text.splitlines())
    assert all(line in lines for line in ModelCard(empty_form.replace(form, written)).text.splitlines())
    assert "import hf_stompp" in text and metadata_load(card)["tags"] == ["mine", "stompp", "binary", "1-bit"]


# Names that would be headings, images, links, or code that ends early.
NAMES = [
    "a\n\n# Heading",
    "![x](http://e/i)",
    "`\n\n## Heading\n`",
    "``` `` `x",
    "[a](b)",
    "\x1b[2J",
    "a",
]


def elements(text: str) -> list[tuple[str, str]]:
    """What Markdown makes of a card: kinds and contents of all but its plain text."""
    markdown_it = pytest.importorskip("markdown_it")
    tokens = markdown_it.MarkdownIt("commonmark").enable("table").parse(text)
    inner = [child for token in tokens for child in (token.children or [token])]
    return [(token.type, token.content) for token in inner if token.type not in ("text", "softbreak")]


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_names_of_a_config_are_code_in_a_card(tiny_packed: Any, name: str) -> None:
    packed = tiny_packed("bert")
    config = packed.config.quantization_config
    config.modes = {"pattern": "bwn"}
    plain = elements(model_card(packed, "tiny", "me/tiny").text)
    config.modules_to_not_convert = [name + pattern for pattern in config.modules_to_not_convert]
    config.modes = {name: "bwn"}
    text = model_card(packed, "tiny", "me/tiny").text
    found = elements(text)
    assert [kind for kind, _ in found] == [kind for kind, _ in plain]
    codes = [content for kind, content in found if kind == "code_inline"]
    assert printable(name + "pooler") in codes
    assert all(character.isprintable() or character == "\n" for character in text)


def test_errors_that_are_not_of_the_hub_pass_unchanged(tmp_path: Path) -> None:
    for error in (OSError("no space left"), RuntimeError("else"), ValueError("mine")):
        with pytest.raises(type(error), match=str(error)) as caught, explained("me/tiny", tmp_path):
            raise error
        assert caught.value is error


# --- a process that does not know the format -------------------------------------------------------------------------


@pytest.fixture
def without_the_import(monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformers as it is where nobody has imported hf_stompp."""
    monkeypatch.delitem(AUTO_QUANTIZATION_CONFIG_MAPPING, "stompp")
    monkeypatch.delitem(AUTO_QUANTIZER_MAPPING, "stompp")


def test_no_family_is_loaded_without_the_import(
    family: str, tiny_packed: Any, tmp_path: Path, without_the_import: None
) -> None:
    packed = tiny_packed(family)
    packed.save_pretrained(tmp_path, max_shard_size="20KB")
    for kind in (type(packed), AutoModel):
        with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
            kind.from_pretrained(tmp_path)


def test_mismatches_that_are_ignored_leave_random_weights(
    tiny_packed: Any, logits: Any, tmp_path: Path, without_the_import: None
) -> None:
    # All that is left to a reader who insists; the card warns of it.
    packed = tiny_packed("bert")
    packed.save_pretrained(tmp_path)
    loaded = type(packed).from_pretrained(tmp_path, ignore_mismatched_sizes=True)
    assert type(loaded.bert.encoder.layer[0].output.dense) is torch.nn.Linear
    assert not torch.equal(logits(loaded), logits(packed))


def test_a_latent_model_is_a_float_model_to_a_process_without_the_import(
    tiny_committed: Any, tmp_path: Path, without_the_import: None
) -> None:
    # Its weights have the names and shapes of the float model's: nothing in the file can prevent it.
    latent = tiny_committed("bert")
    latent.save_pretrained(tmp_path)
    loaded, loading = type(latent).from_pretrained(tmp_path, output_loading_info=True)
    name = "bert.encoder.layer.0.output.dense"
    assert torch.equal(loaded.get_submodule(name).weight, latent.get_submodule(name).weight)
    assert not loading["missing_keys"] and f"{name}.freeze_mask" in loading["unexpected_keys"]


def test_what_stops_others_goes_unnoticed_here(family: str, tiny_packed: Any, tmp_path: Path) -> None:
    packed = tiny_packed(family)
    packed.save_pretrained(tmp_path / "whole")
    # A model without a head is read from the file of one with a head, and the other way round.
    base, loading = AutoModel.from_pretrained(tmp_path / "whole", output_loading_info=True)
    assert not [name for name in loading["unexpected_keys"] if "layer" in name]
    base.save_pretrained(tmp_path / "base")
    _, loading = type(packed).from_pretrained(tmp_path / "base", output_loading_info=True)
    assert not [name for name in loading["unexpected_keys"] if "layer" in name] and not loading["mismatched_keys"]


def test_files_from_before_there_was_a_guard_are_read(tiny_packed: Any, logits: Any, tmp_path: Path) -> None:
    packed = tiny_packed("bert")
    packed.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    with safe_open(file, framework="pt") as handle:
        metadata = handle.metadata()
    tensors = {name: tensor for name, tensor in load(file.read_bytes()).items() if tensor.numel()}
    save_file(tensors, file, metadata=metadata)
    assert torch.equal(logits(type(packed).from_pretrained(tmp_path)), logits(packed))


@pytest.mark.parametrize("what", ["same", "other", "damaged", "failed", "first"])
def test_weights_that_are_saved_again_keep_their_file(tiny_packed: Any, tmp_path: Path, what: str) -> None:
    packed = tiny_packed("bert")
    file = tmp_path / "model.safetensors"
    if what != "first":
        packed.save_pretrained(tmp_path)
    if what == "damaged":
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
    if what == "other":
        packed.classifier.bias.data += 1
    before = file.read_bytes() if file.is_file() else b""
    saved = b""
    try:
        with same_weights_kept(tmp_path):
            packed.save_pretrained(tmp_path)
            saved = file.read_bytes()
            if what == "failed":
                file.write_bytes(saved[:100])
                raise OSError("no space left")
    except OSError:
        assert what == "failed"
    assert file.read_bytes() == (before if what in ("same", "failed") else saved)
    assert not (tmp_path / "_earlier.safetensors").exists()


# --- the real client against a Hub on loopback -----------------------------------------------------------------------


@pytest.mark.slow
def test_a_model_that_is_not_committed_is_not_pushed(pushed: Any) -> None:
    _, _, out = pushed
    error = out["too_early"]
    assert error["kind"][0] == "ValueError"
    assert "these units are not: bert.encoder.layer.0, bert.encoder.layer.1" in error["message"]
    assert out["requests_before"] == 0


@pytest.mark.slow
def test_the_packed_model_is_pushed_with_all_that_loading_needs(pushed: Any) -> None:
    server, _, out = pushed
    files = server.repositories["me/tiny"].files("main")
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= set(files)
    assert not any(name.startswith(("checkpoint", "packed", "latent", "run")) for name in files)
    config = json.loads(files["config.json"])["quantization_config"]
    assert config["quant_method"] == "stompp" and config["state"] == "packed"
    names = set(load(files["model.safetensors"]))
    assert any(name.endswith("packed_weight") for name in names)
    assert not any(name.endswith("freeze_mask") for name in names)
    assert "Packed" in server.repositories["me/tiny"].messages and out["url"].startswith(server.url)


@pytest.mark.slow
def test_the_token_stays_here(pushed: Any) -> None:
    server, folder, _ = pushed
    for repository in server.repositories.values():
        for files in repository.commits.values():
            assert not [name for name, content in files.items() if b"hf_writer" in content]
    assert b"hf_writer" not in (folder / "run" / "packed" / "training_args.bin").read_bytes()


@pytest.mark.slow
def test_a_push_leaves_the_trainer_and_the_folder_of_the_run_as_they_were(pushed: Any) -> None:
    _, folder, out = pushed
    assert out["after"] == ["BertForSequenceClassification", "run", "hf_writer"]
    saved = json.loads((folder / "run" / "config.json").read_text())["quantization_config"]
    assert saved["state"] == "latent" and (folder / "run" / "model.safetensors").is_file()


@pytest.mark.slow
def test_the_card_holds_up_against_the_metadata_validator(pushed: Any, tmp_path: Path) -> None:
    server, _, _ = pushed
    card = tmp_path / "README.md"
    card.write_bytes(server.repositories["me/tiny"].files("main")["README.md"])
    data = metadata_load(card)
    assert data["library_name"] == "transformers" and data["pipeline_tag"] == "text-classification"
    assert data["base_model"] == "google-bert/bert-base-uncased" and data["datasets"] == ["glue"]
    assert data["metrics"] == ["accuracy"] and {"stompp", "binary", "1-bit"} <= set(data["tags"])
    name, (result,) = model_index_to_eval_results(data["model-index"])
    assert name == "tiny"
    assert (result.task_type, result.dataset_type, result.dataset_config) == ("text-classification", "glue", "sst2")
    assert result.metric_type == "accuracy" and 0 <= result.metric_value <= 1
    # ModelCard.validate was called by the client, and its check is the server's.
    assert server.count("POST", "validate-yaml") >= 1
    loaded = ModelCard.load(card)
    assert str(ModelCard(str(loaded))) == str(loaded)
    text = loaded.text
    assert 'BertForSequenceClassification.from_pretrained("me/tiny")' in text and "import hf_stompp" in text
    for words in (
        "progression_schedule | cubic",
        "learning_rate | 0.001",
        "fully binary from step",
        "2606.27759",
        "## Speed",
    ):
        assert words in text


@pytest.mark.slow
def test_the_latent_model_is_on_its_own_branch(pushed: Any) -> None:
    server, _, _ = pushed
    files = server.repositories["me/tiny"].files("latent")
    assert json.loads(files["config.json"])["quantization_config"]["state"] == "latent"
    assert 'from_pretrained("me/tiny", revision="latent")' in files["README.md"].decode()
    assert set(server.repositories["me/tiny"].branches) == {"main", "latent", "trial"}
    trial = server.repositories["me/tiny"].files("trial")["README.md"].decode()
    assert 'from_pretrained("me/tiny", revision="trial")' in trial


@pytest.mark.slow
def test_a_packed_model_pushed_by_itself_says_how_it_is_loaded(pushed: Any) -> None:
    server, _, _ = pushed
    files = server.repositories["me/alone"].files("main")
    text = files["README.md"].decode()
    assert "import hf_stompp" in text and 'BertForSequenceClassification.from_pretrained("me/alone")' in text
    assert all(f"- {tag}\n" in text for tag in ("mine", "stompp", "1-bit"))
    assert "[More Information Needed]" not in text and "## What is binary, and what is not" in text


FRESH = """
import hf_stompp, torch
from transformers import AutoModelForSequenceClassification, pipeline
from transformers.pipelines.text_classification import softmax
IDS = torch.arange(5, 15).view(1, 10)
expected, latent = torch.load("expected.pt")
"""


@pytest.mark.slow
def test_a_fresh_process_gets_the_same_model_bit_for_bit(pushed: Any) -> None:
    server, folder, _ = pushed
    out = run(
        server,
        folder,
        """
for name in ("me/tiny", "me/alone"):
    model = AutoModelForSequenceClassification.from_pretrained(name)
    with torch.no_grad():
        out[name] = torch.equal(model(IDS).logits, expected)
model, loading = AutoModelForSequenceClassification.from_pretrained("me/tiny", output_loading_info=True)
out["loading"] = {key: len(value) for key, value in loading.items()}
pipe = pipeline("text-classification", model="me/tiny", top_k=None)
text = "word7 word9 word30"
with torch.no_grad():
    # The pipeline's own softmax: torch's may round otherwise.
    scores = softmax(model(**pipe.tokenizer(text, return_tensors="pt")).logits.numpy())[0].tolist()
found = {entry["label"]: entry["score"] for entry in pipe([text])[0]}
out["pipeline"] = [found["LABEL_0"], found["LABEL_1"]] == scores
loaded = AutoModelForSequenceClassification.from_pretrained("me/tiny", revision="latent").state_dict()
out["latent"] = loaded.keys() == latent.keys() and all(torch.equal(loaded[name], latent[name]) for name in latent)
""",
        token=None,
        prelude=FRESH,
    )
    assert out["me/tiny"] and out["me/alone"] and out["pipeline"] and out["latent"]
    assert set(out["loading"].values()) == {0}
    assert "UNEXPECTED" not in out["stderr"]


@pytest.mark.slow
def test_a_process_without_the_import_gets_an_error_and_no_random_model(pushed: Any) -> None:
    server, folder, _ = pushed
    out = run(
        server,
        folder,
        """
for name in ("me/tiny", "me/alone"):
    for kind in (AutoModel, AutoModelForSequenceClassification, BertForTokenClassification):
        try:
            kind.from_pretrained(name)
            out[f"{name} {kind.__name__}"] = "loaded"
        except RuntimeError as error:
            out[f"{name} {kind.__name__}"] = str(error)
try:
    pipeline("text-classification", model="me/tiny")
    out["pipeline"] = "loaded"
except Exception as error:
    out["pipeline"] = str(error)
import sys
assert "hf_stompp" not in sys.modules
""",
        token=None,
        prelude="from transformers import AutoModel, AutoModelForSequenceClassification, BertForTokenClassification, "
        "pipeline\n",
    )
    stderr = out.pop("stderr")
    assert len(out) == 7 and all("ignore_mismatched_sizes" in message for message in out.values()), out
    assert "stompp" in stderr and "MISMATCH" in stderr


@pytest.mark.slow
def test_failed_pushes_say_what_to_do_and_a_repeated_one_succeeds(hub: Any, tmp_path: Path) -> None:
    # The client repeats an upload by itself: these two must not even be noticed.
    hub.fail("PUT", "^/lfs/", 500)
    hub.fail("PUT", "^/lfs/", None)
    # A commit it does not repeat.
    commit = "^/api/models/me/tiny/commit/"
    for status in (500, None, 412, 409):
        hub.fail("POST", commit, status)
    out = run(
        hub,
        tmp_path,
        """
trainer = make_trainer("run", hub_model_id="me/tiny")
trainer.train()
out["failures"] = [failure(trainer.push_to_hub) for _ in range(4)]
out["files"] = sorted(path.name for path in Path("run/packed").iterdir())
model = AutoModelForSequenceClassification.from_pretrained("run/packed")
out["kept"] = torch.equal(logits(model), logits(pack(trainer.model)))
trainer.push_to_hub()
model = AutoModelForSequenceClassification.from_pretrained("me/tiny")
out["equal"] = torch.equal(logits(model), logits(pack(trainer.model)))
""",
    )
    fault, cut, stale, conflict = out["failures"]
    kept = "Nothing is lost: the files are in run/packed. Push again, or `hf upload me/tiny run/packed`."
    assert all(error["message"].endswith(kept) for error in out["failures"])
    assert all("HfHubHTTPError" in error["kind"] for error in (fault, stale, conflict))
    assert "The Hub is busy or has a fault: wait a little." in fault["message"]
    assert "ConnectionError" in cut["kind"] and "the connection broke" in cut["message"]
    for error in (stale, conflict):
        assert "Somebody else changed me/tiny meanwhile" in error["message"]
    assert out["kept"] and out["equal"] and "model.safetensors" in out["files"]
    # Two large files and two failures: what had arrived was not sent again.
    assert hub.count("PUT", "^/lfs/") == 4
    assert hub.count("POST", commit) == 5


@pytest.mark.slow
def test_a_push_without_the_right_to_it_says_how_to_get_it(hub: Any, tmp_path: Path) -> None:
    out = run(
        hub,
        tmp_path,
        """
trainer = make_trainer("run", hub_model_id="me/tiny")
trainer.train()
out["none"] = failure(trainer.push_to_hub)
out["wrong"] = failure(lambda: trainer.push_to_hub(token="hf_wrong"))
out["reader"] = failure(lambda: trainer.push_to_hub(token="hf_reader"))
out["saved"] = Path("run/packed/model.safetensors").is_file()
trainer.push_to_hub(token="hf_writer")
out["expired"] = failure(lambda: trainer.push_to_hub(token="hf_wrong"))
""",
        token=None,
    )
    for name in ("none", "wrong", "expired"):
        assert "HfHubHTTPError" in out[name]["kind"]
        assert "log in with `hf auth login`, or set HF_TOKEN, or pass token=" in out[name]["message"]
    assert "The token may not write to me/tiny" in out["reader"]["message"]
    assert all(out[name]["message"].count("Nothing is lost") == 1 for name in ("none", "wrong", "reader", "expired"))
    assert out["saved"] and set(hub.repositories) == {"me/tiny"}


@pytest.mark.slow
def test_a_hub_that_cannot_be_reached_costs_nothing(hub: Any, tmp_path: Path) -> None:
    out = run(
        hub,
        tmp_path,
        """
import socket
import transformers.trainer
from huggingface_hub import HfApi
trainer = make_trainer("run")
trainer.train()
with socket.socket() as closed:
    closed.bind(("127.0.0.1", 0))
    port = closed.getsockname()[1]
original = transformers.trainer.hf_api
transformers.trainer.hf_api = lambda: HfApi(endpoint=f"http://127.0.0.1:{port}")
out["unreachable"] = failure(trainer.push_to_hub)
out["latent"] = failure(lambda: trainer.push_to_hub(latent=True, dataset="films"))
out["card"] = Path("run/latent/README.md").read_text()
transformers.trainer.hf_api = original
out["saved"] = all(Path("run/packed", name).is_file() for name in ("model.safetensors", "README.md"))
out["url"] = trainer.push_to_hub().commit_url
""",
    )
    assert "ConnectionError" in out["unreachable"]["kind"]
    assert "could not be reached" in out["unreachable"]["message"] and out["saved"]
    # The card says what that of the push would say.
    assert all(text in out["card"] for text in ("# run\n", 'revision="latent"', "the films data set"))
    # Without a name it is called like the folder of the run.
    assert set(hub.repositories) == {"me/run"} and "/me/run/" in out["url"]


@pytest.mark.slow
def test_checkpoints_pushed_during_a_run_stay_off_the_main_branch(hub: Any, tmp_path: Path) -> None:
    strategies = ("every_save", "checkpoint")
    # A checkpoint that cannot be pushed does not stop the training.
    for strategy in strategies:
        hub.fail("POST", f"/me/{strategy}/commit/latent$", 403)
    out = run(
        hub,
        tmp_path,
        f"""
from concurrent.futures import wait
for strategy in {strategies!r}:
    trainer = make_trainer(strategy, push_to_hub=True, hub_model_id=f"me/{{strategy}}", hub_token="hf_writer",
                           save_strategy="steps", save_steps=4, save_total_limit=1, hub_strategy=strategy,
                           hub_always_push=True)
    trainer.train()
    trainer.save_model()
    wait(trainer._pushes)
""",
        token=None,
    )
    for strategy in strategies:
        repository = hub.repositories[f"me/{strategy}"]
        main, latent = repository.files("main"), repository.files("latent")
        assert json.loads(main["config.json"])["quantization_config"]["state"] == "packed"
        assert json.loads(latent["config.json"])["quantization_config"]["state"] == "latent"
        assert "Training in progress, step 12" in repository.messages
        assert f"was not pushed to me/{strategy}" in out["stderr"]
        assert ("last-checkpoint/optimizer.pt" in latent) == (strategy == "checkpoint")
        assert not any("optimizer" in name or "training_args" in name for name in latent if "last" not in name)
        assert not any(b"hf_writer" in content for files in repository.commits.values() for content in files.values())


@pytest.mark.slow
def test_run_glue_pushes_what_it_packed_and_keeps_its_results_if_it_cannot(hub: Any, tmp_path: Path) -> None:
    hub.fail("POST", "/commit/main$", 500)
    out = run(
        hub,
        tmp_path,
        f"""
sys.path.insert(0, {str(TESTS.parent / "examples" / "glue")!r})
import run_glue
trainer = make_trainer("unused")
sizes = dict(hidden_size=36, num_hidden_layers=2, num_attention_heads=4, intermediate_size=76)
BertForSequenceClassification(BertConfig(vocab_size=64, max_position_embeddings=40, **sizes)).save_pretrained("float")
trainer.processing_class.save_pretrained("float")
rows = "".join(f"word{{5 + i % 50}} word{{7 + i % 30}},{{i % 2}}\\n" for i in range(32))
Path("data.csv").write_text("sentence,label\\n" + rows)
arguments = ("--model_name_or_path float --train_file data.csv --validation_file data.csv --do_train --do_eval "
             "--max_steps 6 --per_device_train_batch_size 8 --output_dir out --save_strategy steps --save_steps 6 "
             "--use_cpu --report_to none --disable_tqdm true "
             "--push_to_hub --hub_model_id tiny-glue --hub_token hf_writer")
out["failed"] = failure(lambda: run_glue.main(arguments.split()))
kept = ("summary.json", "packed/model.safetensors", "model.safetensors")
out["kept"] = [Path("out", name).is_file() for name in kept]
run_glue.main(arguments.split())
model = AutoModelForSequenceClassification.from_pretrained("me/tiny-glue")
out["equal"] = torch.equal(logits(model), logits(AutoModelForSequenceClassification.from_pretrained("out/packed")))
""",
        token=None,
    )
    assert out["failed"]["message"].endswith("`hf upload me/tiny-glue out/packed`.")
    assert out["kept"] == [True] * 3 and out["equal"]
    files = hub.repositories["me/tiny-glue"].files()
    assert not [name for name, content in files.items() if b"hf_writer" in content]
    card = files["README.md"].decode()
    assert 'from_pretrained("me/tiny-glue")' in card and "| accuracy |" in card and "base_model" not in card
    assert {"tokenizer.json", "model.safetensors", "config.json"} <= set(files) and "summary.json" not in files


def test_a_model_pushed_by_itself_can_still_be_copied_and_pickled(tiny_packed: Any, logits: Any) -> None:
    import copy
    import pickle

    packed = tiny_packed("bert")
    for other in (copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):
        assert torch.equal(logits(other), logits(packed))
        assert other._upload_modified_files.__self__ is other


def test_a_loaded_model_can_be_saved_where_it_came_from(tiny_packed: Any, logits: Any, tmp_path: Path) -> None:
    packed = tiny_packed("bert")
    packed.save_pretrained(tmp_path)
    AutoModelForSequenceClassification.from_pretrained(tmp_path).save_pretrained(tmp_path)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert torch.equal(logits(again), logits(packed))


def test_the_advice_comes_after_what_the_hub_said(tmp_path: Path) -> None:
    response: Any = SimpleNamespace(status_code=403, headers={}, request=None)
    advice = r"(?s)^said by the Hub\n.*may not write to me/tiny.*Nothing is lost"
    with pytest.raises(HfHubHTTPError, match=advice) as caught:
        with explained("me/tiny", tmp_path):
            try:
                raise HfHubHTTPError("said by the Hub", response=response)
            except HfHubHTTPError as error:
                raise RuntimeError("Error while uploading 'model.safetensors' to the Hub.") from error
    assert caught.value.response.status_code == 403


@pytest.mark.slow
def test_picture_of_the_training_dynamics_is_pushed_beside_the_card(pushed: tuple[Any, Path, Any]) -> None:
    pytest.importorskip("matplotlib")
    files = pushed[0].repositories["me/tiny"].files("main")
    assert b"![" in files["README.md"] and b"](dynamics.png)" in files["README.md"]
    assert files["dynamics.png"].startswith(b"\x89PNG")
