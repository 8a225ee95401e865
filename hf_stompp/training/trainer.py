"""`StoMPPTrainer`: the Transformers Trainer with a progression."""

from __future__ import annotations

import itertools
from contextlib import nullcontext
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel
from transformers.trainer_callback import ProgressCallback
from transformers.trainer_utils import EvalLoopOutput

from ..model.integrity import last_whole_checkpoint, tensor_digest
from ..model.modules import config_of, first_nonfinite, frozen_counts, fully_binary, masked_modules, packed_modules
from ..nn import MaskedBinaryActivation
from ..reports.dynamics import ALL_UNITS, FRACTION_PREFIX
from .arguments import StoMPPTrainingArguments
from .callbacks import ProgressionCallback, UnitProgressCallback, refuse_another
from .distillation_trainer import DistillingTrainer
from .freezing import check_settings, initialize_activations
from .progression import Progression, plan_progression
from .pushing import PushingTrainer
from .resuming import ResumingTrainer
from .sampling import SameStepsResumed
from .training_set import check_training_set


def _activation_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Scales, shifts and thresholds that are learned, by name."""
    return {
        f"{prefix}.{name}": parameter
        for prefix, module in masked_modules(model).items()
        if isinstance(module, MaskedBinaryActivation)
        for name, parameter in module.named_parameters(recurse=False)
    }


class StoMPPTrainer(SameStepsResumed, DistillingTrainer, ResumingTrainer, PushingTrainer):
    """
    Trains a binarized model: once per optimizer step the masks advance, and everything that is reported is the fully
    binary network.

    Takes the arguments of [`~transformers.Trainer`], with `args` a [`StoMPPTrainingArguments`] and a model from
    [`binarize`]. A packed model is accepted for `evaluate` and `predict`.

    - `evaluate` reports `eval_*` of the fully binary network, and until it is committed `eval_mixed_*` of the network
      in training.
    - no checkpoint from before the network is committed counts as the best, so early stopping waits for that too.
    - `train_sampling_strategy="group_by_length"` gives an order that a resumed run repeats.
    - logs carry `frozen_fraction/all` (share of all binary entries) and `frozen_fraction/<unit>`.
    - with a `teacher`, training minimises `args.distillation_losses`: no labels are needed unless these name them.
      Evaluation reports the model's own loss as ever, and the distillation loss where there are no labels.

    Args:
        teacher (`PreTrainedModel`, *optional*):
            A float model that the binary one learns from: same tokenizer, classes and, for losses of hidden states or
            attentions, same layers. It is put into evaluation mode, gets no gradient, and is in no checkpoint.
        args, kwargs: those of [`~transformers.Trainer`].

    Raises:
        ValueError: the model is not binarized, the teacher does not fit it, the run would use nn.DataParallel, FSDP or
            DeepSpeed, or `activation_learning_rate` meets an optimizer that was passed.
    """

    model: PreTrainedModel
    args: StoMPPTrainingArguments

    def __init__(self, *args: Any, teacher: PreTrainedModel | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # BERT's own loss ignores num_items_in_batch, and Trainer would not divide by the accumulation steps.
        self.model_accepts_loss_kwargs = False
        self._refuse_unsupported()
        config_of(self.model)
        self.set_teacher(teacher)
        if any(isinstance(callback, ProgressionCallback) for callback in self.callback_handler.callbacks):
            raise ValueError(
                "StoMPPTrainer has a ProgressionCallback of its own: leave yours out, and give its settings as "
                "arguments, StoMPPTrainingArguments(progression_tail=..., ...)"
            )
        self.progression_callback = ProgressionCallback(trainer=self)
        self.add_callback(self.progression_callback)
        if self.pop_callback(ProgressCallback) is not None:
            self.add_callback(UnitProgressCallback(self))

    def _refuse_unsupported(self) -> None:
        if not isinstance(self.args, StoMPPTrainingArguments):
            raise ValueError(f"StoMPPTrainer takes args=StoMPPTrainingArguments(...), got {type(self.args).__name__}")
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ValueError(
                "StoMPPTrainer does not run under FSDP or DeepSpeed: they flatten or shard the weights that the "
                "masks belong to. Use DistributedDataParallel: accelerate launch --multi_gpu"
            )
        if self.args.n_gpu > 1:
            raise ValueError(
                f"StoMPPTrainer does not run under nn.DataParallel ({self.args.n_gpu} GPUs are visible): its "
                "replicas lose what the first batch initialises. Use accelerate launch, or CUDA_VISIBLE_DEVICES=0"
            )
        if self.args.world_size > 1 and config_of(self.model).surrogate == "none":
            if self.args.ddp_find_unused_parameters is False:
                raise ValueError(
                    "StoMPPConfig(surrogate='none') needs ddp_find_unused_parameters=True: weights of committed "
                    "layers get no gradient, and DistributedDataParallel would wait for one"
                )
            # Transformers leaves it off with activation checkpointing.
            self.args.ddp_find_unused_parameters = True
        if self.args.activation_learning_rate is not None and self.optimizer is not None:
            raise ValueError(
                "activation_learning_rate is for the optimizer that StoMPPTrainer makes: leave it out, and give the "
                "one that you pass a group for scales, shifts and thresholds"
            )

    def plan(self, total_steps: int) -> Progression:
        """
        The progression of this run.

        Args:
            total_steps (`int`): optimizer steps.

        Returns:
            `Progression`: the frozen fraction of each unit at each step.

        Raises:
            ValueError: the schedule cannot finish, nothing would be trained, or a resumed run has another progression.
        """
        config = config_of(self.model)
        progression = plan_progression(config.units, total_steps, **self.args.progression())
        check_settings(config, progression, self.args.train_committed)
        if self._saved_progression is not None:
            refuse_another(progression, self._saved_progression)
        return progression

    def _load_callback_state(self) -> None:
        super()._load_callback_state()
        # Callbacks restored from a checkpoint are new objects.
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, ProgressionCallback):
                callback.trainer, self.progression_callback = self, callback

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """
        Trains as [`~transformers.Trainer`] does, with its arguments. A run that starts at step 0 starts with empty
        masks.

        Args:
            resume_from_checkpoint (`str` or `bool`, *optional*): a checkpoint; True for the last one in
                `args.output_dir` that was written to its end.
            args, kwargs: further ones of [`~transformers.Trainer.train`].

        Returns:
            `TrainOutput`: the number of steps, the mean loss and the metrics.

        Raises:
            ValueError: the model is packed, the training set is empty or has a label out of range, the schedule cannot
                finish, there is no checkpoint, or it belongs to a run with other settings.
            RuntimeError: the ranks hold different freeze masks.
        """
        # Else the model is made by the call below.
        if self.model_init is None:
            self._check_before_training(self.model)
        self._saved_progression = None
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_whole_checkpoint(
                self.args.output_dir or ".", self.args.world_size, self.accelerator.scaler is not None
            )
            if resume_from_checkpoint is None:
                raise ValueError(
                    f"{self.args.output_dir} holds no checkpoint to resume from: drop resume_from_checkpoint"
                )
        with self._room_for_compilations():
            return super().train(resume_from_checkpoint, *args, **kwargs)

    def _room_for_compilations(self) -> Any:
        """A unit that commits without a gradient runs other code from then on: one compilation more for each."""
        if not self.args.torch_compile or self.model is None or config_of(self.model).surrogate != "none":
            return nullcontext()
        dynamo: Any = torch._dynamo.config
        return dynamo.patch(recompile_limit=max(dynamo.recompile_limit, len(config_of(self.model).units) + 8))

    def call_model_init(self, trial: Any = None) -> Any:
        """The model of `model_init`, for each trial of a hyperparameter search a new one."""
        model = super().call_model_init(trial)
        # Transformers makes a first one to find out about it: it may be there to be evaluated.
        if getattr(self, "is_in_train", False):
            self._check_before_training(model)
            self.fit_to_teacher(cast(Any, model))
        return model

    def _check_before_training(self, model: Any) -> None:
        """Refuses a packed model, and a training set that cannot be learned, before the first step."""
        if packed_modules(model):
            raise ValueError(
                "a packed model cannot be trained, only evaluated; train the latent model, or unpack(model)"
            )
        check_training_set(self.train_dataset, model, self.learns_from_teacher_alone or self._has_own_loss)

    @property
    def _has_own_loss(self) -> bool:
        """Whether another loss than the model's reads the labels."""
        return self.compute_loss_func is not None or type(self).compute_loss is not StoMPPTrainer.compute_loss

    # --- masks -----------------------------------------------------------------------------------------------------

    def check_same_masks(self) -> None:
        """Checks that every rank holds the same masks. Raises a RuntimeError that names the first that differs."""
        if self.args.world_size == 1:
            return
        masks = {name: module.freeze_mask for name, module in masked_modules(self.model).items()}
        digests = "".join(tensor_digest(mask) for mask in masks.values())
        mine = torch.tensor(list(digests.encode()), dtype=torch.uint8, device=self.args.device)
        everyone = self.accelerator.gather(mine.unsqueeze(0))
        same = (everyone == everyone[0]).all(dim=0).view(len(masks), -1).all(dim=1)
        if not bool(same.all()):
            name = list(masks)[int((~same).nonzero()[0])]
            raise RuntimeError(
                f"the ranks hold different freeze masks, {name}.freeze_mask among them: start all ranks with the same "
                "seed and mask_seed, and from the same checkpoint"
            )

    def _wrap_model(self, model: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        # Each rank draws its own equal masks; broadcasting them would send a byte a weight before every forward pass.
        names = [f"{name}.freeze_mask" for name in masked_modules(self.model)]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(self.model, names)
        return super()._wrap_model(model, *args, **kwargs)

    def _initialize_activations(self, inputs: dict[str, Any], by_batch: bool = False) -> None:
        reduce = partial(self.accelerator.reduce, reduction="sum")
        if self.teacher is not None or self._has_own_loss:
            # They may be no classes.
            inputs = self.without_labels(inputs)
        with self.compute_loss_context_manager():
            initialize_activations(self.model, self._prepare_inputs(inputs), reduce, by_batch)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        if self.state.global_step == 0:
            # As the step will.
            model.train()
            self._initialize_activations(inputs, by_batch=True)
        loss = super().training_step(model, inputs, *args, **kwargs)
        # Transformers looks at it too, but to leave it out of the log.
        if self._any_rank(not bool(torch.isfinite(loss).all())):
            self._check_weights()
        return loss

    def _any_rank(self, found: bool) -> bool:
        """Whether any rank has found it: a rank that stops alone leaves the others waiting for its gradients."""
        flag = torch.tensor(float(found), device=self.args.device)
        return bool(self.accelerator.reduce(flag, reduction="sum"))

    def _check_weights(self) -> None:
        """
        Checks that training has not diverged: once weights are NaN, or what BatchNorm has recorded, no later step
        mends them. To be called on every rank. Raises a ValueError that names step, unit in transition and tensor.
        """
        name = first_nonfinite(self.model.state_dict().items())
        if not self._any_rank(name is not None):
            return
        # What BatchNorm has recorded is each rank's own.
        name = name or "a tensor of another rank"
        step, progression = self.state.global_step, self.progression_callback.progression
        if step == 0:
            raise ValueError(f"{name} holds NaN or infinity before the first step: start from another model")
        unit = None if progression is None else progression.unit_in_transition(step - 1)
        where = "no unit was" if unit is None else f"{config_of(self.model).units[unit]} was"
        raise ValueError(
            f"training diverged: after step {step} {name} holds NaN or infinity, while {where} in transition. Lower "
            f"learning_rate (it was {self.args.learning_rate:g}), or set max_grad_norm or another surrogate. "
            f"Checkpoints in {self.args.output_dir} are from before that"
        )

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        # It would push an older one out that is still of use.
        self._check_weights()
        super()._save_checkpoint(*args, **kwargs)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        ours = _activation_parameters(model)
        return [name for name in super().get_decay_parameter_names(model) if name not in ours]

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """
        The optimizer of [`~transformers.Trainer.create_optimizer`], in which scales, shifts and thresholds of binary
        activations have a group of their own if `args.activation_learning_rate` is given. Raises a ValueError if that
        optimizer makes groups of its own.
        """
        rate, is_new = self.args.activation_learning_rate, self.optimizer is None
        optimizer = super().create_optimizer(model)
        if rate is None or not is_new:
            return optimizer
        named = _activation_parameters(self.model if model is None else model)
        ours = {id(parameter): parameter for parameter in named.values() if parameter.requires_grad}
        found = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        if not ours.keys() <= found:
            raise ValueError(
                f"activation_learning_rate does not go with {type(optimizer).__name__}, which groups parameters in "
                "its own way: leave it out, or choose another optim"
            )
        for group in optimizer.param_groups:
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in ours]
        if ours:
            optimizer.add_param_group({"params": list(ours.values()), "lr": rate, "weight_decay": 0.0})
        return optimizer

    # --- evaluation ------------------------------------------------------------------------------------------------

    @property
    def is_committed(self) -> bool:
        """Whether every mask is full (a packed model's are)."""
        return all(module.committed for module in masked_modules(self.model).values())

    def evaluation_loop(self, dataloader: Any, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        self._initialize_from(dataloader)
        with fully_binary(self.model):
            return super().evaluation_loop(dataloader, *args, **kwargs)

    def _initialize_from(self, dataloader: Any) -> None:
        modules = masked_modules(self.model).values()
        if any(isinstance(m, MaskedBinaryActivation) and not m.initialized for m in modules):
            # An empty set has no batch, and nothing to evaluate either.
            for batch in itertools.islice(dataloader, 1):
                self._initialize_activations(batch)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """
        Evaluates the fully binary network (every mask full), and until it is committed, with `eval_mixed`, also the
        network as it is in training. The masks are as before afterwards.

        Args:
            eval_dataset (`Dataset` or `dict[str, Dataset]`, *optional*):
                Instead of the trainer's. For a dict, the network in training is left out.
            ignore_keys (`list[str]`, *optional*):
                Outputs of the model that are no predictions.
            metric_key_prefix (`str`, *optional*, defaults to `"eval"`):
                The measures are called `<prefix>_accuracy` and so on, those of the network in training
                `<prefix>_mixed_accuracy`.

        Returns:
            `dict[str, float]`: the measures of `compute_metrics`, the loss and times in seconds.
        """
        metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if self.is_committed or not self.args.eval_mixed or isinstance(dataset, dict):
            return metrics
        # Past the override above: the network as it is in training.
        mixed = super().evaluation_loop(
            self.get_eval_dataloader(eval_dataset),
            description="Evaluation (mixed)",
            prediction_loss_only=True if self.compute_metrics is None else None,
            ignore_keys=ignore_keys,
            metric_key_prefix=f"{metric_key_prefix}_mixed",
        )
        mixed_metrics = mixed.metrics or {}
        self.log(dict(mixed_metrics))
        return metrics | mixed_metrics

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        return self.is_committed and super()._determine_best_metric(metrics, trial)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs |= self._frozen_fractions()
        super().log(logs, start_time)

    def _frozen_fractions(self) -> dict[str, float]:
        counts = frozen_counts(self.model, config_of(self.model))
        frozen, entries = (sum(column) for column in zip(*counts.values(), strict=True))
        units = {f"{FRACTION_PREFIX}{unit}": count / size for unit, (count, size) in counts.items()}
        # Under no name that begins another's: MLflow's file store keeps a metric in a file of that name.
        return {f"{FRACTION_PREFIX}{ALL_UNITS}": frozen / entries} | units

    # --- the model card --------------------------------------------------------------------------------------------

    def progression_settings(self) -> dict[str, Any]:
        """Settings of the progression that the model was trained with; nothing for a trainer that never trained."""
        progression = self.progression_callback.progression
        if progression is None:
            return {}
        names = [
            *("progression_order", "progression_schedule", "progression_warmup", "progression_tail"),
            *("progression_overlap", "refresh_period", "train_committed"),
        ]
        settings = {name: getattr(self.args, name) for name in names}
        settings |= {"mask_seed": progression.seed, "units": len(progression.units)}
        return {
            **settings,
            **self.distillation_settings(),
            "optimizer steps": progression.total_steps,
            "fully binary from step": progression.committed_step,
        }
