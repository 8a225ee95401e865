"""
Fine-tunes a 1-bit BERT (or its float and straight-through baselines) on a GLUE task or on files of one's own.

The stages, in order: fine-tune the float model (or take one that is), binarize it while it trains on, pack it, load
the packed model back, and measure all of them. `README.md` beside this file has the commands.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import itertools
import json
import logging
import math
import os
import platform
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np
import torch
import transformers
from datasets import Dataset
from glue_data import TASKS, GlueData, read_glue_task, read_own_files
from glue_metric import GlueMetric
from huggingface_hub import create_repo
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    EvalPrediction,
    HfArgumentParser,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

import hf_stompp
from hf_stompp import StoMPPConfig, StoMPPTrainer, StoMPPTrainingArguments, binarize, pack
from hf_stompp.benchmark import processor


logger = logging.getLogger(__name__)

# The surrogate gradients that make a method what its name says; the first is the default.
METHOD_SURROGATES = {
    "ste": ("ste", "clipped_ste"),
    "stompp": ("none",),
    "stompp_ste": ("ste", "clipped_ste"),
}
TIMED_BATCHES = 10


# ---- Arguments ------------------------------------------------------------------------------------------------------


@dataclass
class ModelArguments:
    """Which model is fine-tuned."""

    model_name_or_path: str = field(
        metadata={
            "help": "A model on the Hub or in a folder: a pretrained one, or one fine-tuned earlier on the same task. "
            "A packed or latent model of hf_stompp can be evaluated (without --do_train)."
        }
    )
    tokenizer_name: str | None = field(
        default=None, metadata={"help": "A tokenizer on the Hub or in a folder, where it is not the model's."}
    )
    cache_dir: str | None = field(default=None, metadata={"help": "Where downloads are kept."})
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of the model on the Hub."})
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run model code that the model's repository brings along."}
    )
    ignore_mismatched_sizes: bool = field(
        default=False, metadata={"help": "Replace a classifier head of another size by a new one."}
    )


@dataclass
class DataTrainingArguments:
    """Which data is used, and how it is tokenized."""

    task_name: str | None = field(default=None, metadata={"help": f"A GLUE task: {', '.join(TASKS)}."})
    dataset_dir: str | None = field(
        default=None,
        metadata={
            "help": "A folder that holds <task>/{train,validation,test}.parquet, read instead of the Hub. For mnli "
            "also validation_mismatched.parquet and test_mismatched.parquet."
        },
    )
    dataset_subdir: str | None = field(
        default=None, metadata={"help": "The folder of the task in --dataset_dir, where it is not named like it."}
    )
    train_file: str | None = field(
        default=None, metadata={"help": "A csv, tsv, json, jsonl or parquet file of one's own to train on."}
    )
    validation_file: str | None = field(default=None, metadata={"help": "The same to evaluate on."})
    test_file: str | None = field(default=None, metadata={"help": "The same to predict; needs no labels."})
    max_seq_length: int = field(default=128, metadata={"help": "Longer texts are cut to this many tokens."})
    pad_to_max_length: bool = field(
        default=False, metadata={"help": "Pad every text to max_seq_length, not each batch to its longest text."}
    )
    overwrite_cache: bool = field(default=False, metadata={"help": "Tokenize again even if a cached result exists."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on this many examples only."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate on this many examples only."})
    max_predict_samples: int | None = field(default=None, metadata={"help": "Predict this many examples only."})

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


@dataclass
class BinarizationArguments:
    """How the model is binarized. What is not given is left to the defaults of `StoMPPConfig`."""

    method: Literal["float", "ste", "stompp", "stompp_ste"] = field(
        default="stompp_ste",
        metadata={
            "help": "float: no binarization; ste: everything binary from the first step, straight-through gradient; "
            "stompp: progressive, frozen entries have no gradient; stompp_ste: progressive, with a straight-through "
            "gradient of frozen entries."
        },
    )
    mode: Literal["bnn", "bwn"] | None = field(
        default=None, metadata={"help": "bnn: binary weights and activations; bwn: binary weights only."}
    )
    surrogate: Literal["none", "ste", "clipped_ste"] | None = field(
        default=None,
        metadata={"help": "Gradient of frozen entries. The method decides between none and ste; this picks the kind."},
    )
    weight_scale: Literal["row", "tensor", "none"] | None = field(
        default=None, metadata={"help": "One scale for each output row, one for the whole matrix, or none."}
    )
    weight_clip: float | None = field(
        default=None, metadata={"help": "Clip range of weights that are not frozen, in multiples of their scale."}
    )
    activation_scale: Literal["learned", "fixed"] | None = field(
        default=None, metadata={"help": "An activation's scale, taken from the first batch, is then learned or not."}
    )
    activation_shift: Literal["learned", "fixed", "none"] | None = field(
        default=None, metadata={"help": "The same for its shift and threshold, one for each feature."}
    )
    activation_clip: float | None = field(
        default=None, metadata={"help": "Clip range of activations that are not frozen, in multiples of their scale."}
    )
    feed_forward_levels: Literal["signed", "zero_one"] | None = field(
        default=None, metadata={"help": "The two values of the activations between the feed-forward linears."}
    )
    unit: Literal["layer", "sublayer", "module"] | None = field(
        default=None, metadata={"help": "What freezes at a time: an encoder layer, half of one, or a single linear."}
    )
    binary_word_embeddings: bool | None = field(
        default=None, metadata={"help": "Binarize the word embeddings too, the largest part of a packed file."}
    )
    float_num_train_epochs: float = field(
        default=0.0,
        metadata={
            "help": "Fine-tune the float model for so many epochs first. 0: binarize model_name_or_path as it is."
        },
    )
    float_learning_rate: float = field(default=5e-5, metadata={"help": "Learning rate of that float fine-tuning."})

    def __post_init__(self) -> None:
        # A JSON file passes by the parser, which checks the choices of a command line.
        if self.method not in ("float", *METHOD_SURROGATES):
            raise ValueError(f"--method {self.method} is unknown. Give float, {', '.join(METHOD_SURROGATES)}.")
        if self.float_num_train_epochs < 0:
            raise ValueError(f"--float_num_train_epochs {self.float_num_train_epochs} is negative. Give 0 or more.")

    def config(self) -> StoMPPConfig | None:
        """The binarization asked for, `None` for a float run."""
        if self.method == "float":
            return None
        names = {item.name for item in dataclasses.fields(self)}
        names -= {"method", "float_num_train_epochs", "float_learning_rate"}
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return StoMPPConfig(**{"surrogate": METHOD_SURROGATES[self.method][0], **given})


def progression_names() -> list[str]:
    """Names of the training arguments that `StoMPPTrainingArguments` adds to those of transformers."""
    plain = {item.name for item in dataclasses.fields(TrainingArguments)}
    return [item.name for item in dataclasses.fields(StoMPPTrainingArguments) if item.name not in plain]


def progression(training_args: StoMPPTrainingArguments) -> dict[str, Any]:
    """Those arguments and their values."""
    return plain({name: getattr(training_args, name) for name in progression_names()})


def parse_arguments(
    argv: list[str],
) -> tuple[ModelArguments, DataTrainingArguments, BinarizationArguments, StoMPPTrainingArguments]:
    """
    Read the command line, or the JSON file that is its only argument, and refuse what contradicts itself.

    Raises:
        `ValueError`: unknown keys, values out of range, or arguments that contradict the method.
    """
    # Abbreviated names would hide from the check below which arguments were given.
    parser = HfArgumentParser(
        (ModelArguments, DataTrainingArguments, BinarizationArguments, StoMPPTrainingArguments), allow_abbrev=False
    )
    if len(argv) == 1 and argv[0].endswith(".json"):
        if not os.path.isfile(argv[0]):
            raise FileNotFoundError(f"There is no argument file {argv[0]}. Give the path of a JSON file of arguments.")
        with open(argv[0], encoding="utf-8") as file:
            values = json.load(file)
        if not values.get("model_name_or_path"):
            raise ValueError(f"{argv[0]} names no model. Add `model_name_or_path`.")
        given = set(values)
        parsed = parser.parse_dict(values)
    else:
        names = [argument[2:].split("=")[0].replace("-", "_") for argument in argv if argument.startswith("--")]
        given = {*names, *(name.removeprefix("no_") for name in names)}
        parsed = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
    model_args, data_args, binarization_args, training_args = parsed
    settle_method(binarization_args, training_args, given)
    check_stages(data_args, training_args)
    return model_args, data_args, binarization_args, training_args


def settle_method(
    binarization_args: BinarizationArguments, training_args: StoMPPTrainingArguments, given: set[str]
) -> None:
    """Refuse arguments (of those `given`) that contradict the method, and give vanilla STE its schedule."""
    method = binarization_args.method
    if method == "float":
        own = {item.name for item in dataclasses.fields(BinarizationArguments)} - {"method"}
        unused = sorted(given & (own | set(progression_names())))
        if unused:
            raise ValueError(
                f"--method float binarizes nothing and is contradicted by --{', --'.join(unused)}. Drop them, or "
                f"choose the method {', '.join(METHOD_SURROGATES)}. The float epochs of a float run are "
                "--num_train_epochs."
            )
        return
    surrogate = binarization_args.surrogate
    if surrogate is not None and surrogate not in METHOD_SURROGATES[method]:
        raise ValueError(
            f"--method {method} is contradicted by --surrogate {surrogate}; it goes with "
            f"{' or '.join(METHOD_SURROGATES[method])}. Drop --surrogate, or choose another method."
        )
    schedule = training_args.progression_schedule
    if method == "ste":
        if "progression_schedule" in given and schedule != "immediate":
            raise ValueError(
                f"--method ste freezes everything at once and is contradicted by --progression_schedule {schedule}. "
                "Drop the schedule, or choose --method stompp_ste."
            )
        training_args.progression_schedule = "immediate"
    elif schedule == "immediate":
        raise ValueError(
            f"--method {method} is progressive and is contradicted by --progression_schedule immediate. Drop the "
            "schedule, or choose --method ste."
        )


def check_stages(data_args: DataTrainingArguments, training_args: StoMPPTrainingArguments) -> None:
    """Refuse a run that does nothing, and one whose own files do not cover what it should do."""
    if not (training_args.do_train or training_args.do_eval or training_args.do_predict):
        raise ValueError("There is nothing to do. Give --do_train, --do_eval or --do_predict.")
    if data_args.task_name is not None:
        return
    for wanted, flag, name in (
        (training_args.do_train, "do_train", "train_file"),
        (training_args.do_eval, "do_eval", "validation_file"),
        (training_args.do_predict, "do_predict", "test_file"),
    ):
        if wanted and not getattr(data_args, name):
            raise ValueError(f"--{flag} needs --{name} (or --task_name). Give the file, or drop --{flag}.")


# ---- The run --------------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """
    What the stages share.

    Attributes:
        data (`GlueData`):
            The examples, tokenized once the model is known.
        class_order (`numpy.ndarray` of shape `(num_labels,)` or `None`):
            The model's id of each class of the data, where the model was fine-tuned earlier with the same classes in
            another order.
        hub_token (`str` or `None`):
            What `--push_to_hub` logs in with, if not by the environment.
        seconds (`dict[str, float]`):
            Wall-clock time of each stage.
    """

    model_args: ModelArguments
    data_args: DataTrainingArguments
    binarization_args: BinarizationArguments
    training_args: StoMPPTrainingArguments
    tokenizer: PreTrainedTokenizerBase
    data: GlueData
    class_order: np.ndarray | None = None
    hub_token: str | None = field(default=None, repr=False)
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Name of the task, or of the training file."""
        files = (self.data_args.train_file, self.data_args.validation_file, self.data_args.test_file)
        return self.data_args.task_name or Path(next(file for file in files if file)).stem

    @property
    def output_dir(self) -> Path:
        return Path(self.training_args.output_dir)

    @contextlib.contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Add the wall-clock seconds of a block to `seconds[stage]`."""
        start = time.perf_counter()
        yield
        self.seconds[stage] = round(self.seconds.get(stage, 0.0) + time.perf_counter() - start, 3)

    def evaluation_sets(self) -> dict[str, Dataset]:
        """Metric prefix and data set of each evaluation."""
        sets = {"eval": "validation", "eval_mm": "validation_mismatched"}
        return {prefix: self.data.splits[split] for prefix, split in sets.items() if split in self.data.splits}


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """
    Run the script.

    Args:
        argv (`list[str]`, *optional*): The command line without the program's name; that of the process if not given.

    Returns:
        `dict[str, Any]`: what `summary.json` holds.
    """
    start = time.perf_counter()
    argv = sys.argv[1:] if argv is None else list(argv)
    model_args, data_args, binarization_args, training_args = parse_arguments(argv)
    config = binarization_args.config()
    set_up_logging(training_args)
    if training_args.do_train:
        claim_output_dir(model_args, data_args, binarization_args, training_args, config)
    hub_token = training_args.hub_token
    # A trainer writes its arguments to training_args.bin, which is uploaded with the model.
    training_args.hub_token = None
    if training_args.push_to_hub:
        create_hub_repository(training_args, hub_token)
    set_seed(training_args.seed)

    run = Run(
        model_args,
        data_args,
        binarization_args,
        training_args,
        tokenizer=AutoTokenizer.from_pretrained(
            model_args.tokenizer_name or model_args.model_name_or_path, **download_options(model_args)
        ),
        data=read_data(model_args, data_args, training_args),
        hub_token=hub_token,
    )
    order_classes(run)
    with run.timed("tokenize"):
        tokenize_data(run)

    if not training_args.do_train:
        results = evaluate_only(run)
    elif config is None:
        results = train_float_only(run)
    else:
        results = train_binary(run, config)

    run.seconds["total"] = round(time.perf_counter() - start, 3)
    summary = summarize(run, config, results, argv)
    if training_args.should_save:
        (run.output_dir / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
        print(summary_table(summary))
    # Last: whatever the Hub answers, the results are written.
    if results.trainer is not None and results.folder is not None:
        share(run, results.trainer, results.folder)
    return summary


def set_up_logging(training_args: StoMPPTrainingArguments) -> None:
    """Log at the level of the training arguments, in this script and in the libraries it calls."""
    logging.basicConfig(
        format="%(asctime)s - %(levelname)s - %(name)s - %(message)s", handlers=[logging.StreamHandler(sys.stdout)]
    )
    level = training_args.get_process_log_level()
    logger.setLevel(level)
    logging.getLogger("glue_data").setLevel(level)
    datasets.utils.logging.set_verbosity(level)
    transformers.utils.logging.set_verbosity(level)
    logger.info("Training arguments: %s", training_args)


def claim_output_dir(
    model_args: ModelArguments,
    data_args: DataTrainingArguments,
    binarization_args: BinarizationArguments,
    training_args: StoMPPTrainingArguments,
    config: StoMPPConfig | None,
) -> None:
    """
    Record in the output folder which run it belongs to.

    A run resumes from what its output folder holds; without this check one would silently continue from the checkpoint
    or the float model of another.

    Raises:
        `ValueError`: if the folder belongs to a run with other settings.
    """
    settings = {
        **{name: getattr(model_args, name) for name in ("model_name_or_path", "model_revision")},
        **{
            item.name: getattr(data_args, item.name)
            for item in dataclasses.fields(data_args)
            if item.name not in ("overwrite_cache", "max_eval_samples", "max_predict_samples", "test_file")
        },
        "method": binarization_args.method,
        "float_num_train_epochs": binarization_args.float_num_train_epochs,
        "float_learning_rate": binarization_args.float_learning_rate,
        "seed": training_args.seed,
        "binarization": None if config is None else plain(config.to_dict()),
        "progression": None if config is None else progression(training_args),
    }
    output_dir = Path(training_args.output_dir)
    file = output_dir / "run_settings.json"
    if holds_work(output_dir):
        earlier = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        changed = [name for name in settings if earlier.get(name) != settings[name]]
        if changed:
            differences = "; ".join(f"{name} was {earlier.get(name)!r}, is {settings[name]!r}" for name in changed)
            raise ValueError(
                f"{output_dir} belongs to another run: {differences}. Choose another --output_dir, delete this one, "
                "or give the earlier settings to resume that run."
            )
    if training_args.should_save:
        output_dir.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def holds_work(output_dir: Path) -> bool:
    """Whether an earlier run left something in its output folder that a later one would go on from."""
    folders = [folder for folder in (output_dir, output_dir / "float") if folder.is_dir()]
    has_checkpoint = any(get_last_checkpoint(str(folder)) is not None for folder in folders)
    return has_checkpoint or (output_dir / "float" / "finished.json").is_file()


def create_hub_repository(training_args: StoMPPTrainingArguments, token: str | None) -> None:
    """Create the repository before anything is trained: a missing permission should not show after hours of work."""
    repository = create_repo(
        training_args.hub_model_id or Path(training_args.output_dir).name,
        token=token,
        private=training_args.hub_private_repo,
        exist_ok=True,
    )
    training_args.hub_model_id = repository.repo_id


def plain(value: Any) -> Any:
    """The value as JSON gives it back."""
    return json.loads(json.dumps(value, default=str))


def download_options(model_args: ModelArguments) -> dict[str, Any]:
    return {
        "cache_dir": model_args.cache_dir,
        "revision": model_args.model_revision,
        "trust_remote_code": model_args.trust_remote_code,
    }


# ---- Data -----------------------------------------------------------------------------------------------------------


def read_data(
    model_args: ModelArguments, data_args: DataTrainingArguments, training_args: StoMPPTrainingArguments
) -> GlueData:
    """Read the splits that the run needs, and cut them to the wanted number of examples."""
    wanted = {
        "train": training_args.do_train,
        "validation": training_args.do_eval,
        "test": training_args.do_predict,
    }
    splits = [name for name, is_wanted in wanted.items() if is_wanted]
    if data_args.task_name is not None:
        data = read_glue_task(
            data_args.task_name, splits, data_args.dataset_dir, data_args.dataset_subdir, model_args.cache_dir
        )
    else:
        files = {name: getattr(data_args, f"{name}_file") for name in splits}
        known = None if training_args.do_train else label_names_of(model_args)
        data = read_own_files(files, known, model_args.cache_dir)
    limits = {
        "train": data_args.max_train_samples,
        "validation": data_args.max_eval_samples,
        "test": data_args.max_predict_samples,
    }
    for name, dataset in data.splits.items():
        limit = limits[name.removesuffix("_mismatched")]
        if limit is not None:
            data.splits[name] = dataset.select(range(min(limit, dataset.num_rows)))
    return data


def label_names_of(model_args: ModelArguments) -> list[str] | None:
    """Names of the classes that a model's head was trained for, `None` for a regression."""
    config = AutoConfig.from_pretrained(model_args.model_name_or_path, **download_options(model_args))
    if config.num_labels == 1:
        return None
    names = [config.id2label[index] for index in range(config.num_labels)]
    return [str(index) if name == f"LABEL_{index}" else name for index, name in enumerate(names)]


def order_classes(run: Run) -> None:
    """Find out where a model that was fine-tuned earlier has the same classes in another order."""
    names = run.data.label_names
    if names is None:
        return
    config = AutoConfig.from_pretrained(run.model_args.model_name_or_path, **download_options(run.model_args))
    known = {str(name).lower(): index for index, name in config.id2label.items()}
    if set(known) == {name.lower() for name in names}:
        order = np.array([known[name.lower()] for name in names])
        if (order != np.arange(len(names))).any():
            logger.info("The model numbers the classes %s; its order is kept.", config.id2label)
            run.class_order = order


def tokenize_data(run: Run) -> None:
    """Replace the splits of `run.data` by tokenized ones whose labels are the model's class ids."""
    data_args, training_args = run.data_args, run.training_args
    max_length = min(data_args.max_seq_length, run.tokenizer.model_max_length)
    if max_length < data_args.max_seq_length:
        logger.warning(
            "--max_seq_length %d is more than the tokenizer's %d, which is used.", data_args.max_seq_length, max_length
        )
    order = None if run.class_order is None else run.class_order.tolist()
    padding = "max_length" if data_args.pad_to_max_length else False
    for name, dataset in run.data.splits.items():
        with training_args.main_process_first(desc=f"tokenize {name}"):
            run.data.splits[name] = dataset.map(
                tokenize_batch,
                batched=True,
                # Columns of the source may have a name that the model's forward method takes for something else.
                remove_columns=[column for column in dataset.column_names if column != "label"],
                load_from_cache_file=not data_args.overwrite_cache,
                desc=f"Tokenize {name}",
                fn_kwargs={
                    "tokenizer": run.tokenizer,
                    "columns": run.data.text_columns,
                    "max_length": max_length,
                    "padding": padding,
                    "order": order,
                },
            )


def tokenize_batch(
    batch: dict[str, list],
    tokenizer: PreTrainedTokenizerBase,
    columns: tuple[str, ...],
    max_length: int,
    padding: str | bool,
    order: list[int] | None,
) -> dict[str, list]:
    """Tokenize one batch of examples, and translate its labels to the model's class ids."""
    texts = [["" if text is None else text for text in batch[column]] for column in columns]
    result = dict(tokenizer(*texts, padding=padding, max_length=max_length, truncation=True))
    if "label" in batch:
        result["label"] = batch["label"] if order is None else [order[label] for label in batch["label"]]
    return result


# ---- Model and trainers ---------------------------------------------------------------------------------------------


def load_model(run: Run, path: str) -> tuple[PreTrainedModel, bool]:
    """
    Load the model that is to be fine-tuned or evaluated.

    Returns:
        `tuple[PreTrainedModel, bool]`: the model, and whether any of its weights are new (a head to be trained).
    """
    data = run.data
    names = data.label_names
    options = {} if path != run.model_args.model_name_or_path else download_options(run.model_args)
    if names is not None:
        order = range(len(names)) if run.class_order is None else run.class_order.tolist()
        options["id2label"] = dict(sorted(zip(order, names, strict=True)))
        options["label2id"] = dict(zip(names, order, strict=True))
    model, loading = AutoModelForSequenceClassification.from_pretrained(
        path,
        num_labels=data.num_labels,
        problem_type="regression" if data.is_regression else "single_label_classification",
        ignore_mismatched_sizes=run.model_args.ignore_mismatched_sizes,
        # The default keeps the type of the file, and half precision weights cannot be trained by plain AdamW.
        dtype=torch.float32,
        output_loading_info=True,
        **options,
    )
    # Older BERT files name LayerNorm's weights gamma and beta. transformers writes them back under those names, and
    # then does not find them when it resumes or loads the best checkpoint.
    model._weight_conversions = None
    return model, bool(loading["missing_keys"] or loading["mismatched_keys"])


def is_binarized(model: PreTrainedModel) -> bool:
    """Whether a model was loaded from a latent or packed checkpoint."""
    return getattr(model.config, "quantization_config", None) is not None


def make_trainer(
    run: Run,
    model: PreTrainedModel,
    training_args: StoMPPTrainingArguments,
    trainer_class: type[Trainer] = Trainer,
    train: bool = False,
) -> Trainer:
    """A trainer of the given class; without `train` it only evaluates and predicts."""
    if run.data_args.pad_to_max_length:
        collator = default_data_collator
    else:
        half = training_args.fp16 or training_args.bf16
        collator = DataCollatorWithPadding(run.tokenizer, pad_to_multiple_of=8 if half else None)
    trainer = trainer_class(
        model=model,
        args=arguments_to_train(training_args) if train else arguments_to_evaluate(training_args),
        train_dataset=run.data.splits["train"] if train else None,
        eval_dataset=run.data.splits.get("validation"),
        data_collator=collator,
        processing_class=run.tokenizer,
        compute_metrics=lambda prediction: compute_metrics(run, prediction),
        callbacks=[EvaluateLastStep()] if train and training_args.load_best_model_at_end else None,
    )
    # The classifiers of transformers accept the argument that the trainer corrects the loss by, and ignore it; the
    # loss would be too large by the number of accumulation steps.
    trainer.model_accepts_loss_kwargs = False
    return trainer


class EvaluateLastStep(TrainerCallback):
    """Evaluates after the last step: once the best checkpoint is loaded, the final weights can no longer be."""

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps:
            control.should_evaluate = True


def arguments_to_train(training_args: StoMPPTrainingArguments) -> StoMPPTrainingArguments:
    """A copy of the arguments for a trainer that does not upload as it goes: only the result is shared, at the end."""
    changed = copy.copy(training_args)
    changed.push_to_hub = False
    return changed


def arguments_to_evaluate(training_args: StoMPPTrainingArguments) -> StoMPPTrainingArguments:
    """A copy of the arguments for a trainer that neither trains nor uploads."""
    changed = arguments_to_train(training_args)
    changed.load_best_model_at_end = False
    changed.eval_strategy = transformers.trainer_utils.IntervalStrategy.NO
    return changed


def float_arguments(run: Run) -> StoMPPTrainingArguments:
    """A copy of the arguments for the float fine-tuning that comes before binarization."""
    changed = copy.copy(run.training_args)
    changed.output_dir = str(run.output_dir / "float")
    changed.num_train_epochs = run.binarization_args.float_num_train_epochs
    changed.max_steps = -1
    changed.learning_rate = run.binarization_args.float_learning_rate
    changed.resume_from_checkpoint = None
    return changed


def compute_metrics(run: Run, prediction: EvalPrediction) -> dict[str, float]:
    """The measures of the task, and their mean as `combined_score` where there are several."""
    logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
    predicted, references = predicted_values(run, logits), prediction.label_ids
    if run.class_order is not None:
        references = np.argsort(run.class_order)[references]
    # Data of one's own is measured like the GLUE task of its kind.
    task = run.data_args.task_name or ("stsb" if run.data.is_regression else "sst2")
    result = GlueMetric(task, keep_in_memory=True).compute(predictions=predicted, references=references)
    if len(result) > 1:
        result["combined_score"] = float(np.mean(list(result.values())))
    return result


def predicted_values(run: Run, logits: np.ndarray) -> np.ndarray:
    """Scores, or class ids in the order of the data, of shape `(examples,)` from logits `(examples, num_labels)`."""
    if run.data.is_regression:
        return logits.reshape(-1)
    predicted = logits.argmax(axis=-1)
    return predicted if run.class_order is None else np.argsort(run.class_order)[predicted]


def train(trainer: Trainer, resume_from_checkpoint: str | None) -> int:
    """Train (on from the folder's last checkpoint, where there is one) and save. Returns the number of steps."""
    output_dir = trainer.args.output_dir
    checkpoint = resume_from_checkpoint
    if checkpoint is None and os.path.isdir(output_dir):
        checkpoint = get_last_checkpoint(output_dir)
        if checkpoint is not None:
            logger.info("Resuming from %s. To start over, delete %s.", checkpoint, output_dir)
    result = trainer.train(resume_from_checkpoint=checkpoint)
    metrics = {**result.metrics, "train_samples": len(trainer.train_dataset)}
    trainer.save_model()
    trainer.log_metrics("train", metrics)
    trainer.save_metrics("train", metrics)
    trainer.save_state()
    return trainer.state.global_step


def evaluate(run: Run, trainer: Trainer, split: str = "eval") -> dict[str, float] | None:
    """
    Evaluate on every development set, and save what the trainer reports as `<split>_results.json`.

    Returns:
        `dict[str, float]` or `None`: loss and measures under `eval_*`, and under `eval_mm_*` for MNLI's mismatched
        set; `None` if the run does not evaluate.
    """
    if not run.evaluation_sets():
        return None
    reported: dict[str, float] = {}
    for prefix, dataset in run.evaluation_sets().items():
        reported.update(trainer.evaluate(eval_dataset=dataset, metric_key_prefix=prefix))
        reported[f"{prefix}_samples"] = len(dataset)
    trainer.log_metrics(split, reported)
    # Only the model that the run ends with belongs in all_results.json.
    trainer.save_metrics(split, reported, combined=split == "eval")
    return measures_only(run, reported)


def measures_only(run: Run, reported: dict[str, float]) -> dict[str, float]:
    """Loss and measures, without the speeds and the results of the mixed network that a trainer reports as well."""
    task = run.data_args.task_name or ("stsb" if run.data.is_regression else "sst2")
    names = ["loss", *GlueMetric(task, keep_in_memory=True).measures, "combined_score"]
    keys = [f"{prefix}_{name}" for prefix in run.evaluation_sets() for name in names]
    return {key: reported[key] for key in keys if key in reported}


def milliseconds_per_batch(run: Run, **models: PreTrainedModel) -> dict[str, float]:
    """
    Median time of each model's forward pass over the first batches of the development set; empty without one.

    The models take every batch in turn, so that other load on the machine meets them alike. They run as they were
    loaded: a Trainer leaves the models that it has evaluated under autocast.
    """
    if not run.evaluation_sets():
        return {}
    times: dict[str, list[float]] = {name: [] for name in models}
    trainer = make_trainer(run, next(iter(models.values())), run.training_args)
    batches = trainer.get_eval_dataloader()
    for model in models.values():
        trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    with torch.inference_mode():
        for number, batch in enumerate(itertools.islice(batches, TIMED_BATCHES)):
            for name, model in models.items():
                model.eval().to(run.training_args.device)
                # The first pass pays for what is set up once.
                for _ in range(2 if number == 0 else 1):
                    synchronize()
                    start = time.perf_counter()
                    model(**batch)
                    synchronize()
                    elapsed = time.perf_counter() - start
                times[name].append(elapsed * 1000)
    return {name: round(statistics.median(values), 3) for name, values in times.items()}


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def bytes_of_weights(folder: Path) -> int:
    """Bytes of the safetensors files of a saved model."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def bytes_when_saved(run: Run, model: PreTrainedModel) -> int:
    """Bytes of the safetensors files that a model in memory is saved as."""
    with tempfile.TemporaryDirectory(dir=run.output_dir) as folder:
        model.save_pretrained(folder)
        return bytes_of_weights(Path(folder))


# ---- What a run does ------------------------------------------------------------------------------------------------


@dataclass
class Results:
    """
    What a run measured, `None` for what it did not do, and what of it is shared: a trainer's model, and the folder
    that it lies in.
    """

    steps: dict[str, int] = field(default_factory=dict)
    metrics: dict[str, dict[str, float] | None] = field(default_factory=dict)
    bytes: dict[str, int] = field(default_factory=dict)
    milliseconds: dict[str, float] = field(default_factory=dict)
    packed_weights: str | None = None
    trainer: Trainer | None = None
    folder: Path | None = None


def evaluate_only(run: Run) -> Results:
    """
    Evaluate a model as it is: a float one, or a latent or packed one of an earlier run.

    Raises:
        `ValueError`: if a float model comes without `--method float`.
    """
    model, head_is_new = load_model(run, run.model_args.model_name_or_path)
    kind = "binary" if is_binarized(model) else "float"
    if kind == "float" and run.binarization_args.method != "float":
        raise ValueError(
            f"{run.model_args.model_name_or_path} is a float model and --method {run.binarization_args.method} makes "
            "a binary one only while training. Add --do_train, evaluate the float model by --method float, or give "
            "the folder of a packed model."
        )
    if head_is_new:
        logger.warning(
            "%s has no trained head for this task; what follows is chance.", run.model_args.model_name_or_path
        )
    trainer = make_trainer(run, model, run.training_args, StoMPPTrainer if kind == "binary" else Trainer)
    results = Results()
    with run.timed(f"evaluate_{kind}"):
        results.metrics[kind] = evaluate(run, trainer)
    results.milliseconds = milliseconds_per_batch(run, **{kind: trainer.model})
    predict(run, trainer)
    return results


def train_float_only(run: Run) -> Results:
    """Plain fine-tuning."""
    results = Results()
    model, _ = load_model(run, run.model_args.model_name_or_path)
    refuse_binarized(run, model)
    trainer = make_trainer(run, model, run.training_args, train=True)
    with run.timed("train_float"):
        results.steps["float"] = train(trainer, run.training_args.resume_from_checkpoint)
    with run.timed("evaluate_float"):
        results.metrics["float"] = evaluate(run, trainer)
    results.milliseconds = milliseconds_per_batch(run, float=trainer.model)
    results.bytes["float"] = bytes_of_weights(run.output_dir)
    predict(run, trainer)
    results.trainer, results.folder = trainer, run.output_dir
    return results


def train_binary(run: Run, config: StoMPPConfig) -> Results:
    """Float fine-tuning where asked for, then binarization, packing, and an evaluation of each."""
    results = Results()
    model = prepare_float_model(run, results)
    with run.timed("binarize"):
        model = binarize(model, config)

    trainer = make_trainer(run, model, run.training_args, StoMPPTrainer, train=True)
    with run.timed("train_binary"):
        results.steps["binary"] = train(trainer, run.training_args.resume_from_checkpoint)
    with run.timed("evaluate_binary"):
        kept = evaluate(run, trainer)
    if trainer.args.load_best_model_at_end and trainer.state.best_model_checkpoint is not None:
        results.packed_weights = "best"
        results.metrics.update(binary_final=last_evaluation(run, trainer), binary_best=kept)
    else:
        results.packed_weights = "final"
        results.metrics.update(binary_final=kept, binary_best=None)
    results.bytes["latent"] = bytes_when_saved(run, trainer.model)

    packed_trainer = pack_and_reload(run, trainer, results)
    with run.timed("evaluate_packed"):
        results.metrics["packed"] = evaluate(run, packed_trainer, "eval_packed")
    with run.timed("measure_speed"):
        float_model, _ = load_model(run, float_model_path(run))
        results.milliseconds = milliseconds_per_batch(run, float=float_model, packed=packed_trainer.model)
    predict(run, packed_trainer)
    results.trainer, results.folder = trainer, run.output_dir / "packed"
    return results


def refuse_binarized(run: Run, model: PreTrainedModel) -> None:
    """Refuse to train on from a checkpoint that is binarized already."""
    if is_binarized(model):
        raise ValueError(
            f"{run.model_args.model_name_or_path} is binarized already. Give the float model to --model_name_or_path; "
            "to go on with an interrupted run, repeat its command with the same --output_dir. Without --do_train a "
            "binarized model is evaluated."
        )


def float_model_path(run: Run) -> str:
    """Where the float model is that is binarized."""
    is_fine_tuned_here = run.binarization_args.float_num_train_epochs > 0
    return str(run.output_dir / "float") if is_fine_tuned_here else run.model_args.model_name_or_path


def prepare_float_model(run: Run, results: Results) -> PreTrainedModel:
    """
    The float model that is binarized, fine-tuned first where asked for, and measured if its head is trained.

    A float model that an interrupted run finished is taken from `output_dir/float`. Both a fresh and a reused one are
    loaded from there, so that an interrupted run gives the same result as one that was not.
    """
    epochs = run.binarization_args.float_num_train_epochs
    folder = run.output_dir / "float"
    results.steps["float"] = fine_tune_float(run, folder) if epochs > 0 else 0
    model, head_is_new = load_model(run, float_model_path(run))
    refuse_binarized(run, model)
    trainer = make_trainer(run, model, run.training_args)
    results.metrics["float"] = None
    if not head_is_new:
        with run.timed("evaluate_float"):
            results.metrics["float"] = evaluate(run, trainer, "eval_float")
    results.bytes["float"] = bytes_of_weights(folder) if epochs > 0 else bytes_when_saved(run, model)
    return model


def fine_tune_float(run: Run, folder: Path) -> int:
    """Fine-tune the float model into `folder`, unless an earlier start of this run did. Returns the steps."""
    finished = folder / "finished.json"
    if finished.is_file():
        logger.info("Taking the float model that an earlier start of this run left in %s.", folder)
        earlier = json.loads(finished.read_text(encoding="utf-8"))
        run.seconds["train_float"] = earlier["seconds"]
        return earlier["steps"]
    model, _ = load_model(run, run.model_args.model_name_or_path)
    refuse_binarized(run, model)
    trainer = make_trainer(run, model, float_arguments(run), train=True)
    with run.timed("train_float"):
        steps = train(trainer, None)
    if trainer.is_world_process_zero():
        finished.write_text(json.dumps({"steps": steps, "seconds": run.seconds["train_float"]}), encoding="utf-8")
    trainer.accelerator.wait_for_everyone()
    return steps


def last_evaluation(run: Run, trainer: Trainer) -> dict[str, float] | None:
    """Measures of the weights of the last step, from the trainer's history."""
    for entry in reversed(trainer.state.log_history):
        if "eval_loss" in entry and entry["step"] == trainer.state.global_step:
            return measures_only(run, entry)
    return None


def pack_and_reload(run: Run, trainer: StoMPPTrainer, results: Results) -> Trainer:
    """Pack, save to `output_dir/packed`, load back as a user would, and give a trainer to evaluate it with."""
    folder = run.output_dir / "packed"
    with run.timed("pack"):
        if trainer.is_world_process_zero():
            pack(trainer.model).save_pretrained(folder)
            run.tokenizer.save_pretrained(folder)
        trainer.accelerator.wait_for_everyone()
    results.bytes["packed"] = bytes_of_weights(folder)
    with run.timed("load_packed"):
        packed = AutoModelForSequenceClassification.from_pretrained(folder)
    return make_trainer(run, packed, run.training_args, StoMPPTrainer)


def predict(run: Run, trainer: Trainer) -> None:
    """Write the predictions for the test sets to `predict_results_<task>.txt`."""
    if not run.training_args.do_predict:
        return
    for split, suffix in (("test", ""), ("test_mismatched", "-mm")):
        if split not in run.data.splits:
            continue
        with run.timed("predict"):
            logits = trainer.predict(run.data.splits[split], metric_key_prefix="predict").predictions
        values = predicted_values(run, logits[0] if isinstance(logits, tuple) else logits)
        names = run.data.label_names
        lines = [f"{value:.3f}" if names is None else names[value] for value in values]
        if trainer.is_world_process_zero():
            file = run.output_dir / f"predict_results_{run.name}{suffix}.txt"
            file.write_text(
                "index\tprediction\n" + "".join(f"{index}\t{line}\n" for index, line in enumerate(lines)),
                encoding="utf-8",
            )


def share(run: Run, trainer: Trainer, folder: Path) -> None:
    """Write the model card beside the model that the run ends with, and upload that folder if asked to."""
    details = {"finetuned_from": run.model_args.model_name_or_path, "tasks": "text-classification"}
    task = run.data_args.task_name
    if task is not None:
        details.update(language="en", dataset_tags="glue", dataset_args=task, dataset=f"GLUE {task.upper()}")
    name = (run.training_args.hub_model_id or run.output_dir.name).split("/")[-1]
    if run.training_args.push_to_hub:
        # Created at the start of the run, with the name that the Hub gave it.
        trainer.hub_model_id = run.training_args.hub_model_id
        # A StoMPPTrainer pushes its packed model, from the folder `packed` of the run's.
        trainer.push_to_hub(model_name=name, token=run.hub_token, **details)
    else:
        trainer.args.output_dir = str(folder)
        trainer.create_model_card(model_name=name, **details)


# ---- Summary --------------------------------------------------------------------------------------------------------


def summarize(run: Run, config: StoMPPConfig | None, results: Results, argv: list[str]) -> dict[str, Any]:
    """What `summary.json` holds: all that is needed to compare this run with others, and to repeat it."""
    training_args = run.training_args
    sizes = {name: len(dataset) for name, dataset in run.data.splits.items()}
    return plain(
        {
            "task": run.name,
            "method": run.binarization_args.method,
            "seed": training_args.seed,
            "model": run.model_args.model_name_or_path,
            "mode": None if config is None else config.mode,
            "config": None if config is None else config.to_dict(),
            "progression": None if config is None else progression(training_args),
            "examples": sizes,
            "epochs": {
                "float": run.binarization_args.float_num_train_epochs if config else training_args.num_train_epochs,
                "binary": None if config is None else training_args.num_train_epochs,
            },
            "max_steps": training_args.max_steps if training_args.max_steps > 0 else None,
            "learning_rate": {
                "float": run.binarization_args.float_learning_rate if config else training_args.learning_rate,
                "binary": None if config is None else training_args.learning_rate,
            },
            "train_batch_size": training_args.train_batch_size
            * training_args.gradient_accumulation_steps
            * training_args.world_size,
            "steps": results.steps,
            "metrics": results.metrics,
            "packed_weights": results.packed_weights,
            "bytes": results.bytes,
            "seconds": run.seconds,
            "milliseconds_per_batch": {
                "batch_size": training_args.eval_batch_size,
                "median_of_batches": TIMED_BATCHES,
                **results.milliseconds,
            },
            "versions": {
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "hf_stompp": getattr(hf_stompp, "__version__", None),
                "python": platform.python_version(),
            },
            "machine": {
                "platform": platform.platform(),
                "cpu": processor()["name"],
                "threads": torch.get_num_threads(),
                "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            },
            "command": shlex.join(["run_glue.py", *without_token(argv)]),
        }
    )


def without_token(argv: list[str]) -> list[str]:
    """The command line without a Hub token, since the summary may be shared."""
    shown = []
    flags = ("--hub_token", "--hub-token")
    for position, argument in enumerate(argv):
        if argument.split("=")[0] in flags and "=" in argument:
            argument = argument.split("=")[0] + "=..."
        elif position > 0 and argv[position - 1] in flags:
            argument = "..."
        shown.append(argument)
    return shown


def summary_table(summary: dict[str, Any]) -> str:
    """The summary's measurements, one row for each model."""
    rows = {name: dict(measures) for name, measures in summary["metrics"].items() if measures is not None}
    for name, size in summary["bytes"].items():
        rows.setdefault(name, {})["MiB"] = size / 2**20
    for name, row in rows.items():
        if summary["milliseconds_per_batch"].get(name) is not None:
            row["ms/batch"] = summary["milliseconds_per_batch"][name]
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    lines = [["model", *columns]]
    lines.extend([name, *(format_number(row.get(column)) for column in columns)] for name, row in rows.items())
    widths = [max(len(line[column]) for line in lines) for column in range(len(columns) + 1)]
    title = f"{summary['task']}, {summary['method']}, seed {summary['seed']}, {summary['model']}"
    table = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    return "\n".join(["", title, table[0], "-" * len(table[0]), *table[1:], ""])


def format_number(value: float | None) -> str:
    return "-" if value is None or not math.isfinite(value) else f"{value:.4f}"


if __name__ == "__main__":
    main()
