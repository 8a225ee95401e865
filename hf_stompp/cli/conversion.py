"""`hf-stompp pack` and `hf-stompp unpack`."""

from __future__ import annotations

import argparse
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from ..model.card import model_card
from ..model.conversion import pack, unpack
from ..output import bytes_of_weights, copy_file, replacing
from .errors import CommandError
from .models import TOKENIZER_FILES, load, local_folder, megabytes, read_config, state_of


WEIGHTS = re.compile(
    r"model(\.safetensors(\.index\.json)?|-\d{5}-of-\d{5}\.safetensors)"
    r"|pytorch_model(\.bin(\.index\.json)?|-\d{5}-of-\d{5}\.bin)"
)
"""Names of the files that Transformers writes weights to."""


@contextmanager
def output_folder(output: str, force: bool, model: str) -> Iterator[Path]:
    """
    A new folder that takes the place of `output` when the block ends well, and vanishes when it does not, with the
    folders that were made for it: whoever reads `output` never finds half a model.

    `output` must not be `model`, the one that is read, and must be empty without `force`. With `force` a model that is
    there is replaced; files that are not the model's stay.
    """
    folder = Path(output).expanduser()
    if os.path.lexists(folder) and not folder.is_dir():
        raise CommandError(f"{output} is a file: name a folder")
    if folder.is_dir() and Path(model).expanduser().is_dir() and folder.samefile(Path(model).expanduser()):
        raise CommandError(f"{output} is the model that is read: choose another folder for the result")
    if folder.is_dir() and any(folder.iterdir()) and not force:
        raise CommandError(f"{output} is not empty: choose another folder, or replace the model in it with --force")
    # Within it where it is there: that is what may be written to, and moving a file stays a renaming.
    place = folder if folder.is_dir() else folder.parent
    with _parents_of(folder):
        try:
            place.mkdir(parents=True, exist_ok=True)
            work = Path(tempfile.mkdtemp(prefix=".hf_stompp-", dir=place))
        except OSError as error:
            raise _cannot_write(place, error) from error
        try:
            made = work / "new"
            made.mkdir()
            yield made
            if folder.is_dir():
                _replace_model(folder, made, work / "old")
            else:
                made.rename(folder)
        finally:
            shutil.rmtree(work, ignore_errors=True)


@contextmanager
def output_file(output: str | Path, force: bool, suffix: str = "") -> Iterator[Path]:
    """
    A file to write, which takes the place of `output` when the block ends well, and vanishes when it does not, with
    the folders that were made for it. That it cannot be written to shows before the block begins its work. Its name
    must end in `suffix`; with `force` a file that is there is replaced.
    """
    path = Path(output).expanduser()
    if path.is_dir():
        raise CommandError(f"{output} is a folder: name a file, such as {path / f'result{suffix}'}")
    if suffix and path.suffix != suffix:
        raise CommandError(f"{output} does not end in {suffix}: name such a file to write")
    if os.path.lexists(path) and not force:
        raise CommandError(f"{output} is there: choose another file, or replace it with --force")
    with _parents_of(path), ExitStack() as stack:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = stack.enter_context(replacing(path))
        except OSError as error:
            raise _cannot_write(path.parent, error) from error
        yield partial


@contextmanager
def _parents_of(path: Path) -> Iterator[None]:
    """Removes folders above a path that the block made, where the path is not there in the end."""
    missing = [folder for folder in path.parents if not folder.exists()]
    try:
        yield
    finally:
        if not path.exists():
            # Others may have put something there meanwhile.
            with suppress(OSError):
                for folder in filter(Path.is_dir, missing):
                    folder.rmdir()


def _cannot_write(folder: Path, error: OSError) -> CommandError:
    """What to do about a folder that takes no file."""
    return CommandError(
        f"cannot write to {folder} ({error.strerror}): choose another folder, or change its permissions"
    )


def _replace_model(folder: Path, new: Path, old: Path) -> None:
    """Moves a model's files from `new` into a folder, and then its other weights to `old`; or leaves it as it was."""
    names = sorted(path.name for path in new.iterdir())
    stale = [path.name for path in folder.iterdir() if WEIGHTS.fullmatch(path.name) and path.name not in names]
    old.mkdir()
    try:
        for name in names:
            if os.path.lexists(folder / name) and not (folder / name).is_dir():
                (folder / name).replace(old / name)
            (new / name).replace(folder / name)
        for name in stale:
            (folder / name).replace(old / name)
    except BaseException:
        for name in names:
            if not (new / name).exists():
                (folder / name).replace(new / name)
        for path in old.iterdir():
            path.replace(folder / path.name)
        raise


def _convert(
    arguments: argparse.Namespace,
    wanted: str,
    advice: dict[str, str],
    make: Callable[[Any], PreTrainedModel],
) -> tuple[dict[str, Any], str]:
    """
    Reads a model, makes another of it and saves that with the tokenizer. The model must have the state `wanted`;
    `advice` is what to say of one in another state.
    """
    config = read_config(arguments.model)
    state = state_of(config, arguments.model)
    if state != wanted:
        raise CommandError(f"{arguments.model} is {advice[state]}")
    with output_folder(arguments.output, arguments.force, arguments.model) as partial:
        source = local_folder(arguments.model)
        model = load(str(source), config)
        stompp: Any = model.config.quantization_config
        mode = stompp.mode
        made = make(model)
        made.save_pretrained(partial)
        folder = Path(arguments.output).expanduser().resolve()
        # A card that is there may be somebody's own.
        if getattr(made.config, "quantization_config", None) is not None and not (folder / "README.md").exists():
            model_card(made, folder.name, folder.name).save(partial / "README.md")
        for pattern in TOKENIZER_FILES:
            for path in source.glob(pattern):
                if path.is_symlink() or not path.is_dir():
                    copy_file(path, source, partial / path.name)
        result = {
            "model": arguments.model,
            "output": arguments.output,
            "class": type(made).__name__,
            "mode": mode,
            "bytes_before": bytes_of_weights(source),
            "bytes_after": bytes_of_weights(partial),
            "files": sorted(path.name for path in partial.iterdir()),
        }
    before, after = result["bytes_before"], result["bytes_after"]
    change = f"{before / after:.1f} times smaller" if after < before else f"{after / before:.1f} times larger"
    lines = [
        f"{result['class']}, mode {mode}",
        f"before: {megabytes(before)}  {arguments.model}",
        f"after:  {megabytes(after)}  {arguments.output}, {change}",
        f"files:  {', '.join(result['files'])}",
    ]
    return result, "\n".join(lines)


def run_pack(arguments: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Runs `hf-stompp pack`."""
    advice = {
        "float": "a float model, and pack takes a committed latent one: train it with StoMPPTrainer first; "
        f"`hf-stompp inspect {arguments.model}` shows what would be binary",
        "packed": f"packed already: use it as it is, or `hf-stompp unpack {arguments.model} OUTPUT` to train on",
    }
    return _convert(arguments, "latent", advice, pack)


def run_unpack(arguments: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Runs `hf-stompp unpack`."""
    advice = {
        "float": "a float model: there is nothing to unpack, use it as it is",
        "latent": "latent already: use it as it is, train on, or `hf-stompp pack` it",
    }

    def make(model: PreTrainedModel) -> PreTrainedModel:
        if not arguments.float:
            return unpack(model)
        stompp: Any = model.config.quantization_config
        if stompp.has_binary_activations:
            raise CommandError(
                "--float is for models of mode bwn: this one has binary activations too, which no plain float model "
                "computes; unpack it without --float, or write an ONNX file with `hf-stompp export`"
            )
        holder: Any = model
        return holder.dequantize()

    return _convert(arguments, "packed", advice, make)
