"""
A text classifier behind HTTP, with dynamic batching: texts of several requests run through the model together.

    python examples/serve/server.py FOLDER --threads 1
    curl localhost:8000/predict --json '{"texts": ["a good film", "a bad film"]}'

Float and packed models are served alike. `README.md` beside it says what is refused, and how many requests it takes.
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
import uvicorn
from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from hf_stompp.benchmark import dynamic_int8
from hf_stompp.model.modules import packed_modules


MAX_TEXTS = 64
MAX_CHARACTERS = 10_000

Classify = Callable[[list[str]], list[dict[str, Any]]]


class Texts(BaseModel):
    """The body of a request."""

    texts: list[Annotated[str, Field(max_length=MAX_CHARACTERS)]] = Field(min_length=1, max_length=MAX_TEXTS)


@dataclass
class Batcher:
    """Collects texts that arrive at about one time, and classifies them together, on one thread."""

    classify: Classify
    max_batch_size: int
    max_wait_ms: float
    max_waiting: int
    waiting: int = 0
    queue: asyncio.Queue[tuple[str, asyncio.Future]] = field(default_factory=asyncio.Queue)

    async def answer(self, texts: list[str]) -> list[dict[str, Any]]:
        """One answer a text; status 503 if too many texts wait already."""
        if self.waiting + len(texts) > self.max_waiting:
            detail = f"{self.waiting} texts wait, more than {self.max_waiting} may not: try again"
            raise HTTPException(503, detail, {"Retry-After": "1"})
        self.waiting += len(texts)
        try:
            futures = [asyncio.get_running_loop().create_future() for _ in texts]
            for item in zip(texts, futures, strict=True):
                self.queue.put_nowait(item)
            return await asyncio.gather(*futures)
        finally:
            self.waiting -= len(texts)

    async def run(self) -> None:
        """Answers until it is cancelled."""
        with ThreadPoolExecutor(1) as worker:
            while True:
                taken = [await self.queue.get()]
                if len(taken) + self.queue.qsize() < self.max_batch_size:
                    await asyncio.sleep(self.max_wait_ms / 1000)
                while not self.queue.empty():
                    taken.append(self.queue.get_nowait())
                # A batch is as wide as its longest text; all that was taken is answered before what comes later.
                taken.sort(key=lambda item: len(item[0]))
                for start in range(0, len(taken), self.max_batch_size):
                    await self.answer_batch(worker, taken[start : start + self.max_batch_size])

    async def answer_batch(self, worker: ThreadPoolExecutor, batch: list[tuple[str, asyncio.Future]]) -> None:
        texts, futures = zip(*batch, strict=True)
        try:
            answers = await asyncio.get_running_loop().run_in_executor(worker, self.classify, list(texts))
        except Exception as error:
            # Whoever sent these texts is told, by status 500; the next batch may be fine.
            answers = [error] * len(batch)
        for future, answer in zip(futures, answers, strict=True):
            # Whoever has gone waits no more.
            if not future.done():
                (future.set_exception if isinstance(answer, Exception) else future.set_result)(answer)


def load(name: str, quantize: str | None, max_length: int) -> Classify:
    """A function from texts to labels and scores, by a model with one label a text."""
    model = AutoModelForSequenceClassification.from_pretrained(name).eval()
    tokenizer = AutoTokenizer.from_pretrained(name)
    config = model.config
    if config.num_labels < 2 or config.problem_type not in (None, "single_label_classification"):
        raise ValueError(
            f"{name} has {config.num_labels} labels ({config.problem_type}): it must choose one of several"
        )
    if quantize == "int8":
        if packed_modules(model):
            raise ValueError(f"{name} is packed: serve it without --quantize")
        model = dynamic_int8(model)
    positions = getattr(config, "max_position_embeddings", 0)
    # XLNet has no limit, and says -1.
    longest = min(max_length, tokenizer.model_max_length, positions if positions > 0 else max_length)
    labels = [config.id2label[index] for index in range(config.num_labels)]

    def classify(texts: list[str]) -> list[dict[str, Any]]:
        batch = tokenizer(texts, truncation=True, max_length=longest, padding=True, return_tensors="pt")
        with torch.inference_mode():
            rows = model(**batch).logits.softmax(-1).tolist()
        return [
            {
                "label": labels[row.index(max(row))],
                "scores": dict(zip(labels, row, strict=True)),
                "truncated": bool(encoding.overflowing),
            }
            for row, encoding in zip(rows, batch.encodings, strict=True)
        ]

    # What is wrong with a model shows before the first client does; kernels are built now, if they must be.
    classify(["first"])
    return classify


def create_app(classify: Classify, **limits: Any) -> FastAPI:
    """The server: `limits` are those of [`Batcher`]."""
    batcher = Batcher(classify, **limits)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        # uvicorn leaves this block after the last answer is sent.
        task = asyncio.create_task(batcher.run())
        yield
        task.cancel()

    app = FastAPI(title="hf_stompp", lifespan=lifespan)

    @app.post("/predict")
    async def predict(body: Texts) -> dict[str, Any]:
        return {"predictions": await batcher.answer(body.texts)}

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {"status": "ok", "waiting": batcher.waiting}

    @app.exception_handler(RequestValidationError)
    async def refuse(request: Request, error: RequestValidationError) -> JSONResponse:
        # FastAPI's own sends the input back, which may be long, or no JSON (NaN, half of a surrogate pair).
        detail = [{"where": one["loc"], "message": one["msg"]} for one in error.errors()]
        return JSONResponse({"detail": detail}, 422)

    return app


def main(argv: list[str] | None = None) -> None:
    """Loads the model, and serves it until SIGTERM or SIGINT, then answers what it has taken."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("model", help="a classifier's folder, or its name on the Hub")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--threads", type=int, default=1, help="of the model")
    parser.add_argument("--quantize", choices=["int8"], help="torch's dynamic int8 linear layers, of a float model")
    parser.add_argument("--max_length", type=int, default=256, help="tokens; of a longer text the rest is left out")
    parser.add_argument("--max_batch_size", type=int, default=8, help="texts")
    parser.add_argument("--max_wait_ms", type=float, default=5, help="so long a batch waits for more texts")
    parser.add_argument("--max_waiting", type=int, default=256, help="texts; more are answered with 503")
    arguments = parser.parse_args(argv)
    if arguments.max_waiting < MAX_TEXTS:
        parser.error(f"--max_waiting {arguments.max_waiting}: one request may bring {MAX_TEXTS} texts")
    torch.set_num_threads(arguments.threads)
    try:
        classify = load(arguments.model, arguments.quantize, arguments.max_length)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    limits = {name: getattr(arguments, name) for name in ("max_batch_size", "max_wait_ms", "max_waiting")}
    uvicorn.run(create_app(classify, **limits), host=arguments.host, port=arguments.port, access_log=False)


if __name__ == "__main__":
    main()
