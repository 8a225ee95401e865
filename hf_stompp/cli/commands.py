"""The commands and their arguments."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..config import CHOICES
from ..model.sensitivity import DETAILS
from ..ops import cpu
from .examples import SEPARATOR
from .options import (
    add_command,
    add_examples,
    add_modes,
    add_output,
    add_word_embeddings,
    count,
    option,
    positive,
    run_of,
)
from .training_options import add_distill, add_train


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
    add_command(
        commands,
        "info",
        run_of("information"),
        "versions, the kernel that runs, and why the others do not",
        "Tells the versions of what matters, which kernel multiplies the bits on this machine's processor and GPUs, "
        "and of every other kernel why it does not run here.",
        "hf-stompp info",
        "hf-stompp info --json",
    )
    _add_inspect(commands)
    add_train(commands)
    add_distill(commands)
    _add_pack(commands)
    _add_unpack(commands)
    _add_export(commands)
    _add_eval(commands)
    _add_sensitivity(commands)
    _add_plot(commands)
    _add_bench(commands)
    return root


def _add_inspect(commands: Any) -> None:
    inspect = add_command(
        commands,
        "inspect",
        run_of("inspection"),
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
    choose = inspect.add_argument_group("what to binarize in a float model, as in StoMPPConfig")
    option(choose, "--mode", choices=CHOICES["mode"], help="bnn: 1-bit weights and activations; bwn: weights alone")
    add_modes(choose)
    option(choose, "--unit", choices=CHOICES["unit"], help="what freezes together (default: layer)")
    add_word_embeddings(choose)
    option(
        choose,
        "--modules_to_not_convert",
        nargs="*",
        metavar="PATTERN",
        help="what stays float: regular expressions for parts of module names (default: embeddings pooler classifier)",
    )
    option(choose, "--layer_stack", metavar="NAME", help="the list of encoder layers, where it cannot be found")
    option(
        choose,
        "--example_inputs",
        metavar="FILE",
        help="a safetensors file with arguments of the model's forward, for models that take neither text nor images",
    )


def _add_pack(commands: Any) -> None:
    pack = add_command(
        commands,
        "pack",
        run_of("conversion", "run_pack"),
        "a trained, committed model -> 1-bit weights",
        "Packs a latent model whose units are all frozen into 1-bit weights, and copies its tokenizer. The packed "
        "model gives the same answers. OUTPUT appears when it is complete; an interrupted run leaves nothing.",
        "hf-stompp pack output/model output/packed",
    )
    add_output(pack, "a committed latent model: a folder or a name on the Hub")


def _add_unpack(commands: Any) -> None:
    unpack = add_command(
        commands,
        "unpack",
        run_of("conversion", "run_unpack"),
        "1-bit weights -> a latent model to train on, or a plain float one",
        "Turns a packed model into a committed latent one, in plain PyTorch operations: trainable, and it packs to "
        "the same bits. Its weights are +-scale; what training knew beyond the signs is gone. With --float, a model "
        "of mode bwn becomes a plain Transformers model that needs no hf_stompp to load.",
        "hf-stompp unpack output/packed output/latent",
        "hf-stompp unpack output/packed output/float --float",
    )
    add_output(unpack, "a packed model: a folder or a name on the Hub")
    unpack.add_argument("--float", action="store_true", help="a plain float model of +-scale weights (mode bwn only)")


def _add_export(commands: Any) -> None:
    export = add_command(
        commands,
        "export",
        run_of("exporting"),
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
    evaluate = add_command(
        commands,
        "eval",
        run_of("evaluation"),
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
    add_examples(evaluate)


def _add_sensitivity(commands: Any) -> None:
    command = add_command(
        commands,
        "sensitivity",
        run_of("sensitivity"),
        "what each part of a float classifier costs when it alone is binarized",
        "Binarizes one part of a float text classifier after the other, without training, and measures how far its "
        "answers move from the float model's, and how often they are right. Parts are encoder layers (unit), all "
        "layers of one name (kind) and single linear layers (module). Scales and thresholds of activations come from "
        "32 of the examples. --keep, --bytes and --milliseconds suggest a mode for every layer, as --mode and --modes "
        "take it. It tells which parts matter most, not how good a trained binary model will be.",
        "hf-stompp sensitivity output/float --file dev.csv",
        "hf-stompp sensitivity output/float --file dev.csv --detail kind unit --plot sensitivity.png",
        "hf-stompp sensitivity output/float --task sst2 --keep 8 --json",
        "hf-stompp sensitivity output/float --task sst2 --milliseconds 6.5",
    )
    command.add_argument("model", metavar="MODEL", help="a float text classifier: a folder or a name on the Hub")
    add_examples(command)
    option(command, "--max_examples", type=count, default=256, metavar="N", help="measure with N (default: 256)")
    command.add_argument("--seed", type=int, default=0, metavar="N", help="of drawing them (default: 0)")
    command.add_argument("--mode", nargs="+", choices=CHOICES["mode"], help="of the part (default: both)")
    command.add_argument("--detail", nargs="+", choices=DETAILS, help="what a part is (default: all three)")
    budget = command.add_mutually_exclusive_group()
    budget.add_argument("--keep", type=count, metavar="N", help="suggest another mode for N layers")
    budget.add_argument("--bytes", type=count, metavar="N", help="suggest modes for a packed file of at most N bytes")
    budget.add_argument(
        "--milliseconds",
        type=positive,
        metavar="X",
        help="suggest modes for a packed model that takes X on this CPU for one text of --max_length tokens",
    )
    option(command, "--keep_as", choices=("bwn", "float"), default="bwn", help="that mode (default: bwn)")
    command.add_argument("--plot", type=Path, metavar="FILE", help="draw the costs, too (needs matplotlib)")


def _add_plot(commands: Any) -> None:
    plot = add_command(
        commands,
        "plot",
        run_of("plotting"),
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
    bench = add_command(
        commands,
        "bench",
        run_of("benchmarking"),
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
        type=count,
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
