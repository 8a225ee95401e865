"""
Fine-tunes a 1-bit BERT (or its float and straight-through baselines) on a GLUE task or on files of one's own.

The stages are those of the library's recipe (`hf_stompp.training.stages`): fine-tune the float model (or take one that
is), binarize it while it trains on, pack it, load the packed model back, and measure all of them. This script reads
the arguments and the data, tokenizes, and says how a task is measured. `README.md` beside it has the commands.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import shlex
import sys
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import transformers
from glue_data import DataTrainingArguments, GlueData, check_unlabelled, read_data
from glue_metric import GlueMetric
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    EvalPrediction,
    HfArgumentParser,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    default_data_collator,
    set_seed,
)

from hf_stompp import StoMPPTrainingArguments
from hf_stompp.model.modules import packed_modules
from hf_stompp.output import write_json
from hf_stompp.training.methods import RecipeArguments, given_in, option
from hf_stompp.training.recipe import TEACHERS, Recipe, Results
from hf_stompp.training.stages import (
    card_details,
    create_hub_repository,
    evaluate_model,
    is_binarized,
    make_trainer,
    run_recipe,
    share,
)
from hf_stompp.training.summary import compared_with_float, summarize, summary_table


logger = logging.getLogger(__name__)

EVALUATION_SETS = {"eval": "validation", "eval_mm": "validation_mismatched"}
"""Prefix of the measures of each set that is evaluated on."""


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
    tokenizer_name: str | None = option("A tokenizer on the Hub or in a folder, where it is not the model's.")
    cache_dir: str | None = option("Where downloads are kept.")
    model_revision: str = option("Branch, tag or commit of the model on the Hub.", "main")
    trust_remote_code: bool = option("Run model code that the model's repository brings along.", False)
    ignore_mismatched_sizes: bool = option("Replace a classifier head of another size by a new one.", False)

    def downloads(self) -> dict[str, Any]:
        """Options of `from_pretrained`."""
        return {
            "cache_dir": self.cache_dir,
            "revision": self.model_revision,
            "trust_remote_code": self.trust_remote_code,
        }


def parse_arguments(
    argv: list[str],
) -> tuple[ModelArguments, DataTrainingArguments, RecipeArguments, StoMPPTrainingArguments]:
    """
    Reads the command line, or the JSON file that is its only argument. Raises a ValueError for unknown keys, values
    out of range, and arguments that contradict the method.
    """
    # Abbreviated names would hide from the check below which arguments were given.
    parser = HfArgumentParser(
        (ModelArguments, DataTrainingArguments, RecipeArguments, StoMPPTrainingArguments), allow_abbrev=False
    )
    if len(argv) == 1 and argv[0].endswith(".json"):
        if not os.path.isfile(argv[0]):
            raise FileNotFoundError(f"There is no argument file {argv[0]}. Give the path of a JSON file of arguments.")
        values = json.loads(Path(argv[0]).read_text(encoding="utf-8"))
        if not values.get("model_name_or_path"):
            raise ValueError(f"{argv[0]} names no model. Add `model_name_or_path`.")
        given, parsed = set(values), parser.parse_dict(values)
    else:
        given, parsed = given_in(argv), parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
    model_args, data_args, recipe_args, training_args = parsed
    recipe_args.complete(training_args, given)
    check_stages(data_args, training_args)
    check_unlabelled(data_args, recipe_args, training_args)
    return model_args, data_args, recipe_args, training_args


def check_stages(data_args: DataTrainingArguments, training_args: StoMPPTrainingArguments) -> None:
    """Refuses a run that does nothing, and one whose own files do not cover what it should do."""
    stages = {"do_train": "train_file", "do_eval": "validation_file", "do_predict": "test_file"}
    wanted = [flag for flag in stages if getattr(training_args, flag)]
    if not wanted:
        raise ValueError("There is nothing to do. Give --do_train, --do_eval or --do_predict.")
    for flag in wanted:
        if data_args.task_name is None and not getattr(data_args, stages[flag]):
            raise ValueError(f"--{flag} needs --{stages[flag]} (or --task_name). Give the file, or drop --{flag}.")


# ---- The run --------------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Runs the script with the words of a command line, and returns what `summary.json` holds."""
    start = time.perf_counter()
    argv = sys.argv[1:] if argv is None else list(argv)
    model_args, data_args, recipe_args, training_args = parse_arguments(argv)
    set_up_logging(training_args)
    if training_args.push_to_hub and training_args.do_train:
        create_hub_repository(training_args)
    set_seed(training_args.seed)

    tokenizer = AutoTokenizer.from_pretrained(
        model_args.tokenizer_name or model_args.model_name_or_path, **model_args.downloads()
    )
    model_config = AutoConfig.from_pretrained(model_args.model_name_or_path, **model_args.downloads())
    stages = {"train": training_args.do_train, "validation": training_args.do_eval, "test": training_args.do_predict}
    data = read_data(data_args, stages, None if training_args.do_train else model_config, model_args.cache_dir)
    order = class_order(data, model_config)
    tokenize(data, order, tokenizer, data_args, training_args)
    model, head_is_new = load_model(data, order, model_args)
    recipe = Recipe(
        recipe_args,
        training_args,
        output_dir=Path(training_args.output_dir),
        tokenizer=tokenizer,
        train_dataset=data.training_set(),
        eval_datasets={prefix: data.splits[name] for prefix, name in EVALUATION_SETS.items() if name in data.splits},
        data_collator=collator(tokenizer, data_args, training_args),
        # Data of one's own is measured like the GLUE task of its kind.
        compute_metrics=partial(
            compute_metrics, data_args.task_name or ("stsb" if data.is_regression else "sst2"), order
        ),
        identity=identity(model_args, data_args, data),
    )
    check_model(recipe, model, head_is_new, model_args, data)
    results = run_recipe(recipe, model, not head_is_new) if training_args.do_train else evaluate_model(recipe, model)
    if training_args.do_predict:
        with results.timed("predict"):
            predict(recipe, results, data, order, data_args.name)

    results.seconds["total"] = round(time.perf_counter() - start, 3)
    summary = summarize(
        recipe,
        results,
        task=data_args.name,
        model=model_args.model_name_or_path,
        examples={name: len(dataset) for name, dataset in data.splits.items()},
        command=shlex.join(["run_glue.py", *argv]),
    )
    if training_args.should_save:
        write_json(recipe.output_dir / "summary.json", summary)
        print(summary_table(summary) + compared_with_float(summary))
    # Last: whatever the Hub answers, the results are written.
    if training_args.do_train:
        share(recipe, results, **card_details(model_args.model_name_or_path, data_args.task_name))
    return summary


def set_up_logging(training_args: StoMPPTrainingArguments) -> None:
    """Logs at the level of the training arguments, in this script and in the libraries it calls."""
    logging.basicConfig(format="%(asctime)s - %(levelname)s - %(name)s - %(message)s", stream=sys.stdout)
    level = training_args.get_process_log_level()
    for name in (__name__, "glue_data", "hf_stompp"):
        logging.getLogger(name).setLevel(level)
    datasets.utils.logging.set_verbosity(level)
    transformers.utils.logging.set_verbosity(level)
    logger.info("Training arguments: %s", training_args)


def identity(model_args: ModelArguments, data_args: DataTrainingArguments, data: GlueData) -> dict[str, Any]:
    """What a run which is started again must share with its first start, beside the arguments of the library."""
    free = ("overwrite_cache", "max_eval_samples", "max_predict_samples", "test_file")
    names = [item.name for item in dataclasses.fields(data_args) if item.name not in free]
    return {
        **{name: getattr(model_args, name) for name in ("model_name_or_path", "model_revision")},
        **{name: getattr(data_args, name) for name in names},
        # Such a file is made anew more easily than a data set.
        **({"unlabelled_examples": len(data.splits["unlabelled"])} if "unlabelled" in data.splits else {}),
    }


# ---- Data -----------------------------------------------------------------------------------------------------------


def class_order(data: GlueData, model_config: PreTrainedConfig) -> list[int]:
    """The model's id of each class of the data: another one where it was fine-tuned with the classes otherwise."""
    names = data.label_names or []
    known = {str(name).lower(): index for index, name in model_config.id2label.items()}
    if set(known) != {name.lower() for name in names}:
        return list(range(len(names)))
    return [known[name.lower()] for name in names]


def tokenize(
    data: GlueData,
    order: list[int],
    tokenizer: PreTrainedTokenizerBase,
    data_args: DataTrainingArguments,
    training_args: StoMPPTrainingArguments,
) -> None:
    """Replaces the splits by tokenized ones whose labels are the model's class ids."""
    max_length = min(data_args.max_seq_length, tokenizer.model_max_length)
    if max_length < data_args.max_seq_length:
        logger.warning(
            "--max_seq_length %d is more than the tokenizer's %d, which is used.", data_args.max_seq_length, max_length
        )
    columns, padding = data.text_columns, "max_length" if data_args.pad_to_max_length else False

    def tokenize_batch(batch: dict[str, list]) -> dict[str, list]:
        texts = [["" if text is None else text for text in batch[column]] for column in columns]
        result = dict(tokenizer(*texts, padding=padding, max_length=max_length, truncation=True))
        if "label" in batch:
            result["label"] = [order[label] for label in batch["label"]] if order else batch["label"]
        return result

    for name, dataset in data.splits.items():
        with training_args.main_process_first(desc=f"tokenize {name}"):
            data.splits[name] = dataset.map(
                tokenize_batch,
                batched=True,
                # Columns of the source may have a name that the model's forward method takes for something else.
                remove_columns=[column for column in dataset.column_names if column != "label"],
                load_from_cache_file=not data_args.overwrite_cache,
                desc=f"Tokenize {name}",
            )


def collator(
    tokenizer: PreTrainedTokenizerBase, data_args: DataTrainingArguments, training_args: StoMPPTrainingArguments
) -> Any:
    if data_args.pad_to_max_length:
        return default_data_collator
    half = training_args.fp16 or training_args.bf16
    return DataCollatorWithPadding(tokenizer, pad_to_multiple_of=8 if half else None)


# ---- Model ----------------------------------------------------------------------------------------------------------


def load_model(data: GlueData, order: list[int], model_args: ModelArguments) -> tuple[PreTrainedModel, bool]:
    """The model to be fine-tuned or evaluated, and whether any of its weights are new: a head to be trained."""
    options = model_args.downloads()
    if data.label_names is not None:
        options["id2label"] = dict(sorted(zip(order, data.label_names, strict=True)))
        options["label2id"] = dict(zip(data.label_names, order, strict=True))
    model, loading = AutoModelForSequenceClassification.from_pretrained(
        model_args.model_name_or_path,
        num_labels=data.num_labels,
        problem_type="regression" if data.is_regression else "single_label_classification",
        ignore_mismatched_sizes=model_args.ignore_mismatched_sizes,
        # The default keeps the type of the file, and half precision weights cannot be trained by plain AdamW.
        dtype=torch.float32,
        output_loading_info=True,
        **options,
    )
    return model, bool(loading["missing_keys"] or loading["mismatched_keys"])


def check_model(
    recipe: Recipe, model: PreTrainedModel, head_is_new: bool, model_args: ModelArguments, data: GlueData
) -> None:
    """Refuses to train a packed model or without a teacher that is needed, and to evaluate a float one as binary."""
    name = model_args.model_name_or_path
    if recipe.args.do_train and packed_modules(model):
        raise ValueError(
            f"{name} is packed, and cannot be trained. Give the float model to --model_name_or_path, or a latent one; "
            "to go on with an interrupted run, repeat its command with the same --output_dir. Without --do_train a "
            "packed model is evaluated."
        )
    if not recipe.args.do_train and not is_binarized(model) and recipe.asked.method != "float":
        raise ValueError(
            f"{name} is a float model and --method {recipe.asked.method} makes a binary one only while training. Add "
            "--do_train, evaluate the float model by --method float, or give the folder of a packed model."
        )
    teaches = recipe.asked.teacher == "float" and not (head_is_new or is_binarized(model))
    if "unlabelled" in data.splits and recipe.asked.teacher in TEACHERS and not teaches:
        raise ValueError(
            "--unlabelled_file needs a teacher that knows the task. Start from a float model that was fine-tuned on "
            "it, or name one by --teacher."
        )
    if not recipe.args.do_train and head_is_new:
        logger.warning("%s has no trained head for this task; what follows is chance.", name)


# ---- Measures and predictions ---------------------------------------------------------------------------------------


def compute_metrics(task: str, order: list[int], prediction: EvalPrediction) -> dict[str, float]:
    """The measures of the task, and their mean as `combined_score` where there are several."""
    references = prediction.label_ids if not order else np.argsort(order)[prediction.label_ids]
    predicted = predicted_values(prediction.predictions, order)
    result = GlueMetric(task, keep_in_memory=True).compute(predictions=predicted, references=references)
    if len(result) > 1:
        result["combined_score"] = float(np.mean(list(result.values())))
    return result


def predicted_values(predictions: Any, order: list[int]) -> np.ndarray:
    """Scores, or class ids in the order of the data, of shape `(examples,)` from logits `(examples, num_labels)`."""
    logits = predictions[0] if isinstance(predictions, tuple) else predictions
    return np.argsort(order)[logits.argmax(axis=-1)] if order else logits.reshape(-1)


def predict(recipe: Recipe, results: Results, data: GlueData, order: list[int], name: str) -> None:
    """Writes the predictions for the test sets to `predict_results_<task>.txt`."""
    trainer = make_trainer(recipe, results.model)
    for split, suffix in (("test", ""), ("test_mismatched", "-mm")):
        if split not in data.splits:
            continue
        values = predicted_values(trainer.predict(data.splits[split], metric_key_prefix="predict").predictions, order)
        names = data.label_names
        lines = [f"{value:.3f}" if names is None else names[value] for value in values]
        if trainer.is_world_process_zero():
            rows = "".join(f"{index}\t{line}\n" for index, line in enumerate(lines))
            file = recipe.output_dir / f"predict_results_{name}{suffix}.txt"
            file.write_text(f"index\tprediction\n{rows}", encoding="utf-8")


if __name__ == "__main__":
    main()
