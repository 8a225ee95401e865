"""
What a classifier can do and what it costs: accuracy, size and latency of float, int8 and binary models, in one run.

    python benchmarks/tradeoff.py "float=accuracy_runs/validation-sst2-float-..." "bwn=.../packed" --dataset_dir DIR \\
        --output tradeoff.json --plot tradeoff.png
    python benchmarks/tradeoff.py --show tradeoff.json --plot tradeoff.png

Every model is a name and a folder. A float one is measured as it is and with torch's dynamic int8 linear layers, a
packed one as it is. A bag of words (TF-IDF of words and pairs of words, logistic regression) stands beside them.
Latency is that of one sentence at a time on one thread, from text to class, tokenizer included: the models take each
of the same sentences in turn. The machine should have nothing else to do.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import pickle
import random
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from hf_stompp.benchmark import dynamic_int8, torch_threads
from hf_stompp.machine import command_line, surroundings
from hf_stompp.model.modules import packed_modules
from hf_stompp.output import bytes_of_weights


KINDS = {
    "float": ("#555555", "o", "float"),
    "int8": ("#8c6bb1", "s", "dynamic int8"),
    "binary": ("#2a78b5", "D", "1-bit, packed"),
    "bag": ("#d08a28", "^", "bag of words"),
}
"""Colour, marker and name in the figure of each kind of model."""


@dataclass(frozen=True)
class Candidate:
    """A classifier to measure: its kind, of [`KINDS`], a function from texts to classes, and its bytes on disk."""

    kind: str
    classify: Callable[[list[str]], list[int]]
    bytes: int


def classifier(model: Any, tokenizer: Any, max_length: int) -> Callable[[list[str]], list[int]]:
    """Texts to classes, by a model of Transformers."""

    def classify(texts: list[str]) -> list[int]:
        batch = tokenizer(texts, truncation=True, max_length=max_length, padding=True, return_tensors="pt")
        with torch.inference_mode():
            found: list[int] = model(**batch).logits.argmax(-1).tolist()
        return found

    return classify


def saved_bytes(model: nn.Module) -> int:
    """Bytes of a state dict as `torch.save` writes it, which is how int8 layers are saved."""
    stream = io.BytesIO()
    torch.save(model.state_dict(), stream)
    return stream.tell()


def load(name: str, folder: Path, max_length: int) -> dict[str, Candidate]:
    """A packed model, or a float one and its int8 copy, by name."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    answer, size = classifier(model, tokenizer, max_length), bytes_of_weights(folder)
    if packed_modules(model):
        return {name: Candidate("binary", answer, size)}
    int8 = dynamic_int8(model)
    return {
        name: Candidate("float", answer, size),
        f"{name}, int8": Candidate("int8", classifier(int8, tokenizer, max_length), saved_bytes(int8)),
    }


def bag_of_words(texts: list[str], labels: list[int]) -> Candidate:
    """TF-IDF of words and pairs of words, and logistic regression."""
    from bag_of_words import linear_model, vectorizer
    from sklearn.pipeline import make_pipeline

    pipeline = make_pipeline(vectorizer(), linear_model()).fit(texts, labels)
    return Candidate("bag", lambda texts: list(pipeline.predict(texts)), len(pickle.dumps(pipeline)))


def accuracy(candidate: Candidate, texts: list[str], labels: list[int], batch: int = 64) -> float:
    """In percent, in batches of texts of about one length."""
    order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
    right = 0
    for start in range(0, len(order), batch):
        rows = order[start : start + batch]
        found = candidate.classify([texts[row] for row in rows])
        right += sum(int(one == labels[row]) for one, row in zip(found, rows, strict=True))
    return 100 * right / len(texts)


def latencies(candidates: Mapping[str, Candidate], texts: list[str], rounds: int) -> dict[str, float]:
    """Median over texts and rounds of the milliseconds that one text takes; the models take each text in turn."""
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    for candidate in candidates.values():
        candidate.classify(texts[:1])
    for text in texts * rounds:
        for name, candidate in candidates.items():
            start = time.perf_counter()
            candidate.classify([text])
            samples[name].append(1000 * (time.perf_counter() - start))
    return {name: statistics.median(found) for name, found in samples.items()}


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """All candidates, measured on one thread."""
    datasets.disable_progress_bars()
    files = {split: str(arguments.dataset_dir / "sst2" / f"{split}.parquet") for split in ("train", "validation")}
    train, validation = (datasets.Dataset.from_parquet(file, keep_in_memory=True) for file in files.values())
    texts, labels = validation["sentence"][:], validation["label"][:]
    with torch_threads(1):
        candidates: dict[str, Candidate] = {}
        for given in arguments.models:
            name, _, folder = given.partition("=")
            candidates |= load(name, Path(folder), arguments.max_length)
        candidates["bag of words"] = bag_of_words(train["sentence"][:], train["label"][:])
        timed = random.Random(arguments.seed).sample(texts, min(arguments.sentences, len(texts)))
        times = latencies(candidates, timed, arguments.rounds)
        rows = {
            name: {
                "kind": candidate.kind,
                "accuracy": round(accuracy(candidate, texts, labels), 4),
                "bytes": candidate.bytes,
                "milliseconds": round(times[name], 3),
            }
            for name, candidate in candidates.items()
        }
        return {
            "dataset": "sst2",
            "split": "validation",
            "examples": len(texts),
            "seed": arguments.seed,
            "sentences_timed": len(timed),
            "rounds": arguments.rounds,
            "models": rows,
            **surroundings(),
            "command": command_line(["python", "benchmarks/tradeoff.py", *arguments.words]),
        }


def table(result: Mapping[str, Any]) -> str:
    """Markdown: a row a model, the most accurate first."""
    lines = ["| model | accuracy | MiB | ms a sentence |", "|---|---|---|---|"]
    for name, row in sorted(result["models"].items(), key=lambda item: -item[1]["accuracy"]):
        size = row["bytes"] / 2**20
        lines.append(f"| {name} | {row['accuracy']:.1f} | {size:.1f} | {row['milliseconds']:.2f} |")
    return "\n".join(lines)


def plot(result: Mapping[str, Any], file: Path) -> None:
    """Accuracy against file size, and against latency."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import LogLocator, NullFormatter

    figure, axes = pyplot.subplots(1, 2, figsize=(10.5, 4.4), sharey=True, layout="constrained")
    panels = (
        ("MiB on disk", lambda row: row["bytes"] / 2**20),
        ("ms a sentence, one thread", lambda row: row["milliseconds"]),
    )
    for axis, (label, value) in zip(axes, panels, strict=True):
        for row in result["models"].values():
            color, marker, _ = KINDS[row["kind"]]
            axis.plot(value(row), row["accuracy"], marker, color=color, markersize=8)
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter(lambda tick, position: f"{tick:g}")
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.margins(x=0.3, y=0.15)
        axis.set_xlabel(label)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("accuracy on SST-2, development set, %")
    for color, marker, name in KINDS.values():
        axes[1].plot([], [], marker, color=color, label=name)
    axes[1].legend(loc="lower right", frameon=False, fontsize=8)
    figure.canvas.draw()
    for axis, (_, value) in zip(axes, panels, strict=True):
        _name_points(axis, {name: (value(row), row["accuracy"]) for name, row in result["models"].items()})
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


def _name_points(axis: Any, points: Mapping[str, tuple[float, float]]) -> None:
    """Writes each name beside its point, at the first place where it hides no other point or name."""
    from matplotlib.transforms import Bbox

    centers = {name: axis.transData.transform(point) for name, point in points.items()}
    # Half the size of a marker, in pixels.
    taken = [(name, Bbox([center - 8, center + 8])) for name, center in centers.items()]
    frame = axis.get_window_extent()
    for name, point in points.items():
        for height, (width, side) in itertools.product((4, -10, 14, -20, 24, -30), ((7, "left"), (-7, "right"))):
            text = axis.annotate(name, point, (width, height), textcoords="offset points", fontsize=7.5, ha=side)
            text.set_in_layout(False)
            box = text.get_window_extent()
            is_free = not any(box.overlaps(other) for owner, other in taken if owner != name)
            if is_free and frame.x0 <= box.x0 and box.x1 <= frame.x1:
                break
            text.remove()
        else:
            axis.annotate(name, point, (7, 4), textcoords="offset points", fontsize=7.5)
            continue
        taken.append((f"name of {name}", box))


def main(argv: list[str] | None = None) -> None:
    """Measures or reads, prints the table, and draws."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("models", nargs="*", metavar="NAME=FOLDER")
    parser.add_argument("--dataset_dir", type=Path, help="holds sst2/{train,validation}.parquet")
    parser.add_argument("--max_length", type=int, default=64)
    parser.add_argument("--sentences", type=int, default=50, help="to time, drawn at random")
    parser.add_argument("--seed", type=int, default=0, help="of that drawing")
    parser.add_argument("--rounds", type=int, default=5, help="so many times each")
    parser.add_argument("--output", type=Path, help="gets the result, as JSON")
    parser.add_argument("--show", type=Path, help="a result to print and draw; nothing is measured")
    parser.add_argument("--plot", type=Path, help="gets the figure")
    arguments = parser.parse_args(argv)
    arguments.words = sys.argv[1:] if argv is None else argv
    if arguments.show is None:
        missing = [given for given in arguments.models if not Path(given.partition("=")[2]).is_dir()]
        if missing or not arguments.models:
            parser.error(f"{missing or 'nothing'}: give every model as NAME=FOLDER, with a folder that exists")
        if arguments.dataset_dir is None or not (arguments.dataset_dir / "sst2").is_dir():
            parser.error(f"--dataset_dir {arguments.dataset_dir} has no folder sst2")
        result = measure(arguments)
        if arguments.output is not None:
            arguments.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    else:
        result = json.loads(arguments.show.read_text(encoding="utf-8"))
    print(table(result))
    if arguments.plot is not None:
        plot(result, arguments.plot)


if __name__ == "__main__":
    main()
