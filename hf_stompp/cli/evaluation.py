"""`hf-stompp eval`, and the classifier and examples that others measure with too."""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from transformers import AutoTokenizer
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
)

from .errors import CommandError, hub_errors
from .examples import TOKENS, Examples, read_examples
from .labels import class_names, model_labels, problem_type_of
from .measures import metrics_of
from .models import frozen_fractions, load, model_class, read_config, state_of
from .words import IGNORED, labels_of_read_words, word_logits


CLASSIFIERS = {
    *MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.values(),
    *MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES.values(),
}
"""Names of the classes that can be measured."""


@dataclass(frozen=True)
class Classifier:
    """
    A float, latent or packed classifier of texts or of their words, and the examples that it is measured with: their
    `labels` as the model takes them, their texts cut at `max_length` tokens.
    """

    model: Any
    tokenizer: Any
    examples: Examples
    labels: list[Any]
    problem_type: str
    max_length: int
    batch_size: int

    def encode(self, rows: Sequence[int]) -> Any:
        """Examples as the model takes them."""
        batch = [[column[row] for row in rows] for column in self.examples.texts]
        options = {"truncation": True, "max_length": self.max_length, "padding": True, "return_tensors": "pt"}
        return self.tokenizer(*batch, is_split_into_words=self.problem_type == TOKENS, **options)

    def answers(self, model: Any, rows: Sequence[int], progress: Callable[[int], Any] = lambda count: None) -> Tensor:
        """
        Logits of shape `(len(rows), num_labels)`, on the CPU; of words `(len(rows), words, num_labels)`, minus
        infinity where a text has no more words that the model reads. `model` is this one, or what was made of it;
        `progress` is told after each batch how many examples it had.
        """
        # Texts of like length share a batch, which wastes no time on padding.
        order = sorted(range(len(rows)), key=lambda place: -sum(len(c[rows[place]]) for c in self.examples.texts))
        found: list[Tensor] = []
        with torch.inference_mode():
            for first in range(0, len(order), self.batch_size):
                places = order[first : first + self.batch_size]
                inputs = self.encode([rows[place] for place in places]).to(model.device)
                logits = model(**inputs).logits.cpu()
                if self.problem_type == TOKENS:
                    counts = [len(self.examples.texts[0][rows[place]]) for place in places]
                    found += [word_logits(logits[i], inputs.word_ids(i), count) for i, count in enumerate(counts)]
                else:
                    found += logits
                progress(len(places))
        logits = pad_sequence(found, batch_first=True, padding_value=-torch.inf)
        return torch.empty_like(logits).index_copy_(0, torch.tensor(order), logits)


def load_classifier(arguments: argparse.Namespace) -> Classifier:
    """The model and the examples that a command names. Refuses a model that is no classifier or lacks weights."""
    config: Any = read_config(arguments.model)
    name = model_class(config, arguments.model).__name__
    if name not in CLASSIFIERS:
        raise CommandError(
            f"{arguments.model} is a {name}, and {arguments.command} measures classifiers: name a "
            "...ForSequenceClassification or ...ForTokenClassification"
        )
    problem_type = problem_type_of(config, arguments.model)
    examples = read_examples(arguments.file, arguments, problem_type=problem_type)
    labels = model_labels(examples, config, problem_type)
    with hub_errors("model", arguments.model):
        tokenizer = read_tokenizer(arguments.model)
    model: Any = load(arguments.model, config)
    model.to(torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")))
    length = longest(arguments.max_length, config, tokenizer)
    return Classifier(model, tokenizer, examples, labels, problem_type, length, arguments.batch_size)


def evaluate(arguments: argparse.Namespace) -> dict[str, Any]:
    """What `hf-stompp eval` tells."""
    classifier = load_classifier(arguments)
    model, examples = classifier.model, classifier.examples
    labels: Any = classifier.labels
    of_words = classifier.problem_type == TOKENS
    state = state_of(model.config, arguments.model)
    start = time.perf_counter()
    with tqdm(total=len(labels), desc="examples", unit="example", delay=1, leave=False, disable=None) as bar:
        logits = classifier.answers(model, range(len(labels)), bar.update).float()
    seconds = time.perf_counter() - start
    if of_words:
        labels = labels_of_read_words(labels, logits)
    metrics = metrics_of(logits, labels, classifier.problem_type, arguments.task, class_names(model.config))
    counted = labels[labels != IGNORED].tolist() if of_words else labels
    to_compare = {}
    if "accuracy" in metrics:
        to_compare = {
            "correct": round(metrics["accuracy"] * len(counted)),
            "largest_class": max(Counter(counted).values()) / len(counted),
        }
    fractions = frozen_fractions(model)
    return {
        "model": arguments.model,
        "class": type(model).__name__,
        "state": state,
        "committed": all(fraction == 1.0 for fraction in fractions.values()) if state == "latent" else None,
        "source": examples.source,
        "text_columns": list(examples.columns),
        "examples": len(examples.labels),
        **(
            {"words": len(counted), "words_left_out": sum(map(len, examples.labels)) - len(counted)}
            if of_words
            else {}
        ),
        "problem_type": classifier.problem_type,
        "measures": list(metrics),
        **metrics,
        **to_compare,
        "seconds": seconds,
        "examples_per_second": len(labels) / seconds,
        "batch_size": arguments.batch_size,
        "max_length": classifier.max_length,
        "device": str(model.device),
    }


def read_tokenizer(model: str) -> Any:
    """A model's tokenizer. Refuses a folder that has none."""
    folder = Path(model).expanduser()
    is_local = folder.is_dir()
    if is_local and not any(folder.glob("tokenizer*")) and not any(folder.glob("vocab.*")):
        # Transformers would make one that knows no words.
        raise CommandError(
            f"{model} has no tokenizer: copy tokenizer.json and tokenizer_config.json of its base model"
        )
    return AutoTokenizer.from_pretrained(folder if is_local else model, trust_remote_code=False)


def longest(asked: int, config: Any, tokenizer: Any) -> int:
    """Tokens that a text is cut at: as many as are asked for, or fewer where tokenizer or model take no more."""
    positions = getattr(config, "max_position_embeddings", 0)
    # XLNet has no limit, and says -1.
    return min(asked, tokenizer.model_max_length, positions if positions > 0 else asked)


def run(arguments: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Runs `hf-stompp eval`."""
    result = evaluate(arguments)
    lines = [f"{result['model']}: {result['class']}, {result['state']}"]
    if result["committed"] is False:
        lines.append("not committed yet: what follows is of a mixed network, not of the binary one")
    if "accuracy" in result:
        answered = f"{result['words']:,} words" if "words" in result else f"{result['examples']:,}"
        lines.append(
            f"accuracy {result['accuracy']:.4f}, {result['correct']:,} of {answered} right "
            f"(always the largest class: {result['largest_class']:.4f})"
        )
    lines.append(", ".join(f"{name} {result[name]:.4f}" for name in result["measures"] if name != "accuracy"))
    lines.append(
        f"{result['seconds']:.1f} s, {result['examples_per_second']:,.0f} examples/s in batches of "
        f"{result['batch_size']} on {result['device']}, tokenizer included"
    )
    lines.append(
        f"text from {', '.join(result['text_columns'])} of {result['source']}, at most {result['max_length']} tokens"
        + (f"; {result['words_left_out']:,} words beyond are not measured" if result.get("words_left_out") else "")
    )
    return result, "\n".join(lines)
