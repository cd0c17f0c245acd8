"""The decision network of Runtime Neural Pruning: pooled features in, one value for each number of groups out."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from secateur.dynamic.dial import Dial

PRICES = (0.02, 10.0)  #: lowest and highest that it learns with, in loss for all multiply-adds of the gated convolutions
ENDS = (1e-4, 1e6)  #: prices at which nearly all and nothing is worth computing
POINTS = 24  #: prices at which costs are calibrated


class Decider(nn.Module):
    """Goes with the image from gate to gate, and tells each how many channel groups to compute, 0 to `groups`.

    The state of a gate is the mean over the positions of what it is given; an encoder, shared by the gates with as many
    channels, brings it to `hidden` numbers, and a recurrent cell, shared by all, remembers what earlier gates saw. The
    value of computing k groups is ``Q(s, k) = -price * share(k) + V(s) + A(s, k)``: what they cost is known, the rest is
    learnt. The price, loss per share of the dense multiply-adds, is an input, so that one network serves every budget.
    """

    shares: Tensor  #: ``[gates]``: multiply-adds of each gate's two convolutions, of those of all gates

    def __init__(self, channels: Sequence[int], groups: int, hidden: int, lowest: float, seed: int):
        super().__init__()
        self.channels, self.groups, self.lowest = list(channels), groups, lowest
        generator = Generator().manual_seed(seed)
        self.encoders = nn.ParameterDict({str(c): _small(generator, hidden, c) for c in sorted(set(channels))})
        self.place = nn.Parameter(torch.zeros(len(channels), hidden))
        self.priced = nn.Parameter(_small(generator, hidden, 3))
        self.cell = nn.Parameter(_small(generator, hidden, 2 * hidden))
        self.head = nn.Parameter(_small(generator, groups + 2, hidden))
        self.usual = nn.Parameter(torch.zeros(len(channels), groups + 2))
        self.dial = Dial(POINTS)
        self.register_buffer("shares", torch.full((len(channels),), 1 / len(channels)))
        self.full = True  #: whether everything is computed and nobody asks
        self.price = 0.0
        self.explore: Generator | None = None  #: draws choices where there is one
        self.epsilon = 0.0  #: share of the choices that are drawn
        self.floor = lowest  #: least share of the groups that random choices take on average
        self.trace: list[tuple[Tensor, Tensor]] | None = None  #: pooled features and choices of gates, while somebody learns
        self._memory: Tensor | None = None
        self._level: Tensor | None = None

    def set_budget(self, budget: float) -> None:
        """The lowest price at which the calibration data cost at most `budget` on average. 1 is the dense network."""
        if budget < 1:
            self.price = math.exp(-self.dial.setting(budget))
        self.full = budget >= 1

    def choose(self, gate: int, x: Tensor) -> int | Tensor:
        """Groups that gate number `gate` computes of ``x [batch, channels, h, w]``: one number, or ``[batch]``."""
        if self.full:
            return self.groups
        pooled = x.mean((2, 3))
        values = self._ranked(gate, pooled) if isinstance(self.price, float) else self.values(gate, pooled, self.price)
        if self.explore is None and len(x) == 1:
            return int(values.argmax())
        chosen = values.argmax(1)
        if self.explore is not None:
            drawn = self._drawn(gate, len(x), self.explore, x.device)
            other = torch.rand(len(x), generator=self.explore).to(x.device) < self.epsilon
            chosen = torch.where(other, drawn, chosen)
        if self.trace is not None:
            self.trace.append((pooled, chosen))
        return chosen

    @torch.no_grad()
    def draw(self, gate: int, x: Tensor) -> Tensor:
        """Choices ``[batch]`` while the network trains: by the values at `price`, and drawn where `epsilon` has it."""
        drawn = self._drawn(gate, len(x), None, x.device)
        if self.epsilon >= 1:
            return drawn
        if gate == 0:
            self.price = self.any_price(len(x)).to(x.device)
        chosen = self.values(gate, x.mean((2, 3)), self.price).argmax(1)
        return torch.where(torch.rand(len(x), device=x.device) < self.epsilon, drawn, chosen)

    def any_price(self, count: int, generator: Generator | None = None) -> Tensor:
        """Prices ``[count]`` of random budgets of `lowest` to 1; before costs are known, of any height."""
        spread = torch.rand(count, generator=generator, dtype=torch.float64)
        if not self.dial.costs.any():
            return PRICES[0] * (PRICES[1] / PRICES[0]) ** spread
        return (-self.dial.between((self.lowest + (1 - self.lowest) * spread).to(self.dial.costs.device))).exp()

    def values(self, gate: int, pooled: Tensor, price: float | Tensor) -> Tensor:
        """``Q`` of each choice, ``[batch, groups + 1]``; remembers the state for the gate behind."""
        priced = torch.as_tensor(price, dtype=pooled.dtype, device=pooled.device).reshape(-1, 1)
        encoded = F.linear(pooled, self.encoders[str(self.channels[gate])], self.place[gate])
        self._remember(gate, encoded + F.linear(_features(priced), self.priced))
        out = F.linear(self._memory, self.head, self.usual[gate])  # type: ignore[arg-type]
        paid = priced * self.shares[gate] * self._steps(pooled)
        later = priced * self.shares[gate + 1 :].sum() / 2
        return out[:, 1:] - out[:, 1:].mean(1, keepdim=True) + out[:, :1] - paid - later

    def _ranked(self, gate: int, pooled: Tensor) -> Tensor:
        """`values` at the one price of the dial, but for a sum that is the same for all choices."""
        if gate not in self._fixed:
            priced = torch.full((1, 1), float(self.price), dtype=pooled.dtype, device=pooled.device)
            shift = (self.place[gate] + F.linear(_features(priced), self.priced)[0]).detach()
            usual = (self.usual[gate, 1:] - priced[0] * self.shares[gate] * self._steps(pooled)).detach()
            self._fixed[gate] = shift, usual, self.head[1:].detach()
        shift, usual, head = self._fixed[gate]
        return F.linear(self._remember(gate, F.linear(pooled, self.encoders[str(self.channels[gate])], shift)), head, usual)

    def _remember(self, gate: int, encoded: Tensor) -> Tensor:
        """The memory ``[batch, hidden]`` after this gate."""
        if gate == 0 or self._memory is None:
            self._memory = torch.zeros_like(encoded)
        self._memory = torch.tanh(F.linear(torch.cat([torch.relu(encoded), self._memory], 1), self.cell))
        return self._memory

    @property
    def price(self) -> float | Tensor:
        """One for all inputs, or one for each, ``[batch]``."""
        return self._price

    @price.setter
    def price(self, value: float | Tensor) -> None:
        self._price, self._fixed = value, dict[int, tuple[Tensor, Tensor, Tensor]]()

    def _steps(self, like: Tensor) -> Tensor:
        return torch.arange(self.groups + 1, device=like.device, dtype=like.dtype) / self.groups

    def _drawn(self, gate: int, count: int, generator: Generator | None, device: torch.device) -> Tensor:
        """Random choices: each member has a level of its own, and a gate takes all, nothing, or some groups in between."""

        def rand(*shape: int) -> Tensor:
            return torch.rand(*shape, generator=generator).to(device)

        if gate == 0 or self._level is None:
            self._level = self.floor + (1 - self.floor) * rand(count)
        some = (rand(count, self.groups) < self._level[:, None]).sum(1)
        whole = (rand(count) < self._level) * self.groups
        return torch.where(rand(count) < 0.5, some, whole)

    def macs(self, gate: int) -> int:
        """Multiply-adds of deciding at one gate."""
        return self.encoders[str(self.channels[gate])].numel() + self.cell.numel() + self.head.numel() + self.priced.numel()


def _features(price: Tensor) -> Tensor:
    """``[1 or batch, 3]``: the price, its logarithm, and its root, as the network takes them."""
    p = price.clamp(*PRICES)
    return torch.cat([p, p.log() / 4, p.sqrt()], 1)


def _small(generator: Generator, rows: int, columns: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(rows, columns, generator=generator) / columns**0.5)
