"""Mask pictures as small PNG images in data addresses: transparent where weights are gone, leaf green where they are kept."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence

import numpy as np

_LEAF = (63, 150, 94)  #: reads on a white and on a near-black page alike


def mask_image(cells: Sequence[Sequence[float]]) -> tuple[str, float]:
    """``data:image/png`` of the cells' densities, one pixel a cell, and the density that is drawn in full colour.

    Masks of single elements (densities 0 and 1 only) are drawn as they are; heat maps of local density are scaled to their
    densest cell, which the caption must state.
    """
    from matplotlib.image import imsave

    density = np.nan_to_num(np.asarray([list(row) for row in cells], dtype=np.float64), nan=0.0).clip(0, 1)
    top = float(density.max()) or 1.0
    pixels = np.empty((*density.shape, 4), dtype=np.uint8)
    pixels[..., :3] = _LEAF
    pixels[..., 3] = np.round(255 * density / top)
    buffer = io.BytesIO()
    imsave(buffer, pixels, format="png", metadata={"Software": None})  # type: ignore[dict-item]
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii"), top


def of_elements(cells: Sequence[Sequence[float]]) -> bool:
    """Whether every cell is one element of the mask, kept or not."""
    return all(value in (0, 1) for row in cells for value in row)
