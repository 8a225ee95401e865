"""
Trains a tiny binary BERT as each argument says, a JSON object with fields of `Run`; the tests start it in one or
several processes, and kill it. Not a test module.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any


os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from datasets import Dataset
from safetensors.torch import save_file
from transformers import BertConfig, BertForSequenceClassification, TrainerCallback

from hf_stompp import StoMPPConfig, StoMPPTrainer, StoMPPTrainingArguments, binarize
from hf_stompp.model.integrity import tensor_digest
from hf_stompp.model.modules import masked_modules


@dataclass
class Run:
    """One training. What goes wrong goes wrong on the last rank, `at` a step."""

    output_dir: str
    batch: int = 8
    accumulation: int = 1
    examples: int = 64
    filled_up: int = 0
    order: str = "sequential"
    surrogate: str = "ste"
    schedule: str = "cubic"
    optim: str = "sgd"
    teacher: bool = False
    dropout: float = 0.0
    resume: bool = False
    wrong: str | None = None
    at: int = 0


class GoWrong(TrainerCallback):
    """Ends one process as a power cut would, or gives it what the others do not have."""

    def __init__(self, wrong: str, at: int) -> None:
        self.wrong, self.at = wrong, at

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if args.process_index != args.world_size - 1 or state.global_step != self.at:
            return
        if self.wrong == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        elif self.wrong == "mask":
            next(iter(masked_modules(model).values())).freeze_mask[0].logical_not_()
        elif self.wrong == "nan":
            torch.nn.init.constant_(model.bert.encoder.layer[0].output.LayerNorm.weight, float("nan"))


class NoteMasks(TrainerCallback):
    """Every rank's masks at every step."""

    def __init__(self) -> None:
        self.digests: list[str] = []

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        masks = [module.freeze_mask.flatten() for module in masked_modules(model).values()]
        self.digests.append(tensor_digest(torch.cat(masks)))


def make_model(seed: int, dropout: float = 0.0) -> BertForSequenceClassification:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 36, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 76}
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=64,
            max_position_embeddings=40,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=0.0,
            **sizes,
        )
    )


def train(run: Run) -> None:
    folder = Path(run.output_dir)
    model = binarize(make_model(0, run.dropout), StoMPPConfig(surrogate=run.surrogate))
    ids = torch.randint(3, 64, (run.examples, 10), generator=torch.Generator().manual_seed(0))
    # An epoch that does not end with a full batch is filled up with its first examples, on several processes.
    ids = ids[torch.arange(run.filled_up or run.examples) % run.examples]
    dataset = Dataset.from_dict({"input_ids": ids.tolist(), "labels": (ids[:, 0] > 32).long().tolist()})
    masks = NoteMasks()
    trainer = StoMPPTrainer(
        model=model,
        args=StoMPPTrainingArguments(
            output_dir=run.output_dir,
            max_steps=10,
            per_device_train_batch_size=run.batch,
            gradient_accumulation_steps=run.accumulation,
            train_sampling_strategy=run.order,
            learning_rate=1e-3,
            optim=run.optim,
            progression_schedule=run.schedule,
            refresh_period=5,
            logging_steps=1,
            save_steps=4,
            use_cpu=True,
            disable_tqdm=True,
            report_to="none",
        ),
        train_dataset=dataset,
        eval_dataset=dataset,
        callbacks=[masks, *([GoWrong(run.wrong, run.at)] if run.wrong else [])],
        teacher=make_model(1) if run.teacher else None,
    )
    rank = trainer.args.process_index
    try:
        trainer.train(resume_from_checkpoint=run.resume or None)
    except (RuntimeError, ValueError) as error:
        if run.wrong in (None, "killed"):
            raise
        (folder / f"error-{rank}.txt").write_text(str(error))
        return
    metrics = trainer.evaluate()
    (folder / f"masks-{rank}.json").write_text(json.dumps(masks.digests))
    if trainer.is_world_process_zero():
        save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "final.safetensors")
        logs = {"history": trainer.state.log_history, "metrics": metrics}
        (folder / "logs.json").write_text(json.dumps(logs))
    trainer.accelerator.wait_for_everyone()


def main() -> None:
    torch.set_num_threads(1)
    # A process that waits for ever says where, before the test gives it up.
    faulthandler.dump_traceback_later(240, exit=True)
    for argument in sys.argv[1:]:
        train(Run(**json.loads(argument)))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
