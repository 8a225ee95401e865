"""`hf-stompp export`."""

from __future__ import annotations

import argparse
from typing import Any

from ..export import export_onnx, sample_inputs
from ..output import bytes_of_weights
from .conversion import output_file
from .errors import CommandError
from .models import load, local_folder, megabytes, read_config, state_of


def run(arguments: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Runs `hf-stompp export`."""
    config = read_config(arguments.model)
    state = state_of(config, arguments.model)
    advice = {
        "float": "a float model: torch.onnx.export takes it as it is",
        "latent": f"a latent model, and export takes a packed one: `hf-stompp pack {arguments.model} OUTPUT` first",
    }
    if state != "packed":
        raise CommandError(f"{arguments.model} is {advice[state]}")
    with output_file(arguments.output, arguments.force, ".onnx") as path:
        source = local_folder(arguments.model)
        model = load(str(source), config)
        inputs = sample_inputs(model)
        export_onnx(model, path, inputs)
        result: dict[str, Any] = {
            "model": arguments.model,
            "output": arguments.output,
            "class": type(model).__name__,
            "inputs": list(inputs),
            "bytes_before": bytes_of_weights(source),
            "bytes_after": path.stat().st_size,
        }
    lines = [
        f"{result['class']}, inputs {', '.join(inputs)}",
        f"packed: {megabytes(result['bytes_before'])}  {arguments.model}",
        f"ONNX:   {megabytes(result['bytes_after'])}  {arguments.output}",
    ]
    return result, "\n".join(lines)
