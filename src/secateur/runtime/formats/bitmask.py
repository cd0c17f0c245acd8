"""Bitmask: one bit for each element, and the values of the kept ones in row-major order."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import BoolTensor, Tensor

_CHUNK = 1 << 20  # elements at a time: the work stays in the cache. A multiple of 8, so that no byte of bits is shared.
_WORD = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_UNSIGNED_ZERO = {torch.float8_e4m3fnuz, torch.float8_e5m2fnuz}  # the bits of -0.0 are their NaN


def words(tensor: Tensor) -> np.ndarray:
    """The bit patterns of `tensor` as a flat integer array in row-major order: ``[numel]``.

    Shares memory with contiguous tensors on the CPU. Raises TypeError for elements of more than 8 bytes.
    """
    size = tensor.dtype.itemsize
    if size not in _WORD:
        raise TypeError(f"elements of {tensor.dtype} take {size} bytes; split them with torch.view_as_real first")
    flat = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous().reshape(-1)
    return flat.view(_WORD[size]).numpy()


def pack(dense: Tensor) -> tuple[Tensor, Tensor]:
    """``dense [any shape]`` -> ``(bits uint8 [ceil(n / 8)], values [kept])`` on the CPU, values in the dtype of `dense`.

    An element is kept unless all its bits are zero. So -0.0 is kept as a value, NaN payloads survive, and
    ``unpack(*pack(x), x.shape)`` gives the bits of `x` back for every dtype. Bit ``i % 8`` (least significant first) of
    byte ``i // 8`` belongs to element ``i``; the unused bits of the last byte are zero.

    >>> bits, values = pack(torch.tensor([0.0, 1.5, 0.0, -2.0]))
    >>> bits.tolist(), values.tolist()
    ([10], [1.5, -2.0])
    """
    flat = words(dense)
    bits = np.empty(-(-flat.size // 8), np.uint8)
    values = [flat[:0]]
    for start in range(0, flat.size, _CHUNK):
        piece = flat[start : start + _CHUNK]
        kept = piece != 0
        bits[start // 8 : (start + _CHUNK) // 8] = np.packbits(kept, bitorder="little")
        values.append(piece[kept])
    return torch.from_numpy(bits), torch.from_numpy(np.concatenate(values)).view(dense.dtype)


def unpack(bits: Tensor, values: Tensor, shape: Sequence[int]) -> Tensor:
    """The inverse of `pack`: a contiguous tensor of `shape` on the CPU.

    Raises ValueError where the bits do not fit the shape, or count other than as many values as there are.
    """
    count = math.prod(shape)
    _check_bits(bits, count)
    dense = torch.zeros(count, dtype=values.dtype)
    into, packed, kept_values = words(dense), bits.numpy(), words(values)
    used = 0
    for start in range(0, count, _CHUNK):
        piece = into[start : start + _CHUNK]
        kept = _unpacked(packed, start, piece.size)
        found = int(np.count_nonzero(kept))
        if used + found > kept_values.size:
            raise ValueError(f"the bitmask keeps more elements than the {kept_values.size} values stored")
        piece[kept] = kept_values[used : used + found]
        used += found
    if used != kept_values.size:
        raise ValueError(f"the bitmask keeps {used} elements, but {kept_values.size} values are stored")
    return dense.reshape(tuple(shape))


def pack_mask(mask: Tensor) -> Tensor:
    """``mask bool [any shape]`` -> ``bits uint8 [ceil(n / 8)]`` on the CPU, in the bit order of `pack`."""
    return torch.from_numpy(np.packbits(words(mask) != 0, bitorder="little"))


def unpack_mask(bits: Tensor, shape: Sequence[int]) -> BoolTensor:
    """The inverse of `pack_mask`. Raises ValueError where the bits do not fit the shape."""
    count = math.prod(shape)
    _check_bits(bits, count)
    return torch.from_numpy(_unpacked(bits.numpy(), 0, count)).reshape(tuple(shape))  # type: ignore[return-value]


def count_kept(dense: Tensor) -> int:
    """How many values `pack` would keep."""
    flat = words(dense)
    return sum(int(np.count_nonzero(flat[i : i + _CHUNK])) for i in range(0, flat.size, _CHUNK))


def count_negative_zeros(dense: Tensor) -> int:
    """How many elements are -0.0: zeros that `pack` keeps as values."""
    if not dense.is_floating_point() or dense.dtype in _UNSIGNED_ZERO:
        return 0
    flat = words(dense)
    sign = np.iinfo(flat.dtype).min if flat.dtype != np.uint8 else 0x80
    return sum(int(np.count_nonzero(flat[i : i + _CHUNK] == sign)) for i in range(0, flat.size, _CHUNK))


def nbytes(count: int, kept: int, itemsize: int) -> int:
    """Bytes of `kept` of `count` elements of `itemsize` bytes in this format."""
    return -(-count // 8) + kept * itemsize


def _unpacked(packed: np.ndarray, start: int, count: int) -> np.ndarray:
    return np.unpackbits(packed[start // 8 : -(-(start + count) // 8)], count=count, bitorder="little").view(np.bool_)


def _check_bits(bits: Tensor, count: int) -> None:
    expected = -(-count // 8)
    if bits.dtype != torch.uint8 or tuple(bits.shape) != (expected,):
        raise ValueError(f"{count} elements need a bitmask uint8 [{expected}], got {bits.dtype} {list(bits.shape)}")
    if count % 8 and int(bits[-1]) >> count % 8:
        raise ValueError("the unused bits at the end of the bitmask are not zero")
