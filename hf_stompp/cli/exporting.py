"""`hf-stompp export`."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..export import export_onnx, sample_inputs
from .conversion import weight_bytes
from .errors import CommandError
from .models import load, local_folder, megabytes, read_config, state_of


@contextmanager
def _output_file(output: str, force: bool) -> Iterator[Path]:
    """
    The file to write, in a folder that is made where there is none, and that vanishes again if nothing was written.

    Args:
        output (`str`): the file that the user named.
        force (`bool`): whether it may be there.

    Raises:
        CommandError: it is a folder, does not end in `.onnx`, is there, or cannot be written to.
    """
    path = Path(output).expanduser()
    if path.is_dir():
        raise CommandError(f"{output} is a folder: name a file, such as {path / 'model.onnx'}")
    if path.suffix != ".onnx":
        raise CommandError(f"{output} does not end in .onnx: name the ONNX file to write")
    if os.path.lexists(path) and not force:
        raise CommandError(f"{output} is there: choose another file, or replace it with --force")
    made = [folder for folder in path.parents if not folder.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CommandError(
            f"cannot write to {path.parent} ({error.strerror}): choose another folder, or change its permissions"
        ) from error
    if not os.access(path.parent, os.W_OK):
        raise CommandError(f"cannot write to {path.parent}: choose another folder, or change its permissions")
    try:
        yield path
    finally:
        if not path.exists():
            for folder in made:
                folder.rmdir()


def run_export(arguments: argparse.Namespace) -> None:
    """Runs `hf-stompp export`."""
    config = read_config(arguments.model)
    state = state_of(config, arguments.model)
    advice = {
        "float": "a float model: torch.onnx.export takes it as it is",
        "latent": f"a latent model, and export takes a packed one: `hf-stompp pack {arguments.model} OUTPUT` first",
    }
    if state != "packed":
        raise CommandError(f"{arguments.model} is {advice[state]}")
    with _output_file(arguments.output, arguments.force) as path:
        source = local_folder(arguments.model)
        model = load(str(source), config)
        inputs = sample_inputs(model)
        try:
            export_onnx(model, path, inputs)
        except ImportError as error:
            raise CommandError(str(error)) from error
        result = {
            "model": arguments.model,
            "output": arguments.output,
            "class": type(model).__name__,
            "inputs": list(inputs),
            "bytes_before": weight_bytes(source),
            "bytes_after": path.stat().st_size,
        }
    if arguments.json:
        print(json.dumps(result, indent=2))
        return
    print(f"{result['class']}, inputs {', '.join(inputs)}")
    print(f"packed: {megabytes(weight_bytes(source))}  {arguments.model}")
    print(f"ONNX:   {megabytes(path.stat().st_size)}  {arguments.output}")
