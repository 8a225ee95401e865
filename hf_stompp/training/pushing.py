"""Pushing to the Hub: the packed model, the latent one on a branch of its own, and what to do when a push fails."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import HfHubHTTPError, HTTPError
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel, Trainer
from transformers.modelcard import TrainingSummary
from transformers.trainer_utils import HubStrategy
from transformers.utils import PushInProgress, logging

from ..benchmark import compare_with_float
from ..model.card import model_card
from ..model.conversion import pack
from ..model.integrity import METADATA_PREFIX, verify_files
from ..model.modules import packed_modules
from ..reports.drawing import add_dynamics
from ..reports.dynamics import final_evaluation
from .arguments import StoMPPTrainingArguments


logger = logging.get_logger(__name__)

LATENT_REVISION = "latent"
"""Branch of the latent model in the repository whose `main` holds the packed one."""


class PushingTrainer(Trainer):
    """A Trainer of a binary model that pushes the packed model where Transformers' pushes the one in training."""

    args: StoMPPTrainingArguments
    model: PreTrainedModel

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._pushes: list[Future] = []
        # Branch that the next model card is for, None for `main`.
        self._card_revision: str | None = None
        # Whether push_to_hub has saved what Transformers' would save now.
        self._is_saved = False

    def create_model_card(
        self,
        language: str | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: str | list[str] | None = None,
        dataset_tags: str | list[str] | None = None,
        dataset: str | list[str] | None = None,
        dataset_args: str | list[str] | None = None,
    ) -> None:
        """
        Writes `README.md` of a binary model to `output_dir`. Arguments as in
        [`~transformers.Trainer.create_model_card`].

        Beside what Transformers writes, it says what is binary and what is not, how large the model is, how the
        progression was set, and which lines load it. Measures are those of the model that the trainer holds; they are
        left out if it was not evaluated.
        """
        if not self.is_world_process_zero():
            return
        folder = Path(self.args.output_dir or ".")
        folder.mkdir(parents=True, exist_ok=True)
        card = folder / "README.md"
        mine = [tags] if isinstance(tags, str) else list(tags or [])
        known = ModelCard.load(card).data.tags if card.is_file() else None
        summary = TrainingSummary.from_trainer(
            self,
            language=language,
            license=license,
            tags=list(dict.fromkeys([*mine, *(known or [])])),
            model_name=model_name,
            finetuned_from=finetuned_from,
            tasks=tasks,
            dataset_tags=dataset_tags,
            dataset=dataset,
            dataset_args=dataset_args,
        )
        model_card(
            self.model,
            summary.model_name,
            self.hub_model_id or self.args.hub_model_id or str(self.args.output_dir),
            summary=summary,
            evaluation=final_evaluation(self.state.log_history, self.state.global_step, self._best_step()),
            progression=self.progression_settings(),
            revision=self._card_revision,
            speed=compare_with_float(self.model) if self.args.card_speed and packed_modules(self.model) else (),
        ).save(card)
        add_dynamics(card, self.state)

    def _best_step(self) -> int | None:
        """The step whose weights were loaded at the end of training, if any were."""
        loaded = self.args.load_best_model_at_end and self.state.best_model_checkpoint is not None
        return self.state.best_global_step if loaded else None

    def progression_settings(self) -> dict[str, Any]:
        """Settings of the progression for the model card, by name; of a trainer that has none, nothing."""
        return {}

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        latent: bool = False,
        **kwargs: Any,
    ) -> Any:
        """
        Packs the model and pushes it with tokenizer, config and model card, from `output_dir/packed`. Arguments as in
        [`~transformers.Trainer.push_to_hub`], and those below. Whatever is raised after packing, the folder is
        complete and stays: push again.

        Args:
            revision (`str`, *optional*): branch to push to; created if it is not there.
            latent (`bool`, *optional*, defaults to `False`):
                Push the latent model instead, from `output_dir/latent`, for others to train on. It need not be
                committed. The branch is `"latent"` where `revision` names no other, so that `main` stays the packed
                model's.

        Returns:
            `CommitInfo`, or a `Future` of it with `blocking=False`; `None` on other ranks than the first.

        Raises:
            ValueError: units are not committed (named), or `latent=True` with a packed model.
            HfHubHTTPError: the Hub refused; the message ends with what to do about it.
            ConnectionError: the Hub could not be reached, or the connection broke.
        """
        is_packed = bool(packed_modules(self.model))
        if latent and is_packed:
            raise ValueError(
                "latent=True pushes the weights that were trained, and this trainer holds a packed model, which has "
                "none; push from the trainer that trained it, or drop latent=True"
            )
        if latent and revision is None:
            revision = LATENT_REVISION
        model = self.model if latent or is_packed else pack(self.model)
        token = self.args.hub_token if token is None else token
        branch = self.args.hub_revision if revision is None else revision
        # Files that are still being uploaded must not be written anew.
        wait(self._pushes)
        with self._holding(model, "latent" if latent else "packed") as folder:
            repository = self.hub_model_id or self.args.hub_model_id or folder.parent.absolute().name
            # Before anything that may fail: the model may be nowhere else yet.
            with same_weights_kept(folder) if self.args.should_save else nullcontext():
                self.save_model(_internal_call=True)
            self._is_saved = True
            self._card_revision = branch
            kwargs.setdefault("model_name", repository.split("/")[-1])
            with explained(repository, folder), self._card_kept(folder, kwargs):
                if self.hub_model_id is None:
                    self.args.hub_model_id = repository
                    self.init_hf_repo(token=token, private=private)
                    repository = self.hub_model_id or repository
                if self.is_world_process_zero() and branch is not None:
                    create_branch(repository, branch, token)
                result = super().push_to_hub(
                    commit_message=commit_message,
                    blocking=blocking,
                    token=token,
                    revision=branch,
                    private=private,
                    **kwargs,
                )
        if isinstance(result, Future):
            self._pushes.append(result)
        return result

    @contextmanager
    def _card_kept(self, folder: Path, details: dict[str, Any]) -> Iterator[None]:
        """Whatever is raised within the block, the folder has a card after it, made of these arguments."""
        try:
            yield
        except Exception:
            if not (folder / "README.md").is_file():
                try:
                    self.create_model_card(**details)
                except Exception as error:
                    # What was raised first says what to do.
                    logger.warning("%s has no model card: %s", folder, error)
            raise

    @contextmanager
    def _holding(self, model: PreTrainedModel, name: str) -> Iterator[Path]:
        """
        Within the block the trainer holds `model`, and `output_dir` is its folder `name`.

        The folder of the run itself holds checkpoints and the latent weights, which must stay as they are. The token
        is hidden: it would be written to training_args.bin.
        """
        args = self.args
        before = self.model, args.output_dir, args.hub_token, args.hub_model_id
        folder = Path(args.output_dir or ".") / name
        self.model, args.output_dir, args.hub_token = model, str(folder), None
        try:
            yield folder
        finally:
            self.model, args.output_dir, args.hub_token, args.hub_model_id = before
            self._card_revision, self._is_saved = None, False

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if not (self._is_saved and _internal_call):
            super().save_model(output_dir, _internal_call)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """
        Pushes a checkpoint while the run goes on, to the branch `"latent"`: `main` is the packed model's.

        As in Transformers, the model alone, or with `hub_strategy="checkpoint"` and `"all_checkpoints"` all that a run
        is resumed from. training_args.bin is never among it: it holds the token.
        """
        strategy = self.args.hub_strategy
        if not self.is_world_process_zero() or strategy == HubStrategy.END:
            return
        running = self.push_in_progress
        if not self.args.hub_always_push and running is not None and not running.is_done():
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        wait(self._pushes)
        checkpoint, folder = Path(checkpoint_folder), Path(self.args.output_dir or ".") / "latent"
        folder.mkdir(parents=True, exist_ok=True)
        # Copies: an old checkpoint may be deleted while it is uploaded.
        state_of_training = ("optimizer*", "scheduler*", "scaler*", "rng_state*", "trainer_state.json", "*.bin")
        for path in checkpoint.iterdir():
            if path.is_file() and not any(path.match(pattern) for pattern in state_of_training):
                shutil.copy(path, folder / path.name)
        sources: list[tuple[Path, str | None]] = [(folder, None)]
        if strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            sources += [(checkpoint, "last-checkpoint" if strategy == HubStrategy.CHECKPOINT else checkpoint.name)]
        push = _api.run_as_future(
            _upload_latent,
            str(self.hub_model_id),
            sources,
            message=f"Training in progress, step {self.state.global_step}",
            token=self.args.hub_token,
        )
        self._pushes.append(push)
        self.push_in_progress: Any = PushInProgress([push])  # type: ignore[arg-type]


# One for all pushes: it has the thread in which they run, one after the other.
_api = HfApi()


def _upload_latent(repository: str, sources: list[tuple[Path, str | None]], message: str, token: str | None) -> None:
    """Uploads folders to the branch `"latent"`; a failure is told, and training goes on."""
    try:
        create_branch(repository, LATENT_REVISION, token)
        for folder, path_in_repo in sources:
            _api.upload_folder(
                repo_id=repository,
                folder_path=folder,
                path_in_repo=path_in_repo,
                commit_message=message,
                token=token,
                ignore_patterns=["_*", "training_args.bin"],
                revision=LATENT_REVISION,
            )
    except (HTTPError, OSError, RuntimeError) as error:
        logger.warning("%s was not pushed to %s: %s. Training goes on.", sources[-1][0], repository, error)


def create_branch(repository: str, revision: str, token: str | None) -> None:
    """Creates a branch that is not there yet; `upload_folder` needs one that is."""
    if revision != "main" and not revision.startswith("refs/"):
        HfApi().create_branch(repository, branch=revision, token=token, exist_ok=True)


@contextmanager
def same_weights_kept(folder: Path) -> Iterator[None]:
    """
    Keeps the file of weights in a folder where the block saves the same tensors again.

    The order of the digests in a file differs from one save to the next, and the client would upload again what had
    arrived before a push failed. It also keeps the file that a loaded model may be mapped to.
    """
    weights, earlier = folder / "model.safetensors", folder / "_earlier.safetensors"
    if weights.is_file():
        weights.replace(earlier)
    try:
        yield
    except BaseException:
        if earlier.is_file():
            earlier.replace(weights)
        raise
    if not earlier.is_file():
        return
    # Weights that are gone were saved in several files.
    if weights.is_file() and _digests_in(earlier) == _digests_in(weights) and _is_whole(earlier):
        earlier.replace(weights)
    else:
        earlier.unlink()


def _digests_in(file: Path) -> dict[str, str]:
    try:
        with safe_open(file, framework="pt") as handle:
            metadata = handle.metadata() or {}
            return {key: value for key, value in metadata.items() if key.startswith(METADATA_PREFIX)}
    except SafetensorError:
        return {}


def _is_whole(file: Path) -> bool:
    try:
        verify_files([file])
    except ValueError:
        return False
    return True


@contextmanager
def explained(repository: str, folder: Path | str) -> Iterator[None]:
    """
    Adds to every error of the Hub in the block what to do about it, and where the files are. An answer of the Hub is
    raised as HfHubHTTPError, a connection that failed or broke as ConnectionError.
    """
    try:
        yield
    except (HTTPError, OSError, RuntimeError) as error:
        # An upload in a thread of its own fails with a RuntimeError that has the answer behind it.
        answer = next((cause for cause in _causes(error) if isinstance(cause, HfHubHTTPError)), None)
        kept = f"Nothing is lost: the files are in {folder}. Push again, or `hf upload {repository} {folder}`."
        if answer is not None:
            answer.append_to_message(f"\n{_advice(answer.response.status_code, repository)} {kept}")
            if answer is error:
                raise
            raise answer from error
        if not any(isinstance(cause, HTTPError | ConnectionError) for cause in _causes(error)):
            raise
        raise ConnectionError(
            f"the Hub could not be reached, or the connection broke: {error}. Check the network (and HF_HUB_OFFLINE, "
            f"HF_ENDPOINT). {kept}"
        ) from error


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _advice(status: int, repository: str) -> str:
    if status == 401:
        return (
            "There is no token, or the Hub does not know it: log in with `hf auth login`, or set HF_TOKEN, or pass "
            "token=..., with one of the role 'write' from https://huggingface.co/settings/tokens."
        )
    if status == 403:
        return (
            f"The token may not write to {repository}: take one of the role 'write' from "
            "https://huggingface.co/settings/tokens, or push to a repository of your own (hub_model_id)."
        )
    if status == 404:
        return (
            f"{repository}, or its branch, is not there or not visible to this token: check hub_model_id and revision."
        )
    if status in (409, 412):
        return f"Somebody else changed {repository} meanwhile: look at its last commit, then push again."
    if status == 429 or status >= 500:
        return "The Hub is busy or has a fault: wait a little."
    return "The Hub refused the push."
