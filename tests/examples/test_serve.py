"""The example server: what clients get that ask at once, ask for nonsense, ask for too much, or go away."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from programs import load
from transformers import BertTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from hf_stompp import StoMPPConfig


pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
httpx = pytest.importorskip("httpx")

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "serve"
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = "the a film play song was is not very good bad dull warm slow and but so long short".split()
# Tokens beside the two special ones.
ROOM = 38


server, load_test = load(EXAMPLE / "server.py"), load(EXAMPLE / "load_test.py")


def sentence(number: int) -> str:
    words = [WORDS[(number * step) % len(WORDS)] for step in range(1, 2 + number % ROOM)]
    return " ".join(words)


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerBase:
    vocabulary = {word: index for index, word in enumerate(SPECIAL + WORDS)}
    return BertTokenizer(vocab=vocabulary, model_max_length=ROOM + 2)


@pytest.fixture
def folder(tiny_packed: Callable, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> Path:
    """A packed classifier with binary weights."""
    tiny_packed("bert", StoMPPConfig(mode="bwn")).save_pretrained(tmp_path / "packed")
    tokenizer.save_pretrained(tmp_path / "packed")
    return tmp_path / "packed"


# ----- Without a model -----


class Held:
    """A classifier that begins with no batch before it is let go, and keeps the batches that it was given."""

    def __init__(self) -> None:
        self.batches: list[list[str]] = []
        self.go = threading.Event()

    def __call__(self, texts: list[str]) -> list[dict[str, Any]]:
        self.batches.append(texts)
        assert self.go.wait(60)
        if "poison" in texts:
            raise ValueError("what no model can read")
        return [{"label": text, "scores": {text: 1.0}, "truncated": False} for text in texts]


Story = Callable[[Any, Held], Any]


def run(story: Story, **limits: Any) -> None:
    """Runs a story of clients against a server with a [`Held`] classifier."""
    held = Held()
    app = server.create_app(held, **{"max_batch_size": 4, "max_wait_ms": 0, "max_waiting": 64, **limits})
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)

    async def main() -> None:
        async with app.router.lifespan_context(app), httpx.AsyncClient(transport=transport, base_url="http://s") as c:
            try:
                await story(c, held)
            finally:
                held.go.set()

    asyncio.run(asyncio.wait_for(main(), 60))


async def ask(client: Any, *texts: str) -> Any:
    return await client.post("/predict", json={"texts": texts})


async def until_waiting(client: Any, count: int) -> None:
    while (await client.get("/health")).json()["waiting"] != count:
        await asyncio.sleep(0.01)


def labels(response: Any) -> list[str]:
    assert response.status_code == 200, response.text
    return [one["label"] for one in response.json()["predictions"]]


def test_texts_that_wait_run_together_sorted_by_length_and_each_client_gets_its_own() -> None:
    async def story(client: Any, held: Held) -> None:
        first = asyncio.create_task(ask(client, "first"))
        await until_waiting(client, 1)
        asked = [["a" * 9, "b" * 2], ["c" * 7], ["d" * 1, "e" * 8, "f" * 3]]
        others = [asyncio.create_task(ask(client, *texts)) for texts in asked]
        await until_waiting(client, 7)
        held.go.set()
        assert labels(await first) == ["first"]
        assert [labels(await one) for one in others] == asked
        assert held.batches == [["first"], ["d" * 1, "b" * 2, "f" * 3, "c" * 7], ["e" * 8, "a" * 9]]

    run(story)


def test_overload_is_503_with_a_time_to_retry_and_passes() -> None:
    async def story(client: Any, held: Held) -> None:
        taken = [asyncio.create_task(ask(client, *texts)) for texts in (["one"], ["two", "three"])]
        await until_waiting(client, 3)
        refused = await ask(client, "four", "five")
        assert refused.status_code == 503 and int(refused.headers["Retry-After"]) > 0
        assert "3 texts wait, more than 4 may not" in refused.json()["detail"]
        fits = asyncio.create_task(ask(client, "four"))
        await until_waiting(client, 4)
        held.go.set()
        assert [labels(await one) for one in (*taken, fits)] == [["one"], ["two", "three"], ["four"]]
        assert labels(await ask(client, "four", "five")) == ["four", "five"]

    run(story, max_waiting=4)


def test_an_error_of_the_model_is_told_to_those_of_its_batch_alone() -> None:
    async def story(client: Any, held: Held) -> None:
        held.go.set()
        assert (await ask(client, "poison", "other")).status_code == 500
        assert labels(await ask(client, "fine")) == ["fine"]
        await until_waiting(client, 0)

    run(story)


def test_a_client_that_gives_up_takes_no_place_and_harms_no_other() -> None:
    async def story(client: Any, held: Held) -> None:
        gone = [asyncio.create_task(ask(client, f"gone {number}")) for number in range(2)]
        await until_waiting(client, 2)
        stays = asyncio.create_task(ask(client, "stays"))
        await until_waiting(client, 3)
        for one in gone:
            one.cancel()
        await until_waiting(client, 1)
        held.go.set()
        assert labels(await stays) == ["stays"] and labels(await ask(client, "next")) == ["next"]

    run(story)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("", "Field required"),
        ("{", "JSON decode error"),
        ("[]", "valid dictionary"),
        ("{}", "Field required"),
        ('{"texts": "a good film"}', "valid list"),
        ('{"texts": []}', "at least 1 item"),
        ('{"texts": ["a", 1]}', "valid string"),
        ('{"texts": [null]}', "valid string"),
        ('{"texts": [NaN]}', "valid string"),
        ('{"texts": ["\\ud800"]}', "valid string"),
        (json.dumps({"texts": ["a"] * (server.MAX_TEXTS + 1)}), f"at most {server.MAX_TEXTS} items"),
        (json.dumps({"texts": ["a" * (server.MAX_CHARACTERS + 1)]}), f"at most {server.MAX_CHARACTERS} characters"),
    ],
    ids=lambda value: value[:24],
)
def test_bad_input_is_refused_with_its_place_and_no_copy_of_it(body: str, message: str) -> None:
    async def story(client: Any, held: Held) -> None:
        response = await client.post("/predict", content=body, headers={"Content-Type": "application/json"})
        (error,) = response.json()["detail"]
        assert response.status_code == 422 and error["where"][0] == "body" and message in error["message"]
        assert len(response.text) < 200 and not held.batches

    run(story)


# ----- With a model -----


def test_labels_scores_and_what_was_cut(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    classify = server.load(str(folder), None, 256)

    fits, longer, short = classify([" ".join(["film"] * count) for count in (ROOM, ROOM + 1, 1)])

    assert (fits["truncated"], longer["truncated"], short["truncated"]) == (False, True, False)
    assert list(fits["scores"]) == ["LABEL_0", "LABEL_1", "LABEL_2"] and sum(fits["scores"].values()) == pytest.approx(
        1
    )
    assert all(one["scores"][one["label"]] == max(one["scores"].values()) for one in (fits, longer, short))
    assert longer["scores"] == pytest.approx(fits["scores"], abs=1e-6)
    cut = server.load(str(folder), None, 8)([sentence(30)])
    assert cut[0]["truncated"]


def test_models_that_cannot_be_served_are_refused(
    folder: Path, tiny_model: Callable, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, capsys: Any
) -> None:
    tiny_model("bert", num_labels=1).save_pretrained(tmp_path / "regression")
    tokenizer.save_pretrained(tmp_path / "regression")
    for words, message in (
        ([str(folder), "--quantize", "int8"], "is packed: serve it without --quantize"),
        ([str(tmp_path / "regression")], "has 1 labels (None): it must choose one of several"),
        ([str(tmp_path / "nothing")], "nothing"),
        ([str(folder), "--max_waiting", "63"], "one request may bring 64 texts"),
    ):
        with pytest.raises(SystemExit) as stopped:
            server.main(words)
        assert stopped.value.code == 2 and message in capsys.readouterr().err


@pytest.fixture
def served(folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> Iterator[Callable]:
    """Starts the server in a process of its own; nothing that it was asked may leave a trace in its log."""
    monkeypatch.setenv("PYTHONPATH", ":".join([str(EXAMPLE.parents[1]), *filter(None, sys.path)]))
    yield lambda *words: load_test.serving([str(folder), *words])
    log = capfd.readouterr().err
    assert "Finished server process" in log and not re.search("Traceback|ERROR|Exception", log), log


def scores_alone(folder: Path, model: PreTrainedModel, texts: list[str]) -> dict[str, list[float]]:
    tokenizer = BertTokenizer.from_pretrained(folder)
    with torch.no_grad():
        return {text: model(**tokenizer(text, return_tensors="pt")).logits.softmax(-1)[0].tolist() for text in texts}


@pytest.mark.slow
def test_sixteen_clients_get_what_the_model_says_of_each_text_alone(folder: Path, served: Callable) -> None:
    texts = [sentence(number) for number in range(100)]
    model = server.AutoModelForSequenceClassification.from_pretrained(folder)
    expected = scores_alone(folder, model, texts)

    def client(port: int, number: int) -> list[tuple[str, dict[str, Any]]]:
        found, end, sent = [], time.monotonic() + 3, number
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as connection:
            # Each goes through the texts in an order of its own, from one to three at a time.
            while time.monotonic() < end:
                asked = [texts[(sent * 7 + step) % len(texts)] for step in range(1 + number % 3)]
                response = connection.post("/predict", json={"texts": asked})
                assert response.status_code == 200, response.text
                found += zip(asked, response.json()["predictions"], strict=True)
                sent += 1
        return found

    with served() as (_, port), ThreadPoolExecutor(16) as threads:
        # A client that leaves before it has its answer.
        with socket.create_connection(("127.0.0.1", port)) as leaving:
            body = json.dumps({"texts": texts[:60]}).encode()
            head = (
                f"POST /predict HTTP/1.1\r\nHost: s\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
            )
            leaving.sendall(head.encode() + b"\r\n\r\n" + body)
        answers = [pair for part in threads.map(client, [port] * 16, range(16)) for pair in part]

    assert {text for text, _ in answers} == set(texts)
    for text, answer in answers:
        assert list(answer["scores"].values()) == pytest.approx(expected[text], abs=1e-3)


@pytest.mark.slow
def test_what_was_taken_is_answered_before_the_server_ends(served: Callable) -> None:
    texts = [sentence(number) for number in range(6)]
    with served("--max_wait_ms", "2000", "--max_batch_size", "64") as (process, port):
        url = f"http://127.0.0.1:{port}"
        with ThreadPoolExecutor(6) as threads:
            taken = [threads.submit(httpx.post, f"{url}/predict", json={"texts": [one]}, timeout=60) for one in texts]
            while httpx.get(f"{url}/health").json()["waiting"] < len(texts):
                assert not any(one.done() for one in taken)
            process.terminate()
            assert [one.result().status_code for one in taken] == [200] * len(texts)
        process.wait(60)
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{url}/health")


@pytest.mark.slow
def test_the_load_test_measures_packed_float_and_int8(
    folder: Path, tiny_model: Callable, tokenizer: PreTrainedTokenizerBase, monkeypatch: Any, tmp_path: Path
) -> None:
    tiny_model("bert").save_pretrained(tmp_path / "float")
    tokenizer.save_pretrained(tmp_path / "float")
    (tmp_path / "texts.txt").write_text("\n".join(map(sentence, range(9))), encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", ":".join([str(EXAMPLE.parents[1]), *filter(None, sys.path)]))
    monkeypatch.chdir(tmp_path)
    words = "packed=packed float=float --clients 4 --seconds 1 --texts texts.txt --output result.json".split()

    found = load_test.main(words)

    assert json.loads((tmp_path / "result.json").read_text()) == found
    assert list(found["models"]) == ["packed", "float", "float, int8"]
    assert (found["clients"], found["texts"], found["seed"]) == (4, 9, 0) and found["machine"] and found["versions"]
    assert found["command"] == f"python examples/serve/load_test.py {' '.join(words)}"
    for row in found["models"].values():
        assert row["requests"] > 0 and row["errors"] == {} and min(row["resident_bytes"].values()) > 2**20
        # The second that was asked for, and what the last answers took.
        assert row["seconds"] > 1
        assert 0 < row["milliseconds"]["median"] <= row["milliseconds"]["p95"] <= row["milliseconds"]["p99"]


def test_figures_of_several_clients_are_those_worked_out_by_hand() -> None:
    one, other = clients = [load_test.Client(0, [], load_test.random.Random(0), 0) for _ in range(2)]

    none = load_test.figures(clients, 2.0)
    assert (none["requests"], none["requests_per_second"], none["score_changes_with_batch"]) == (0, 0, 0)
    assert none["milliseconds"] == {"median": None, "p95": None, "p99": None}

    one.seconds, other.seconds = [0.03], [0.01]
    # Of two requests the median lies halfway, p95 at 95 % of the way from the fast one to the slow one.
    assert load_test.figures(clients, 2.0)["milliseconds"] == {"median": 20.0, "p95": 29.0, "p99": 29.8}

    # All of 0, 1, ..., 100 ms once, out of order.
    one.seconds, other.seconds = [n / 1000 for n in range(100, 0, -2)], [n / 1000 for n in (*range(1, 100, 2), 0)]
    one.scores, other.scores = [("a", 0.5), ("b", 0.875)], [("a", 0.75), ("b", 0.25), ("b", 0.5)]
    one.errors.update({"status 503": 2})
    other.errors.update({"status 503": 1, "timed out": 1})
    assert load_test.figures(clients, 8.0) == {
        "requests": 101,
        "seconds": 8.0,
        # 101 / 8 = 12.625
        "requests_per_second": 12.6,
        "milliseconds": {"median": 50.0, "p95": 95.0, "p99": 99.0},
        "errors": {"status 503": 3, "timed out": 1},
        # Of b; that of a is 0.25.
        "score_changes_with_batch": 0.625,
    }


def test_errors_of_a_server_are_counted_by_kind() -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        client = load_test.Client(nobody.getsockname()[1], ["a"], load_test.random.Random(0), time.monotonic() + 0.2)
        client.run()
    assert not client.seconds and list(client.errors) == ["[Errno 111] Connection refused"]
