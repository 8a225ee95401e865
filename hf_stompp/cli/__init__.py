"""The `hf-stompp` command."""

from __future__ import annotations

import argparse
import importlib
import json
import math
import os
import shlex
import sys
import textwrap
import traceback
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from ..config import CHOICES
from ..methods import BINARY_DEFAULTS, FLOAT_DEFAULTS, METHODS
from ..ops import cpu
from ..sensitivity import DETAILS
from ..tables import READERS
from ..text import LINES
from .errors import explain
from .examples import PROBLEM_TYPES, SEPARATOR
from .models import quiet_transformers


def _command(module: str, function: str = "run") -> Callable[[argparse.Namespace], None]:
    """What a command runs. Its module is imported by then: most need more than `--help` should wait for."""

    def run(arguments: argparse.Namespace) -> None:
        getattr(importlib.import_module(f".{module}", __name__), function)(arguments)

    return run


def _bench(arguments: argparse.Namespace) -> None:
    from .. import benchmark

    all_levels = ["op", "model"] if arguments.quick else ["op", "model", "loading"]
    levels = all_levels if arguments.level == "all" else [arguments.level]
    # A path would tell whose machine it was.
    command = shlex.join(["hf-stompp", *(Path(word).name if "/" in word else word for word in arguments.words)])
    if arguments.output is not None:
        # Now, not when ten minutes of measuring are done.
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
    result = benchmark.run(levels, arguments.threads, arguments.kernels, command, arguments.quick)
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2) if arguments.json else benchmark.table(result))


def _count(text: str) -> int:
    try:
        count = int(text)
    except ValueError:
        count = 0
    if count < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 on, got {text!r}")
    return count


def _positive(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number above 0, got {text!r}")
    return number


def _share(text: str) -> float:
    share = _positive(text)
    if share >= 1:
        raise argparse.ArgumentTypeError(f"must be a number between 0 and 1, got {text!r}")
    return share


def _option(parser: Any, name: str, **options: Any) -> None:
    """An option in both spellings that Transformers' scripts take: `--max_length` and `--max-length`."""
    parser.add_argument(*dict.fromkeys([name, f"--{name[2:].replace('_', '-')}"]), **options)


class _Modes(argparse.Action):
    """Makes a dictionary of the words `PATTERN=MODE`."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: Any = None) -> None:
        pairs = [value.rpartition("=") for value in values]
        wrong = [value for value, (pattern, _, mode) in zip(values, pairs, strict=True) if not pattern or not mode]
        if wrong:
            parser.error(f"{option_string}: {wrong[0]!r} is no PATTERN=MODE")
        setattr(namespace, self.dest, {pattern: mode for pattern, _, mode in pairs})


def _add_word_embeddings(group: Any) -> None:
    _option(
        group,
        "--word_embeddings",
        choices=CHOICES["word_embeddings"],
        help="the word embedding table, the largest part of a packed file: float (default), int8 or binary",
    )


def _add_modes(group: Any) -> None:
    group.add_argument(
        "--modes",
        nargs="+",
        action=_Modes,
        metavar="PATTERN=MODE",
        help="another mode (bnn, bwn or float) for the linear layers whose names have parts that match a regular "
        "expression, such as attention=bwn 'layer\\.0=float'",
    )


def _add(
    commands: Any, name: str, run: Callable[[argparse.Namespace], None], summary: str, description: str, *examples: str
) -> argparse.ArgumentParser:
    """A command whose help has a paragraph and examples."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=textwrap.fill(description, 88),
        epilog="\n".join(["examples:", *(f"  {example}" for example in examples)]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="print JSON, for scripts")
    # SUPPRESS: what was given before the command's name counts as well.
    parser.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help="show tracebacks of errors")
    parser.set_defaults(run=run)
    return parser


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    root = argparse.ArgumentParser(
        prog="hf-stompp",
        description="1-bit BERT for Transformers: what a model would become, packing, accuracy, and how fast it is.",
        epilog="examples:\n"
        "  hf-stompp inspect google-bert/bert-base-uncased   # before training: what would be 1-bit\n"
        "  hf-stompp train google-bert/bert-base-uncased output --train_file train.csv --validation_file dev.csv\n"
        "  hf-stompp eval output/packed --file dev.csv       # how often it is right, and how fast\n"
        "  hf-stompp plot output                             # how training went, as a picture and a page\n"
        "  hf-stompp COMMAND --help                          # more on each\n\n"
        "exit status: 0, or 2 after an error, which is one line on stderr; 130 after Ctrl-C",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    root.add_argument("--debug", action="store_true", help="show tracebacks of errors")
    commands = root.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add(
        commands,
        "info",
        _command("information"),
        "versions, the kernel that runs, and why the others do not",
        "Tells the versions of what matters, which kernel multiplies the bits on this machine's processor and GPUs, "
        "and of every other kernel why it does not run here.",
        "hf-stompp info",
        "hf-stompp info --json",
    )
    _add_inspect(commands)
    _add_train(commands)
    _add_distill(commands)
    _add_pack(commands)
    _add_unpack(commands)
    _add_export(commands)
    _add_eval(commands)
    _add_sensitivity(commands)
    _add_plot(commands)
    _add_bench(commands)
    return root


def _add_inspect(commands: Any) -> None:
    inspect = _add(
        commands,
        "inspect",
        _command("inspection"),
        "what is or would be 1-bit in a model, unit by unit, with sizes",
        "Prints the units of a model in the order that they freeze in, what is 1-bit in each, and its size as a float "
        "model, in training (latent) and packed. For a float model it shows what binarize() would do; that reads "
        "config.json alone and downloads no weights. A latent or packed model is loaded, and thereby checked.",
        "hf-stompp inspect google-bert/bert-base-uncased",
        "hf-stompp inspect google-bert/bert-base-uncased --unit sublayer --word_embeddings binary",
        "hf-stompp inspect my-folder/model --modules_to_not_convert classifier pooler 'layer\\.0'",
        "hf-stompp inspect output/packed --json",
    )
    inspect.add_argument("model", metavar="MODEL", help="a folder or a name on the Hub; float, latent or packed")
    group = inspect.add_argument_group("what to binarize in a float model, as in StoMPPConfig")
    choose: Any = group
    _option(choose, "--mode", choices=CHOICES["mode"], help="bnn: 1-bit weights and activations; bwn: weights alone")
    _add_modes(choose)
    _option(choose, "--unit", choices=CHOICES["unit"], help="what freezes together (default: layer)")
    _add_word_embeddings(choose)
    _option(
        choose,
        "--modules_to_not_convert",
        nargs="*",
        metavar="PATTERN",
        help="what stays float: regular expressions for parts of module names (default: embeddings pooler classifier)",
    )
    _option(choose, "--layer_stack", metavar="NAME", help="the list of encoder layers, where it cannot be found")
    _option(
        choose,
        "--example_inputs",
        metavar="FILE",
        help="a safetensors file with arguments of the model's forward, for models that take neither text nor images",
    )


def _add_output(parser: argparse.ArgumentParser, model: str) -> None:
    parser.add_argument("model", metavar="MODEL", help=model)
    parser.add_argument("output", metavar="OUTPUT", help="the folder to write; must be empty or new")
    parser.add_argument(
        "--force", action="store_true", help="replace the model in OUTPUT; files that are not the model's stay"
    )


def _add_train(commands: Any) -> None:
    train = _add(
        commands,
        "train",
        _command("training"),
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
    _option(data, "--train_file", type=Path, metavar="FILE", help=f"a file that ends in {kinds}")
    _option(data, "--validation_file", type=Path, metavar="FILE", help="the same, to measure on")
    data.add_argument("--task", help="a GLUE task instead, from the Hub or from --dataset_dir")
    _option(data, "--dataset_dir", type=Path, metavar="DIR", help="reads DIR/TASK/{train,validation}.parquet")
    _option(data, "--text_columns", nargs="+", metavar="NAME", help="one or two columns that hold the text")
    _option(data, "--label_column", default="label", metavar="NAME", help="default: label")
    _option(
        data,
        "--problem_type",
        choices=PROBLEM_TYPES,
        help="what labels are: one class a text (single_label_classification; default), a number (regression; of "
        "--task stsb without being asked), any number of classes (multi_label_classification): a list of names or "
        f"ids, in csv and tsv with {SEPARATOR} between them, or a class a word (token_classification): lists of words "
        "and of names or ids, in csv and tsv with spaces between them",
    )
    _option(data, "--max_length", type=_count, default=128, metavar="N", help="tokens of a text (default: 128)")
    _option(data, "--max_train_examples", type=_count, metavar="N", help="train on the first N only")
    how = train.add_argument_group("training")
    how.add_argument(
        "--method",
        choices=list(METHODS),
        help=f"{'; '.join(f'{name}: {method.help}' for name, method in METHODS.items())} (default: stompp_ste; of a "
        "model that is binary already, ste)",
    )
    how.add_argument(
        "--mode", choices=CHOICES["mode"], help="bnn (default): 1-bit weights and activations; bwn: weights"
    )
    _add_modes(how)
    _add_word_embeddings(how)
    how.add_argument(
        "--teacher",
        metavar="MODEL",
        help="what to distil from: float (default): the float model that is binarized, if its head is trained; none; "
        "or a folder or name of a model that was fine-tuned on this task",
    )
    epochs, rate = BINARY_DEFAULTS["num_train_epochs"], BINARY_DEFAULTS["learning_rate"]
    how.add_argument("--epochs", type=_positive, metavar="N", help=f"of training (default: {epochs:g})")
    _option(how, "--float_epochs", type=_positive, metavar="N", help="of fine-tuning in float before (default: none)")
    _option(how, "--learning_rate", type=_positive, metavar="RATE", help=f"default: {rate:g}")
    rate = FLOAT_DEFAULTS["learning_rate"]
    _option(how, "--float_learning_rate", type=_positive, metavar="RATE", help=f"default: {rate:g}")
    _option(how, "--batch_size", type=_count, default=32, metavar="N", help="default: 32")
    _option(
        how, "--logging_steps", type=_count, default=0.02, metavar="N", help="between two logs (default: 2%% of all)"
    )
    how.add_argument("--seed", type=int, default=0, metavar="N", help="default: 0")
    how.add_argument("--bf16", action="store_true", help="bfloat16 autocast")
    how.add_argument("--cpu", action="store_true", help="leave a GPU alone")
    _option(how, "--report_to", nargs="*", default="none", metavar="TRACKER", help="tensorboard, wandb, mlflow, ...")
    how.add_argument("--resume", action="store_true", help="go on with the run in OUTPUT, with the same options")


def _add_distill(commands: Any) -> None:
    command = _add(
        commands,
        "distill",
        _command("distill"),
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
    _option(
        data,
        "--text_columns",
        nargs="+",
        metavar="NAME",
        help="the column (default: text or sentence, or the only one), or the two that hold pairs of texts",
    )
    _option(data, "--split_sentences", action="store_true", help="cut each text into its sentences")
    _option(data, "--max_length", type=_count, default=128, metavar="N", help="tokens of a text (default: 128)")
    _option(data, "--max_texts", type=_count, metavar="N", help="take N of the texts, drawn by --seed")
    _option(
        data,
        "--validation_share",
        type=_share,
        default=0.02,
        metavar="SHARE",
        help="of the texts, to measure on (default: 0.02, and 200 where that is no more than a fifth)",
    )
    how = command.add_argument_group("training")
    methods = {name: method for name, method in METHODS.items() if name != "float"}
    how.add_argument(
        "--method",
        choices=list(methods),
        help=f"{'; '.join(f'{name}: {method.help}' for name, method in methods.items())} (default: stompp_ste, and "
        "ste with --student)",
    )
    how.add_argument(
        "--mode", choices=CHOICES["mode"], help="bnn (default): 1-bit weights and activations; bwn: weights"
    )
    _add_modes(how)
    _option(
        how, "--student", metavar="LATENT", help="go on from OUTPUT/latent of an earlier run (default: from MODEL)"
    )
    _add_word_embeddings(how)
    _option(
        how,
        "--losses",
        metavar="JSON",
        help="a weight for each loss (default: normalized_hidden_states, and mean_embeddings or cls_embeddings for a "
        "sentence encoder, each 1)",
    )
    length = how.add_mutually_exclusive_group()
    length.add_argument("--epochs", type=_positive, default=1.0, metavar="N", help="of training (default: 1)")
    _option(length, "--max_steps", type=_count, metavar="N", help="optimizer steps instead")
    rate = BINARY_DEFAULTS["learning_rate"]
    _option(how, "--learning_rate", type=_positive, metavar="RATE", help=f"default: {rate:g}")
    _option(how, "--batch_size", type=_count, default=32, metavar="N", help="default: 32")
    how.add_argument("--seed", type=int, default=0, metavar="N", help="default: 0")
    how.add_argument("--bf16", action="store_true", help="bfloat16 autocast")
    how.add_argument("--cpu", action="store_true", help="leave a GPU alone")
    how.add_argument("--resume", action="store_true", help="go on with the run in OUTPUT, with the same options")


def _add_pack(commands: Any) -> None:
    pack = _add(
        commands,
        "pack",
        _command("conversion", "run_pack"),
        "a trained, committed model -> 1-bit weights",
        "Packs a latent model whose units are all frozen into 1-bit weights, and copies its tokenizer. The packed "
        "model gives the same answers. OUTPUT appears when it is complete; an interrupted run leaves nothing.",
        "hf-stompp pack output/model output/packed",
    )
    _add_output(pack, "a committed latent model: a folder or a name on the Hub")


def _add_unpack(commands: Any) -> None:
    unpack = _add(
        commands,
        "unpack",
        _command("conversion", "run_unpack"),
        "1-bit weights -> a latent model to train on, or a plain float one",
        "Turns a packed model into a committed latent one, in plain PyTorch operations: trainable, and it packs to "
        "the same bits. Its weights are +-scale; what training knew beyond the signs is gone. With --float, a model "
        "of mode bwn becomes a plain Transformers model that needs no hf_stompp to load.",
        "hf-stompp unpack output/packed output/latent",
        "hf-stompp unpack output/packed output/float --float",
    )
    _add_output(unpack, "a packed model: a folder or a name on the Hub")
    unpack.add_argument("--float", action="store_true", help="a plain float model of +-scale weights (mode bwn only)")


def _add_export(commands: Any) -> None:
    export = _add(
        commands,
        "export",
        _command("exporting", "run_export"),
        "1-bit weights -> an ONNX file of standard operators",
        "Writes a packed model as one ONNX file of standard operators, in float32, which any runtime can read. Its "
        "weights stay eight to a byte; its answers are those of the packed model. Batch size and sequence length are "
        "free. Needs onnx and onnxscript: pip install 'hf_stompp[onnx]'.",
        "hf-stompp export output/packed output/model.onnx",
    )
    export.add_argument("model", metavar="MODEL", help="a packed model: a folder or a name on the Hub")
    export.add_argument("output", metavar="OUTPUT.onnx", help="the file to write")
    export.add_argument("--force", action="store_true", help="replace OUTPUT.onnx if it is there")


def _add_eval(commands: Any) -> None:
    evaluate = _add(
        commands,
        "eval",
        _command("evaluation"),
        "how good a text or token classifier or a regression is on a labelled file, and its speed",
        "Measures the answers of a classification model (float, latent or packed) on labelled examples, by "
        "accuracy, F1 and Matthews correlation, and how many it gives a second. The text is found in the columns that "
        "GLUE uses, or in the only one or two text columns; labels are names of the model's classes, or ids. A "
        "regression takes numbers and is measured by Pearson and Spearman correlation and squared error; a model of "
        f"several classes a text takes lists, in csv and tsv with {SEPARATOR} between the classes; a token classifier "
        "lists of words and of classes. Needs datasets: pip install 'hf_stompp[glue]'.",
        "hf-stompp eval output/packed --file dev.csv",
        "hf-stompp eval output/packed --file dev.jsonl --text_columns title body --label_column topic",
        "hf-stompp eval output/packed --task sst2",
        "hf-stompp eval output/packed --task sst2 --dataset_dir glue --json",
    )
    evaluate.add_argument("model", metavar="MODEL", help="a folder or a name on the Hub; float, latent or packed")
    _add_examples(evaluate)


def _add_examples(parser: argparse.ArgumentParser) -> None:
    """What to measure a classifier with."""
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--file", type=Path, help=f"a file that ends in {', '.join(READERS)}")
    source.add_argument("--task", help="the validation set of a GLUE task, from the Hub or from --dataset_dir")
    _option(
        parser,
        "--dataset_dir",
        type=Path,
        metavar="DIR",
        help="where to read --task instead: DIR/TASK/validation.parquet, or the Hub's validation-*.parquet",
    )
    _option(parser, "--text_columns", nargs="+", metavar="NAME", help="one or two columns that hold the text")
    _option(parser, "--label_column", default="label", metavar="NAME", help="default: label")
    _option(parser, "--batch_size", type=_count, default=32, metavar="N", help="default: 32")
    _option(parser, "--max_length", type=_count, default=128, metavar="N", help="tokens of a text (default: 128)")
    parser.add_argument("--device", help="default: cuda where there is one, otherwise cpu")


def _add_sensitivity(commands: Any) -> None:
    command = _add(
        commands,
        "sensitivity",
        _command("sensitivity"),
        "what each part of a float classifier costs when it alone is binarized",
        "Binarizes one part of a float text classifier after the other, without training, and measures how far its "
        "answers move from the float model's, and how often they are right. Parts are encoder layers (unit), all "
        "layers of one name (kind) and single linear layers (module). Scales and thresholds of activations come from "
        "32 of the examples. --keep, --bytes and --milliseconds suggest a mode for every layer, as --mode and --modes "
        "take it. "
        "It tells which parts matter most, not how good a trained binary model will be.",
        "hf-stompp sensitivity output/float --file dev.csv",
        "hf-stompp sensitivity output/float --file dev.csv --detail kind unit --plot sensitivity.png",
        "hf-stompp sensitivity output/float --task sst2 --keep 8 --json",
        "hf-stompp sensitivity output/float --task sst2 --milliseconds 6.5",
    )
    command.add_argument("model", metavar="MODEL", help="a float text classifier: a folder or a name on the Hub")
    _add_examples(command)
    _option(command, "--max_examples", type=_count, default=256, metavar="N", help="measure with N (default: 256)")
    command.add_argument("--seed", type=int, default=0, metavar="N", help="of drawing them (default: 0)")
    command.add_argument("--mode", nargs="+", choices=CHOICES["mode"], help="of the part (default: both)")
    command.add_argument("--detail", nargs="+", choices=DETAILS, help="what a part is (default: all three)")
    budget: Any = command.add_mutually_exclusive_group()
    budget.add_argument("--keep", type=_count, metavar="N", help="suggest another mode for N layers")
    budget.add_argument("--bytes", type=_count, metavar="N", help="suggest modes for a packed file of at most N bytes")
    budget.add_argument(
        "--milliseconds",
        type=_positive,
        metavar="X",
        help="suggest modes for a packed model that takes X on this CPU for one text of --max_length tokens",
    )
    _option(command, "--keep_as", choices=("bwn", "float"), default="bwn", help="that mode (default: bwn)")
    command.add_argument("--plot", type=Path, metavar="FILE", help="draw the costs, too (needs matplotlib)")


def _add_plot(commands: Any) -> None:
    plot = _add(
        commands,
        "plot",
        _command("plotting"),
        "a run's training dynamics, as a picture and an HTML page",
        "Draws what a run logged: the frozen fraction of each unit, the evaluation of the fully binary model and of "
        "the mixed one in training, training loss, gradient norm and learning rate, over optimizer steps. Writes "
        "dynamics.png and dynamics.html, one page with picture and tables that needs no network. RUN is read, not "
        "loaded: the model may be anywhere. A run of the plain Trainer is drawn without what it did not log. Needs "
        "matplotlib: pip install 'hf_stompp[plot]'.",
        "hf-stompp plot output",
        "hf-stompp plot output --output figures --metric f1",
        "hf-stompp plot output/checkpoint-500 --force      # a run that is still going on",
        "hf-stompp plot benchmarks/results/sst2_stompp_history.json --output figures",
    )
    plot.add_argument(
        "run_folder",
        metavar="RUN",
        type=Path,
        help="output_dir of a run, one of its checkpoints, or a JSON file with its log_history",
    )
    plot.add_argument("--output", type=Path, metavar="FOLDER", help="where to write (default: RUN, or its folder)")
    plot.add_argument("--metric", metavar="NAME", help="the measure to draw (default: the one evaluated most often)")
    plot.add_argument("--force", action="store_true", help="replace dynamics.png and dynamics.html that are there")


def _add_bench(commands: Any) -> None:
    bench = _add(
        commands,
        "bench",
        _bench,
        "time packed layers and models against torch's fp32, bf16 and int8",
        "Times packed layers and models against torch's fp32, bf16 and dynamic int8 in one process, in turn. Takes "
        "about ten minutes; --quick takes seconds and shows that it works. Close what else runs on the machine.",
        "hf-stompp bench --quick",
        "hf-stompp bench --level model --threads 1 4 --output bench.json",
    )
    bench.add_argument(
        "--level",
        choices=["op", "model", "loading", "all"],
        default="all",
        help="single linear layers, whole encoders, loading time and memory, or all (default)",
    )
    bench.add_argument(
        "--threads",
        type=_count,
        nargs="+",
        default=[1],
        help="numbers of threads for whole encoders; single layers run on the first (default: 1)",
    )
    bench.add_argument(
        "--kernels",
        nargs="*",
        choices=cpu.KERNELS,
        default=[],
        help="kernels to time beside the one that is chosen automatically",
    )
    bench.add_argument("--output", type=Path, help="write the result to this JSON file")
    bench.add_argument("--quick", action="store_true", help="a few small cases, and no loading")


def main(words: Sequence[str] | None = None) -> int:
    """
    Runs a command.

    Args:
        words (`Sequence[str]`, *optional*): the command line without the program's name; that of the process when not
            given.

    Returns:
        `int`: the exit status: 0, 2 after an error, 130 after Ctrl-C.
    """
    words = sys.argv[1:] if words is None else list(words)
    arguments = parser().parse_args(words, argparse.Namespace(words=words))
    try:
        with nullcontext() if arguments.debug else quiet_transformers():
            arguments.run(arguments)
        sys.stdout.flush()
    except BrokenPipeError:
        # `hf-stompp info | head -1`. Python would complain when it flushes on its way out.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        if arguments.debug:
            traceback.print_exc()
        print("\nhf-stompp: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if arguments.debug:
            traceback.print_exc()
        print(f"hf-stompp: {explain(error)}", file=sys.stderr)
        return 2
    return 0
