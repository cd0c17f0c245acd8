"""Layers whose weight is kept packed: drop-in for `nn.Linear` and `nn.Conv2d` at inference.

Their state is the exact bitmask form (``bits``, ``values``, ``bias``), independent of the machine; the packed program is
made from it where the layer is built or loaded.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import LayerError
from secateur.runtime import native, ops
from secateur.runtime.formats import bitmask
from secateur.runtime.native import ACTIVATIONS, Geometry


class SparseLayer(nn.Module):
    """What the sparse layers share: packed weight, exact state, no gradient."""

    bias: Tensor | None
    program: Tensor

    def __init__(self, shape: Sequence[int], bias: bool, activation: str):
        super().__init__()
        if activation not in ACTIVATIONS:
            raise LayerError(f"fused activations are {', '.join(ACTIVATIONS)}, not {activation!r}")
        self.shape = tuple(shape)  #: of the dense weight, ``[out, in, *kernel]``
        self.activation = activation
        self.register_buffer("bias", torch.zeros(self.shape[0]) if bias else None)
        self.register_buffer("program", torch.empty(0, dtype=torch.uint8), persistent=False)

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """Rows and columns of the weight as a matrix."""
        return self.shape[0], math.prod(self.shape[1:])

    @property
    def weight(self) -> Tensor:
        """The dense weight, rebuilt: float32 ``[out, in, *kernel]``."""
        return self._unpacked().reshape(self.shape)

    @torch.no_grad()
    def load_dense(self, weight: Tensor, bias: Tensor | None = None) -> SparseLayer:
        """Take over a dense weight of this layer's shape, and the bias if it has one. Returns the layer."""
        if tuple(weight.shape) != self.shape:
            raise LayerError(f"a sparse layer of shape {self.shape} cannot hold a weight of shape {tuple(weight.shape)}")
        if (bias is None) != (self.bias is None):
            raise LayerError("the bias must be given exactly where the layer was made with one")
        self.program = self._packed(weight.reshape(self.matrix_shape))
        if bias is not None:
            self.bias = bias.detach().to("cpu", torch.float32, copy=True).contiguous()
        return self

    def extra_repr(self) -> str:
        """Shape, kept fraction and activation."""
        kept = self.weight.count_nonzero().item() if self.program.numel() else 0
        act = "" if self.activation == "none" else f", activation={self.activation}"
        return f"{self.shape}, density={kept / max(math.prod(self.shape), 1):.3f}{act}"

    def _packed(self, matrix: Tensor) -> Tensor:
        raise NotImplementedError

    def _unpacked(self) -> Tensor:
        raise NotImplementedError

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "bits"], destination[prefix + "values"] = bitmask.pack(self.weight)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        rest = {k: v for k, v in state_dict.items() if k not in (prefix + "bits", prefix + "values")}
        super()._load_from_state_dict(rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        absent = [prefix + name for name in ("bits", "values") if prefix + name not in state_dict]
        if absent:
            missing_keys.extend(absent)
            return
        try:
            weight = bitmask.unpack(state_dict[prefix + "bits"], state_dict[prefix + "values"], self.shape)
        except ValueError as error:
            error_msgs.append(f"sparse weight {prefix!r}: {error}")
            return
        self.program = self._packed(weight.reshape(self.matrix_shape))


class SparseLinear(SparseLayer):
    """``activation(x @ W.T + bias)`` with most of W zero.

    `kernel` is ``"panel"`` (many rows of x at a time; `block` names the pattern it exploits) or ``"bitmask"`` (a few rows:
    memory-bound, so `values` may be bfloat16 or int8). Float32 activations of any shape ``[..., in]``; no gradient.

    >>> layer = SparseLinear.from_dense(torch.eye(3), torch.zeros(3))          # doctest: +SKIP
    >>> layer(torch.ones(1, 3)).tolist()                                       # doctest: +SKIP
    [[1.0, 1.0, 1.0]]
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = True,
        kernel: str = "panel",
        block: tuple[int, int] = (1, 1),
        values: torch.dtype = torch.float32,
        activation: str = "none",
    ):
        super().__init__((out_features, in_features), bias, activation)
        if kernel not in ("panel", "bitmask"):
            raise LayerError(f"kernels of sparse linear layers are 'panel' and 'bitmask', not {kernel!r}")
        if kernel == "panel" and values != torch.float32:
            raise LayerError(f"the panel kernel keeps float32 values, not {values}: use kernel='bitmask'")
        self.in_features, self.out_features = in_features, out_features
        self.kernel, self.block, self.values = kernel, tuple(block), values

    @classmethod
    def from_dense(cls, weight: Tensor, bias: Tensor | None = None, **options: Any) -> SparseLinear:
        """A layer that holds ``weight [out, in]``; options are those of the constructor."""
        layer = cls(weight.shape[1], weight.shape[0], bias=bias is not None, **options)
        layer.load_dense(weight, bias)
        return layer

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in] -> [..., out]``. Raises LayerError for other shapes, dtypes and devices."""
        code = ACTIVATIONS.index(self.activation)
        if _opaque(x):
            op = ops.sparse_matvec if self.kernel == "bitmask" else ops.sparse_linear
            return op(x, self.program, self.bias, self.out_features, code)
        run = native.matvec if self.kernel == "bitmask" else native.linear
        return run(x, self.program, self.bias, (self.out_features, self.in_features), code)

    def _packed(self, matrix: Tensor) -> Tensor:
        if self.kernel == "bitmask":
            return native.pack_bits(matrix, self.values)
        return native.pack(matrix, block=self.block)  # type: ignore[arg-type]

    def _unpacked(self) -> Tensor:
        unpack = native.unpack_bits if self.kernel == "bitmask" else native.unpack
        return unpack(self.program, self.matrix_shape)


class SparseConv2d(SparseLayer):
    """Two-dimensional convolution with most weights zero, zero padding, any stride, dilation and groups; no gradient."""

    def __init__(
        self,
        shape: Sequence[int],
        *,
        stride: tuple[int, int] = (1, 1),
        padding: tuple[int, int] = (0, 0),
        dilation: tuple[int, int] = (1, 1),
        padding_end: tuple[int, int] | None = None,
        groups: int = 1,
        bias: bool = True,
        block: tuple[int, int] = (1, 1),
        activation: str = "none",
    ):
        super().__init__(shape, bias, activation)
        self.geometry = _geometry(self.shape, stride, padding, dilation, padding_end)
        if groups < 1:
            raise LayerError(f"a convolution has at least one group, not {groups}")
        self.groups, self.block = groups, tuple(block)

    @classmethod
    def from_conv(cls, conv: nn.Conv2d, **options: Any) -> SparseConv2d:
        """The sparse form of a dense convolution with zero padding. Raises LayerError for other padding modes."""
        layer = cls(conv.weight.shape, **geometry_of(conv), groups=conv.groups, bias=conv.bias is not None, **options)
        layer.load_dense(conv.weight, conv.bias)
        return layer

    def forward(self, x: Tensor) -> Tensor:
        """``[batch, in, height, width]`` (or one image ``[in, height, width]``) -> the same with `out` channels."""
        if x.dim() == 3:
            return self(x.unsqueeze(0)).squeeze(0)
        code, channels = ACTIVATIONS.index(self.activation), self.shape[1] * self.groups
        if _opaque(x):
            return ops.sparse_conv2d(x, self.program, self.bias, self.shape[0], list(self.geometry.numbers()), code)
        return native.conv2d(x, self.program, self.bias, (self.shape[0], channels), self.geometry, code)

    def _packed(self, matrix: Tensor) -> Tensor:
        return native.pack(matrix, groups=self.groups, block=self.block)  # type: ignore[arg-type]

    def _unpacked(self) -> Tensor:
        return native.unpack(self.program, self.matrix_shape)


class DepthwiseConv2d(nn.Module):
    """A convolution with a dense kernel of its own for each channel, zero padding and a fused activation; no gradient.

    There is nothing to skip in it: it is here because torch's own takes longer than the sparse layers around it.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(
        self,
        shape: Sequence[int],
        *,
        stride: tuple[int, int] = (1, 1),
        padding: tuple[int, int] = (0, 0),
        dilation: tuple[int, int] = (1, 1),
        padding_end: tuple[int, int] | None = None,
        bias: bool = True,
        activation: str = "none",
    ):
        super().__init__()
        self.geometry = _geometry(shape, stride, padding, dilation, padding_end)
        if shape[1] != 1:
            raise LayerError(f"a depthwise weight is [channels, 1, *kernel], not {tuple(shape)}")
        self.activation = activation
        self.register_buffer("weight", torch.zeros(*shape))
        self.register_buffer("bias", torch.zeros(shape[0]) if bias else None)

    @classmethod
    def from_conv(cls, conv: nn.Conv2d, **options: Any) -> DepthwiseConv2d:
        """The same layer as a depthwise `nn.Conv2d`. Raises LayerError for padding other than with zeros."""
        layer = cls(conv.weight.shape, **geometry_of(conv), bias=conv.bias is not None, **options)
        layer.weight = conv.weight.detach().clone().contiguous()
        if conv.bias is not None:
            layer.bias = conv.bias.detach().clone()
        return layer

    def forward(self, x: Tensor) -> Tensor:
        """``[batch, channels, height, width]`` -> the same with the output's height and width."""
        code = ACTIVATIONS.index(self.activation)
        if _opaque(x):
            return ops.depthwise_conv2d(x, self.weight, self.bias, list(self.geometry.numbers()), code)
        return native.depthwise(x, self.weight, self.bias, self.geometry, code)

    def extra_repr(self) -> str:
        """Shape and activation."""
        return f"{tuple(self.weight.shape)}" + ("" if self.activation == "none" else f", activation={self.activation}")


def _geometry(shape: Sequence[int], stride: Any, padding: Any, dilation: Any, padding_end: Any) -> Geometry:
    if len(shape) != 4 or min(*stride, *dilation) < 1 or min(*padding, *(padding_end or padding)) < 0:
        raise LayerError(f"no convolution has weight {tuple(shape)}, stride {stride}, padding {padding}, dilation {dilation}")
    end = tuple(padding_end) if padding_end and tuple(padding_end) != tuple(padding) else None
    return Geometry((shape[2], shape[3]), tuple(stride), tuple(padding), tuple(dilation), end)  # type: ignore[arg-type]


def geometry_of(conv: nn.Conv2d) -> dict[str, Any]:
    """Stride, padding, dilation and padding_end of a convolution, for `SparseConv2d` and `DepthwiseConv2d`.

    A subclass may hold one `nn.ZeroPad2d`, through which its input goes first. Raises LayerError for other padding modes.
    """
    if conv.padding_mode != "zeros":
        raise LayerError(f"the kernels pad with zeros, not with {conv.padding_mode!r}")
    top, left = (0, 0) if isinstance(conv.padding, str) else conv.padding
    bottom, right = top, left
    if conv.padding == "same":  # the odd one goes to the end
        total = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
        top, left = total[0] // 2, total[1] // 2
        bottom, right = total[0] - top, total[1] - left
    pads = [child for child in conv.children() if isinstance(child, nn.ZeroPad2d)]
    for pad in pads:
        before, after, above, below = pad.padding
        top, left, bottom, right = top + above, left + before, bottom + below, right + after
    return {
        "stride": conv.stride,
        "padding": (top, left),
        "dilation": conv.dilation,
        "padding_end": (bottom, right),
    }


def _opaque(x: Tensor) -> bool:
    """Whether `x` is being traced or is no ordinary tensor, so that the operator must be called instead of the kernel."""
    return torch.compiler.is_compiling() or type(x) is not Tensor
