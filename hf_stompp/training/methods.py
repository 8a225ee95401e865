"""What a run of the training recipe is asked for: the table of methods, and the arguments beside the Trainer's."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..config import CHOICES, StoMPPConfig
from .progression import SCHEDULES


if TYPE_CHECKING:
    # The Trainer's arguments take a while to import, and the command line reads the tables here for its --help.
    from .arguments import StoMPPTrainingArguments


FLOAT_DEFAULTS: dict[str, Any] = {
    "learning_rate": 5e-5,
    "num_train_epochs": 4.0,
    "warmup_steps": 0.1,
    "train_sampling_strategy": "group_by_length",
}
"""Training arguments of a float run where nothing else is asked for."""

BINARY_DEFAULTS: dict[str, Any] = {**FLOAT_DEFAULTS, "learning_rate": 2e-4}
"""The same of the binary stage."""


@dataclass(frozen=True)
class Method:
    """
    One way to train.

    Args:
        help (`str`): what it does, for the command line and the documentation.
        config (`dict[str, tuple]`): fields of `StoMPPConfig`, and the values of each that go with the method; the
            first is set where none is asked for.
        training (`dict[str, tuple]`): the same for `StoMPPTrainingArguments`.
        defaults (`dict[str, Any]`): training arguments where nothing else is asked for; any value goes with the
            method.
    """

    help: str
    config: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    training: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=lambda: BINARY_DEFAULTS)


AT_ONCE = {"progression_schedule": ("immediate",)}
PROGRESSIVE = {"progression_schedule": tuple(name for name in SCHEDULES if name != "immediate")}

METHODS: dict[str, Method] = {
    "float": Method("no binarization", defaults=FLOAT_DEFAULTS),
    "ste": Method(
        "everything binary from the first step, straight-through gradient",
        {"surrogate": ("clipped_ste", "polynomial", "ste")},
        AT_ONCE,
    ),
    "stompp": Method(
        "layer by layer through growing masks, frozen entries have no gradient", {"surrogate": ("none",)}, PROGRESSIVE
    ),
    "stompp_ste": Method(
        "layer by layer through growing masks, straight-through gradient of frozen entries",
        {"surrogate": ("clipped_ste", "polynomial", "ste")},
        PROGRESSIVE,
    ),
    "bit": Method(
        "BiT's elastic binarization: everything binary from the first step, straight-through gradient (of activations "
        "within one scale), weights centred with one scale a matrix, {0, a} behind the feed-forward activation",
        {
            "surrogate": ("clipped_ste",),
            "weight_scale": ("tensor",),
            "weight_center": ("tensor",),
            # So wide that it is the identity.
            "weight_window": (1000.0,),
            "activation_window": (1.0,),
            "initial_activation_scale": (2.0,),
            "feed_forward_levels": ("zero_one",),
        },
        AT_ONCE,
        {**BINARY_DEFAULTS, "distillation_losses": {"logits": 1.0, "hidden_states": 1.0}},
    ),
}
"""Every method by its name. `float` alone binarizes nothing."""


def option(help: str, default: Any = None, choices: Iterable[str] | None = None) -> Any:
    """A field that `HfArgumentParser` makes an option of."""
    return field(default=default, metadata={"help": help} | ({} if choices is None else {"choices": list(choices)}))


@dataclass
class RecipeArguments:
    """
    What a run of the recipe is asked for beside the Trainer's arguments; `HfArgumentParser` reads it.

    Args:
        method (`str`, *optional*, defaults to `"stompp_ste"`): a key of [`METHODS`].
        float_num_train_epochs (`float`, *optional*, defaults to 0.0):
            Epochs of float fine-tuning before the binary stage.
        float_learning_rate (`float`, *optional*, defaults to 5e-5): of that fine-tuning.
        teacher (`str`, *optional*, defaults to `"float"`):
            What the binary stage distils from: the `"float"` model that is binarized, if its head is trained;
            `"none"`; or a model's name or folder.
        train_word_embeddings (`bool`, *optional*, defaults to `True`):
            Whether the binary stage trains the word embeddings. They are most of a small model's parameters, and a
            student starts with those of its teacher.
        dropout (`float`, *optional*):
            Probability of every `nn.Dropout` in the binary stage; that of the model when not given.
        mode, surrogate, ... (*optional*):
            Fields of [`StoMPPConfig`]. What is not given is left to the method, then to the defaults there.

    Raises:
        ValueError: there is no such method, or something contradicts it or is out of range.
    """

    method: str = option("; ".join(f"{name}: {m.help}" for name, m in METHODS.items()), "stompp_ste", METHODS)
    float_num_train_epochs: float = option(
        "Fine-tune the float model for so many epochs first. 0: binarize the model as it is.", 0.0
    )
    float_learning_rate: float = option("Learning rate of that float fine-tuning.", FLOAT_DEFAULTS["learning_rate"])
    teacher: str = option(
        "What the binary model is distilled from. float: the float model that is binarized, if its head is trained; "
        "none: nothing; else the name or folder of a model that was fine-tuned on this task.",
        "float",
    )
    train_word_embeddings: bool = option(
        "Train the word embeddings in the binary stage too. Without them a step takes less time and memory.", True
    )
    dropout: float | None = option(
        "Probability of every dropout layer in the binary stage. That of the model when not given."
    )
    mode: str | None = option(
        "bnn: binary weights and activations; bwn: binary weights only.", choices=CHOICES["mode"]
    )
    modes: dict[str, Any] | str | None = option(
        "Another mode for some linear layers, as JSON: {pattern of names: bnn, bwn or float}."
    )
    activation_bits: str | None = option(
        "Float inputs of layers of mode bwn are rounded to 8 bits, or none are. 8 when not given.",
        choices=("8", "none"),
    )
    surrogate: str | None = option(
        "Gradient of frozen entries. The method decides between none and ste; this picks the kind.",
        choices=CHOICES["surrogate"],
    )
    weight_scale: str | None = option(
        "One scale for each output row, one for the whole matrix, or none.", choices=CHOICES["weight_scale"]
    )
    weight_center: str | None = option(
        "Take the sign of a weight less the mean of its row, of its tensor, or of nothing.",
        choices=CHOICES["weight_center"],
    )
    weight_clip: float | None = option("Clip range of weights that are not frozen, in multiples of their scale.")
    weight_window: float | None = option(
        "With --surrogate clipped_ste or polynomial: within how many scales a frozen weight passes its gradient."
    )
    activation_scale: str | None = option(
        "An activation's scale, taken from the first batch, is then learned or not.",
        choices=CHOICES["activation_scale"],
    )
    initial_activation_scale: float | None = option(
        "First value of that scale, as a multiple of the mean distance from the shift."
    )
    activation_shift: str | None = option(
        "The same for its shift and threshold, one for each feature.", choices=CHOICES["activation_shift"]
    )
    activation_clip: float | None = option(
        "Clip range of activations that are not frozen, in multiples of their scale."
    )
    activation_window: float | None = option(
        "With --surrogate clipped_ste or polynomial: within how many scales a frozen activation passes its gradient."
    )
    feed_forward_levels: str | None = option(
        "The two values of the activations between the feed-forward linears.", choices=CHOICES["feed_forward_levels"]
    )
    activation_functions: str | None = option(
        "Those of a convolutional network's blocks: kept, or replaced by the sign.",
        choices=CHOICES["activation_functions"],
    )
    unit: str | None = option(
        "What freezes at a time: an encoder layer, half of one, or a single linear.", choices=CHOICES["unit"]
    )
    word_embeddings: str | None = option(
        "The word embeddings, the largest part of a packed file: float, rounded to int8, or binary.",
        choices=CHOICES["word_embeddings"],
    )
    binary_word_embeddings: bool | None = option("The older name of --word_embeddings binary.")

    def __post_init__(self) -> None:
        if self.float_num_train_epochs < 0:
            raise ValueError(f"--float_num_train_epochs {self.float_num_train_epochs} is negative. Give 0 or more.")
        if isinstance(self.modes, str):
            try:
                self.modes = json.loads(self.modes)
            except ValueError as error:
                raise ValueError(f"--modes {self.modes} is no JSON ({error}). Give patterns and modes.") from error
        if self.method not in METHODS:
            raise ValueError(f"--method {self.method} is unknown. Give {', '.join(METHODS)}.")
        if self.dropout is not None and not 0 <= self.dropout < 1:
            raise ValueError(f"--dropout {self.dropout} is no probability. Give 0 or more, and less than 1.")
        if self.binary_word_embeddings is not None:
            by_older_name = "binary" if self.binary_word_embeddings else "float"
            if self.word_embeddings not in (None, by_older_name):
                raise ValueError(
                    f"--word_embeddings {self.word_embeddings} and --binary_word_embeddings "
                    f"{self.binary_word_embeddings}, its older name, contradict each other. Drop the latter."
                )
            self.word_embeddings = by_older_name
        if self.word_embeddings == "binary" and not self.train_word_embeddings:
            raise ValueError(
                "--word_embeddings binary need training and are contradicted by --no_train_word_embeddings. Drop one."
            )
        self.config()

    def config(self) -> StoMPPConfig | None:
        """The binarization asked for; `None` with the method `float`."""
        given = self._given()
        if self.method == "float":
            _refuse_for_float(given)
            return None
        return StoMPPConfig(**_agreeing(self.method, METHODS[self.method].config, given))

    def _given(self) -> dict[str, Any]:
        """The fields of [`StoMPPConfig`] that were asked for."""
        given = {name: getattr(self, name) for name in CONFIG_FIELDS if getattr(self, name) is not None}
        if "activation_bits" in given:
            given["activation_bits"] = None if given["activation_bits"] == "none" else int(given["activation_bits"])
        return given

    def check_latent(self, config: StoMPPConfig) -> None:
        """
        Checks that a latent model, which has been binarized as its `config` says, can be trained as is asked for.
        Raises a ValueError if another binarization is asked for, or a float stage.
        """
        if self.float_num_train_epochs > 0 or self.method == "float":
            raise ValueError("the model is latent, binarized already: it has no float stage. Name a float model.")
        table = METHODS[self.method].config
        asked = self._given()
        for name in {*table, *asked}:
            allowed = (asked[name],) if name in asked else table[name]
            if getattr(config, name) not in allowed:
                raise ValueError(
                    f"the model is latent, binarized with {name}={getattr(config, name)!r}, and {allowed[0]!r} is "
                    f"asked for (--method {self.method}). Ask for what it was binarized with, or name a float model."
                )

    def complete(self, args: StoMPPTrainingArguments, given: Iterable[str]) -> None:
        """
        Gives the training arguments that were not asked for the method's values.

        Args:
            args (`StoMPPTrainingArguments`): changed in place.
            given (`Iterable[str]`): names of all arguments that were asked for.

        Raises:
            ValueError: one of them contradicts the method.
        """
        if self.method == "float":
            own = {item.name for item in dataclasses.fields(self)} - {"method"}
            _refuse_for_float((own | set(args.own_arguments())) & set(given))
        method = METHODS[self.method]
        asked = {name: getattr(args, name) for name in given if hasattr(args, name)}
        for name, value in {**method.defaults, **_agreeing(self.method, method.training, asked)}.items():
            setattr(args, name, value)


def given_in(argv: Iterable[str]) -> set[str]:
    """Names of the arguments that a command line gives; those of switches without their `no_`, too."""
    names = {word[2:].split("=")[0].replace("-", "_") for word in argv if word.startswith("--")}
    return names | {name.removeprefix("no_") for name in names}


CONFIG_FIELDS = {item.name for item in dataclasses.fields(RecipeArguments)} & set(StoMPPConfig().__dict__)


def _agreeing(method: str, table: Mapping[str, tuple[Any, ...]], given: Mapping[str, Any]) -> dict[str, Any]:
    """What a method sets, and what is given; refuses what contradicts the method."""
    for name, values in table.items():
        if name in given and given[name] not in values:
            raise ValueError(
                f"--method {method} is contradicted by --{name} {given[name]}; it goes with "
                f"{' or '.join(map(str, values))}. Drop --{name}, or choose another method."
            )
    return {name: values[0] for name, values in table.items()} | dict(given)


def _refuse_for_float(given: Iterable[str]) -> None:
    if names := sorted(given):
        raise ValueError(
            f"--method float binarizes nothing and is contradicted by --{', --'.join(names)}. Drop them, or choose "
            f"the method {', '.join(name for name in METHODS if name != 'float')}. The epochs and the learning rate "
            "of a float run are those of training."
        )
