"""Trains a tiny binary BERT; the tests start it in one or several processes, and kill it. Not a test module."""

from __future__ import annotations

import argparse
import json
import os
import signal
from pathlib import Path
from typing import Any


os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from datasets import Dataset
from safetensors.torch import save_file
from transformers import BertConfig, BertForSequenceClassification, TrainerCallback

from hf_stompp import StoMPPConfig, StoMPPTrainer, StoMPPTrainingArguments, binarize
from hf_stompp.model.modules import masked_modules


class KillAfter(TrainerCallback):
    """Ends the process as a power cut would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


class BreakMask(TrainerCallback):
    """Gives one rank another mask."""

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if args.process_index == 1 and state.global_step == 1:
            next(iter(masked_modules(model).values())).freeze_mask[0].logical_not_()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("output_dir", type=Path)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--surrogate", default="ste")
    parser.add_argument("--schedule", default="cubic")
    parser.add_argument("--kill_after", type=int, default=0)
    parser.add_argument("--break_mask", action="store_true")
    parser.add_argument("--resume", default=None)
    options = parser.parse_args()

    torch.set_num_threads(1)
    torch.manual_seed(0)
    # Dropout would draw differently in one process and in two.
    config = BertConfig(
        vocab_size=64,
        hidden_size=36,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=76,
        max_position_embeddings=40,
        hidden_dropout_prob=0.1 if options.kill_after or options.resume else 0.0,
        attention_probs_dropout_prob=0.0,
    )
    model = binarize(BertForSequenceClassification(config), StoMPPConfig(surrogate=options.surrogate))
    ids = torch.randint(3, 64, (64, 10), generator=torch.Generator().manual_seed(0))
    dataset = Dataset.from_dict({"input_ids": ids.tolist(), "labels": (ids[:, 0] > 32).long().tolist()})
    callbacks: list[TrainerCallback] = [KillAfter(options.kill_after)] if options.kill_after else []
    if options.break_mask:
        callbacks.append(BreakMask())
    trainer = StoMPPTrainer(
        model=model,
        args=StoMPPTrainingArguments(
            output_dir=str(options.output_dir),
            max_steps=10,
            per_device_train_batch_size=options.batch,
            learning_rate=1e-3,
            optim="sgd",
            progression_schedule=options.schedule,
            refresh_period=5,
            logging_steps=1,
            save_steps=4,
            use_cpu=True,
            disable_tqdm=True,
            report_to="none",
        ),
        train_dataset=dataset,
        eval_dataset=dataset,
        callbacks=callbacks,
    )
    trainer.train(resume_from_checkpoint=options.resume)
    metrics = trainer.evaluate()
    if trainer.is_world_process_zero():
        save_file({k: v.contiguous() for k, v in model.state_dict().items()}, options.output_dir / "final.safetensors")
        logs = {"history": trainer.state.log_history, "metrics": metrics}
        (options.output_dir / "logs.json").write_text(json.dumps(logs))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
