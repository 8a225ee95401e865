"""The GLUE example, end to end on a tiny random BERT and data written by the tests themselves."""

from __future__ import annotations

import importlib
import json
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import BertConfig, BertForSequenceClassification, BertModel, BertTokenizer

from hf_stompp.training import stages


EXAMPLE = Path(__file__).parents[2] / "examples" / "glue"

SPECIAL_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
NOUNS = ["film", "play", "song", "book"]
SENTENCES = [f"a {adjective} {noun}" for noun in NOUNS for adjective in ("good", "bad", "fine", "poor")]
LABELS = [0, 1] * 8

BINARY_STAGES = ["binarize", "train_binary", "evaluate_binary", "pack", "load_packed", "evaluate_packed"]


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    # The variable is read once, when huggingface_hub is imported.
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    # Models this small lose more time to waiting threads than they win, above all on a busy machine.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def run_glue(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setattr(sys, "path", [str(EXAMPLE), *sys.path])
    return importlib.import_module("run_glue")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> BertTokenizer:
    words = [*SPECIAL_TOKENS, *sorted({word for sentence in SENTENCES for word in sentence.split()})]
    file = tmp_path_factory.mktemp("vocabulary") / "vocab.txt"
    file.write_text("\n".join(words), encoding="utf-8")
    return BertTokenizer(vocab={word: index for index, word in enumerate(words)}, model_max_length=32)


@pytest.fixture(scope="module")
def tiny_config(tokenizer: BertTokenizer) -> BertConfig:
    return BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=32,
    )


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory, tokenizer: BertTokenizer, tiny_config: BertConfig) -> str:
    """A pretrained model: no head."""
    folder = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    BertModel(tiny_config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def arguments(tmp_path: Path, bert: str) -> Callable[..., list[str]]:
    """Builds a command line from the usual arguments and those of a test."""

    def build(*given: str, **values: Any) -> list[str]:
        defaults = {
            "model_name_or_path": bert,
            "cache_dir": tmp_path / "cache",
            "output_dir": tmp_path / "output",
            "max_steps": 6,
            "per_device_train_batch_size": 4,
            "log_level": "error",
            "disable_tqdm": True,
            "use_cpu": True,
        }
        flags = [item for name, value in {**defaults, **values}.items() for item in (f"--{name}", str(value))]
        return [*flags, *(f"--{name}" for name in given)]

    return build


@pytest.fixture
def own_files(tmp_path: Path) -> dict[str, Path]:
    """Arguments for csv files of one's own."""
    rows = ["sentence,label", *(f"{text},{label}" for text, label in zip(SENTENCES, LABELS, strict=True))]
    for name in ("train", "validation"):
        (tmp_path / f"{name}.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return {f"{name}_file": tmp_path / f"{name}.csv" for name in ("train", "validation")}


def write_csv(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def write_parquet(path: Path, **columns: list) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Dataset.from_dict(columns).to_parquet(path)


def write_sst2(folder: Path, **labels: list[int]) -> None:
    for split, values in labels.items():
        write_parquet(folder / "sst2" / f"{split}.parquet", sentence=SENTENCES[: len(values)], label=values)


def check_common_fields(summary: dict[str, Any], output_dir: Path) -> None:
    assert json.loads((output_dir / "summary.json").read_text(encoding="utf-8")) == summary
    assert set(summary) >= {"task", "method", "seed", "model", "mode", "config", "progression", "examples", "steps"}
    assert {"torch", "transformers", "hf_stompp", "python"} <= set(summary["versions"])
    assert {"platform", "cpu", "threads", "accelerator"} <= set(summary["machine"])
    assert summary["milliseconds_per_batch"]["batch_size"] == 8
    assert summary["command"].startswith("run_glue.py --model_name_or_path")
    assert summary["seconds"]["total"] > 0


# ---- End to end -----------------------------------------------------------------------------------------------------


def test_float(run_glue, arguments, own_files, tmp_path, capsys):
    summary = run_glue.main(arguments("do_train", "do_eval", method="float", **own_files))
    check_common_fields(summary, tmp_path / "output")
    assert summary["config"] is None and summary["progression"] is None
    assert summary["steps"] == {"float": 6}
    assert set(summary["metrics"]) == set(summary["bytes"]) == {"float"}
    assert set(summary["metrics"]["float"]) == {"eval_loss", "eval_accuracy"}
    assert summary["bytes"]["float"] == (tmp_path / "output" / "model.safetensors").stat().st_size
    assert "eval_accuracy" in capsys.readouterr().out


@pytest.mark.parametrize(
    "method, surrogate, schedule",
    [("ste", "clipped_ste", "immediate"), ("stompp", "none", "cubic"), ("stompp_ste", "clipped_ste", "cubic")],
)
def test_binary_methods(run_glue, arguments, own_files, tmp_path, method, surrogate, schedule):
    summary = run_glue.main(arguments("do_train", "do_eval", method=method, **own_files))
    check_common_fields(summary, tmp_path / "output")
    assert summary["config"]["surrogate"] == surrogate
    assert summary["progression"]["progression_schedule"] == schedule
    assert summary["mode"] == "bnn"
    assert summary["examples"] == {"train": 16, "validation": 16}
    assert summary["steps"] == {"float": 0, "binary": 6}
    # The head was new, so there is no score of the float model.
    assert summary["metrics"]["float"] is None and summary["metrics"]["binary_best"] is None
    assert summary["packed_weights"] == "final"
    final, packed = summary["metrics"]["binary_final"], summary["metrics"]["packed"]
    assert packed["eval_accuracy"] == final["eval_accuracy"]
    assert packed["eval_loss"] == pytest.approx(final["eval_loss"], rel=1e-4)
    # A freeze mask takes a byte a weight.
    assert 0 < summary["bytes"]["packed"] < summary["bytes"]["float"] < summary["bytes"]["latent"]
    assert summary["milliseconds_per_batch"]["float"] > 0 and summary["milliseconds_per_batch"]["packed"] > 0
    assert set(BINARY_STAGES) < set(summary["seconds"])
    packed_file = tmp_path / "output" / "packed" / "model.safetensors"
    assert summary["bytes"]["packed"] == packed_file.stat().st_size


def test_float_stage_and_restart(run_glue, arguments, own_files, tmp_path):
    argv = arguments(
        "do_train", "do_eval", float_num_train_epochs=1, float_learning_rate=1e-3, max_steps=6, **own_files
    )
    first = run_glue.main(argv)
    # Six steps end in the middle of an epoch of four.
    assert first["steps"] == {"float": 4, "binary": 6}
    assert first["metrics"]["float"]["eval_accuracy"] >= 0.0
    assert first["bytes"]["float"] == (tmp_path / "output" / "float" / "model.safetensors").stat().st_size
    # Started again, the run finds the finished float model and the last checkpoint, and has nothing left to train.
    weights = tmp_path / "output" / "float" / "model.safetensors"
    written = weights.stat().st_mtime_ns
    second = run_glue.main(argv)
    assert weights.stat().st_mtime_ns == written
    assert second["steps"] == first["steps"] and second["metrics"] == first["metrics"]
    assert second["seconds"]["train_float"] == first["seconds"]["train_float"]


def test_interrupted_run_gives_the_same_result(run_glue, arguments, own_files, tmp_path):
    argv = arguments("do_train", "do_eval", float_num_train_epochs=1, save_steps=3, **own_files)
    first = run_glue.main(argv)
    (tmp_path / "output" / "checkpoint-6").rename(tmp_path / "later")
    assert run_glue.main(argv)["metrics"] == first["metrics"]


def test_best_checkpoint_and_final_weights(run_glue, arguments, own_files):
    best = {
        "eval_strategy": "steps",
        "save_strategy": "steps",
        "eval_steps": 2,
        "save_steps": 2,
        "save_total_limit": 1,
    }
    argv = arguments("do_train", "do_eval", "load_best_model_at_end", **best, **own_files, method="ste")
    summary = run_glue.main([*argv, "--metric_for_best_model", "loss", "--learning_rate", "1e-2"])
    assert summary["packed_weights"] == "best"
    metrics = summary["metrics"]
    assert metrics["binary_best"]["eval_loss"] <= metrics["binary_final"]["eval_loss"]
    assert metrics["packed"]["eval_loss"] == pytest.approx(metrics["binary_best"]["eval_loss"], rel=1e-4)


def test_packed_model_is_evaluated_without_training(run_glue, arguments, own_files, tmp_path):
    trained = run_glue.main(arguments("do_train", "do_eval", **own_files))
    argv = arguments("do_eval", validation_file=own_files["validation_file"])
    argv += ["--model_name_or_path", str(tmp_path / "output" / "packed"), "--output_dir", str(tmp_path / "again")]
    assert run_glue.main(argv)["metrics"]["binary"] == trained["metrics"]["packed"]
    with pytest.raises(ValueError, match="is packed, and cannot be trained"):
        run_glue.main([*argv, "--do_train", "--train_file", str(own_files["train_file"])])


def test_json_arguments(run_glue, bert, own_files, tmp_path):
    values = {
        "model_name_or_path": bert,
        "cache_dir": str(tmp_path / "cache"),
        "output_dir": str(tmp_path / "output"),
        "do_train": True,
        "do_eval": True,
        "max_steps": 4,
        "use_cpu": True,
        "method": "ste",
        "mode": "bwn",
        "pad_to_max_length": True,
        "max_seq_length": 16,
        **{name: str(path) for name, path in own_files.items()},
    }
    file = tmp_path / "arguments.json"
    file.write_text(json.dumps(values), encoding="utf-8")
    summary = run_glue.main([str(file)])
    assert summary["mode"] == "bwn" and summary["progression"]["progression_schedule"] == "immediate"
    file.write_text(json.dumps({**values, "methud": "ste"}), encoding="utf-8")
    with pytest.raises(ValueError, match="methud"):
        run_glue.main([str(file)])


@pytest.mark.parametrize("file", sorted((EXAMPLE / "configs").glob("*.json")), ids=lambda path: path.stem)
def test_example_configs_are_understood(run_glue, file):
    model_args, data_args, binarization_args, _ = run_glue.parse_arguments([str(file)])
    assert data_args.task_name == file.stem
    assert binarization_args.config().mode == "bnn"
    assert not Path(model_args.model_name_or_path).is_absolute()


@pytest.mark.slow
def test_unlabelled_texts_are_answered_by_the_teacher(run_glue, arguments, own_files, tmp_path):
    run_glue.main(arguments("do_train", method="float", **own_files))
    start = {**own_files, "model_name_or_path": tmp_path / "output", "method": "ste", "max_steps": -1}
    start["num_train_epochs"] = 1
    texts = tmp_path / "more.txt"
    texts.write_text("\n".join(f"good {text}" for text in SENTENCES), encoding="utf-8")
    argv = arguments("do_train", "do_eval", **start, unlabelled_file=texts)
    summary = run_glue.main([*argv, "--output_dir", str(tmp_path / "binary")])
    assert summary["examples"] == {"train": 16, "unlabelled": 16, "validation": 16}
    assert summary["steps"]["binary"] == 8 and summary["teacher"] == "float"
    log = json.loads((tmp_path / "binary" / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    assert all(math.isfinite(line["train_loss"]) for line in log if "train_loss" in line)
    # They are learned from: other words end in other weights, the same ones in the same.
    for name, word in (("again", "good"), ("other", "poor")):
        texts.write_text("\n".join(f"{word} {text}" for text in SENTENCES), encoding="utf-8")
        run_glue.main([*argv, "--output_dir", str(tmp_path / name)])
    found = {name: load_file(tmp_path / name / "model.safetensors") for name in ("binary", "again", "other")}
    head = "classifier.weight"
    assert torch.equal(found["again"][head], found["binary"][head])
    assert not torch.equal(found["other"][head], found["binary"][head])
    with pytest.raises(ValueError, match="needs a teacher that knows the task"):
        run_glue.main([*argv, "--teacher", "none", "--output_dir", str(tmp_path / "untaught")])
    argv = arguments("do_train", method="ste", **own_files, unlabelled_file=texts)
    with pytest.raises(ValueError, match="needs a teacher that knows the task"):
        run_glue.main([*argv, "--output_dir", str(tmp_path / "headless")])


def test_unlabelled_pairs_go_with_scores(run_glue, arguments, tmp_path):
    scores = [float(label * 5) for label in LABELS]
    pairs = {"sentence1": SENTENCES, "sentence2": SENTENCES[::-1]}
    for split in ("train", "validation"):
        write_parquet(tmp_path / "glue" / "stsb" / f"{split}.parquet", **pairs, label=scores)
    task = {"task_name": "stsb", "dataset_dir": tmp_path / "glue"}
    run_glue.main(arguments("do_train", **task, method="float"))
    rows = [*zip(SENTENCES, SENTENCES, strict=True), ("a good film", "")]
    more = write_csv(tmp_path / "more.csv", "sentence1,sentence2\n" + "\n".join(map(",".join, rows)) + "\n")
    start = {**task, "model_name_or_path": tmp_path / "output", "method": "ste", "unlabelled_file": more}
    argv = [*arguments("do_train", "do_eval", **start), "--output_dir", str(tmp_path / "binary")]
    summary = run_glue.main(argv)
    # The row that is no pair is left out.
    assert summary["examples"] == {"train": 16, "unlabelled": 16, "validation": 16}
    assert math.isfinite(summary["metrics"]["packed"]["eval_loss"])
    alone = write_csv(tmp_path / "alone.csv", "sentence1,sentence2\na good film,\n")
    with pytest.raises(ValueError, match=r"alone\.csv holds no pair of texts"):
        run_glue.main([*argv, "--unlabelled_file", str(alone), "--output_dir", str(tmp_path / "alone")])


# ---- Tasks and files ------------------------------------------------------------------------------------------------


def test_regression_from_the_layout_of_the_hub(run_glue, arguments, tmp_path):
    scores = [float(label * 5) for label in LABELS]
    pairs = {"sentence1": SENTENCES, "sentence2": SENTENCES[::-1]}
    write_parquet(tmp_path / "glue" / "stsb" / "train-00000-of-00001.parquet", **pairs, label=scores)
    write_parquet(tmp_path / "glue" / "stsb" / "validation-00000-of-00001.parquet", **pairs, label=scores)
    write_parquet(tmp_path / "glue" / "stsb" / "test-00000-of-00001.parquet", **pairs)
    argv = arguments("do_train", "do_eval", "do_predict", task_name="stsb", dataset_dir=tmp_path / "glue")
    summary = run_glue.main(argv)
    assert set(summary["metrics"]["packed"]) == {
        "eval_loss",
        "eval_pearson",
        "eval_spearmanr",
        "eval_combined_score",
    }
    lines = (tmp_path / "output" / "predict_results_stsb.txt").read_text(encoding="utf-8").splitlines()
    assert lines[0] == "index\tprediction" and len(lines) == 17
    assert lines[16].startswith("15\t") and float(lines[16].split("\t")[1]) is not None


def write_mnli(folder: Path, *splits: str) -> None:
    for split in splits:
        labels = [-1] * 16 if split.startswith("test") else [0, 1, 2, 0] * 4
        write_parquet(folder / "cut" / f"{split}.parquet", premise=SENTENCES, hypothesis=SENTENCES[::-1], label=labels)


def test_mnli_with_both_development_and_test_sets(run_glue, arguments, tmp_path):
    splits = ("train", "validation_matched", "validation_mismatched", "test_matched", "test_mismatched")
    write_mnli(tmp_path / "glue", *splits)
    argv = arguments("do_train", "do_eval", "do_predict", task_name="mnli", dataset_dir=tmp_path / "glue")
    summary = run_glue.main([*argv, "--dataset_subdir", "cut", "--max_eval_samples", "12"])
    wanted = {"eval_loss", "eval_accuracy", "eval_mm_loss", "eval_mm_accuracy"}
    assert set(summary["metrics"]["binary_final"]) == set(summary["metrics"]["packed"]) == wanted
    assert summary["examples"]["validation"] == summary["examples"]["validation_mismatched"] == 12
    for name in ("mnli", "mnli-mm"):
        lines = (tmp_path / "output" / f"predict_results_{name}.txt").read_text(encoding="utf-8").splitlines()
        assert len(lines) == 17
        assert {line.split("\t")[1] for line in lines[1:]} <= {"entailment", "neutral", "contradiction"}


def test_mnli_without_the_mismatched_set(run_glue, arguments, tmp_path):
    write_mnli(tmp_path / "glue", "train", "validation")
    argv = arguments("do_train", "do_eval", task_name="mnli", dataset_dir=tmp_path / "glue", method="float")
    summary = run_glue.main([*argv, "--dataset_subdir", "cut"])
    assert set(summary["metrics"]["float"]) == {"eval_loss", "eval_accuracy"}


def test_fine_tuned_model_with_classes_in_another_order(run_glue, arguments, tmp_path, tokenizer, tiny_config):
    config = BertConfig(**{**tiny_config.to_dict(), "id2label": {0: "positive", 1: "negative"}})
    config.label2id = {"positive": 0, "negative": 1}
    model = BertForSequenceClassification(config)
    torch.nn.init.zeros_(model.classifier.weight)
    model.classifier.bias.data = torch.tensor([1.0, 0.0])
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    write_sst2(tmp_path / "glue", validation=[1, 1, 1, 0], test=[-1] * 4)
    argv = arguments("do_eval", "do_predict", task_name="sst2", dataset_dir=tmp_path / "glue", method="float")
    summary = run_glue.main([*argv, "--model_name_or_path", str(tmp_path / "model")])
    assert summary["metrics"]["float"]["eval_accuracy"] == 0.75
    lines = (tmp_path / "output" / "predict_results_sst2.txt").read_text(encoding="utf-8").splitlines()
    assert [line.split("\t")[1] for line in lines[1:]] == ["positive"] * 4


def test_predictions_of_own_files(run_glue, arguments, own_files, tmp_path):
    test_file = write_csv(tmp_path / "unseen.csv", "sentence\na good film\na bad film\nunknown words\n")
    argv = arguments("do_train", "do_predict", **own_files, test_file=test_file, method="float")
    run_glue.main(argv)
    lines = (tmp_path / "output" / "predict_results_train.txt").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 4 and {line.split("\t")[1] for line in lines[1:]} <= {"0", "1"}


@pytest.fixture
def read_own(run_glue, tmp_path) -> Callable[..., Any]:
    def read(name: str, text: str, **others: str) -> Any:
        files = {"train": str(write_csv(tmp_path / name, text))}
        files.update({split: str(write_csv(tmp_path / f"{split}.csv", other)) for split, other in others.items()})
        return importlib.import_module("glue_data").read_own_files(files, cache_dir=str(tmp_path / "cache"))

    return read


@pytest.mark.parametrize(
    "name, text, columns, classes",
    [
        ("a.csv", "label,sentence,note\nx,NA,n\ny,null,n\n", ("sentence",), ["x", "y"]),
        ("a.csv", "idx,sentence1,sentence2,label\n7,p,q,0\n8,r,s,10\n9,t,u,2\n", ("sentence1", "sentence2"), None),
        ("a.csv", "id,left,right,label\n7,p,q,0\n8,r,s,1\n", ("left", "right"), ["0", "1"]),
        ("a.tsv", 'text\tlabel\nsaid "so\t0\nand "that\t1\n', ("text",), ["0", "1"]),
        ("a.jsonl", '{"text": "p", "label": "no"}\n{"text": "q", "label": "yes"}\n', ("text",), ["no", "yes"]),
    ],
)
def test_columns_and_classes_of_own_files(read_own, name, text, columns, classes):
    data = read_own(name, text)
    assert data.text_columns == columns
    assert data.label_names == (classes or ["0", "2", "10"])
    assert max(data.splits["train"]["label"]) == len(data.label_names) - 1


def test_incomplete_examples_are_left_out(read_own, caplog):
    caplog.set_level("WARNING", logger="glue_data")
    data = read_own("a.csv", "sentence,label\np,0\nq,\n,1\nr,1\n")
    assert data.splits["train"]["sentence"][:] == ["p", "r"]
    assert data.label_names == ["0", "1"]
    assert "2 of 4 examples lack a text or a label" in caplog.text


def test_scores_of_own_files_make_a_regression(read_own):
    data = read_own("a.csv", "sentence,label\np,0.5\nq,\nr,2\n")
    assert data.is_regression and data.splits["train"]["label"][:] == [0.5, 2.0]


# ---- Errors before anything is trained ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "train, validation, message",
    [
        ("sentence,class\np,0\n", "", r"train\.csv lacks the column label\. Columns found: sentence, class\. Wanted"),
        ("number,label\n1,0\n", "", r"train\.csv lacks the column sentence\. Columns found: number, label"),
        ("sentence,label\np,0\nq,1\n", "text,label\np,0\n", r"validation\.csv lacks the column sentence\."),
        ("sentence,label\np,0\nq,1\n", "sentence,label\np,2\n", r"validation\.csv: the label '2' of row 0 is out of"),
        ("sentence,label\np,0\nq,-1\n", "", r"train\.csv: the label -1 is out of range"),
        ("sentence,label\np,0\nq,0\n", "", r"train\.csv: every label is 0"),
        ("sentence,label\n", "", r"train\.csv holds no examples, or is no valid csv"),
        ("sentence,label\n,1\np,\n", "", r"train\.csv has no example with both a text and a label, of 2"),
        ("sentence,label\np,0\nq,1\n", "sentence,label\np,0.5\n", r"the files do not agree"),
        ("sentence,label\np,0.5\nq,1.5\n", "sentence,label\np,high\n", r"the files do not agree"),
        ("sentence,label\np,0.5\nq,inf\n", "", r"train\.csv: the score inf of row 1 is not a finite number"),
    ],
)
def test_bad_own_files(run_glue, arguments, tmp_path, train, validation, message):
    files = {
        "train_file": write_csv(tmp_path / "train.csv", train),
        "validation_file": write_csv(tmp_path / "validation.csv", validation or "sentence,label\np,0\n"),
    }
    with pytest.raises(ValueError, match=message):
        run_glue.main(arguments("do_train", "do_eval", **files))


@pytest.mark.parametrize("labels, row", [([0, 1, 2], 2), ([0, -1, 1], 1)])
def test_labels_out_of_range(run_glue, arguments, tmp_path, labels, row):
    write_sst2(tmp_path / "glue", train=labels)
    with pytest.raises(
        ValueError, match=rf"train\.parquet: the label -?\d of row {row} is out of range.*0 \(negative"
    ):
        run_glue.main(arguments("do_train", task_name="sst2", dataset_dir=tmp_path / "glue"))


def test_score_out_of_range(run_glue, arguments, tmp_path):
    write_parquet(tmp_path / "glue" / "stsb" / "train.parquet", sentence1=["p"], sentence2=["q"], label=[5.5])
    with pytest.raises(ValueError, match="the score 5.5 of row 0 is out of range"):
        run_glue.main(arguments("do_train", task_name="stsb", dataset_dir=tmp_path / "glue"))


def test_task_without_its_columns(run_glue, arguments, tmp_path):
    write_parquet(tmp_path / "glue" / "mrpc" / "train.parquet", sentence=["p"], label=[0])
    with pytest.raises(ValueError, match="train.parquet lacks the columns sentence1, sentence2. Columns found: "):
        run_glue.main(arguments("do_train", task_name="mrpc", dataset_dir=tmp_path / "glue"))


def test_missing_files(run_glue, arguments, tmp_path):
    write_sst2(tmp_path / "glue", train=[0, 1], validation=[0, 1])
    tree = {"task_name": "sst2", "dataset_dir": tmp_path / "glue"}
    with pytest.raises(FileNotFoundError, match=r"has no test\.parquet.*leave out --do_predict"):
        run_glue.main(arguments("do_train", "do_predict", **tree))
    with pytest.raises(FileNotFoundError, match=r"There is no folder .*rte\. .* holds: sst2"):
        run_glue.main([*arguments("do_train", **{**tree, "task_name": "rte"}), "--output_dir", str(tmp_path / "b")])
    with pytest.raises(FileNotFoundError, match="there is no file .*nowhere.csv"):
        run_glue.main(arguments("do_eval", validation_file=tmp_path / "nowhere.csv", method="float"))
    with pytest.raises(ValueError, match="not of a known kind"):
        run_glue.main(arguments("do_eval", validation_file=tmp_path / "data.xlsx", method="float"))


def test_hub_out_of_reach(run_glue, arguments, monkeypatch):
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr("datasets.load_dataset", refuse)
    with pytest.raises(ConnectionError, match="nyu-mll/glue is not in the cache.*no route.*--dataset_dir"):
        run_glue.main(arguments("do_train", task_name="sst2"))


@pytest.mark.parametrize(
    "given, message",
    [
        (["--task_name", "imdb"], "no GLUE task"),
        (["--task_name", "sst2"], "nothing to do"),
        (["--do_train"], "There is no data"),
        (["--do_train", "--train_file", "a.csv", "--dataset_dir", "d"], "need --task_name"),
        (["--do_train", "--train_file", "a.csv", "--task_name", "sst2"], "exclude each other"),
        (["--do_train", "--task_name", "sst2", "--dataset_subdir", "d"], "Give --dataset_dir"),
        (["--do_train", "--do_eval", "--train_file", "a.csv"], "--do_eval needs --validation_file"),
        (["--do_train", "--task_name", "sst2", "--max_train_samples", "0"], "--max_train_samples 0 leaves nothing"),
        (["--do_train", "--task_name", "sst2", "--float_num_train_epochs", "-1"], "is negative"),
    ],
)
def test_contradicting_arguments(run_glue, given, message):
    with pytest.raises(ValueError, match=message):
        run_glue.parse_arguments(["--model_name_or_path", "bert", *given])


@pytest.mark.parametrize(
    "given, message",
    [
        (["--method", "ste", "--surrogate", "none"], "contradicted by --surrogate none"),
        (["--method", "stompp", "--surrogate", "ste"], "contradicted by --surrogate ste"),
        (["--method", "ste", "--progression_schedule", "cubic"], "contradicted by --progression_schedule cubic"),
        (["--method", "stompp_ste", "--progression-schedule", "immediate"], "--progression_schedule immediate"),
        (["--method", "float", "--mode", "bwn"], "contradicted by --mode"),
        (["--method=float", "--progression_tail=0.3"], "contradicted by --progression_tail"),
        (["--method", "float", "--float_num_train_epochs", "1"], "contradicted by --float_num_train_epochs"),
        (["--method", "float", "--unlabelled_file", "a.txt"], "no labels for a float model"),
        (["--float_num_train_epochs", "1", "--unlabelled_file", "a.txt"], "no labels for a float model"),
        (["--unlabelled_file", "a.txt", "--distillation_losses", '{"logits": 1, "labels": 1}'], "none of the labels"),
    ],
)
def test_arguments_that_contradict_the_method(run_glue, given, message):
    with pytest.raises(ValueError, match=message):
        run_glue.parse_arguments(["--model_name_or_path", "bert", "--task_name", "sst2", "--do_train", *given])


def test_json_file_that_is_missing_or_names_no_model(run_glue, tmp_path):
    with pytest.raises(FileNotFoundError, match="no argument file"):
        run_glue.parse_arguments([str(tmp_path / "none.json")])
    with pytest.raises(ValueError, match="names no model"):
        run_glue.parse_arguments([str(write_csv(tmp_path / "empty.json", "{}"))])
    with pytest.raises(ValueError, match="--method sgd is unknown"):
        run_glue.parse_arguments(
            [str(write_csv(tmp_path / "a.json", '{"model_name_or_path": "b", "task_name": "rte", "method": "sgd"}'))]
        )


def test_folder_of_another_run(run_glue, arguments, own_files, tmp_path):
    run_glue.main(arguments("do_train", method="float", **own_files))
    with pytest.raises(ValueError, match="belongs to another run: method was 'float', is 'ste'"):
        run_glue.main(arguments("do_train", method="ste", **own_files))
    (tmp_path / "output" / "run_settings.json").unlink()
    with pytest.raises(ValueError, match="belongs to another run"):
        run_glue.main(arguments("do_train", method="float", **own_files))


def test_float_model_is_not_binarized_without_training(run_glue, arguments, own_files):
    with pytest.raises(ValueError, match="is a float model"):
        run_glue.main(arguments("do_eval", **own_files))


@pytest.mark.parametrize("token", [["--hub_token", "secret"], ["--hub-token=secret"]], ids=["words", "dashes"])
def test_upload_of_the_packed_model_keeps_the_token_to_itself(
    run_glue, arguments, own_files, tmp_path, monkeypatch, token
):
    pushed = []
    monkeypatch.setattr(stages, "create_repo", lambda name, **options: SimpleNamespace(repo_id=f"me/{name}"))
    monkeypatch.setattr(
        "transformers.Trainer.push_to_hub", lambda self, **options: pushed.append((self.args.output_dir, options))
    )
    run_glue.main([*arguments("do_train", "push_to_hub", **own_files), *token])
    ((folder, options),) = pushed
    assert Path(folder) == tmp_path / "output" / "packed"
    assert options["token"] == "secret" and options["model_name"] == "output"
    written = [path for path in (tmp_path / "output").rglob("*") if path.is_file()]
    assert len(written) > 10 and not [path for path in written if b"secret" in path.read_bytes()]
