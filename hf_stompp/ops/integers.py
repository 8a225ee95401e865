"""
Products whose sums are exact integers, in plain PyTorch: what rounds an input before them, and what they are scaled by
after. Holds no operator.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def quantize_rows(input: Tensor) -> tuple[Tensor, Tensor]:
    """
    Rounds each row to 255 even levels about 0 that reach to its largest magnitude (dynamic symmetric 8-bit
    quantization; one scale a token).

    Args:
        input (`Tensor` of shape `(..., features)`): float32, bfloat16 or float16.

    Returns:
        `tuple(Tensor, Tensor)`: codes, int8 of shape `(..., features)` in [-127, 127], halves rounded to even; and
            what a code is multiplied by, float32 of shape `(..., 1)`. Both are 0 where the largest magnitude is 0 or
            too small to divide 127 by. Where a row holds NaN or infinity its codes are 0 and its scale is NaN: so are
            its products then, and those of no other row.
    """
    wide = input.detach().float()
    largest = wide.abs().amax(dim=-1, keepdim=True)
    # By a Python number a GPU would divide as by a product with its reciprocal, and round twice.
    most = torch.full_like(largest, 127.0)
    inverse = most / largest
    is_finite = torch.isfinite(largest)
    is_usable = is_finite & torch.isfinite(inverse)
    codes = torch.where(is_usable, (wide * inverse).round(), 0.0).to(torch.int8)
    scale = torch.where(is_usable, largest / most, torch.where(is_finite, 0.0, torch.nan))
    return codes, scale


def scale_sums(
    sums: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype, row_scale: Tensor | None = None
) -> Tensor:
    """`sums * row_scale * scale + bias` of float32, each operation rounded by itself, then to `dtype`."""
    product = (sums if row_scale is None else sums * row_scale) * scale
    return (product if bias is None else product + bias).to(dtype)


def integer_linear(
    signs: Tensor, weight_signs: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype | None = None
) -> Tensor:
    """
    `scale * (signs @ weight_signs.T) + bias`, the product being an exact integer.

    Sums of fewer than 2^24 terms of +-1 are exact in float32, in whatever order they are taken.

    Args:
        signs (`Tensor` of shape `(..., in_features)`): +-1, any floating dtype.
        weight_signs (`Tensor` of shape `(out_features, in_features)`): +-1.
        scale (`Tensor` of shape `(out_features,)`).
        bias (`Tensor` of shape `(out_features,)`, *optional*).
        dtype (`torch.dtype`, *optional*): of the result; that of `signs` when not given.

    Returns:
        `Tensor` of shape `(..., out_features)`: rounded to float32 after the product with the scale and after the sum
            with the bias, then to `dtype`.
    """
    # Autocast would round the integers to bfloat16, which holds none above 256 exactly.
    with torch.autocast(signs.device.type, enabled=False):
        sums = F.linear(signs.float(), weight_signs.float())
        return scale_sums(sums, scale.float(), None if bias is None else bias.float(), dtype or signs.dtype)
