"""
What the ONNX file of a packed model takes: bytes, and time in onnxruntime beside PyTorch's.

    python benchmarks/onnx_export.py --output benchmarks/results/onnx_minilm.json

The model is all-MiniLM-L6-v2, committed without training. All variants run in one process, in turn.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from transformers import BertForSequenceClassification

from hf_stompp import StoMPPConfig, benchmark, binarize, commit, pack
from hf_stompp.export import export_onnx, plain_torch, sample_inputs
from hf_stompp.machine import command_line, surroundings


BATCH, LENGTH = 4, 128


def packed_minilm(**config: Any) -> tuple[Any, Any]:
    """The float model and a packed one of it."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples" / "demo"))
    from fetch_model import find_model_dir

    model = BertForSequenceClassification.from_pretrained(find_model_dir(), dtype=torch.float32).eval()
    latent = copy.deepcopy(model)
    binarize(latent, StoMPPConfig(**config))
    with torch.no_grad():
        latent(input_ids=torch.randint(1000, 30000, (4, 32)))
    return model, pack(commit(latent))


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.suffix in (".safetensors", ".onnx", ".pt2"))


def measure(folder: Path) -> dict[str, Any]:
    model, packed = packed_minilm()
    sizes = {}
    for name, saved in (("float", model), ("packed", packed)):
        saved.save_pretrained(folder / name)
        sizes[name] = size_of(folder / name)
    export_onnx(packed, folder / "model.onnx")
    sizes["onnx"] = (folder / "model.onnx").stat().st_size
    export_onnx(packed_minilm(binary_word_embeddings=True)[1], folder / "small.onnx")
    sizes["onnx_binary_word_embeddings"] = (folder / "small.onnx").stat().st_size
    inputs = sample_inputs(packed)
    dynamic = {name: {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC} for name in inputs}
    with torch.no_grad():
        program = torch.export.export(plain_torch(packed), (), inputs, dynamic_shapes=dynamic)
    torch.export.save(program, folder / "model.pt2")
    sizes["plain_torch_pt2"] = (folder / "model.pt2").stat().st_size

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])
    ids = torch.randint(1000, 30000, (BATCH, LENGTH))
    texts = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
    arrays = {name: tensor.numpy() for name, tensor in texts.items()}
    with torch.inference_mode():
        difference = packed(**texts).logits.numpy() - session.run(["logits"], arrays)[0]
        seconds = benchmark.interleave(
            {
                "float": lambda: model(**texts),
                "packed": lambda: packed(**texts),
                "onnxruntime": lambda: session.run(["logits"], arrays),
            }
        )
    return {
        "bytes": sizes,
        "batch": BATCH,
        "length": LENGTH,
        "seconds": seconds,
        "largest_difference_of_logits": float(abs(difference).max()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").strip().splitlines()[0])
    parser.add_argument("--output", type=Path, help="write the result to this JSON file")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder))
    result = {
        "method": "onnx_export",
        "command": command_line(["python", "benchmarks/onnx_export.py", *sys.argv[1:]]),
        "seed": 0,
        "threads": arguments.threads,
        **surroundings(),
        "onnxruntime": onnxruntime.__version__,
        **found,
    }
    text = json.dumps(result, indent=2)
    print(text)
    if arguments.output is not None:
        arguments.output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
