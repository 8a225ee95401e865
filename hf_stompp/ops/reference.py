"""The bit format and the binary product in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F


ROW_ALIGNMENT = 256
"""Rows are padded to this many bits, so that a kernel may read whole vectors."""


SURROGATES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "none": lambda mask, inside: inside & ~mask,
    "ste": lambda mask, inside: inside | mask,
    "clipped_ste": lambda mask, inside: inside,
}
"""
Gradient rules by name, each a function `(mask, inside) -> passes` of booleans that broadcast against each other.
`inside` tells which entries lie within their range: a free entry's is the clip range, a frozen one's the *window*.
`passes` tells which entries the gradient passes through (with slope 1; it is 0 elsewhere).

- `none`: STE-free; a frozen entry passes exactly 0 (the paper).
- `ste`: StoMPP+STE; a frozen entry passes the gradient unchanged (the paper's identity surrogate).
- `clipped_ste`: a frozen entry passes the gradient unchanged within the window, and none outside (BinaryNet, arXiv
  1602.02830, eq. 4; that the window may be narrower than the clip range is ours).
"""


def packed_bytes(in_features: int) -> int:
    """
    Bytes of one packed row.

    Args:
        in_features (`int`): number of bits.

    Returns:
        `int`: a multiple of 32, because rows are padded with zeros to a multiple of 256 bits.
    """
    return -(-in_features // ROW_ALIGNMENT) * (ROW_ALIGNMENT // 8)


def plus_minus_one(above: Tensor, dtype: torch.dtype) -> Tensor:
    """
    Signs as numbers.

    Args:
        above (`Tensor`): bool, of any shape.
        dtype (`torch.dtype`): of the result.

    Returns:
        `Tensor` of the shape of `above`: +1 where it is true, -1 elsewhere.
    """
    # torch.where takes about ten times as long on a CPU.
    return above.to(dtype).mul_(2).sub_(1)


def _above(input: Tensor, threshold: Tensor | None) -> Tensor:
    return input >= 0 if threshold is None else input >= threshold


def pack_bools(bits: Tensor) -> Tensor:
    """
    Packs booleans, eight to a byte, least significant bit first.

    Args:
        bits (`Tensor` of shape `(..., features)`): bool.

    Returns:
        `Tensor` of shape `(..., packed_bytes(features))`: uint8, zero beyond `features`.
    """
    features = bits.shape[-1]
    padded = F.pad(bits.to(torch.uint8), (0, 8 * packed_bytes(features) - features)).unflatten(-1, (-1, 8))
    shifts = torch.arange(8, dtype=torch.uint8, device=bits.device)
    return (padded << shifts).sum(dim=-1, dtype=torch.uint8)


def pack_bits(weight: Tensor) -> Tensor:
    """
    Packs the signs of a weight; a bit is `w >= 0`.

    Args:
        weight (`Tensor` of shape `(rows, in_features)`): any real dtype.

    Returns:
        `Tensor` of shape `(rows, packed_bytes(in_features))`: uint8, zero beyond `in_features`.
    """
    return pack_bools(weight >= 0)


def pack_sign(input: Tensor, threshold: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """
    Packs the signs of a tensor relative to a threshold.

    Args:
        input (`Tensor` of shape `(..., features)`): any real dtype. NaN gives a clear bit.
        threshold (`Tensor` of shape `(features,)`, *optional*): 0 when not given.

    Returns:
        `tuple(Tensor, Tensor)`: bits, uint8 of shape `(..., packed_bytes(features))`, and the number of set bits of
            each row, int32 of shape `(...)`.
    """
    above = _above(input, threshold)
    return pack_bools(above), above.sum(dim=-1, dtype=torch.int32)


def _unpack(packed: Tensor, features: int) -> Tensor:
    """The bits of packed rows as uint8 of 0 and 1, of shape `(..., features)`."""
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return ((packed.unsqueeze(-1) >> shifts) & 1).flatten(-2)[..., :features]


def unpack_signs(packed: Tensor, in_features: int) -> Tensor:
    """
    The signs in a packed weight.

    Args:
        packed (`Tensor` of shape `(..., packed_bytes(in_features))`): uint8.
        in_features (`int`): number of weights in a row.

    Returns:
        `Tensor` of shape `(..., in_features)`: float32, +1 where the bit is set and -1 elsewhere.
    """
    return _unpack(packed, in_features).float() * 2 - 1


def sign_product(packed_weight: Tensor, in_features: int, vector: Tensor, transposed: bool) -> Tensor:
    """
    Product of a packed weight with one vector, `signs @ vector`, or `vector @ signs`.

    Args:
        packed_weight (`Tensor` of shape `(out_features, packed_bytes(in_features))`): uint8.
        in_features (`int`).
        vector (`Tensor` of shape `(in_features,)`, or `(out_features,)` if transposed): float64.
        transposed (`bool`).

    Returns:
        `Tensor` of shape `(out_features,)`, or `(in_features,)` if transposed: float64, summed in whatever order.
    """
    signs = unpack_signs(packed_weight, in_features).double()
    return vector @ signs if transposed else signs @ vector


def fold(
    packed_weight: Tensor,
    row_scale: Tensor,
    offset: Tensor,
    amplitude: Tensor,
    bias: Tensor | None,
    in_features: int,
    product: Callable[[Tensor, int, Tensor, bool], Tensor] = sign_product,
) -> tuple[Tensor, Tensor]:
    """
    Scale and bias of the integer product that equals a linear layer on two-level inputs and two-level weights.

    With inputs `offset + amplitude * s` (`s` = +-1), `sum_k row_scale * v_k * (offset_k + amplitude * s_k) + bias` is
    `(row_scale * amplitude) * sum_k v_k s_k + (bias + row_scale * sum_k v_k offset_k)`. Sums are in float64 and
    rounded once. As an operator differentiable in offset, amplitude and bias.

    Args:
        packed_weight (`Tensor` of shape `(out_features, packed_bytes(in_features))`): uint8, the bits of `v`.
        row_scale (`Tensor` of shape `(out_features, 1)`): floating.
        offset (`Tensor` of shape `(in_features,)` or `()`): floating.
        amplitude (`Tensor` of shape `()`): floating.
        bias (`Tensor` of shape `(out_features,)`, *optional*): floating.
        in_features (`int`).
        product (`Callable`, *optional*): [`sign_product`], or a kernel for it. No argument of the operator.

    Returns:
        `tuple(Tensor, Tensor)`: scale and bias, both float32 of shape `(out_features,)`.
    """
    row_scale = row_scale.double().flatten()
    offset = offset.double().expand(in_features).contiguous()
    constant = row_scale * product(packed_weight, in_features, offset, False)
    if bias is not None:
        constant = constant + bias.double()
    return (row_scale * amplitude.double()).float(), constant.float()


def scale_sums(
    sums: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype, row_scale: Tensor | None = None
) -> Tensor:
    """
    `sums * row_scale * scale + bias`, each operation rounded to float32 by itself, then to `dtype`.

    Args:
        sums (`Tensor` of shape `(..., out_features)`): float32, integers.
        scale (`Tensor` of shape `(out_features,)`): float32.
        bias (`Tensor` of shape `(out_features,)`, *optional*): float32.
        dtype (`torch.dtype`): of the result.
        row_scale (`Tensor` of shape `(..., 1)`, *optional*): float32; 1 when not given.

    Returns:
        `Tensor` of shape `(..., out_features)`: of `dtype`.
    """
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


def binary_linear(
    input: Tensor,
    threshold: Tensor | None,
    packed_weight: Tensor,
    in_features: int,
    scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """
    A linear layer on the signs of its input, with a packed weight: [`integer_linear`] of packed signs.

    Args:
        input (`Tensor` of shape `(..., in_features)` or `(..., packed_bytes(in_features))`): floats to be signed, or
            uint8 bits from [`pack_sign`].
        threshold (`Tensor` of shape `(in_features,)`, *optional*): float32, of the signs; 0 when not given, and none
            for bits.
        packed_weight (`Tensor` of shape `(out_features, packed_bytes(in_features))`): uint8. Bits beyond `in_features`
            must be zero, here and in the input: kernels count them.
        in_features (`int`): at least 1.
        scale (`Tensor` of shape `(out_features,)`): float32.
        bias (`Tensor` of shape `(out_features,)`, *optional*): float32.
        dtype (`torch.dtype`): of the result: float32, bfloat16 or float16.

    Returns:
        `Tensor` of shape `(..., out_features)`: of `dtype`.
    """
    if input.dtype == torch.uint8:
        signs = unpack_signs(input, in_features)
    else:
        signs = plus_minus_one(_above(input, threshold), torch.float32)
    return integer_linear(signs, unpack_signs(packed_weight, in_features), scale, bias, dtype)


def binary_linear_sign(
    input: Tensor,
    threshold: Tensor | None,
    packed_weight: Tensor,
    in_features: int,
    scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    output_threshold: Tensor | None,
) -> Tensor:
    """
    [`binary_linear`], of whose result only the packed signs are kept.

    Args:
        output_threshold (`Tensor` of shape `(out_features,)`, *optional*): float32; 0 when not given.
        input, threshold, packed_weight, in_features, scale, bias, dtype: as in [`binary_linear`]. The result is
            rounded to `dtype` before it is compared.

    Returns:
        `Tensor` of shape `(..., packed_bytes(out_features))`: uint8.
    """
    output = binary_linear(input, threshold, packed_weight, in_features, scale, bias, dtype)
    return pack_bools(_above(output, output_threshold))


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


def byte_linear(
    input: Tensor,
    packed_weight: Tensor,
    in_features: int,
    scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """
    A linear layer with a packed weight on floats that are rounded to 8 bits, see [`quantize_rows`]. The sums are exact
    integers.

    Args:
        input (`Tensor` of shape `(..., in_features)`): float32, bfloat16 or float16.
        packed_weight (`Tensor` of shape `(out_features, packed_bytes(in_features))`): uint8.
        in_features (`int`): at least 1, and so few that no sum exceeds int32.
        scale (`Tensor` of shape `(out_features,)`): float32.
        bias (`Tensor` of shape `(out_features,)`, *optional*): float32.
        dtype (`torch.dtype`): of the result: float32, bfloat16 or float16.

    Returns:
        `Tensor` of shape `(..., out_features)`: rounded to float32 after the sum, the product with the scale of the
            row, the product with `scale` and the sum with the bias, then to `dtype`.
    """
    codes, code_scale = quantize_rows(input)
    # What holds every sum.
    work = torch.float32 if 127 * in_features < 2**24 else torch.float64
    with torch.autocast(input.device.type, enabled=False):
        sums = F.linear(codes.to(work), unpack_signs(packed_weight, in_features).to(work))
        # An integer has no -0.0.
        return scale_sums(sums.to(torch.int32).float(), scale, bias, dtype, code_scale)


@torch.no_grad()
def layer_norm_sign(
    input: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    epsilon: float,
    threshold: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """
    LayerNorm over the last dimension of a sum, and the packed signs of what it puts out. Has no gradient.

    Args:
        input (`Tensor` of shape `(..., features)`): float32, bfloat16 or float16.
        residual (`Tensor`, *optional*): is added to the input, of its shape and dtype. The sum is rounded to that
            dtype, as `+` does.
        weight, bias (`Tensor` of shape `(features,)`): both float32, or both of the dtype of the input.
        epsilon (`float`): is added to the variance.
        threshold (`Tensor` of shape `(features,)`, *optional*): float32, of the signs; 0 when not given.

    Returns:
        `tuple(Tensor, Tensor)`: what [`~torch.nn.functional.layer_norm`] returns, in the dtype of the input: computed
            in float32 and rounded once where weight and bias are wider; and its bits from [`pack_sign`].
    """
    output = residual_layer_norm(input, residual, weight, bias, epsilon)
    return output, pack_sign(output, threshold)[0]


def residual_layer_norm(
    input: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, epsilon: float
) -> Tensor:
    """The first of what [`layer_norm_sign`] returns."""
    total = input if residual is None else input + residual
    # Mixed dtypes are not taken by layer_norm on every device. Half precision alone is, and on a CPU sums in another
    # order than float32 does: what a model computes is what it gives then.
    wide = total.to(weight.dtype)
    # Autocast would put out float32.
    with torch.autocast(input.device.type, enabled=False):
        return F.layer_norm(wide, weight.shape, weight, bias, epsilon).to(input.dtype)


def _clip(x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """`x` where it is not beyond a bound; one that is NaN bounds nothing."""
    return torch.where(x > high, high, torch.where(x < low, low, x))


def masked_weight(weight: Tensor, mask: Tensor, scale: Tensor, clip: float, dtype: torch.dtype) -> Tensor:
    """
    Masked binarization of a weight: `M * scale * sign(w) + (1 - M) * clip(w, -clip * scale, clip * scale)`.

    Args:
        weight (`Tensor` of shape `(..., in_features)`): latent weight.
        mask (`Tensor`, bool, of the same shape): the freeze mask `M`.
        scale (`Tensor` of shape `(..., 1)`): floating.
        clip (`float`): clip range as a multiple of the scale.
        dtype (`torch.dtype`): of the result.

    Returns:
        `Tensor` of shape `(..., in_features)`: computed in float32 or wider, rounded once to `dtype`.
    """
    work = torch.promote_types(weight.dtype, torch.float32)
    weight, scale = weight.to(work), scale.to(work)
    bound = clip * scale
    hard = torch.where(weight >= 0, scale, -scale)
    return torch.where(mask, hard, _clip(weight, -bound, bound)).to(dtype).contiguous()


def masked_weight_grad(
    grad: Tensor, weight: Tensor, mask: Tensor, scale: Tensor, clip: float, surrogate: str, window: float
) -> Tensor:
    """
    Gradient of [`masked_weight`] with respect to the weight: `grad` where it passes, 0 elsewhere.

    Args:
        grad (`Tensor` of shape `(..., in_features)`): any floating dtype.
        weight, mask, scale, clip: as in [`masked_weight`].
        surrogate (`str`): a key of [`SURROGATES`], the gradient of the frozen entries.
        window (`float`): range of a frozen weight as a multiple of the scale.

    Returns:
        `Tensor` of shape `(..., in_features)`: dtype of `weight`.
    """
    work = torch.promote_types(weight.dtype, torch.float32)
    bound = torch.where(mask, window * scale.to(work), clip * scale.to(work))
    passes = SURROGATES[surrogate](mask, weight.to(work).abs() <= bound)
    return torch.where(passes, grad, 0).to(weight.dtype).contiguous()


def masked_activation(
    value: Tensor,
    pre_activation: Tensor,
    mask: Tensor,
    threshold: Tensor,
    offset: Tensor,
    amplitude: Tensor,
    center: Tensor,
    bound: Tensor,
    surrogate: str,
    window: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """
    Masked binarization of an activation: `offset +- amplitude` where `M` is set, `+` where `pre_activation >=
    threshold`; elsewhere `value` clipped to `center +- bound`.

    Args:
        value (`Tensor` of shape `(..., features)`).
        pre_activation (`Tensor` of shape `(..., features)`): of the dtype of `value`.
        mask (`Tensor` of shape `(features,)`, bool): the freeze mask `M`.
        threshold, offset, center (`Tensor` of shape `(features,)` or `()`): floating.
        amplitude, bound (`Tensor` of shape `()`): floating.
        surrogate (`str`): a key of [`SURROGATES`].
        window (`Tensor` of shape `()`): floating, range of a frozen entry on either side of the centre.

    Returns:
        `tuple(Tensor, Tensor, Tensor)`: the result in the dtype of `value`, computed in float32 or wider and rounded
            once; and two packed bits an element, uint8 of shape `(..., packed_bytes(features))`, all that the gradient
            needs: whether it passes to `value`, and whether the element is on the upper side (of the threshold where
            it is frozen, of the centre where not).
    """
    work = torch.promote_types(value.dtype, torch.float32)
    dtype = value.dtype
    value, threshold, offset, amplitude, center, bound, window = (
        t.to(work) for t in (value, threshold, offset, amplitude, center, bound, window)
    )
    low, high = center - bound, center + bound
    above = pre_activation.to(work) >= threshold
    hard = torch.where(above, offset + amplitude, offset - amplitude)
    output = torch.where(mask, hard, _clip(value, low, high)).to(dtype).contiguous()
    reach = torch.where(mask, window, bound)
    passes = SURROGATES[surrogate](mask, (value >= center - reach) & (value <= center + reach))
    return output, pack_bools(passes), pack_bools(torch.where(mask, above, value > center))


def masked_activation_grad(grad: Tensor, passes: Tensor, upper: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """
    Gradient of [`masked_activation`]: what passes to `value`, and what is needed of the rest.

    Args:
        grad (`Tensor` of shape `(..., features)`).
        passes, upper (`Tensor` of shape `(..., packed_bytes(features))`): uint8, from [`masked_activation`].
        mask (`Tensor` of shape `(features,)`, bool).

    Returns:
        `tuple(Tensor, Tensor)`: the gradient of `value`, and sums over all leading dimensions, float64 of shape `(3,
            features)`, of what passes; of what is held back or is of a frozen feature; and of the upper elements of
            the latter.
    """
    features = grad.shape[-1]
    is_passed, is_upper = _unpack(passes, features).bool(), _unpack(upper, features).bool()
    passed = torch.where(is_passed, grad, 0).contiguous()
    held = torch.where(mask | ~is_passed, grad, 0)
    rows = [t.reshape(-1, features) for t in (passed, held, torch.where(is_upper, held, 0))]
    return passed, torch.stack([t.sum(dim=0, dtype=torch.float64) for t in rows])
