"""Layer skipping: a small gate before each residual block says whether this input needs it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from secateur.data.batches import (
    Batch,
    Batches,
    arguments_of,
    first_batches,
    forward,
    output_tensor,
    samples_of,
    token_mask,
    token_mean,
)
from secateur.dynamic.dial import Dial
from secateur.dynamic.gate import Gate, recording
from secateur.dynamic.registry import DYNAMIC
from secateur.dynamic.rows import first_tensor, pick_rows, put_rows
from secateur.errors import ModelError, RecipeError
from secateur.graph import bypassing, removable_blocks, trace
from secateur.measure.macs import macs
from secateur.progress import track

POINTS = 17  #: thresholds at which costs are calibrated


class SkipGate(Gate):
    """A residual block that an input passes by where its predicted importance is below the dial's threshold.

    The importance, the logarithm of how much the model's output changes without the block, is predicted by a linear
    function of what the block is given: the means of an image's channels, or the first token. Members of a batch that skip
    are not computed.
    """

    mean: Tensor  #: ``[width]``, of the features
    weight: Tensor  #: ``[width]``
    bias: Tensor
    macs: Tensor  #: multiply-adds of the block on one input of the calibration data

    def __init__(self, block: nn.Module, width: int, dial: Dial):
        super().__init__()
        self.block, self.dial = block, dial
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("weight", torch.zeros(width))
        self.register_buffer("bias", torch.zeros(()))
        self.register_buffer("macs", torch.ones((), dtype=torch.float64))
        self.threshold: float | None = None  #: None: nothing is skipped, and nothing predicted

    def set_budget(self, budget: float) -> None:
        """All gates turn one dial."""
        self.threshold = None if budget >= 1 else -self.dial.setting(budget)

    def importance(self, x: Tensor) -> Tensor:
        """Predicted for each member of the batch, ``[batch]``."""
        return (features(x) - self.mean) @ self.weight + self.bias

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the block, which gives back a tensor of its input's shape."""
        if self.threshold is None:
            self._record(None, len(first_tensor((args, kwargs))))
            return self.block(*args, **kwargs)
        x = first_tensor((args, kwargs))
        needed = self.importance(x) >= self.threshold
        self._record(needed, len(x))
        if needed.all():
            return self.block(*args, **kwargs)
        if not needed.any():
            return x
        rows = needed.nonzero()[:, 0]
        args, kwargs = pick_rows((args, kwargs), rows, len(x))
        return put_rows(rows, self.block(*args, **kwargs), len(x), behind=x)

    def _record(self, needed: Tensor | None, size: int) -> None:
        if self.meter is None:
            return
        dense = self.macs.cpu().expand(size)
        if needed is None:
            self.spend(dense, dense)
        else:
            self.spend(dense * needed.cpu() + len(self.weight), dense)


def features(x: Tensor) -> Tensor:
    """``[batch, width]``: the channels' means of an image ``[n, c, h, w]``, the first token of a sequence ``[n, t, width]``."""
    if x.dim() == 4:
        return x.mean((2, 3))
    if x.dim() == 3:
        return x[:, 0]
    if x.dim() == 2:
        return x
    raise ModelError(f"skip can read images [n, c, h, w], tokens [n, t, width] and vectors; a block gets {tuple(x.shape)}")


@DYNAMIC.register(
    "skip",
    source="Wang et al. 2018, SkipNet, section 3; a block's importance as in Men et al. 2024, ShortGPT, by the output",
)
@dataclass(frozen=True, kw_only=True)
class Skip:
    """Inputs pass by residual blocks and transformer layers that would change little for them.

    For every input of the data and every block the importance is recorded: how far the model's output, without the block,
    points away from the one with it (1 - cosine). A linear gate, fitted by ridge regression to its logarithm, predicts it
    from what the block is given; blocks predicted below a threshold are skipped. One threshold serves all blocks and is the
    dial; its costs are measured with the gates at work. Nothing of the model is trained.

    Departures: SkipNet trains gates and network together by reinforcement. Tokens are judged by the first one, so a model
    that gathers in a CLS token is meant. Cost: a pass over `samples` inputs of the data for every block. `names` and
    `widths` are found from the model and the first batch, and may be given instead.
    """

    samples: int = 512
    ridge: float = 0.1
    names: Sequence[str] = ()
    widths: Sequence[int] = ()

    def __post_init__(self) -> None:
        if self.samples < 2:
            raise RecipeError(f"skip: samples={self.samples!r} must be at least 2")
        if not self.ridge > 0:
            raise RecipeError(f"skip: ridge={self.ridge!r} must be more than 0")

    def prepare(self, model: nn.Module, data: Batches) -> dict[str, Any]:
        """The blocks that can be skipped, and the width of what each is given."""
        batch = next(iter(data))
        names = list(self.names) or [block.name for block in removable_blocks(model, trace(model, arguments_of(batch)))]
        if not names:
            raise ModelError(
                f"skip needs residual blocks in a list, with outputs of their inputs' shape; a {type(model).__name__} has none"
            )
        widths: dict[str, int] = {}
        handles = []
        for name in names:

            def look(module: nn.Module, args: Any, kwargs: Any, out: Any, name: str = name) -> None:
                if not isinstance(out, Tensor):
                    raise ModelError(f"the block {name!r} gives back a {type(out).__name__}, which skip cannot make up")
                widths[name] = features(first_tensor((args, kwargs))).shape[1]

            handles.append(model.get_submodule(name).register_forward_hook(look, with_kwargs=True))
        try:
            forward(model, batch)
        finally:
            for handle in handles:
                handle.remove()
        return {"names": names, "widths": [widths[name] for name in names]}

    def attach(self, model: nn.Module) -> nn.Module:
        """Every named block becomes a `SkipGate`."""
        dial = Dial(POINTS)
        known = {name for name, _ in model.named_modules()}
        for name, width in zip(self.names, self.widths, strict=True):
            if name not in known:
                raise ModelError(f"skip: the model has no block {name!r}")
            model.set_submodule(name, SkipGate(model.get_submodule(name), width, dial))
        return model

    def calibrate(self, model: nn.Module, data: Batches) -> None:
        """Importance by block and input, a regression for each block, and the table of the dial."""
        gates = {name: module for name, module in model.named_modules() if isinstance(module, SkipGate)}
        batches = first_batches(data, self.samples)
        wanted, given = _importances(model, gates, batches)
        for gate, target, x in zip(gates.values(), wanted, given, strict=True):
            _fit(gate, x, target, self.ridge)
        _set_macs(model, list(gates.values()), batches[0])
        _measure(model, list(gates.values()), batches)


def _answer(model: nn.Module, batch: Batch) -> Tensor:
    """The model's output as vectors ``[batch, width]``: logits, or the mean over the tokens that are there."""
    out = output_tensor(forward(model, batch)).float()
    if out.dim() != 3:
        return out.flatten(1)
    return token_mean(out, token_mask(batch))


@torch.no_grad()
def _importances(model: nn.Module, gates: dict[str, SkipGate], batches: Sequence[Batch]) -> tuple[list[Tensor], list[Tensor]]:
    """For each block ``[n]`` importances, and the features ``[n, width]`` that it was given."""
    seen: dict[str, list[Tensor]] = {name: [] for name in gates}
    wanted: dict[str, list[Tensor]] = {name: [] for name in gates}
    handles = []
    for name, gate in gates.items():

        def look(module: nn.Module, args: Any, kwargs: Any, name: str = name) -> None:
            seen[name].append(features(first_tensor((args, kwargs))).float())

        handles.append(gate.register_forward_pre_hook(look, with_kwargs=True))
    try:
        dense = [_answer(model, batch) for batch in batches]
    finally:
        for handle in handles:
            handle.remove()
    for name in track(list(gates), "importance of blocks"):
        with bypassing(model, [name]):
            for batch, whole in zip(batches, dense, strict=True):
                change = 1 - torch.cosine_similarity(_answer(model, batch), whole, dim=1)
                wanted[name].append(change.clamp(min=1e-7).log())
    return [torch.cat(parts) for parts in wanted.values()], [torch.cat(parts) for parts in seen.values()]


@torch.no_grad()
def _fit(gate: SkipGate, x: Tensor, target: Tensor, ridge: float) -> None:
    """Ridge regression in float64; the penalty is `ridge` times the features' mean variance, for each sample."""
    mean, x64 = x.mean(0), (x - x.mean(0)).double()
    gram = x64.T @ x64
    gram.diagonal().add_(ridge * float(gram.diagonal().mean().clamp(min=1e-12)))
    y = (target - target.mean()).double()
    gate.mean.copy_(mean)
    gate.weight.copy_(torch.linalg.solve(gram, x64.T @ y))
    gate.bias.copy_(target.mean())


def _set_macs(model: nn.Module, gates: Sequence[SkipGate], batch: Batch) -> None:
    """Multiply-adds of each block on one input: by running the model with the others, and without it."""
    one = next(iter(samples_of(batch)))
    whole = macs(model, one).dense
    for gate in gates:
        gate.threshold = float("inf")
        with torch.no_grad():
            gate.macs.fill_(whole - macs(model, one).dense + len(gate.weight))
        gate.threshold = None


@torch.no_grad()
def _measure(model: nn.Module, gates: Sequence[SkipGate], batches: Sequence[Batch]) -> None:
    """The dial's settings are minus the thresholds: the first skips all, the last almost nothing."""
    found: dict[SkipGate, list[Tensor]] = {gate: [] for gate in gates}
    for batch in batches:
        handles = [
            gate.register_forward_pre_hook(
                lambda g, args, kwargs: found[g].append(g.importance(first_tensor((args, kwargs)))), with_kwargs=True
            )
            for gate in gates
        ]
        forward(model, batch)
        for handle in handles:
            handle.remove()
    values = torch.cat([torch.cat(parts) for parts in found.values()]).double()

    def cost(setting: float) -> float:
        for gate in gates:
            gate.threshold = -setting
        with recording(model) as costs:
            for batch in batches:
                forward(model, batch)
        return costs.mean

    gates[0].dial.measure(-float(values.max()) - 1, -float(values.min()) + 1, cost)
    for gate in gates:
        gate.threshold = None
