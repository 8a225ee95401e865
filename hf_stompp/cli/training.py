"""`hf-stompp train`: a classifier of texts or of their words, from a float model to the packed one on disk."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    EvalPrediction,
    PreTrainedModel,
    Trainer,
    set_seed,
)

from ..model.modules import config_of, masked_modules
from ..output import write_json
from ..training.arguments import StoMPPTrainingArguments
from ..training.methods import RecipeArguments
from ..training.recipe import Recipe, Results
from ..training.stages import card_details, is_binarized, run_recipe, write_card
from ..training.summary import compared_with_float, summarize
from .errors import CommandError, hub_errors
from .evaluation import CLASSIFIERS, longest, read_tokenizer
from .examples import TOKENS, Examples, read_examples
from .labels import class_names, model_labels, output_names, problem_type_of
from .measures import metrics_of
from .models import first_architecture, megabytes, read_config, state_of
from .options import read_losses
from .progress import stopping_on_interrupt
from .words import token_labels


SUMMARY = "summary.json"

IDENTITY = (
    *("model", "task", "dataset_dir", "train_file", "validation_file", "text_columns", "label_column"),
    *("problem_type", "max_length", "max_train_examples"),
)
"""Arguments that `--resume` must find as they were, beside those of the recipe."""


def compute_metrics(
    prediction: EvalPrediction, problem_type: str, task: str | None = None, names: Sequence[str] = ()
) -> dict[str, float]:
    """What a Trainer measures, see [`metrics_of`]."""
    logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
    return metrics_of(logits, prediction.label_ids, problem_type, task, names)


def load_model(arguments: argparse.Namespace, examples: Examples) -> tuple[Any, bool, bool]:
    """
    The model to train, float or latent: a classifier that knows these classes as it is, any other with a new head.
    Also whether its head was loaded, and whether that knows these classes by name or id.
    """
    config: Any = read_config(arguments.model)
    if state_of(config, arguments.model) == "packed":
        raise CommandError(
            f"{arguments.model} is packed, which cannot be trained: `hf-stompp unpack {arguments.model} OUTPUT` makes "
            "a latent model of it, or name the float model it was made from"
        )
    known = first_architecture(config) in CLASSIFIERS
    wanted = arguments.problem_type
    if known and (found := problem_type_of(config, arguments.model)) != wanted:
        raise CommandError(
            f"the head of {arguments.model} is for {found}, and {wanted} is to be trained: name the encoder that it "
            f"was made from, or give --problem_type {found}"
        )
    # Transformers has no name for it in a config.
    options: dict[str, Any] = {} if wanted == TOKENS else {"problem_type": wanted}
    if known:
        try:
            model_labels(examples, config, wanted)
        except CommandError:
            known = False
    if not known:
        names = output_names(examples, wanted)
        options |= {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    folder = Path(arguments.model).expanduser()
    with hub_errors("model", arguments.model):
        auto: Any = AutoModelForTokenClassification if wanted == TOKENS else AutoModelForSequenceClassification
        model, loading = auto.from_pretrained(
            folder if folder.is_dir() else arguments.model,
            dtype=torch.float32,
            trust_remote_code=False,
            ignore_mismatched_sizes=not known,
            output_loading_info=True,
            **options,
        )
    return model, not (loading["missing_keys"] or loading["mismatched_keys"]), known


def tokenized(examples: Examples, labels: list[Any], tokenizer: Any, length: int, of_words: bool) -> Any:
    """The examples as the Trainer takes them: a data set of token ids and labels."""
    import datasets

    encoded = tokenizer(*examples.texts, truncation=True, max_length=length, is_split_into_words=of_words)
    if of_words:
        labels = [token_labels(encoded.word_ids(row), classes) for row, classes in enumerate(labels)]
    return datasets.Dataset.from_dict({**encoded, "labels": labels})


def trainer_arguments(
    arguments: argparse.Namespace, asked: RecipeArguments, folder: Path, given: Mapping[str, Any], **options: Any
) -> StoMPPTrainingArguments:
    """
    The Trainer's arguments. The method may set those among `options`, which are the command's; what the user gave it
    leaves alone, or refuses.
    """
    given = {name: value for name, value in given.items() if value is not None}
    args = StoMPPTrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=arguments.batch_size,
        per_device_eval_batch_size=arguments.batch_size,
        save_total_limit=1,
        seed=arguments.seed,
        bf16=arguments.bf16,
        use_cpu=arguments.cpu or not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available() and not arguments.cpu,
        disable_tqdm=not sys.stderr.isatty(),
        **options,
        **given,
    )
    asked.complete(args, given)
    return args


def train(arguments: argparse.Namespace) -> dict[str, Any]:
    """What `hf-stompp train` does, and tells. Ctrl-C in training interrupts once a checkpoint has been written."""
    _check_sources(arguments, Path(arguments.output).expanduser())
    if arguments.losses is not None:
        arguments.losses = read_losses(arguments.losses)
    if arguments.problem_type is None:
        arguments.problem_type = "regression" if arguments.task == "stsb" else "single_label_classification"
    training = read_examples(arguments.train_file, arguments, "train", arguments.problem_type)
    validation = read_examples(arguments.validation_file, arguments, problem_type=arguments.problem_type)
    if arguments.max_train_examples is not None:
        training = training.first(arguments.max_train_examples)
    set_seed(arguments.seed)
    model, head_is_trained, knows_classes = load_model(arguments, training)
    if arguments.method is None:
        arguments.method = default_method(model)
    asked = asked_for(arguments)
    _choose_teacher(arguments, asked, knows_classes, head_is_trained and not is_binarized(model))
    with stopping_on_interrupt(arguments.words) as prepare:
        recipe = _recipe(arguments, asked, model, training, validation, prepare)
        results = run_recipe(recipe, model, head_is_trained)
    return _save(arguments, recipe, results, {"train": len(training.labels), "validation": len(validation.labels)})


def _choose_teacher(
    arguments: argparse.Namespace, asked: RecipeArguments, knows_classes: bool, is_trained: bool
) -> None:
    """No teacher where the float model's head may have been trained for other classes."""
    if asked.teacher == "float" and not (knows_classes or arguments.float_epochs):
        asked.teacher = "none"
    has_none = asked.teacher == "none" or (asked.teacher == "float" and not (is_trained or arguments.float_epochs))
    if arguments.losses is not None and has_none:
        raise CommandError(
            "--losses say what is learned from a teacher, and there is none: give --float_epochs or --teacher MODEL, "
            "or drop --losses"
        )


def _recipe(
    arguments: argparse.Namespace,
    asked: RecipeArguments,
    model: PreTrainedModel,
    training: Examples,
    validation: Examples,
    prepare: Callable[[Trainer], None],
) -> Recipe:
    """The run that is asked for, its examples tokenized."""
    with hub_errors("model", arguments.model):
        tokenizer = read_tokenizer(arguments.model)
    length = longest(arguments.max_length, model.config, tokenizer)
    output, problem_type = Path(arguments.output).expanduser(), arguments.problem_type
    of_words = problem_type == TOKENS
    train_set, validation_set = (
        tokenized(examples, model_labels(examples, model.config, problem_type), tokenizer, length, of_words)
        for examples in (training, validation)
    )

    is_float = asked.method == "float"
    given = {
        "num_train_epochs": arguments.epochs,
        "learning_rate": arguments.float_learning_rate if is_float else arguments.learning_rate,
        "distillation_losses": arguments.losses,
    }
    args = trainer_arguments(
        arguments,
        asked,
        output / ("float" if is_float else "binary"),
        given,
        eval_strategy="epoch",
        save_strategy="epoch",
        logging_steps=arguments.logging_steps,
        report_to=arguments.report_to,
        card_speed=arguments.card_speed,
    )
    return Recipe(
        asked,
        args,
        output_dir=output,
        tokenizer=tokenizer,
        train_dataset=train_set,
        eval_datasets={"eval": validation_set},
        data_collator=(DataCollatorForTokenClassification if of_words else DataCollatorWithPadding)(tokenizer),
        compute_metrics=partial(
            compute_metrics, problem_type=problem_type, task=arguments.task, names=class_names(model.config)
        ),
        identity={
            **{name: str(getattr(arguments, name)) for name in IDENTITY},
            "train_examples": training.digest,
            "validation_examples": validation.digest,
        },
        prepare=prepare,
    )


def _save(arguments: argparse.Namespace, recipe: Recipe, results: Results, examples: dict[str, int]) -> dict[str, Any]:
    """Writes the model, or the card beside it, and the summary, which is returned."""
    saved = "model" if recipe.asked.method == "float" else "packed"
    if saved == "model":
        trained: Any = results.model
        trained.save_pretrained(recipe.output_dir / saved)
        recipe.tokenizer.save_pretrained(recipe.output_dir / saved)
    else:
        files = {} if arguments.train_file is None else {"dataset": Path(arguments.train_file).name}
        details = card_details(arguments.model, arguments.task, arguments.problem_type == TOKENS)
        write_card(recipe, results, recipe.output_dir.name, **details, **files)
    summary = summarize(
        recipe,
        results,
        task=arguments.task,
        problem_type=arguments.problem_type,
        model=arguments.model,
        examples=examples,
        output=arguments.output,
        saved=str(Path(arguments.output) / saved),
        command=shlex.join(["hf-stompp", *arguments.words]),
    )
    summary["metrics"] = {name: found for name, found in summary["metrics"].items() if found is not None}
    write_json(recipe.output_dir / SUMMARY, summary)
    return summary


def default_method(model: PreTrainedModel) -> str:
    """
    How a model is trained where no method is asked for: one that is binary already, with a gradient behind its signs,
    stays so from the first step on.
    """
    masked = masked_modules(model).values()
    if masked and all(module.committed for module in masked) and config_of(model).surrogate != "none":
        return "ste"
    return RecipeArguments.method


def asked_for(arguments: argparse.Namespace) -> RecipeArguments:
    """The command's arguments as the recipe's. Refuses what contradicts the method."""
    binary = ("mode", "modes", "word_embeddings", "float_epochs", "teacher", "losses")
    unused = [name for name in binary if getattr(arguments, name) is not None]
    if arguments.method == "float" and unused:
        raise CommandError(f"--method float binarizes nothing: drop --{', --'.join(unused)}, or choose another method")
    names = {
        "mode": arguments.mode,
        "modes": arguments.modes,
        "word_embeddings": arguments.word_embeddings,
        "float_num_train_epochs": arguments.float_epochs,
        "float_learning_rate": None if arguments.method == "float" else arguments.float_learning_rate,
        "teacher": arguments.teacher,
    }
    return RecipeArguments(arguments.method, **{name: value for name, value in names.items() if value is not None})


def _check_sources(arguments: argparse.Namespace, output: Path) -> None:
    files = arguments.train_file, arguments.validation_file
    if arguments.task is None and None in files:
        raise CommandError("there is nothing to train on: name --train_file and --validation_file, or a --task")
    if arguments.task is not None and files != (None, None):
        raise CommandError("--task and files exclude each other: drop one of them")
    check_output(arguments, output)


def check_output(arguments: argparse.Namespace, output: Path) -> None:
    """Checks that OUTPUT is new or, with `--resume`, holds a run."""
    if output.is_file():
        raise CommandError(f"{arguments.output} is a file: name a folder")
    taken = output.is_dir() and any(output.iterdir())
    if taken and not arguments.resume:
        raise CommandError(
            f"{arguments.output} is not empty: go on with the run in it by --resume, or name another folder"
        )
    if arguments.resume and not taken:
        raise CommandError(f"{arguments.output} holds no run to resume: check the folder, or drop --resume")


def run(arguments: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Runs `hf-stompp train`."""
    result = train(arguments)
    parts = _table(result["metrics"], result["bytes"]), compared_with_float(result), f"saved: {result['saved']}"
    return result, "\n".join(filter(None, parts))


def _table(metrics: Mapping[str, Mapping[str, float]], sizes: Mapping[str, int]) -> str:
    columns = [column for column in next(iter(metrics.values())) if column != "eval_loss"]
    heads = [f"{column.removeprefix('eval_'):>8}" for column in columns]
    lines = ["  ".join([" " * 12, *heads])]
    for name, found in metrics.items():
        cells = [f"{found[column]:{len(head)}.4f}" for column, head in zip(columns, heads, strict=True)]
        size = [megabytes(sizes[name])] if name in sizes else []
        lines.append("  ".join([f"{name:12}", *cells, *size]))
    return "\n".join(lines)
