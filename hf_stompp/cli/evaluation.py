"""`hf-stompp eval`."""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES

from .errors import CommandError, hub_errors
from .models import frozen_fractions, load, model_class, read_config, state_of


HUB_DATASET = "nyu-mll/glue"

READERS: dict[str, tuple[str, dict[str, Any]]] = {
    # Without keep_default_na=False a sentence that reads "NA" or "null" would be taken for a missing one.
    ".csv": ("csv", {"keep_default_na": False}),
    ".tsv": ("csv", {"keep_default_na": False, "sep": "\t", "quoting": 3}),
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
    ".parquet": ("parquet", {}),
}

TEXT_COLUMNS = [
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question", "sentence"),
    ("question1", "question2"),
    ("sentence",),
    ("text",),
]
"""Columns that are taken for the text where they are there, the first that fit."""


@dataclass(frozen=True)
class Examples:
    """
    Labelled texts.

    Args:
        source (`str`): where they come from.
        columns (`tuple[str, ...]`): the one or two columns that the texts come from.
        texts (`list[list[str]]`): one list a column.
        labels (`list[int]`): class ids.
    """

    source: str
    columns: tuple[str, ...]
    texts: list[list[str]]
    labels: list[int]


def _datasets() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise CommandError(
            "eval reads its examples with the package datasets, which is not installed: pip install 'hf_stompp[glue]'"
        ) from error
    datasets.disable_progress_bars()
    return datasets


def _read(arguments: argparse.Namespace) -> tuple[str, Any]:
    """Where the examples come from, and the table of them."""
    if arguments.file is not None:
        return _read_files(arguments.file, [arguments.file])
    if arguments.dataset_dir is None:
        split = "validation_matched" if arguments.task == "mnli" else "validation"
        with hub_errors("dataset", HUB_DATASET):
            table = _datasets().load_dataset(HUB_DATASET, arguments.task, split=split)
        return f"{HUB_DATASET}/{arguments.task}", table
    folder = arguments.dataset_dir / arguments.task
    for name in ("validation", "validation_matched"):
        files = sorted(folder.glob(f"{name}.parquet")) or sorted(folder.glob(f"{name}-*.parquet"))
        if files:
            return _read_files(folder, files)
    raise CommandError(f"{folder} holds no validation.parquet: check --dataset_dir and --task, or name a --file")


def _read_files(source: Path, files: list[Path]) -> tuple[str, Any]:
    suffix = files[0].suffix.lower()
    if suffix not in READERS:
        raise CommandError(f"{source} is of no known kind: name a file that ends in {', '.join(READERS)}")
    if not files[0].is_file():
        raise CommandError(f"there is no file {source}: check the path")
    datasets = _datasets()
    kind, options = READERS[suffix]
    with tempfile.TemporaryDirectory() as cache:
        try:
            table = datasets.load_dataset(
                kind, data_files=[str(file) for file in files], split="train", cache_dir=cache, **options
            )
        except (ValueError, datasets.exceptions.DatasetGenerationError) as error:
            reason = " ".join(str(error.__cause__ or error).split())
            raise CommandError(
                f"{source} holds no examples, or is no valid {kind} file ({reason}): check it"
            ) from error
        # The table lies in the folder that ends here.
        columns = {name: table[name][:] for name in table.column_names}
        return str(source), datasets.Dataset.from_dict(columns, features=table.features)


def _text_columns(table: Any, source: str, label_column: str, wanted: list[str] | None) -> tuple[str, ...]:
    names = table.column_names
    if wanted and len(wanted) > 2:
        raise CommandError(f"--text_columns takes one or two columns, got {len(wanted)}: choose two")
    if wanted:
        missing = [name for name in wanted if name not in names]
        if missing:
            raise CommandError(f"{source} has no column {', '.join(missing)}: it has {', '.join(names)}")
        return tuple(wanted)
    for columns in TEXT_COLUMNS:
        if all(name in names for name in columns):
            return columns
    kinds = {name: getattr(table.features[name], "dtype", None) for name in names if name != label_column}
    strings = [name for name, kind in kinds.items() if kind in ("string", "large_string")]
    if len(strings) not in (1, 2):
        raise CommandError(
            f"which columns of {source} hold the text is not clear: name one or two of {', '.join(names)} with "
            "--text_columns"
        )
    return tuple(strings)


def _class_ids(labels: list[Any], source: str, config: Any) -> list[int]:
    """Labels as the model's class ids: by name, where they are the names of its classes, and otherwise as ids."""
    names: dict[str, int] = {str(name): int(index) for name, index in config.label2id.items()}
    if any(str(label) in names for label in labels):
        unknown = next((label for label in labels if str(label) not in names), None)
        if unknown is not None:
            raise CommandError(
                f"{source} has the label {unknown!r}, which the model does not know: its classes are "
                f"{', '.join(names)}"
            )
        return [names[str(label)] for label in labels]
    ids = []
    for label in labels:
        try:
            index = int(label)
        except (TypeError, ValueError):
            index = -1
        if index not in range(config.num_labels) or (isinstance(label, float) and label != index):
            raise CommandError(
                f"{source} has the label {label!r}: it must be one of the model's classes, {', '.join(names)}, or an "
                f"id from 0 to {config.num_labels - 1}; rows without a label must go"
            )
        ids.append(index)
    return ids


def read_examples(arguments: argparse.Namespace, config: Any) -> Examples:
    """
    Reads what `--file`, or `--task` and `--dataset_dir`, name.

    Args:
        arguments (`argparse.Namespace`).
        config (`PreTrainedConfig`): of the model, which knows the classes.

    Raises:
        CommandError: there is no such file, or it lacks a column, texts or labels.
    """
    source, table = _read(arguments)
    if arguments.label_column not in table.column_names:
        raise CommandError(
            f"{source} has no column {arguments.label_column!r}: name one of {', '.join(table.column_names)} with "
            "--label_column"
        )
    columns = _text_columns(table, source, arguments.label_column, arguments.text_columns)
    texts = [list(table[name][:]) for name in columns]
    for name, values in zip(columns, texts, strict=True):
        row = next((row for row, value in enumerate(values) if not isinstance(value, str)), None)
        if row is not None:
            raise CommandError(f"{source} has no text in column {name} of row {row}: fill it, or take the row out")
    labels = list(table[arguments.label_column][:])
    if not labels:
        raise CommandError(f"{source} holds no examples: check it")
    feature = table.features[arguments.label_column]
    if hasattr(feature, "int2str") and {feature.int2str(i) for i in range(feature.num_classes)} <= set(
        config.label2id
    ):
        labels = [label if label is None or label < 0 else feature.int2str(label) for label in labels]
    return Examples(source, columns, texts, _class_ids(labels, source, config))


def evaluate(arguments: argparse.Namespace) -> dict[str, Any]:
    """
    What `hf-stompp eval` tells.

    Raises:
        CommandError: the model is no text classifier or lacks weights, or the examples cannot be used.
    """
    config: Any = read_config(arguments.model)
    state = state_of(config, arguments.model)
    name = model_class(config, arguments.model).__name__
    if name not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.values():
        raise CommandError(
            f"{arguments.model} is a {name}, and eval measures text classifiers: name a ...ForSequenceClassification"
        )
    if config.num_labels == 1:
        raise CommandError(
            f"{arguments.model} is a regression, which has no accuracy: measure it with examples/glue/run_glue.py"
        )
    examples = read_examples(arguments, config)
    with hub_errors("model", arguments.model):
        tokenizer = _tokenizer(arguments.model)
    model: Any = load(arguments.model, config)
    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    model.to(device)
    length = min(
        arguments.max_length,
        tokenizer.model_max_length,
        getattr(config, "max_position_embeddings", arguments.max_length),
    )
    # Texts of like length share a batch, which wastes no time on padding.
    order = sorted(range(len(examples.labels)), key=lambda row: -sum(len(column[row]) for column in examples.texts))
    correct, start = 0, time.perf_counter()
    with (
        torch.inference_mode(),
        tqdm(total=len(order), desc="examples", unit="example", delay=1, leave=False, disable=None) as bar,
    ):
        for first in range(0, len(order), arguments.batch_size):
            rows = order[first : first + arguments.batch_size]
            batch = [[column[row] for row in rows] for column in examples.texts]
            inputs = tokenizer(*batch, truncation=True, max_length=length, padding=True, return_tensors="pt")
            predicted = model(**inputs.to(device)).logits.argmax(-1).cpu()
            correct += int((predicted == torch.tensor([examples.labels[row] for row in rows])).sum())
            bar.update(len(rows))
    seconds = time.perf_counter() - start
    fractions = frozen_fractions(model)
    return {
        "model": arguments.model,
        "class": name,
        "state": state,
        "committed": all(fraction == 1.0 for fraction in fractions.values()) if state == "latent" else None,
        "source": examples.source,
        "text_columns": list(examples.columns),
        "examples": len(order),
        "correct": correct,
        "accuracy": correct / len(order),
        "largest_class": max(Counter(examples.labels).values()) / len(order),
        "seconds": seconds,
        "examples_per_second": len(order) / seconds,
        "batch_size": arguments.batch_size,
        "max_length": length,
        "device": str(device),
    }


def _tokenizer(model: str) -> Any:
    folder = Path(model).expanduser()
    is_local = folder.is_dir()
    if is_local and not any(folder.glob("tokenizer*")) and not any(folder.glob("vocab.*")):
        # Transformers would make one that knows no words.
        raise CommandError(
            f"{model} has no tokenizer: copy tokenizer.json and tokenizer_config.json of its base model"
        )
    return AutoTokenizer.from_pretrained(folder if is_local else model)


def run(arguments: argparse.Namespace) -> None:
    """Runs `hf-stompp eval`."""
    result = evaluate(arguments)
    if arguments.json:
        print(json.dumps(result, indent=2))
        return
    print(f"{result['model']}: {result['class']}, {result['state']}")
    if result["committed"] is False:
        print("not committed yet: this is the accuracy of a mixed network, not of the binary one")
    print(
        f"accuracy {result['accuracy']:.4f}, {result['correct']:,} of {result['examples']:,} right "
        f"(always the largest class: {result['largest_class']:.4f})"
    )
    print(
        f"{result['seconds']:.1f} s, {result['examples_per_second']:,.0f} examples/s in batches of "
        f"{result['batch_size']} on {result['device']}, tokenizer included"
    )
    print(
        f"text from {', '.join(result['text_columns'])} of {result['source']}, at most {result['max_length']} tokens"
    )
