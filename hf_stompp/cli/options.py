"""What the arguments of several commands are made of."""

from __future__ import annotations

import argparse
import importlib
import json
import math
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..config import CHOICES
from ..data.tables import READERS
from ..training.distillation import check_losses
from .errors import CommandError


def run_of(module: str, function: str = "run") -> Callable[[argparse.Namespace], None]:
    """
    What a command runs: a function that returns what `--json` prints, and what is printed otherwise. Its module is
    imported when it runs: most need more than `--help` should wait for.
    """

    def run(arguments: argparse.Namespace) -> None:
        result, text = getattr(importlib.import_module(f".{module}", __package__), function)(arguments)
        print(json.dumps(result, indent=2) if arguments.json else text)

    return run


def read_losses(asked: str) -> dict[str, float]:
    """The value of `--losses`: JSON with a weight for each loss."""
    try:
        return check_losses(json.loads(asked))
    except json.JSONDecodeError as error:
        raise CommandError(f"--losses {asked!r} is no JSON ({error}): give a weight to each loss") from error


def _number(text: str, kind: Callable[[str], Any], fits: Callable[[Any], bool], wanted: str) -> Any:
    try:
        number = kind(text)
    except ValueError:
        number = None
    if number is None or not fits(number):
        raise argparse.ArgumentTypeError(f"must be {wanted}, got {text!r}")
    return number


def count(text: str) -> int:
    """A whole number from 1 on."""
    return _number(text, int, lambda number: number >= 1, "a whole number from 1 on")


def positive(text: str) -> float:
    """A number above 0."""
    return _number(text, float, lambda number: 0 < number < math.inf, "a number above 0")


def share(text: str) -> float:
    """A number between 0 and 1."""
    return _number(text, float, lambda number: 0 < number < 1, "a number between 0 and 1")


def option(parser: Any, name: str, **options: Any) -> None:
    """An option in both spellings that Transformers' scripts take: `--max_length` and `--max-length`."""
    parser.add_argument(*dict.fromkeys([name, f"--{name[2:].replace('_', '-')}"]), **options)


class Modes(argparse.Action):
    """Makes a dictionary of the words `PATTERN=MODE`."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: Any = None) -> None:
        pairs = [value.rpartition("=") for value in values]
        wrong = [value for value, (pattern, _, mode) in zip(values, pairs, strict=True) if not pattern or not mode]
        if wrong:
            parser.error(f"{option_string}: {wrong[0]!r} is no PATTERN=MODE")
        setattr(namespace, self.dest, {pattern: mode for pattern, _, mode in pairs})


def add_word_embeddings(group: Any) -> None:
    """`--word_embeddings`."""
    option(
        group,
        "--word_embeddings",
        choices=CHOICES["word_embeddings"],
        help="the word embedding table, the largest part of a packed file: float (default), int8 or binary",
    )


def add_modes(group: Any) -> None:
    """`--modes`."""
    group.add_argument(
        "--modes",
        nargs="+",
        action=Modes,
        metavar="PATTERN=MODE",
        help="another mode (bnn, bwn or float) for the linear layers whose names have parts that match a regular "
        "expression, such as attention=bwn 'layer\\.0=float'",
    )


def add_command(
    commands: Any, name: str, run: Callable[[argparse.Namespace], None], summary: str, description: str, *examples: str
) -> argparse.ArgumentParser:
    """A command whose help has a paragraph and examples."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=textwrap.fill(description, 88),
        epilog="\n".join(["examples:", *(f"  {example}" for example in examples)]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="print JSON, for scripts")
    # SUPPRESS: what was given before the command's name counts as well.
    parser.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help="show tracebacks of errors")
    parser.set_defaults(run=run)
    return parser


def add_output(parser: argparse.ArgumentParser, model: str) -> None:
    """A model to read, and a folder to write."""
    parser.add_argument("model", metavar="MODEL", help=model)
    parser.add_argument("output", metavar="OUTPUT", help="the folder to write; must be empty or new")
    parser.add_argument(
        "--force", action="store_true", help="replace the model in OUTPUT; files that are not the model's stay"
    )


def add_examples(parser: argparse.ArgumentParser) -> None:
    """What to measure a classifier with."""
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--file", type=Path, help=f"a file that ends in {', '.join(READERS)}")
    source.add_argument("--task", help="the validation set of a GLUE task, from the Hub or from --dataset_dir")
    option(
        parser,
        "--dataset_dir",
        type=Path,
        metavar="DIR",
        help="where to read --task instead: DIR/TASK/validation.parquet, or the Hub's validation-*.parquet",
    )
    option(parser, "--text_columns", nargs="+", metavar="NAME", help="one or two columns that hold the text")
    option(parser, "--label_column", default="label", metavar="NAME", help="default: label")
    option(parser, "--batch_size", type=count, default=32, metavar="N", help="default: 32")
    option(parser, "--max_length", type=count, default=128, metavar="N", help="tokens of a text (default: 128)")
    parser.add_argument("--device", help="default: cuda where there is one, otherwise cpu")
