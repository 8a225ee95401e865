"""What a run of the training recipe is made of, what it notes, and whose folder is whose."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, Trainer
from transformers.trainer_utils import get_last_checkpoint

from ..config import StoMPPConfig
from ..output import write_json
from .arguments import StoMPPTrainingArguments
from .methods import RecipeArguments
from .resuming import STEP_SETTINGS


SETTINGS = "run_settings.json"
FINISHED = "finished.json"

TEACHERS = ("float", "none")
"""Teachers that are no model's name: the float model of the run, and no teacher."""

ASKED_SETTINGS = (
    "method",
    "float_num_train_epochs",
    "float_learning_rate",
    "teacher",
    "train_word_embeddings",
    "dropout",
)

TRAINING_SETTINGS = (*STEP_SETTINGS, "learning_rate", "num_train_epochs", "max_steps", "bf16", "fp16")
"""Arguments of the Trainer that a run which is started again must share with its first start."""


@dataclass(frozen=True)
class Recipe:
    """
    What a run is made of.

    Args:
        asked (`RecipeArguments`): the method, its settings, and those of the float stage.
        args (`StoMPPTrainingArguments`): of the binary stage (with the method `float`, of the float fine-tuning),
            completed by `asked.complete(args, ...)`. Checkpoints and the trained model go to its `output_dir`.
        output_dir (`Path`): folder of the run: gets `float` and `packed`, each with a model.
        tokenizer (`PreTrainedTokenizerBase`): or what makes images the model's input.
        train_dataset (`Dataset`, *optional*): tokenized; not needed to evaluate.
        eval_datasets (`dict[str, Dataset]`): tokenized, by the prefix of their measures (`eval`, ...). The first is
            evaluated in training.
        data_collator (`Callable`).
        compute_metrics (`Callable`, *optional*): as the Trainer takes it. Without it the loss alone is measured.
        identity (`dict`, *optional*): what else tells this run from others (model, data), as plain JSON.
        prepare (`Callable[[Trainer], None]`, *optional*): called with every Trainer before it runs.
    """

    asked: RecipeArguments
    args: StoMPPTrainingArguments
    output_dir: Path
    tokenizer: Any
    train_dataset: Any
    eval_datasets: dict[str, Any]
    data_collator: Callable[..., Any]
    compute_metrics: Callable[..., dict[str, float]] | None
    identity: dict[str, Any] = field(default_factory=dict)
    prepare: Callable[[Trainer], None] = lambda trainer: None

    @property
    def config(self) -> StoMPPConfig | None:
        """What is binarized and how; `None` with the method `float`."""
        return self.asked.config()


@dataclass
class Results:
    """
    What a run did and measured; what it did not do is missing or `None`.

    Attributes:
        steps (`dict[str, int]`): optimizer steps of each stage.
        metrics (`dict[str, dict[str, float] | None]`): loss and measures of each model.
        bytes (`dict[str, int]`): of each model's files of weights.
        milliseconds (`dict[str, float]`): median time of a forward pass of each model.
        seconds (`dict[str, float]`): wall-clock time of each stage.
        packed_weights (`str`, *optional*): `"final"` or `"best"`: which weights were packed.
        teacher (`str`, *optional*): what the binary stage distilled from.
        config (`StoMPPConfig`, *optional*): of the binary model.
        trainer (`Trainer`, *optional*): of the last training.
        model (`PreTrainedModel`, *optional*): the model that the run ends with, as loaded from its folder.
    """

    steps: dict[str, int] = field(default_factory=dict)
    metrics: dict[str, dict[str, float] | None] = field(default_factory=dict)
    bytes: dict[str, int] = field(default_factory=dict)
    milliseconds: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    packed_weights: str | None = None
    teacher: str | None = None
    config: StoMPPConfig | None = None
    trainer: Trainer | None = None
    model: PreTrainedModel | None = None

    @contextlib.contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Adds the wall-clock seconds of a block to `seconds[stage]`."""
        start = time.perf_counter()
        yield
        self.seconds[stage] = round(self.seconds.get(stage, 0.0) + time.perf_counter() - start, 3)


# --- whose folder it is ----------------------------------------------------------------------------------------------


def claim_output_dir(recipe: Recipe) -> None:
    """
    Records in the output folder which run it belongs to. Raises a ValueError if that is one with other settings.

    A run goes on from what its folder holds; without this check it would silently continue from the checkpoint or the
    float model of another.
    """
    settings = {
        **recipe.identity,
        **{name: getattr(recipe.asked, name) for name in ASKED_SETTINGS},
        **{name: getattr(recipe.args, name) for name in TRAINING_SETTINGS},
        "binarization": None if recipe.config is None else recipe.config.to_dict(),
        "progression": None if recipe.config is None else recipe.args.own_arguments(),
    }
    settings = json.loads(json.dumps(settings, default=str))
    file = recipe.output_dir / SETTINGS
    recipe.output_dir.mkdir(parents=True, exist_ok=True)
    if _holds_work(recipe):
        earlier = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        # What a version before this one did not record is no difference; without a record nothing is known.
        recorded = [name for name in settings if name in earlier or not earlier]
        changed = [name for name in recorded if earlier.get(name) != settings[name]]
        if changed:
            differences = "; ".join(f"{name} was {earlier.get(name)!r}, is {settings[name]!r}" for name in changed)
            raise ValueError(
                f"{recipe.output_dir} belongs to another run: {differences}. Choose another folder, delete this one, "
                "or give the earlier settings to resume that run."
            )
    elif recipe.args.should_save:
        write_json(file, settings)


def _holds_work(recipe: Recipe) -> bool:
    """Whether an earlier run left something that a later one would go on from."""
    folders = {recipe.output_dir, recipe.output_dir / "float", Path(recipe.args.output_dir or ".")}
    present = [folder for folder in folders if folder.is_dir()]
    return any(get_last_checkpoint(str(folder)) or (folder / FINISHED).is_file() for folder in present)
