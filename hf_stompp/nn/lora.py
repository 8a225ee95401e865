"""LoRA of peft beside binary linear layers, packed or latent. Imports peft, so nothing here imports it."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig, LoraModel
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import _maybe_include_all_linear_layers
from torch import Tensor, nn

from ..ops import unpack_signs
from .activation import MaskedBinaryActivation
from .convolution import MaskedBinaryConv2d, PackedBinaryConv2d
from .linear import MaskedBinaryLinear
from .module import as_bits, refer
from .packed import PackedBinaryLinear


logger = logging.getLogger(__name__)

BINARY_LINEARS = PackedBinaryLinear, MaskedBinaryLinear

BINARY_CONVOLUTIONS = PackedBinaryConv2d, MaskedBinaryConv2d

STARTS = True, False, "gaussian", "orthogonal"
"""Values of `init_lora_weights` that leave the base weight as it is."""

CANNOT_MERGE = (
    "cannot be merged: a binary layer stores one sign a weight and one scale a row, which cannot hold the sum of its "
    "weight and an adapter's. Keep the adapter beside the base, PeftModel.from_pretrained(base, folder). In mode bwn "
    "it can be merged into a float model: load it over packed.dequantize() instead"
)


class BinaryLoraLinear(nn.Module, LoraLayer):
    """
    `base_layer(input) + scaling * B(A(dropout(input)))`, over a packed or masked linear layer. The adapter reads the
    input as it is in front of the layer, before any sign or rounding; behind a binary feed-forward activation, its two
    levels. The arguments are those of peft's own layers.
    """

    if TYPE_CHECKING:
        # Where peft is not installed, the type checker sees none of its attributes.
        def __getattr__(self, name: str) -> Any: ...

    def __init__(
        self,
        base_layer: Any,
        adapter_name: str,
        config: LoraConfig,
        r: int = 0,
        lora_alpha: int = 1,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        if isinstance(base_layer, BINARY_CONVOLUTIONS):
            raise ValueError(
                "LoRA beside a binary convolution is not supported: name linear layers in "
                "LoraConfig(target_modules=...)"
            )
        LoraLayer.__init__(self, base_layer)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r, lora_alpha, config)
        # Floats can be added to, signs cannot.
        refer(self, "_following", base_layer.output_activation)
        refer(base_layer, "output_activation", None)

    def _get_in_out_features(self, module: Any) -> tuple[int, int]:
        # peft warns of layers that it does not know.
        return module.in_features, module.out_features

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **kwargs: Any) -> None:
        if config.init_lora_weights not in STARTS:
            raise ValueError(
                f"LoraConfig.init_lora_weights={config.init_lora_weights!r} changes the base weight, which a binary "
                f"layer cannot: use one of {list(STARTS)}"
            )
        super().update_layer(adapter_name, r, lora_alpha, config, **kwargs)

    def forward(self, input: Tensor, adapter_names: list[str] | None = None) -> Tensor:
        """
        Maps `(..., in_features)`, floats or the bits of a feed-forward activation, to `(..., out_features)`.
        `adapter_names` are those of the examples; all active adapters when not given.
        """
        self._check_forward_args(input, adapter_names=adapter_names)
        output = self.base_layer(input)
        if self.disable_adapters:
            return output
        floats, dtype = self._as_floats(input), output.dtype
        for name in self.active_adapters if adapter_names is None else sorted(set(adapter_names)):
            if name not in self.lora_A:
                continue
            if adapter_names is None:
                output = output + self._product(name, floats)
            else:
                mine = [example for example, other in enumerate(adapter_names) if other == name]
                product = self._product(name, floats[mine])
                output = output.to(product.dtype).index_add(0, torch.tensor(mine, device=output.device), product)
        return output.to(dtype)

    def _product(self, name: str, input: Tensor) -> Tensor:
        down = self.lora_A[name]
        return self.lora_B[name](down(self.lora_dropout[name](input.to(down.weight.dtype)))) * self.scaling[name]

    def _as_floats(self, input: Tensor) -> Tensor:
        """What a feed-forward activation stands for that puts out bits."""
        if input.is_floating_point():
            return input
        bits, dtype = as_bits(input)
        signs = unpack_signs(bits, self.base_layer.in_features)
        activation = self.base_layer.input_activation
        if isinstance(activation, MaskedBinaryActivation):
            offset, amplitude = activation.two_levels()
            return (offset + amplitude * signs).to(dtype)
        return signs.to(dtype)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """What an adapter would add to a float weight; peft combines several adapters by it."""
        down, up = self.lora_A[adapter], self.lora_B[adapter]
        return (up.weight @ down.weight) * self.scaling[adapter]

    def merge(self, *args: Any, **kwargs: Any) -> None:
        raise ValueError(f"LoRA over {type(self.base_layer).__name__} {CANNOT_MERGE}")

    def unload_and_optionally_merge_module(self, merge: bool, *args: Any, **kwargs: Any) -> nn.Module:
        """The base layer, as it was before; peft calls this."""
        if merge:
            self.merge()
        refer(self.base_layer, "output_activation", self._following)
        return self.base_layer

    def __repr__(self) -> str:
        return f"lora.{super().__repr__()}"


class BinaryLoraModel(LoraModel):
    """peft's `LoraModel`, which knows binary linear layers, too."""

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Puts an adapter into a model, in place; peft calls this for every new adapter."""
        config: Any = self.peft_config[adapter_name]
        config._register_custom_module(dict.fromkeys(BINARY_LINEARS, BinaryLoraLinear))
        if str(config.target_modules).lower() == "all-linear":
            # Those that peft knows; without the classifier, for example.
            config = _maybe_include_all_linear_layers(config, model)
            config.target_modules |= {
                name
                for name, module in model.named_modules()
                # Not the layer below another adapter.
                if type(module) in BINARY_LINEARS and not name.endswith(".base_layer")
            }
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        blocking = [name.removesuffix(".base_layer") for name, module in model.named_modules() if _blocks(module)]
        if blocking and not config.inference_mode:
            logger.warning(
                "%d layers pass no gradient to their inputs, such as %s: adapters in front of them learn only through "
                "other adapters, or not at all. Train on unpack(packed, surrogate='ste'), and load the adapter over "
                "the packed model",
                len(blocking),
                blocking[0],
            )

    def _check_merge_allowed(self) -> None:
        # Before peft has merged any other layer.
        super()._check_merge_allowed()
        for module in self.model.modules():
            if isinstance(module, BinaryLoraLinear):
                module.merge()


def _blocks(module: nn.Module) -> bool:
    """Whether no gradient passes through a binary layer."""
    if isinstance(module, PackedBinaryLinear):
        return module.binary_input or module.activation_bits is not None
    return isinstance(module, MaskedBinaryLinear) and module.blocks_gradient
