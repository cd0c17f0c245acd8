"""The README.md of an artifact directory: enough to load it, and to read it without Secateur."""

from __future__ import annotations

from collections.abc import Mapping

import secateur
from secateur.export.encode import Encoder
from secateur.export.state import State

_TEXT = """# A model saved by Secateur {version}

| tensors | values | not zero | bytes dense | {head}|
|---|---|---|---|{line}
| {tensors} | {values} | {nonzero} | {dense} |{stored}

Load it:

    import secateur as sc
    model = sc.load("this directory")               # where secateur.json records a source
    model = sc.load("this directory", model=fresh)  # into a model of your own

`secateur inspect DIRECTORY` says what is in it.

## Reading it without Secateur

{how}
`aliases` are further names of tied tensors. `files` has the size and SHA-256 of every file.
"""
_PACKED = """\
`model.packed` is entropy-coded: its format is described in docs/compression.md of Secateur. `secateur.json` lists each tensor
with its dtype and shape. `secateur export DIRECTORY --to safetensors` writes it out plain.

"""
_SAFETENSORS = """\
`model.safetensors` is an ordinary safetensors file. `secateur.json` lists each tensor with its dtype, shape and encoding:

- `dense`: stored under its own name. Complex numbers are pairs of real ones along a further last dimension.
- `bitmask`: `NAME::bits` has one bit for each element in row-major order (least significant bit of each byte first), set
  where the element is kept; `NAME::values` are the kept elements in the same order.
- `csr`: `NAME::indptr`, `NAME::indices`, `NAME::values` are the compressed sparse rows of the tensor seen as a matrix
  `[first dimension, all others]`.

"""


def readme(state: State, weights: Mapping[str, Encoder]) -> str:
    """The text, with the sizes of `state` as `weights` stores it."""
    tensors = [tensor for _, tensor in state.tensors.values()]
    packed = any(encoder.encoding == "packed" for encoder in weights.values())
    stored = sum(part.nbytes for encoder in weights.values() for part in encoder.parts())
    return _TEXT.format(
        version=secateur.__version__,
        tensors=len(tensors),
        values=sum(t.numel() for t in tensors),
        nonzero=sum(encoder.nonzeros for encoder in weights.values()),
        dense=sum(t.numel() * t.dtype.itemsize for t in tensors),
        head="" if packed else "bytes stored ",
        line="" if packed else "---|",
        stored="" if packed else f" {stored} |",
        how=_PACKED if packed else _SAFETENSORS,
    )
