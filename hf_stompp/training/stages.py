"""
The stages of the training recipe: float fine-tuning (or none) -> binarize -> train -> pack -> reload -> measure.

Each is a function of a [`~hf_stompp.training.recipe.Recipe`] and a model, and notes in
[`~hf_stompp.training.recipe.Results`] what it did; [`run_recipe`] does them in order. A run that is started again goes
on where it stopped.
"""

from __future__ import annotations

import copy
import json
import logging
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import create_repo
from torch import nn
from transformers import (
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
)
from transformers.modelcard import TrainingSummary
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
)
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import IntervalStrategy

from ..benchmark import compare_with_float
from ..model.card import model_card
from ..model.conversion import binarize, pack
from ..model.integrity import last_whole_checkpoint
from ..model.modules import config_of, packed_modules
from ..model.quantizer import keep_names
from ..output import bytes_of_weights, write_json
from ..reports.drawing import add_dynamics
from .arguments import StoMPPTrainingArguments
from .recipe import FINISHED, TEACHERS, Recipe, Results, claim_output_dir
from .sampling import SameStepsResumed
from .summary import bytes_when_saved, measure, measures, milliseconds_per_batch, save_metrics
from .trainer import StoMPPTrainer
from .training_set import class_names


logger = logging.getLogger(__name__)


# --- the run ---------------------------------------------------------------------------------------------------------


def run_recipe(recipe: Recipe, model: PreTrainedModel, head_is_trained: bool = True) -> Results:
    """
    Does all stages.

    Args:
        recipe (`Recipe`).
        model (`PreTrainedModel`): float32; a float model, or a latent one, which is trained as it is.
        head_is_trained (`bool`, *optional*, defaults to `True`): whether the model can answer already. A new head is
            not measured, and teaches nothing.

    Returns:
        `Results`.

    Raises:
        ValueError: the folder belongs to another run, the model is packed, or the teacher cannot teach it.
    """
    if packed_modules(model):
        raise ValueError("a packed model cannot be trained: unpack(model), or take the float model it was made from")
    if is_binarized(model):
        recipe.asked.check_latent(config_of(model))
        if recipe.asked.teacher == "float":
            logger.warning(
                "A latent model has no float model beside it: nothing is distilled unless a teacher is named."
            )
    claim_output_dir(recipe)
    # Before anything is trained: a teacher that cannot be loaded should not show after hours of work.
    teacher = load_teacher(recipe.asked.teacher, recipe.tokenizer, auto_class(model))
    results = Results()
    keep_names(model)
    if recipe.asked.method == "float":
        return _run_float(recipe, model, results)
    models: dict[str, PreTrainedModel] = {}
    if not is_binarized(model):
        models["float"], head_is_trained = prepare_float_model(recipe, model, head_is_trained, results)
        if recipe.asked.teacher == "float" and head_is_trained:
            teacher = models["float"]
        with results.timed("binarize"):
            model = binarize(copy.deepcopy(models["float"]), recipe.config)
    results.config = config_of(model)
    results.teacher = None if teacher is None else recipe.asked.teacher
    trainer = train_binary(recipe, model, teacher, results)
    models["packed"] = results.model = pack_and_reload(recipe, trainer, results)
    with results.timed("measure_speed"):
        results.milliseconds = milliseconds_per_batch(make_trainer(recipe, results.model), models)
    return results


def _run_float(recipe: Recipe, model: PreTrainedModel, results: Results) -> Results:
    trainer: Any = fine_tune_float(recipe, model, recipe.args, results)
    with results.timed("evaluate_float"):
        results.metrics["float"] = measure(recipe, trainer, "eval")
    results.milliseconds = milliseconds_per_batch(make_trainer(recipe, trainer.model), {"float": trainer.model})
    results.bytes["float"] = bytes_of_weights(trainer.args.output_dir)
    results.trainer, results.model = trainer, trainer.model
    return results


def evaluate_model(recipe: Recipe, model: PreTrainedModel) -> Results:
    """Measures a model as it is: a float one, or a latent or packed one of an earlier run."""
    kind = "binary" if is_binarized(model) else "float"
    results = Results(model=model, config=config_of(model) if kind == "binary" else None)
    trainer = make_trainer(recipe, model)
    with results.timed(f"evaluate_{kind}"):
        results.metrics[kind] = measure(recipe, trainer, "eval")
    results.milliseconds = milliseconds_per_batch(trainer, {kind: model})
    return results


def is_binarized(model: PreTrainedModel) -> bool:
    """Whether a model is latent or packed."""
    return getattr(model.config, "quantization_config", None) is not None


def auto_class(model: PreTrainedModel) -> Any:
    """The class of Transformers that loads a classifier of the kind of `model`: of words, of images, else of texts."""
    kinds: dict[Any, Any] = {
        AutoModelForTokenClassification: MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
        AutoModelForImageClassification: MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    }
    found = (auto for auto, table in kinds.items() if type(model).__name__ in class_names(table))
    return next(found, AutoModelForSequenceClassification)


# --- the stages ------------------------------------------------------------------------------------------------------


def prepare_float_model(
    recipe: Recipe, model: PreTrainedModel, head_is_trained: bool, results: Results
) -> tuple[PreTrainedModel, bool]:
    """
    The float model that is binarized, fine-tuned first where asked for, and measured if its head is trained.

    A fresh model is loaded from the folder `float` as a finished one is, so that an interrupted run gives the same
    result as one that was not.
    """
    results.steps["float"] = 0
    if recipe.asked.float_num_train_epochs > 0:
        args = float_arguments(recipe)
        fine_tune_float(recipe, model, args, results)
        head_is_trained = True
        model = _load(model, recipe.output_dir / "float")
        results.bytes["float"] = bytes_of_weights(recipe.output_dir / "float")
    else:
        results.bytes["float"] = bytes_when_saved(model, recipe.output_dir)
    results.metrics["float"] = None
    if head_is_trained:
        with results.timed("evaluate_float"):
            results.metrics["float"] = measure(recipe, make_trainer(recipe, model), "eval_float")
    return model, head_is_trained


def _load(like: PreTrainedModel, folder: Path) -> PreTrainedModel:
    model = type(like).from_pretrained(folder, dtype=torch.float32)
    keep_names(model)
    return model


def float_arguments(recipe: Recipe) -> StoMPPTrainingArguments:
    """The arguments of the float fine-tuning that comes before the binary stage."""
    changed = copy.copy(recipe.args)
    changed.output_dir = str(recipe.output_dir / "float")
    changed.num_train_epochs = recipe.asked.float_num_train_epochs
    changed.max_steps = -1
    changed.learning_rate = recipe.asked.float_learning_rate
    changed.resume_from_checkpoint = None
    return changed


def fine_tune_float(
    recipe: Recipe, model: PreTrainedModel, args: StoMPPTrainingArguments, results: Results
) -> Trainer:
    """Fine-tunes the float model into `args.output_dir`, unless an earlier start of this run did."""
    folder = Path(args.output_dir or ".")
    if (folder / FINISHED).is_file():
        logger.info("Taking the float model that an earlier start of this run left in %s.", folder)
        trainer = make_trainer(recipe, _load(model, folder), args, train=True)
        trainer.state = TrainerState.load_from_json(str(folder / TRAINER_STATE_NAME))
        results.seconds["train_float"] = json.loads((folder / FINISHED).read_text(encoding="utf-8"))["seconds"]
    else:
        trainer = make_trainer(recipe, model, args, train=True)
        with results.timed("train_float"):
            train(trainer, folder)
        if trainer.is_world_process_zero():
            write_json(folder / FINISHED, {"seconds": results.seconds["train_float"]})
        trainer.accelerator.wait_for_everyone()
    results.steps["float"] = trainer.state.global_step
    return trainer


def load_teacher(name: str, tokenizer: Any, auto: Any = AutoModelForSequenceClassification) -> PreTrainedModel | None:
    """
    A teacher by its name or folder, loaded by the class `auto` of Transformers; `None` for those of
    [`~hf_stompp.training.recipe.TEACHERS`].

    Raises a ValueError if it is binarized, has no trained head, or comes with another tokenizer than the student's.
    What makes images the student's input is not compared.
    """
    if name in TEACHERS:
        return None
    folder = Path(name)
    # Of a folder without one Transformers would make one that knows no words. The size of the vocabulary is checked in
    # any case.
    has_tokenizer = not folder.is_dir() or any(folder.glob("tokenizer*")) or any(folder.glob("vocab.*"))
    reads_text = isinstance(tokenizer, PreTrainedTokenizerBase)

    def load(auto: Any, **options: Any) -> Any:
        try:
            return auto.from_pretrained(name, trust_remote_code=False, **options)
        except ValueError as error:
            if "trust_remote_code" not in str(error):
                raise
            raise ValueError(
                f"the teacher {name} comes with code of its own, which is not run. Name one whose class is in "
                "Transformers."
            ) from error

    if has_tokenizer and reads_text and load(AutoTokenizer).get_vocab() != tokenizer.get_vocab():
        raise ValueError(
            f"the teacher {name} has another tokenizer than the student, and would read other words in the same token "
            "ids. Name a teacher with the student's."
        )
    teacher, loading = load(auto, dtype=torch.float32, output_loading_info=True)
    if loading["missing_keys"]:
        raise ValueError(
            f"the teacher {name} lacks {sorted(loading['missing_keys'])[0]}: it has no trained head, or is another "
            "kind of model. Name a float model that was fine-tuned on this task."
        )
    if is_binarized(teacher):
        raise ValueError(f"the teacher {name} is binarized. Name the float model that it was made from.")
    return teacher


def train_binary(
    recipe: Recipe, model: PreTrainedModel, teacher: PreTrainedModel | None, results: Results
) -> StoMPPTrainer:
    """Trains a latent model until it is binary, and measures what it ends with."""
    if not recipe.asked.train_word_embeddings:
        model.get_input_embeddings().requires_grad_(False)
    for module in model.modules():
        if isinstance(module, nn.Dropout) and recipe.asked.dropout is not None:
            module.p = recipe.asked.dropout
    trainer: Any = make_trainer(recipe, model, recipe.args, train=True, teacher=teacher)
    with results.timed("train_binary"):
        train(trainer, recipe.output_dir)
    results.steps["binary"], results.trainer = trainer.state.global_step, trainer
    with results.timed("evaluate_binary"):
        kept = measure(recipe, trainer, "eval")
    if trainer.args.load_best_model_at_end and trainer.state.best_model_checkpoint is not None:
        results.packed_weights = "best"
        results.metrics.update(binary_final=_last_measures(trainer), binary_best=kept)
    else:
        results.packed_weights = "final"
        results.metrics.update(binary_final=kept, binary_best=None)
    results.bytes["latent"] = bytes_of_weights(trainer.args.output_dir)
    return trainer


def _last_measures(trainer: Trainer) -> dict[str, float] | None:
    """Measures of the weights of the last step: the best ones have replaced them."""
    for entry in reversed(trainer.state.log_history):
        if "eval_loss" in entry and entry["step"] == trainer.state.global_step:
            return measures(entry)
    return None


def pack_and_reload(
    recipe: Recipe, trainer: StoMPPTrainer, results: Results, teacher: PreTrainedModel | None = None
) -> PreTrainedModel:
    """
    Packs into the folder `packed` of the run, and loads and measures the packed model as a user would; without labels,
    against a teacher.
    """
    folder = recipe.output_dir / "packed"
    with results.timed("pack"):
        if trainer.is_world_process_zero():
            pack(trainer.model).save_pretrained(folder)
            recipe.tokenizer.save_pretrained(folder)
        trainer.accelerator.wait_for_everyone()
    results.bytes["packed"] = bytes_of_weights(folder)
    with results.timed("load_packed"):
        packed = type(trainer.model).from_pretrained(folder)
    with results.timed("evaluate_packed"):
        results.metrics["packed"] = measure(recipe, make_trainer(recipe, packed, teacher=teacher), "eval_packed")
    return packed


def card_details(model: str, task: str | None = None, of_words: bool = False) -> dict[str, Any]:
    """
    What a card says of a classifier and its data, as [`~transformers.modelcard.TrainingSummary`] takes it. `model` is
    what it was made from, `task` one of GLUE; with `of_words` it classifies words, and not texts.
    """
    details = {"finetuned_from": model, "tasks": "token-classification" if of_words else "text-classification"}
    if task is not None:
        details |= {"language": "en", "dataset_tags": "glue", "dataset_args": task, "dataset": f"GLUE {task.upper()}"}
    return details


def create_hub_repository(args: StoMPPTrainingArguments) -> None:
    """
    Creates the repository that a run is to be pushed to, and notes its full name in `args`: before anything is
    trained, since a missing permission should not show after hours of work.
    """
    repository = create_repo(
        args.hub_model_id or Path(args.output_dir or ".").name,
        token=args.hub_token,
        private=args.hub_private_repo,
        exist_ok=True,
    )
    args.hub_model_id = repository.repo_id


def share(recipe: Recipe, results: Results, **details: Any) -> None:
    """
    Writes the model card beside the model that a run of [`run_recipe`] ends with, and uploads that folder where
    `push_to_hub` asks for it. The details are what [`~transformers.modelcard.TrainingSummary`] takes.
    """
    trainer: Any = results.trainer
    name = (recipe.args.hub_model_id or recipe.output_dir.name).split("/")[-1]
    if recipe.args.push_to_hub:
        # Created at the start of the run, with the name that the Hub gave it.
        trainer.hub_model_id = recipe.args.hub_model_id
        # A StoMPPTrainer pushes its packed model, from the folder `packed` of the run's.
        trainer.push_to_hub(model_name=name, token=recipe.args.hub_token, **details)
    elif recipe.asked.method == "float":
        trainer.create_model_card(model_name=name, **details)
    else:
        write_card(recipe, results, name, **details)


def write_card(recipe: Recipe, results: Results, name: str, **details: Any) -> None:
    """
    Writes the model card beside the packed model of a run, with `name` as its title. The details are what
    [`~transformers.modelcard.TrainingSummary`] takes: `tasks`, `dataset`, ...
    """
    folder, trainer = recipe.output_dir / "packed", results.trainer
    assert isinstance(trainer, StoMPPTrainer) and results.model is not None
    if not trainer.is_world_process_zero():
        return
    model_card(
        results.model,
        name,
        str(folder),
        summary=TrainingSummary.from_trainer(trainer, model_name=name, **details),
        evaluation=results.metrics["packed"],
        float_evaluation=results.metrics.get("float"),
        progression=trainer.progression_settings(),
        speed=compare_with_float(results.model) if trainer.args.card_speed else (),
    ).save(folder / "README.md")
    add_dynamics(folder / "README.md", trainer.state)


# --- training and measuring ------------------------------------------------------------------------------------------


class FloatTrainer(SameStepsResumed, Trainer):
    """Of the float stage."""


class EvaluateLastStep(TrainerCallback):
    """Evaluates after the last step: once the best checkpoint is loaded, the final weights can no longer be."""

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps:
            control.should_evaluate = True


def make_trainer(
    recipe: Recipe,
    model: PreTrainedModel,
    args: StoMPPTrainingArguments | None = None,
    train: bool = False,
    teacher: PreTrainedModel | None = None,
) -> Trainer:
    """
    A Trainer of a float, latent or packed model, which without `train` only evaluates and predicts. The arguments are
    those of the recipe when not given; a latent model distils from the teacher.
    """
    args = copy.copy(args or recipe.args)
    # Only the result is shared, at the end; and a Trainer writes its arguments to a file, the token among them.
    args.push_to_hub, args.hub_token = False, None
    if not train:
        args.load_best_model_at_end, args.eval_strategy = False, IntervalStrategy.NO
    options: dict[str, Any] = {} if teacher is None else {"teacher": teacher}
    trainer = (StoMPPTrainer if is_binarized(model) else FloatTrainer)(
        model=model,
        args=args,
        train_dataset=recipe.train_dataset if train else None,
        eval_dataset=next(iter(recipe.eval_datasets.values()), None),
        data_collator=recipe.data_collator,
        processing_class=recipe.tokenizer,
        compute_metrics=recipe.compute_metrics,
        callbacks=[EvaluateLastStep()] if args.load_best_model_at_end else None,
        **options,
    )
    # The classifiers of Transformers accept the argument that the Trainer corrects the loss by, and ignore it; the
    # loss would be too large by the number of accumulation steps.
    trainer.model_accepts_loss_kwargs = False
    recipe.prepare(trainer)
    return trainer


def train(trainer: Trainer, folder: Path) -> None:
    """Trains, from the last checkpoint on where there is one, and saves the model. The log goes to `folder`."""
    checkpoint = trainer.args.resume_from_checkpoint
    output_dir = Path(trainer.args.output_dir or ".")
    if checkpoint is None and output_dir.is_dir():
        checkpoint = last_whole_checkpoint(output_dir, trainer.args.world_size, trainer.accelerator.scaler is not None)
        if checkpoint is not None:
            logger.info("Resuming from %s. To start over, delete %s.", checkpoint, output_dir)
    result = trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()
    dataset: Any = trainer.train_dataset
    save_metrics(trainer, "train", {**result.metrics, "train_samples": len(dataset)})
    if trainer.args.should_save:
        trainer.state.save_to_json(str(folder / TRAINER_STATE_NAME))
