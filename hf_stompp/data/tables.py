"""Tables of examples: files of any kind, and the splits of GLUE tasks, in a folder or on the Hub."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any


HUB_DATASET = "nyu-mll/glue"

READERS: dict[str, tuple[str, dict[str, Any]]] = {
    # Without keep_default_na=False a sentence that reads "NA" or "null" would be taken for a missing one.
    ".csv": ("csv", {"keep_default_na": False}),
    ".tsv": ("csv", {"keep_default_na": False, "sep": "\t", "quoting": 3}),
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
    ".parquet": ("parquet", {}),
}
"""Reader of `datasets` and its options by the ending of a file."""

SPLIT_NAMES = {"validation": ("validation", "validation_matched"), "test": ("test", "test_matched")}
"""What a split is called: MNLI alone names its development and test sets after the genres they hold."""


def import_datasets() -> Any:
    """The package `datasets`. Raises a ValueError that names the extra which brings it."""
    try:
        import datasets
    except ImportError as error:
        raise ValueError(
            "examples are read with the package datasets, which is not installed: pip install 'hf_stompp[glue]'"
        ) from error
    return datasets


def read_table(files: Sequence[Path], source: Path | str | None = None, cache_dir: str | None = None) -> Any:
    """
    Reads files of one kind as one `datasets.Dataset`, its rows in their order; `source` is their name in messages, and
    what is read lies in `cache_dir`. Raises a FileNotFoundError where the first is missing, a ValueError where they
    are of an unknown kind, broken or empty.
    """
    source = source or files[0]
    suffix = files[0].suffix.lower()
    if suffix not in READERS:
        raise ValueError(f"{source} is not of a known kind: name a file that ends in {', '.join(READERS)}")
    if not files[0].is_file():
        raise FileNotFoundError(f"there is no file {source}: check the path")
    datasets = import_datasets()
    kind, options = READERS[suffix]
    try:
        names = [str(file) for file in files]
        return datasets.load_dataset(kind, data_files=names, split="train", cache_dir=cache_dir, **options)
    except (ValueError, datasets.exceptions.DatasetGenerationError) as error:
        # Those of datasets do not name the file.
        reason = " ".join(str(error.__cause__ or error).split())
        raise ValueError(f"{source} holds no examples, or is no valid {kind} file ({reason}): check it") from error


def split_files(folder: Path, split: str) -> list[Path]:
    """The Parquet files of a split: `<split>.parquet`, or `<split>-*.parquet` as on the Hub, in order; or none."""
    for name in SPLIT_NAMES.get(split, (split,)):
        files = sorted(folder.glob(f"{name}.parquet")) or sorted(folder.glob(f"{name}-*.parquet"))
        if files:
            return files
    return []


def read_hub_splits(task: str, splits: Sequence[str], cache_dir: str | None = None) -> dict[str, Any]:
    """Those of the wanted splits that a GLUE task has, from the Hub or the cache."""
    found = import_datasets().load_dataset(HUB_DATASET, task, cache_dir=cache_dir)
    names = {split: SPLIT_NAMES.get(split, (split,)) for split in splits}
    return {split: found[name] for split in splits for name in names[split] if name in found}
