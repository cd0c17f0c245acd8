"""TEAL: activations near their median count as the median, and the columns they would have multiplied are not read."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from secateur.data.batches import Batches, first_of
from secateur.dynamic.blocks import block_lists, positions, recorded, run_all
from secateur.dynamic.registry import DYNAMIC
from secateur.dynamic.sparse_input import SparseInput
from secateur.errors import ModelError, RecipeError
from secateur.layers import find_layers
from secateur.progress import track
from secateur.stats.blocks import within
from secateur.stats.replay import Call, phase

_SAMPLE = 1 << 18  #: inputs of a layer from which its centres and quantiles are taken
_MOST = 0.95  #: sparsity beyond which the search raises no layer; from there on all go to 1 together


@DYNAMIC.register("teal", source="Liu et al. 2024, Training-Free Activation Sparsity in Large Language Models, algorithm 1")
@dataclass(frozen=True, kw_only=True)
class Teal:
    """Inputs that matter little are not read in any linear layer of the repeated blocks; nothing is trained.

    An input matters by its distance from its median on the calibration data, times the norm of the weights that read it; the
    threshold is a quantile of that. How sparse each layer of a block gets is chosen greedily: again and again, the layer that
    adds the least error to the block's output for each multiply-add saved gets `step` sparser. Then the blocks go their ways
    together, next the one whose error grows least. `positions` is how many positions the errors are measured on.

    Departures: the paper compares magnitudes alone and puts zero in their place (the norm of the weights is that of Chen et
    al. 2025, WINA), gives all blocks the same budget, and steps all layers by the same number of multiply-adds; here they
    step by the same sparsity and the error is divided by what the step saves. Errors are relative to the output of their
    position, as a few positions are huge. An error is measured again only when its turn comes. At batch 1 on a CPU, kernels
    of our own read only the columns of the inputs that are left. Cost: some hundred runs of each block on `positions`.
    """

    step: float = 0.1
    positions: int = 512

    def __post_init__(self) -> None:
        if not 0 < self.step <= 0.5:
            raise RecipeError(
                f"teal: step={self.step!r} is out of range: a layer's sparsity grows by more than 0 and at most 0.5"
            )
        if self.positions < 1:
            raise RecipeError(f"teal: positions={self.positions!r} must be at least 1")

    def attach(self, model: nn.Module) -> nn.Module:
        """Every linear layer of the repeated blocks becomes a `SparseInput`."""
        layers = find_layers(model)[0]
        for name in (name for names in block_lists(model) for block in names for name in within(block, layers)):
            layer = layers[name]
            if isinstance(layer.module, nn.Linear) or layer.swap:
                model.set_submodule(layer.module_name, SparseInput(layer.module, swap=layer.swap))
        return model

    def calibrate(self, model: nn.Module, data: Batches) -> None:
        """Quantiles of every gate, the allocation within each block, one after another on dense inputs, and between them."""
        for names in block_lists(model):
            blocks = [model.get_submodule(name) for name in names]
            calls, ways = recorded(model, names, data), []
            for block in track(blocks, "blocks", len(blocks)):
                gates = [m for m in block.modules() if isinstance(m, SparseInput)]
                with phase(model, 0):  # which puts buffers back: what is learnt is written after it
                    outputs, samples = _seen(block, gates, calls)
                for gate, seen in zip(gates, samples, strict=True):
                    gate.learn(seen)
                few = first_of(calls, self.positions, lambda call: call.hidden.shape[:-1].numel())
                with phase(model, 0):
                    ways.append(_allocation(block, gates, few, self.step))
                for call, output in zip(calls, outputs, strict=True):
                    call.proceed(output)
            _between_blocks(ways)


@dataclass(frozen=True)
class _Way:
    """How a block gets sparser: after each step the sparsity of each of its gates, and the error of its output."""

    gates: Sequence[SparseInput]
    points: Sequence[tuple[float, ...]]
    errors: Sequence[float]

    @property
    def macs(self) -> int:
        """Dense multiply-adds of the gates for one position."""
        return sum(gate.macs for gate in self.gates)

    @property
    def totals(self) -> list[float]:
        """The block's sparsity after each step."""
        return [sum(s * g.macs for s, g in zip(point, self.gates, strict=True)) / self.macs for point in self.points]


def _between_blocks(ways: Sequence[_Way]) -> None:
    """Let all blocks go their ways together, next the one whose error grows least for what it saves; gates learn the result."""
    whole = sum(way.macs for way in ways)
    steps = []
    for block, way in enumerate(ways):
        totals = way.totals
        hull = _hull(totals[:-1], way.errors)
        for low, high in pairwise(hull):
            slope = (way.errors[high] - way.errors[low]) / ((totals[high] - totals[low]) * way.macs)
            steps.append((slope, block, high))
    at, model, met = [0] * len(ways), [0.0], [[0] for _ in ways]
    for _, block, reached in [*sorted(steps), *((0.0, block, -1) for block in range(len(ways)))]:
        at[block] = reached if reached >= 0 else len(ways[block].points) - 1
        model.append(sum(way.totals[i] * way.macs for way, i in zip(ways, at, strict=True)) / whole)
        for points, i in zip(met, at, strict=True):
            points.append(i)
    for way, points in zip(ways, met, strict=True):
        for number, gate in enumerate(way.gates):
            gate.set_way(model, [way.points[i][number] for i in points])


def _hull(x: Sequence[float], y: Sequence[float]) -> list[int]:
    """Numbers of the points on the lower convex hull of ``(x, y)``, x growing."""
    found: list[int] = []
    for i in range(len(x)):
        while len(found) > 1 and _turn(x, y, found[-2], found[-1], i) <= 0:
            found.pop()
        found.append(i)
    return found


def _turn(x: Sequence[float], y: Sequence[float], a: int, b: int, c: int) -> float:
    return (x[b] - x[a]) * (y[c] - y[a]) - (y[b] - y[a]) * (x[c] - x[a])


def _seen(block: nn.Module, gates: Sequence[SparseInput], calls: Sequence[Call]) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs of the dense block on all calls, and for each gate a sample of its inputs, ``[n, in]``."""
    seen: dict[SparseInput, list[Tensor]] = {gate: [] for gate in gates}
    share = max(1, _SAMPLE // len(calls))

    def see(gate: SparseInput, x: Tensor) -> None:
        step = max(1, x.numel() // share)
        seen[gate].append(x[min(step // 2, len(x) - 1) :: step].float())  # not the first ones, which are unlike the others

    for gate in gates:
        gate.set_sparsity(0.0)
    outputs = run_all(block, calls, gates, see)
    if not all(seen.values()):
        raise ModelError("the data reaches no call of a linear layer of a block: its inputs are unknown")
    return outputs, [torch.cat(values) for values in seen.values()]


def _allocation(block: nn.Module, gates: Sequence[SparseInput], calls: Sequence[Call], step: float) -> _Way:
    """The layers' sparsities from 0 to 1, raised greedily one at a time.

    The error of a position counts relative to its output: what reads it is normalised, and a few positions are huge.
    """
    wanted = [positions(call.run(block), call.mask) for call in calls]

    def error() -> float:
        pairs = zip(calls, wanted, strict=True)
        return sum(_relative(positions(call.run(block), call.mask), y) for call, y in pairs)

    def raised(gate: int) -> float:
        return min(_MOST, sparsity[gate] + step)

    def growth(gate: int) -> float:
        gates[gate].set_sparsity(raised(gate))
        grown = error() - now
        gates[gate].set_sparsity(sparsity[gate])
        return grown / ((raised(gate) - sparsity[gate]) * weights[gate])

    weights = [gate.macs / sum(g.macs for g in gates) for gate in gates]
    sparsity, now, turn = [0.0] * len(gates), 0.0, 0
    points, errors = [tuple(sparsity)], [0.0]
    queue = [(growth(gate), gate, turn) for gate in range(len(gates))]
    heapq.heapify(queue)
    while queue:
        grown, gate, measured = heapq.heappop(queue)
        if measured < turn and queue:  # errors add up nearly, so that old figures say whose turn may have come
            heapq.heappush(queue, (growth(gate), gate, turn))
            continue
        turn += 1
        now += max(grown, 0.0) * (raised(gate) - sparsity[gate]) * weights[gate]
        sparsity[gate] = raised(gate)
        gates[gate].set_sparsity(sparsity[gate])
        points.append(tuple(sparsity))
        errors.append(now)
        if sparsity[gate] < _MOST:
            heapq.heappush(queue, (grown, gate, -1))
    points.append((1.0,) * len(gates))
    return _Way(gates, points, errors)


def _relative(found: Tensor, wanted: Tensor) -> float:
    """Sum over positions of the squared error, as a share of the squared norm."""
    error = (found - wanted).double().square().sum(-1)
    return float((error / wanted.double().square().sum(-1).clamp(min=1e-30)).sum())
