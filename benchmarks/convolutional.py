"""
Time of a packed ResNet-18 of full width, one image of 224 x 224, against its float model, in turn, in one process.

    python benchmarks/convolutional.py --output benchmarks/results/convolutional_amd_epyc_zen5.json
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import ResNetConfig, ResNetForImageClassification

from hf_stompp import StoMPPConfig, binarize, commit, pack
from hf_stompp.benchmark import interleave
from hf_stompp.machine import command_line, surroundings


FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def resnet18() -> Any:
    """Random weights: they change no time."""
    config = ResNetConfig(hidden_sizes=[64, 128, 256, 512], depths=[2, 2, 2, 2], layer_type="basic", num_labels=1000)
    return ResNetForImageClassification(config).eval()


@torch.inference_mode()
def measure(size: int, rounds: int) -> dict[str, dict[str, float]]:
    images = torch.randn(1, 3, size, size)
    model = resnet18()
    models = {"fp32": copy.deepcopy(model)}
    with torch.inference_mode(False), torch.no_grad():
        binarize(model, StoMPPConfig()).eval()(pixel_values=images)
        models["packed"] = pack(commit(model))

    def timed(model: Any, memory_format: torch.memory_format) -> Any:
        model, batch = model.to(memory_format=memory_format), images.to(memory_format=memory_format)
        return lambda: model(pixel_values=batch)

    cases = {
        f"{name}_{format_name}": timed(copy.deepcopy(model), memory_format)
        for name, model in models.items()
        for format_name, memory_format in FORMATS.items()
    }
    return interleave(cases, rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description="Time of a packed ResNet-18 against its float model.")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--size", type=int, default=224, help="height and width of the image (default: 224)")
    parser.add_argument("--rounds", type=int, default=25, help="how often each is timed (default: 25)")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    seconds = measure(arguments.size, arguments.rounds)
    packed = seconds["packed_channels_last"]["median"]
    result = {
        "method": "convolutional",
        "command": command_line(["python", "benchmarks/convolutional.py", *sys.argv[1:]]),
        "seed": 0,
        "size": arguments.size,
        "load_average": os.getloadavg(),
        **surroundings(),
        "seconds": seconds,
        "packed_channels_last_over": {
            name: times["median"] / packed for name, times in seconds.items() if name.startswith("fp32")
        },
    }
    arguments.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result["packed_channels_last_over"], indent=2))


if __name__ == "__main__":
    main()
