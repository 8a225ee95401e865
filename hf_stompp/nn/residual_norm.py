"""The block behind an attention or a feed-forward of BERT's kind, packed: residual sum, LayerNorm and sign bits."""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as module_globals

from ..ops import fuses_layer_norm, layer_norm_sign
from ..ops.operators import FLOATS
from .module import refer
from .packed import PackedBinaryActivation, PackedBinaryLinear


class PackedResidualNorm(nn.Module):
    """
    `LayerNorm(dropout(dense(hidden_states)) + input_tensor)`, BERT's output block, in whose place it stands: its
    children are those of the block, under the same names. Where sum and LayerNorm are one kernel, that puts out the
    sign bits of its result as well, and the layers that binarize it need not pack it (ours). The block is one of
    [`is_residual_norm`]; [`~hf_stompp.unpack`] gives it back.
    """

    dense: nn.Module
    LayerNorm: nn.LayerNorm
    dropout: nn.Dropout | None
    _following: PackedBinaryActivation | None = None

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        # In the order of the block, which is that of the state dict.
        for name, child in block.named_children():
            self.register_module(name, child)
        if "dropout" not in self._modules:
            self.register_module("dropout", None)
        # Such as a config: others may read them.
        vars(self).update(_own_attributes(block))
        self.training = block.training
        refer(self, "_block", block)

    def followed_by(self, activation: PackedBinaryActivation) -> None:
        """
        Says what most likely binarizes the output. A hint: bits are used for the very tensor that they were made of,
        and no other.
        """
        refer(self, "_following", activation)

    def restored(self) -> nn.Module:
        """The block in whose place this module stands, with the children that this module has by now."""
        block: Any = self._block
        for name, child in self.named_children():
            block.register_module(name, child)
        vars(block).update({name: vars(self)[name] for name in _own_attributes(block)})
        return block.train(self.training)

    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        """
        Maps `(..., in_features)`, floats or the bits of a feed-forward activation, and the residual `(..., features)`
        to `(..., features)`.
        """
        hidden_states = self.dense(hidden_states)
        if self._fuses(hidden_states, input_tensor):
            return self._norm_and_signs(hidden_states, input_tensor)
        if self.dropout is not None:
            hidden_states = self.dropout(hidden_states)
        return self.LayerNorm(hidden_states + input_tensor)

    def _fuses(self, hidden_states: Tensor, input_tensor: Tensor) -> bool:
        """Whether the fused operator may stand for the children, and puts out what they would."""
        following, norm, dropout = self._following, self.LayerNorm, self.dropout
        if following is None or self.training or torch.is_grad_enabled():
            return False
        device, dtype = hidden_states.device, hidden_states.dtype
        if not fuses_layer_norm(device) or torch.is_autocast_enabled(device.type):
            return False
        if not _is_untouched(norm, nn.LayerNorm) or not (
            dropout is None or (_is_untouched(dropout, nn.Dropout) and not dropout.training)
        ):
            return False
        return (
            dtype in FLOATS
            and input_tensor.dtype == norm.weight.dtype == dtype
            and input_tensor.shape == hidden_states.shape
            # Models may be spread over devices.
            and input_tensor.device == norm.weight.device == following.threshold.device == device
        )

    def _norm_and_signs(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        following, norm = self._following, self.LayerNorm
        assert following is not None
        arguments = hidden_states, input_tensor, norm.weight, norm.bias, norm.eps, following.threshold.float()
        if torch.compiler.is_compiling() or not torch.is_inference_mode_enabled():
            output, bits = layer_norm_sign(*arguments)
        else:
            # What inference mode creates does not count how often it is written in place.
            with torch.inference_mode(False), torch.no_grad():
                output, bits = layer_norm_sign(*arguments)
        following.keep(output, bits)
        return output


def _own_attributes(module: nn.Module) -> dict[str, Any]:
    """What a module holds besides tensors and children. Names that libraries mark modules with have an underscore."""
    names = vars(module).keys() - vars(nn.Module()).keys()
    return {name: vars(module)[name] for name in names if not name.startswith("_")}


def _is_untouched(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether calling a module does no more than the forward of its class."""
    return (
        type(module) is kind
        and not module._forward_hooks
        and not module._forward_pre_hooks
        # Libraries that move weights between devices wrap it so.
        and "forward" not in module.__dict__
        and not module_globals._global_forward_hooks
        and not module_globals._global_forward_pre_hooks
    )


def is_residual_norm(module: nn.Module) -> bool:
    """
    Whether a module is `LayerNorm(dropout(dense(hidden_states)) + input_tensor)`, by its structure and by what its
    class computes, whatever its name; `dense` being packed, on binary inputs.
    """
    children: dict[str, Any] = dict(module.named_children())
    dense, norm, dropout = (children.pop(name, None) for name in ("dense", "LayerNorm", "dropout"))
    if children or not isinstance(dense, PackedBinaryLinear) or type(norm) is not nn.LayerNorm:
        return False
    block_class: Any = type(module)
    is_hooked = any(hooks for name, hooks in vars(module).items() if name.endswith("_hooks"))
    return (
        dense.binary_input
        and dense.output_activation is None
        and norm.normalized_shape == (dense.out_features,)
        and norm.weight is not None
        and norm.bias is not None
        and (dropout is None or type(dropout) is nn.Dropout)
        # Libraries that move weights between devices wrap it so.
        and "forward" not in vars(module)
        and not module._parameters
        and not module._buffers
        and not is_hooked
        and _computes_residual_norm(block_class, dropout is not None)
    )


class _StandIn(nn.Module):
    """A module that a class's forward can be tried on."""

    def __init__(self, dtype: torch.dtype, has_dropout: bool) -> None:
        super().__init__()
        self.dense = nn.Linear(6, 5, dtype=dtype)
        self.LayerNorm = nn.LayerNorm(5, eps=1e-3, dtype=dtype)
        if has_dropout:
            self.dropout = nn.Dropout(0.5)
        for parameter in self.parameters():
            parameter.copy_(torch.randn(parameter.shape))


@cache
def _computes_residual_norm(block_class: type[nn.Module], has_dropout: bool) -> bool:
    """Whether the forward of a class is that of [`PackedResidualNorm`], bit for bit, tried on a tiny random module."""
    parameters = list(inspect.signature(block_class.forward).parameters)
    if parameters != ["self", "hidden_states", "input_tensor"]:
        return False
    try:
        # A model may be built on the meta device meanwhile; and nobody else's random numbers are to change.
        with torch.device("cpu"), torch.random.fork_rng(devices=[]), torch.inference_mode(False), torch.no_grad():
            for dtype in (torch.float32, torch.bfloat16):
                for training in (False, True):
                    block = _StandIn(dtype, has_dropout).train(training)
                    arguments = torch.randn(3, 4, 6).to(dtype), torch.randn(3, 4, 5).to(dtype)
                    # For dropout. Of the CPU alone: torch.manual_seed would seed GPUs too.
                    torch.default_generator.manual_seed(0)
                    found = block_class.forward(block, *arguments)
                    torch.default_generator.manual_seed(0)
                    expected = PackedResidualNorm(block)(*arguments)
                    if found.dtype != expected.dtype or not torch.equal(found, expected):
                        return False
    # A forward that reads what a stand-in does not have is another computation, whatever it raises.
    except Exception:
        return False
    return True
