"""The `hf-stompp` command."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Sequence
from contextlib import nullcontext

from .commands import parser
from .errors import explain
from .models import quiet_transformers


__all__ = ["main", "parser"]


def main(words: Sequence[str] | None = None) -> int:
    """
    Runs a command; `words` are those of the process when not given. Returns the exit status: 0, 2 after an error, 130
    after Ctrl-C, 141 where nobody reads stdout any more.
    """
    words = sys.argv[1:] if words is None else list(words)
    arguments = parser().parse_args(words, argparse.Namespace(words=words))
    try:
        with nullcontext() if arguments.debug else quiet_transformers():
            arguments.run(arguments)
        sys.stdout.flush()
    except BrokenPipeError:
        # `hf-stompp info | head -1`. Python would complain when it flushes on its way out.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        if arguments.debug:
            traceback.print_exc()
        print("\nhf-stompp: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if arguments.debug:
            traceback.print_exc()
        print(f"hf-stompp: {explain(error)}", file=sys.stderr)
        return 2
    return 0
