"""Finds the layers that a progression moves through: of a Transformer encoder, or of a convolutional network."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from torch import nn


AMBIGUOUS_SHARE = 0.1
"""A second stack of layers with this share of the first one's weights makes the choice ambiguous."""


def _linear_weights(module: nn.Module) -> int:
    return sum(m.weight.numel() for m in module.modules() if type(m) is nn.Linear)


def _convolutions(module: nn.Module) -> int:
    return sum(type(m) is nn.Conv2d for m in module.modules())


def _kind_of_most_weights(model: nn.Module) -> str:
    """The class of the layers that hold most weights, embeddings apart."""
    weights = Counter[str]()
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, nn.Parameter) and weight.dim() > 1 and not isinstance(module, nn.Embedding):
            weights[type(module).__name__] += weight.numel()
    return max(weights, key=lambda kind: (weights[kind], kind == "Linear"), default="Linear")


@dataclass(frozen=True)
class Stack:
    """
    The layers that a progression moves through, by name, from input to output. `name` is that of their list, or of
    what holds all of their lists; `kind` says which layers in them become binary, `"linear"` or `"convolution"`.
    """

    name: str
    layers: dict[str, nn.Module]
    kind: str = "linear"

    @property
    def in_words(self) -> str:
        """What such a layer is called."""
        return {"linear": "linear layer"}.get(self.kind, self.kind)

    def binary_candidates(self) -> dict[str, Any]:
        """All layers of the kind, by name."""
        return {name: module for layer in self.layers for name, module in self.within(layer).items()}

    def within(self, layer: str) -> dict[str, Any]:
        """Those of one layer of the stack."""
        wanted = nn.Linear if self.kind == "linear" else nn.Conv2d
        named = self.layers[layer].named_modules(prefix=layer)
        return {name: module for name, module in named if type(module) is wanted}


def find_stack(model: nn.Module, layer_stack: str | None = None) -> Stack:
    """
    The stack of layers of a Transformer encoder, see [`find_layer_stack`], or the blocks of a convolutional network,
    see [`find_blocks`]. `layer_stack` names their list, where it is not to be searched. Raises a `ValueError` if there
    is neither.
    """
    # A list of bare linear layers beside convolutions is that of the heads.
    of_a_transformer = [
        name
        for name, layers in _lists_of_linear_layers(model).items()
        if any(type(layer) is not nn.Linear for layer in layers)
    ]
    if layer_stack is None and not of_a_transformer and _kind_of_most_weights(model) == "Conv2d":
        blocks = find_blocks(model)
        if blocks:
            return Stack(type(model).__name__, blocks, "convolution")
    name, layers = find_layer_stack(model, layer_stack)
    by_name = {f"{name}.{i}": layer for i, layer in enumerate(layers)}
    return Stack(name, by_name, "linear" if any(map(_linear_weights, layers)) else "convolution")


def find_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """
    The blocks of a convolutional network, by name, in the order of the model: what the innermost lists of modules hold
    that are of one class, with two or more convolutions in each. Empty where there are none.
    """
    lists = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList | nn.Sequential)
        and len({type(block) for block in module}) == 1
        and all(_convolutions(block) > 1 for block in module)
    }
    innermost = [name for name in lists if not any(other.startswith(f"{name}.") for other in lists)]
    return {f"{name}.{i}": block for name in innermost for i, block in enumerate(lists[name])}


def _lists_of_linear_layers(model: nn.Module) -> dict[str, nn.ModuleList]:
    """The outermost lists of modules of one class that hold linear layers, by name."""
    found: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        inside_another = any(name.startswith(f"{other}.") for other in found)
        if not isinstance(module, nn.ModuleList) or len(module) == 0 or inside_another:
            continue
        if len({type(layer) for layer in module}) == 1 and all(_linear_weights(layer) for layer in module):
            found[name] = module
    return found


def find_layer_stack(model: nn.Module, layer_stack: str | None = None) -> tuple[str, list[nn.Module]]:
    """
    Name and layers, from input to output, of the encoder's stack: the outermost `nn.ModuleList` of modules of one
    class that hold linear layers, or the list that `layer_stack` names. Raises a `ValueError` if there is none, or
    there are several of similar size.
    """
    if layer_stack is not None:
        modules = dict(model.named_modules())
        stack = modules.get(layer_stack)
        if not isinstance(stack, nn.ModuleList | nn.Sequential) or len(stack) == 0:
            lists = [name for name, m in modules.items() if isinstance(m, nn.ModuleList | nn.Sequential) and len(m)]
            raise ValueError(
                f"StoMPPConfig.layer_stack={layer_stack!r} names no list of layers in {type(model).__name__}; its "
                f"lists: {lists}"
            )
        return layer_stack, list(stack)
    found = _lists_of_linear_layers(model)
    if not found:
        kind = _kind_of_most_weights(model)
        if kind not in ("Linear", "Conv2d"):
            raise ValueError(
                f"{type(model).__name__} cannot be binarized: its layers are {kind}, and only nn.Linear and nn.Conv2d "
                "become binary. Choose a Transformer encoder such as BERT, RoBERTa or ViT, or a network such as ResNet"
            )
        missing = {
            "Linear": "no nn.ModuleList of modules of one class that hold nn.Linear",
            "Conv2d": "no list of modules of one class that hold two or more nn.Conv2d each",
        }
        raise ValueError(
            f"{type(model).__name__} has no stack of layers: {missing[kind]}. If the layers are kept elsewhere, name "
            "their list in StoMPPConfig(layer_stack=...)"
        )
    by_size = sorted(found, key=lambda name: _linear_weights(found[name]), reverse=True)
    if len(by_size) > 1 and _linear_weights(found[by_size[1]]) >= AMBIGUOUS_SHARE * _linear_weights(found[by_size[0]]):
        raise ValueError(
            f"{type(model).__name__} has several stacks of layers, {by_size}: name the one to binarize in "
            "StoMPPConfig(layer_stack=...)"
        )
    return by_size[0], list(found[by_size[0]])
