"""
What binarizing each part of a float model costs, one part at a time: units, kinds of linear layers, single layers.

Nothing is trained: activations get their scales and thresholds from one batch, weights are replaced by their signs.
That tells which parts to keep float, or to give float activations, not how good a trained binary model will be.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from .binarization import binarize, commit
from .config import StoMPPConfig
from .structure import plan_modules


DETAILS = ("unit", "kind", "module")
"""Parts that are measured: an encoder layer; every layer of one name, such as all queries; a single linear layer."""


@dataclass(frozen=True)
class Part:
    """
    Linear layers that are binarized together.

    Args:
        detail (`str`): one of [`DETAILS`].
        name (`str`): of the unit or module, or what the names of a kind end with.
        modules (`tuple[str]`): names of the linear layers.
    """

    detail: str
    name: str
    modules: tuple[str, ...]


@dataclass(frozen=True)
class Cost:
    """
    What it costs to binarize a part alone.

    Args:
        part (`Part`).
        mode (`str`): `"bnn"` or `"bwn"`.
        divergence (`float`): Kullback-Leibler divergence of the answers from the float model's, mean over examples, in
            nats.
        accuracy (`float`, *optional*): share of right answers; where labels are known.
    """

    part: Part
    mode: str
    divergence: float
    accuracy: float | None


def linear_names(model: PreTrainedModel, inputs: Mapping[str, Any] | None = None) -> dict[str, str]:
    """
    The linear layers that [`binarize`] would replace, from input to output: name -> its encoder layer.

    Raises:
        ValueError: the encoder layers cannot be found, see [`~hf_stompp.structure.plan_modules`].
    """
    plan = plan_modules(model, StoMPPConfig(), inputs)
    return {name: entry["unit"] for name, entry in plan.items() if entry["kind"] == "linear"}


def parts_of(linears: Mapping[str, str]) -> list[Part]:
    """
    All parts, coarse ones first.

    Args:
        linears (`dict[str, str]`): name -> encoder layer, see [`linear_names`].
    """
    groups: dict[tuple[str, str], list[str]] = {}
    for name, unit in linears.items():
        groups.setdefault(("unit", unit), []).append(name)
        groups.setdefault(("kind", name.removeprefix(f"{unit}.")), []).append(name)
        groups.setdefault(("module", name), []).append(name)
    parts = [Part(detail, name, tuple(modules)) for (detail, name), modules in groups.items()]
    return sorted(parts, key=lambda part: DETAILS.index(part.detail))


def binarized_alone(
    model: PreTrainedModel, part: Part, mode: str, linears: Mapping[str, str], inputs: Mapping[str, Any]
) -> PreTrainedModel:
    """
    A copy of a float model in which one part is binary, and everything else as it was.

    Args:
        model (`PreTrainedModel`): float.
        part (`Part`).
        mode (`str`): `"bnn"` or `"bwn"`.
        linears (`dict[str, str]`): from [`linear_names`].
        inputs (`dict[str, Any]`): a batch for the first scales and thresholds of activations.
    """
    modes = {re.escape(name): mode if name in part.modules else "float" for name in linears}
    binary = binarize(copy.deepcopy(model), StoMPPConfig(modes=modes)).eval()
    with torch.no_grad():
        binary(**inputs)
    return commit(binary)


def cost_of(part: Part, mode: str, logits: Tensor, float_logits: Tensor, labels: Tensor | None = None) -> Cost:
    """
    What a part costs, from the answers of the model in which it alone is binary.

    Args:
        part (`Part`), mode (`str`): see [`Cost`].
        logits (`Tensor` of shape `(examples, classes)`): of that model.
        float_logits (`Tensor` of the same shape): of the float model.
        labels (`Tensor` of shape `(examples,)`, *optional*): classes, int64.
    """
    answers, expected = (F.log_softmax(one.float(), -1) for one in (logits, float_logits))
    divergence = F.kl_div(answers, expected, reduction="batchmean", log_target=True).item()
    accuracy = None if labels is None else (logits.argmax(-1) == labels).float().mean().item()
    return Cost(part, mode, divergence, accuracy)


def suggest_modes(measured: list[Cost], keep: int, mode: str = "bwn") -> dict[str, str]:
    """
    The layers that cost most when they are binary, for `StoMPPConfig(modes=...)`. Costs are taken for independent of
    each other, which they are not.

    Args:
        measured (`list[Cost]`): those of single layers in mode `"bnn"` count.
        keep (`int`): number of layers.
        mode (`str`, *optional*, defaults to `"bwn"`): what they become: `"bwn"` or `"float"`.

    Raises:
        ValueError: no single layer was measured in mode `"bnn"`.
    """
    single = [cost for cost in measured if cost.part.detail == "module" and cost.mode == "bnn"]
    if not single:
        raise ValueError("suggest_modes needs the costs of single layers in mode bnn: measure the detail 'module'")
    worst = sorted(single, key=lambda cost: -cost.divergence)[:keep]
    return {re.escape(cost.part.name): mode for cost in worst}
