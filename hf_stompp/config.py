"""What is binarized and how: `StoMPPConfig`, serialised into `config.json`."""

from __future__ import annotations

import copy
import re
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from transformers.utils.quantization_config import QuantizationConfigMixin

from .nn.functional import LEVELS, SURROGATES, WEIGHT_CENTERS, WEIGHT_SCALES
from .plan import Plan, in_short, is_module_name, read_plan, units_of


QUANT_METHOD = "stompp"
FORMAT_VERSION = 6
"""
The newest version of the file format. Models are written as the oldest that says what they are: 6 with
`activation_functions="sign"`, 5 with convolutions, 4 with `word_embeddings="int8"`, 3 with `activation_bits`, 2 with
`modes`, else 1.
"""

CHOICES: dict[str, tuple[str, ...]] = {
    "mode": ("bnn", "bwn"),
    "surrogate": tuple(SURROGATES),
    "weight_scale": tuple(WEIGHT_SCALES),
    "weight_center": tuple(WEIGHT_CENTERS),
    "activation_scale": ("learned", "fixed"),
    "activation_shift": ("learned", "fixed", "none"),
    "feed_forward_levels": tuple(LEVELS),
    "activation_functions": ("kept", "sign"),
    "unit": ("layer", "sublayer", "module"),
    "word_embeddings": ("float", "int8", "binary"),
    "state": ("latent", "packed"),
}
"""Allowed values of the fields that name one of several."""

MODES_OF_MODULES = (*CHOICES["mode"], "float")
"""What a single linear layer may be."""


def _part_of_a_name(pattern: str) -> re.Pattern[str]:
    # Groups of the pattern keep their numbers.
    return re.compile(rf"(?:^|\.)(?:{pattern})(?:\.|$)")


def matches(name: str, pattern: str) -> bool:
    """Whether whole dot-separated parts of a module's name match a regular expression."""
    return _part_of_a_name(pattern).search(name) is not None


def _check_patterns(field: str, patterns: list[str]) -> None:
    for pattern in patterns:
        if not pattern.isprintable():
            raise ValueError(f"StoMPPConfig.{field}: {in_short(pattern)} holds characters that cannot be printed")
        try:
            # By itself as well: one that closes a group of ours would be another in there.
            re.compile(pattern)
            _part_of_a_name(pattern)
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(
                f"StoMPPConfig.{field}: {in_short(pattern)} is no regular expression for parts of a module's name "
                f"({str(error)[:100]}); flags belong in a group, as in '(?i:query)'"
            ) from error


def _is_finite(value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    # NaN is not, and a whole number may be larger than any float.
    return is_number and abs(value) <= sys.float_info.max


def _word_embeddings(asked: str, is_binary: Any) -> str:
    """What `word_embeddings` and its older name agree on."""
    if is_binary is None:
        return asked
    if not isinstance(is_binary, bool):
        raise ValueError(f"StoMPPConfig.binary_word_embeddings must be True or False, got {in_short(is_binary)}")
    by_older_name = "binary" if is_binary else "float"
    if asked not in ("float", by_older_name):
        raise ValueError(
            f"StoMPPConfig.word_embeddings={in_short(asked)} and binary_word_embeddings={is_binary}, its older name, "
            "contradict each other: drop the latter"
        )
    return by_older_name


def checked_inputs(inputs: Any) -> dict[str, Any] | None:
    """Forward arguments to trace with, checked to be a mapping, and free of gradients, so that they can be copied."""
    if inputs is None:
        return None
    if not isinstance(inputs, Mapping):
        raise ValueError(
            f"example_inputs must map names of the model's forward arguments to values, got {in_short(inputs)}"
        )
    return {name: value.detach() if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}


class StoMPPConfig(QuantizationConfigMixin):
    """
    What is binarized and how. Saved in `config.json` as `quantization_config`.

    Sources: "paper" is StoMPP (arXiv 2606.27759), BiT arXiv 2205.13016, BiBERT arXiv 2203.06390, XNOR-Net arXiv
    1603.05279.

    Args:
        mode (`str`, *optional*, defaults to `"bnn"`):
            `"bnn"`: binary weights and activations; `"bwn"`: binary weights, float activations (paper).
        activation_bits (`int`, *optional*, defaults to 8):
            Bits of the float inputs of layers with binary weights alone (mode `bwn`): 8 rounds each token's features
            to 255 even levels up to their largest magnitude, so that products run on integers (ours). That is done in
            evaluation, committed or packed; training takes the floats as they are. `None`: float products. `None` as
            well where no layer has such inputs, and in files older than format version 3.
        modes (`dict[str, str]`, *optional*):
            Another mode for some of the linear layers (ours): a regular expression that matches whole dot-separated
            parts of their names -> `"bnn"`, `"bwn"` or `"float"`. Such as `{"layer.0": "bwn", "attention": "bwn"}`.
            Every one must match a linear layer of the encoder, and no layer may get two modes.
        surrogate (`str`, *optional*, defaults to `"clipped_ste"`):
            Gradient of the frozen entries: `"none"` (STE-free, exactly 0; paper), `"ste"` (StoMPP+STE, identity;
            paper), `"clipped_ste"` (identity within a window; BinaryNet) or `"polynomial"` (a slope that falls from 2
            to 0 within a window; Bi-Real).
        weight_scale (`str`, *optional*, defaults to `"row"`):
            Hard level of a weight: mean magnitude of its output `"row"` (XNOR-Net, BiBERT) or of the whole `"tensor"`
            (BiT), or 1 (`"none"`; paper).
        weight_center (`str`, *optional*, defaults to `"none"`):
            What is subtracted from a linear layer's weight before its sign is taken: nothing (paper), the mean of
            its output `"row"` (BiBERT) or of the whole `"tensor"` (BiT).
        weight_clip (`float`, *optional*, defaults to 1.0):
            Clip range of the free weights, as a multiple of the weight scale. At 1, as in the paper, an entry outside
            of it does not move when it freezes.
        weight_window (`float`, *optional*, defaults to 3.0):
            Window of the surrogates `clipped_ste` and `polynomial` for frozen weights, as a multiple of the weight
            scale (ours). `None`: the clip range.
        activation_scale (`str`, *optional*, defaults to `"learned"`):
            Hard level of an activation, one number a tensor, initialised from the first batch, then `"learned"` (BiT)
            or `"fixed"`.
        initial_activation_scale (`float`, *optional*, defaults to 1.0):
            First value of the activation scale, as a multiple of the mean distance from the shift (of the mean of
            what is positive, with the levels `"zero_one"`), at which the two levels fit the first batch best
            (XNOR-Net). BiT starts at 2.
        activation_shift (`str`, *optional*, defaults to `"learned"`):
            Shift and threshold of a binary activation, one number a feature, initialised from the first batch, then
            `"learned"` (BiT) or `"fixed"`, or `"none"`: both 0.
        activation_clip (`float`, *optional*, defaults to 1.0):
            Clip range of the free activations, as a multiple of the activation scale (1 in the paper). What it leaves
            of a pretrained network before anything is frozen: `benchmarks/results/clip_range.json`.
        activation_window (`float`, *optional*, defaults to 2.0):
            Window of the surrogates `clipped_ste` and `polynomial` for frozen activations, as a multiple of the
            activation scale (ours). `None`: the clip range.
        feed_forward_levels (`str`, *optional*, defaults to `"signed"`):
            Levels behind the feed-forward activation function: `"signed"` = {-a, +a} about the shift, `"zero_one"` =
            {0, a} (BiT's set for non-negative tensors).
        activation_functions (`str`, *optional*, defaults to `"kept"`):
            Those in the blocks of a convolutional network: `"kept"`, and a sign is taken of what each convolution
            reads (ours), or replaced by the `"sign"` (+-1; what is not frozen is clipped at `activation_clip`), so
            that shortcuts read signs too, and a frozen one lets no gradient pass (paper). For training from scratch:
            a pretrained network has learned with its own.
        unit (`str`, *optional*, defaults to `"layer"`):
            What the progression moves through: encoder `"layer"` (paper), `"sublayer"` (attention, feed-forward; ours)
            or `"module"` (each linear layer; ours).
        modules_to_not_convert (`list[str]`, *optional*, defaults to `["embeddings", "pooler", "classifier"]`):
            What to leave float, linear layers and activation functions: regular expressions that match whole
            dot-separated parts of a module's name (ours; the paper leaves the first and the last layer float).
        word_embeddings (`str`, *optional*, defaults to `"float"`):
            The word embedding table, whatever `modules_to_not_convert` says of it: `"float"`; `"int8"`, rounded to
            8 bits an entry with a scale a row, in training too, where the gradient passes straight through (ours); or
            `"binary"`, trained like the weights, with a scale a row (BiBERT, BiT).
        binary_word_embeddings (`bool`, *optional*): the older name: `True` is `word_embeddings="binary"`.
        layer_stack (`str`, *optional*):
            Name of the module list that holds the encoder layers, for models where it cannot be found (ours).
        state (`str`, *optional*, defaults to `"latent"`):
            `"latent"`: float weights with freeze masks, trainable; `"packed"`: 1-bit weights. Set by the library.
        format_version (`int`, *optional*):
            Version of the file format: 6 with `activation_functions="sign"`, 5 with convolutions, 4 with
            `word_embeddings="int8"`, 3 with `activation_bits`, 2 with `modes`, else 1. Set by the library.
        modules (`list[dict]`, *optional*):
            What was replaced, from input to output: `name`, `kind` (`"linear"`, `"convolution"`, `"activation"`,
            `"sign"`, `"embedding"`, `"int8_embedding"`), `unit`, and for a linear layer or a convolution `input`, the
            module that binarizes its input (`None` where that stays float), and `bias`, whether it has one. Set by
            [`binarize`]; `plan` holds it by name.
        example_inputs (`Mapping[str, Any]`, *optional*):
            As in [`binarize`], for `from_pretrained(..., quantization_config=StoMPPConfig(...))`. Never saved.

    Raises:
        ValueError: a bad value (the message names the field and what it may be), an unknown field, or a newer format.
    """

    def __init__(
        self,
        mode: str = "bnn",
        surrogate: str = "clipped_ste",
        weight_scale: str = "row",
        weight_center: str = "none",
        weight_clip: float = 1.0,
        weight_window: float | None = 3.0,
        activation_scale: str = "learned",
        initial_activation_scale: float = 1.0,
        activation_shift: str = "learned",
        activation_clip: float = 1.0,
        activation_window: float | None = 2.0,
        feed_forward_levels: str = "signed",
        activation_functions: str = "kept",
        unit: str = "layer",
        modules_to_not_convert: list[str] | None = None,
        word_embeddings: str = "float",
        layer_stack: str | None = None,
        modes: dict[str, str] | None = None,
        activation_bits: int | None = 8,
        binary_word_embeddings: bool | None = None,
        state: str = "latent",
        format_version: int | None = None,
        modules: list[dict[str, Any]] | None = None,
        quant_method: str = QUANT_METHOD,
        example_inputs: Mapping[str, Any] | None = None,
        **unknown: Any,
    ) -> None:
        self.quant_method = quant_method  # type: ignore[assignment]
        self.mode = mode
        self.modes = modes
        if activation_bits is not None and (type(activation_bits) is not int or activation_bits != 8):
            raise ValueError(f"StoMPPConfig.activation_bits must be 8 or None, got {in_short(activation_bits)}")
        self.activation_bits = activation_bits if self._may_round_inputs(format_version) else None
        self.surrogate = surrogate
        self.weight_scale = weight_scale
        self.weight_center = weight_center
        self.weight_clip = weight_clip
        self.weight_window = weight_window
        self.activation_scale = activation_scale
        self.initial_activation_scale = initial_activation_scale
        self.activation_shift = activation_shift
        self.activation_clip = activation_clip
        self.activation_window = activation_window
        self.feed_forward_levels = feed_forward_levels
        self.activation_functions = activation_functions
        self.unit = unit
        self.modules_to_not_convert = (
            ["embeddings", "pooler", "classifier"] if modules_to_not_convert is None else modules_to_not_convert
        )
        self.word_embeddings = _word_embeddings(word_embeddings, binary_word_embeddings)
        self.layer_stack = layer_stack
        self.example_inputs = checked_inputs(example_inputs)
        self.state = state
        self.plan: Plan = {}
        self.format_version = FORMAT_VERSION if format_version is None else format_version
        self._check(unknown)
        self.modules = modules
        version, field = self.oldest_version()
        if format_version is None:
            self.format_version = version
        elif version > format_version:
            raise ValueError(f"StoMPPConfig.{field} needs format version {version}, got {format_version}")

    def _check(self, unknown: dict[str, Any]) -> None:
        version = self.format_version
        if not isinstance(version, int) or isinstance(version, bool) or version < 1:
            raise ValueError(f"StoMPPConfig.format_version must be a whole number from 1 on, got {in_short(version)}")
        if version > FORMAT_VERSION:
            raise ValueError(
                f"this model has format version {in_short(version)}; this hf_stompp reads up to {FORMAT_VERSION}: "
                "upgrade hf_stompp"
            )
        if unknown:
            raise ValueError(
                f"StoMPPConfig has no fields {in_short(sorted(unknown))}: they may come from a newer hf_stompp (then "
                f"upgrade) or be misspelt (fields: {', '.join(sorted(self._fields()))})"
            )
        if self.quant_method != QUANT_METHOD:
            raise ValueError(f"StoMPPConfig.quant_method must be {QUANT_METHOD!r}, got {in_short(self.quant_method)}")
        for field, choices in CHOICES.items():
            if getattr(self, field) not in choices:
                raise ValueError(
                    f"StoMPPConfig.{field} must be one of {list(choices)}, got {in_short(getattr(self, field))}"
                )
        for field in ("weight_clip", "activation_clip"):
            if not _is_finite(getattr(self, field)) or getattr(self, field) < 1:
                raise ValueError(
                    f"StoMPPConfig.{field} must be a finite number of at least 1 (a multiple of the scale), got "
                    f"{in_short(getattr(self, field))}"
                )
        if not _is_finite(self.initial_activation_scale) or self.initial_activation_scale <= 0:
            raise ValueError(
                f"StoMPPConfig.initial_activation_scale must be a finite number above 0, got "
                f"{in_short(self.initial_activation_scale)}"
            )
        for field in ("weight_window", "activation_window"):
            value = getattr(self, field)
            if value is not None and (not _is_finite(value) or value <= 0):
                raise ValueError(
                    f"StoMPPConfig.{field} must be a finite number above 0 (a multiple of the scale) or None (the "
                    f"clip range), got {in_short(value)}"
                )
        if self.layer_stack is not None and not is_module_name(self.layer_stack):
            raise ValueError(
                f"StoMPPConfig.layer_stack must be a module name or None, got {in_short(self.layer_stack)}"
            )
        patterns = self.modules_to_not_convert
        if not isinstance(patterns, list) or not all(isinstance(pattern, str) for pattern in patterns):
            raise ValueError(
                f"StoMPPConfig.modules_to_not_convert must be a list of strings, got {in_short(patterns)}"
            )
        _check_patterns("modules_to_not_convert", patterns)
        self._check_modes(self.modes)

    def _check_modes(self, modes: Any) -> None:
        if modes is None:
            return
        if not isinstance(modes, dict) or not all(
            isinstance(pattern, str) and mode in MODES_OF_MODULES for pattern, mode in modes.items()
        ):
            raise ValueError(
                f"StoMPPConfig.modes must give one of {list(MODES_OF_MODULES)} for each pattern of module names, got "
                f"{in_short(modes)}"
            )
        _check_patterns("modes", list(modes))

    def to_dict(self) -> dict[str, Any]:
        """What is saved, plain JSON: a file of an older format version has no field that its readers do not know."""
        since = {"modes": 2, "activation_bits": 3, "word_embeddings": 4, "activation_functions": 6}
        saved = {
            name: copy.deepcopy(value)
            for name, value in self._fields().items()
            if name != "example_inputs" and since.get(name, 1) <= self.format_version
        }
        if "word_embeddings" not in saved:
            saved["binary_word_embeddings"] = self.word_embeddings == "binary"
        return saved

    def _fields(self) -> dict[str, Any]:
        """All fields by name, the plan as `modules`."""
        return {name: value for name, value in self.__dict__.items() if name != "plan"} | {"modules": self.modules}

    def oldest_version(self) -> tuple[int, str]:
        """The oldest version of the file format that can say what this config does, and the field that asks for it."""
        if self.activation_functions != "kept":
            return 6, "activation_functions"
        if any(entry.kind == "convolution" for entry in self.plan.values()):
            return 5, "modules"
        if self.word_embeddings == "int8":
            return 4, "word_embeddings"
        if self.activation_bits is not None:
            return 3, "activation_bits"
        return (2, "modes") if self.modes else (1, "mode")

    def _may_round_inputs(self, format_version: int | None) -> bool:
        """Whether the mode of all layers, or of some, is `bwn`, and the file is not older than such rounding."""
        modes = self.modes.values() if isinstance(self.modes, dict) else ()
        return format_version not in (1, 2) and "bwn" in (self.mode, *modes)

    def mode_of(self, name: str) -> str:
        """
        What a linear layer is to be: that of `modes` that matches its name, or else `mode`. Raises a ValueError where
        two patterns want different things of it.
        """
        found = {pattern: mode for pattern, mode in (self.modes or {}).items() if matches(name, pattern)}
        if len(set(found.values())) > 1:
            raise ValueError(
                f"StoMPPConfig.modes contradicts itself for {name!r}: {in_short(found)}; let one pattern match it"
            )
        return next(iter(found.values()), self.mode)

    @property
    def binary_word_embeddings(self) -> bool:
        """Whether the word embeddings are binary: the older name of a value of `word_embeddings`."""
        return self.word_embeddings == "binary"

    @property
    def has_binary_activations(self) -> bool:
        """Whether any linear layer reads binary activations."""
        if not self.plan:
            return "bnn" in (self.mode, *(self.modes or {}).values())
        return any(entry.reads_bits for entry in self.plan.values())

    @property
    def modules(self) -> list[dict[str, Any]] | None:
        """The plan as it is saved, from input to output; `None` before [`binarize`]."""
        return [entry.to_dict() for entry in self.plan.values()] or None

    @modules.setter
    def modules(self, entries: list[dict[str, Any]] | None) -> None:
        plan = {} if entries is None else read_plan(entries)
        # Which layer a pattern means is not asked: matching one from a file may never end.
        modes = (self.mode, *(self.modes or {}).values())
        other = next((entry for entry in plan.values() if entry.is_linear and entry.mode not in modes), None)
        if other is not None:
            raise ValueError(
                f"StoMPPConfig.modules: input {other.input!r} of {other.name!r} is that of mode {other.mode!r}, which "
                "neither mode nor modes have: the config is damaged or was changed; take the original"
            )
        self.plan = plan

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        # `dict(config)`, as of every Transformers config.
        yield from self.to_dict().items()

    @property
    def units(self) -> list[str]:
        """Names of the units, from input to output; empty before [`binarize`]."""
        return units_of(self.plan)
