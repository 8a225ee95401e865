"""What every masked module shares: a freeze mask, and the ways it may change."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .mask import MaskChanges, change_mask_


_INTEGERS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.uint16}

_FLOATS = {integer: dtype for dtype, integer in _INTEGERS.items()}


def as_integers(bits: Tensor, dtype: torch.dtype) -> Tensor:
    """
    Bits on their way through a model's own code: viewed as integers of the type that tells which float type they stand
    for, so that the layer that reads them knows what to put out. Bits are uint8 of shape `(...,
    packed_bytes(features))`, and the float type is float32, bfloat16 or float16.
    """
    return bits.view(_INTEGERS[dtype])


def as_bits(integers: Tensor) -> tuple[Tensor, torch.dtype]:
    """The inverse of [`as_integers`]."""
    return integers.view(torch.uint8), _FLOATS[integers.dtype]


def tensor_version(tensor: Tensor) -> int | None:
    """How often a tensor was written in place; None for one of inference mode, where nothing counts that."""
    return None if tensor.is_inference() else tensor._version


def identity(*tensors: Tensor) -> tuple[Any, ...]:
    """Changes whenever one of the tensors is replaced or, outside of inference mode, written to."""
    return tuple((tensor.device, tensor.data_ptr(), tensor_version(tensor)) for tensor in tensors)


class SharedResult:
    """
    What is computed from a tensor once for all the layers that read it.

    A layer that comes again begins anew: in inference mode nothing tells that a tensor was written in place since.
    Nothing is kept once the last reader has had the result or the tensor is gone, nor used after a backward pass has
    been through it.

    While torch.compile traces, nothing is kept at all: Dynamo knows no version of a tensor, and what a trace left
    behind here would be put out by the graph and be a condition of running it again. There,
    [`~hf_stompp.ops.tracing`] finds what was packed before.
    """

    def __init__(self) -> None:
        # The tensor, its version, whether gradients were on, the result, and who has had it.
        self._last: tuple[weakref.ref[Tensor], int | None, bool, Tensor, set[int]] | None = None

    def get(self, input: Tensor, reader: nn.Module, readers: int, compute: Callable[[], Tensor]) -> Tensor:
        """
        `compute()`, which reads `input`, or what it returned to another reader of the same tensor, or what was kept
        for it beforehand. `reader` is the layer that asks, one of `readers`.
        """
        kept = self.take(input, reader, readers)
        if kept is not None:
            return kept
        result = compute()
        if readers > 1 and not torch.compiler.is_compiling():
            self._set(input, result, reader)
        return result

    def take(self, input: Tensor, reader: nn.Module, readers: int) -> Tensor | None:
        """What was kept for this very tensor, not written in place since; None if nothing was."""
        if torch.compiler.is_compiling():
            return None
        # Read once: another thread may be running the same model.
        last, key = self._last, (tensor_version(input), torch.is_grad_enabled())
        if last is None:
            return None
        if last[0]() is not input or last[1:3] != key or id(reader) in last[4]:
            return None
        last[4].add(id(reader))
        if len(last[4]) == readers:
            self._last = None
        return last[3]

    def keep(self, input: Tensor, result: Tensor) -> None:
        """
        Keeps for the readers of a tensor what was computed together with it. Not for one of inference mode: nothing
        would tell that it was written in place meanwhile.
        """
        if not (torch.compiler.is_compiling() or input.is_inference()):
            self._set(input, result)

    def _set(self, input: Tensor, result: Tensor, reader: nn.Module | None = None) -> None:
        taken = set() if reader is None else {id(reader)}
        # Once the tensor is gone nobody can ask any more, whoever has not.
        kept_for = weakref.ref(input, self._forget)
        self._last = kept_for, tensor_version(input), torch.is_grad_enabled(), result, taken
        if result.requires_grad:
            result.register_hook(self._forget)

    def _forget(self, _: Any) -> None:
        # After a backward pass, too: a second one could not go through the same graph.
        self._last = None

    def __reduce__(self) -> tuple[type[SharedResult], tuple[()]]:
        # Copied and saved without a result.
        return SharedResult, ()


def refer(module: nn.Module, name: str, other: nn.Module | None) -> None:
    """Sets `module.name = other` past nn.Module's registration, so that `other` is neither saved nor counted twice."""
    object.__setattr__(module, name, other)


class BinaryInputModule(nn.Module):
    """A linear layer, latent or packed, whose input may be binarized, by a module of its own or one that it shares."""

    in_features: int
    input_activation: Any
    output_activation: Any = None
    binarizes_input: bool

    @property
    def activation_features(self) -> int:
        """Entries that the mask and the threshold of a binary input have."""
        return self.in_features

    def set_input_activation(self, activation: nn.Module, owned: bool, upstream: bool = False) -> None:
        """
        Says what binarizes the input of this layer. With `owned` it becomes a submodule: layers that read the same
        tensor share one activation, and one owns it. With `upstream` it has already been applied, in the place of the
        feed-forward activation function.
        """
        activation.readers.append(self)  # type: ignore[union-attr, operator]
        if owned:
            self.input_activation = activation
        else:
            refer(self, "input_activation", activation)
        self.binarizes_input = not upstream

    def put_out_signs_of(self, activation: nn.Module) -> None:
        """
        Says that `activation` reads the output of this layer, and nothing else does: where it wants no more than
        signs, the layer puts out bits, and the float output is never written.
        """
        refer(self, "output_activation", activation)


class MaskedBinaryModule(nn.Module):
    """
    A module with a freeze mask.

    The mask is a persistent buffer that is only ever written in place: `torch.compile` and DistributedDataParallel
    hold references to it. `committed` repeats in a Python bool whether the mask is full, so that reading it neither
    synchronises with a GPU nor breaks a compiled graph; every method that writes the mask keeps it true. `surrogate`
    is a key of [`~hf_stompp.nn.functional.SURROGATES`].
    """

    freeze_mask: Tensor

    def __init__(self, mask_shape: tuple[int, ...], surrogate: str, device: torch.device | None = None) -> None:
        super().__init__()
        self.surrogate = surrogate
        self.register_buffer("freeze_mask", torch.zeros(mask_shape, dtype=torch.bool, device=device))
        self.committed = False

    @property
    def blocks_gradient(self) -> bool:
        """Whether nothing passes back any more: committed, and STE-free (the paper's *gradient blockade*)."""
        # In this order: torch.compile depends on what is read.
        return self.surrogate == "none" and self.committed

    def _set_committed(self, committed: bool) -> None:
        self.committed = committed

    def change(self, changes: MaskChanges) -> None:
        """A step of the mask but for the last, which is [`commit`]; see [`~hf_stompp.nn.mask.draw_changes`]."""
        change_mask_(self.freeze_mask, changes)
        self._set_committed(False)

    def commit(self) -> None:
        """Freezes every entry, for good."""
        self.freeze_mask.fill_(True)
        self._set_committed(True)

    def reset(self) -> None:
        """Frees every entry: the state before training."""
        self.freeze_mask.fill_(False)
        self._set_committed(False)

    def restore(self, mask: Tensor) -> None:
        """Writes back a mask that was saved with `freeze_mask.clone()`."""
        self.freeze_mask.copy_(mask)
        self.refresh_flags()

    def refresh_flags(self) -> None:
        """Derives the Python flags from the tensors, where those were not loaded by `load_state_dict`."""
        self._set_committed(bool(self.freeze_mask.all()))

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        if not self.freeze_mask.is_meta:
            self.refresh_flags()
