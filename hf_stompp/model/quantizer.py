"""`from_pretrained` and `save_pretrained` of latent and packed models: the Transformers quantizer."""

from __future__ import annotations

import copy
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from torch import nn
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

from ..config import QUANT_METHOD, StoMPPConfig
from .adapters import refuse_adapters
from .binarizing import binarize_modules
from .checkpoint import (
    check_loaded,
    check_modules,
    check_shapes,
    expect_guard,
    follow_prefix,
    guard_name,
    leave_files,
    skip_initialization,
)
from .integrity import Verification, digests
from .modules import masked_modules, packed_modules
from .planning import check_not_tied
from .swap import swap_in_float, swap_in_masked, swap_in_packed


class StoMPPQuantizer(HfQuantizer):
    """
    Loads and saves binarized models.

    - a latent or packed checkpoint: the modules in its plan are swapped in on the meta device before the weights are
      loaded; afterwards nothing may be left uninitialised.
    - a float checkpoint with `quantization_config=StoMPPConfig(...)`: the same as [`binarize`] after
      `from_pretrained`.
    """

    quantization_config: StoMPPConfig
    # The Trainer asks this even to evaluate; StoMPPTrainer.train refuses a packed model itself.
    is_trainable = is_qat_trainable = True
    is_compileable = True

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        config = self.quantization_config
        if not self.pre_quantized:
            if config.state != "latent" or config.plan:
                raise ValueError(
                    "from_pretrained(float_checkpoint, quantization_config=...) takes a fresh "
                    "StoMPPConfig(state='latent'): a model must be trained or committed before it is packed, see "
                    "hf_stompp.pack"
                )
            return
        follow_prefix(model, config)
        self._verification = Verification(kwargs.get("checkpoint_files") or [])
        if config.state == "latent":
            swap_in_masked(model, config)
        else:
            swap_in_packed(model, config, dtype=kwargs.get("dtype"))
            skip_initialization(model)
            expect_guard(model)
        self._shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
        check_modules(model, self._verification.files, config.state, self._shapes)

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        if not self.pre_quantized:
            binarize_modules(model, self.quantization_config)
            attach_quantizer(model, self.quantization_config)
            return
        keep_names(model)
        leave_files(model)
        self._verification.finish()
        # The model keeps this quantizer, and must stay one that can be copied.
        del self._verification
        check_shapes(model, self._shapes)
        check_loaded(model)
        if self.quantization_config.state == "latent":
            # A head may have come that shares the word embeddings.
            check_not_tied(model, self.quantization_config.plan)
        for module in masked_modules(model).values():
            module.refresh_flags()
        _complete_cards(model)

    def update_weight_conversions(self, weight_conversions: list[Any], *model: nn.Module) -> list[Any]:
        """
        What is done to the names of a file: nothing that would change the model's own, which are those that it was
        saved with, see [`keep_names`].
        """
        if not self.pre_quantized:
            # Before 5.21 Transformers names no model.
            return super().update_weight_conversions(weight_conversions, *model)
        return [
            conversion
            for conversion in weight_conversions
            if all(conversion.rename_source_key(name)[0] == name for name in self._shapes)
        ]

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        state_dict = dict(model.state_dict())
        guard = guard_name(model)
        if guard is not None:
            state_dict[guard] = torch.empty(0, dtype=torch.uint8)
        return state_dict, digests(state_dict)

    def is_serializable(self) -> bool:
        return True

    def dequantize(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        """
        What `packed.dequantize()` does: makes a packed model of mode `bwn` a plain Transformers model, in place. Its
        linear layers are `nn.Linear` with weights of `+-scale`. It computes the same, but does not round inputs to
        `activation_bits`.

        Args:
            model (`PreTrainedModel`): packed.
            dtype (`torch.dtype`, *optional*): of the result; that of the model when not given.

        Raises:
            ValueError: the model is not packed, or has binary activations, which no plain float model computes.
        """
        config = self.quantization_config
        refuse_adapters(model)
        if not packed_modules(model):
            raise ValueError(f"{type(model).__name__} is not packed: pack(model) first, then dequantize")
        if config.has_binary_activations:
            raise ValueError(
                f"only models of mode bwn can be dequantized: this {type(model).__name__} has binary activations too, "
                "which no plain float model computes; hf_stompp.export.plain_torch(model) gives the same computation "
                "in PyTorch's own operators, unpack(model) a latent model to train on"
            )
        swap_in_float(model, config)
        holder: Any = model
        # Not that of the config: the model may have been cast since.
        holder.to(dtype or holder.dtype)
        self.remove_quantization_config(model)
        del holder._upload_modified_files
        return model


class PlainQuantizer(StoMPPQuantizer):
    """Of a model from [`~hf_stompp.export.plain_torch`], whose folder nothing could load."""

    def is_serializable(self) -> bool:
        raise ValueError(
            "a model from plain_torch cannot be saved as a folder: save the packed model it was made from, or the "
            "result of torch.export.export(model, ...) with torch.export.save"
        )


# A module reload must not register twice: the registry refuses that.
if QUANT_METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
    register_quantization_config(QUANT_METHOD)(StoMPPConfig)
if QUANT_METHOD not in AUTO_QUANTIZER_MAPPING:
    register_quantizer(QUANT_METHOD)(StoMPPQuantizer)


def _upload_modified_files(model: Any, working_dir: Any, repo_id: str, *args: Any, **kwargs: Any) -> Any:
    """
    What a model uploads of a folder, with a card. Both ways of pushing a model by itself, `push_to_hub` and
    `save_pretrained(push_to_hub=True)`, end here.
    """
    # Named like the method that it stands in for, which is what a pickled model finds when it is read. Who only loads
    # a model needs no card, and not what that imports.
    from .card import complete_card

    complete_card(model, Path(working_dir) / "README.md", repo_id, kwargs.get("revision"))
    return type(model)._upload_modified_files(model, working_dir, repo_id, *args, **kwargs)


def _complete_cards(model: nn.Module) -> None:
    """Makes `push_to_hub` of a model by itself write a card that says how to load it."""
    holder: Any = model
    # On the object: its class is Transformers', and stays.
    holder._upload_modified_files = MethodType(_upload_modified_files, model)


def keep_names(model: nn.Module) -> None:
    """
    Makes `save_pretrained` write every tensor under the name that it has in the model.

    Transformers renames and merges tensors to write them as the first checkpoints of a family had them: LayerNorm's
    weights as gamma and beta, query, key and value as one. Trainer resumes with `load_state_dict`, which would
    silently skip renamed tensors, and scales or masks cannot be merged.
    """
    holder: Any = model
    holder._weight_conversions = []


def attach_quantizer(model: nn.Module, config: StoMPPConfig) -> None:
    """Makes `save_pretrained` and the Trainer treat a model changed in process like one that was loaded so."""
    holder: Any = model
    if not hasattr(holder, "config"):
        return
    # Two models may have been made from one config object.
    old, new = holder.config, copy.deepcopy(holder.config)
    new.quantization_config = config
    for module in model.modules():
        if getattr(module, "config", None) is old:
            module.config = new
    holder.hf_quantizer = StoMPPQuantizer(config, pre_quantized=True)
    holder.is_quantized = True
    holder.quantization_method = QUANT_METHOD
    keep_names(model)
    _complete_cards(model)


def mark_as_plain(model: nn.Module) -> None:
    """Makes `save_pretrained` refuse a model that is no longer packed, though its config says so."""
    holder: Any = model
    holder.hf_quantizer = PlainQuantizer(holder.config.quantization_config, pre_quantized=True)
    holder.is_quantized = False
