"""Binary activations, latent."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..ops import has_native_kernels, pack_sign
from ..ops.operators import FLOATS
from .functional import LEVELS, compute_dtype, masked_binary_activation
from .module import MaskedBinaryModule, SharedResult, as_integers


PRE_ACTIVATION_RANGE = 10.0
"""Pre-activations beyond this are taken for saturated when a threshold is initialised."""


def _positive(scale: Tensor) -> Tensor:
    """`scale`, or 1 where it is 0: a constant input has no distance from its mean, and any positive scale serves."""
    return torch.where(scale > 0, scale, torch.ones_like(scale))


class MaskedBinaryActivation(MaskedBinaryModule):
    """
    Binarizes a tensor `(..., features)` feature by feature, `M * hard + (1 - M) * soft`.

    The smooth branch is the model's own activation function (the identity in front of a linear layer that has none),
    clipped to `clip` times the scale; the hard branch is one of two levels, decided by the sign of the pre-activation
    minus a threshold. Scale, shift and threshold are initialised from the first batch the module sees: the shift of a
    feature is its mean, the scale is the mean distance from it (the two levels that fit the batch best, as in
    XNOR-Net), and the threshold is where the activation function reaches the middle of the levels.

    The arguments are as in [`StoMPPConfig`], `levels` being its `feed_forward_levels`. What `shift` says holds for the
    threshold as well: with `"none"` that is 0.
    """

    scale: Tensor
    shift: Tensor
    threshold: Tensor

    def __init__(
        self,
        features: int,
        activation: nn.Module | None = None,
        levels: str = "signed",
        clip: float = 1.0,
        surrogate: str = "clipped_ste",
        window: float | None = None,
        scale: str = "learned",
        initial_scale: float = 1.0,
        shift: str = "learned",
        device: torch.device | None = None,
    ) -> None:
        super().__init__((features,), surrogate, device)
        self.features = features
        self.activation = activation
        self.levels = levels
        self.clip = clip
        self.window = window
        self.initial_scale = initial_scale
        self.has_shift = shift != "none"
        self._register("scale", (), scale == "learned", device)
        self._register("shift", (features,), shift == "learned" and levels == "signed", device)
        self._register("threshold", (features,), shift == "learned", device)
        self.initialized = False
        # The linear layers that read it. A list, so that they are not registered here.
        self.readers: list[MaskedBinaryModule] = []
        self._output, self._bits = SharedResult(), SharedResult()

    def _register(self, name: str, shape: tuple[int, ...], learned: bool, device: torch.device | None) -> None:
        # float32 whatever the model's dtype: a learned scale moves by less than bfloat16 resolves.
        value = torch.zeros(shape, dtype=torch.float32, device=device)
        if learned:
            self.register_parameter(name, nn.Parameter(value))
        else:
            self.register_buffer(name, value)

    def refresh_flags(self) -> None:
        super().refresh_flags()
        self.initialized = bool(self.scale != 0)

    def two_levels(self) -> tuple[Tensor, Tensor]:
        """
        Middle and half distance of the two levels: offset, of shape `(features,)` or `()`, and amplitude, of shape
        `()`, at least 0.
        """
        offset, amplitude, _ = LEVELS[self.levels](self.scale.abs(), self.shift)
        return offset, amplitude

    def gives_signs(self, input: Tensor) -> bool:
        """
        Whether no more than signs is wanted of this module: it is committed, and no gradient passes through it, in
        evaluation mode without gradients or in STE-free training. There, only where products of bits are fast.
        """
        # Whether it is committed comes last: torch.compile depends on what is read.
        if self.training:
            if self.surrogate != "none" or not has_native_kernels(input.device):
                return False
        elif torch.is_grad_enabled():
            return False
        return input.dtype in FLOATS and self.committed

    def emits_bits(self) -> bool:
        """
        Whether a feed-forward activation function, [`gives_signs`] given, puts out bits instead of its two levels: all
        that read it are committed too. Their integer products need no more, and levels close to each other would be
        rounded together in bfloat16.
        """
        return self.initialized and len(self.readers) > 0 and all(reader.committed for reader in self.readers)

    def shared_output(self, input: Tensor, reader: nn.Module) -> Tensor:
        """
        [`forward`], computed once for all the linear layers that read it, in the dtype that they compute in, see
        [`SharedResult`].
        """
        return self._output.get(input, reader, len(self.readers), lambda: self(input).to(compute_dtype(input)))

    def shared_bits(self, input: Tensor, reader: nn.Module) -> Tensor:
        """The packed signs, uint8 of shape `(..., packed_bytes(features))`, likewise."""
        return self._bits.get(
            input, reader, len(self.readers), lambda: pack_sign(input.detach(), self.threshold.detach().float())[0]
        )

    @torch.no_grad()
    def initialize(self, input: Tensor, reduce: Callable[[Tensor], Tensor] = lambda statistic: statistic) -> None:
        """
        Sets scale, shift and threshold from a batch of pre-activations `(..., features)`. `reduce` sums a statistic
        over the ranks of a distributed run.
        """
        value = input if self.activation is None else self.activation(input)
        value = value.detach().reshape(-1, self.features).double()
        count = reduce(torch.tensor([value.shape[0]], dtype=torch.float64, device=value.device))
        if count == 0:
            # Nothing to learn from an empty batch; the next one initialises.
            return
        mean = reduce(value.sum(dim=0)) / count
        if self.levels == "zero_one":
            positive = value.clamp_min(0)
            total = reduce(torch.stack([positive.sum(), (positive > 0).sum()]))
            scale = _positive(total[0] / total[1].clamp_min(1))
            middle = (0.5 * scale).expand(self.features)
        else:
            middle = mean if self.has_shift else torch.zeros_like(mean)
            self.shift.copy_(middle)
            scale = _positive(reduce((value - middle).abs().sum()) / (count * self.features))
        self.scale.copy_(self.initial_scale * scale.squeeze())
        if self.has_shift:
            self.threshold.copy_(self._pre_activation_of(middle))
        self.initialized = True

    def _pre_activation_of(self, value: Tensor) -> Tensor:
        """Where the activation function, right of its minimum, reaches `value`."""
        if self.activation is None:
            return value
        grid = torch.linspace(-PRE_ACTIVATION_RANGE, PRE_ACTIVATION_RANGE, 8193, device=value.device)
        output = self.activation(grid.to(self.threshold.dtype)).double()
        start = int((output <= output.min()).nonzero().max())
        rising = output[start:].cummax(dim=0).values
        index = torch.searchsorted(rising, value.contiguous()).clamp_max(rising.numel() - 1)
        return grid[start + index]

    def forward(self, input: Tensor) -> Tensor:
        if not input.is_floating_point():
            # The layer in front has done it, see [`~hf_stompp.nn.module.BinaryInputModule.put_out_signs_of`].
            return input
        if not self.initialized:
            self.initialize(input)
        if self.activation is not None and self.gives_signs(input) and self.emits_bits():
            dtype = compute_dtype(input) if self.training else input.dtype
            return as_integers(pack_sign(input.detach(), self.threshold.detach().float())[0], dtype)
        value = input if self.activation is None else self.activation(input)
        return masked_binary_activation(
            value,
            input,
            self.freeze_mask,
            self.threshold,
            self.scale.abs(),
            self.shift,
            self.clip,
            self.surrogate,
            self.levels,
            self.window,
            blocked=self.blocks_gradient,
        )

    def extra_repr(self) -> str:
        return f"{self.features}, levels={self.levels!r}, clip={self.clip}, surrogate={self.surrogate!r}"
