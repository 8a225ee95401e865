"""Distillation: what a binary student learns from a float teacher. Pure functions of what the two put out."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..config import StoMPPConfig


if TYPE_CHECKING:
    # The command line reads the tables here for its --help.
    from transformers import PreTrainedModel


def logits_loss(
    student: Tensor, teacher: Tensor, mask: Tensor | None = None, temperature: float = 1.0, multi_label: bool = False
) -> Tensor:
    """
    Cross-entropy of the student's logits against the teacher's probabilities, both at a temperature, times the square
    of the temperature (Hinton et al., arXiv 1503.02531, section 2; at temperature 1 it is BiT's, arXiv 2205.13016).
    For a regression, which has one logit, the squared error.

    Args:
        student, teacher (`Tensor` of shape `(batch, num_labels)` or `(batch, sequence_length, num_labels)`).
        mask (`Tensor` of shape `(batch, sequence_length)`, *optional*): which positions count, where there are logits
            for each.
        temperature (`float`, *optional*, defaults to 1.0).
        multi_label (`bool`, *optional*, defaults to `False`): each logit decides for itself: binary cross-entropy.

    Returns:
        `Tensor` of shape `()`: float32, the mean over examples (and positions, and labels of a multi-label task).
    """
    student, teacher = _positions(student, mask), _positions(teacher, mask)
    if student.shape[-1] == 1:
        return F.mse_loss(student, teacher)
    student, teacher = student / temperature, teacher / temperature
    if multi_label:
        loss = F.binary_cross_entropy_with_logits(student, teacher.sigmoid())
    else:
        loss = F.cross_entropy(student.flatten(0, -2), teacher.softmax(-1).flatten(0, -2))
    return temperature**2 * loss


def hidden_states_loss(
    student: tuple[Tensor, ...], teacher: tuple[Tensor, ...], mask: Tensor | None = None, normalized: bool = False
) -> Tensor:
    """
    Mean squared error of hidden states, summed over the embedding output and all layers (BiT, arXiv 2205.13016).

    Args:
        student, teacher (`tuple` of `Tensor` of shape `(batch, sequence_length, hidden_size)`): of equal length.
        mask (`Tensor` of shape `(batch, sequence_length)`, *optional*): which positions count.
        normalized (`bool`, *optional*, defaults to `False`): divide each by the teacher's mean square, so that layers
            of any magnitude count alike, and models of any width (ours).

    Returns:
        `Tensor` of shape `()`: float32.
    """
    total = torch.zeros((), device=student[0].device)
    for mine, target in zip(student, teacher, strict=True):
        mine, target = _positions(mine, mask), _positions(target, mask)
        error = F.mse_loss(mine, target)
        total = total + (error / target.square().mean() if normalized else error)
    return total


def attentions_loss(student: tuple[Tensor, ...], teacher: tuple[Tensor, ...], mask: Tensor | None = None) -> Tensor:
    """
    Cross-entropy of the student's attention probabilities against the teacher's less the teacher's entropy
    (Kullback-Leibler divergence; MiniLM, arXiv 2002.10957, equation 2), summed over the layers.

    Args:
        student, teacher (`tuple` of `Tensor` of shape `(batch, heads, queries, keys)`): probabilities.
        mask (`Tensor` of shape `(batch, queries)`, *optional*): which queries count.

    Returns:
        `Tensor` of shape `()`: float32, the mean over examples, heads and queries.
    """
    total = torch.zeros((), device=student[0].device)
    for mine, target in zip(student, teacher, strict=True):
        mine, target = (_positions(probabilities.transpose(1, 2), mask) for probabilities in (mine, target))
        # A key that is padding has probability 0 in both.
        smallest = torch.finfo(mine.dtype).tiny
        divergence = target * (target.clamp_min(smallest).log() - mine.clamp_min(smallest).log())
        total = total + divergence.sum(-1).mean()
    return total


POOLINGS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mean": lambda states, mask: (states * mask).sum(1) / mask.sum(1).clamp_min(1.0),
    "cls": lambda states, mask: states[torch.arange(len(states), device=states.device), mask[..., 0].argmax(1)],
}
"""
How one embedding is made of a text's last hidden states, by Sentence Transformers' name: `(hidden states (batch,
sequence_length, hidden_size), mask (batch, sequence_length, 1)) -> embeddings (batch, hidden_size)`, all float32.
`mean` is that of the tokens that are no padding, `cls` the first of them.
"""


def pooled(states: Tensor, mask: Tensor | None = None, pooling: str = "mean") -> Tensor:
    """
    The embedding of each text, as Sentence Transformers pools it.

    Args:
        states (`Tensor` of shape `(batch, sequence_length, hidden_size)`): the last hidden states.
        mask (`Tensor` of shape `(batch, sequence_length)`, *optional*): the attention mask; all positions count when
            not given.
        pooling (`str`, *optional*, defaults to `"mean"`): a key of [`POOLINGS`].

    Returns:
        `Tensor` of shape `(batch, hidden_size)`: float32, not normalised.
    """
    counts = torch.ones(states.shape[:2], device=states.device) if mask is None else mask.float()
    return POOLINGS[pooling](states.float(), counts.unsqueeze(-1))


def embeddings_loss(student: Tensor, teacher: Tensor, mask: Tensor | None = None, pooling: str = "mean") -> Tensor:
    """
    1 less the cosine similarity of student's and teacher's embeddings of a text, which is what sentence encoders are
    compared by (ours).

    Args:
        student, teacher (`Tensor` of shape `(batch, sequence_length, hidden_size)`): the last hidden states.
        mask (`Tensor` of shape `(batch, sequence_length)`, *optional*): the attention mask.
        pooling (`str`, *optional*, defaults to `"mean"`): a key of [`POOLINGS`].

    Returns:
        `Tensor` of shape `()`: float32, the mean over the texts, between 0 and 2.
    """
    mine, target = pooled(student, mask, pooling), pooled(teacher, mask, pooling)
    return (1.0 - F.cosine_similarity(mine, target)).mean()


def _positions(values: Tensor, mask: Tensor | None) -> Tensor:
    """Float32 values of the positions that count; of all where no mask fits."""
    values = values.float()
    return values[mask.bool()] if mask is not None and values.shape[:2] == mask.shape and values.dim() > 2 else values


@dataclass(frozen=True)
class Comparison:
    """
    How the outputs of student and teacher are compared. `mask` of shape `(batch, sequence_length)` is the attention
    mask: which positions count. `temperature` is that of the logits; with `multi_label` each logit decides for itself.
    """

    mask: Tensor | None = None
    temperature: float = 1.0
    multi_label: bool = False


LOSSES: dict[str, Callable[[Any, Any, Comparison], Tensor]] = {
    "logits": lambda student, teacher, how: logits_loss(
        student["logits"], teacher["logits"], how.mask, how.temperature, how.multi_label
    ),
    "hidden_states": lambda student, teacher, how: hidden_states_loss(
        student["hidden_states"], teacher["hidden_states"], how.mask
    ),
    "normalized_hidden_states": lambda student, teacher, how: hidden_states_loss(
        student["hidden_states"], teacher["hidden_states"], how.mask, normalized=True
    ),
    "attentions": lambda student, teacher, how: attentions_loss(
        student["attentions"], teacher["attentions"], how.mask
    ),
    "mean_embeddings": lambda student, teacher, how: embeddings_loss(
        student["hidden_states"][-1], teacher["hidden_states"][-1], how.mask, "mean"
    ),
    "cls_embeddings": lambda student, teacher, how: embeddings_loss(
        student["hidden_states"][-1], teacher["hidden_states"][-1], how.mask, "cls"
    ),
}
"""
Distillation loss by name: `(student's outputs, teacher's outputs, comparison) -> loss ()`. The outputs are those of a
Transformers model.
"""

DEFAULT_LOSSES = {"logits": 1.0, "normalized_hidden_states": 1.0}
"""What a student learns from its teacher unless told otherwise."""

LABELS = "labels"
"""Name of the model's own loss, on the labels, beside those of [`LOSSES`]."""

OUTPUTS = {
    name: "output_attentions" if name == "attentions" else "output_hidden_states"
    for name in LOSSES
    if name != "logits"
}
"""Which argument of a model's forward makes it put out what a loss compares; `logits` need none."""


SAME = {
    "logits": ("num_labels", "problem_type"),
    "hidden_states": ("num_hidden_layers", "hidden_size"),
    "normalized_hidden_states": ("num_hidden_layers", "hidden_size"),
    "attentions": ("num_hidden_layers", "num_attention_heads"),
    "mean_embeddings": ("hidden_size",),
    "cls_embeddings": ("hidden_size",),
}
"""Which fields of the model's config student and teacher must share for a loss, beside the vocabulary."""


def distillation_loss(student: Any, teacher: Any, weights: dict[str, float], how: Comparison) -> Tensor:
    """Weighted sum of distillation losses, float32 of shape `()`; the weight of the labels is passed over."""
    terms = [weight * LOSSES[name](student, teacher, how) for name, weight in weights.items() if name != LABELS]
    return torch.stack(terms).sum()


def check_losses(weights: Any) -> dict[str, float]:
    """
    The weights of distillation losses as numbers. Raises a ValueError where a loss does not exist, a weight is no
    positive number, or the teacher is not asked for anything.
    """
    known = [*LOSSES, LABELS]
    if not isinstance(weights, dict) or not set(weights) <= set(known):
        raise ValueError(
            f"distillation_losses must give a weight to some of {known}, such as {{'logits': 1.0}}, got {weights!r}"
        )
    for name, weight in weights.items():
        is_number = isinstance(weight, int | float) and not isinstance(weight, bool)
        if not is_number or not 0 < weight < math.inf:
            raise ValueError(f"distillation_losses: the weight of {name!r} must be a number above 0, got {weight!r}")
    if not set(weights) - {LABELS}:
        raise ValueError(
            f"distillation_losses={weights!r} asks nothing of a teacher: name one of {list(LOSSES)}, or leave the "
            "teacher out"
        )
    return {name: float(weight) for name, weight in weights.items()}


def check_teacher(student: PreTrainedModel, teacher: PreTrainedModel, weights: dict[str, float]) -> None:
    """
    Checks that a student can learn from a teacher.

    Args:
        student, teacher (`PreTrainedModel`).
        weights (`dict[str, float]`): keys of [`LOSSES`], what is to be learned.

    Raises:
        ValueError: they are one object, the teacher is packed, or they differ in vocabulary, labels, number of layers,
            hidden size or attention heads where that matters.
    """
    if teacher is student:
        raise ValueError("the teacher is the student itself: load the float model once more, or copy.deepcopy it")
    quantization: Any = getattr(teacher.config, "quantization_config", None)
    if isinstance(quantization, StoMPPConfig) and quantization.state == "packed":
        raise ValueError(f"the teacher {teacher.name_or_path!r} is packed: name the float model that it was made from")
    needed = {"vocab_size"}.union(*(SAME[name] for name in weights if name != LABELS))
    for field in [field for field in _WAY_OUT if field in needed]:
        mine, others = (getattr(model.config, field, None) for model in (student, teacher))
        # A problem type that is not given is found from the first labels.
        if mine != others and (field != "problem_type" or None not in (mine, others)):
            raise ValueError(f"the teacher has {field}={others}, the student {field}={mine}. {_WAY_OUT[field]}")
    names = _class_names(student), _class_names(teacher)
    if "logits" in weights and None not in names and names[0] != names[1]:
        raise ValueError(
            f"the teacher's classes are {teacher.config.id2label}, the student's {student.config.id2label}: "
            "fine-tune the teacher on the same labels, in the same order"
        )


_WAY_OUT = {
    "vocab_size": "Both read the same token ids: take a teacher with the student's tokenizer",
    "num_labels": "Fine-tune the teacher on the same labels, or leave 'logits' out of distillation_losses",
    "problem_type": "Its logits mean something else: fine-tune the teacher on the same kind of labels",
    "num_hidden_layers": "Losses of hidden states and attentions compare layer with layer; {'logits': 1.0} does not",
    "hidden_size": "Losses of hidden states and embeddings compare feature with feature; {'logits': 1.0, "
    "'attentions': 1.0} does not",
    "num_attention_heads": "The loss of attentions compares head with head; {'logits': 1.0} does not",
}


def _class_names(model: PreTrainedModel) -> list[str] | None:
    """Names of the classes, None where nobody has given any."""
    id2label: dict[Any, Any] = dict(model.config.id2label or {})
    names = [id2label[index] for index in sorted(id2label)]
    return None if names == [f"LABEL_{index}" for index in range(len(names))] else names
