"""
What binarizing each part of a float model costs, one part at a time: units, kinds of linear layers, single layers.

Nothing is trained: activations get their scales and thresholds from one batch, weights are replaced by their signs.
That tells which parts to keep float, or to give float activations, not how good a trained binary model will be.
"""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..config import StoMPPConfig
from .conversion import binarize, commit
from .planning import plan_modules
from .report import FLOAT32_BYTES, packed_linear_bytes


if TYPE_CHECKING:
    from transformers import PreTrainedModel


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
        accuracy (`float`): share of right answers.
    """

    part: Part
    mode: str
    divergence: float
    accuracy: float


def linear_names(model: PreTrainedModel, inputs: Mapping[str, Any] | None = None) -> dict[str, str]:
    """
    The linear layers that [`binarize`] would replace, from input to output: name -> its encoder layer.

    Raises:
        ValueError: the encoder layers cannot be found, see [`~hf_stompp.model.planning.plan_modules`].
    """
    plan = plan_modules(model, StoMPPConfig(), inputs)
    return {name: entry.unit for name, entry in plan.items() if entry.is_linear}


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


def cost_of(part: Part, mode: str, logits: Tensor, float_logits: Tensor, labels: Tensor) -> Cost:
    """
    What a part costs, from the answers of the model in which it alone is binary.

    Args:
        part (`Part`), mode (`str`): see [`Cost`].
        logits (`Tensor` of shape `(examples, classes)`): of that model.
        float_logits (`Tensor` of the same shape): of the float model.
        labels (`Tensor` of shape `(examples,)`): classes, int64.
    """
    answers, expected = (F.log_softmax(one.float(), -1) for one in (logits, float_logits))
    divergence = F.kl_div(answers, expected, reduction="batchmean", log_target=True).item()
    accuracy = (logits.argmax(-1) == labels).float().mean().item()
    return Cost(part, mode, divergence, accuracy)


def suggest_modes(
    measured: Sequence[Cost], prices: Mapping[str, Mapping[str, float]], budget: float
) -> dict[str, str]:
    """
    A mode for every single layer, so that together they keep within a budget and lose little (ours).

    Every layer starts in its cheapest mode. Then, as long as one fits, the change comes next that saves most
    divergence for what it costs more. Divergences are taken for independent of each other, which they are not.

    Args:
        measured (`Sequence[Cost]`): those of single layers count. A float layer has none.
        prices (`dict[str, dict[str, float]]`): layer -> the modes that it may have -> price, in the budget's unit.
        budget (`float`): what all layers may cost together.

    Returns:
        `dict[str, str]`: layer -> mode.

    Raises:
        ValueError: the layers in their cheapest modes cost more than the budget, or one that has a price was not
            measured in a mode.
    """
    divergences = {(cost.part.name, cost.mode): cost.divergence for cost in measured if cost.part.detail == "module"}
    divergences |= {(name, "float"): 0.0 for name in prices}
    missing = [(name, mode) for name, modes in prices.items() for mode in modes if (name, mode) not in divergences]
    if missing:
        raise ValueError(f"suggest_modes needs the cost of {missing[0][0]} in mode {missing[0][1]}: measure it alone")
    modes = {
        name: min(options, key=lambda mode: (options[mode], divergences[name, mode]))
        for name, options in prices.items()
    }
    left = budget - sum(prices[name][mode] for name, mode in modes.items())
    if left < 0:
        raise ValueError(f"the layers need {budget - left:g} in their cheapest modes, and the budget is {budget:g}")
    while True:
        changes = [
            (saved / price if price > 0 else float("inf"), saved, price, name, mode)
            for name, options in prices.items()
            for mode in options
            if (saved := divergences[name, modes[name]] - divergences[name, mode]) > 0
            and (price := options[mode] - options[modes[name]]) <= left
        ]
        if not changes:
            return modes
        _, _, price, name, mode = max(changes)
        modes[name] = mode
        left -= price


def header_bytes(name: str) -> int:
    """
    Bytes at most that a tensor takes in the header of a file: name, dtype, shape and place, and its digest under its
    name (ours).
    """
    return 2 * len(name) + 200


def layer_bytes(model: PreTrainedModel, linears: Iterable[str]) -> dict[str, dict[str, float]]:
    """
    Bytes that each layer takes in the file of a packed model at most: layer -> mode -> bytes.

    Args:
        model (`PreTrainedModel`): float.
        linears (`Iterable[str]`): names of linear layers.
    """
    sizes: dict[str, dict[str, float]] = {}
    for name in linears:
        layer: Any = model.get_submodule(name)
        rows, columns = layer.weight.flatten(1).shape
        # A binary input has a threshold a feature or channel, and the offset of its levels makes a bias.
        bnn = packed_linear_bytes(rows, columns, has_bias=True) + layer.weight.shape[1] * FLOAT32_BYTES
        bwn = packed_linear_bytes(rows, columns, has_bias=layer.bias is not None)
        whole = sum(parameter.numel() * parameter.element_size() for parameter in layer.parameters())
        header = header_bytes(f"{name}.input_activation.threshold")
        sizes[name] = {"bnn": bnn + 4 * header, "bwn": bwn + 3 * header, "float": whole + 2 * header}
    return sizes


def as_options(modes: Mapping[str, str]) -> dict[str, Any]:
    """
    The modes of layers as arguments of [`StoMPPConfig`]: the most frequent is `mode`, the others are `modes`.

    Args:
        modes (`dict[str, str]`): layer -> `"bnn"`, `"bwn"` or `"float"`.
    """
    counts = Counter(mode for mode in modes.values() if mode != "float")
    most = max(counts, key=lambda mode: counts[mode], default="bnn")
    return {"mode": most, "modes": {re.escape(name): mode for name, mode in modes.items() if mode != most}}
