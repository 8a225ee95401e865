"""The model card of a binary model."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers import PreTrainedModel
from transformers.modelcard import TASK_TAG_TO_NAME_MAPPING, TrainingSummary, make_markdown_table

from ..config import StoMPPConfig
from ..machine import processor
from ..output import printable
from ..reports.dynamics import NO_MEASURES
from ..version import __version__
from .modules import packed_modules
from .report import BinarizationReport, report


TAGS = ["stompp", "binary", "1-bit"]

PIPELINE_TASKS = ("text-classification", "token-classification", "fill-mask", "question-answering")
"""Tasks whose pipeline needs no more than a model and its tokenizer."""

EMPTY_DESCRIPTION = (
    "This is the model card of a 🤗 transformers model that has been pushed on the Hub. This model card has been "
    "automatically generated."
)
"""What `create_and_tag_model_card` of Transformers says of a model."""

SURROGATE_WORDS = {
    "none": "without a straight-through estimator: a frozen entry has no gradient",
    "ste": "with a straight-through estimator for the frozen entries",
    "clipped_ste": "with a clipped straight-through estimator for the frozen entries",
    "polynomial": "with a polynomial gradient for the frozen entries",
}

CITATION = """\
```bibtex
@article{smith2026stompp,
  title  = {Stochastic Masked Partial Progressive Binarization},
  author = {Evan Gibson Smith and Bashima Islam},
  year   = {2026},
  eprint = {2606.27759},
  archivePrefix = {arXiv},
  url    = {https://arxiv.org/abs/2606.27759}
}
```"""

TEMPLATE = """\
---
{{ card_data }}
---

# {{ name }}

{{ introduction }}

{{ usage }}
{% if metrics_table %}
## Results

Of the fully binary model, on the evaluation set:

{{ metrics_table }}
{% endif %}
## What is binary, and what is not

{{ what_is_binary }}

{{ sizes_table }}

Bytes of all tensors: {{ bytes_before }} as a float model, {{ bytes_packed }} packed ({{ ratio }} times fewer).
{% if speed_table %}
## Speed

{{ speed_table }}

Median milliseconds of a forward pass, beside a float model of the same shapes: {{ machine }}.
{% endif %}
## Training procedure

{{ method }}
{% if progression_table %}
### Progression

{{ progression_table }}
{% endif %}{% if hyperparameters_table %}
### Training hyperparameters

{{ hyperparameters_table }}
{% endif %}{% if training_table %}
### Training results

{{ training_table }}
{% endif %}
### Framework versions

{{ versions }}

## Citation

{{ citation }}
"""


def usage_section(
    model_class: str, name: str, state: str = "packed", revision: str | None = None, task: str | None = None
) -> str:
    """
    The card's section on loading a `"packed"` or `"latent"` model from `name`, a repository or folder, of a branch
    `revision`. Where the Hub's `task` has a pipeline for text, its lines are shown, too.
    """
    where = f'"{name}"' if revision in (None, "main") else f'"{name}", revision="{revision}"'
    if state == "packed":
        why = (
            "The encoder of this model has 1-bit weights. `pip install hf_stompp`; the import registers the loader. "
            "Without it `from_pretrained` stops and speaks of `ignore_mismatched_sizes`: add the import, and leave "
            "that option alone, which would give the encoder random weights."
        )
    else:
        why = (
            "This is the latent model: float weights with freeze masks, to train on or to pack. `pip install "
            "hf_stompp`; the import registers the loader. Without it Transformers warns, and loads a float model that "
            "computes something else."
        )
    lines = ["import hf_stompp", f"from transformers import {model_class}", ""]
    lines += [f"model = {model_class}.from_pretrained({where})"]
    if state == "latent":
        lines += ["packed = hf_stompp.pack(model)  # once every unit is committed"]
    section = f"## How to load it\n\n{why}\n\n" + _code(lines)
    if state == "packed" and task in PIPELINE_TASKS:
        lines = ["import hf_stompp", "from transformers import pipeline", ""]
        lines += [f'pipe = pipeline("{task}", model={where})']
        section += "\nor, with the tokenizer of this repository:\n\n" + _code(lines)
    return section


def _code(lines: Sequence[str]) -> str:
    return "\n".join(["```python", *lines, "```", ""])


def _span(text: str) -> str:
    """A text as code, in which it can be neither a heading nor a link."""
    text = printable(text)
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence} {text} {fence}" if "`" in text else f"`{text}`"


def add_section(card: Path, section: str) -> None:
    """Puts a section before the first second-level heading of a model card, or at its end."""
    text = card.read_text(encoding="utf-8")
    before, heading, after = text.partition("\n## ")
    card.write_text(f"{before}\n{section}{heading}{after}", encoding="utf-8")


def is_repository(name: str | None) -> bool:
    """Whether a name may be that of a model on the Hub, and is no folder here."""
    if not name or Path(name).is_dir():
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def measures(evaluation: Mapping[str, Any] | None) -> dict[str, float]:
    """
    The measures in what a Trainer logs of an evaluation: without loss, speeds, the mixed network's, and what is no
    number.
    """
    found = {}
    for key, value in (evaluation or {}).items():
        name = key.removeprefix("eval_")
        is_measure = key.startswith("eval_") and not name.startswith("mixed_") and name not in ("loss", *NO_MEASURES)
        if is_measure and isinstance(value, Real) and math.isfinite(value):
            found[name] = float(value)
    return found


def model_card(
    model: PreTrainedModel,
    name: str,
    repository: str,
    summary: TrainingSummary | None = None,
    evaluation: Mapping[str, Any] | None = None,
    float_evaluation: Mapping[str, Any] | None = None,
    progression: Mapping[str, Any] | None = None,
    tags: Sequence[str] = (),
    revision: str | None = None,
    speed: Sequence[Mapping[str, Any]] = (),
) -> ModelCard:
    """
    The card of a latent or packed model, with a `model-index` where data set, task and measures are known.

    `name` is the title; the model is loaded from `repository`, which may be a folder. `summary` is what a Trainer
    knows of the run, `tags` come beside those of every binary model, and `revision` is the branch that will hold it.
    `evaluation` and `float_evaluation` are what a Trainer logged, with `eval_*` keys, of this model and of the float
    model that it was made from. `progression` holds settings by name, and `speed` is from
    [`~hf_stompp.benchmark.compare_with_float`], of this machine.
    """
    config: StoMPPConfig = model.config.quantization_config
    state = "packed" if packed_modules(model) else "latent"
    found = measures(evaluation)
    base = summary.finetuned_from if summary else getattr(model.config, "_name_or_path", None)
    base = base if is_repository(base) and base != repository else None
    task = _first(summary.tasks) if summary else None
    sizes = report(model, config)
    total = sizes.total
    results = _eval_results(summary, task, found)
    data = ModelCardData(
        language=summary.language if summary else None,
        license=summary.license if summary else None,
        library_name="transformers",
        base_model=base,
        tags=list(dict.fromkeys([*(_several(summary.tags) if summary else []), *tags, *TAGS])),
        datasets=_several(summary.dataset_tags) or None if summary else None,
        metrics=list(found) or None,
        pipeline_tag=task,
        model_name=name if results else None,
        eval_results=results or None,
    )
    return ModelCard.from_template(
        data,
        template_str=TEMPLATE,
        name=name,
        introduction=_introduction(model, config, state, base, summary),
        usage=usage_section(type(model).__name__, repository, state, revision, task).strip(),
        metrics_table=_metrics_table(found, measures(float_evaluation)),
        what_is_binary=_what_is_binary(config),
        sizes_table=_sizes_table(sizes),
        bytes_before=f"{total.bytes_before:,}",
        bytes_packed=f"{total.bytes_packed:,}",
        ratio=f"{total.bytes_before / total.bytes_packed:.1f}",
        speed_table=_speed_table(speed),
        machine=_machine(model),
        method=_method(config),
        progression_table=_table(("setting", "value"), (progression or {}).items()),
        hyperparameters_table=_table(
            ("hyperparameter", "value"), ((summary.hyperparameters if summary else None) or {}).items()
        ),
        training_table=make_markdown_table(summary.eval_lines) if summary else "",
        versions=f"- hf_stompp {__version__}\n- Transformers {transformers.__version__}\n"
        f"- PyTorch {torch.__version__}",
        citation=CITATION,
    )


def _several(value: Any) -> list[str]:
    values = [value] if isinstance(value, str) else list(value or [])
    return [item for item in values if item]


def _first(value: Any) -> str | None:
    return next(iter(_several(value)), None)


def _first_dict(value: Any) -> dict[str, Any]:
    return next(iter([value] if isinstance(value, dict) else value or []), {})


def _eval_results(summary: TrainingSummary | None, task: str | None, found: Mapping[str, float]) -> list[EvalResult]:
    """Entries of the `model-index`, which may not be without a data set and a task."""
    tag = _first(summary.dataset_tags) if summary else None
    if summary is None or task is None or tag is None:
        return []
    metadata = _first_dict(summary.dataset_metadata)
    return [
        EvalResult(
            task_type=task,
            task_name=TASK_TAG_TO_NAME_MAPPING.get(task),
            dataset_type=tag,
            dataset_name=_first(summary.dataset) or tag,
            dataset_config=_first(summary.dataset_args) or metadata.get("config"),
            dataset_split=metadata.get("split"),
            metric_type=name,
            metric_name=name.replace("_", " ").capitalize(),
            metric_value=value,
        )
        for name, value in found.items()
    ]


def _introduction(
    model: PreTrainedModel, config: StoMPPConfig, state: str, base: str | None, summary: TrainingSummary | None
) -> str:
    what = "weights and activations" if config.has_binary_activations else "weights"
    origin = f"[{base}](https://huggingface.co/{base})" if base else f"a {_span(model.config.model_type)} model"
    data = " and ".join(f"the {name} data set" for name in _several(summary.dataset)) if summary else ""
    where = f" on {data}" if data else ""
    text = f"{origin[0].upper()}{origin[1:]}, made binary{where}: the encoder's {what} are 1-bit."
    if state == "latent":
        text = f"The latent (trainable) state of a binary model. {text}"
    return text


def _what_is_binary(config: StoMPPConfig) -> str:
    linears = [entry for entry in config.plan.values() if entry.is_linear]
    lines = [f"- binary: the weights of {len(linears)} linear layers, with a float scale for each output row"]
    binary = sum(entry.reads_bits for entry in linears)
    if binary:
        which = "them" if binary == len(linears) else f"{binary} of them"
        lines += [f"- binary: the activations that enter {which}, with a threshold for each feature"]
    kept_as = "float" if config.activation_bits is None else f"rounded to {config.activation_bits} bits"
    if binary < len(linears):
        which = "the others" if binary else "them"
        lines += [f"- {kept_as}: the activations that enter {which} (mode `bwn`, binary weights only)"]
    if config.word_embeddings == "binary":
        lines += ["- binary: the word embeddings, with a scale for each row"]
    if config.word_embeddings == "int8":
        lines += ["- 8 bits: the word embeddings, with a scale for each row"]
    lines += ["- float: LayerNorm, biases, scales, attention scores and softmax, the residual stream"]
    kept = ", ".join(map(_span, config.modules_to_not_convert))
    return "\n".join(
        [*lines, f"- float: what matches {kept}" + (", else" if config.word_embeddings != "float" else "")]
    )


def _sizes_table(sizes: BinarizationReport) -> str:
    fields = ("binary_weights", "float_weights", "bytes_before", "bytes_packed")
    rows = [
        (_span(row.unit), *(f"{getattr(row, field):,}" for field in fields)) for row in [*sizes.units, sizes.total]
    ]
    return _table(("unit", "binary weights", "float weights", "bytes, float model", "bytes, packed"), rows)


def _speed_table(speed: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        (
            f"{row['batch']} x {row['length']} tokens",
            f"{1e3 * row['float']:.2f}",
            f"{1e3 * row['packed']:.2f}",
            f"{row['float'] / row['packed']:.1f}",
        )
        for row in speed
    ]
    return _table(("batch", "float", "packed", "times faster"), rows)


def _machine(model: PreTrainedModel) -> str:
    """Where the model runs, in words."""
    dtype = str(model.dtype).removeprefix("torch.")
    if model.device.type == "cuda":
        return f"{torch.cuda.get_device_name(model.device)}, {dtype}"
    return f"{processor()['name']}, {torch.get_num_threads()} threads, {dtype}"


_SETTINGS = (
    *("mode", "modes", "unit", "weight_scale", "weight_center", "weight_clip", "weight_window", "activation_scale"),
    *("initial_activation_scale", "activation_shift", "activation_clip", "activation_window", "feed_forward_levels"),
)
"""Fields of the config that a card tells."""


def _method(config: StoMPPConfig) -> str:
    what = "weights and activations are" if config.has_binary_activations else "weights are"
    return (
        "StoMPP, Stochastic Masked Partial Progressive Binarization ([arXiv "
        f"2606.27759](https://arxiv.org/abs/2606.27759)): {what} replaced by their signs through random masks that "
        f"grow through the encoder, {SURROGATE_WORDS[config.surrogate]} ({_span(f'surrogate={config.surrogate!r}')}). "
        "Settings of the binarization: "
        + ", ".join(
            _span(f"{name}={getattr(config, name)!r}") for name in _SETTINGS if getattr(config, name) is not None
        )
        + "."
    )


def _metrics_table(found: Mapping[str, float], of_float: Mapping[str, float]) -> str:
    rows = [(name, f"{value:.4f}") for name, value in found.items()]
    if not of_float:
        return _table(("measure", "value"), rows)
    beside = [f"{of_float[name]:.4f}" if name in of_float else "-" for name in found]
    return _table(
        ("measure", "value", "float model"), [(*row, other) for row, other in zip(rows, beside, strict=True)]
    )


def _table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [f"| {' | '.join(map(str, row))} |" for row in rows]
    return "\n".join([f"| {' | '.join(header)} |", f"|{'---|' * len(header)}", *lines]) if lines else ""


def _empty_form() -> str:
    """The text of the card that Transformers makes for a repository without one."""
    return ModelCard.from_template(ModelCardData(), model_description=EMPTY_DESCRIPTION).text.strip()


def complete_card(model: PreTrainedModel, card: Path, repository: str, revision: str | None = None) -> None:
    """
    Makes a card say how to load a binary model, in place.

    Transformers' empty form is replaced by a card of ours; a card that somebody has written in keeps its text. The
    metadata stay in any case.
    """
    if not card.is_file():
        return
    text = card.read_text(encoding="utf-8")
    written = ModelCard(text)
    data: Any = written.data
    tags = _several(data.tags)
    if written.text.strip() == _empty_form():
        ours = model_card(model, repository.split("/")[-1], repository, tags=tags, revision=revision)
        for name, value in vars(data).items():
            if value is not None and name != "tags":
                setattr(ours.data, name, value)
        ours.save(card)
        return
    data.tags = list(dict.fromkeys([*tags, *TAGS]))
    written.save(card)
    if "import hf_stompp" not in text:
        state = "packed" if packed_modules(model) else "latent"
        add_section(card, usage_section(type(model).__name__, repository, state, revision))
