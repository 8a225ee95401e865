"""`hf-stompp inspect`."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from ..config import StoMPPConfig
from ..model.modules import PackedModule
from ..model.planning import plan_modules
from ..model.report import BinarizationReport, report
from ..model.swap import swap_in_masked
from ..nn import MaskedBinaryModule, RoundedEmbedding
from ..output import printable
from .errors import CommandError
from .models import empty_model, frozen_fractions, load, megabytes, read_config, state_of


CONFIG_OPTIONS = ("mode", "modes", "unit", "word_embeddings", "modules_to_not_convert", "layer_stack")
"""The fields of `StoMPPConfig` that change what becomes binary, and how it is counted."""


def read_example_inputs(file: str) -> dict[str, Tensor]:
    """Forward arguments of a model, from a safetensors file."""
    try:
        return load_file(Path(file).expanduser())
    except (OSError, SafetensorError) as error:
        raise CommandError(
            f"--example_inputs {file} cannot be read ({error}): name a file that safetensors.torch.save_file({{...}}) "
            "wrote, with a tensor for each argument of the model's forward"
        ) from error


def _planned(config: PreTrainedConfig, model: str, options: dict[str, Any]) -> tuple[PreTrainedModel, StoMPPConfig]:
    """What a float model would become, without its weights."""
    stompp = StoMPPConfig(**options)
    inputs = stompp.example_inputs

    def plan_on(device: str) -> PreTrainedModel:
        planned = empty_model(config, model, device)
        given = None if inputs is None else {name: tensor.to(device) for name, tensor in inputs.items()}
        stompp.plan = plan_modules(planned, stompp, given)
        return planned

    try:
        planned = plan_on("meta")
    except ValueError as error:
        if not isinstance(error.__cause__, RuntimeError):
            raise
        # Some models (DeBERTa) read values on their way, which the meta device does not have.
        planned = plan_on("cpu")
    swap_in_masked(planned, stompp)
    return planned, stompp


def _float_bytes(model: PreTrainedModel) -> dict[str, int]:
    """Bytes of what stays float, by module, the largest first."""
    sizes = {
        name: sum(parameter.numel() * parameter.element_size() for parameter in module.parameters(recurse=False))
        for name, module in model.named_modules()
        if not isinstance(module, MaskedBinaryModule | PackedModule | RoundedEmbedding)
    }
    return {name: size for name, size in sorted(sizes.items(), key=lambda item: -item[1]) if size}


def inspect(model: str, options: dict[str, Any]) -> tuple[dict[str, Any], BinarizationReport]:
    """
    What `hf-stompp inspect` tells, and the sizes of units under names that can be printed. `options` are fields of
    [`StoMPPConfig`], for a float model alone.
    """
    config = read_config(model)
    state = state_of(config, model)
    if state == "float":
        found, stompp = _planned(config, model, options)
    elif options:
        raise CommandError(
            f"{model} is {state}: what is binary in it was decided before, and --{next(iter(options))} is for float "
            "models; leave it out"
        )
    else:
        found = load(model, config)
        stompp = found.config.quantization_config
    sizes = report(found, stompp)
    shown = BinarizationReport([replace(row, unit=printable(row.unit)) for row in sizes.units])
    result = {
        "model": model,
        "class": type(found).__name__,
        "state": state,
        "options": {name: getattr(stompp, name) for name in CONFIG_OPTIONS},
        "units": [asdict(unit) for unit in sizes.units],
        "total": asdict(sizes.total),
        "frozen_fractions": frozen_fractions(found),
        "float_modules": _float_bytes(found),
        "modules": stompp.modules,
    }
    return result, shown


def _lines(result: dict[str, Any], sizes: BinarizationReport) -> Iterator[str]:
    options, total, state = result["options"], result["total"], result["state"]
    what = "float; what binarize() would make of it" if state == "float" else state
    names = {name: printable(name) for name in [*result["float_modules"], *result["frozen_fractions"]]}
    others = "".join(f", {mode} where {printable(pattern)}" for pattern, mode in (options["modes"] or {}).items())
    yield f"{result['model']}: {result['class']}, {what} (mode {options['mode']}{others}, unit {options['unit']})\n"
    yield f"{sizes}\n"
    binary, weights = total["binary_weights"], total["binary_weights"] + total["float_weights"]
    yield f"1-bit: {binary:,} of {weights:,} weights ({binary / weights:.1%})"
    ratio = total["bytes_before"] / total["bytes_packed"]
    yield (
        f"size: {megabytes(total['bytes_before'])} float, {megabytes(total['bytes_packed'])} packed, "
        f"{ratio:.1f} times smaller"
    )
    largest = [f"{names[name]} {megabytes(size)}" for name, size in list(result["float_modules"].items())[:3]]
    yield f"stays float: {', '.join(largest)}, and {max(0, len(result['float_modules']) - 3)} smaller modules"
    if state == "latent":
        free = [names[unit] for unit, fraction in result["frozen_fractions"].items() if fraction < 1.0]
        yield f"frozen: {'everything, it can be packed' if not free else 'not yet all of ' + ', '.join(free)}"


def run(arguments: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Runs `hf-stompp inspect`."""
    given = {name: getattr(arguments, name) for name in CONFIG_OPTIONS}
    if arguments.example_inputs is not None:
        given["example_inputs"] = read_example_inputs(arguments.example_inputs)
    result, sizes = inspect(arguments.model, {name: value for name, value in given.items() if value is not None})
    return result, "\n".join(_lines(result, sizes))
