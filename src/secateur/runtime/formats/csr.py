"""Compressed sparse rows, for users who want SciPy or torch sparse matrices."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from secateur.errors import MissingExtra
from secateur.runtime.formats.bitmask import words

_CHUNK = 1 << 20  # elements at a time
_INT32 = 2**31 - 1


class Csr(NamedTuple):
    """A tensor seen as the matrix ``[out, rest]`` in compressed sparse rows; `shape` is the tensor's own."""

    indptr: Tensor  #: ``[out + 1]``: row r has the values ``indptr[r] : indptr[r + 1]``
    indices: Tensor  #: ``[kept]``: column of each value, ascending within a row
    values: Tensor  #: ``[kept]``
    shape: tuple[int, ...]


def matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
    """``[out, rest]`` of a tensor's shape; vectors are one column, scalars one element."""
    rows = shape[0] if shape else 1
    return rows, math.prod(shape[1:])


def index_dtypes(shape: Sequence[int], kept: int) -> tuple[torch.dtype, torch.dtype]:
    """The integer dtype of `indptr` and of `indices`. They are the same, as SciPy and torch ask: int32 where both fit."""
    _, cols = matrix_shape(shape)
    dtype = torch.int32 if max(kept, cols) <= _INT32 else torch.int64
    return dtype, dtype


def to_csr(dense: Tensor) -> Csr:
    """``dense [out, *rest]`` -> CSR on the CPU. Like `bitmask.pack` it drops only elements all whose bits are zero.

    >>> to_csr(torch.tensor([[0.0, 3.0], [0.0, 0.0]])).indptr.tolist()
    [0, 1, 1]
    """
    shape = tuple(dense.shape)
    rows, cols = matrix_shape(shape)
    matrix = words(dense).reshape(rows, cols)
    step = max(1, _CHUNK // max(cols, 1))
    counts = np.zeros(rows + 1, np.int64)
    indices, values = [np.empty(0, np.int64)], [matrix[:0].reshape(-1)]
    for start in range(0, rows, step):
        piece = matrix[start : start + step]
        kept = piece != 0
        counts[start + 1 : start + 1 + len(piece)] = np.count_nonzero(kept, axis=1)
        found = np.flatnonzero(kept)
        indices.append((found % cols).astype(np.int32 if cols <= _INT32 else np.int64))
        values.append(piece.reshape(-1)[found])
    indptr = np.cumsum(counts)
    pointers, columns = index_dtypes(shape, int(indptr[-1]))
    return Csr(
        torch.from_numpy(indptr).to(pointers),
        torch.from_numpy(np.concatenate(indices[1:] or indices)).to(columns),
        torch.from_numpy(np.concatenate(values)).view(dense.dtype),
        shape,
    )


def from_csr(csr: Csr) -> Tensor:
    """The inverse of `to_csr`: a contiguous tensor of ``csr.shape`` on the CPU, with the same bits.

    Raises ValueError where pointers or indices are out of range, unsorted or repeated.
    """
    check(csr)
    rows, cols = matrix_shape(csr.shape)
    dense = torch.zeros(rows * cols, dtype=csr.values.dtype)
    into, values, columns, indptr = words(dense), words(csr.values), csr.indices.numpy(), csr.indptr.numpy()
    step = max(1, _CHUNK // max(cols, 1))
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        kept = slice(int(indptr[start]), int(indptr[stop]))
        lengths = np.diff(indptr[start : stop + 1])
        into[np.repeat(np.arange(start, stop, dtype=np.int64) * cols, lengths) + columns[kept]] = values[kept]
    return dense.reshape(csr.shape)


def check(csr: Csr) -> None:
    """Raise ValueError where `csr` is not what `to_csr` makes."""
    rows, cols = matrix_shape(csr.shape)
    for what, tensor in (("indptr", csr.indptr), ("indices", csr.indices)):
        if tensor.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"CSR {what} must be int32 or int64, got {tensor.dtype}")
    if tuple(csr.indptr.shape) != (rows + 1,):
        raise ValueError(f"CSR indptr of {rows} rows must be [{rows + 1}], got {list(csr.indptr.shape)}")
    indptr, indices = csr.indptr.numpy(), csr.indices.numpy()
    if csr.indices.shape != csr.values.shape or csr.values.dim() != 1:
        raise ValueError(f"CSR has indices {list(csr.indices.shape)} and values {list(csr.values.shape)}: they must be as many")
    if indptr[0] != 0 or indptr[-1] != len(indices) or np.any(indptr[1:] < indptr[:-1]):
        raise ValueError(f"CSR indptr must rise from 0 to the {len(indices)} values stored")
    if len(indices) and (indices.min() < 0 or indices.max() >= cols):
        raise ValueError(f"CSR indices must be in [0, {cols}), got {indices.min()} to {indices.max()}")
    falls = np.flatnonzero(indices[1:] <= indices[:-1]) + 1
    starts = np.zeros(len(indices) + 1, np.bool_)
    starts[indptr] = True
    if not starts[falls].all():
        raise ValueError("CSR indices must ascend within each row, without repeats")


def to_scipy(csr: Csr) -> Any:
    """``scipy.sparse.csr_array [out, rest]``, sharing memory. Raises TypeError for half precision, which SciPy lacks.

    >>> to_scipy(to_csr(torch.eye(3))).nnz
    3
    """
    try:
        from scipy.sparse import csr_array
    except ImportError:
        raise MissingExtra("scipy", "sparse", "a SciPy sparse matrix") from None
    if csr.values.is_floating_point() and csr.values.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"SciPy has no sparse matrices of {csr.values.dtype}; convert the dense tensor with .float() first")
    parts = (csr.values.numpy(), csr.indices.numpy(), csr.indptr.numpy())
    return csr_array(parts, shape=matrix_shape(csr.shape))


def to_torch(csr: Csr) -> Tensor:
    """``torch.sparse_csr`` tensor ``[out, rest]``, sharing memory."""
    return torch.sparse_csr_tensor(csr.indptr, csr.indices, csr.values, size=matrix_shape(csr.shape), check_invariants=True)


def nbytes(shape: Sequence[int], kept: int, itemsize: int) -> int:
    """Bytes of `kept` elements of `itemsize` bytes in this format, indices included."""
    pointers, columns = index_dtypes(shape, kept)
    return (matrix_shape(shape)[0] + 1) * pointers.itemsize + kept * (columns.itemsize + itemsize)
