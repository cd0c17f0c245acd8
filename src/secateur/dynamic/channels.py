"""Channel groups that are computed or not: the gate of a convolution, and the convolution that reads what it put out."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secateur.dynamic.decider import Decider
from secateur.dynamic.gate import Gate
from secateur.runtime.fold import fold
from secateur.runtime.native import Geometry


@dataclass
class Link:
    """What a gate tells the convolution behind it: the channels chosen, one number for all of the batch or ``[batch]``."""

    width: int | Tensor = 0


@dataclass(frozen=True)
class Found:
    """Names in the model: a convolution, its BatchNorm, the convolution that reads its channels, and its BatchNorm if any."""

    first: str
    norm: str
    second: str
    after: str | None = None


def find_pairs(model: nn.Module, groups: int) -> list[Found]:
    """Pairs of convolutions of one module, registered one after the other, a BatchNorm right behind the first.

    As the residual blocks of ResNets and the stacks of VGG have them; no convolution is in two pairs. The first must have a
    multiple of `groups` channels. The order of registration is only a guess at how the channels flow: calibration tests it.
    """
    found = []
    for path, parent in model.named_modules():
        layers = [(n, m) for n, m in parent.named_children() if isinstance(m, (nn.Conv2d, nn.BatchNorm2d))]
        at = 0
        while at + 2 < len(layers):
            (first, a), (norm, n), (second, b) = layers[at : at + 3]
            if _fits(a, n, b, groups):
                prefix = f"{path}." if path else ""
                after = next((prefix + name for name, m in layers[at + 3 : at + 4] if _normalises(m, b)), None)
                found.append(Found(prefix + first, prefix + norm, prefix + second, after))
                at += 2
            at += 1
    return found


def _fits(first: nn.Module, norm: nn.Module, second: nn.Module, groups: int) -> bool:
    return (
        type(first) is nn.Conv2d
        and type(second) is nn.Conv2d
        and _normalises(norm, first)
        and first.groups == second.groups == 1
        and first.padding_mode == second.padding_mode == "zeros"
        and not isinstance(first.padding, str)
        and first.out_channels == second.in_channels
        and first.out_channels % groups == 0
    )


def _normalises(norm: nn.Module, conv: nn.Module) -> bool:
    return type(norm) is nn.BatchNorm2d and norm.track_running_stats and norm.num_features == conv.out_channels


class ChannelGate(Gate):
    """Convolution and BatchNorm of which the first few groups of output channels are computed, as the decider chooses.

    In training mode all is computed and `GatedInput` masks; in evaluation mode only the chosen channels are, the BatchNorm
    folded in. A batch whose members choose differently is computed group by group.
    """

    def __init__(self, conv: nn.Conv2d, norm: nn.BatchNorm2d, decider: Decider, index: int, link: Link):
        super().__init__()
        self.conv, self.norm, self.decider = conv, norm, decider
        self.index, self.link = index, link
        self._folded: tuple[Tensor, Tensor] | None = None

    def set_budget(self, budget: float) -> None:
        """All gates turn one dial, which the decider holds."""
        self.decider.set_budget(budget)

    def train(self, mode: bool = True) -> ChannelGate:
        """As of any module; what was folded is forgotten."""
        self._folded = None
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        """``[batch, in, h, w]`` -> ``[batch, widest choice, h', w']``; channels that a member did not choose are zero."""
        group = self.conv.out_channels // self.decider.groups
        if self.training:
            self.link.width = self.decider.draw(self.index, x) * group
            return self.norm(self.conv(x))
        chosen = self.decider.choose(self.index, x)
        self.link.width = width = chosen * group
        if self._folded is None:
            self._folded = folded(self.conv, self.norm)
        weight, bias = self._folded
        conv = self.conv

        def run(rows: Tensor, width: int) -> Tensor:
            if not width:
                return rows.new_zeros(len(rows), 0, *_sizes(conv, rows))
            return F.conv2d(rows, weight[:width], bias[:width], conv.stride, conv.padding, conv.dilation)

        y = by_width(run, x, width)
        if self.meter is not None:
            self._record(x, y, width)
        return y

    def _record(self, x: Tensor, y: Tensor, width: int | Tensor) -> None:
        each = y.shape[-2:].numel() * x.shape[1] * self.conv.weight[0, 0].numel()
        widths = torch.as_tensor(width, dtype=torch.float64).expand(len(x))
        deciding = 0 if self.decider.full else self.decider.macs(self.index)
        self.spend(widths * each + deciding, torch.full_like(widths, each * self.conv.out_channels))


class GatedInput(Gate):
    """The convolution that reads the channels a `ChannelGate` put out: it multiplies only with those that were chosen.

    A BatchNorm that normalises its output is inside, once for each number of groups: the sum over fewer channels has another
    mean and variance (Yu et al. 2018, Slimmable Neural Networks, section 3.3, switchable batch normalization). In evaluation
    mode it is folded into the convolution.
    """

    def __init__(self, conv: nn.Conv2d, link: Link, norm: nn.BatchNorm2d | None = None, groups: int = 1):
        super().__init__()
        self.conv, self.link = conv, link
        self.norms = nn.ModuleList() if norm is None else nn.ModuleList(copy.deepcopy(norm) for _ in range(groups + 1))
        self._slices: dict[int, tuple[Tensor, Tensor | None]] = {}

    def set_budget(self, budget: float) -> None:
        """Nothing: the gate before it chooses."""

    def train(self, mode: bool = True) -> GatedInput:
        """As of any module; copies of slices of the weight are forgotten."""
        self._slices = {}
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        """``[batch, widest choice, h, w]`` -> ``[batch, out, h', w']``."""
        conv, width = self.conv, self.link.width
        if self.training:
            widths = torch.as_tensor(width, device=x.device).expand(len(x))
            y = conv(x * (torch.arange(x.shape[1], device=x.device) < widths[:, None])[:, :, None, None])
            return self._normalised(y, widths) if len(self.norms) else y

        def run(rows: Tensor, width: int) -> Tensor:
            weight, bias = self._slice(width)
            if not width:
                empty = rows.new_zeros(len(rows), conv.out_channels, *_sizes(conv, rows))
                return empty if bias is None else empty + bias[:, None, None]
            return F.conv2d(rows[:, :width], weight, bias, conv.stride, conv.padding, conv.dilation)

        y = by_width(run, x, width)
        if self.meter is not None:
            each = y[0].numel() * conv.weight[0, 0].numel()
            widths = torch.as_tensor(width, dtype=torch.float64).expand(len(x))
            self.spend(widths * each, torch.full_like(widths, each * conv.in_channels))
        return y

    def _normalised(self, y: Tensor, widths: Tensor) -> Tensor:
        """Each member by the norm of its width; statistics are those of the members of the batch that chose alike."""
        out = torch.empty_like(y)
        for width in widths.unique().tolist():
            rows = widths == width
            out[rows] = self._norm(width)(y[rows])
        return out

    def _norm(self, width: int) -> nn.BatchNorm2d:
        return self.norms[width * (len(self.norms) - 1) // self.conv.in_channels]  # type: ignore[return-value]

    def _slice(self, width: int) -> tuple[Tensor, Tensor | None]:
        """Weight and bias for the first `width` channels, the norm folded in."""
        if width not in self._slices:
            weight, bias = folded(self.conv, self._norm(width)) if len(self.norms) else (self.conv.weight, self.conv.bias)
            self._slices[width] = weight.detach()[:, :width].contiguous(), None if bias is None else bias.detach()
        return self._slices[width]


def by_width(run: Callable[[Tensor, int], Tensor], x: Tensor, width: int | Tensor) -> Tensor:
    """``run(rows, width)`` for the members of the batch that chose alike, put together in order, zeros behind narrow ones."""
    if isinstance(width, int):
        return run(x, width)
    parts = [(width == w, w) for w in width.unique().tolist()]
    if len(parts) == 1:
        return run(x, parts[0][1])
    done = [(which, run(x[which], w)) for which, w in parts]
    widest = max(y.shape[1] for _, y in done)
    out = x.new_zeros(len(x), widest, *done[0][1].shape[2:])
    for which, y in done:
        out[which, : y.shape[1]] = y
    return out


def _sizes(conv: nn.Conv2d, x: Tensor) -> tuple[int, int]:
    """Height and width that the convolution puts out."""
    facts: Any = (conv.kernel_size, conv.stride, conv.padding, conv.dilation)
    return Geometry(*facts).output(*x.shape[2:])


@torch.no_grad()
def folded(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Weight and bias of the convolution with the BatchNorm in it."""
    both = nn.Conv2d(1, 1, 1)
    both.weight, both.bias = conv.weight, conv.bias  # type: ignore[assignment]
    fold(both, norm)
    return both.weight.detach(), both.bias.detach()  # type: ignore[union-attr]


@torch.no_grad()
def order_channels(gate: ChannelGate, reader: GatedInput) -> None:
    """Put the channels with the largest weights first, in both convolutions and the norm: the dense output stays the same.

    Importance is the l1 norm of what makes the channel, as the norm scales it, times that of what reads it.
    """
    weight, _ = folded(gate.conv, gate.norm)
    score = weight.abs().sum((1, 2, 3)) * reader.conv.weight.abs().sum((0, 2, 3))
    order = score.argsort(descending=True, stable=True)
    norm, conv = gate.norm, gate.conv
    for tensor in (conv.weight, conv.bias, norm.weight, norm.bias, norm.running_mean, norm.running_var):
        if tensor is not None:
            tensor.copy_(tensor[order].clone())
    reader.conv.weight.copy_(reader.conv.weight[:, order].clone())
