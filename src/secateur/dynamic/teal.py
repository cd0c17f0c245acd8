"""TEAL: small activations are zeroed before each linear layer, and the columns they would have multiplied are not read."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from secateur.data.batches import Batches
from secateur.dynamic.blocks import block_lists, positions, recorded, run_all
from secateur.dynamic.registry import DYNAMIC
from secateur.dynamic.sparse_input import SparseInput
from secateur.errors import ModelError, RecipeError
from secateur.layers import find_layers
from secateur.progress import track
from secateur.stats.blocks import within
from secateur.stats.replay import Call, phase

_SAMPLE = 1 << 18  #: magnitudes of a layer's inputs from which its quantiles are taken
_MOST = 0.95  #: sparsity beyond which the search raises no layer; from there on all go to 1 together


@DYNAMIC.register("teal", source="Liu et al. 2024, Training-Free Activation Sparsity in Large Language Models, algorithm 1")
@dataclass(frozen=True, kw_only=True)
class Teal:
    """Activations below a threshold count as zero in every linear layer of the repeated blocks; nothing is trained.

    A threshold is a quantile of the input's magnitudes on the calibration data. How sparse each layer of a block gets is
    chosen greedily: again and again, the layer that adds the least error to the block's output for each multiply-add saved
    gets `step` sparser. All blocks get the same budget. `positions` is how many positions the errors are measured on.

    The paper steps all layers by the same number of multiply-adds; here they step by the same sparsity and the error is
    divided by what the step saves, and an error is measured again only when its turn comes. At batch 1 on a CPU, kernels of
    our own read only the columns of the inputs that are left. Cost: some hundred runs of each block on `positions`.
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
        """Quantiles of every gate, then the allocation within each block, block after block on dense inputs."""
        for names in block_lists(model):
            blocks = [model.get_submodule(name) for name in names]
            calls = recorded(model, names, data)
            for block in track(blocks, "blocks", len(blocks)):
                gates = [m for m in block.modules() if isinstance(m, SparseInput)]
                with phase(model, 0):  # which puts buffers back: what is learnt is written after it
                    outputs, magnitudes = _seen(block, gates, calls)
                for gate, seen in zip(gates, magnitudes, strict=True):
                    gate.learn(seen)
                with phase(model, 0):
                    way = _allocation(block, gates, _some(calls, self.positions), self.step)
                shares = [gate.macs / sum(g.macs for g in gates) for gate in gates]
                total = [sum(w * s for w, s in zip(shares, point, strict=True)) for point in way]
                for gate, own in zip(gates, zip(*way, strict=True), strict=True):
                    gate.set_way(total, own)
                for call, output in zip(calls, outputs, strict=True):
                    call.proceed(output)


def _seen(block: nn.Module, gates: Sequence[SparseInput], calls: Sequence[Call]) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs of the dense block on all calls, and for each gate a sample of the magnitudes of its inputs."""
    seen: dict[SparseInput, list[Tensor]] = {gate: [] for gate in gates}
    share = max(1, _SAMPLE // len(calls))

    def see(gate: SparseInput, x: Tensor) -> None:
        values = x.abs().flatten()
        seen[gate].append(values[:: max(1, values.numel() // share)].float())

    for gate in gates:
        gate.set_sparsity(0.0)
    outputs = run_all(block, calls, gates, see)
    if not all(seen.values()):
        raise ModelError("the data reaches no call of a linear layer of a block: its inputs are unknown")
    return outputs, [torch.cat(values) for values in seen.values()]


def _allocation(block: nn.Module, gates: Sequence[SparseInput], calls: Sequence[Call], step: float) -> list[tuple[float, ...]]:
    """The layers' sparsities from 0 to 1, raised greedily one at a time."""
    wanted = [positions(call.run(block), call.mask) for call in calls]

    def error() -> float:
        pairs = zip(calls, wanted, strict=True)
        return sum(float((positions(call.run(block), call.mask) - y).double().square().sum()) for call, y in pairs)

    def raised(gate: int) -> float:
        return min(_MOST, sparsity[gate] + step)

    def growth(gate: int) -> float:
        gates[gate].set_sparsity(raised(gate))
        grown = error() - now
        gates[gate].set_sparsity(sparsity[gate])
        return grown / ((raised(gate) - sparsity[gate]) * weights[gate])

    weights = [gate.macs / sum(g.macs for g in gates) for gate in gates]
    sparsity, now, turn = [0.0] * len(gates), 0.0, 0
    way = [tuple(sparsity)]
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
        way.append(tuple(sparsity))
        if sparsity[gate] < _MOST:
            heapq.heappush(queue, (grown, gate, -1))
    way.append((1.0,) * len(gates))
    return way


def _some(calls: Sequence[Call], count: int) -> list[Call]:
    """The first calls that have at least `count` positions together, or all."""
    chosen: list[Call] = []
    for call in calls:
        if count <= 0:
            break
        count -= call.hidden.shape[:-1].numel()
        chosen.append(call)
    return chosen
