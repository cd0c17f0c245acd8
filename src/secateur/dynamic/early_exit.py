"""Early exit: small heads after some of the blocks, and an input leaves at the first that is sure enough."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from secateur.data.batches import Batch, Batches, forward, labels_of, output_tensor, samples_of, token_mask, token_mean
from secateur.dynamic.around import Around
from secateur.dynamic.blocks import spread
from secateur.dynamic.dial import Dial
from secateur.dynamic.gate import Gate
from secateur.dynamic.registry import DYNAMIC
from secateur.dynamic.rows import first_tensor, pick_rows, put_rows
from secateur.errors import DataError, ModelError, RecipeError
from secateur.measure.macs import macs
from secateur.progress import track

POINTS = 33  #: thresholds at which costs are calibrated


class _Left(Exception):
    """Ends a forward pass in which every member of the batch has left."""


class EarlyExit(Around, Gate):
    """A classifier with heads behind some of its blocks. An input whose confidence at a head is high enough leaves there.

    The confidence is the largest probability of the head's softmax at a temperature fitted on held-out data. Members of a
    batch that left are not computed any more in the blocks that follow.
    """

    temperature: Tensor  #: ``[heads]``
    costs: Tensor  #: ``[heads + 1]``: multiply-adds of an input that leaves at each head, and of one that goes to the end
    dense: Tensor  #: multiply-adds without heads

    def __init__(self, model: nn.Module, places: Sequence[str], widths: Sequence[int], hidden: int, classes: int, logits: bool):
        super().__init__()
        self.model, self.places, self.logits = model, list(places), logits
        self.heads = nn.ModuleList(_Head(width, hidden, classes) for width in widths)
        count = len(self.places)
        self.register_buffer("temperature", torch.ones(count))
        self.register_buffer("costs", torch.ones(count + 1, dtype=torch.float64))
        self.register_buffer("dense", torch.ones((), dtype=torch.float64))
        self.dial = Dial(POINTS)
        self.threshold: float | None = None  #: None: the heads are not asked
        self.forced: int | None = None  #: number of the head at which every input leaves, sure or not

    def set_budget(self, budget: float) -> None:
        """The highest threshold at which the held-out data cost at most `budget` on average. 1 is the model without heads."""
        self.threshold = None if budget >= 1 else self.dial.setting(budget)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the model; where all members of the batch left early, only the logits are there."""
        size = len(first_tensor((args, kwargs)))
        if self.threshold is None and self.forced is None:
            self._record(torch.full((size,), len(self.places)), self.dense)
            return self.model(*args, **kwargs)
        run = _Run(self, size, token_mask(kwargs))
        try:
            with run.watching():
                output = self.model(*args, **kwargs)
        except _Left:
            output = None
        self._record(run.left_at, self.costs[-1])
        return self._joined(run, output)

    def _record(self, left_at: Tensor, whole: Tensor) -> None:
        if self.meter is not None:
            costs = torch.cat([self.costs[:-1].cpu(), whole.cpu().reshape(1)])[left_at]
            self.spend(costs, torch.full_like(costs, float(self.dense)))

    def _joined(self, run: _Run, output: Any) -> Any:
        """The model's output, in which the logits of those that left are their heads'."""
        if output is None:
            return _Logits(run.logits) if self.logits else run.logits
        early = run.left_at < len(self.places)
        if not early.any():
            return output
        logits = output_tensor(output)
        logits[early] = run.logits[early].to(logits.dtype)
        return output

    def confidence(self, head: int, logits: Tensor) -> Tensor:
        """``[batch, classes] -> [batch]``."""
        return (logits / self.temperature[head]).softmax(1).amax(1)


class _Head(nn.Module):
    """Pooled features, standardised, through one hidden layer."""

    mean: Tensor
    scale: Tensor

    def __init__(self, width: int, hidden: int, classes: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("scale", torch.ones(width))
        self.first, self.second = nn.Linear(width, hidden), nn.Linear(hidden, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first((x - self.mean) * self.scale)))


class _Logits(dict[str, Tensor]):
    """What takes the place of a Hugging Face output: ``.logits`` and ``["logits"]``."""

    def __init__(self, logits: Tensor):
        super().__init__(logits=logits)
        self.logits = logits


class _Run:
    """One forward pass: who is still there, and what those that left said."""

    def __init__(self, gate: EarlyExit, size: int, mask: Tensor | None):
        self.gate, self.size, self.mask = gate, size, mask
        self.left_at = torch.full((size,), len(gate.places))
        self.logits = torch.empty(0)
        self.rows: Tensor | None = None  #: members that are still there, None for all

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Hooks on the blocks, gone afterwards: each is given the members that are still there, and a head may follow."""
        gate, handles = self.gate, []
        number = {name: i for i, name in enumerate(gate.places)}
        blocks = _blocks(gate.model)
        try:
            for name in blocks[blocks.index(gate.places[0]) :]:
                block = gate.model.get_submodule(name)
                if name != gate.places[0]:
                    handles.append(block.register_forward_pre_hook(self._before, with_kwargs=True))
                handles.append(block.register_forward_hook(functools.partial(self._after, number.get(name))))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _before(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        return None if self.rows is None else pick_rows((args, kwargs), self.rows, self.size)

    def _after(self, at: int | None, module: nn.Module, args: Any, output: Any) -> Any:
        rows = self.rows
        if at is not None:
            self._ask(at, first_tensor(output))
        return output if rows is None else put_rows(rows, output, self.size)

    def _ask(self, at: int, x: Tensor) -> None:
        """Let members leave at head `at`; ``x`` has those that are there."""
        gate, rows = self.gate, torch.arange(self.size, device=x.device) if self.rows is None else self.rows
        mask = None if self.mask is None else self.mask[rows]
        logits = gate.heads[at](pooled(x, mask))
        if gate.forced is not None:
            sure = torch.full((len(x),), gate.forced == at, device=x.device)
        else:
            sure = gate.confidence(at, logits) >= (gate.threshold or 0.0)
        if not len(self.logits):
            self.logits = logits.new_zeros(self.size, logits.shape[1])
        self.logits[rows[sure]] = logits[sure]
        self.left_at[rows[sure].cpu()] = at
        if sure.all():
            raise _Left
        if sure.any():
            self.rows = rows[~sure]


def pooled(x: Tensor, mask: Tensor | None = None) -> Tensor:
    """Means over a 2 x 2 grid of an image ``[n, c, h, w]``, or over the tokens ``[n, t, c]`` that `mask` says are there."""
    if x.dim() == 4:
        return F.adaptive_avg_pool2d(x, 2).flatten(1)
    if x.dim() != 3:
        raise ModelError(
            f"a block gives a tensor of shape {tuple(x.shape)}; a head can read images [n, c, h, w] and tokens [n, t, c]"
        )
    return token_mean(x, mask)


def _blocks(model: nn.Module) -> list[str]:
    """Names of the model's blocks in order: children with layers of their own of its outermost lists."""
    found: list[str] = []

    def visit(path: str, module: nn.Module) -> None:
        for key, child in module.named_children():
            name = f"{path}.{key}" if path else key
            composite = any(True for _ in child.children()) and any(True for _ in child.parameters())
            if (
                isinstance(module, (nn.ModuleList, nn.Sequential))
                and composite
                and not isinstance(child, (nn.Sequential, nn.ModuleList))
            ):
                found.append(name)
            else:
                visit(name, child)

    visit("", model)
    return found


@DYNAMIC.register(
    "early_exit",
    source="Teerapittayanon et al. 2016, BranchyNet, section 3; confidences as in Guo et al. 2017, On Calibration of Modern "
    "Neural Networks, section 4.2",
)
@dataclass(frozen=True, kw_only=True)
class Exits:
    """Inputs that are easy leave a classifier early, at the first of `exits` small heads that is sure enough.

    Heads stand behind blocks evenly spaced over the depth of any CNN or transformer that lists its blocks. They are trained
    for `steps` steps on pooled features of two thirds of the data, to say what the labels say, or the model where there are
    none; the model itself is not trained. On the last third a temperature is fitted for each head, so that its confidence
    is how often it is right, and costs are measured for every threshold; one threshold on the confidence serves all heads
    and is the dial.

    Departures: BranchyNet trains heads and network together and asks for low entropy; here a head can be added to any
    trained network in seconds, and confidences of different heads mean the same. Cost: one pass over the data. `places`,
    `widths`, `classes` and `logits` are found from the model and its first batch, and may be given instead.
    """

    exits: int = 3
    hidden: int = 64
    steps: int = 600
    seed: int = 0
    places: Sequence[str] = ()
    widths: Sequence[int] = ()
    classes: int = 0
    logits: bool = False

    def __post_init__(self) -> None:
        for name, low in {"exits": 1, "hidden": 1, "steps": 1}.items():
            if getattr(self, name) < low:
                raise RecipeError(f"early_exit: {name}={getattr(self, name)!r} must be at least {low}")

    def prepare(self, model: nn.Module, data: Batches) -> dict[str, Any]:
        """The options with what the model and its first batch tell."""
        blocks = _blocks(model)
        names = list(self.places) or [blocks[i] for i in spread(len(blocks), self.exits)]
        if not names:
            raise ModelError(f"early_exit puts heads behind the blocks of a list; a {type(model).__name__} lists none")
        batch, widths = next(iter(data)), dict[str, int]()
        with watched(model, names, lambda name, x: widths.setdefault(name, pooled(x).shape[1])):
            output = forward(model, batch)
        out = output_tensor(output)
        if out.dim() != 2:
            raise ModelError(
                f"early_exit needs a classifier with logits [batch, classes]; the output has shape {tuple(out.shape)}"
            )
        found = {"places": names, "widths": [widths[n] for n in names], "classes": out.shape[1]}
        return {**found, "logits": not isinstance(output, Tensor)}

    def attach(self, model: nn.Module) -> nn.Module:
        """The model in an `EarlyExit`."""
        for name in self.places:
            if not any(name == known for known, _ in model.named_modules()):
                raise ModelError(f"early_exit: the model has no block {name!r}")
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            return EarlyExit(model, self.places, self.widths, self.hidden, self.classes, self.logits)

    def calibrate(self, model: nn.Module, data: Batches) -> None:
        """Heads, temperatures, costs; everything of the gate, nothing of the model."""
        assert isinstance(model, EarlyExit)
        features, wanted = _features(model, data)
        count = len(wanted)
        split = max(1, count * 2 // 3) if count > 2 else count
        for head, x in zip(track(list(model.heads), "heads"), features, strict=True):
            _fit(head, x[:split], wanted[:split], self.steps, self.seed)  # type: ignore[arg-type]
        held = slice(split if split < count else 0, None)
        _measure_costs(model, next(iter(data)))
        with torch.no_grad():
            logits = [head(x[held]) for head, x in zip(model.heads, features, strict=True)]
            for at, own in enumerate(logits):
                model.temperature[at] = _temperature(own, wanted[held])
            sure = torch.stack([model.confidence(at, own) for at, own in enumerate(logits)])

        def cost(threshold: float) -> float:
            stays = (sure < threshold).long().cumprod(0).sum(0).cpu()
            return float(model.costs.cpu()[stays].mean() / model.dense.cpu())

        model.dial.measure(0.0, 1.0, cost)


@contextmanager
def watched(model: nn.Module, names: Sequence[str], see: Any) -> Iterator[None]:
    """``see(name, x)`` with what each of the named blocks passes on."""
    handles = []
    for name in names:

        def look(module: nn.Module, args: Any, out: Any, name: str = name) -> None:
            see(name, first_tensor(out))

        handles.append(model.get_submodule(name).register_forward_hook(look))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def _features(gate: EarlyExit, data: Batches) -> tuple[list[Tensor], Tensor]:
    """Pooled features at each place ``[n, width]``, and the labels or what the model says ``[n]``."""
    seen: dict[str, list[Tensor]] = {name: [] for name in gate.places}
    wanted: list[Tensor] = []
    for batch in track(data, "features"):
        mask = token_mask(batch)
        with watched(gate.model, gate.places, lambda name, x, mask=mask: seen[name].append(pooled(x, mask).float())):
            out = output_tensor(forward(gate.model, batch))
        labels = labels_of(batch)
        wanted.append(out.argmax(1) if labels is None or labels.is_floating_point() else labels.to(out.device))
    return [torch.cat(parts) for parts in seen.values()], torch.cat(wanted)


def _fit(head: _Head, x: Tensor, wanted: Tensor, steps: int, seed: int) -> None:
    """AdamW with a cosine to zero, batches of 256."""
    if int(wanted.max()) >= head.second.out_features:
        raise DataError(f"a label is {int(wanted.max())}, but the model knows {head.second.out_features} classes")
    with torch.no_grad():
        head.mean.copy_(x.mean(0))
        head.scale.copy_(1 / x.std(0, correction=0).clamp(min=1e-6))
    generator = Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(head.parameters(), lr=3e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    with torch.enable_grad():
        for _ in range(steps):
            rows = torch.randint(len(x), (min(256, len(x)),), generator=generator).to(x.device)
            loss = F.cross_entropy(head(x[rows]), wanted[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()


def _temperature(logits: Tensor, wanted: Tensor) -> float:
    """Of a grid from 1/4 to 8, the one with the least cross-entropy."""
    grid = [2 ** (i / 8) for i in range(-16, 25)]
    return min(grid, key=lambda t: float(F.cross_entropy(logits / t, wanted)))


def _measure_costs(gate: EarlyExit, batch: Batch) -> None:
    """Multiply-adds of one input up to each head, with all heads before it, and to the end with all heads and with none."""
    one = next(iter(samples_of(batch)))
    gate.dense.fill_(macs(gate, one).dense)
    costs = []
    try:
        for head in range(len(gate.places) + 1):
            gate.forced = head
            costs.append(macs(gate, one).dense)
    finally:
        gate.forced = None
    gate.costs.copy_(torch.tensor(costs, dtype=torch.float64))
