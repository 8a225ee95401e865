"""`hf-stompp train`: a text classifier, from a float model to the packed one on disk."""

from __future__ import annotations

import argparse
import json
import shlex
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from transformers import (
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    EvalPrediction,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.modelcard import TrainingSummary
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import get_last_checkpoint

from ..benchmark import compare_with_float
from ..binarization import binarize
from ..config import StoMPPConfig
from ..hub import add_dynamics, model_card
from ..packing import pack
from ..patching import report
from ..trainer import StoMPPTrainer, UnitProgressCallback
from ..training_args import StoMPPTrainingArguments
from .errors import CommandError, hub_errors
from .evaluation import read_tokenizer
from .examples import Examples, class_ids, read_examples
from .models import megabytes, read_config, state_of


METHODS = {
    "ste": ("ste", "immediate"),
    "stompp": ("none", "cubic"),
    "stompp_ste": ("ste", "cubic"),
}
"""Surrogate gradient and schedule of each method."""

SUMMARY = "summary.json"


class Interrupted(Exception):
    """Ctrl-C came; what was trained is in a checkpoint."""


class StopAfterStep(TrainerCallback):
    """Ends training after the step in which `stop` was set, with a checkpoint."""

    def __init__(self) -> None:
        self.stop = False

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.stop and state.global_step < state.max_steps:
            control.should_training_stop = control.should_save = True

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # Of an epoch that has not ended: an evaluation that the uninterrupted run does not make draws random numbers.
        epoch = state.epoch or 0.0
        if self.stop and abs(epoch - round(epoch)) > 1e-6:
            control.should_evaluate = control.should_save = False


class QuietProgress(UnitProgressCallback):
    """The progress bar without a line for every log: stdout is the command's."""

    def on_log(self, *args: Any, **kwargs: Any) -> None:
        pass


@contextmanager
def stopping_on_interrupt(callback: StopAfterStep) -> Iterator[None]:
    """Within the block the first Ctrl-C lets the step end and a checkpoint be written; the second interrupts."""

    def stop(number: int, frame: FrameType | None) -> None:
        if callback.stop:
            raise KeyboardInterrupt
        callback.stop = True
        print("\nhf-stompp: writing a checkpoint after this step (Ctrl-C again: stop at once)", file=sys.stderr)

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Share of right answers."""
    logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
    return {"accuracy": float((logits.argmax(-1) == prediction.label_ids).mean())}


def class_names(examples: Examples) -> list[str]:
    """
    Names of the classes that labels are of.

    Raises:
        CommandError: labels are numbers that are no classes.
    """
    if examples.names is not None:
        return examples.names
    if any(isinstance(label, float) or label is None for label in examples.labels):
        raise CommandError(
            f"{examples.source} has labels that are no classes, such as "
            f"{next(label for label in examples.labels if isinstance(label, float) or label is None)!r}: give every "
            "row one; numbers to predict (a regression) are trained on by examples/glue/run_glue.py"
        )
    if all(isinstance(label, int) for label in examples.labels):
        return [f"LABEL_{index}" for index in range(max(examples.labels) + 1)]
    return sorted({str(label) for label in examples.labels})


def load_model(arguments: argparse.Namespace, examples: Examples) -> Any:
    """
    The model to train: a classifier that knows these classes as it is, any other with a new head.

    Raises:
        CommandError: it cannot be trained.
    """
    config: Any = read_config(arguments.model)
    state = state_of(config, arguments.model)
    if state == "packed":
        raise CommandError(
            f"{arguments.model} is packed, which cannot be trained: `hf-stompp unpack {arguments.model} OUTPUT` makes "
            "a latent model of it, or name the float model it was made from"
        )
    if state == "latent" and (arguments.mode or arguments.float_epochs or arguments.method == "float"):
        raise CommandError(
            f"{arguments.model} is binary already (latent): drop --mode, --float_epochs and --method float, or name a "
            "float model"
        )
    known = (config.architectures or [None])[0] in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.values()
    options: dict[str, Any] = {}
    if known:
        try:
            class_ids(examples, config)
        except CommandError:
            known = False
    if not known:
        if state == "latent":
            raise CommandError(
                f"{arguments.model} does not know the classes of {examples.source}: name a float model instead"
            )
        names = class_names(examples)
        options = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    folder = Path(arguments.model).expanduser()
    with hub_errors("model", arguments.model):
        return AutoModelForSequenceClassification.from_pretrained(
            folder if folder.is_dir() else arguments.model,
            dtype=torch.float32,
            ignore_mismatched_sizes=not known,
            **options,
        )


def tokenized(examples: Examples, labels: list[int], tokenizer: Any, length: int) -> Any:
    """The examples as the Trainer takes them: a data set of token ids and labels."""
    import datasets

    encoded = tokenizer(*examples.texts, truncation=True, max_length=length)
    return datasets.Dataset.from_dict({**encoded, "labels": labels})


def training_arguments(
    kind: type[TrainingArguments], arguments: argparse.Namespace, folder: Path, **options: Any
) -> Any:
    """The Trainer's arguments of a stage, which keeps its checkpoints in `folder`."""
    return kind(
        output_dir=str(folder),
        per_device_train_batch_size=arguments.batch_size,
        per_device_eval_batch_size=arguments.batch_size,
        warmup_steps=0.1,
        eval_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=1,
        logging_steps=arguments.logging_steps,
        seed=arguments.seed,
        bf16=arguments.bf16,
        use_cpu=arguments.cpu or not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available() and not arguments.cpu,
        report_to=arguments.report_to,
        disable_tqdm=not sys.stderr.isatty(),
        **options,
    )


def train_stage(trainer: Trainer, arguments: argparse.Namespace) -> None:
    """
    Trains, from the stage's last checkpoint on if `--resume` asks for it.

    Raises:
        Interrupted: Ctrl-C came.
    """
    callback = StopAfterStep()
    trainer.add_callback(callback)
    # Logs go to trainer_state.json and the trackers.
    trainer.remove_callback(PrinterCallback)
    if isinstance(trainer, StoMPPTrainer) and trainer.pop_callback(UnitProgressCallback) is not None:
        trainer.add_callback(QuietProgress(trainer))
    else:
        trainer.remove_callback(ProgressCallback)
    folder = str(trainer.args.output_dir)
    checkpoint = get_last_checkpoint(folder) if arguments.resume and Path(folder).is_dir() else None
    with stopping_on_interrupt(callback):
        trainer.train(resume_from_checkpoint=checkpoint)
    if trainer.state.global_step < trainer.state.max_steps:
        raise Interrupted


def train_float(arguments: argparse.Namespace, model: Any, folder: Path, epochs: float, data: dict[str, Any]) -> Any:
    """Fine-tunes the float model, or takes the one that an earlier start of this run left."""
    done = folder / "model"
    if arguments.resume and (done / "config.json").is_file():
        return AutoModelForSequenceClassification.from_pretrained(done, dtype=torch.float32)
    args = training_arguments(
        TrainingArguments, arguments, folder, num_train_epochs=epochs, learning_rate=arguments.float_learning_rate
    )
    train_stage(Trainer(model=model, args=args, **data), arguments)
    model.save_pretrained(done)
    return model


def measured(model: Any, arguments: argparse.Namespace, output: Path, data: dict[str, Any]) -> dict[str, float]:
    """Loss and accuracy on the validation set."""
    args = training_arguments(StoMPPTrainingArguments, arguments, output)
    kind = StoMPPTrainer if getattr(model.config, "quantization_config", None) is not None else Trainer
    trainer = kind(model=model, args=args, **data)
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(UnitProgressCallback)
    metrics = trainer.evaluate()
    return {name: metrics[name] for name in ("eval_loss", "eval_accuracy")}


def train(arguments: argparse.Namespace) -> dict[str, Any]:
    """
    What `hf-stompp train` does, and tells.

    Raises:
        CommandError: the model or the examples cannot be used, or OUTPUT is taken.
        Interrupted: Ctrl-C came; a checkpoint has been written.
    """
    output = Path(arguments.output).expanduser()
    _check_sources(arguments, output)
    training = read_examples(arguments.train_file, arguments, "train")
    validation = read_examples(arguments.validation_file, arguments)
    if arguments.max_train_examples is not None:
        training = training.first(arguments.max_train_examples)
    set_seed(arguments.seed)
    model = load_model(arguments, training)
    with hub_errors("model", arguments.model):
        tokenizer = read_tokenizer(arguments.model)
    limit = getattr(model.config, "max_position_embeddings", arguments.max_length)
    length = min(arguments.max_length, tokenizer.model_max_length, limit)
    data: dict[str, Any] = {
        "train_dataset": tokenized(training, class_ids(training, model.config), tokenizer, length),
        "eval_dataset": tokenized(validation, class_ids(validation, model.config), tokenizer, length),
        "data_collator": DataCollatorWithPadding(tokenizer),
        "compute_metrics": accuracy,
        "processing_class": tokenizer,
    }
    output.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {
        "model": arguments.model,
        "output": arguments.output,
        "method": arguments.method,
        "examples": {"train": len(training.labels), "validation": len(validation.labels)},
        "metrics": {},
        "bytes": {},
    }
    is_float = getattr(model.config, "quantization_config", None) is None
    epochs = arguments.epochs if arguments.method == "float" else arguments.float_epochs
    if is_float and epochs:
        model = train_float(arguments, model, output / "float", epochs, data)
    if is_float:
        result["metrics"]["float"] = measured(model, arguments, output, data)
    if arguments.method == "float":
        model.save_pretrained(output / "model")
        tokenizer.save_pretrained(output / "model")
        result["saved"] = str(Path(arguments.output) / "model")
        return result
    surrogate, schedule = METHODS[arguments.method]
    if is_float:
        options = {"mode": arguments.mode} if arguments.mode else {}
        model = binarize(model, StoMPPConfig(surrogate=surrogate, **options))
    args = training_arguments(
        StoMPPTrainingArguments,
        arguments,
        output / "binary",
        num_train_epochs=arguments.epochs,
        learning_rate=arguments.learning_rate,
        progression_schedule=schedule,
    )
    trainer = StoMPPTrainer(model=model, args=args, **data)
    train_stage(trainer, arguments)
    # Where `hf-stompp plot OUTPUT` looks.
    trainer.state.save_to_json(str(output / TRAINER_STATE_NAME))
    result["metrics"]["binary_final"] = measured(model, arguments, output, data)
    folder = output / "packed"
    packed = pack(model)
    packed.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    reloaded = type(packed).from_pretrained(folder)
    result["metrics"]["packed"] = measured(reloaded, arguments, output, data)
    model_card(
        reloaded,
        output.name,
        arguments.output,
        summary=TrainingSummary.from_trainer(trainer),
        evaluation=result["metrics"]["packed"],
        progression=trainer.progression_settings(),
        speed=compare_with_float(reloaded),
    ).save(folder / "README.md")
    add_dynamics(folder / "README.md", trainer.state)
    sizes = report(packed, packed.config.quantization_config).total
    result["bytes"] = {"float": sizes.bytes_before, "packed": sizes.bytes_packed}
    result["saved"] = str(Path(arguments.output) / "packed")
    return result


def _check_sources(arguments: argparse.Namespace, output: Path) -> None:
    files = arguments.train_file, arguments.validation_file
    if arguments.task is None and None in files:
        raise CommandError("there is nothing to train on: name --train_file and --validation_file, or a --task")
    if arguments.task is not None and files != (None, None):
        raise CommandError("--task and files exclude each other: drop one of them")
    if output.is_file():
        raise CommandError(f"{arguments.output} is a file: name a folder")
    taken = output.is_dir() and any(output.iterdir())
    if taken and not arguments.resume:
        raise CommandError(
            f"{arguments.output} is not empty: go on with the run in it by --resume, or name another folder"
        )
    if arguments.resume and not taken:
        raise CommandError(f"{arguments.output} holds no run to resume: check the folder, or drop --resume")


def _resuming(words: list[str]) -> str:
    return shlex.join(["hf-stompp", *(word for word in words if word != "--resume"), "--resume"])


def run(arguments: argparse.Namespace) -> None:
    """Runs `hf-stompp train`."""
    try:
        result = train(arguments)
    except Interrupted as error:
        print(f"hf-stompp: stopped; go on with\n  {_resuming(arguments.words)}", file=sys.stderr)
        raise KeyboardInterrupt from error
    result["command"] = shlex.join(["hf-stompp", *arguments.words])
    summary = Path(arguments.output).expanduser() / SUMMARY
    summary.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    if arguments.json:
        print(json.dumps(result, indent=2))
        return
    print(_table(result["metrics"], result["bytes"]))
    print(f"saved: {result['saved']}")


def _table(metrics: Mapping[str, Mapping[str, float]], sizes: Mapping[str, int]) -> str:
    lines = [f"{'':12}  accuracy"]
    for name, found in metrics.items():
        size = f"  {megabytes(sizes[name])}" if name in sizes else ""
        lines.append(f"{name:12}  {found['eval_accuracy']:8.4f}{size}")
    return "\n".join(lines)
