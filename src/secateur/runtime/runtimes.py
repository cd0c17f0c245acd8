"""The ways a sparse layer can be run. Each says which layers it takes, and why not the others."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secateur.registry import Registry
from secateur.runtime import native
from secateur.runtime.formats.block import stored_fraction
from secateur.runtime.modules import DepthwiseConv2d, SparseConv2d, SparseLinear, geometry_of
from secateur.runtime.semi_structured import SemiStructuredRuntime

LEAST_SPARSITY = 0.3  #: below it no kernel has ever won, and none is tried
_FEW_ROWS = 8  #: activations up to which a layer is bound by reading its weight


class Runtime(Protocol):
    """Runs one layer in a sparse way. A refusal is a reason, never a silent fallback."""

    needs_zeros: ClassVar[bool]  #: whether a layer must be sparse for this to be worth trying
    exact: bool  #: whether weights are kept as they are; runtimes that round are tried only where they are asked for by name

    def refuses(self, module: nn.Module, example: Tensor) -> str | None:
        """Why `module` cannot or should not run on inputs like `example` this way, or None where it can."""
        ...

    def convert(self, module: nn.Module) -> nn.Module:
        """A module for inference that computes the same. `module` stays as it is."""
        ...


RUNTIMES: Registry[Any] = Registry("runtime")


@dataclass(frozen=True)
class PanelRuntime:
    """Rows of nonzeros times panels of activations that stay in cache."""

    block: tuple[int, int] = (1, 1)
    exact: ClassVar[bool] = True
    needs_zeros: ClassVar[bool] = True

    def refuses(self, module: nn.Module, example: Tensor) -> str | None:
        """Float32 linear layers and convolutions on the CPU; with a block also zeros that form such blocks."""
        if reason := _unfit(module, example):
            return reason
        weight = module.weight.detach().flatten(1)  # type: ignore[union-attr,operator]
        rows, cols = self.block
        if self.block == (1, 1):
            return None
        groups = getattr(module, "groups", 1)
        if weight.shape[0] // groups % rows or weight.shape[1] % cols:
            return f"its matrix of {weight.shape[0]} x {weight.shape[1]} is no multiple of {rows} x {cols}"
        kept, stored = float((weight != 0).float().mean()), stored_fraction(weight, rows, cols)
        if stored > 1.25 * kept:
            return f"its zeros form no blocks of {rows}x{cols}: they would store {stored:.0%} where {kept:.0%} are kept"
        return None

    def convert(self, module: nn.Module) -> nn.Module:
        """A `SparseLinear` or `SparseConv2d` for the same weight and bias."""
        if isinstance(module, nn.Conv2d):
            return SparseConv2d.from_conv(module, block=self.block)
        assert isinstance(module, nn.Linear)
        return SparseLinear.from_dense(module.weight, module.bias, block=self.block)


@dataclass(frozen=True)
class BitmaskRuntime:
    """A bit for each weight and the kept ones: fewest bytes to read, for a few rows of activations at a time."""

    values: torch.dtype = torch.float32
    needs_zeros: ClassVar[bool] = True

    @property
    def exact(self) -> bool:
        """Only float32 values are those of the layer."""
        return self.values == torch.float32

    def refuses(self, module: nn.Module, example: Tensor) -> str | None:
        """Float32 linear layers on the CPU with at most 8 rows of activations."""
        if reason := _unfit(module, example):
            return reason
        if not isinstance(module, nn.Linear):
            return "the bitmask kernel serves linear layers only"
        rows = example.shape[:-1].numel()
        return (
            f"{rows} rows of activations: with more than {_FEW_ROWS} reading the weight is no bottleneck"
            if rows > _FEW_ROWS
            else None
        )

    def convert(self, module: nn.Module) -> nn.Module:
        """A `SparseLinear` with the bitmask kernel."""
        assert isinstance(module, nn.Linear)
        return SparseLinear.from_dense(module.weight, module.bias, kernel="bitmask", values=self.values)


@dataclass(frozen=True)
class DepthwiseRuntime:
    """Depthwise convolutions, dense, with the activation behind them: what sparse networks would otherwise wait for."""

    exact: ClassVar[bool] = True
    needs_zeros: ClassVar[bool] = False

    def refuses(self, module: nn.Module, example: Tensor) -> str | None:
        """Float32 convolutions on the CPU with one kernel for each channel."""
        if not _is_depthwise(module):
            return "the depthwise kernel serves convolutions of one kernel a channel"
        return _unfit(module, example, depthwise=True)

    def convert(self, module: nn.Module) -> nn.Module:
        """A `DepthwiseConv2d` for the same weight and bias."""
        assert isinstance(module, nn.Conv2d)
        return DepthwiseConv2d.from_conv(module)


@RUNTIMES.register("panel", source="panels: Goto and van de Geijn 2008, Anatomy of High-Performance Matrix Multiplication")
def panel() -> PanelRuntime:
    """Unstructured zeros on CPUs: linear layers and convolutions of many rows or pixels."""
    return PanelRuntime()


@RUNTIMES.register("panel-4x1", source="own kernels; blocks after Narang et al. 2017, Block-Sparse Recurrent Neural Networks")
def panel_4x1() -> PanelRuntime:
    """Blocks of 4 outputs by 1 input on CPUs: each activation loaded serves four outputs."""
    return PanelRuntime((4, 1))


@RUNTIMES.register("panel-1x4", source="own kernels; blocks after Narang et al. 2017, Block-Sparse Recurrent Neural Networks")
def panel_1x4() -> PanelRuntime:
    """Blocks of 1 output by 4 inputs on CPUs: one index for four weights."""
    return PanelRuntime((1, 4))


@RUNTIMES.register("bitmask", source="own kernels; bit masks after Parashar et al. 2017, SCNN")
def bitmask() -> BitmaskRuntime:
    """Linear layers that meet a few rows at a time on CPUs, bound by reading their weight."""
    return BitmaskRuntime()


@RUNTIMES.register("bitmask-bfloat16", source="own kernels; bit masks after Parashar et al. 2017, SCNN")
def bitmask_bfloat16() -> BitmaskRuntime:
    """As bitmask, with the kept values rounded to bfloat16: half the bytes. Tried only where it is named."""
    return BitmaskRuntime(torch.bfloat16)


@RUNTIMES.register("bitmask-int8", source="own kernels; bit masks after Parashar et al. 2017, SCNN")
def bitmask_int8() -> BitmaskRuntime:
    """As bitmask, with values of 8 bits and a scale for each row: a quarter of the bytes. Tried only where it is named."""
    return BitmaskRuntime(torch.int8)


@RUNTIMES.register("depthwise", source="own kernels, dense")
def depthwise() -> DepthwiseRuntime:
    """Depthwise convolutions on CPUs: dense, with the activation inside, whatever the sparsity."""
    return DepthwiseRuntime()


@dataclass(frozen=True)
class TritonRuntime:
    """Linear layers that meet a few rows at a time on GPUs, bound by reading their weight."""

    exact: ClassVar[bool] = True
    needs_zeros: ClassVar[bool] = True

    def refuses(self, module: nn.Module, example: Tensor) -> str | None:
        """Linear layers on a CUDA device with at most 16 rows of activations, where Triton is installed."""
        if example.device.type != "cuda":
            return f"the Triton kernel needs a CUDA device, the layer runs on {example.device.type}"
        if type(module) is not nn.Linear:
            return "the Triton kernel serves linear layers only"
        if importlib.util.find_spec("triton") is None:
            return "the Triton kernel needs the package triton"
        from secateur.runtime.triton_matvec import DTYPES, MOST_VECTORS

        rows = example.shape[:-1].numel()
        if example.dtype not in DTYPES or module.weight.dtype != example.dtype:
            return f"the Triton kernel does not take {module.weight.dtype} weights with {example.dtype} activations"
        return f"{rows} rows of activations: the Triton kernel takes at most {MOST_VECTORS}" if rows > MOST_VECTORS else None

    def convert(self, module: nn.Module) -> nn.Module:
        """A `TritonLinear` for the same weight and bias."""
        from secateur.runtime.triton_matvec import TritonLinear

        assert isinstance(module, nn.Linear)
        return TritonLinear(module.weight, module.bias)


@RUNTIMES.register("triton-bitmask", source="own kernel; bit masks after Parashar et al. 2017, SCNN")
def triton_bitmask() -> TritonRuntime:
    """As bitmask, on GPUs: linear layers of up to 16 rows of activations, bound by reading their weight."""
    return TritonRuntime()


@RUNTIMES.register("2:4", source="Mishra et al. 2021, Accelerating Sparse Deep Neural Networks")
def semi_structured() -> SemiStructuredRuntime:
    """2:4 linear layers on GPUs with sparse tensor cores."""
    return SemiStructuredRuntime()


def _is_depthwise(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d) and module.groups == module.in_channels == module.out_channels > 1


def _unfit(module: nn.Module, example: Tensor, depthwise: bool = False) -> str | None:
    """What all CPU kernels have in common: why they cannot take the layer."""
    if reason := native.missing():
        return reason
    base: Any = next((kind for kind in (nn.Linear, nn.Conv2d) if isinstance(module, kind)), None)
    if base is None:
        return f"the CPU kernels serve linear layers and two-dimensional convolutions, not {type(module).__name__}"
    if example.device.type != "cpu" or example.dtype != torch.float32 or module.weight.dtype != torch.float32:
        dtypes = f"{module.weight.dtype} weights and {example.dtype} activations"
        return f"the CPU kernels take float32 on the CPU, not {dtypes} on {example.device}"
    if isinstance(module, nn.Conv2d):
        if module.groups > 1 and module.groups == module.in_channels and not depthwise:
            return "a depthwise convolution has nothing to skip: a handful of weights a channel"
        try:
            geometry_of(module)
        except ValueError as error:
            return str(error)
    if type(module) is not base and not _computes_the_same(module, base, example):
        return f"{type(module).__name__} computes something else than the {base.__name__} it derives from"
    return None


def _computes_the_same(module: Any, base: Any, example: Tensor) -> bool:
    """Whether a subclass computes what its weight, bias and geometry say."""
    got = module(example)
    if base is nn.Linear:
        return torch.equal(got, base.forward(module, example))
    how = geometry_of(module)
    (top, left), (bottom, right) = how["padding"], how["padding_end"]
    padded = F.pad(example, (left, right, top, bottom))
    expected = F.conv2d(padded, module.weight, module.bias, tuple(how["stride"]), 0, how["dilation"], module.groups)
    return got.shape == expected.shape and bool((got - expected).abs().max() <= 1e-5 * expected.abs().max())
