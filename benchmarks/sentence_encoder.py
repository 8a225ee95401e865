"""
How much of a sentence encoder is left in its 1-bit copy: Spearman correlation on STS-B, which neither of them learned.

    hf-stompp distill MODEL RUN --text FILES ...
    python benchmarks/sentence_encoder.py --model RUN/packed --dataset_dir DIR [--output RESULTS.jsonl]

Reads DIR/stsb/test.parquet or, where its labels are hidden, validation.parquet. Of each pair of sentences, the cosine
similarity of their embeddings is compared with what people said. Prints a JSON line, and appends it to --output, with
the float model beside its copy. Correlations are in percent. What the run was made of is read from its summary.json,
with what it measured on texts that were held out (`held_out`): the loss, and the cosine similarity as a fraction.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import torch
from scipy.stats import spearmanr
from transformers import AutoModel, AutoTokenizer

from hf_stompp import StoMPPConfig
from hf_stompp.data.tables import read_table, split_files
from hf_stompp.machine import command_line, surroundings
from hf_stompp.output import bytes_of_weights
from hf_stompp.training.sentence_encoder import embed, modules_folder, pooling_of


SPLITS = ("test", "validation")


def read_pairs(folder: Path) -> tuple[str, list[list[str]], list[float]]:
    """The first split whose labels are known: its name, first and second sentences, and labels from 0 to 5."""
    datasets.disable_progress_bars()
    for split in SPLITS:
        files = split_files(folder / "stsb", split)
        table = read_table(files) if files else None
        # GLUE's test sets have -1 for every label.
        if table is not None and min(table["label"][:]) >= 0:
            return split, [table["sentence1"][:], table["sentence2"][:]], table["label"][:]
    raise SystemExit(f"{folder}/stsb has no {' or '.join(SPLITS)} split with labels: check --dataset_dir")


def spearman(model: str, pairs: Sequence[Sequence[str]], labels: Sequence[float], max_length: int) -> float:
    """Spearman correlation of the cosine of two sentences' embeddings with the label, in percent."""
    folder = modules_folder(model)
    pooling = "mean" if folder is None else pooling_of(folder)
    encoder = AutoModel.from_pretrained(model).to("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = AutoTokenizer.from_pretrained(model)
    first, second = (embed(encoder, tokenizer, sentences, pooling, max_length) for sentences in pairs)
    similarities = torch.nn.functional.cosine_similarity(first, second)
    return 100 * float(spearmanr(similarities, labels).statistic)


def measure(packed: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """The result line of one packed model."""
    file = packed.parent / "summary.json"
    summary = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    original = arguments.float or summary.get("model")
    if original is None:
        raise SystemExit(f"{file} is missing, so that the float model of {packed} is not known: name it with --float")
    split, pairs, labels = read_pairs(arguments.dataset_dir)
    expected, found = (spearman(name, pairs, labels, arguments.max_length) for name in (original, str(packed)))
    config = json.loads((packed / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    machine = surroundings()
    float_bytes = summary.get("bytes", {}).get("float") or bytes_of_weights(original)
    return {
        "task": "stsb",
        "split": split,
        "model": Path(original).name,
        "method": summary.get("method"),
        "mode": config["mode"],
        "teacher": True,
        "embeddings": StoMPPConfig(**config).word_embeddings,
        "seed": summary.get("seed"),
        "options": {"losses": summary.get("losses"), "learning_rate": summary.get("learning_rate")},
        "examples": summary.get("examples", {}).get("train"),
        "steps": summary.get("steps", {}).get("binary"),
        "float": {"spearman": expected},
        "packed": {"spearman": found},
        "packed_best": None,
        "kept": 100 * found / expected,
        "held_out": summary.get("metrics", {}).get("packed"),
        "bytes": {"float": float_bytes, "packed": bytes_of_weights(packed)},
        "seconds": sum(summary.get("seconds", {}).values()) or None,
        "machine": {**machine["machine"], **machine["versions"]},
        "command": command_line(shlex.split(summary["command"])) if "command" in summary else None,
        "measured_by": command_line(["python", "benchmarks/sentence_encoder.py", *sys.argv[1:]]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, nargs="+", required=True, metavar="PACKED", help="packed folders")
    parser.add_argument("--dataset_dir", type=Path, required=True, metavar="DIR", help="folder with stsb/")
    parser.add_argument("--float", metavar="MODEL", help="the float model (default: that of PACKED/../summary.json)")
    parser.add_argument("--max_length", type=int, default=128, metavar="N", help="tokens of a sentence (default: 128)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="append the JSON lines to this file")
    arguments = parser.parse_args()
    for packed in arguments.model:
        line = json.dumps(measure(packed, arguments))
        print(line, flush=True)
        if arguments.output is not None:
            with arguments.output.open("a", encoding="utf-8") as results:
                results.write(f"{line}\n")


if __name__ == "__main__":
    main()
