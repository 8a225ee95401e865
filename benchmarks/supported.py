"""
Tries every encoder family and head of the installed Transformers, and writes what works to a page.

    python benchmarks/supported.py --output docs/supported.md --json benchmarks/results/supported.json
    python benchmarks/supported.py --families bert t5

Each is built tiny, from its config: binarize, a few training steps with a checkpoint in between, pack, save, load.
It *works* if the packed model answers as the binary one does and the loaded one exactly as the packed one. It is
*refused* if binarize() says why before anything is trained. *No example*: binarize() says that the tiny model does not
take the example that it made. Everything else *fails*.
"""

from __future__ import annotations

import argparse
import inspect
import json
import logging
import resource
import sys
import tempfile
import textwrap
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from tqdm.auto import tqdm
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from hf_stompp import StoMPPConfig, StoMPPTrainer, StoMPPTrainingArguments, binarize, pack
from hf_stompp.machine import command_line, surroundings
from hf_stompp.model.example_inputs import example_inputs
from hf_stompp.model.modules import config_of


HEADS: dict[str, Mapping[str, Any]] = {
    "sequence classification": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    "token classification": modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    "question answering": modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
    "masked language modeling": modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    "multiple choice": modeling_auto.MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES,
    "image classification": modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    "audio classification": modeling_auto.MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES,
}
ENCODER_HEADS = ("masked language modeling", "multiple choice", "image classification", "audio classification")
"""What no decoder has."""

VOCABULARY = 99
TINY: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    **dict.fromkeys(("hidden_size", "d_model", "dim", "emb_dim"), 32),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "num_decoder_layers", "encoder_layers"), 2),
    **dict.fromkeys(("decoder_layers", "n_layers", "n_layer"), 2),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "num_heads", "n_heads", "n_head"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("intermediate_size", "d_ff", "hidden_dim", "d_inner", "encoder_ffn_dim", "decoder_ffn_dim"), 48),
    **dict.fromkeys(("head_dim", "d_kv", "d_head"), 8),
    "embedding_size": 16,
    "max_position_embeddings": 64,
    "image_size": 32,
    "patch_size": 8,
    "type_vocab_size": 2,
}
"""Small values of the fields that most configs have."""

FAMILIES: dict[str, dict[str, Any]] = {
    "esm": {"vocab_size": VOCABULARY, "pad_token_id": 1, "mask_token_id": 4},
    "perceiver": {"num_latents": 8, "d_latents": 32, "num_self_attends_per_block": 2, "max_position_embeddings": 12},
    "layoutlmv3": {"coordinate_size": 4, "shape_size": 8, "input_size": 32, "visual_embed": False},
    "lilt": {"channel_shrink_ratio": 4, "hidden_size": 48},
    "luke": {"entity_vocab_size": 16, "entity_emb_size": 16},
    "reformer": {"axial_pos_embds": False, "attn_layers": ["local", "local"], "is_decoder": False},
    "roc_bert": {"shape_vocab_size": 16, "pronunciation_vocab_size": 16},
    "canine": {"num_hash_buckets": 16},
    "t5": {"decoder_start_token_id": 0},
    "mt5": {"decoder_start_token_id": 0},
    "umt5": {"decoder_start_token_id": 0},
    "squeezebert": {"embedding_size": 32},
    "longformer": {"attention_window": 4},
}
"""What some need beside that, or instead."""

SPECIAL_TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id", "mask_token_id")
SEED = 0
REASON = 75
"""Characters of a reason on the page."""

MAX_PARAMETERS = 30_000_000
MAX_MEMORY = 9 * 2**30


def is_encoder(family: str) -> bool:
    """Whether a family is more than a decoder."""
    has_decoder = family in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    return not has_decoder or any(family in HEADS[head] for head in ENCODER_HEADS)


def tiny_config(family: str, head: str) -> Any:
    """The config of a family, as small as [`TINY`] and [`FAMILIES`] make it."""
    config_class = CONFIG_MAPPING[family]
    default = config_class()

    def small(config: Any) -> dict[str, Any]:
        numbers = {name for name, value in vars(config).items() if isinstance(value, int)}
        numbers |= {name for name in ("image_size", "patch_size") if isinstance(getattr(config, name, None), list)}
        fields = {name: value for name, value in TINY.items() if name in numbers}
        for name in SPECIAL_TOKENS:
            value = getattr(config, name, None)
            if isinstance(value, int) and value >= VOCABULARY:
                fields[name] = 0 if name == "pad_token_id" else 2
        if isinstance(getattr(config, "layer_types", None), list):
            fields["layer_types"] = config.layer_types[: TINY["num_hidden_layers"]]
        return fields

    fields = small(default)
    for name in ("text_config", "vision_config", "encoder", "decoder"):
        inner = getattr(default, name, None)
        if isinstance(inner, transformers.PreTrainedConfig):
            fields[name] = {**inner.to_dict(), **small(inner)}
    return config_class(
        **{**fields, **FAMILIES.get(family, {}), "num_labels": 2 if head == "question answering" else 3}
    )


def rows_for(model: Any, head: str, count: int = 8, length: int = 12) -> list[dict[str, Tensor]]:
    """Training examples of a head, from noise."""
    generator = torch.Generator().manual_seed(0)
    example = example_inputs(model)
    name, first = next(iter(example.items()))
    rows = []
    for index in range(count):
        ids = torch.randint(5, 60, (length,), generator=generator)
        # Classifiers of encoder-decoders read the state of the last token of the text, which this is.
        ids[-1] = getattr(model.config, "eos_token_id", None) or 2
        separator = getattr(model.config, "sep_token_id", None)
        if separator is not None and head in ("question answering", "multiple choice"):
            ids[[2, 4, -1]] = separator
        if first.is_floating_point():
            row = {name: torch.randn(first.shape[1:], generator=generator)}
        elif head == "multiple choice":
            row = {name: ids.repeat(2, 1)}
        else:
            row = {name: ids}
        if head == "token classification":
            row["labels"] = ids % 3
        elif head == "masked language modeling":
            row["labels"] = ids
        elif head == "question answering":
            row |= {"start_positions": torch.tensor(index % 5), "end_positions": torch.tensor(6)}
        else:
            row["labels"] = torch.tensor(index % 2)
        rows.append(row)
    return rows


def binarized(model: Any) -> Any:
    """The model, binarized; of an encoder-decoder its encoder."""
    try:
        return binarize(model)
    except ValueError as error:
        lists = [name for name, module in model.named_modules() if isinstance(module, torch.nn.ModuleList)]
        encoders = [name for name in lists if "encoder" in name]
        if "several stacks" not in str(error) or not encoders:
            raise
    return binarize(model, StoMPPConfig(layer_stack=encoders[0]))


def can_return_loss(model_class: Any, head: str) -> bool:
    """Whether the forward of a class takes what its head is trained on."""
    labels = "start_positions" if head == "question answering" else "labels"
    return labels in inspect.signature(model_class.forward).parameters


def attempt(family: str, head: str, name: str) -> dict[str, str]:
    """What became of one: `result`, and where it is not "works" the `reason`."""
    stage = "build"
    try:
        config = tiny_config(family, head)
        model_class = getattr(transformers, name)
        with torch.device("meta"):
            size = sum(parameter.numel() for parameter in model_class(config).parameters())
        if size > MAX_PARAMETERS:
            raise ValueError(f"not tiny: {size:,} parameters")
        torch.manual_seed(SEED)
        model = model_class(config).eval()
        if not can_return_loss(model_class, head):
            raise ValueError(f"{name} of Transformers returns no loss")
        stage = "binarize"
        binarized(model)
        stage = "training"
        rows = rows_for(model, head)
        with tempfile.TemporaryDirectory() as folder:
            args = StoMPPTrainingArguments(
                folder,
                # Two thirds of them are for the units.
                max_steps=max(12, 2 * len(config_of(model).units)),
                per_device_train_batch_size=4,
                learning_rate=1e-3,
                save_steps=9,
                eval_strategy="no",
                report_to="none",
                use_cpu=True,
                disable_tqdm=True,
            )
            trainer = StoMPPTrainer(model, args, train_dataset=rows)  # type: ignore[arg-type]
            trainer.remove_callback(transformers.PrinterCallback)
            trainer.train()
            model.eval()
            columns = [column for column in rows[0] if column not in ("labels", "start_positions", "end_positions")]
            batch = {column: torch.stack([row[column] for row in rows[:4]]) for column in columns}
            stage = "packing"
            packed = pack(model)
            with torch.no_grad():
                expected, found = model(**batch)[0], packed(**batch)[0]
                torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
                stage = "loading"
                packed.save_pretrained(f"{folder}/packed")
                loaded = model_class.from_pretrained(f"{folder}/packed").eval()
                # Not bit for bit: PyTorch's float convolutions may sum otherwise where their weights lie elsewhere.
                torch.testing.assert_close(loaded(**batch)[0], found, rtol=1e-5, atol=1e-5)
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        result = {"build": "not built", "binarize": "refused"}.get(stage, "fails")
        if stage == "binarize" and not isinstance(error, ValueError):
            result = "fails"
        elif stage == "binarize" and error.__cause__ is not None:
            result = "no example"
        return {"result": result, "reason": reason if result != "fails" else f"{stage}: {reason}"}
    return {"result": "works", "reason": ""}


def table(cases: Iterable[Mapping[str, str]]) -> str:
    """A row a family, a column a head."""
    by_family: dict[str, dict[str, str]] = {}
    for case in cases:
        by_family.setdefault(case["family"], {})[case["head"]] = case["result"]
    lines = ["| family | " + " | ".join(HEADS) + " |", "|---" * (len(HEADS) + 1) + "|"]
    for family, results in sorted(by_family.items()):
        lines.append(f"| {family} | " + " | ".join(results.get(head, "") for head in HEADS) + " |")
    return "\n".join(lines)


def page(result: Mapping[str, Any]) -> str:
    """The page in the documentation."""
    cases = result["cases"]
    counts = Counter(case["result"] for case in cases)
    tried = {case["family"] for case in cases}
    working = {case["family"] for case in cases if case["result"] == "works"}
    reasons: dict[tuple[str, str, str], list[str]] = {}
    for case in cases:
        if case["result"] != "works":
            # The class is told by family and head.
            reason = case["reason"].removeprefix(case["class"]).replace(f" in {case['class']}", "").strip()
            reason = textwrap.shorten(reason, REASON, placeholder=" ...")
            reasons.setdefault((case["result"], case["family"], reason), []).append(case["head"])
    lines = [
        "# What is supported",
        "",
        f"{counts['works']} of {len(cases)} pairs of an encoder family and a head work; they are of {len(working)} of "
        f"{len(tried)} families.",
        f"{counts['refused']} are refused by `binarize`, which says why, and {counts['fails']} fail.",
        f"{counts['not built'] + counts['no example']} could not be tried: {counts['not built']} have no tiny config",
        f"or return no loss, and {counts['no example']} do not take the example that `binarize` makes.",
        f"Transformers {result['versions']['transformers']}.",
        "",
        "*Works* means: a tiny model with random weights is binarized, takes a few training steps, and is packed,",
        "saved and loaded; the packed model answers as the binary one, and the loaded one as the packed one.",
        "Of encoder-decoders the encoder is binarized (`layer_stack`). How accurate such a model gets was measured",
        "for MiniLM alone. Most families that are decoders only are not in the table. *Refused*: `binarize` says why.",
        "*Not built*: no tiny config, or no loss. *No example*: `binarize` could not make an input;",
        "`example_inputs` may help.",
        "",
        "<!-- not run: takes twenty minutes -->",
        "```bash",
        f"{result['command']}",
        "```",
        "",
        table(cases),
        "",
        "## Why not",
        "",
        "The beginning of each message; `benchmarks/results/supported.json` has them whole.",
        "",
        "| result | family | heads | reason |",
        "|---|---|---|---|",
    ]
    for (kind, family, reason), heads in sorted(reasons.items()):
        heads_tried = sum(case["family"] == family for case in cases)
        shown = "all" if len(heads) == heads_tried else ", ".join(heads)
        text = reason.replace("|", "\\|")
        lines.append(f"| {kind} | {family} | {shown} | {text} |")
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    """Tries all, or reads what was tried; the exit status is 1 if one fails."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--families", nargs="+", help="these alone")
    parser.add_argument("--output", type=Path, help="gets the page")
    parser.add_argument("--json", type=Path, help="gets the result")
    parser.add_argument("--show", type=Path, help="a result to write the page from; nothing is tried")
    arguments = parser.parse_args(argv)
    if arguments.show is not None:
        result = json.loads(arguments.show.read_text(encoding="utf-8"))
    else:
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        # A config that stays large in spite of everything must not take the machine with it.
        resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))
        wanted = [
            (family, head, name if isinstance(name, str) else name[0])
            for head, names in HEADS.items()
            for family, name in names.items()
            if is_encoder(family) and (arguments.families is None or family in arguments.families)
        ]
        cases = []
        for family, head, name in tqdm(wanted, unit="model", disable=None):
            found = attempt(family, head, name)
            cases.append({"family": family, "head": head, "class": name, **found})
            print(f"{found['result']:9} {head}: {family} {found['reason'][:200]}", flush=True)
        words = sys.argv[1:] if argv is None else argv
        result = {
            "cases": cases,
            "seed": SEED,
            **surroundings(),
            "command": command_line(["python", "benchmarks/supported.py", *words]),
        }
        if arguments.json is not None:
            arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if arguments.output is not None:
        arguments.output.write_text(page(result), encoding="utf-8")
    return int(any(case["result"] == "fails" for case in result["cases"]))


if __name__ == "__main__":
    sys.exit(main())
