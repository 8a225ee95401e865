"""The operations of packed layers. The reference is what every kernel must equal, bit for bit."""

from __future__ import annotations

from .reference import binary_linear, fold, pack_bits, packed_bytes, unpack_signs


__all__ = ["binary_linear", "fold", "pack_bits", "packed_bytes", "unpack_signs"]
