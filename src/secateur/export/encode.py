"""One tensor to the parts that are stored, and back, bit by bit."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from secateur.coding.packed import PackedFile
from secateur.errors import ArtifactError
from secateur.export.container import Container, Part
from secateur.export.manifest import TORCH_DTYPES, Encoding, Kind, TensorEntry
from secateur.runtime.formats import bitmask, csr

#: "auto" competes bitmask with dense; "csr" competes CSR with dense; "dense" leaves all dense; "packed" codes all.
Format = Literal["auto", "dense", "bitmask", "csr", "packed"]
FORMATS: tuple[Format, ...] = ("auto", "dense", "bitmask", "csr", "packed")
_SPLIT = {torch.complex32: torch.float16, torch.complex64: torch.float32, torch.complex128: torch.float64}
_PARTS: dict[Encoding, tuple[str, ...]] = {
    "dense": ("",),
    "bitmask": ("::bits", "::values"),
    "csr": ("::indptr", "::indices", "::values"),
    "packed": ("",),
}


class Encoder:
    """How one tensor will be stored: sizes now, bytes when they are written. The tensor is not copied before that."""

    def __init__(self, name: str, kind: Kind, tensor: Tensor, format: Format):
        self.name, self.kind, self.tensor = name, kind, tensor
        self._kept = bitmask.count_kept(plain(tensor))
        self.encoding: Encoding = self._choose(format)
        self.negative_zeros = bitmask.count_negative_zeros(plain(tensor))
        self._made: dict[str, Tensor] = {}

    @property
    def nonzeros(self) -> int:
        """Values that are not zero; a complex one counts as two."""
        return self._kept - self.negative_zeros

    @property
    def entry(self) -> TensorEntry:
        """The tensor's line in secateur.json."""
        dtype = str(self.tensor.dtype).removeprefix("torch.")
        return TensorEntry(kind=self.kind, encoding=self.encoding, dtype=dtype, shape=list(self.tensor.shape))

    def parts(self) -> list[Part]:
        """What is to be written for it."""
        shapes = part_shapes(self.entry, self._kept)
        return [Part(self.name + suffix, dtype, shape, self._maker(suffix)) for suffix, (dtype, shape) in shapes.items()]

    def _choose(self, format: Format) -> Encoding:
        other: Encoding = "bitmask" if format in ("auto", "bitmask") else "csr"
        if format in ("dense", "packed"):
            return format
        dtype, shape = plain_type(self.tensor.dtype, self.tensor.shape)
        size = _encoded_bytes(other, shape, self._kept, dtype.itemsize)
        return other if size < math.prod(shape) * dtype.itemsize else "dense"

    def _maker(self, suffix: str) -> Callable[[], Tensor]:
        """Encode when the first part is asked for, and let go of each part as it is taken."""

        def make() -> Tensor:
            if suffix not in self._made:
                self._made = dict(zip(_PARTS[self.encoding], self._encode(), strict=True))
            return self._made.pop(suffix)

        return make

    def _encode(self) -> tuple[Tensor, ...]:
        tensor = plain(self.tensor)
        if self.encoding == "bitmask":
            return bitmask.pack(tensor)
        if self.encoding == "csr":
            return tuple(csr.to_csr(tensor)[:3])
        return (tensor.cpu().contiguous(),)


def encoded_sizes(tensor: Tensor) -> dict[Encoding, int]:
    """Bytes of `tensor` in each encoding."""
    flat = plain(tensor)
    kept, size = bitmask.count_kept(flat), flat.dtype.itemsize
    return {encoding: _encoded_bytes(encoding, tuple(flat.shape), kept, size) for encoding in ("dense", "bitmask", "csr")}


def part_keys(name: str, entry: TensorEntry) -> list[str]:
    """The keys under which a tensor's parts are stored."""
    return [name + suffix for suffix in _PARTS[entry.encoding]]


def part_shapes(entry: TensorEntry, kept: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Dtype and shape of each part, by suffix, of a tensor of which `kept` values are stored."""
    dtype, shape = plain_type(TORCH_DTYPES[entry.dtype], entry.shape)
    if entry.encoding in ("dense", "packed"):
        return {"": (dtype, shape)}
    if entry.encoding == "bitmask":
        return {"::bits": (torch.uint8, (-(-math.prod(shape) // 8),)), "::values": (dtype, (kept,))}
    pointers, columns = csr.index_dtypes(shape, kept)
    rows, _ = csr.matrix_shape(shape)
    return {"::indptr": (pointers, (rows + 1,)), "::indices": (columns, (kept,)), "::values": (dtype, (kept,))}


def decode(name: str, entry: TensorEntry, container: Container | PackedFile) -> Tensor:
    """The tensor that `Encoder` stored, on the CPU. Raises ArtifactError where the parts do not fit the entry."""
    check_parts(name, entry, container)
    dtype, shape = plain_type(TORCH_DTYPES[entry.dtype], entry.shape)
    needed, memory = math.prod(shape) * dtype.itemsize, _memory()
    if needed > memory:
        raise ArtifactError(f"the tensor {name!r} {entry.shape} would take {needed} bytes; this machine has {memory} of memory")
    parts = [container.read(key) for key in part_keys(name, entry)]
    try:
        if entry.encoding == "bitmask":
            tensor = bitmask.unpack(parts[0], parts[1], shape)
        elif entry.encoding == "csr":
            tensor = csr.from_csr(csr.Csr(parts[0], parts[1], parts[2], shape))
        else:
            tensor = parts[0]
    except ValueError as error:
        raise ArtifactError(f"{container.name}: the tensor {name!r} is broken: {error}") from None
    return torch.view_as_complex(tensor) if TORCH_DTYPES[entry.dtype] in _SPLIT else tensor


def check_parts(name: str, entry: TensorEntry, container: Container | PackedFile) -> None:
    """Raise ArtifactError where the header of the weights file contradicts the tensor's entry. Reads no values."""
    found = {}
    for key, suffix in zip(part_keys(name, entry), _PARTS[entry.encoding], strict=True):
        if key not in container.entries:
            raise ArtifactError(f"{container.name} lacks {key!r}, which the tensor {name!r} ({entry.encoding}) needs")
        found[suffix] = (container.entries[key].dtype, container.entries[key].shape)
    kept = math.prod(found["::values"][1]) if "::values" in found else 0
    expected = part_shapes(entry, kept)
    for suffix, want in expected.items():
        if found[suffix] != want:
            raise ArtifactError(
                f"{container.name}: {name + suffix!r} is {found[suffix][0]} {list(found[suffix][1])}; the tensor "
                f"{entry.dtype} {entry.shape} as {entry.encoding} needs {want[0]} {list(want[1])}"
            )


def plain(tensor: Tensor) -> Tensor:
    """`tensor` as numbers that a file can hold: complex ones as pairs along a new last dimension. No copy where possible."""
    tensor = tensor.detach()
    if tensor.is_complex():
        return torch.view_as_real(tensor.resolve_conj().resolve_neg())
    return tensor.resolve_neg()


def plain_type(dtype: torch.dtype, shape: torch.Size | list[int]) -> tuple[torch.dtype, tuple[int, ...]]:
    """Dtype and shape that `plain` gives."""
    return (_SPLIT[dtype], (*shape, 2)) if dtype in _SPLIT else (dtype, tuple(shape))


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have the same dtype, shape and bits, NaN and signed zeros included."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return bool((bitmask.words(plain(one)) == bitmask.words(plain(other))).all())


def _encoded_bytes(encoding: Encoding, shape: tuple[int, ...], kept: int, itemsize: int) -> int:
    if encoding == "bitmask":
        return bitmask.nbytes(math.prod(shape), kept, itemsize)
    if encoding == "csr":
        return csr.nbytes(shape, kept, itemsize)
    return math.prod(shape) * itemsize


def _memory() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
