"""Reads and checks the data of `run_glue.py`: GLUE from the Hub, GLUE from a local tree, or files of one's own."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas
from datasets import ClassLabel, Dataset, Value, concatenate_datasets
from transformers import PreTrainedConfig

from hf_stompp import StoMPPTrainingArguments
from hf_stompp.data.tables import HUB_DATASET, read_hub_splits, read_table, split_files
from hf_stompp.data.text import read_texts
from hf_stompp.training.distillation import LABELS
from hf_stompp.training.methods import RecipeArguments, option


logger = logging.getLogger(__name__)

LABEL_COLUMN = "label"


@dataclass(frozen=True)
class Task:
    """What a GLUE task is made of: its one or two text columns, and the names of its classes in the order of ids."""

    text_columns: tuple[str, ...]
    label_names: tuple[str, ...] | None = None  # None: a regression


TASKS = {
    "cola": Task(("sentence",), ("unacceptable", "acceptable")),
    "mnli": Task(("premise", "hypothesis"), ("entailment", "neutral", "contradiction")),
    "mrpc": Task(("sentence1", "sentence2"), ("not_equivalent", "equivalent")),
    "qnli": Task(("question", "sentence"), ("entailment", "not_entailment")),
    "qqp": Task(("question1", "question2"), ("not_duplicate", "duplicate")),
    "rte": Task(("sentence1", "sentence2"), ("entailment", "not_entailment")),
    "sst2": Task(("sentence",), ("negative", "positive")),
    "stsb": Task(("sentence1", "sentence2")),
    "wnli": Task(("sentence1", "sentence2"), ("not_entailment", "entailment")),
}


@dataclass
class DataTrainingArguments:
    """Which data is used, and how it is tokenized."""

    task_name: str | None = option(f"A GLUE task: {', '.join(TASKS)}.")
    dataset_dir: str | None = option(
        "A folder that holds <task>/{train,validation,test}.parquet, read instead of the Hub. For mnli also "
        "validation_mismatched.parquet and test_mismatched.parquet."
    )
    dataset_subdir: str | None = option("The folder of the task in --dataset_dir, where it is not named like it.")
    train_file: str | None = option("A csv, tsv, json, jsonl or parquet file of one's own to train on.")
    validation_file: str | None = option("The same to evaluate on.")
    test_file: str | None = option("The same to predict; needs no labels.")
    unlabelled_file: str | None = option(
        "More texts to train on, which the teacher answers: a txt file (a text a line), or a table with the text "
        "columns of the task."
    )
    max_seq_length: int = option("Longer texts are cut to this many tokens.", 128)
    pad_to_max_length: bool = option("Pad every text to max_seq_length, not each batch to its longest text.", False)
    overwrite_cache: bool = option("Tokenize again even if a cached result exists.", False)
    max_train_samples: int | None = option("Train on this many examples only.")
    max_eval_samples: int | None = option("Evaluate on this many examples only.")
    max_predict_samples: int | None = option("Predict this many examples only.")

    def __post_init__(self) -> None:
        own_files = [file for file in (self.train_file, self.validation_file, self.test_file) if file]
        if self.task_name is not None:
            self.task_name = self.task_name.lower()
            if self.task_name not in TASKS:
                raise ValueError(f"--task_name {self.task_name} is no GLUE task. Give one of {', '.join(TASKS)}.")
            if own_files:
                raise ValueError(
                    f"--task_name {self.task_name} and own files ({', '.join(own_files)}) exclude each other. Drop "
                    "one; a local copy of a GLUE task is read by --dataset_dir."
                )
        elif not own_files:
            raise ValueError("There is no data. Give --task_name, or --train_file and --validation_file.")
        elif self.dataset_dir or self.dataset_subdir:
            raise ValueError("--dataset_dir and --dataset_subdir need --task_name; own files are given by paths.")
        if self.dataset_subdir and not self.dataset_dir:
            raise ValueError("--dataset_subdir names a folder in --dataset_dir, which is missing. Give --dataset_dir.")
        for name in ("max_seq_length", "max_train_samples", "max_eval_samples", "max_predict_samples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name} {value} leaves nothing. Give at least 1.")

    @property
    def name(self) -> str:
        """Name of the task, or of the first file."""
        return self.task_name or Path(self.train_file or self.validation_file or self.test_file).stem


@dataclass
class GlueData:
    """
    The examples of a run, read and checked.

    Attributes:
        splits (`dict[str, Dataset]`):
            `train`, `unlabelled`, `validation`, `validation_mismatched`, `test`, `test_mismatched`, as far as they
            were asked for and exist. The `label` column holds class ids from 0, or scores; test splits and
            unlabelled texts have none.
        text_columns (`tuple[str, ...]`):
            The one or two columns that are fed to the tokenizer.
        label_names (`list[str]` or `None`):
            Names of the classes in the order of their ids, `None` for a regression.
    """

    splits: dict[str, Dataset]
    text_columns: tuple[str, ...]
    label_names: list[str] | None

    @property
    def is_regression(self) -> bool:
        return self.label_names is None

    @property
    def num_labels(self) -> int:
        return 1 if self.label_names is None else len(self.label_names)

    def training_set(self) -> Dataset | None:
        """The examples to train on, once tokenized, with labels and without."""
        labelled, unlabelled = self.splits.get("train"), self.splits.get("unlabelled")
        if labelled is None or unlabelled is None:
            return labelled
        # What the loss of Transformers passes over, and what would be seen at once.
        kind, hidden = ("float32", math.nan) if self.is_regression else ("int64", -100)
        labelled = labelled.cast_column("label", Value(kind))
        unlabelled = unlabelled.add_column("label", np.full(len(unlabelled), hidden, dtype=kind))
        return concatenate_datasets([labelled, unlabelled])


def read_data(
    args: DataTrainingArguments, stages: dict[str, bool], model: PreTrainedConfig | None, cache_dir: str | None
) -> GlueData:
    """
    The splits that a run needs (`stages`), cut to the wanted number. `model` is a trained one whose classes they must
    have.
    """
    splits = [name for name, is_needed in stages.items() if is_needed]
    if args.task_name is not None:
        data = read_glue_task(args.task_name, splits, args.dataset_dir, args.dataset_subdir, cache_dir)
    else:
        files = {name: getattr(args, f"{name}_file") for name in splits}
        data = read_own_files(files, None if model is None else label_names_of(model), cache_dir)
    limits = {
        "train": args.max_train_samples,
        "validation": args.max_eval_samples,
        "test": args.max_predict_samples,
    }
    for name, dataset in data.splits.items():
        limit = limits[name.removesuffix("_mismatched")]
        if limit is not None:
            data.splits[name] = dataset.select(range(min(limit, dataset.num_rows)))
    if args.unlabelled_file and "train" in splits:
        data.splits["unlabelled"] = read_unlabelled(Path(args.unlabelled_file), data.text_columns)
    return data


def check_unlabelled(
    data_args: DataTrainingArguments, recipe_args: RecipeArguments, training_args: StoMPPTrainingArguments
) -> None:
    """Refuses texts without labels where something would look at the labels."""
    if data_args.unlabelled_file is None:
        return
    if recipe_args.method == "float" or recipe_args.float_num_train_epochs > 0:
        raise ValueError(
            "--unlabelled_file has no labels for a float model. Fine-tune that in a run of its own (--method float), "
            "and start from it without --float_num_train_epochs."
        )
    if LABELS in (training_args.distillation_losses or {}):
        raise ValueError(f"--unlabelled_file has none of the {LABELS} that --distillation_losses names. Drop one.")


def read_unlabelled(file: Path, text_columns: tuple[str, ...]) -> Dataset:
    """
    Reads texts, or pairs of texts, in the columns of a task. Raises a ValueError where the file cannot be read, lacks
    a column, or holds no text, or no pair where the task has pairs.
    """
    texts = [(text,) if isinstance(text, str) else text for text in read_texts([file], text_columns)]
    rows = [text for text in texts if len(text) == len(text_columns)]
    if 0 < len(rows) < len(texts):
        logger.warning("%s: %d of %d rows are no pair and are left out.", file, len(texts) - len(rows), len(texts))
    if not rows:
        raise ValueError(f"{file} holds no pair of texts. Give a table with the columns {', '.join(text_columns)}.")
    return Dataset.from_dict(dict(zip(text_columns, map(list, zip(*rows, strict=True)), strict=True)))


def label_names_of(model: PreTrainedConfig) -> list[str] | None:
    """Names of the classes that a model's head was trained for, `None` for a regression."""
    if model.num_labels == 1:
        return None
    names = [model.id2label[index] for index in range(model.num_labels)]
    return [str(index) if name == f"LABEL_{index}" else name for index, name in enumerate(names)]


def read_glue_task(
    task_name: str,
    splits: list[str],
    dataset_dir: str | None = None,
    dataset_subdir: str | None = None,
    cache_dir: str | None = None,
) -> GlueData:
    """
    Reads a GLUE task from a folder that holds `<task>/<split>.parquet`, or the Hub's `<task>/<split>-*.parquet`; from
    the Hub where there is none. Raises where a split or a column is missing, or a label is out of range.
    """
    task = TASKS[task_name]
    if dataset_dir is None:
        found = read_from_hub(task_name, splits, cache_dir)
    else:
        found = read_from_tree(Path(dataset_dir) / (dataset_subdir or task_name), splits, cache_dir)
    label_names = None if task.label_names is None else list(task.label_names)
    ready = {}
    for name, (dataset, source) in found.items():
        has_labels = not name.startswith("test")
        check_columns(dataset, source, task.text_columns, has_labels)
        dataset = drop_incomplete(dataset, source, task.text_columns, has_labels)
        if has_labels:
            check_task_labels(dataset, source, label_names)
        ready[name] = dataset
    return GlueData(ready, task.text_columns, label_names)


def read_from_tree(folder: Path, splits: list[str], cache_dir: str | None) -> dict[str, tuple[Dataset, str]]:
    """Reads the wanted splits, with their mismatched halves where they exist, from the Parquet files of one folder."""
    if not folder.is_dir():
        beside = sorted(path.name for path in folder.parent.glob("*") if path.is_dir())
        raise FileNotFoundError(
            f"There is no folder {folder}. {folder.parent} holds: {', '.join(beside) or 'no folders'}. Point "
            "--dataset_dir to the folder that holds one folder a task, and name the task's folder by "
            "--dataset_subdir where it differs from --task_name."
        )
    found = {}
    for split in splits:
        for name in (split, f"{split}_mismatched"):
            files = split_files(folder, name)
            if files:
                source = str(files[0]) if len(files) == 1 else f"{folder} ({name})"
                found[name] = (read_table(files, source, cache_dir), source)
        if split not in found:
            present = sorted(path.name for path in folder.glob("*.parquet"))
            raise FileNotFoundError(
                f"{folder} has no {split}.parquet (nor {split}-*.parquet), it holds: {', '.join(present) or 'none'}. "
                f"Add the file, or leave out {'--do_' + {'train': 'train', 'test': 'predict'}.get(split, 'eval')}."
            )
    return found


def read_from_hub(task_name: str, splits: list[str], cache_dir: str | None) -> dict[str, tuple[Dataset, str]]:
    """The same from the Hub, or from the cache."""
    wanted = [name for split in splits for name in (split, f"{split}_mismatched")]
    try:
        found = read_hub_splits(task_name, wanted, cache_dir)
    except (ConnectionError, FileNotFoundError) as error:
        raise ConnectionError(
            f"The task {task_name} of {HUB_DATASET} is not in the cache and could not be downloaded: {error}. "
            "Connect, or read a local copy by --dataset_dir."
        ) from error
    return {name: (table, f"{HUB_DATASET} ({task_name}, {name})") for name, table in found.items()}


def read_own_files(
    files: dict[str, str], label_names: list[str] | None = None, cache_dir: str | None = None
) -> GlueData:
    """
    Reads files of one's own, by the name of their split. The text is that of the column `sentence`, of `sentence1` and
    `sentence2`, or of the first one or two text columns besides `label`. Labels with a decimal point make it a
    regression; any others are classes, numbered in the order of their names, or as in `label_names`, those of a
    trained model.
    """
    ready: dict[str, Dataset] = {}
    text_columns: tuple[str, ...] = ()
    is_regression = False
    for position, (name, file) in enumerate(files.items()):
        has_labels = name != "test"
        dataset = read_table([Path(file)], cache_dir=cache_dir)
        if position == 0:
            text_columns = find_text_columns(dataset, file)
        check_columns(dataset, file, text_columns, has_labels)
        dataset = drop_incomplete(dataset, file, text_columns, has_labels)
        if has_labels:
            dataset = with_numeric_labels(dataset)
            if not ready:
                is_regression = dataset.features[LABEL_COLUMN].dtype.startswith("float")
                label_names = None if is_regression else label_names or classes_of(dataset, file)
            check_one_kind_of_label(dataset, file, is_regression)
            dataset = dataset if is_regression else with_class_ids(dataset, file, label_names)
        ready[name] = dataset
    if not is_regression and label_names is None:
        raise ValueError("No file has labels, so the number of classes is unknown. Give --validation_file too.")
    return GlueData(ready, text_columns, label_names)


def find_text_columns(dataset: Dataset, source: str) -> tuple[str, ...]:
    """The one or two columns of a file that hold its text."""
    if "sentence" in dataset.column_names:
        return ("sentence",)
    if {"sentence1", "sentence2"} <= set(dataset.column_names):
        return ("sentence1", "sentence2")
    strings = [name for name in dataset.column_names if name != LABEL_COLUMN and is_text(dataset, name)]
    if not strings:
        raise ValueError(missing_columns_message(source, dataset.column_names, ["sentence"]))
    return tuple(strings[:2])


def is_text(dataset: Dataset, column: str) -> bool:
    return getattr(dataset.features[column], "dtype", None) in ("string", "large_string")


def check_columns(dataset: Dataset, source: str, text_columns: tuple[str, ...], has_labels: bool) -> None:
    """Refuses a data set that lacks a column."""
    wanted = [*text_columns, LABEL_COLUMN] if has_labels else list(text_columns)
    missing = [name for name in wanted if name not in dataset.column_names]
    if missing:
        raise ValueError(missing_columns_message(source, dataset.column_names, missing))
    for name in text_columns:
        if not is_text(dataset, name):
            raise ValueError(f"{source}: the column {name} should hold text, it holds {dataset.features[name]}.")


def missing_columns_message(source: str, found: list[str], missing: list[str]) -> str:
    return (
        f"{source} lacks the column{'s' if len(missing) > 1 else ''} {', '.join(missing)}. Columns found: "
        f"{', '.join(found) or 'none'}. Wanted: `{LABEL_COLUMN}` (not for a test file) and the text, in `sentence`, "
        "in `sentence1` and `sentence2`, in the columns of the GLUE task, or in any one or two columns that every "
        "file has. Rename the columns in the file; a csv file starts with a line of column names."
    )


def drop_incomplete(dataset: Dataset, source: str, text_columns: tuple[str, ...], has_labels: bool) -> Dataset:
    """
    Leaves out the examples that have no text or no label, and says how many. Test examples all stay, without labels:
    predictions are matched to them by position. Raises a ValueError if no example is left.
    """
    if not has_labels:
        return dataset.remove_columns([LABEL_COLUMN]) if LABEL_COLUMN in dataset.column_names else dataset
    rows = zip(*(dataset[name] for name in (*text_columns, LABEL_COLUMN)), strict=True)
    complete = [index for index, values in enumerate(rows) if all(value not in (None, "") for value in values)]
    total = dataset.num_rows
    if not complete:
        raise ValueError(f"{source} has no example with both a text and a label, of {total}. Check the file.")
    if len(complete) == total:
        return dataset
    logger.warning(
        "%s: %d of %d examples lack a text or a label and are left out.", source, total - len(complete), total
    )
    return dataset.select(complete)


def check_task_labels(dataset: Dataset, source: str, label_names: list[str] | None) -> None:
    """Refuses labels that a GLUE task does not have."""
    for row, label in enumerate(dataset[LABEL_COLUMN]):
        if label_names is None and not 0.0 <= label <= 5.0:
            raise ValueError(f"{source}: the score {label} of row {row} is out of range; it should be from 0 to 5.")
        if label_names is not None and label not in range(len(label_names)):
            raise ValueError(
                f"{source}: the label {label} of row {row} is out of range; it should be one of "
                f"{', '.join(f'{index} ({name})' for index, name in enumerate(label_names))}. A label of -1 marks a "
                "hidden label: such a file can only be predicted."
            )


def with_numeric_labels(dataset: Dataset) -> Dataset:
    """Turns labels that are numbers written as text into numbers: a csv column with an empty cell is read as text."""
    feature = dataset.features[LABEL_COLUMN]
    if isinstance(feature, ClassLabel) or not is_text(dataset, LABEL_COLUMN):
        return dataset
    try:
        numbers = pandas.to_numeric(pandas.Series(dataset[LABEL_COLUMN][:]))
    except ValueError:
        return dataset
    return dataset.remove_columns([LABEL_COLUMN]).add_column(LABEL_COLUMN, numbers.to_numpy())


def classes_of(dataset: Dataset, source: str) -> list[str]:
    """Names of the classes in a labelled data set, in order."""
    feature = dataset.features[LABEL_COLUMN]
    if isinstance(feature, ClassLabel):
        return list(feature.names)
    labels = sorted(set(dataset[LABEL_COLUMN]))
    if feature.dtype.startswith("int") and labels[0] < 0:
        raise ValueError(
            f"{source}: the label {labels[0]} is out of range; class ids start from 0, and -1 marks a hidden label. "
            "Remove the rows that have none."
        )
    if len(labels) < 2:
        raise ValueError(f"{source}: every label is {labels[0]!r}. At least two classes are needed.")
    return [str(label) for label in labels]


def check_one_kind_of_label(dataset: Dataset, source: str, is_regression: bool) -> None:
    """Refuses scores where the first file has classes, classes where it has scores, and scores that are no numbers."""
    feature = dataset.features[LABEL_COLUMN]
    is_class = isinstance(feature, ClassLabel)
    if is_class or not is_regression or is_text(dataset, LABEL_COLUMN):
        if is_regression or feature.dtype.startswith("float"):
            raise ValueError(
                f"{source}: labels with a decimal point are scores, those without are classes, and the files do not "
                "agree. Write all labels in the same way."
            )
        return
    for row, label in enumerate(dataset[LABEL_COLUMN]):
        if not math.isfinite(label):
            raise ValueError(f"{source}: the score {label} of row {row} is not a finite number.")


def with_class_ids(dataset: Dataset, source: str, label_names: list[str]) -> Dataset:
    """Replaces the labels by class ids from 0."""
    feature = dataset.features[LABEL_COLUMN]
    ids = {name: index for index, name in enumerate(label_names)}
    numbers = []
    for row, label in enumerate(dataset[LABEL_COLUMN]):
        name = feature.int2str(label) if isinstance(feature, ClassLabel) else str(label)
        if name not in ids:
            raise ValueError(
                f"{source}: the label {name!r} of row {row} is out of range; the known labels are "
                f"{', '.join(label_names)}. Add examples of it to the training file, or remove the row."
            )
        numbers.append(ids[name])
    return dataset.remove_columns([LABEL_COLUMN]).add_column(LABEL_COLUMN, numbers)
