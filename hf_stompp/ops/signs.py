"""Packing the signs of a tensor: `pack_sign`."""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from . import cuda
from .bits import at_least, empty_bits, pack_bools
from .cpu import NativeKernels, check_status
from .native import DTYPES
from .operators import check_rows, check_vector, declare


Packing = tuple[Tensor, Tensor]


SCHEMA = "pack_sign(Tensor input, Tensor? threshold=None) -> (Tensor bits, Tensor popcounts)"


def empty_packing(input: Tensor) -> Packing:
    return empty_bits(input, input.shape[-1]), input.new_empty(input.shape[:-1], dtype=torch.int32)


def _meta(input: Tensor, threshold: Tensor | None = None) -> Packing:
    check_rows("pack_sign", input)
    check_vector("pack_sign", "threshold", threshold, input.shape[-1], input.device)
    return empty_packing(input)


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
    above = at_least(input, threshold)
    return pack_bools(above), above.sum(dim=-1, dtype=torch.int32)


_CPU_RECORD = struct.Struct("9q")  # struct hf_stompp_packing


def _on_cpu(kernels: NativeKernels, result: Packing, input: Tensor, threshold: Tensor | None = None) -> Packing:
    # Written out: with one row, most of the time is the call. Names, so that a copy made here lives until it returns.
    input, threshold = input.contiguous(), None if threshold is None else threshold.contiguous()
    bits, popcounts = result
    record = _CPU_RECORD.pack(
        kernels.number,
        torch.get_num_threads(),
        input.data_ptr(),
        DTYPES[input.dtype],
        0 if threshold is None else threshold.data_ptr(),
        popcounts.numel(),
        input.shape[-1],
        bits.data_ptr(),
        popcounts.data_ptr(),
    )
    check_status(kernels.native.hf_stompp_pack_sign(record))
    return result


_CUDA_RECORD = struct.Struct("9q")  # struct hf_stompp_cuda_packing


def on_cuda(on: cuda.Device, result: Packing, input: Tensor, threshold: Tensor | None = None) -> Packing:
    def launch(native: cuda.NativeKernels) -> Packing:
        record = input, input.dtype, threshold, result[1].numel(), input.shape[-1], *result
        native.call(native.native.hf_stompp_cuda_pack_sign, _CUDA_RECORD, input.device, *record)
        return result

    return on.attempt(launch, lambda: pack_sign(input, threshold))


declare(SCHEMA, _meta, pack_sign, cpu=_on_cpu, cuda=on_cuda)
