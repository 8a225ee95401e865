"""The image classification example, on small images made here."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features
from datasets import Image as ImageFeature
from PIL import Image
from programs import load
from transformers import AutoImageProcessor, AutoModelForImageClassification

from hf_stompp import StoMPPConfig
from hf_stompp.training import stages


EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "image_classification"
NETWORK = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
CLASSES = ("dark", "light")


script = load(EXAMPLE / "run_image_classification.py")


def picture(light: bool, index: int, mode: str = "RGB") -> Image.Image:
    draw = np.random.default_rng(index)
    size = (20 + index % 5, 24)
    pixels = draw.integers(0, 128, (*size, 3), dtype=np.uint8) + np.uint8(127 * light)
    return Image.fromarray(pixels).convert(mode)


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    """Folders with a folder for each class: images of several sizes, one of them grey."""
    found = {}
    for part, count in (("train", 12), ("validation", 4)):
        found[part] = tmp_path / part
        for light, name in enumerate(CLASSES):
            (found[part] / name).mkdir(parents=True)
            for index in range(count):
                picture(bool(light), index, "L" if index == 1 else "RGB").save(found[part] / name / f"{index:02}.png")
    return found


def arguments(folder: Path, data: dict[str, Any], **others: Any) -> list[str]:
    asked = {
        "model_type": "resnet",
        "config_overrides": json.dumps(NETWORK),
        "image_size": 32,
        "output_dir": folder / "run",
        "num_train_epochs": 2,
        "per_device_train_batch_size": 8,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        **data,
        **others,
    }
    return [word for name, value in asked.items() for word in (f"--{name}", str(value))] + ["--do_train", "--do_eval"]


def folder_arguments(folders: dict[str, Path]) -> dict[str, Any]:
    return {f"{part}_dir": folder for part, folder in folders.items()}


def test_a_folder_of_images_becomes_a_packed_classifier_that_loads_with_its_processor(folders, tmp_path) -> None:
    asked = {"method": "stompp", "activation_functions": "sign", "learning_rate": 0.02}

    summary = script.main(arguments(tmp_path, folder_arguments(folders), **asked))

    assert summary["examples"] == {"train": 24, "validation": 8} and summary["steps"]["binary"] == 6
    assert summary["metrics"]["packed"] == summary["metrics"]["binary_final"]
    packed = tmp_path / "run" / "packed"
    model = AutoModelForImageClassification.from_pretrained(packed)
    inputs = AutoImageProcessor.from_pretrained(packed)(picture(True, 0), return_tensors="pt")
    assert inputs["pixel_values"].shape == (1, 3, 32, 32) and model(**inputs).logits.shape == (1, 2)
    assert model.config.id2label == dict(enumerate(CLASSES))
    assert "image-classification" in (packed / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("method", ["stompp", "float"])
def test_what_is_pushed_is_the_model_that_the_run_ends_with_and_no_token(
    folders, tmp_path, monkeypatch, method
) -> None:
    pushed = []
    monkeypatch.setattr(stages, "create_repo", lambda name, **options: SimpleNamespace(repo_id=f"me/{name}"))
    monkeypatch.setattr(
        "transformers.Trainer.push_to_hub", lambda self, **options: pushed.append((self.args.output_dir, options))
    )
    asked = {"method": method, "push_to_hub": True, "hub_token": "secret"}

    script.main(arguments(tmp_path, folder_arguments(folders), **asked))

    ((folder, options),) = pushed
    assert Path(folder) == (tmp_path / "run" if method == "float" else tmp_path / "run" / "packed")
    # From scratch: fine-tuned from nothing.
    assert (options["token"], options["model_name"], options["finetuned_from"]) == ("secret", "run", None)
    written = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert len(written) > 5 and not [path for path in written if b"secret" in path.read_bytes()]


def test_what_the_network_sees_is_what_the_saved_processor_makes_of_an_image() -> None:
    processor = script.ViTImageProcessor(size={"height": 32, "width": 32})
    images = script.Images(processor, 32)

    for mode in ("RGB", "L", "RGBA"):
        image = picture(True, 3, mode)
        batch = images.prepared({"image": [image], "labels": [0]})
        found = images.collate([{name: values[0] for name, values in batch.items()}])["pixel_values"]
        expected = processor(image.convert("RGB"), return_tensors="pt")["pixel_values"]
        assert torch.allclose(found, expected, atol=1e-5)


def test_augmented_images_are_moved_and_mirrored_ones() -> None:
    images = script.Images(script.ViTImageProcessor(size={"height": 16, "width": 16}), 16)
    image = Image.fromarray(np.arange(16 * 16 * 3, dtype=np.uint8).reshape(16, 16, 3))
    padded = torch.nn.functional.pad(images.pixels(image), (2, 2, 2, 2))
    allowed = [padded[:, y : y + 16, x : x + 16] for y in range(5) for x in range(5)]
    allowed += [cut.flip(-1) for cut in allowed]

    torch.manual_seed(0)
    found = [images.augmented({"image": [image], "labels": [1]})["pixel_values"][0] for _ in range(30)]

    assert all(any(torch.equal(one, cut) for cut in allowed) for one in found)
    assert len({tuple(one.flatten().tolist()) for one in found}) > 10


def test_a_parquet_file_is_read_as_it_is_on_the_hub(tmp_path) -> None:
    features = Features({"img": ImageFeature(), "label": ClassLabel(names=list(CLASSES))})
    rows = {"img": [picture(bool(index % 2), index) for index in range(8)], "label": [index % 2 for index in range(8)]}
    Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "images.parquet")
    data = script.DataTrainingArguments(train_file=str(tmp_path / "images.parquet"), max_train_samples=6)

    splits, names = script.read_images(data)

    assert names == list(CLASSES) and splits["train"]["labels"][:] == [0, 1, 0, 1, 0, 1]
    assert splits["train"][3]["image"].size == picture(True, 3).size


def test_an_image_that_cannot_be_read_is_named_or_left_out(folders, caplog) -> None:
    corrupt = folders["train"] / "light" / "03.png"
    corrupt.write_bytes(corrupt.read_bytes()[:60])
    data = {name: str(folder) for name, folder in folder_arguments(folders).items()}

    with pytest.raises(ValueError, match=r"light/03.png cannot be read .* give --skip_corrupt"):
        script.read_images(script.DataTrainingArguments(**data))
    splits, _ = script.read_images(script.DataTrainingArguments(**data, skip_corrupt=True))

    assert len(splits["train"]) == 23 and "03.png cannot be read" in caplog.text


def test_classes_that_differ_between_training_and_validation_are_refused(folders) -> None:
    (folders["validation"] / "dark").rename(folders["validation"] / "darker")
    data = {name: str(folder) for name, folder in folder_arguments(folders).items()}

    with pytest.raises(ValueError, match=r"classes of the validation images are \['darker', 'light'\]"):
        script.read_images(script.DataTrainingArguments(**data))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"train_file": "images.parquet"}, "in one way"),
        ({"model_name_or_path": "microsoft/resnet-18"}, "--model_name_or_path .* or --model_type"),
        ({"image_size": 0}, "--image_size 0"),
        ({"method": "float", "activation_functions": "sign"}, "--method float"),
    ],
    ids=["two sources", "two models", "size", "float"],
)
def test_arguments_that_contradict_each_other_are_refused(folders, tmp_path, changed, message) -> None:
    with pytest.raises(ValueError, match=message):
        script.main(arguments(tmp_path, {**folder_arguments(folders), **changed}))


def test_a_network_from_scratch_gets_the_recipe_of_the_papers_and_what_is_asked_for_wins(folders, tmp_path) -> None:
    given = arguments(tmp_path, folder_arguments(folders), method="stompp")
    *_, recipe, training = script.parse_arguments(given)
    assert recipe.config() == StoMPPConfig(surrogate="none", weight_clip=1.0, weight_window=1.0, activation_clip=1.0)
    assert (training.optim, training.learning_rate, training.max_grad_norm) == ("sgd", 0.1, 0.0)

    for dashed in ("--learning_rate=0.3", "--learning-rate=0.3"):
        *_, recipe, training = script.parse_arguments(
            [*given, dashed, "--weight_clip", "2", "--num-train-epochs", "7"]
        )
        assert (training.learning_rate, recipe.weight_clip, training.num_train_epochs) == (0.3, 2.0, 7.0)
    # The type of network makes it a run from scratch, however it is spelled.
    *_, training = script.parse_arguments([word.replace("--model_type", "--model-type") for word in given])
    assert training.optim == "sgd"
    *_, recipe, training = script.parse_arguments(arguments(tmp_path, folder_arguments(folders), method="float"))
    assert recipe.config() is None and training.optim == "sgd"


@pytest.mark.parametrize("file", sorted((EXAMPLE / "configs").glob("*.json")), ids=lambda file: file.name)
def test_argument_files_are_read_and_the_command_line_wins(file, tmp_path) -> None:
    model, data, recipe, training = script.parse_arguments([str(file), "--output_dir", str(tmp_path), "--use_cpu"])

    assert model.config_overrides == json.loads(file.read_text())["config_overrides"]
    assert data.sources() and recipe.config() is not None and training.output_dir == str(tmp_path)
