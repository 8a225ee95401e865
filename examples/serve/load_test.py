"""
How many requests a server of `server.py` answers, how late, and in how much memory: float, int8 and packed models.

    taskset -c 0 python examples/serve/load_test.py float=FOLDER packed=FOLDER/packed --cores 1 --output load.json

Each model gets a server of its own, one after another, on the cores `--cores`; a float model gets another one in int8.
Each client sends a text as soon as the one before is answered. The machine should have nothing else to do.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import random
import shlex
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from hf_stompp.machine import command_line, surroundings
from hf_stompp.output import write_json


SERVER = Path(__file__).parent / "server.py"

TEXTS = [
    "Dull.",
    "A small miracle.",
    "I want my evening back.",
    "Nobody in it seems to have met a child before.",
    "The songs are better than the plot, and the plot is not bad.",
    "It begins as a comedy, turns into a trial, and is at its best when it is neither.",
    "Two hours of people explaining to each other what we have just seen them do.",
    "She plays the widow without a single tear, and it is the saddest thing on a screen this year.",
    "If you liked the book, read the book again.",
    "The last shot alone, a long look out of a bus window, is worth the ticket and the babysitter.",
    "A thriller that hides its secret so well that in the end it cannot find it itself.",
    "Warm, slow, a little too pleased with its own kindness, but I left the cinema whistling.",
    "The director has watched every heist film ever made and learned from them that there must be a van.",
    "My father, who sleeps through everything, stayed awake. He says that it was the noise.",
    "There is a scene with a dog, a ladder and a bishop that I shall tell my grandchildren about, and around it lies "
    "a film that I have already begun to forget.",
    "Everybody speaks as if they had been handed the page a minute ago, and the camera moves about the rooms like "
    "somebody who has lost his keys, which is a pity, because the story underneath is a good one.",
    "For an hour it is the best film about work that I know: the early trains, the jokes that only four people "
    "understand, the way a hand goes to the switch without anybody looking. Then somebody finds a gun, and it becomes "
    "a film like any other.",
    "I went in with no hopes at all, since the first part had been a long advertisement for its own second part, and "
    "came out moved, surprised and rather ashamed of myself. The jokes land, the villain has a point, the battle is "
    "short, and for once the hero's mother is allowed to be cleverer than anybody else in the room. It will not "
    "change the world, but it has changed my week.",
    "The costumes are lovely. The candles are lovely, too, and so are the horses, the snow on the roofs and the "
    "letters that are read aloud by people who are no longer there. What is missing is any reason to care who gets "
    "which house. By the time the will was opened for the third time, a man behind me had begun to read his messages "
    "aloud to his wife, and several of us were listening to him with more interest than to the screen.",
]


class Client(threading.Thread):
    """Sends texts one after another until a time, and keeps what came of it."""

    def __init__(self, port: int, texts: list[str], draw: random.Random, end: float) -> None:
        super().__init__()
        self.connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        self.texts, self.draw, self.end = texts, draw, end
        self.seconds: list[float] = []
        self.errors: Counter[str] = Counter()
        self.scores: list[tuple[str, float]] = []

    def run(self) -> None:
        while time.monotonic() < self.end:
            text = self.draw.choice(self.texts)
            start = time.perf_counter()
            try:
                (answer,) = self.ask(text)
            except (OSError, ValueError, http.client.HTTPException) as error:
                self.errors[str(error) or type(error).__name__] += 1
                self.connection.close()
                continue
            self.seconds.append(time.perf_counter() - start)
            self.scores.append((text, next(iter(answer["scores"].values()))))
        self.connection.close()

    def ask(self, text: str) -> list[dict[str, Any]]:
        body = json.dumps({"texts": [text]}).encode()
        self.connection.request("POST", "/predict", body, {"Content-Type": "application/json"})
        response = self.connection.getresponse()
        content = response.read()
        if response.status != 200:
            raise ValueError(f"status {response.status}")
        found: list[dict[str, Any]] = json.loads(content)["predictions"]
        return found


@contextmanager
def serving(words: list[str], cores: set[int] | None = None) -> Iterator[tuple[subprocess.Popen, int]]:
    """A server that answers, and its port; it is told to end afterwards."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    before = os.sched_getaffinity(0)
    # A child runs where its parent runs when it starts.
    os.sched_setaffinity(0, cores or before)
    try:
        process = subprocess.Popen([sys.executable, str(SERVER), *words, "--port", str(port)])
    finally:
        os.sched_setaffinity(0, before)
    try:
        while not is_up(port):
            if process.poll() is not None:
                raise RuntimeError(f"the server of {shlex.join(words)} ended with status {process.returncode}")
            time.sleep(0.1)
        yield process, port
    finally:
        process.terminate()
        process.wait(60)


def is_up(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


def resident_bytes(process: subprocess.Popen) -> int:
    fields = dict(line.split(":") for line in Path(f"/proc/{process.pid}/status").read_text().splitlines())
    return int(fields["VmRSS"].split()[0]) * 1024


def measure(words: list[str], texts: list[str], arguments: argparse.Namespace) -> dict[str, Any]:
    """What clients see of one server, and what it takes."""
    words = [*words, "--threads", str(arguments.threads), "--max_batch_size", str(arguments.max_batch_size)]
    with serving(words, arguments.cores) as (process, port):
        start = time.monotonic()
        draws = [random.Random(f"{arguments.seed} {number}") for number in range(arguments.clients)]
        clients = [Client(port, texts, draw, start + arguments.seconds) for draw in draws]
        for client in clients:
            client.start()
        time.sleep(min(10, arguments.seconds / 2))
        early = resident_bytes(process)
        for client in clients:
            client.join()
        # The last answers come after the time is up.
        span = time.monotonic() - start
        late = resident_bytes(process)
    return {**figures(clients, span), "resident_bytes": {"after_ten_seconds": early, "at_the_end": late}}


def figures(clients: list[Client], span: float) -> dict[str, Any]:
    """
    What the clients of one server saw together, who have ended, in the seconds from the first request to the last
    answer: plain JSON. Percentiles are `None` when no request was answered.
    """
    seconds = [second for client in clients for second in client.seconds]
    scores: dict[str, list[float]] = {}
    for text, score in (pair for client in clients for pair in client.scores):
        scores.setdefault(text, []).append(score)
    percentiles = np.percentile(seconds, [50, 95, 99]).tolist() if seconds else [None] * 3
    return {
        "requests": len(seconds),
        "seconds": round(span, 3),
        "requests_per_second": round(len(seconds) / span, 1),
        "milliseconds": {
            name: None if value is None else round(1000 * value, 1)
            for name, value in zip(("median", "p95", "p99"), percentiles, strict=True)
        },
        "errors": dict(sum((client.errors for client in clients), Counter())),
        "score_changes_with_batch": round(max((max(found) - min(found) for found in scores.values()), default=0), 6),
    }


def is_packed(folder: Path) -> bool:
    return "quantization_config" in json.loads((folder / "config.json").read_text(encoding="utf-8"))


def table(result: dict[str, Any]) -> str:
    """Markdown: a row a model."""
    lines = [
        "| model | requests/s | median ms | p95 | p99 | errors | MiB after 10 s | at the end | score changes by |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, row in result["models"].items():
        times = [f"{row['milliseconds'][key]}" for key in ("median", "p95", "p99")]
        sizes = [f"{size / 2**20:.0f}" for size in row["resident_bytes"].values()]
        errors, changes = str(sum(row["errors"].values())), f"{row['score_changes_with_batch']:.1g}"
        lines.append(f"| {' | '.join([name, str(row['requests_per_second']), *times, errors, *sizes, changes])} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Measures each model, and prints and writes what was found."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("models", nargs="+", metavar="NAME=FOLDER")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=60, help="for each model")
    parser.add_argument("--texts", type=Path, help="a file with a text a line; without one, film reviews made up here")
    parser.add_argument("--seed", type=int, default=0, help="of what each client draws from the texts")
    parser.add_argument("--threads", type=int, default=1, help="of each server")
    parser.add_argument("--max_batch_size", type=int, default=8)
    parser.add_argument(
        "--cores", type=int, nargs="+", help="of the servers, such as 1; the clients stay where they are"
    )
    parser.add_argument("--output", type=Path, help="gets the result, as JSON")
    arguments = parser.parse_args(argv)
    missing = [given for given in arguments.models if not Path(given.partition("=")[2], "config.json").is_file()]
    if missing:
        parser.error(f"{missing}: give every model as NAME=FOLDER, with a folder that holds one")
    arguments.cores = set(arguments.cores or ())
    texts = arguments.texts.read_text(encoding="utf-8").splitlines() if arguments.texts else TEXTS
    models = {}
    for name, _, folder in (given.partition("=") for given in arguments.models):
        models[name] = measure([folder], texts, arguments)
        if not is_packed(Path(folder)):
            models[f"{name}, int8"] = measure([folder, "--quantize", "int8"], texts, arguments)
    result = {
        **{name: getattr(arguments, name) for name in ("clients", "seconds", "threads", "max_batch_size", "seed")},
        "texts": len(texts),
        "models": models,
        **surroundings(),
        "command": command_line(["python", "examples/serve/load_test.py", *(sys.argv[1:] if argv is None else argv)]),
    }
    print(table(result))
    if arguments.output is not None:
        write_json(arguments.output, result)
    return result


if __name__ == "__main__":
    main()
