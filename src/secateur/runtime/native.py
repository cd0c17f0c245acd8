"""The compiled kernels, called with tensors: the only file that hands out addresses, and where shapes are checked for them.

The extension `secateur._native` is optional: `missing` says why it is absent. Packed weights are flat uint8 tensors.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from secateur.errors import LayerError, SecateurError

_REASON: str | None = None
_extension: ModuleType | None = None
try:
    _extension = importlib.import_module("secateur._native")
except ImportError as error:
    _REASON = f"the compiled kernels are not installed ({error}). Reinstall secateur where a C++20 compiler is at hand."

ACTIVATIONS = ("none", "relu", "gelu", "silu", "relu6")
VALUE_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}
BLOCKS = ((1, 1), (4, 1), (1, 4))

_L1_COLUMNS = 96  #: columns of a panel of 8 AVX-512 vectors (or 16 of AVX2) that stay in a first-level cache of 48 KB
_NONZEROS = 10  #: nonzeros of a row in a column block, below which loading and storing the sums outweighs cache misses
_CHUNK_ROWS = 512


class NoKernels(SecateurError, ImportError):
    """The compiled kernels are not installed."""


class Geometry(NamedTuple):
    """Of a two-dimensional convolution: each a pair (vertical, horizontal)."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]  #: above and to the left
    dilation: tuple[int, int]
    padding_end: tuple[int, int] | None = None  #: below and to the right; None: as `padding`

    def numbers(self) -> tuple[int, ...]:
        """Kernel, stride, padding, dilation and padding_end as ten numbers."""
        return (*self.kernel, *self.stride, *self.padding, *self.dilation, *(self.padding_end or self.padding))

    def output(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the output for an input of `height` and `width`."""
        end = self.padding_end or self.padding
        sides = zip((height, width), self.kernel, self.stride, self.padding, end, self.dilation, strict=True)
        h, w = ((n + p + e - d * (k - 1) - 1) // s + 1 for n, k, s, p, e, d in sides)
        return h, w


def missing() -> str | None:
    """Why the kernels cannot run here, or None where they can."""
    return _REASON


def instruction_sets() -> tuple[str, ...]:
    """Instruction sets that can run here, best first; empty where the kernels are missing."""
    return tuple(_extension.kernels().split(",")) if _extension else ()


def extension() -> ModuleType:
    """The extension module. Raises NoKernels where it is not installed."""
    if _extension is None:
        raise NoKernels(_REASON)
    return _extension


def column_block(density: float, columns: int) -> int:
    """How many columns go together: few enough for the cache, enough that a row has several nonzeros in them."""
    wanted = min(max(_L1_COLUMNS, round(_NONZEROS / max(density, 1e-3))), 65535)
    parts = max(1, round(columns / wanted))
    return max(4, -(-columns // parts // 4) * 4)


def pack(
    weight: Tensor, *, groups: int = 1, block: tuple[int, int] = (1, 1), columns: int | None = None, rows: int = _CHUNK_ROWS
) -> Tensor:
    """``weight [out, in]`` (float32, `in` of one group) -> packed program, uint8 ``[bytes]``.

    `columns` of a block and `rows` of a chunk are chosen from the density where not given. Raises LayerError where the
    shape does not divide into groups or blocks. Zeros, also -0.0, are dropped; NaN and infinities are kept.
    """
    matrix = _matrix(weight)
    if columns is None:
        columns = column_block(int(matrix.count_nonzero()) / max(matrix.numel(), 1), matrix.shape[1])
    try:
        packed = extension().pack(matrix.data_ptr(), *matrix.shape, groups, *block, columns, rows, torch.get_num_threads())
    except ValueError as error:
        raise LayerError(str(error)) from None
    return torch.from_numpy(packed)


def unpack(program: Tensor, shape: Sequence[int]) -> Tensor:
    """The inverse of `pack`: float32 ``[out, in]``."""
    weight = torch.empty(tuple(shape))
    extension().unpack(_address(program), program.numel(), *weight.shape, weight.data_ptr())
    return weight


def pack_bits(weight: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """``weight [out, in]`` -> bitmask and values for `matvec`, uint8 ``[bytes]``.

    Values in float32 are exact, in bfloat16 rounded to nearest, in int8 scaled row by row so that the largest is 127.
    """
    if dtype not in VALUE_TYPES:
        raise LayerError(f"values are stored as float32, bfloat16 or int8, not {dtype}")
    matrix = _matrix(weight)
    try:
        return torch.from_numpy(
            extension().pack_bits(matrix.data_ptr(), *matrix.shape, VALUE_TYPES[dtype], torch.get_num_threads())
        )
    except ValueError as error:
        raise LayerError(str(error)) from None


def unpack_bits(bits: Tensor, shape: Sequence[int]) -> Tensor:
    """The inverse of `pack_bits`: float32 ``[out, in]``, exact for values stored in float32."""
    weight = torch.empty(tuple(shape))
    extension().unpack_bits(_address(bits), bits.numel(), *weight.shape, weight.data_ptr())
    return weight


def linear(
    x: Tensor, program: Tensor, bias: Tensor | None, shape: tuple[int, int], activation: int = 0, isa: str = ""
) -> Tensor:
    """``activation(x [..., in] @ W.T + bias) -> [..., out]`` for a program of W ``[out, in]`` with one group."""
    return _rows(extension().linear, x, program, bias, shape, activation, isa)


def matvec(x: Tensor, bits: Tensor, bias: Tensor | None, shape: tuple[int, int], activation: int = 0, isa: str = "") -> Tensor:
    """As `linear`, for a bitmask weight and few rows of x: the weight is read once for every four of them."""
    return _rows(extension().matvec, x, bits, bias, shape, activation, isa)


def conv2d(
    x: Tensor,
    program: Tensor,
    bias: Tensor | None,
    shape: tuple[int, int],
    geometry: Geometry,
    activation: int = 0,
    isa: str = "",
) -> Tensor:
    """``x [batch, channels, height, width]`` -> ``[batch, out, ...]`` for a program of W ``[out, channels / groups * taps]``.

    `shape` is ``(out, channels)``. The border is of zeros.
    """
    out, channels = shape
    _check(x, bias, out)
    x, y = _images(x, out, channels, geometry)
    pointers = (_address(program), program.numel(), out, x.data_ptr(), tuple(x.shape), geometry.numbers(), y.data_ptr())
    extension().conv2d(*pointers, _address(bias), activation, torch.get_num_threads(), isa)
    return y


def depthwise(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, activation: int = 0, isa: str = "") -> Tensor:
    """``x [batch, channels, height, width]`` with a dense kernel for each channel, ``weight [channels, 1, *kernel]``.

    The border is of zeros.
    """
    channels = weight.shape[0]
    if weight.dtype != torch.float32 or weight.shape != (channels, 1, *geometry.kernel) or not weight.is_contiguous():
        raise LayerError(f"a depthwise weight must be contiguous float32 [channels, 1, *kernel], got {list(weight.shape)}")
    _check(x, bias, channels)
    x, y = _images(x, channels, channels, geometry)
    pointers = (weight.data_ptr(), x.data_ptr(), tuple(x.shape), geometry.numbers(), y.data_ptr())
    extension().depthwise(*pointers, _address(bias), activation, torch.get_num_threads(), isa)
    return y


def gathers() -> bool:
    """Whether the extension has `thin`, `combine` and `gather`: it is installed, and no build from before them."""
    return hasattr(_extension, "thin_around")


def thin(
    x: Tensor,
    weight: Tensor,
    threshold: float,
    bias: Tensor | None = None,
    around: tuple[Tensor, Tensor] | None = None,
    isa: str = "",
) -> tuple[Tensor, int]:
    """``x @ weight + bias`` of one vector ``x [..., in]``, as if inputs up to `threshold` in magnitude were zero.

    Their rows of ``weight [in, out]`` are not read; NaN counts as large. `around` is a centre and a scale ``[in]``: then
    ``x - centre`` is the vector, and its magnitudes times the scale are compared. Returns ``[..., out]`` and how many rows
    were read.
    """
    rows, columns = _dense(weight)
    _check(x, bias, columns)
    if x.numel() != rows or x.shape[-1] != rows or not x.is_contiguous():
        raise LayerError(f"the weight {[rows, columns]} takes one contiguous vector [{rows}], got {list(x.shape)}")
    y = torch.empty(*x.shape[:-1], columns)
    centre, scale = (None, None) if around is None else around
    for given in around or ():
        if given.dtype != torch.float32 or given.shape != (rows,) or not given.is_contiguous():
            raise LayerError(
                f"centre and scale of {rows} inputs must be float32 [{rows}], got {given.dtype} {list(given.shape)}"
            )
    pointers = (weight.data_ptr(), rows, columns, x.data_ptr(), threshold, _address(centre), _address(scale), _address(bias))
    return y, extension().thin_around(*pointers, y.data_ptr(), torch.get_num_threads(), isa)


def combine(weight: Tensor, index: Tensor, factor: Tensor, bias: Tensor | None = None, isa: str = "") -> Tensor:
    """``factor @ weight[index] + bias``: int32 ``index [n]`` and ``factor [n]`` of ``weight [rows, out]`` give ``[out]``."""
    rows, columns = _dense(weight)
    _check(factor, bias, columns)
    count = _indices(index)
    if factor.shape != (count,) or not factor.is_contiguous():
        raise LayerError(f"{count} rows take as many contiguous factors, got {list(factor.shape)}")
    y = torch.empty(columns)
    pointers = (weight.data_ptr(), rows, columns, index.data_ptr(), factor.data_ptr(), count, _address(bias), y.data_ptr())
    try:
        extension().combine(*pointers, torch.get_num_threads(), isa)
    except ValueError as error:
        raise LayerError(str(error)) from None
    return y


def gather(x: Tensor, weight: Tensor, index: Tensor, bias: Tensor | None = None, activation: int = 0, isa: str = "") -> Tensor:
    """``activation(weight[index] @ x + bias[index])``: int32 ``index [n]`` of ``weight [rows, in]``, one ``x [in]``."""
    rows, columns = _dense(weight)
    _check(x, bias, rows)
    count = _indices(index)
    if x.numel() != columns or not x.is_contiguous():
        raise LayerError(f"the weight {[rows, columns]} takes one contiguous vector [{columns}], got {list(x.shape)}")
    y = torch.empty(count)
    pointers = (weight.data_ptr(), rows, columns, index.data_ptr(), count, x.data_ptr(), _address(bias), activation)
    try:
        extension().gather(*pointers, y.data_ptr(), torch.get_num_threads(), isa)
    except ValueError as error:
        raise LayerError(str(error)) from None
    return y


def _dense(weight: Tensor) -> tuple[int, int]:
    """Rows and columns of a weight of which rows are chosen."""
    if weight.dtype != torch.float32 or weight.dim() != 2 or weight.device.type != "cpu" or not weight.is_contiguous():
        what = f"{weight.dtype} {list(weight.shape)} on {weight.device}"
        raise LayerError(f"rows are chosen from a contiguous float32 matrix on the CPU, got {what}")
    return weight.shape[0], weight.shape[1]


def _indices(index: Tensor) -> int:
    if index.dtype != torch.int32 or index.dim() != 1 or index.device.type != "cpu" or not index.is_contiguous():
        raise LayerError(f"numbers of rows are contiguous int32 [n] on the CPU, got {index.dtype} {list(index.shape)}")
    return len(index)


def _images(x: Tensor, out: int, channels: int, geometry: Geometry) -> tuple[Tensor, Tensor]:
    """The input of a convolution, contiguous, and room for its output."""
    if x.dim() != 4 or x.shape[1] != channels:
        raise LayerError(f"a convolution of {channels} channels takes [batch, {channels}, height, width], got {list(x.shape)}")
    height, width = geometry.output(x.shape[2], x.shape[3])
    if height < 1 or width < 1:
        raise LayerError(f"an input of {x.shape[2]} x {x.shape[3]} is smaller than the convolution's kernel {geometry.kernel}")
    return x.contiguous(), torch.empty(x.shape[0], out, height, width)


def _rows(
    kernel: Callable[..., None],
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    shape: tuple[int, int],
    activation: int,
    isa: str,
) -> Tensor:
    out, columns = shape
    _check(x, bias, out)
    if x.dim() < 1 or x.shape[-1] != columns:
        raise LayerError(f"a sparse linear layer of {columns} inputs takes [..., {columns}], got {list(x.shape)}")
    rows = x.reshape(x.shape[:-1].numel(), columns)
    if rows.stride(1) != 1 or rows.stride(0) < columns:
        rows = rows.contiguous()
    y = torch.empty(*x.shape[:-1], out)
    pointers = (_address(weight), weight.numel(), out, columns, rows.data_ptr(), rows.shape[0], rows.stride(0), y.data_ptr())
    kernel(*pointers, _address(bias), activation, torch.get_num_threads(), isa)
    return y


def _check(x: Tensor, bias: Tensor | None, out: int) -> None:
    if x.dtype != torch.float32 or x.device.type != "cpu":
        raise LayerError(
            f"sparse CPU kernels take float32 activations on the CPU, got {x.dtype} on {x.device}: convert them first"
        )
    if x.requires_grad and torch.is_grad_enabled():
        raise LayerError("sparse kernels have no gradient. Run the model under torch.inference_mode() or torch.no_grad().")
    if bias is not None and (bias.dtype != torch.float32 or bias.shape != (out,) or not bias.is_contiguous()):
        raise LayerError(f"the bias of {out} outputs must be float32 [{out}], got {bias.dtype} {list(bias.shape)}")


def _matrix(weight: Tensor) -> Tensor:
    if weight.dim() != 2 or not weight.is_floating_point():
        raise LayerError(f"a sparse weight is a matrix of floating point, got {weight.dtype} {list(weight.shape)}")
    return weight.detach().to("cpu", torch.float32).contiguous()


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
