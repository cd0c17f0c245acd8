"""What one tensor really is: its zeros, its patterns, its broken values. Only looks; computes in chunks."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from secateur.export.encode import encoded_sizes, plain
from secateur.runtime.formats import csr
from secateur.runtime.formats.bitmask import count_negative_zeros, words

#: N:M patterns looked for, densest last: the first that holds of each M is the truth, the later ones follow from it.
N_OF_M = ((1, 4), (2, 4), (1, 8), (2, 8), (4, 8), (4, 16), (8, 16))
#: Blocks looked for, as (outputs, inputs).
BLOCKS = ((4, 1), (1, 4))
_CHUNK = 1 << 20  # elements at a time


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a checkpoint. Rows are indices of the first dimension, columns of the second (inputs)."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    elements: int
    zeros: int  #: values that are 0, signed or not
    negative_zeros: int  #: those of them that are -0.0, which no sparse encoding of ours drops
    nan: int
    inf: int
    patterns: tuple[str, ...]  #: what holds: "2:4" and its like along the inputs, "4x1" and "1x4" blocks
    zero_rows: int  #: 0 for vectors
    zero_columns: int  #: 0 for vectors
    duplicate_rows: int  #: rows, not all zero, that equal an earlier row
    collapsed: Literal["zero", "constant"] | None  #: two or more values, all 0 or all the same
    bytes_dense: int
    bytes_bitmask: int
    bytes_csr: int

    @property
    def sparsity(self) -> float:
        """Fraction of zeros."""
        return self.zeros / self.elements if self.elements else 0.0

    def to_json(self) -> dict[str, Any]:
        """Plain dict, with `sparsity` among the fields."""
        return {**dataclasses.asdict(self), "sparsity": self.sparsity}


def look(name: str, tensor: Tensor) -> TensorInfo:
    """Everything that can be said of `tensor`.

    N:M is looked for as the field means it: groups of M consecutive inputs (dimension 1), at each kernel position. Blocks
    tile the matrix ``[out, in * kernel]``. Neither is claimed of a tensor without zeros, or of zeros only.
    """
    size = encoded_sizes(tensor)
    kept = torch.cat([_nonzero(piece) for piece in _pieces(tensor)]) if tensor.numel() else torch.empty(0, dtype=torch.bool)
    kept = kept.reshape(tensor.shape)
    zeros = kept.numel() - int(kept.count_nonzero())
    matrix = tensor.dim() >= 2 and tensor.numel() > 0
    nan, inf = _non_finite(tensor)
    return TensorInfo(
        name=name,
        shape=tuple(tensor.shape),
        dtype=str(tensor.dtype).removeprefix("torch."),
        elements=tensor.numel(),
        zeros=zeros,
        negative_zeros=count_negative_zeros(plain(tensor)),
        nan=nan,
        inf=inf,
        patterns=_patterns(kept) if matrix and 0 < zeros < kept.numel() else (),
        zero_rows=int((~kept.flatten(1).any(1)).sum()) if matrix else 0,
        zero_columns=int((~kept.transpose(0, 1).flatten(1).any(1)).sum()) if matrix else 0,
        duplicate_rows=_duplicate_rows(tensor, kept) if matrix else 0,
        collapsed=_collapsed(tensor, zeros),
        bytes_dense=size["dense"],
        bytes_bitmask=size["bitmask"],
        bytes_csr=size["csr"],
    )


def keeps_n_of_m(kept: Tensor, n: int, m: int) -> bool:
    """Whether of every `m` consecutive inputs at most `n` are kept. ``kept bool [out, in, *kernel]``."""
    if kept.shape[1] % m:
        return False
    groups = kept.unflatten(1, (kept.shape[1] // m, m))
    return int(groups.sum(2, dtype=torch.uint8).max()) <= n


def in_blocks(kept: Tensor, rows: int, cols: int) -> bool:
    """Whether each block of `rows` outputs by `cols` inputs is kept or removed whole. ``kept bool [out, in, *kernel]``."""
    matrix = kept.flatten(1)
    if matrix.shape[0] % rows or matrix.shape[1] % cols:
        return False
    blocks = matrix.unflatten(1, (-1, cols)).unflatten(0, (-1, rows))
    return bool((blocks.any(3).any(1) == blocks.all(3).all(1)).all())


def _patterns(kept: Tensor) -> tuple[str, ...]:
    found = [f"{n}:{m}" for n, m in N_OF_M if keeps_n_of_m(kept, n, m)]
    return (*found, *(f"{r}x{c}" for r, c in BLOCKS if in_blocks(kept, r, c)))


def _pieces(tensor: Tensor) -> list[Tensor]:
    return list(tensor.detach().contiguous().reshape(-1).split(_CHUNK))


def _comparable(piece: Tensor) -> Tensor:
    """Types with which torch can do little, as wider ones that lose none of their values."""
    if piece.dtype == torch.complex32:
        return piece.to(torch.complex64)
    if piece.is_floating_point() and piece.dtype.itemsize == 1:
        return piece.float()
    if piece.dtype in (torch.uint16, torch.uint32, torch.uint64):
        return torch.from_numpy(words(piece))
    return piece


def _nonzero(piece: Tensor) -> Tensor:
    return _comparable(piece) != 0


def _non_finite(tensor: Tensor) -> tuple[int, int]:
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return 0, 0
    pieces = [_comparable(piece) for piece in _pieces(tensor)]
    bad = sum(piece.numel() - int(torch.isfinite(piece).sum()) for piece in pieces)
    nan = sum(int(torch.isnan(piece).sum()) for piece in pieces) if bad else 0
    return nan, bad - nan


def _collapsed(tensor: Tensor, zeros: int) -> Literal["zero", "constant"] | None:
    if tensor.numel() < 2:
        return None
    if zeros == tensor.numel():
        return "zero"
    flat = words(plain(tensor)).reshape(tensor.numel(), -1)
    step = max(1, _CHUNK // flat.shape[1])
    same = all((flat[i : i + step] == flat[0]).all() for i in range(0, len(flat), step))
    return "constant" if same else None


def _duplicate_rows(tensor: Tensor, kept: Tensor) -> int:
    """By a 64-bit hash of each row: a sum of its words times random odd numbers, modulo 2^64."""
    alive = kept.flatten(1).any(1).numpy()
    flat = words(plain(tensor))
    rows, cols = csr.matrix_shape((tensor.shape[0], flat.size // tensor.shape[0]))
    matrix = flat.reshape(rows, cols)
    factors = np.random.default_rng(0).integers(0, 2**63, cols, np.uint64) * np.uint64(2) + np.uint64(1)
    step = max(1, _CHUNK // cols)
    hashes = [_mixed(matrix[i : i + step].astype(np.int64).view(np.uint64) * factors) for i in range(0, rows, step)]
    hashed = np.concatenate(hashes)[alive]
    return len(hashed) - len(np.unique(hashed))


def _mixed(products: np.ndarray) -> np.ndarray:
    return (products ^ (products >> np.uint64(29))).sum(axis=1, dtype=np.uint64)
