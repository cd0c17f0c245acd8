"""Where the kept weights are: by gaps, as in the paper, or cell by cell with an adaptive model, near or below the entropy.

`gaps` is relative indexing: the distance from one kept weight to the next in row-major order, where a distance of 256 or
more is broken by padding symbols (Han et al. 2016, figure 2; a padding symbol here stands for 255 removed weights and for
no weight, so that nothing false is stored). The distances then go through a `streams` code.

`context` codes one bit for each cell of the rows and columns that hold anything, with probabilities learnt on the way from
how full the cell's row and column were so far and from its two neighbours. Where rows and columns differ, it needs fewer
bits than log2 of the number of masks with as many ones, the bound of every code that knows the count alone.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np

from secateur.coding import streams
from secateur.coding.bits import ByteReader, ByteWriter, DecodeError
from secateur.coding.context import decode_mask, encode_mask
from secateur.coding.streams import Entropy

PADDING = 255  #: the symbol that stands for so many removed weights and no kept one
CONTEXT_CELLS = 1 << 22  #: matrices of more cells are coded by gaps: the model is not parallel
_WORTH = 0.98  # of the other code's size, above which the slower model is not taken
#: "auto" takes the smaller; "gaps" is the paper's.
Positions = Literal["auto", "gaps", "context"]
POSITIONS: tuple[Positions, ...] = ("auto", "gaps", "context")
_GAPS, _CONTEXT = range(2)


def bound_bits(cells: int, kept: int) -> float:
    """log2 of the number of masks of `cells` cells that keep `kept`: what positions cost where all are equally likely."""
    return (math.lgamma(cells + 1) - math.lgamma(kept + 1) - math.lgamma(cells - kept + 1)) / math.log(2)


def row_bound_bits(mask: np.ndarray) -> float:
    """The same summed over the rows of ``mask bool [rows, cols]``, each knowing how many it keeps."""
    return sum(bound_bits(mask.shape[1], int(kept)) for kept in np.count_nonzero(mask, axis=1))


def encode(mask: np.ndarray, entropy: Entropy = "rans", positions: Positions = "auto") -> bytes:
    """``mask bool [rows, cols]`` -> bytes that `decode` reads, given the shape."""
    made = [] if positions == "context" else [_gaps(mask, entropy)]
    if positions == "context" or (positions == "auto" and 0 < mask.size <= CONTEXT_CELLS):
        made.append(_context(mask))
    return made[-1] if len(made[-1]) < _WORTH * len(made[0]) else made[0]


def decode(reader: ByteReader, shape: tuple[int, int]) -> np.ndarray:
    """The flat positions of the kept cells, ascending, ``int64 [kept]``. Raises DecodeError where the bytes do not fit."""
    cells = shape[0] * shape[1]
    if reader.varint(2) == _CONTEXT:
        if not 0 < cells <= CONTEXT_CELLS:
            raise DecodeError(f"positions of {cells} cells cannot have been coded cell by cell")
        density = reader.varint(1 << 16)
        return np.flatnonzero(decode_mask(reader.sized(), shape, density))
    symbols = streams.decode(reader, reader.varint(cells + 1))
    if symbols.size and symbols.max() > PADDING:
        raise DecodeError("a distance between kept weights is larger than a padding")
    steps = symbols.astype(np.int64)
    steps += symbols != PADDING  # a padding moves by 255 and keeps nothing; a gap of g moves by g + 1
    at = np.cumsum(steps)
    if at.size and at[-1] > cells:
        raise DecodeError("kept weights lie beyond the end of their layer")
    return at[symbols != PADDING] - 1


def _gaps(mask: np.ndarray, entropy: Entropy) -> bytes:
    where = np.flatnonzero(mask)
    gaps = np.diff(where, prepend=-1) - 1
    paddings = gaps // PADDING
    symbols = np.full(len(gaps) + int(paddings.sum()), PADDING, np.uint16)
    symbols[np.cumsum(paddings + 1) - 1] = gaps % PADDING
    writer = ByteWriter()
    writer.varint(_GAPS)
    writer.varint(len(symbols))
    writer.raw(streams.encode(symbols, entropy))
    return writer.getvalue()


def _context(mask: np.ndarray) -> bytes:
    alive = max(1, int(mask.any(0).sum()) * int(mask.any(1).sum()))
    density = min(65535, max(1, round(65536 * int(np.count_nonzero(mask)) / alive)))
    writer = ByteWriter()
    writer.varint(_CONTEXT)
    writer.varint(density)
    writer.sized(encode_mask(mask, density))
    return writer.getvalue()
