"""`hf-stompp distill`: the 1-bit copy of an encoder, learned from text without labels."""

from __future__ import annotations

import argparse
import copy
import math
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from transformers import AutoModel, DataCollatorWithPadding, PreTrainedModel, set_seed

from ..data.tables import import_datasets
from ..data.text import Text, hold_out, read_texts, split_sentences
from ..model.card import add_section
from ..model.conversion import binarize
from ..model.modules import config_of
from ..output import write_json
from ..training.arguments import StoMPPTrainingArguments
from ..training.distillation import LABELS, LOSSES, check_teacher
from ..training.methods import RecipeArguments
from ..training.progression import plan_progression
from ..training.recipe import Recipe, Results, claim_output_dir
from ..training.sentence_encoder import copy_modules, embed, modules_folder, pooling_of, tokenize
from ..training.stages import make_trainer, pack_and_reload, train_binary, write_card
from ..training.summary import bytes_when_saved, measure, summarize
from .errors import CommandError, hub_errors
from .evaluation import longest, read_tokenizer
from .models import megabytes, read_config, state_of
from .options import read_losses
from .progress import stopping_on_interrupt
from .training import SUMMARY, check_output, default_method, trainer_arguments


IDENTITY = ("model", "student", "text_columns", "split_sentences", "max_texts", "max_length", "validation_share")
"""Arguments that `--resume` must find as they were, beside those of the recipe."""

SENTENCE_ENCODER = """\
## As a sentence encoder

```python
import hf_stompp
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("{name}")
embeddings = model.encode(["a good film", "I liked it"])
```
"""


@dataclass(frozen=True)
class Encoder:
    """
    What is distilled: a float32 model without a head, whose texts are cut at `max_length` tokens. Of a sentence
    encoder, `folder` has the files that make it one; of any other it is None, and `pooling` is `"mean"`.
    """

    model: PreTrainedModel
    tokenizer: Any
    max_length: int
    folder: Path | None
    pooling: str

    def losses(self, asked: str | None) -> dict[str, float]:
        """
        What the student learns: what is asked for, as JSON, or the hidden states, and the embedding of a sentence
        encoder. Refuses losses that need a head or labels.
        """
        if asked is None:
            embedding = {f"{self.pooling}_embeddings": 1.0} if self.folder is not None else {}
            return {"normalized_hidden_states": 1.0, **embedding}
        weights = read_losses(asked)
        for name in ("logits", LABELS):
            if name in weights:
                known = ", ".join(loss for loss in LOSSES if loss != "logits")
                raise CommandError(f"--losses: an encoder without a head has no {name}; name some of {known}")
        return weights


def load_encoder(arguments: argparse.Namespace) -> Encoder:
    """
    The model that is the teacher, and that the student begins as. Refuses one that is binary already, takes no text,
    lacks weights, pools in an unknown way, or has no tokenizer that can pad.
    """
    name = arguments.model
    config: Any = read_config(name)
    state = state_of(config, name)
    if state != "float":
        raise CommandError(f"{name} is {state}, binary already: name the float model that it was made from")
    path = Path(name).expanduser()
    with hub_errors("model", name):
        folder = modules_folder(name)
        pooling = "mean" if folder is None else pooling_of(folder)
        model, report = AutoModel.from_pretrained(
            path if path.is_dir() else name,
            dtype=torch.float32,
            trust_remote_code=False,
            output_loading_info=True,
        )
        if model.main_input_name != "input_ids":
            raise CommandError(f"{name} takes {model.main_input_name}, not text: name a text encoder")
        tokenizer = read_tokenizer(name)
    # A pooler belongs to a head, and is new where the model was trained without.
    missing = sorted(key for key in report["missing_keys"] if "pooler" not in key.split("."))
    if missing:
        raise CommandError(
            f"{name} lacks {missing[0]}, which a {type(model).__name__} has: name a checkpoint of a whole encoder"
        )
    if tokenizer.pad_token is None:
        raise CommandError(f"the tokenizer of {name} has no padding token, which an encoder's has: name an encoder")
    length = longest(arguments.max_length, config, tokenizer)
    return Encoder(model.eval(), tokenizer, length, folder, pooling)


def load_student(arguments: argparse.Namespace, encoder: Encoder, asked: RecipeArguments) -> PreTrainedModel:
    """
    What is trained: the teacher binarized, or the latent encoder to go on from. Refuses one that is not latent, not
    frozen throughout, reads other token ids, or was binarized in another way than is asked for.
    """
    if arguments.student is None:
        return binarize(copy.deepcopy(encoder.model), asked.config())
    state = state_of(read_config(arguments.student), arguments.student)
    if state != "latent":
        raise CommandError(
            f"--student {arguments.student} is {state}: name the latent encoder of an earlier run (OUTPUT/latent), or "
            f"drop --student to start from {arguments.model}"
        )
    path = Path(arguments.student).expanduser()
    with hub_errors("model", arguments.student):
        student: Any = AutoModel.from_pretrained(
            path if path.is_dir() else arguments.student, dtype=torch.float32, trust_remote_code=False
        )
        vocabulary = read_tokenizer(arguments.student).get_vocab()
    if vocabulary != encoder.tokenizer.get_vocab():
        raise CommandError(
            f"--student {arguments.student} has another tokenizer than {arguments.model}: name the model that it was "
            "distilled from"
        )
    if arguments.method is None:
        asked.method = default_method(student)
        if asked.method != "ste":
            raise CommandError(
                f"--student {arguments.student} is not frozen throughout, or was trained without a gradient behind "
                "its signs (--method stompp): name a --method, which makes it float and freezes it once more"
            )
    asked.check_latent(config_of(student))
    return student


def read(arguments: argparse.Namespace) -> tuple[list[Text], list[Text]]:
    """The texts to learn from, and those to measure on."""
    import_datasets().disable_progress_bars()
    texts = read_texts(arguments.text, arguments.text_columns or ())
    if arguments.split_sentences and any(isinstance(text, tuple) for text in texts):
        raise CommandError("--split_sentences cuts texts, not pairs: name one of --text_columns, or drop it")
    learned, held_out = hold_out(texts, arguments.validation_share, arguments.seed, arguments.max_texts)
    if arguments.split_sentences:
        learned, held_out = map(_sentences, (learned, held_out))
    return learned, held_out


def _sentences(texts: list[Text]) -> list[Text]:
    return [sentence for text in texts for sentence in split_sentences(str(text))]


def tokenized(texts: list[Text], encoder: Encoder) -> Any:
    """Texts as the Trainer takes them: a data set of token ids."""
    return import_datasets().Dataset.from_dict(tokenize(encoder.tokenizer, texts, encoder.max_length))


def distill(arguments: argparse.Namespace) -> dict[str, Any]:
    """What `hf-stompp distill` does, and tells. Ctrl-C in training interrupts once a checkpoint has been written."""
    output = Path(arguments.output).expanduser()
    check_output(arguments, output)
    asked = RecipeArguments(
        arguments.method or RecipeArguments.method,
        mode=arguments.mode,
        modes=arguments.modes,
        word_embeddings=arguments.word_embeddings,
        # Noise in the student alone would keep it from what the teacher computes.
        dropout=0.0,
    )
    set_seed(arguments.seed)
    encoder = load_encoder(arguments)
    student = load_student(arguments, encoder, asked)
    losses = encoder.losses(arguments.losses)
    check_teacher(student, encoder.model, losses)
    given = {
        "max_steps": arguments.max_steps,
        "num_train_epochs": arguments.epochs,
        "learning_rate": arguments.learning_rate,
        "distillation_losses": losses,
    }
    args = trainer_arguments(
        arguments,
        asked,
        output / "latent",
        given,
        eval_strategy="steps",
        eval_steps=0.2,
        eval_mixed=False,
        save_strategy="steps",
        save_steps=0.05,
        logging_steps=0.02,
        report_to="none",
    )
    texts, held_out = read(arguments)
    check_schedule(student, args, len(texts))
    with stopping_on_interrupt(arguments.words) as prepare:
        recipe = Recipe(
            asked,
            args,
            output_dir=output,
            tokenizer=encoder.tokenizer,
            train_dataset=tokenized(texts, encoder),
            eval_datasets={"eval": tokenized(held_out, encoder)},
            data_collator=DataCollatorWithPadding(encoder.tokenizer),
            compute_metrics=None,
            identity={
                **{name: getattr(arguments, name) for name in IDENTITY},
                "text": " ".join(map(str, arguments.text)),
                "examples": len(texts) + len(held_out),
            },
            prepare=prepare,
        )
        claim_output_dir(recipe)
        results = train_and_pack(recipe, encoder, student, held_out)
    details = {} if encoder.folder is None else {"tasks": "sentence-similarity", "tags": "sentence-transformers"}
    write_card(recipe, results, output.name, **details)
    if encoder.folder is not None:
        add_section(output / "packed" / "README.md", SENTENCE_ENCODER.format(name=output / "packed"))
    summary = summarize(
        recipe,
        results,
        model=arguments.model,
        losses=args.distillation_losses,
        examples={"train": len(texts), "validation": len(held_out)},
        output=arguments.output,
        saved=str(Path(arguments.output) / "packed"),
        command=shlex.join(["hf-stompp", *arguments.words]),
    )
    write_json(output / SUMMARY, summary)
    return summary


def train_and_pack(recipe: Recipe, encoder: Encoder, student: PreTrainedModel, held_out: list[Text]) -> Results:
    """Trains the student, packs it, and measures it on the way: its loss, and its embeddings beside the teacher's."""
    results = Results(config=config_of(student), teacher="float")
    teacher: Any = encoder.model
    results.bytes["float"] = bytes_when_saved(teacher, recipe.output_dir)

    def embeddings(model: Any) -> torch.Tensor:
        batch = recipe.args.per_device_eval_batch_size
        model.to(recipe.args.device)
        return embed(model, encoder.tokenizer, held_out, encoder.pooling, encoder.max_length, batch)

    expected = embeddings(teacher)
    untrained = make_trainer(recipe, copy.deepcopy(student), teacher=teacher)
    results.metrics["untrained"] = measure(recipe, untrained, "eval_untrained")
    # What was drawn until now must not matter to a run that is resumed.
    set_seed(recipe.args.seed)
    trainer = train_binary(recipe, student, teacher, results)
    results.model = pack_and_reload(recipe, trainer, results, teacher)
    folder = recipe.output_dir / "packed"
    if encoder.folder is not None:
        copy_modules(encoder.folder, folder)
    loaded = AutoModel.from_pretrained(folder, trust_remote_code=False)
    similarity = F.cosine_similarity(embeddings(loaded), expected).mean().item()
    results.metrics["packed"] = {**(results.metrics["packed"] or {}), "eval_cosine_similarity": similarity}
    return results


def check_schedule(student: PreTrainedModel, args: StoMPPTrainingArguments, examples: int) -> None:
    """Checks before anything is written that the progression fits into the run."""
    steps = args.max_steps
    if steps <= 0:
        steps = math.ceil(args.num_train_epochs * math.ceil(examples / args.train_batch_size))
    plan_progression(config_of(student).units, steps, **args.progression())


def run(arguments: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Runs `hf-stompp distill`."""
    result = distill(arguments)
    return result, f"{_table(result)}\nsaved: {result['saved']}"


def _table(result: Mapping[str, Any]) -> str:
    metrics, sizes = result["metrics"], result["bytes"]
    similarity = metrics["packed"]["eval_cosine_similarity"]
    seconds = sum(result["seconds"].values())
    examples = result["examples"]
    return "\n".join(
        [
            f"{'':12}      loss  cosine",
            f"{'float':12}  {0:8.4f}  {1:6.4f}  {megabytes(sizes['float'])}",
            f"{'untrained':12}  {metrics['untrained']['eval_loss']:8.4f}",
            f"{'trained':12}  {metrics['binary_final']['eval_loss']:8.4f}",
            f"{'packed':12}  {metrics['packed']['eval_loss']:8.4f}  {similarity:6.4f}  {megabytes(sizes['packed'])}",
            f"{examples['train']:,} texts to learn from, {examples['validation']:,} to measure on, {seconds:,.0f} s",
        ]
    )
