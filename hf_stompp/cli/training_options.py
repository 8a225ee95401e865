"""The arguments of `hf-stompp train` and `hf-stompp distill`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..config import CHOICES
from ..data.tables import READERS
from ..data.text import LINES
from ..training.distillation import DEFAULT_LOSSES, LABELS, LOSSES
from ..training.methods import BINARY_DEFAULTS, FLOAT_DEFAULTS, METHODS, Method
from .examples import PROBLEM_TYPES, SEPARATOR
from .options import add_command, add_modes, add_word_embeddings, count, option, positive, run_of, share


def _add_method(how: Any, methods: Mapping[str, Method], default: str) -> None:
    """What is trained, and how it becomes binary."""
    described = "; ".join(f"{name}: {method.help}" for name, method in methods.items())
    how.add_argument("--method", choices=list(methods), help=f"{described} (default: {default})")
    how.add_argument(
        "--mode", choices=CHOICES["mode"], help="bnn (default): 1-bit weights and activations; bwn: weights"
    )
    add_modes(how)


def _add_losses(how: Any, names: Iterable[str], default: str) -> None:
    """What is learned from the teacher."""
    option(how, "--losses", metavar="JSON", help=f"a weight for each loss: {', '.join(names)} (default: {default})")


def _add_machine(how: Any) -> None:
    """What it is computed with."""
    how.add_argument("--seed", type=int, default=0, metavar="N", help="default: 0")
    how.add_argument("--bf16", action="store_true", help="bfloat16 autocast")
    how.add_argument("--cpu", action="store_true", help="leave a GPU alone")


def add_train(commands: Any) -> None:
    """`hf-stompp train`."""
    train = add_command(
        commands,
        "train",
        run_of("training"),
        "a text or token classifier or a regression on labelled files or a GLUE task: float -> binary -> packed",
        "Fine-tunes a text classifier, binarizes it while it trains on, packs it into OUTPUT/packed and measures all "
        "of them on the validation set. With --problem_type it learns numbers, several classes a text, or a class a "
        "word. Ctrl-C ends after the step at hand, with a checkpoint; --resume goes on from it and ends in the same "
        "weights. For everything the Trainer can do there is examples/glue/run_glue.py. Needs datasets: pip install "
        "'hf_stompp[glue]'.",
        "hf-stompp train google-bert/bert-base-uncased output --train_file train.csv --validation_file dev.csv "
        "--float_epochs 3",
        "hf-stompp train output/float output2 --task sst2 --method stompp --epochs 10",
        "hf-stompp train google-bert/bert-base-uncased output --train_file train.jsonl --validation_file dev.jsonl "
        "--problem_type multi_label_classification",
        "hf-stompp train google-bert/bert-base-uncased output --train_file train.jsonl --validation_file dev.jsonl "
        "--problem_type token_classification --label_column ner_tags",
        "hf-stompp train ... --resume",
    )
    train.add_argument("model", metavar="MODEL", help="a folder or a name on the Hub; float or latent")
    train.add_argument("output", metavar="OUTPUT", help="the folder of the run; must be empty or new, or --resume")
    data = train.add_argument_group("data")
    kinds = ", ".join(READERS)
    option(data, "--train_file", type=Path, metavar="FILE", help=f"a file that ends in {kinds}")
    option(data, "--validation_file", type=Path, metavar="FILE", help="the same, to measure on")
    data.add_argument("--task", help="a GLUE task instead, from the Hub or from --dataset_dir")
    option(data, "--dataset_dir", type=Path, metavar="DIR", help="reads DIR/TASK/{train,validation}.parquet")
    option(data, "--text_columns", nargs="+", metavar="NAME", help="one or two columns that hold the text")
    option(data, "--label_column", default="label", metavar="NAME", help="default: label")
    option(
        data,
        "--problem_type",
        choices=PROBLEM_TYPES,
        help="what labels are: one class a text (single_label_classification; default), a number (regression; of "
        "--task stsb without being asked), any number of classes (multi_label_classification): a list of names or "
        f"ids, in csv and tsv with {SEPARATOR} between them, or a class a word (token_classification): lists of words "
        "and of names or ids, in csv and tsv with spaces between them",
    )
    option(data, "--max_length", type=count, default=128, metavar="N", help="tokens of a text (default: 128)")
    option(data, "--max_train_examples", type=count, metavar="N", help="train on the first N only")
    how = train.add_argument_group("training")
    _add_method(how, METHODS, "stompp_ste; of a model that is binary already, ste")
    add_word_embeddings(how)
    how.add_argument(
        "--teacher",
        metavar="MODEL",
        help="what to distil from: float (default): the float model that is binarized, if its head is trained; none; "
        "or a folder or name of a model that was fine-tuned on this task",
    )
    _add_losses(
        how,
        (*LOSSES, LABELS),
        f"{' and '.join(DEFAULT_LOSSES)}, each 1; with --method bit logits and hidden_states",
    )
    epochs, rate = BINARY_DEFAULTS["num_train_epochs"], BINARY_DEFAULTS["learning_rate"]
    how.add_argument("--epochs", type=positive, metavar="N", help=f"of training (default: {epochs:g})")
    option(how, "--float_epochs", type=positive, metavar="N", help="of fine-tuning in float before (default: none)")
    option(how, "--learning_rate", type=positive, metavar="RATE", help=f"default: {rate:g}")
    rate = FLOAT_DEFAULTS["learning_rate"]
    option(how, "--float_learning_rate", type=positive, metavar="RATE", help=f"default: {rate:g}")
    option(how, "--batch_size", type=count, default=32, metavar="N", help="default: 32")
    option(
        how, "--logging_steps", type=count, default=0.02, metavar="N", help="between two logs (default: 2%% of all)"
    )
    _add_machine(how)
    option(how, "--card_speed", action="store_true", help="time the packed model beside a float one, for its card")
    option(how, "--report_to", nargs="*", default="none", metavar="TRACKER", help="tensorboard, wandb, mlflow, ...")
    how.add_argument("--resume", action="store_true", help="go on with the run in OUTPUT, with the same options")


def add_distill(commands: Any) -> None:
    """`hf-stompp distill`."""
    command = add_command(
        commands,
        "distill",
        run_of("distill"),
        "the 1-bit copy of any text encoder, learned from text without labels",
        "Makes the 1-bit copy of a float encoder. The copy learns to compute the hidden states of the float model on "
        "any text, and the embedding where that is a sentence encoder (a folder with modules.json). OUTPUT/packed is "
        "the 1-bit model, which AutoModel and SentenceTransformer load; OUTPUT/latent is where fine-tuning for a task "
        "starts. Both are measured on texts that are held out. Ctrl-C ends after the step at hand, with a checkpoint; "
        "--resume goes on from it and ends in the same weights. Needs datasets: pip install 'hf_stompp[glue]'.",
        "hf-stompp distill sentence-transformers/all-MiniLM-L6-v2 output --text corpus.txt --mode bwn",
        "hf-stompp distill google-bert/bert-base-uncased output --text reviews.parquet --split_sentences",
        "hf-stompp distill ... --resume",
    )
    command.add_argument("model", metavar="MODEL", help="a float encoder: a folder or a name on the Hub")
    command.add_argument("output", metavar="OUTPUT", help="the folder of the run; must be empty or new, or --resume")
    data = command.add_argument_group("data")
    data.add_argument(
        "--text",
        nargs="+",
        type=Path,
        required=True,
        metavar="FILE",
        help=f"a text a line ({LINES}), or a table with a column of texts ({', '.join(READERS)})",
    )
    option(
        data,
        "--text_columns",
        nargs="+",
        metavar="NAME",
        help="the column (default: text or sentence, or the only one), or the two that hold pairs of texts",
    )
    option(data, "--split_sentences", action="store_true", help="cut each text into its sentences")
    option(data, "--max_length", type=count, default=128, metavar="N", help="tokens of a text (default: 128)")
    option(data, "--max_texts", type=count, metavar="N", help="take N of the texts, drawn by --seed")
    option(
        data,
        "--validation_share",
        type=share,
        default=0.02,
        metavar="SHARE",
        help="of the texts, to measure on (default: 0.02, and 200 where that is no more than a fifth)",
    )
    how = command.add_argument_group("training")
    methods = {name: method for name, method in METHODS.items() if name != "float"}
    _add_method(how, methods, "stompp_ste, and ste with --student")
    option(how, "--student", metavar="LATENT", help="go on from OUTPUT/latent of an earlier run (default: from MODEL)")
    add_word_embeddings(how)
    _add_losses(
        how,
        [name for name in LOSSES if name != "logits"],
        "normalized_hidden_states, and mean_embeddings or cls_embeddings for a sentence encoder, each 1",
    )
    length = how.add_mutually_exclusive_group()
    length.add_argument("--epochs", type=positive, default=1.0, metavar="N", help="of training (default: 1)")
    option(length, "--max_steps", type=count, metavar="N", help="optimizer steps instead")
    rate = BINARY_DEFAULTS["learning_rate"]
    option(how, "--learning_rate", type=positive, metavar="RATE", help=f"default: {rate:g}")
    option(how, "--batch_size", type=count, default=32, metavar="N", help="default: 32")
    _add_machine(how)
    how.add_argument("--resume", action="store_true", help="go on with the run in OUTPUT, with the same options")
