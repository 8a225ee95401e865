"""Swaps modules by the plan: float ones for masked or packed ones, and packed ones for float ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import astuple, replace
from typing import Any, NamedTuple

import torch
from torch import nn

from ..config import StoMPPConfig
from ..nn import (
    MaskedBinaryActivation,
    MaskedBinaryConv2d,
    MaskedBinaryEmbedding,
    MaskedBinaryLinear,
    MaskedBinaryModule,
    MaskedBinarySign,
    PackedBinaryActivation,
    PackedBinaryConv2d,
    PackedBinaryEmbedding,
    PackedBinaryLinear,
    PackedBinarySign,
    PackedInt8Embedding,
    PackedResidualNorm,
    RoundedEmbedding,
)
from ..nn.convolution import Geometry
from ..nn.residual_norm import is_residual_norm
from ..plan import PlannedModule
from .cautions import attend, watch
from .modules import packed_modules


class Classes(NamedTuple):
    """What a module is in a float model, in a latent one and in a packed one."""

    float: type[nn.Module]
    masked: Any
    packed: Any


CLASSES = {
    "linear": Classes(nn.Linear, MaskedBinaryLinear, PackedBinaryLinear),
    "convolution": Classes(nn.Conv2d, MaskedBinaryConv2d, PackedBinaryConv2d),
    "activation": Classes(nn.Module, MaskedBinaryActivation, PackedBinaryActivation),
    "sign": Classes(nn.Module, MaskedBinarySign, PackedBinarySign),
    "embedding": Classes(nn.Embedding, MaskedBinaryEmbedding, PackedBinaryEmbedding),
    "int8_embedding": Classes(nn.Embedding, RoundedEmbedding, PackedInt8Embedding),
}
"""By the kind that the plan says; what a model of each state is checked against."""


def _sizes(layer: Any) -> tuple[Any, ...]:
    """What the constructors of masked and packed layers begin with."""
    if isinstance(layer, nn.Conv2d):
        return layer.in_channels, layer.out_channels, Geometry.of(layer)
    if isinstance(layer, MaskedBinaryConv2d | PackedBinaryConv2d):
        return layer.in_channels, layer.out_features, layer.geometry
    return layer.in_features, layer.out_features


def _activation_bits(entry: PlannedModule, config: StoMPPConfig) -> int | None:
    """To how many bits a layer rounds its input: linear layers alone, where that stays float."""
    return config.activation_bits if entry.kind == "linear" and not entry.reads_bits else None


def check_fits(model: nn.Module, config: StoMPPConfig) -> None:
    """
    Checks that a float or latent model has the modules that the config says are replaced, each of its kind. Raises a
    `ValueError` if there is no plan, or a module is missing, of another kind, or has parts where it must not.
    """
    if not config.plan:
        raise ValueError(
            "this checkpoint's quantization_config has no modules: it was not written by binarize() or pack()"
        )
    found = dict(model.named_modules())
    for name, entry in config.plan.items():
        module, expected = found.get(name), CLASSES[entry.kind][:2]
        if not isinstance(module, expected):
            what = "no such module" if module is None else f"a {type(module).__name__}"
            raise ValueError(
                f"{name}: quantization_config.modules says it is a {expected[0].__name__}, but {type(model).__name__} "
                f"has {what} there; load the checkpoint with the model class that wrote it"
            )
        stays_whole = entry.is_function and not isinstance(module, MaskedBinaryModule)
        if stays_whole and (any(True for _ in module.children()) or module.state_dict()):
            raise ValueError(
                f"{name}: quantization_config.modules says it is an activation function, but in "
                f"{type(model).__name__} it is a {type(module).__name__} with modules or tensors of its own; load the "
                "checkpoint with the model class that wrote it"
            )
        if entry.is_linear and not entry.bias and getattr(module, "bias", None) is not None:
            raise ValueError(
                f"{name}: quantization_config.modules says it has no bias, but in {type(model).__name__} it has "
                "one; load the checkpoint with the model class that wrote it"
            )


def _wire_inputs(model: nn.Module, config: StoMPPConfig, make: Callable[[nn.Module], nn.Module]) -> None:
    """Gives every linear layer the module that binarizes its input, made with `make(linear)` where it is its own."""
    modules = dict(model.named_modules())
    for name, entry in config.plan.items():
        source = entry.input
        if source is None or entry.kind == "sign":
            continue
        if entry.kind == "activation":
            producer: Any = modules[source]
            producer.put_out_signs_of(modules[name])
            continue
        linear: Any = modules[name]
        if source == name:
            linear.set_input_activation(make(linear), owned=True)
        elif isinstance(modules[source], MaskedBinaryActivation | PackedBinaryActivation):
            linear.set_input_activation(modules[source], owned=False, upstream=True)
        else:
            linear.set_input_activation(modules[source].input_activation, owned=False)


def _features(config: StoMPPConfig, name: str, modules: dict[str, nn.Module]) -> int:
    """Features of an activation, which its reader takes in; channels of a sign, those of the convolution before it."""
    entry = config.plan[name]
    if entry.kind == "sign":
        convolution: Any = modules[entry.input or ""]
        return int(convolution.out_channels)
    reader = next(entry for entry in config.plan.values() if entry.is_linear and entry.input == name)
    linear: Any = modules[reader.name]
    return int(linear.in_features)


def swap_in_masked(model: nn.Module, config: StoMPPConfig) -> None:
    """
    Replaces what the plan names in a float model by masked modules, in place, on any device (`meta` included). Weights
    are kept, not copied. Raises what [`check_fits`] does.
    """
    check_fits(model, config)
    modules = dict(model.named_modules())
    settings: dict[str, Any] = {
        "clip": config.weight_clip,
        "surrogate": config.surrogate,
        "window": config.weight_window,
    }

    def activation(features: int, device: torch.device, function: nn.Module | None = None) -> MaskedBinaryActivation:
        return MaskedBinaryActivation(
            features,
            activation=function,
            levels=config.feed_forward_levels if function is not None else "signed",
            clip=config.activation_clip,
            surrogate=config.surrogate,
            window=config.activation_window,
            scale=config.activation_scale,
            initial_scale=config.initial_activation_scale,
            shift=config.activation_shift,
            device=device,
        )

    device = next(model.parameters()).device
    for name, entry in config.plan.items():
        old: Any = modules[name]
        new: MaskedBinaryModule | RoundedEmbedding
        if entry.is_linear:
            place = {"device": old.weight.device, "dtype": old.weight.dtype}
            new = CLASSES[entry.kind].masked(
                *_sizes(old),
                entry.bias,
                scale=config.weight_scale,
                center=config.weight_center,
                activation_bits=_activation_bits(entry, config),
                **settings,
                **place,
            )
            new.weight = old.weight
            if old.bias is not None:
                new.bias = old.bias
        elif entry.kind == "embedding":
            place = {"device": old.weight.device, "dtype": old.weight.dtype}
            new = MaskedBinaryEmbedding(old.num_embeddings, old.embedding_dim, old.padding_idx, **settings, **place)
            new.weight = old.weight
        elif entry.kind == "int8_embedding":
            new = RoundedEmbedding.of(old)
        elif entry.kind == "sign":
            sign = {**settings, "clip": config.activation_clip, "window": config.activation_window}
            new = MaskedBinarySign(_features(config, name, modules), old, **sign, device=device)
        else:
            new = activation(_features(config, name, modules), device, old)
        new.train(old.training)
        model.set_submodule(name, new)

    def input_activation(linear: nn.Module) -> nn.Module:
        new = activation(int(linear.activation_features), linear.weight.device)  # type: ignore[arg-type]
        return new.train(linear.training)

    _wire_inputs(model, config, input_activation)
    watch(model)


def swap_in_packed(model: nn.Module, config: StoMPPConfig, dtype: torch.dtype | None = None) -> None:
    """
    Replaces what the plan names in a float or latent model by packed modules without values, in place, on any device
    (`meta` included). `dtype` is that of the output of packed word embeddings, their own when not given. Raises what
    [`check_fits`] does.
    """
    check_fits(model, config)
    modules = dict(model.named_modules())
    device = next(model.parameters()).device
    for name, entry in config.plan.items():
        old: Any = modules[name]
        new: nn.Module
        if entry.is_linear:
            new = CLASSES[entry.kind].packed(
                *_sizes(old),
                entry.bias,
                binary_input=entry.reads_bits,
                activation_bits=_activation_bits(entry, config),
                device=old.weight.device,
            )
        elif entry.is_embedding:
            place = {"device": old.weight.device, "dtype": dtype or old.weight.dtype}
            new = CLASSES[entry.kind].packed(old.num_embeddings, old.embedding_dim, old.padding_idx, **place)
        else:
            function = old.activation if isinstance(old, MaskedBinaryActivation) else old
            new = CLASSES[entry.kind].packed(_features(config, name, modules), function, device=device)
        new.train(old.training)
        model.set_submodule(name, new)

    def input_activation(linear: nn.Module) -> nn.Module:
        features: Any = linear.activation_features
        new = PackedBinaryActivation(features, device=linear.scale.device)  # type: ignore[arg-type]
        return new.train(linear.training)

    _wire_inputs(model, config, input_activation)
    _swap_in_norms(model, config)
    attend(model)


def _swap_in_norms(model: nn.Module, config: StoMPPConfig) -> None:
    """
    Replaces the blocks of sum and LayerNorm behind packed layers, and tells each what reads it: in order of depth, the
    next layer that binarizes its input.
    """
    modules = dict(model.named_modules())
    linears = [name for name, entry in config.plan.items() if entry.is_linear]
    for index, name in enumerate(linears):
        block_name, _, child = name.rpartition(".")
        if not block_name or child != "dense" or not is_residual_norm(modules[block_name]):
            continue
        block = PackedResidualNorm(modules[block_name])
        behind: list[Any] = [modules[other] for other in linears[index + 1 :]]
        reader = next((linear for linear in behind if linear.binarizes_input), None)
        if reader is not None and reader.in_features == modules[name].out_features:
            block.followed_by(reader.input_activation)
        model.set_submodule(block_name, block)


def swap_out_norms(model: nn.Module) -> None:
    """Gives a model its own blocks back in the place of [`PackedResidualNorm`]."""
    blocks = {name: module for name, module in model.named_modules() if isinstance(module, PackedResidualNorm)}
    for name, block in blocks.items():
        model.set_submodule(name, block.restored())


@torch.no_grad()
def swap_in_float(model: nn.Module, config: StoMPPConfig) -> None:
    """
    Replaces packed modules by float ones of the same values, and gives the activation functions back, in place. The
    plan of the config is told of biases that folding added.
    """
    packed = packed_modules(model)
    for name, entry in list(config.plan.items()):
        module: Any = packed[name]
        new: Any
        if entry.is_linear:
            sizes, has_bias = _sizes(module), module.bias is not None
            place = astuple(sizes[2]) if len(sizes) > 2 else ()
            new = CLASSES[entry.kind].float(*sizes[:2], *place, bias=has_bias, device=module.packed_weight.device)
            new.weight.copy_(module.float_weight(torch.float32))
            if has_bias:
                new.bias.copy_(module.bias)
            # Folding gave a bias to layers that had none.
            config.plan[name] = replace(entry, bias=has_bias)
        elif entry.is_embedding:
            rows = torch.arange(module.num_embeddings, device=module.scale.device)
            new = nn.Embedding.from_pretrained(module(rows), freeze=False)
            new.padding_idx = module.padding_idx
        else:
            new = module.activation
        model.set_submodule(name, new)
    swap_out_norms(model)
