from __future__ import annotations

import ast
import errno
import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
import transformers

import hf_stompp
from hf_stompp import cli
from hf_stompp.cli import benchmarking


RUN = "import sys; from hf_stompp.cli import main; sys.exit(main())"
# Importing the package takes longer than all the commands.
RUN_SEVERAL = """
import contextlib, io, json, sys
from hf_stompp.cli import main
results = []
for words in json.loads(sys.argv[1]):
    with contextlib.redirect_stderr(io.StringIO()) as err:
        results.append([main(words), err.getvalue()])
print(json.dumps(results))
"""


def python(code: str, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs code in a process of its own, which is online."""
    return subprocess.run(
        [sys.executable, "-c", code, *words],
        env={**os.environ, "HF_HUB_OFFLINE": "0", **environment},
        capture_output=True,
        text=True,
        cwd=Path(hf_stompp.__file__).parent.parent,
    )


COMMANDS = list(cli.parser()._subparsers._group_actions[0].choices)


class Hub(BaseHTTPRequestHandler):
    """Answers as the Hub does for what it does not give away."""

    def do_HEAD(self) -> None:
        status, headers = {
            "gated": (403, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access to it is restricted"}),
            "token": (401, {"X-Error-Message": "Invalid credentials in Authorization header"}),
        }.get(self.path.split("/")[1], (401, {"X-Error-Code": "RepoNotFound"}))
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_HEAD

    def log_message(self, *arguments: object) -> None:
        """Says nothing."""


@pytest.fixture
def hub() -> Iterator[str]:
    """Address of a server on loopback."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        thread = Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.slow
def test_what_the_hub_refuses_is_one_line_with_the_next_step(hub: str, tmp_path: Path) -> None:
    commands = [
        ["inspect", "user/missing"],
        ["pack", "user/missing", str(tmp_path / "out")],
        ["inspect", "gated/model"],
        ["inspect", "token/model"],
        ["inspect", "not a/name!"],
    ]

    result = python(RUN_SEVERAL, json.dumps(commands), HF_ENDPOINT=hub, HF_HUB_CACHE=str(tmp_path), HF_TOKEN="hf_x")

    assert result.returncode == 0, result.stderr
    answers = json.loads(result.stdout)
    expected = [
        "there is no model 'user/missing', neither a folder here nor on the Hub, or it is private: check the name; "
        "for a private one, log in with `hf auth login` (or set HF_TOKEN)",
        "there is no model 'user/missing'",
        f"access to gated/model is granted on request: ask for it at {hub}/gated/model, then log in",
        "the Hub refuses the token that is set, or it does not give access to token/model: log in with",
        "there is no model 'not a/name!'",
    ]
    for (status, message), start in zip(answers, expected, strict=True):
        assert status == 2 and message.startswith(f"hf-stompp: {start}") and message.count("\n") == 1, message


@pytest.mark.slow
def test_hub_that_cannot_be_reached_is_one_line_with_the_next_step(tmp_path: Path) -> None:
    # No server listens on the port of `discard`. The client would try for half a minute.
    impatient = f"import time; time.sleep = lambda seconds: None; {RUN}"
    result = python(impatient, "inspect", "user/model", HF_ENDPOINT="http://127.0.0.1:9", HF_HUB_CACHE=str(tmp_path))

    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == (
        "hf-stompp: user/model is neither a folder here nor in the cache, and http://127.0.0.1:9 cannot be reached: "
        "check the network, or name a folder\n"
    )


def test_offline_mode_is_named(refused) -> None:
    assert refused("inspect", "user/model") == (
        "user/model is neither a folder here nor in the cache, and HF_HUB_OFFLINE is set: unset it, or name a folder"
    )


@pytest.mark.parametrize("words", [["--debug", "inspect", "./missing"], ["inspect", "./missing", "--debug"]])
def test_debug_shows_the_traceback(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(words) == 2

    error = capsys.readouterr().err
    assert "Traceback (most recent call last)" in error and "read_config" in error
    assert error.endswith(
        "hf-stompp: there is no folder ./missing: check the path, or give a name on the Hub, user/model\n"
    )


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ValueError("several\n  lines of\ttext"), "several lines of text"),
        (OSError(errno.ENOSPC, "No space left on device", "/x"), "no space left on the device of /x: make room"),
        (ImportError("this needs a package: pip install it"), "this needs a package: pip install it"),
        (KeyError("name"), "unexpected KeyError: 'name'; --debug shows where it comes from"),
        (AssertionError(), "unexpected AssertionError; --debug shows"),
        (RuntimeError(), "unexpected RuntimeError; --debug shows"),
        (ValueError("\x1b[2Ja \u202ename"), r"\x1b[2Ja \u202ename"),
        (PermissionError(13, "Permission denied", "/\x1b[2J"), r"no permission for /\x1b[2J: change"),
        (KeyError("\x9b2J"), r"unexpected KeyError: '\x9b2J'; --debug"),
    ],
)
def test_any_error_is_one_line(refused, monkeypatch: pytest.MonkeyPatch, error: Exception, expected: str) -> None:
    def fail(*arguments: object) -> None:
        raise error

    monkeypatch.setattr(benchmarking, "measure", fail)

    assert refused("bench").startswith(expected)


def test_no_class_that_may_run_code_of_a_repository_is_left_to_ask() -> None:
    # Transformers asks on the terminal where it is not told, and runs the code on "y".
    calls = []
    for path in Path(hf_stompp.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            function = node.func if isinstance(node, ast.Call) else None
            if isinstance(function, ast.Attribute) and function.attr == "from_pretrained":
                told = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                if ast.unparse(function.value).lower().startswith("auto"):
                    calls.append((f"{path.name}:{node.lineno}", told.get("trust_remote_code")))
    assert len(calls) > 5
    assert [place for place, told in calls if told != "False"] == []


@pytest.mark.parametrize("debug", [False, True])
def test_interruption_exits_with_130(monkeypatch, capsys: pytest.CaptureFixture[str], debug: bool) -> None:
    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(benchmarking, "measure", interrupt)

    assert cli.main(["bench", *(["--debug"] if debug else [])]) == 130
    error = capsys.readouterr().err
    assert error.endswith("hf-stompp: interrupted\n") and ("Traceback" in error) == debug


@pytest.mark.slow
def test_control_c_ends_a_running_command_without_a_traceback() -> None:
    process = subprocess.Popen(
        [sys.executable, "-u", "-c", RUN, "bench", "--level", "op"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=Path(hf_stompp.__file__).parent.parent,
        # A shell makes what it runs in the background ignore it, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    # Its progress bar shows that it is at work.
    started = process.stderr.read(1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)

    assert started and process.returncode == 130
    assert out == b"" and b"Traceback" not in err and err.endswith(b"hf-stompp: interrupted\n")


@pytest.mark.slow
def test_reader_that_goes_away_is_no_error() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", RUN, "info"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=Path(hf_stompp.__file__).parent.parent,
    )
    process.stdout.close()

    assert (process.stderr.read(), process.wait(timeout=60)) == (b"", 141)


def test_logging_of_transformers_is_left_as_it_was(tmp_path: Path) -> None:
    transformers.logging.set_verbosity_info()
    try:
        cli.main(["inspect", str(tmp_path)])
        assert transformers.logging.get_verbosity() == transformers.logging.INFO
    finally:
        transformers.logging.set_verbosity_warning()


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS)])
def test_help_has_examples_of_its_own_command(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        cli.main([*command, "--help"])

    output = capsys.readouterr().out
    assert exit.value.code == 0
    lines = [line.strip() for line in output.split("examples:\n")[1].splitlines() if line.startswith("  hf-stompp")]
    assert lines and all(" ".join(["hf-stompp", *command]) in line for line in lines)


def test_every_example_of_the_help_is_accepted(capsys: pytest.CaptureFixture[str]) -> None:
    seen = 0
    for command in COMMANDS:
        with pytest.raises(SystemExit):
            cli.main([command, "--help"])
        for line in capsys.readouterr().out.splitlines():
            # Those with dots leave out what the one before shows.
            if line.startswith("  hf-stompp") and "..." not in line:
                cli.parser().parse_args(shlex.split(line.split("  #")[0])[1:])
                seen += 1
    assert seen > 20


@pytest.mark.usefixtures("permissions_hold")
@pytest.mark.parametrize("command", ["train", "distill", "unpack", "bench"])
def test_command_that_may_not_write_says_so_before_it_works(
    tiny_model, tiny_packed, saved, refused, tmp_path, command
):
    table, text = tmp_path / "table.csv", tmp_path / "text.txt"
    table.write_text("text,label\nword1 word2,0\nword3 word4,1\n" * 4)
    text.write_text("word1 word2\nword3 word4\n" * 4)
    model = saved((tiny_packed if command == "unpack" else tiny_model)("bert"))
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o555)
    words = {
        "train": [model, closed, "--train_file", table, "--validation_file", table, "--max_length", 8],
        "distill": [model, closed, "--text", text, "--max_steps", 4, "--max_length", 8],
        "unpack": [model, closed],
        "bench": ["--quick", "--output", closed / "bench.json"],
    }
    message = refused(command, *words[command])
    assert str(closed) in message and "change its permissions" in message


def test_bench_refuses_a_folder_and_leaves_none_behind_when_it_fails(refused, tmp_path, monkeypatch):
    assert f"{tmp_path} is a folder: name a file" in refused("bench", "--quick", "--output", tmp_path)

    monkeypatch.setattr("torch.manual_seed", lambda seed: 1 / 0)
    assert "ZeroDivisionError" in refused("bench", "--quick", "--output", tmp_path / "deep" / "bench.json")
    assert not list(tmp_path.iterdir())
