"""How far a training of the command line is, and how Ctrl-C ends it with a checkpoint."""

from __future__ import annotations

import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any

from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback, TrainerState

from ..training.callbacks import UnitProgressCallback


class Interrupted(Exception):
    """Ctrl-C came; what was trained is in a checkpoint."""


class StopAfterStep(TrainerCallback):
    """Ends training after the step in which `stop` was set, with a checkpoint, and the command with it."""

    def __init__(self) -> None:
        self.stop = self.is_training = False

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self.is_training = True

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if self.stop and state.global_step < state.max_steps:
            control.should_training_stop = control.should_save = True

    def on_epoch_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        # Of an epoch that has not ended: an evaluation that the uninterrupted run does not make draws random numbers.
        epoch = state.epoch or 0.0
        if self.stop and abs(epoch - round(epoch)) > 1e-6:
            control.should_evaluate = control.should_save = False

    def on_train_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self.is_training = False
        if self.stop and state.global_step < state.max_steps:
            raise Interrupted


class QuietBar(ProgressCallback):
    """A progress bar without a line for every log: stdout is the command's."""

    def on_log(self, *args: Any, **kwargs: Any) -> None:
        pass


class QuietUnitBar(QuietBar, UnitProgressCallback):
    """The same with the unit in transition behind it."""


class ProgressLines(TrainerCallback):
    """A line now and then on stderr, for logs that nobody watches."""

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self._first_step, self._begin = state.global_step, time.monotonic()
        self._last = self._begin

    def on_log(
        self, args: Any, state: TrainerState, control: Any, logs: Mapping[str, Any] | None = None, **kwargs: Any
    ) -> None:
        now, done = time.monotonic(), state.global_step - self._first_step
        if not state.is_world_process_zero or logs is None or "loss" not in logs or not done or now - self._last < 60:
            return
        self._last = now
        minutes = (now - self._begin) / done * (state.max_steps - state.global_step) / 60
        print(
            f"step {state.global_step:,} of {state.max_steps:,}, loss {logs['loss']:.3g}, {minutes:.0f} min left",
            file=sys.stderr,
            flush=True,
        )


@contextmanager
def stopping_on_interrupt(words: list[str]) -> Iterator[Callable[[Trainer], None]]:
    """
    Within the block the first Ctrl-C in training lets the step end and a checkpoint be written; the second, or one
    outside training, interrupts. Yields what each trainer is prepared with.

    Raises:
        KeyboardInterrupt: the run was interrupted. If a checkpoint was written, it was told how the command of these
            words goes on.
    """
    callback = StopAfterStep()

    def prepare(trainer: Trainer) -> None:
        quiet(trainer)
        trainer.add_callback(callback)

    def stop(number: int, frame: FrameType | None) -> None:
        if callback.stop or not callback.is_training:
            raise KeyboardInterrupt
        callback.stop = True
        print("\nhf-stompp: writing a checkpoint after this step (Ctrl-C again: stop at once)", file=sys.stderr)

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield prepare
    except Interrupted as error:
        again = shlex.join(["hf-stompp", *(word for word in words if word != "--resume"), "--resume"])
        print(f"hf-stompp: stopped; go on with\n  {again}", file=sys.stderr)
        raise KeyboardInterrupt from error
    finally:
        signal.signal(signal.SIGINT, before)


def quiet(trainer: Trainer) -> None:
    """Logs go to trainer_state.json and the trackers. A bar says how far training is, or lines where none is seen."""
    trainer.remove_callback(PrinterCallback)
    bars = [kind for kind in (UnitProgressCallback, ProgressCallback) if trainer.pop_callback(kind) is not None]
    if trainer.train_dataset is None:
        return
    if not bars:
        trainer.add_callback(ProgressLines())
    else:
        trainer.add_callback(QuietUnitBar(trainer) if UnitProgressCallback in bars else QuietBar())
