"""A linear layer that takes inputs that matter little as what they usually are, and reads no weights for them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from secateur.dynamic.kernels import by_kernel, turn
from secateur.dynamic.linear import LinearGate
from secateur.runtime import native

_POINTS = 201  #: of the table of quantiles, and of the way of sparsities


class SparseInput(LinearGate):
    """``linear(x)`` with every input that matters little taken as what it usually is, its `centre`.

    It matters by how far it is from there times the norm of the weights that read it (`scale`); what comes from all the
    centres is known beforehand, so columns of inputs at their centre are not read. The threshold is the quantile of these
    figures at the sparsity that the budget gives this layer. At sparsity 0 only exact zeros are left out. NaN never is.
    """

    quantiles: Tensor  #: ``[201]``: figure below which that share of the calibration inputs lies
    way: Tensor  #: ``[201]``: sparsity of this layer for each sparsity of the model
    centre: Tensor  #: ``[in]``: medians of the calibration inputs
    scale: Tensor  #: ``[in]``

    def __init__(self, linear: nn.Module, *, swap: bool = False):
        """As `LinearGate`."""
        super().__init__(linear, swap=swap)
        if not swap:
            turn(self.weight)
        self.register_buffer("quantiles", torch.zeros(_POINTS))
        self.register_buffer("way", torch.linspace(0, 1, _POINTS, dtype=torch.float64))
        inputs = self.by_input.shape[0]
        self.register_buffer("centre", torch.zeros(inputs))
        self.register_buffer("scale", torch.ones(inputs))
        self.threshold: float | None = None  #: None: only exact zeros are left out
        self._base: tuple[int, Tensor] | None = None

    @torch.no_grad()
    def learn(self, x: Tensor) -> None:
        """Take centres, scales and quantiles from a sample of the inputs, ``[n, in]``."""
        self.centre.copy_(x.median(0).values)
        self.scale.copy_(self.by_input.float().norm(dim=1))
        ordered = ((x - self.centre).abs() * self.scale).flatten().sort().values
        places = torch.linspace(0, len(ordered) - 1, _POINTS).round().long()
        self.quantiles.copy_(ordered[places.to(ordered.device)])
        self.quantiles[0] = 0.0
        self._base = None

    def set_way(self, model: Sequence[float], own: Sequence[float]) -> None:
        """`own` is this layer's sparsity where the model's is `model`; both grow from 0 to 1."""
        self.way.copy_(_interpolate(torch.linspace(0, 1, _POINTS, dtype=torch.float64), model, own))

    def set_budget(self, budget: float) -> None:
        """The model may compute `budget` of its multiply-adds; this layer's share follows from the way."""
        self.set_sparsity(_lookup(self.way, 1 - budget))

    def set_sparsity(self, sparsity: float) -> None:
        """Leave out that share of the inputs, as the calibration data had them."""
        self.threshold = _lookup(self.quantiles.double(), sparsity) if sparsity > 0 else None

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in] -> [..., out]``."""
        by_input = self.by_input
        if by_kernel(x, by_input):
            if self.threshold is None:
                y, kept = native.thin(x, by_input, 0.0, self.bias)
            else:
                y, kept = native.thin(x, by_input, self.threshold, self._from_centres(), (self.centre, self.scale))
            if self.meter is not None:
                computed = torch.tensor([kept * (self.macs // x.shape[-1])], dtype=torch.float64)
                self.spend(computed, torch.full_like(computed, self.macs))
            return y
        if self.threshold is None:
            small = x == 0
        else:
            centre = self.centre.to(x.dtype)
            small = (x - centre).abs() * self.scale <= self.threshold
            x = torch.where(small, centre, x)
        if self.meter is not None:
            self._record(small)
        return self.linear(x)

    def _from_centres(self) -> Tensor:
        """``[out]``: what the layer makes of the centres, computed again when its weight has changed."""
        version = -1 if self.weight.is_inference() else self.weight._version
        if self._base is None or self._base[0] != version:
            base = self.centre @ self.by_input
            self._base = version, base if self.bias is None else base + self.bias
        return self._base[1]

    def _record(self, small: Tensor) -> None:
        outputs, inputs = self.macs // small.shape[-1], small.reshape(len(small) if small.dim() > 1 else 1, -1)
        kept = (~inputs).sum(1).double()
        self.spend(kept * outputs, torch.full_like(kept, inputs.shape[1] * outputs))


def _lookup(table: Tensor, at: float) -> float:
    """A table over [0, 1] in equal steps, between its points linearly."""
    place = min(max(at, 0.0), 1.0) * (len(table) - 1)
    low = min(int(place), len(table) - 2)
    first, second = table[low : low + 2].tolist()
    return first + (place - low) * (second - first)


def _interpolate(at: Tensor, x: Sequence[float], y: Sequence[float]) -> Tensor:
    """``y(at)`` on the polygon through ``(x, y)``, x growing."""
    xs, ys = torch.tensor(x, dtype=torch.float64), torch.tensor(y, dtype=torch.float64)
    right = torch.searchsorted(xs, at).clamp(1, len(xs) - 1)
    span = (xs[right] - xs[right - 1]).clamp(min=1e-12)
    share = ((at - xs[right - 1]) / span).clamp(0, 1)
    return ys[right - 1] + share * (ys[right] - ys[right - 1])
