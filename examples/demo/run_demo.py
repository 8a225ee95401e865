"""
The whole way of a binary BERT, without the Hub: fetch a model, write a corpus, fine-tune in float, binarize, fine-tune
by StoMPP, pack, reload, and print one table.

    python examples/demo/run_demo.py [--output_dir demo] [--num_train 4000] [--epochs 6] [--mode bwn]
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any


# Nothing is downloaded; the Hub's client would ask it for the same files first.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent / "glue")]

import torch
from fetch_model import fetch_model
from make_corpus import write_corpus
from run_glue import main as run_glue

from hf_stompp.training.methods import METHODS


# Binary activations want a higher one.
LEARNING_RATES = {"bnn": 5e-4, "bwn": 3e-4}


def run_demo(
    output_dir: Path, num_train: int, num_validation: int, epochs: int, method: str, mode: str, seed: int
) -> dict:
    """
    Runs the demo in a folder that gets `model`, `corpus` and `run`, and returns the summary that `run_glue.py` writes
    to `run/summary.json`. The float fine-tuning before the binary one takes 2 epochs.
    """
    model = fetch_model(output_dir / "model")
    corpus = output_dir / "corpus"
    write_corpus(corpus, num_train, num_validation, seed)
    arguments: dict[str, Any] = {
        "model_name_or_path": model,
        "train_file": corpus / "train.csv",
        "validation_file": corpus / "validation.csv",
        "max_seq_length": 32,
        "method": method,
        "mode": mode,
        "float_num_train_epochs": 2,
        # The words of the validation sentences are in none to train on: theirs would stay where others move.
        "train_word_embeddings": False,
        "num_train_epochs": epochs,
        "per_device_train_batch_size": 32,
        "per_device_eval_batch_size": 32,
        "learning_rate": LEARNING_RATES[mode],
        "warmup_steps": 0.1,
        "logging_steps": 50,
        "save_strategy": "no",
        "seed": seed,
        "output_dir": output_dir / "run",
    }
    flags = ["--do_train", "--do_eval"]
    if not torch.cuda.is_available():
        flags.append("--use_cpu")
    return run_glue([*(part for name, value in arguments.items() for part in (f"--{name}", str(value))), *flags])


def table(summary: dict) -> str:
    """Float against packed: accuracy, bytes on disk, milliseconds a batch."""
    metrics, sizes, times = summary["metrics"], summary["bytes"], summary["milliseconds_per_batch"]
    lines = [f"{'':8}{'accuracy':>10}{'bytes on disk':>16}{'ms a batch':>12}"]
    for kind in ("float", "packed"):
        lines.append(f"{kind:8}{metrics[kind]['eval_accuracy']:>10.3f}{sizes[kind]:>16,}{times[kind]:>12.1f}")
    ratio = sizes["float"] / sizes["packed"]
    lines.append(f"{'':8}{'':>10}{ratio:>15.1f}x{times['float'] / times['packed']:>11.2f}x")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("demo"))
    parser.add_argument("--num_train", type=int, default=4000)
    parser.add_argument("--num_validation", type=int, default=600)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--method", choices=[name for name in METHODS if name != "float"], default="stompp_ste")
    parser.add_argument("--mode", choices=list(LEARNING_RATES), default="bwn")
    parser.add_argument("--seed", type=int, default=0)
    arguments = vars(parser.parse_args())
    summary = run_demo(**arguments)
    print(
        f"\nThe packed model is in {arguments['output_dir'] / 'run' / 'packed'}; load it with\n\n"
        "    import hf_stompp\n"
        f'    AutoModelForSequenceClassification.from_pretrained("{arguments["output_dir"] / "run" / "packed"}")\n\n'
        f"{table(summary)}\n"
    )


if __name__ == "__main__":
    main()
