"""
Trains an image classifier of 1-bit convolutions (or its float and straight-through baselines), from scratch or not.

The stages are those of the library's recipe (`hf_stompp.training.stages`): binarize the model while it trains, pack
it, load the packed model back, and measure it. This script reads the arguments and the images, and says how an image
becomes a tensor. `README.md` beside it has the commands.
"""

from __future__ import annotations

import itertools
import json
import logging
import shlex
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bireal  # noqa: F401 - registers its type
import datasets
import numpy as np
import torch
import transformers
from datasets import ClassLabel, Dataset, Image, load_dataset
from PIL import Image as PILImage
from PIL import UnidentifiedImageError
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    EvalPrediction,
    HfArgumentParser,
    PreTrainedModel,
    Trainer,
    ViTImageProcessor,
    set_seed,
)

from hf_stompp import StoMPPTrainingArguments
from hf_stompp.output import write_json
from hf_stompp.training.methods import RecipeArguments, given_in, option
from hf_stompp.training.recipe import Recipe
from hf_stompp.training.stages import create_hub_repository, evaluate_model, run_recipe, share
from hf_stompp.training.summary import summarize, summary_table


logger = logging.getLogger(__name__)

FROM_SCRATCH: dict[str, Any] = {
    "optim": "sgd",
    "optim_args": "momentum=0.9",
    "learning_rate": 0.1,
    "lr_scheduler_type": "constant",
    "warmup_steps": 0,
    "max_grad_norm": 0.0,
    "per_device_train_batch_size": 256,
    "per_device_eval_batch_size": 256,
}
"""Arguments of a network that starts from its config where nothing else is asked for: the recipe of the papers."""

BINARY_FROM_SCRATCH = {"weight_window": 1.0}
"""The same of a binary one: the gradient of a frozen weight passes within its clip range."""


# ---- Arguments ------------------------------------------------------------------------------------------------------


@dataclass
class ModelArguments:
    """Which model is trained."""

    model_name_or_path: str | None = option("A pretrained model on the Hub or in a folder; or give --model_type.")
    model_type: str | None = option("Start from scratch with a network of this type, such as resnet.")
    config_overrides: dict | str | None = option("Fields of the config of that network, as JSON.")

    def __post_init__(self) -> None:
        if (self.model_name_or_path is None) == (self.model_type is None):
            raise ValueError("Give --model_name_or_path (a pretrained model) or --model_type (one from scratch).")
        if isinstance(self.config_overrides, str):
            self.config_overrides = json.loads(self.config_overrides)
        if self.config_overrides and self.model_type is None:
            raise ValueError("--config_overrides is for a network from scratch. Give --model_type, or drop it.")


@dataclass
class DataTrainingArguments:
    """Which images are used."""

    dataset_name: str | None = option("A data set on the Hub, such as uoft-cs/cifar10.")
    train_dir: str | None = option("A folder with a folder of images for each class, to train on.")
    validation_dir: str | None = option("The same to evaluate on.")
    train_file: str | None = option("A Parquet file of images and classes, to train on.")
    validation_file: str | None = option("The same to evaluate on.")
    validation_split: str = option("The part of --dataset_name that is evaluated on.", "test")
    image_column: str | None = option("The column of images; the only one that holds images when not given.")
    label_column: str | None = option("The column of classes; the only one that holds classes when not given.")
    image_size: int = option("Height and width that the network sees; images are scaled to it.", 64)
    skip_corrupt: bool = option("Leave out images that cannot be read, with a warning.", False)
    max_train_samples: int | None = option("Train on this many images only.")
    max_eval_samples: int | None = option("Evaluate on this many images only.")

    def __post_init__(self) -> None:
        for name in ("image_size", "max_train_samples", "max_eval_samples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name} {value} leaves nothing. Give at least 1.")

    def sources(self) -> dict[str, dict[str, Any]]:
        """What `load_dataset` takes for the two parts; refuses several sources, and none."""
        folders = {"train": self.train_dir, "validation": self.validation_dir}
        files = {"train": self.train_file, "validation": self.validation_file}
        given = [bool(self.dataset_name), any(folders.values()), any(files.values())]
        if sum(given) != 1:
            raise ValueError(
                "Give the images in one way: --dataset_name, --train_dir and --validation_dir, or --train_file and "
                "--validation_file."
            )
        if self.dataset_name:
            splits = {"train": "train", "validation": self.validation_split}
            return {part: {"path": self.dataset_name, "split": split} for part, split in splits.items()}
        if any(folders.values()):
            return {p: {"path": "imagefolder", "data_dir": d, "split": "train"} for p, d in folders.items() if d}
        return {p: {"path": "parquet", "data_files": f, "split": "train"} for p, f in files.items() if f}


def parse_arguments(
    argv: list[str],
) -> tuple[ModelArguments, DataTrainingArguments, RecipeArguments, StoMPPTrainingArguments]:
    """
    Reads the command line, or the JSON file that comes first in it and is overridden by what follows. Raises a
    ValueError for values out of range, and arguments that contradict each other.
    """
    parser = HfArgumentParser(
        (ModelArguments, DataTrainingArguments, RecipeArguments, StoMPPTrainingArguments), allow_abbrev=False
    )
    if argv and argv[0].endswith(".json"):
        values = json.loads(Path(argv[0]).read_text(encoding="utf-8"))
        argv = [*_as_words(values), *argv[1:]]
    argv = [part for word in argv for part in (word.split("=", 1) if word.startswith("--") else [word])]
    given = given_in(argv)
    # Images have no length to be grouped by.
    defaults: dict[str, Any] = {"train_sampling_strategy": "random", "remove_unused_columns": False}
    if "model_type" in given:
        defaults |= FROM_SCRATCH
        # The last one counts.
        if dict(itertools.pairwise(argv)).get("--method") != "float":
            defaults |= BINARY_FROM_SCRATCH
    parser.set_defaults(**defaults)
    model_args, data_args, recipe_args, training_args = parser.parse_args_into_dataclasses(
        argv, look_for_args_file=False
    )
    recipe_args.complete(training_args, given | set(defaults))
    return model_args, data_args, recipe_args, training_args


def _as_words(values: Mapping[str, Any]) -> list[str]:
    """Arguments of a JSON file as the command line would have them."""
    words = []
    for name, value in values.items():
        words += [f"--{name}", json.dumps(value) if isinstance(value, dict | list) else str(value)]
    return words


# ---- The run --------------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None, prepare: Callable[[Trainer], None] = lambda trainer: None) -> dict[str, Any]:
    """
    Runs the script with the words of a command line, and returns what `summary.json` holds. `prepare` is called with
    every Trainer before it runs.
    """
    start = time.perf_counter()
    argv = sys.argv[1:] if argv is None else list(argv)
    model_args, data_args, recipe_args, training_args = parse_arguments(argv)
    logging.basicConfig(format="%(asctime)s - %(levelname)s - %(name)s - %(message)s", stream=sys.stdout)
    level = training_args.get_process_log_level()
    logging.getLogger("hf_stompp").setLevel(level)
    datasets.utils.logging.set_verbosity(level)
    transformers.utils.logging.set_verbosity(level)
    if training_args.push_to_hub and training_args.do_train:
        create_hub_repository(training_args)
    set_seed(training_args.seed)

    splits, names = read_images(data_args)
    model, processor, head_is_trained = load_model(model_args, names, data_args.image_size)
    images = Images(processor, data_args.image_size)
    parts = {
        name: split.with_transform(images.prepared if name == "validation" else images.augmented)
        for name, split in splits.items()
    }
    recipe = Recipe(
        recipe_args,
        training_args,
        output_dir=Path(training_args.output_dir),
        tokenizer=processor,
        train_dataset=parts.get("train"),
        eval_datasets={"eval": parts["validation"]} if "validation" in parts else {},
        data_collator=images.collate,
        compute_metrics=accuracy,
        identity={**vars(model_args), **vars(data_args)},
        prepare=prepare,
    )
    results = run_recipe(recipe, model, head_is_trained) if training_args.do_train else evaluate_model(recipe, model)
    results.seconds["total"] = round(time.perf_counter() - start, 3)
    summary = summarize(
        recipe,
        results,
        task=data_args.dataset_name or Path(data_args.train_file or data_args.train_dir or "images").stem,
        model=model_args.model_name_or_path or model_args.model_type,
        examples={name: len(part) for name, part in splits.items()},
        command=shlex.join(["run_image_classification.py", *argv]),
    )
    if training_args.should_save:
        write_json(recipe.output_dir / "summary.json", summary)
        print(summary_table(summary))
    # Last: whatever the Hub answers, the results are written.
    if training_args.do_train:
        share(recipe, results, finetuned_from=model_args.model_name_or_path, tasks="image-classification")
    return summary


# ---- Images ---------------------------------------------------------------------------------------------------------


def read_images(data_args: DataTrainingArguments) -> tuple[dict[str, Dataset], list[str]]:
    """
    Reads and checks `train` and `validation`, as far as they were given, with the columns `image` and `labels`, and
    the names of the classes. Raises a ValueError where a column is missing, the two parts have other classes, or an
    image cannot be read.
    """
    limits = {"train": data_args.max_train_samples, "validation": data_args.max_eval_samples}
    splits, names = {}, None
    for part, source in data_args.sources().items():
        split = load_dataset(**source)
        image = data_args.image_column or only_column(split, Image, "image")
        label = data_args.label_column or only_column(split, ClassLabel, "label")
        for column in (image, label):
            if column not in split.column_names:
                raise ValueError(f"The {part} images have no column {column}, only {', '.join(split.column_names)}.")
        if not isinstance(split.features[label], ClassLabel):
            split = split.class_encode_column(label)
        found = split.features[label].names
        if names not in (None, found):
            raise ValueError(f"The classes of the {part} images are {found}, those of the others {names}.")
        names = found
        split = split.select_columns([image, label]).rename_columns({image: "image", label: "labels"})
        split = split.cast_column("image", Image())
        split = split.select(range(min(len(split), limits[part] or len(split))))
        splits[part] = without_corrupt(split, data_args.skip_corrupt)
    assert names is not None
    return splits, names


def only_column(split: Dataset, kind: type, what: str) -> str:
    """The only column of a kind."""
    found = [name for name, feature in split.features.items() if isinstance(feature, kind)]
    if len(found) != 1:
        raise ValueError(
            f"There is no telling which column holds the {what}: {', '.join(split.column_names)}. Give "
            f"--{what}_column."
        )
    return found[0]


def without_corrupt(split: Dataset, skip: bool) -> Dataset:
    """The images that can be read; an error for the first that cannot, unless such are skipped."""
    stored = split.cast_column("image", Image(decode=False))
    readable = []
    for row, image in enumerate(stored["image"]):
        try:
            Image().decode_example(image).load()
            readable.append(row)
        except (OSError, SyntaxError, UnidentifiedImageError, PILImage.DecompressionBombError) as error:
            where = image.get("path") or f"image {row}"
            if not skip:
                raise ValueError(f"{where} cannot be read ({error}). Remove it, or give --skip_corrupt.") from error
            logger.warning("%s cannot be read (%s) and is left out.", where, error)
    return split if len(readable) == len(split) else split.select(readable)


class Images:
    """
    How an image of any size becomes what the network sees: scaled to `size x size`, and normalised by the processor's
    mean and standard deviation.
    """

    def __init__(self, processor: Any, size: int) -> None:
        self.size = size
        self.mean = torch.tensor(processor.image_mean).view(3, 1, 1)
        self.std = torch.tensor(processor.image_std).view(3, 1, 1)
        self.resample = PILImage.Resampling(processor.resample)

    def prepared(self, batch: dict[str, list]) -> dict[str, list]:
        """Images as tensors of shape `(3, size, size)`, uint8."""
        return {"pixel_values": [self.pixels(image) for image in batch["image"]], "labels": batch["labels"]}

    def augmented(self, batch: dict[str, list]) -> dict[str, list]:
        """The same, moved by up to an eighth of their size and mirrored at random."""
        margin, found = self.size // 8, []
        for image in batch["image"]:
            padded = torch.nn.functional.pad(self.pixels(image), (margin,) * 4)
            top, left, mirrored = (int(torch.randint(limit, ())) for limit in (2 * margin + 1, 2 * margin + 1, 2))
            cut = padded[:, top : top + self.size, left : left + self.size]
            found.append(cut.flip(-1) if mirrored else cut)
        return {"pixel_values": found, "labels": batch["labels"]}

    def pixels(self, image: PILImage.Image) -> torch.Tensor:
        """An image of any size and mode as a tensor."""
        scaled = image.convert("RGB").resize((self.size, self.size), self.resample)
        return torch.from_numpy(np.array(scaled)).permute(2, 0, 1)

    def collate(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """A batch: normalised images of shape `(batch, 3, size, size)`, and classes."""
        pixels = torch.stack([row["pixel_values"] for row in rows]).float() / 255
        return {"pixel_values": (pixels - self.mean) / self.std, "labels": torch.tensor([r["labels"] for r in rows])}


# ---- Model ----------------------------------------------------------------------------------------------------------


def load_model(model_args: ModelArguments, names: list[str], image_size: int) -> tuple[PreTrainedModel, Any, bool]:
    """
    Loads or makes the model and what makes images its input, and says whether its head is trained for these classes.
    """
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: index for index, name in enumerate(names)}}
    size = {"height": image_size, "width": image_size}
    if model_args.model_type is not None:
        config = AutoConfig.for_model(model_args.model_type, **{**(model_args.config_overrides or {}), **labels})
        return AutoModelForImageClassification.from_config(config), ViTImageProcessor(size=size), False
    name = model_args.model_name_or_path
    processor = AutoImageProcessor.from_pretrained(name, size=size)
    model, loading = AutoModelForImageClassification.from_pretrained(
        name, dtype=torch.float32, ignore_mismatched_sizes=True, output_loading_info=True, **labels
    )
    return model, processor, not (loading["missing_keys"] or loading["mismatched_keys"])


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """The share of images whose class has the largest logit."""
    logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
    return {"accuracy": float((logits.argmax(axis=-1) == prediction.label_ids).mean())}


if __name__ == "__main__":
    main()
