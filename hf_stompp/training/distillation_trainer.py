"""`DistillingTrainer`: a Trainer with a teacher."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer

from .arguments import StoMPPTrainingArguments
from .distillation import LABELS, OUTPUTS, Comparison, check_teacher, distillation_loss


class DistillingTrainer(Trainer):
    """
    A Trainer whose model learns from a teacher what `args.distillation_losses` says, once [`set_teacher`] has given it
    one.
    """

    args: StoMPPTrainingArguments
    model: PreTrainedModel
    teacher: nn.Module | None = None
    teacher_name: str | None = None

    @property
    def losses(self) -> dict[str, float]:
        """The weight of each distillation loss, by name."""
        return cast(dict[str, float], self.args.distillation_losses)

    @property
    def learns_from_teacher_alone(self) -> bool:
        """Whether training takes no notice of labels."""
        return self.teacher is not None and LABELS not in self.losses

    def set_teacher(self, teacher: PreTrainedModel | None) -> None:
        """
        Gives a new trainer its float teacher, in evaluation mode and on the device; does nothing without one. Raises a
        ValueError if it does not fit the model, or labels are to be smoothed that no loss looks at.
        """
        if teacher is None:
            return
        if self.args.label_smoothing_factor and LABELS not in self.losses:
            raise ValueError(
                f"label_smoothing_factor smooths labels, and distillation_losses={self.losses} does not look at them: "
                f"give {LABELS!r} a weight, or leave label_smoothing_factor at 0"
            )
        self._fit(self.model, teacher)
        # What is compared with the teacher is a mean over one batch, whatever loss reads the labels beside it.
        self.loss_is_scaled_for_ga = False
        # A loss that needs no labels can be evaluated without them.
        self.can_return_loss = self.can_return_loss or LABELS not in self.losses
        self.teacher_name = teacher.name_or_path
        self.teacher = self.accelerator.prepare_model(teacher.eval(), evaluation_mode=True)

    def fit_to_teacher(self, model: PreTrainedModel) -> None:
        """
        Checks that a model can learn from the teacher, if there is one, and makes both put out what is compared.
        Raises a ValueError if it cannot, see [`~hf_stompp.training.distillation.check_teacher`].
        """
        if self.teacher is not None:
            self._fit(model, cast(Any, self.accelerator.unwrap_model(self.teacher)))

    def _fit(self, model: PreTrainedModel, teacher: PreTrainedModel) -> None:
        check_teacher(model, teacher, self.losses)
        if "attentions" in self.losses:
            # Other implementations never form the probabilities.
            model.set_attn_implementation("eager")
            teacher.set_attn_implementation("eager")

    def without_labels(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """What a model is given, less its labels."""
        return {name: value for name, value in inputs.items() if name not in self.label_names}

    def distillation_settings(self) -> dict[str, Any]:
        """Settings of the distillation for the model card, by name; nothing without a teacher."""
        if self.teacher is None:
            return {}
        return {
            "teacher": self.teacher_name,
            "distillation_losses": self.losses,
            "distillation_temperature": self.args.distillation_temperature,
        }

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """
        The loss of [`~transformers.Trainer.compute_loss`]; with a teacher, in training and where there are no labels,
        the weighted sum of the distillation losses.

        Args:
            model (`nn.Module`).
            inputs (`dict[str, Any]`): arguments of its forward.
            return_outputs (`bool`, *optional*, defaults to `False`).
            num_items_in_batch (`Tensor` or `int`, *optional*): as in Transformers.

        Returns:
            `Tensor` of shape `()`, or with `return_outputs` `tuple(Tensor, ModelOutput)`.
        """
        if self.teacher is None or (not model.training and any(name in inputs for name in self.label_names)):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        losses, unlabelled = self.losses, self.without_labels(inputs)
        wanted = {OUTPUTS[name]: True for name in losses if name in OUTPUTS}
        with torch.no_grad():
            target = self.teacher(**unlabelled, **wanted)
        loss: Any = 0.0
        if LABELS in losses:
            loss, outputs = super().compute_loss(model, {**inputs, **wanted}, return_outputs=True)
            loss = losses[LABELS] * loss
        else:
            outputs = model(**unlabelled, **wanted)
        how = Comparison(
            mask=inputs.get("attention_mask"),
            temperature=self.args.distillation_temperature,
            multi_label=self.model.config.problem_type == "multi_label_classification",
        )
        loss = loss + distillation_loss(outputs, target, losses, how)
        if model.training and self.compute_loss_func is not None and not hasattr(Trainer, "loss_is_scaled_for_ga"):
            # Before 5.20 Transformers divides no loss where there is one of one's own.
            loss = loss / self.current_gradient_accumulation_steps
        return (loss, outputs) if return_outputs else loss
