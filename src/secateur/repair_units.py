"""Repair after a cut that needs no training: layers that lost inputs make up for them with those that they kept.

The cut model is gone through layer by layer in the order of its forward pass, so that each layer is fitted on the inputs
that the layers repaired before it really give, and makes up for what they could not.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from secateur.data.batches import Batch, Batches, forward
from secateur.layers import Layer, find_layers
from secateur.memory import portions, total_memory
from secateur.progress import track
from secateur.stats import nonfinite
from secateur.stats.follow import Sight, follow
from secateur.stats.gram import input_rows, output_rows
from secateur.stats.guard import listed, untouched
from secateur.stats.reads import Reads, reads_of
from secateur.types import Plan

log = logging.getLogger("secateur")

#: Strengths of the pull towards the old weights, in mean squares of the inputs; infinite leaves the weights as they are.
PULLS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, float("inf"))
#: A BatchNorm that shrinks a channel to less than this share of the largest one passes no error on to the layer before it.
_FAINT = 1e-2
_MEMORY = 0.1  # of the machine's memory that the dense model's outputs may take at a time


@dataclass(frozen=True)
class Refit:
    """New values of parameters and buffers of the cut model, by name, and what the report shall say."""

    tensors: Mapping[str, Tensor]
    notes: tuple[str, ...]


def refit(
    model: nn.Module, smaller: nn.Module, plan: Plan, batches: Batches, *, bias_only: bool = False, seed: int = 0
) -> Refit:
    """The weights with which `smaller`, which `plan` made of `model`, comes nearest to what `model` gives.

    Every linear layer and convolution that lost inputs is fitted in turn by least squares: its inputs X are those of the
    smaller model, repaired so far, and its target Y is the output of the same layer of `model` (He, Zhang and Sun 2017,
    Channel pruning for accelerating very deep neural networks, section 3.2). Where the output goes into a sum with another
    tensor, as at the end of a residual block, the target is what makes the *sum* equal to that of `model`, so that each
    block corrects the errors of those before it; a BatchNorm in between is taken back (the paper's section 3.3 differs
    by giving the whole error to the last layer of a block without regard to its BatchNorm).

        min |W X + b - Y|^2 + p |W - W_0|^2

    with the weights W_0 of the cut. The pull p is chosen among `PULLS` by how well the fit on one half of each batch does
    on the other half, and the reverse; no repair is among the choices. The shift b goes to the layer's bias or, where it has
    none, into the running mean of the BatchNorm that follows; without either there is none. With `bias_only` W stays W_0.

    The batches are read once and kept, with as much of the dense model's outputs at a time as a tenth of the memory holds.
    `model` is left untouched; the parameters of `smaller` are changed as well as returned. Layers whose inputs cannot be read
    stay as they are, and a note names them. Raises what reading the batches raises, and NonFiniteError.

        found = refit(model, smaller, plan, Batches(data))
        found.tensors["fc2.weight"]          # [kept outputs, kept inputs]
    """
    lines = {(c.tensor, c.dim): torch.tensor(c.kept) for c in plan.cuts}
    layers, small = find_layers(model)[0], find_layers(smaller)[0]
    lost = [n for n, layer in layers.items() if (n, layer.stored_dim(1)) in lines and n in small]
    tensors: dict[str, Tensor] = {}
    with ExitStack() as stack:
        stack.enter_context(untouched(model, [], seed))
        stack.enter_context(untouched(smaller, [], seed))
        stack.enter_context(torch.no_grad())
        kept = list(track(batches, "read the calibration data"))
        reads = reads_of(model, batches, seed)
        steps = _order(smaller, {n: small[n] for n in lost if small[n].reads_input}, kept[0])
        if bias_only:
            steps = [step for step in steps if step.shift is not None]
        for some in portions(steps, lambda step: step.bytes, _MEMORY * total_memory() / len(kept)):
            wanted = _wanted(model, {s.layer.name: layers[s.layer.name] for s in some}, lines, kept, reads)
            for step in some:
                moments = step.look(smaller, kept, [batch.pop(step.layer.name) for batch in wanted], reads)
                tensors |= step.write(smaller, moments, bias_only)
    left = [n for n in lost if n not in {step.layer.name for step in steps}]
    notes = [f"these layers lost inputs and were not repaired, as they have no bias or show no inputs: {listed(left)}"]
    return Refit(tensors, tuple(notes if left else ()))


@dataclass
class _Moments:
    """Of inputs, of which the last is always 1, and of targets. float64."""

    inputs: Tensor  #: ``[groups, d + 1, d + 1]``
    across: Tensor  #: ``[groups, d + 1, out]``
    targets: Tensor  #: sums of squares of the targets, ``[groups, out]``

    def __add__(self, other: _Moments) -> _Moments:
        return _Moments(self.inputs + other.inputs, self.across + other.across, self.targets + other.targets)

    def add(self, x: Tensor, y: Tensor) -> None:
        """Rows ``[groups, n, d]`` and ``[groups, n, out]``."""
        x = nn.functional.pad(x.float(), (0, 1), value=1.0)
        y = y.float()
        self.inputs += (x.mT @ x).double()
        self.across += (x.mT @ y).double()
        self.targets += y.double().square().sum(1)

    def error(self, solution: Tensor) -> float:
        """Sum of squared errors of ``[groups, out, d + 1]``."""
        fitted = ((solution @ self.inputs - 2 * self.across.mT) * solution).sum()
        return float(self.targets.sum() + fitted)

    def solve(self, start: Tensor, pull: float, shift: bool) -> Tensor:
        """``[groups, out, d + 1]``: weights near `start`, ``[groups, out, d]``, and in the last column the shift, or 0."""
        count = self.inputs[:, -1:, -1:]
        second, cross = self.inputs[:, :-1, :-1] / count, self.across[:, :-1] / count
        mean, wanted = self.inputs[:, :-1, -1:] / count, self.across[:, -1:] / count
        if shift:
            second, cross = second - mean @ mean.mT, cross - mean @ wanted
        weight = start
        if pull != float("inf"):
            level = pull * second.diagonal(dim1=1, dim2=2).mean(1).clamp_min(torch.finfo(torch.float32).tiny)
            second = second + torch.diag_embed(level[:, None].expand(-1, second.shape[1]))
            weight = start + torch.linalg.solve(second, cross - second @ start.mT + level[:, None, None] * start.mT).mT
        last = wanted.mT - weight @ mean if shift else torch.zeros_like(wanted.mT)
        return torch.cat([weight, last], 2)


@dataclass
class _Step:
    """A layer of the smaller model to be repaired, and what its forward pass shows of it."""

    layer: Layer
    calls: int
    summed: bool  #: whether the output goes into a sum in every call
    bytes: int  #: of its outputs in a batch
    shift: str | None  #: the parameter or buffer that takes the shift
    sign: int

    def look(
        self, smaller: nn.Module, batches: list[Batch], wanted: list[list[_Wanted]], reads: Reads | None
    ) -> tuple[_Moments, _Moments]:
        """Moments over the first half of each batch and over the second: inputs of `smaller`, targets from the dense model."""
        groups = int(getattr(self.layer.module, "groups", 1))
        out, d = self.layer.shape[0] // groups, self.layer.shape[1:].numel()
        shapes = ((d + 1, d + 1), (d + 1, out), (out,))
        one, two = (
            _Moments(*(self.layer.parameter.new_zeros(groups, *s, dtype=torch.float64) for s in shapes)) for _ in range(2)
        )
        for index, batch in enumerate(track(batches, f"repair {self.layer.name}")):
            sights = follow(smaller, {self.layer.name: self.layer}, batch, self._enough, reads)
            for sight, aim in zip(sights, wanted[index], strict=True):
                target = _target(sight, aim)
                half, start = target.shape[1] // 2, 0
                for x in input_rows(sight.call):
                    first = min(max(half - start, 0), x.shape[1])
                    one.add(x[:, :first], target[:, start : start + first])
                    two.add(x[:, first:], target[:, start + first : start + x.shape[1]])
                    start += x.shape[1]
            if not torch.isfinite(one.across.sum() + two.across.sum()):
                nonfinite.explain(smaller, partial(forward, smaller, batch), index)
        return one, two

    def _enough(self, sights: list[Sight]) -> bool:
        return len(sights) >= self.calls and not (self.summed and any(s.tip is not None for s in sights))

    def write(self, smaller: nn.Module, halves: tuple[_Moments, _Moments], bias_only: bool) -> dict[str, Tensor]:
        """The fitted values, which are written into `smaller` too."""
        parameter = self.layer.parameter
        old = self.layer.canonical(parameter.detach())
        groups = len(halves[0].inputs)
        start = old.double().reshape(groups, len(old) // groups, -1)
        shift = self.shift is not None
        pull = float("inf") if bias_only else _choose(halves, start, shift)
        log.debug("%s: pull %g", self.layer.name, pull)
        found = (halves[0] + halves[1]).solve(start, pull, shift)
        new = {self.layer.name: self.layer.stored(found[:, :, :-1].reshape(old.shape)).to(parameter.dtype)}
        if self.shift is not None:
            place = _tensors(smaller)[self.shift]
            last = found[:, :, -1].reshape(-1)
            new[self.shift] = (last if self.sign > 0 else place.double() - last).to(place.dtype)
        write(smaller, new)
        return new


def _choose(halves: tuple[_Moments, _Moments], start: Tensor, shift: bool) -> float:
    """The pull whose fits on either half are best on the other; a half of fewer rows than inputs still has its say."""
    one, two = halves

    def error(pull: float) -> float:
        return two.error(one.solve(start, pull, shift)) + one.error(two.solve(start, pull, shift))

    return min(PULLS, key=error)


@dataclass(frozen=True)
class _Wanted:
    """What one call of a layer leads to in the dense model: its outputs that are kept, or those of the sum they go into."""

    rows: Tensor  #: ``[groups, n, out / groups]``
    summed: bool


def _wanted(
    model: nn.Module,
    layers: Mapping[str, Layer],
    lines: Mapping[tuple[str, int], Tensor],
    batches: list[Batch],
    reads: Reads | None,
) -> list[dict[str, list[_Wanted]]]:
    """For each batch the calls of each of `layers` in the dense model."""
    found = []
    for batch in track(batches, "outputs of the dense model"):
        calls: dict[str, list[_Wanted]] = {name: [] for name in layers}
        for sight in follow(model, layers, batch, lambda _: False, reads):
            output = sight.output if sight.total is None else sight.total
            rows = lines.get((sight.layer, layers[sight.layer].stored_dim(0)))
            if rows is not None:
                output = output.index_select(sight.axis, rows.to(output.device))
            calls[sight.layer].append(_Wanted(output_rows(sight.call, output).contiguous(), sight.total is not None))
        found.append(calls)
    return found


def _target(sight: Sight, wanted: _Wanted) -> Tensor:
    """``[groups, n, out / groups]``: what the layer is to give in this call."""
    if not wanted.summed:
        return wanted.rows
    assert sight.total is not None
    output, missing = output_rows(sight.call, sight.output), wanted.rows - output_rows(sight.call, sight.total)
    slope = sight.slope()
    if slope is None:
        return output + missing
    slope = slope.reshape(len(output), 1, -1)
    clear = slope.abs() > _FAINT * slope.abs().max()
    return output + torch.where(clear, missing / slope, 0)


def _order(model: nn.Module, layers: Mapping[str, Layer], batch: Batch) -> list[_Step]:
    """The layers that a forward pass reaches, in the order of their first calls."""
    sights = follow(model, layers, batch, lambda _: False)
    norms = {m: f"{n}.running_mean" for n, m in model.named_modules() if getattr(m, "running_mean", None) is not None}
    taken: dict[nn.Module, int] = {}
    for sight in sights:
        if sight.norm is not None:
            taken[sight.norm] = taken.get(sight.norm, 0) + 1
    steps = []
    for name in dict.fromkeys(s.layer for s in sights):
        own = [s for s in sights if s.layer == name]
        shift, sign = layers[name].bias, 1
        after = {s.norm for s in own}
        norm = next(iter(after))
        if shift is None and len(after) == 1 and norm is not None and taken[norm] == len(own):
            shift, sign = norms[norm], -1
        size = sum(4 * output_rows(s.call, s.output).numel() for s in own)
        steps.append(_Step(layers[name], len(own), all(s.total is not None for s in own), size, shift, sign))
    return steps


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))


def write(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy values of parameters and buffers into `model`, by name."""
    own = _tensors(model)
    with torch.no_grad():
        for name, value in tensors.items():
            own[name].copy_(value)
