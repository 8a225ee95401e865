"""`from_pretrained` and `save_pretrained` of latent and packed models: the Transformers quantizer."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping
from types import MethodType
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

from .adapters import has_adapters, refuse_adapters
from .config import QUANT_METHOD, StoMPPConfig
from .example_inputs import example_inputs
from .integrity import digests, start_verification
from .nn import MaskedBinaryModule, PackedBinaryActivation, PackedBinaryLinear, PackedInt8Embedding
from .patching import (
    PackedModule,
    masked_modules,
    packed_modules,
    swap_in_float,
    swap_in_masked,
    swap_in_packed,
)
from .structure import check_not_tied, plan_modules


class StoMPPQuantizer(HfQuantizer):
    """
    Loads and saves binarized models.

    - a latent or packed checkpoint: the modules in its table are swapped in on the meta device before the weights are
      loaded;
      afterwards nothing may be left uninitialised.
    - a float checkpoint with `quantization_config=StoMPPConfig(...)`: the same as [`binarize`] after
      `from_pretrained`.
    """

    requires_calibration = False
    quantization_config: StoMPPConfig

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        config = self.quantization_config
        if not self.pre_quantized:
            if config.state != "latent" or config.modules is not None:
                raise ValueError(
                    "from_pretrained(float_checkpoint, quantization_config=...) takes a fresh "
                    "StoMPPConfig(state='latent'): a model must be "
                    "trained or committed before it is packed, see hf_stompp.pack"
                )
            return
        _follow_prefix(model, config)
        # Hashing takes as long as the rest of loading; it is waited for before the model is handed out.
        files = kwargs.get("checkpoint_files") or []
        self._verification = start_verification(files)
        if config.state == "latent":
            _refuse_packed(files)
            swap_in_masked(model, config)
        else:
            swap_in_packed(model, config, dtype=kwargs.get("dtype"))
            _skip_initialization(model)
            _expect_guard(model)
        self._shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        if not self.pre_quantized:
            binarize_modules(model, self.quantization_config)
            attach_quantizer(model, self.quantization_config)
            return
        keep_names(model)
        self._verification.result()
        # The model keeps this quantizer, and must stay one that can be copied.
        del self._verification
        _check_shapes(model, self._shapes)
        _check_loaded(model)
        if self.quantization_config.state == "latent":
            # A head may have come that shares the word embeddings.
            check_not_tied(model, self.quantization_config.table)
        for module in masked_modules(model).values():
            module.refresh_flags()
        _complete_cards(model)

    def update_weight_conversions(self, weight_conversions: list[Any], model: nn.Module) -> list[Any]:
        """
        What is done to the names of a file: nothing that would change the model's own, which are those that it was
        saved with, see [`keep_names`].
        """
        if not self.pre_quantized:
            return super().update_weight_conversions(weight_conversions, model)
        own = list(model.state_dict())
        return [
            conversion
            for conversion in weight_conversions
            if all(conversion.rename_source_key(name)[0] == name for name in own)
        ]

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        state_dict = dict(model.state_dict())
        guard = _guard_name(model)
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

    @property
    def is_trainable(self) -> bool:
        # The Trainer asks this even to evaluate; StoMPPTrainer.train refuses a packed model itself.
        return True

    @property
    def is_qat_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True


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


def _follow_prefix(model: nn.Module, config: StoMPPConfig) -> None:
    """
    Renames the table of modules where a base model is loaded from the checkpoint of a model with a head, or the other
    way round: `bert.encoder...` is `encoder...` there.
    """
    prefix = getattr(model, "base_model_prefix", "")
    names = [entry["name"] for entry in config.modules or []]
    if not prefix or not names:
        return
    is_base, has_prefix = not hasattr(model, prefix), all(name.startswith(f"{prefix}.") for name in names)
    if is_base and has_prefix:
        length = len(prefix) + 1

        def rename(name: str | None) -> str | None:
            return None if name is None else name[length:]
    elif not is_base and not has_prefix and hasattr(getattr(model, prefix), names[0].split(".")[0]):

        def rename(name: str | None) -> str | None:
            return None if name is None else f"{prefix}.{name}"
    else:
        return
    if config.modes:
        # A pattern may have held the prefix. What is left float is in no table, so nothing is lost with its pattern.
        modes = {name: config.mode_of(name) for name, entry in config.table.items() if entry["kind"] == "linear"}
        config.modes = {re.escape(str(rename(name))): mode for name, mode in modes.items() if mode != config.mode}
    for entry in config.modules or []:
        entry.update({key: rename(entry[key]) for key in ("name", "unit", "input") if key in entry})


def _guard_name(model: nn.Module) -> str | None:
    """
    Name of the empty tensor in packed files that keeps a process without hf_stompp from loading them.

    It is that of a weight of the float model, whose shape it does not have. Transformers does not know the
    quantization there, warns, and would leave every packed weight random; a tensor of another shape is what it raises
    for.
    """
    names = (name for name, module in packed_modules(model).items() if not isinstance(module, PackedBinaryActivation))
    return next((f"{name}.weight" for name in names), None)


def _refuse_packed(files: Iterable[str]) -> None:
    """
    Refuses to load a latent model from packed files; the guard in them would do so without an explanation.

    Raises:
        ValueError: names the first packed tensor.
    """
    for file in files:
        with safe_open(file, framework="pt") as handle:
            name = next((key for key in handle.keys() if key.endswith(".packed_weight")), None)
        if name is not None:
            raise ValueError(
                f"{file} holds the packed tensor {name!r}, but its config.json says 'latent': they are not of one "
                "model; download or copy the folder again"
            )


def _expect_guard(model: nn.Module) -> None:
    """Keeps the empty tensor of packed files out of the list of unexpected ones."""
    name = _guard_name(model)
    if name is not None:
        holder: Any = model
        # The file may be that of a model with a head, or without.
        inside = name.removeprefix(f"{getattr(model, 'base_model_prefix', '')}.")
        known = holder._keys_to_ignore_on_load_unexpected or ()
        holder._keys_to_ignore_on_load_unexpected = {*known, rf"(^|\.){re.escape(inside)}$"}


def _upload_modified_files(model: Any, *args: Any, **kwargs: Any) -> Any:
    # Named like the method that it stands in for, which is what a pickled model finds when it is read. Who only loads
    # a model needs no card, and not what that imports.
    from .hub import upload_modified_files

    return upload_modified_files(model, *args, **kwargs)


def _complete_cards(model: nn.Module) -> None:
    """Makes `push_to_hub` of a model by itself write a card that says how to load it."""
    holder: Any = model
    # On the object: its class is Transformers', and stays.
    holder._upload_modified_files = MethodType(_upload_modified_files, model)


def _skip_initialization(model: nn.Module) -> None:
    """Keeps `_init_weights` off the parents of packed modules: some models initialise their children there."""
    modules = dict(model.named_modules())
    for name, module in packed_modules(model).items():
        parent: Any = modules[name.rpartition(".")[0]]
        # Its own buffers that are not saved are computed there.
        if not parent._non_persistent_buffers_set:
            parent._is_hf_initialized = True
        holder: Any = module
        holder._is_hf_initialized = True


def _check_loaded(model: nn.Module) -> None:
    """
    Checks that the checkpoint held every tensor of the encoder: what it does not hold would be uninitialised memory.

    Raises:
        ValueError: names the missing tensors, or a value that no packed model has.
    """
    base = getattr(model, "base_model_prefix", "")
    inside = f"{base}." if base and hasattr(model, base) else ""
    ours = tuple(f"{name}." for name in [*masked_modules(model), *packed_modules(model)])
    persistent = model.state_dict(keep_vars=True)
    names = [name for name in persistent if name.startswith(inside) or name.startswith(ours)]
    missing = [name for name in names if not getattr(persistent[name], "_is_hf_initialized", False)]
    if missing:
        offloaded = _offloaded(model)
        missing = [name for name in missing if name not in offloaded]
    pooler = {name for name in names if "pooler" in name.split(".")}
    if pooler <= set(missing):
        # A head may be new, and the pooler is a part of one; half a pooler is damage.
        missing = [name for name in missing if name not in pooler]
    if missing:
        raise ValueError(
            f"the checkpoint lacks {len(missing)} tensors of {type(model).__name__}, the first of them "
            f"{missing[0]!r}: it is incomplete or was written for another model class; download or copy it again"
        )
    for name, module in packed_modules(model).items():
        _check_packed(name, module)


def _offloaded(model: nn.Module) -> set[str]:
    """Names of the tensors that accelerate has on disk or elsewhere, and fetches for each call."""
    names: set[str] = set()
    for module in model.modules():
        hook = getattr(module, "_hf_hook", None)
        for part in getattr(hook, "hooks", (hook,)):
            names.update(getattr(part, "weights_map", None) or ())
    return names


def _check_shapes(model: nn.Module, shapes: dict[str, torch.Size]) -> None:
    """
    Checks the shapes of what was binarized: not every version of Transformers does so for buffers.

    Raises:
        ValueError: names the first tensor of another shape.
    """
    ours = tuple(f"{name}." for name in [*masked_modules(model), *packed_modules(model)])
    for name, tensor in model.state_dict().items():
        if name.startswith(ours) and tensor.shape != shapes.get(name):
            raise ValueError(
                f"tensor {name!r} has shape {tuple(tensor.shape)}, expected {tuple(shapes.get(name, ()))}: the "
                "checkpoint is damaged or was written for another model"
            )


def _check_packed(name: str, module: PackedModule) -> None:
    for tensor_name, tensor in module.named_buffers(recurse=False):
        if tensor.is_meta:
            # Several layers read one threshold, and none of them is what accelerate would fetch it for.
            raise ValueError(
                f"tensor {name + '.' + tensor_name!r} is offloaded, which packed layers do not work with: load the "
                "model with offload_buffers=False, the default; parameters may be offloaded"
            )
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"tensor {name + '.' + tensor_name!r} holds NaN or infinity: the checkpoint is damaged")
    if isinstance(module, PackedBinaryActivation | PackedInt8Embedding):
        return
    columns = module.in_features if isinstance(module, PackedBinaryLinear) else module.embedding_dim
    whole, rest = divmod(columns, 8)
    tail = module.packed_weight[:, whole:]
    if tail.numel() and bool((tail[:, 0] >> rest).any() or tail[:, 1:].any()):
        raise ValueError(
            f"tensor {name + '.packed_weight'!r} has bits beyond its {columns} columns: the checkpoint is damaged or "
            f"of another format"
        )


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


def _check_float(model: nn.Module) -> None:
    """
    Checks that a model is float and finite.

    Raises:
        ValueError: it was binarized, packed or quantized before, has adapters that are not merged, or holds NaN or
            infinity; names the tensor.
    """
    if packed_modules(model):
        raise ValueError(
            f"{type(model).__name__} is packed; binarize the float model it came from, or unpack(model) to train on"
        )
    if any(isinstance(module, MaskedBinaryModule) for module in model.modules()):
        raise ValueError(
            f"{type(model).__name__} is already binarized; binarize a model once, right after from_pretrained"
        )
    if has_adapters(model):
        raise ValueError(
            f"{type(model).__name__} has adapters that are not merged, whose matrices would become binary, too: merge "
            "them first, model.merge_and_unload()"
        )
    method = getattr(model, "quantization_method", None)
    # from_pretrained(float, quantization_config=StoMPPConfig(...)) has marked the model already.
    if method not in (None, QUANT_METHOD) or (getattr(model, "is_quantized", False) and method is None):
        raise ValueError(f"{type(model).__name__} is already quantized ({method}); binarize takes a float model")
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise ValueError(f"{name} is on the meta device: load the weights before binarize")
        if not parameter.is_floating_point():
            raise ValueError(f"{name} is {parameter.dtype}: binarize takes a float model")
        if not bool(torch.isfinite(parameter).all()):
            raise ValueError(f"{name} holds NaN or infinity: start from sound weights")


def binarize_modules(model: nn.Module, config: StoMPPConfig) -> None:
    """Checks, plans and swaps: [`binarize`] without marking the model. Takes the example inputs out of the config."""
    _check_float(model)
    if config.state != "latent" or config.modules is not None:
        raise ValueError("this StoMPPConfig belongs to another model; pass a fresh one, StoMPPConfig(...)")
    inputs = example_inputs(model) if config.example_inputs is None else config.example_inputs
    config.modules = [{"name": name, **entry} for name, entry in plan_modules(model, config, inputs).items()]
    _check_packed_form(model, config, inputs)
    swap_in_masked(model, config)
    config.example_inputs = None


def _check_packed_form(model: nn.Module, config: StoMPPConfig, inputs: Mapping[str, Any]) -> None:
    """
    Refuses a model whose packed form cannot run, before it is trained: its forward may ask linear layers for what
    packed ones do not have. A copy without values is packed, which takes milliseconds and no memory.
    """

    def without_value(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        return value.to("meta", torch.float32 if value.is_floating_point() else None)

    on_meta = {name: without_value(value) for name, value in inputs.items()}
    with torch.no_grad():
        try:
            copied = _without_values(model).eval().float()
            copied(**on_meta)
        # Some models (DeBERTa) read values on their way, others cannot be copied: these cannot be tried out.
        except Exception:
            return
        swap_in_packed(copied, config)
        try:
            copied(**on_meta)
        except Exception as error:
            raise ValueError(
                f"{type(model).__name__} could be trained, but not run as a packed model: {type(error).__name__}: "
                f"{error}. Leave the layers that it means float: name them in modules_to_not_convert"
            ) from error


def _without_values(model: nn.Module) -> Any:
    """A copy on the meta device, without hooks."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)
    for buffer in model.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    copied = copy.deepcopy(model, memo)
    for module in copied.modules():
        # They belong to whoever registered them, and expect values.
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    return copied
