"""`hf-stompp bench`."""

from __future__ import annotations

import argparse
import json
import shlex
from pathlib import Path

from .. import benchmark


def run(arguments: argparse.Namespace) -> None:
    """Runs `hf-stompp bench`."""
    all_levels = ["op", "model"] if arguments.quick else ["op", "model", "loading"]
    levels = all_levels if arguments.level == "all" else [arguments.level]
    # A path would tell whose machine it was.
    command = shlex.join(["hf-stompp", *(Path(word).name if "/" in word else word for word in arguments.words)])
    if arguments.output is not None:
        # Now, not when ten minutes of measuring are done.
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
    result = benchmark.run(levels, arguments.threads, arguments.kernels, command, arguments.quick)
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2) if arguments.json else benchmark.table(result))
