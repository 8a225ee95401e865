"""
A packed model for programs that have no hf_stompp: in PyTorch's own operators, and as an ONNX file.

See `docs/howto/export.md`. The plain float model, where there is one, is `packed.dequantize()`.
"""

from __future__ import annotations

import copy
import importlib.util
import inspect
import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .model.example_inputs import example_inputs
from .model.modules import config_of, packed_modules
from .model.quantizer import mark_as_plain
from .model.swap import swap_out_norms
from .nn.plain import plain_module
from .output import replacing


Model = TypeVar("Model", bound=nn.Module)

_FOLDED_BYTES = 1024
"""Constants up to this size are computed at export; larger ones are the packed weights, which are to stay packed."""


def plain_torch(model: Model) -> Model:
    """
    A packed model in PyTorch's own operators: the same weights, as bits, and the same logits, but none of our kernels.

    Slower than the packed model, and made for what reads PyTorch graphs: `torch.export` of it can be loaded and run
    where hf_stompp is not installed, and so can what is compiled from that.

    Args:
        model (`PreTrainedModel`): from [`pack`] or a packed checkpoint. It is left as it is.

    Returns:
        `PreTrainedModel`: a new model of the same class, in evaluation mode. `save_pretrained` refuses it, since
            nothing could load that folder.

    Raises:
        ValueError: the model is not packed.
    """
    return _plain(model)


def _plain(model: Model, in_integers: bool = False) -> Model:
    """A copy whose packed modules are those of [`plain_module`]."""
    config_of(model)
    if not packed_modules(model):
        raise ValueError(f"{type(model).__name__} is not packed: pack(model) first")
    plain = copy.deepcopy(model)
    for name in config_of(plain).plan:
        plain.set_submodule(name, plain_module(plain.get_submodule(name), in_integers))
    swap_out_norms(plain)
    mark_as_plain(plain)
    return plain.eval()


def sample_inputs(model: nn.Module) -> dict[str, Tensor]:
    """
    Two examples of what a model takes, to trace it with: token ids with the masks that its tokenizer makes, or images.

    Args:
        model (`PreTrainedModel`).

    Returns:
        `dict[str, Tensor]`: forward arguments; those of text have shape `(2, 8)`.

    Raises:
        ValueError: the model takes neither.
    """
    inputs = {name: tensor.repeat(2, *[1] * (tensor.dim() - 1)) for name, tensor in example_inputs(model).items()}
    if "input_ids" not in inputs:
        return inputs
    config: Any = model.config
    parameters = inspect.signature(model.forward).parameters
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if "token_type_ids" in parameters and getattr(config, "type_vocab_size", 0) > 1:
        inputs["token_type_ids"] = torch.zeros_like(inputs["input_ids"])
    return inputs


def export_onnx(model: nn.Module, path: str | os.PathLike[str], inputs: Mapping[str, Tensor] | None = None) -> None:
    """
    Writes a packed model as one ONNX file of standard operators, in float32, with products of 8-bit inputs in integers
    (`MatMulInteger`). Its weights stay eight to a byte.

    Batch size and sequence length are free: the first dimension of every input, and the second of those that hold
    integers, are named `batch` and `length`. Outputs are named as in Transformers, `logits` for instance.

    Args:
        model (`PreTrainedModel`): from [`pack`] or a packed checkpoint. It is left as it is.
        path (`str` or `os.PathLike`): the file to write. It appears whole or not at all.
        inputs (`Mapping[str, Tensor]`, *optional*): forward arguments to trace with, of at least two examples; they
            say which inputs the file has. From [`sample_inputs`] when not given.

    Raises:
        ImportError: onnx or onnxscript is not installed.
        ValueError: the model is not packed, or inputs have fewer than two examples.
    """
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f"export to ONNX needs {' and '.join(missing)}: pip install 'hf_stompp[onnx]'")
    plain: Any = _plain(model, in_integers=True)
    plain = plain.cpu().float()
    inputs = {name: tensor.cpu() for name, tensor in (sample_inputs(plain) if inputs is None else inputs).items()}
    for name, tensor in inputs.items():
        if tensor.dim() < 1 or tensor.shape[0] < 2:
            # A dimension of 1 would be a constant in the graph.
            raise ValueError(f"inputs[{name!r}] has shape {tuple(tensor.shape)}: give at least two examples")
    with torch.no_grad():
        outputs = plain(**inputs)
    dynamic = {name: {0: "batch"} | _length(tensor) for name, tensor in inputs.items()}
    with _quiet_exporter(), torch.no_grad():
        program: Any = torch.onnx.export(
            plain,
            (),
            kwargs=dict(inputs),
            output_names=[name for name, value in outputs.items() if isinstance(value, Tensor)],
            dynamic_shapes=dynamic,
            dynamo=True,
            custom_translation_table={torch.ops.aten._int_mm.default: _multiply_integers},
            optimize=False,
            verbose=False,
        )
        _simplify(program.model)
    with replacing(Path(path)) as partial:
        program.save(str(partial), external_data=False)


def _multiply_integers(a: Any, b: Any) -> Any:
    """int8 products of PyTorch in ONNX, which the exporter does not know."""
    from onnxscript import opset18

    return opset18.MatMulInteger(a, b)


def _length(tensor: Tensor) -> dict[int, str]:
    return {} if tensor.is_floating_point() or tensor.dim() < 2 else {1: "length"}


def _simplify(onnx_model: Any) -> None:
    """Computes small constants, and forgets where in whose files each node was made."""
    from onnxscript import optimizer

    optimizer.optimize_ir(onnx_model, input_size_limit=_FOLDED_BYTES, output_size_limit=_FOLDED_BYTES)
    for part in [onnx_model, onnx_model.graph, *onnx_model.graph.all_nodes(), *onnx_model.functions.values()]:
        part.metadata_props.clear()
        part.doc_string = None
    for node in onnx_model.graph.all_nodes():
        for value in node.outputs:
            value.metadata_props.clear()
    for value in [*onnx_model.graph.inputs, *onnx_model.graph.initializers.values()]:
        value.metadata_props.clear()


@contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Keeps the exporter's notes on itself (of packages that it could also export) off stderr."""
    logger = logging.getLogger("torch.onnx._internal.exporter._registration")
    before = logger.level
    try:
        logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)
