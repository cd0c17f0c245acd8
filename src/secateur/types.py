"""The frozen data that every part shares. Nothing here computes more than a sum, and nothing of ours is imported."""

from __future__ import annotations

import dataclasses
import enum
import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Protocol, runtime_checkable

import torch
from torch import BoolTensor, IntTensor, Tensor, nn


class Need(enum.Enum):
    """A statistic that a criterion or a solver asks the calibration pass for. The value is the `LayerStats` field."""

    WEIGHT = "weight"  #: the weight itself: always there, needs no data
    GRAD = "grad"  #: mean over samples of the loss gradient
    GRAD_SQ = "grad_sq"  #: mean over samples of the squared per-sample loss gradient (the empirical Fisher diagonal)
    GRAD_SAMPLES = "grad_samples"  #: loss gradients of single samples, or of small groups of them, kept apart
    GRAD_ONE = "grad_one"  #: loss gradient of the first batch only (SNIP)
    HESSIAN_GRAD = "hessian_grad"  #: Hessian times mean gradient (GraSP)
    SYNFLOW_GRAD = "synflow_grad"  #: gradient of SynFlow's R: all-ones input through the network of absolute weights
    INPUT_NORM = "input_norm"  #: l2 norm of each input feature over all samples and positions
    GRAM = "gram"  #: X X^T over all samples and positions, ``[groups, d, d]`` with d = in * kernel
    NORM_SCALE = "norm_scale"  #: |gamma| of the normalisation that follows the layer
    OUTPUT = "output"  #: statistics of the layer's output
    MOVEMENT = "movement"  #: sum over training steps of minus gradient times weight

    @property
    def data(self) -> bool:
        """Whether calibration batches are needed for it."""
        return self not in (Need.WEIGHT, Need.SYNFLOW_GRAD, Need.NORM_SCALE)

    @property
    def training(self) -> bool:
        """Whether the backward passes of a training give it on the way, so that gradual pruning needs no calibration."""
        return self in (Need.WEIGHT, Need.GRAD, Need.GRAD_SQ, Need.GRAD_ONE, Need.MOVEMENT)


@dataclass(frozen=True)
class LayerStats:
    """What is known of one layer's weight when it is scored.

    All tensors are float32 and in canonical orientation: ``[out, in, *kernel]`` whatever the module stores. `input_norm`
    broadcasts against the weight. `grad_samples` is ``[rows, *shape of the weight]``: mean gradients of groups of
    `row_samples` samples times the root of that number. `gram` is ``[groups, in * kernel, in * kernel]``: the inputs of the
    g-th equal share of the outputs; layers that share their input share the tensor. A statistic that nobody collected is
    None, and `need` turns that into an error.
    """

    name: str
    weight: Tensor
    grad: Tensor | None = None
    grad_sq: Tensor | None = None
    grad_samples: Tensor | None = None
    row_samples: Tensor | None = None
    grad_one: Tensor | None = None
    hessian_grad: Tensor | None = None
    synflow_grad: Tensor | None = None
    input_norm: Tensor | None = None
    gram: Tensor | None = None
    norm_scale: Tensor | None = None
    output: Tensor | None = None
    movement: Tensor | None = None
    curve: Mapping[float, float] | None = None  #: relative output error by sparsity, for allocations that ask for it
    groups: int = 1  #: into how many equal shares the outputs fall that have inputs of their own (grouped convolutions)
    samples: int = 0  #: how many samples the statistics saw
    seed: int = 0  #: seed of criteria that draw numbers; already mixed with the layer's position

    def need(self, which: Need) -> Tensor:
        """The statistic `which`, or a LookupError that names the layer and the missing statistic."""
        value = getattr(self, which.value)
        if value is None:
            raise LookupError(f"layer {self.name!r} has no statistic {which.value!r}: declare it in the criterion's needs")
        return value


class UnitNeed(enum.Enum):
    """A statistic of whole units, from calibration batches, that a unit criterion asks for. The value is a `UnitStats` name."""

    ACTIVATION_NORM = "activation_norm"  #: l2 norm of the unit's activations over all samples and positions
    GATE_ABS = "gate_abs"  #: mean over samples of |derivative of the loss by a factor on the whole unit|
    GATE_SQ = "gate_sq"  #: mean over samples of its square
    VISUAL_RATIO = "visual_ratio"  #: of heads, for each sample: attention of text to visual positions, over that to all others
    BLOCK_CHANGE = "block_change"  #: 1 - cosine of a block's input and output, mean over positions
    BLOCK_LOSS = "block_loss"  #: how much the loss rises when the block is bypassed

    @property
    def data(self) -> bool:
        """Whether calibration batches are needed for it: always."""
        return True


@dataclass(frozen=True)
class UnitStats:
    """What is known of the units of a group in one of the tensors that they have slices in. Float32, units first.

    `weight` is ``[units, elements]``, `visual_ratio` ``[units, samples]``, all else ``[units]``. Of whole
    blocks there is no weight: its `elements` are 0.
    """

    name: str
    weight: Tensor
    activation_norm: Tensor | None = None
    gate_abs: Tensor | None = None
    gate_sq: Tensor | None = None
    visual_ratio: Tensor | None = None
    block_change: Tensor | None = None
    block_loss: Tensor | None = None

    def need(self, which: UnitNeed) -> Tensor:
        """The statistic `which`, or a LookupError that names the tensor and the missing statistic."""
        value = getattr(self, which.value)
        if value is None:
            raise LookupError(f"{self.name!r} has no statistic {which.value!r}: declare it in the criterion's needs")
        return value.clone()


@runtime_checkable
class Pattern(Protocol):
    """How the elements of a weight fold into removable units, and the groups within which units compete."""

    @property
    def name(self) -> str:
        """As users write it: ``element``, ``2:4``."""
        ...

    @property
    def sparsity(self) -> float | None:
        """The sparsity that the pattern itself fixes (n:m), or None where the user chooses."""
        ...

    @property
    def whole_outputs(self) -> bool:
        """Whether a unit is all of an output, so that its bias goes with it."""
        ...

    def refuses(self, shape: torch.Size) -> str | None:
        """The reason why a canonical weight of this shape cannot have the pattern, or None where it can."""

    def fold(self, weight: Tensor) -> Tensor:
        """Canonical ``[out, in, *kernel]`` -> ``[groups, units, elements]``. A view where strides allow it."""

    def unfold(self, keep: BoolTensor, shape: torch.Size) -> BoolTensor:
        """``[groups, units]`` -> mask of `shape`: the inverse of `fold` for unit-wise values."""


@dataclass(frozen=True)
class UnitScores:
    """One layer as an allocation sees it. `scores` is computed at each access, one layer held at a time; or kept, if small."""

    name: str
    shape: torch.Size  #: canonical shape of the weight
    groups: int
    units: int  #: in each group
    elements: int  #: weights that one unit stands for
    compute: Callable[[], Tensor]
    curve: Mapping[float, float] | None = None  #: relative output error by sparsity, where the allocation asked for it
    weigh: Callable[[], Tensor] | None = None

    def magnitudes(self) -> Tensor:
        """As `scores`, by the sum of the magnitudes of a unit's weights, whatever the criterion."""
        if self.weigh is None:
            raise LookupError(f"layer {self.name!r} was made without its weights")
        return self.weigh()

    @property
    def scores(self) -> Tensor:
        """Float32 ``[groups, units]``, higher = keep, -inf where the unit was removed before."""
        return self.compute()

    @property
    def total(self) -> int:
        """Units in all groups."""
        return self.groups * self.units

    @functools.cached_property
    def left(self) -> int:
        """Units in all groups that were not removed before: more than these must not be kept. Computes the scores, once."""
        return self.total - int(torch.isneginf(self.scores).sum())


#: Lazy mapping of layer name to scores, and a sparsity in [0, 1) -> units kept in each group, ``[groups]`` for each layer.
Allocation = Callable[[Mapping[str, UnitScores], float], Mapping[str, IntTensor]]
#: Progress 0..1 and the target sparsity -> the sparsity to have at that moment.
Schedule = Callable[[float, float], float]


#: Bytes of an element -> the integer type as wide.
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits_of(tensor: Tensor) -> Tensor:
    """The tensor's memory as integers of the same width. Their product with a mask is an exact +0.0, fast, even of NaN."""
    return tensor.view(INTEGERS[tensor.element_size()])


class MaskSet(Mapping[str, BoolTensor]):
    """Immutable masks by parameter name, True = kept, each in the shape its parameter is stored in."""

    def __init__(self, masks: Mapping[str, Tensor]):
        for name, mask in masks.items():
            if mask.dtype != torch.bool:
                raise TypeError(f"mask {name!r} must be a bool tensor, got {mask.dtype}")
        self._masks = MappingProxyType(dict(masks))

    def __getitem__(self, name: str) -> BoolTensor:
        return self._masks[name]  # type: ignore[return-value]

    def __iter__(self) -> Iterator[str]:
        return iter(self._masks)

    def __len__(self) -> int:
        return len(self._masks)

    def __repr__(self) -> str:
        return f"MaskSet({len(self)} layers, density {self.density():.4f})" if self else "MaskSet(empty)"

    def kept(self) -> int:
        """Number of weights kept, over all masks."""
        return sum(int(m.count_nonzero()) for m in self.values())

    def total(self) -> int:
        """Number of weights masked or not, over all masks."""
        return sum(m.numel() for m in self.values())

    def density(self, name: str | None = None) -> float:
        """Fraction kept, of one mask or of all."""
        masks = self if name is None else MaskSet({name: self[name]})
        return masks.kept() / masks.total() if masks.total() else 1.0

    def sparsity(self, name: str | None = None) -> float:
        """Fraction removed, of one mask or of all."""
        return 1.0 - self.density(name)

    def __and__(self, other: Mapping[str, Tensor]) -> MaskSet:
        return self._combine(other, torch.logical_and)

    def __or__(self, other: Mapping[str, Tensor]) -> MaskSet:
        return self._combine(other, torch.logical_or)

    def _combine(self, other: Mapping[str, Tensor], op: Callable[[Tensor, Tensor], Tensor]) -> MaskSet:
        if set(self) != set(other):
            raise ValueError(f"mask sets differ in layers: {sorted(set(self) ^ set(other))}")
        return MaskSet({name: op(self[name], other[name]) for name in self})

    def diff(self, other: Mapping[str, Tensor]) -> dict[str, int]:
        """Positions whose mask differs, by layer; layers without a difference are left out."""
        differing = {n: int((self[n] != other[n]).sum()) for n in self.keys() & other.keys()}
        return {name: count for name, count in differing.items() if count}

    @torch.no_grad()
    def apply(self, model: nn.Module) -> None:
        """Zero the removed weights of `model` in place, and whatever NaN they held with them."""
        parameters = dict(model.named_parameters(remove_duplicate=False))
        for name, mask in self.items():
            if name not in parameters:
                raise KeyError(f"the model has no parameter {name!r}; the mask was made for another model")
            if parameters[name].shape != mask.shape:
                raise ValueError(f"parameter {name!r} is {tuple(parameters[name].shape)}, its mask {tuple(mask.shape)}")
            bits_of(parameters[name]).mul_(mask.to(parameters[name].device))


@dataclass(frozen=True)
class Solution:
    """What a solver found for one layer: mask and weight in canonical shape, zero wherever the mask is False."""

    mask: BoolTensor
    weight: Tensor
    notes: tuple[str, ...] = ()  #: what went another way than the plain one; the report repeats it


class Solver(Protocol):
    """Chooses the mask and the surviving weights of one layer together. Weight, scores and results are canonical."""

    def __call__(self, weight: Tensor, scores: Tensor, keep: IntTensor, pattern: Pattern, stats: LayerStats) -> Solution:
        """`scores [groups, units]`, -inf where removed before, and `keep [groups]` -> mask of exact counts, and weight."""
        ...


@dataclass(frozen=True)
class Solved:
    """Masks of layers that were solved, and what there is to say about it."""

    masks: MaskSet
    errors: Mapping[str, float] = field(default_factory=dict)  #: relative output error, where the Gram matrix was known
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Cut:
    """Keep only `kept` indices of dimension `dim` of the parameter or buffer `tensor`."""

    tensor: str
    dim: int
    kept: tuple[int, ...]


@dataclass(frozen=True)
class LayerPlan:
    """What a plan does to one layer."""

    name: str
    shape: tuple[int, ...]
    parameters: int
    kept: int
    pattern: str
    why: str = ""  #: for coupled layers, with whom and through what

    @property
    def sparsity(self) -> float:
        """Fraction removed."""
        return 1.0 - self.kept / self.parameters if self.parameters else 0.0


@dataclass(frozen=True)
class Budget:
    """What a pruned model was allowed to cost, what was promised, and what was found when it was there."""

    asked: str  #: as it was written: ``50% MACs``
    unit: str  #: params, MACs, bytes or ms
    dense: float  #: cost of the model before
    limit: float
    promised: float
    achieved: float | None = None  #: None = not measured, as in a plan
    low: float | None = None  #: of ms the quartiles of what was achieved
    high: float | None = None


@dataclass(frozen=True)
class GroupPlan:
    """Units that are cut alike everywhere: who is coupled to whom, through what, and how many stay."""

    kind: str
    units: int
    kept: int
    members: tuple[str, ...]  #: ``tensor:dim`` of every slice that goes with a unit
    links: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  #: "added in", "made by", ... -> names of modules
    reason: str | None = None  #: why it cannot be cut at all


@dataclass(frozen=True)
class Rewrite:
    """Size number `argument` of the expression `call` in a module's forward becomes a number, since no attribute can follow it.

    `value` is ``-1`` in a reshape, which then finds the size by itself, or the number that stood there before the cut.
    """

    module: str
    functions: tuple[str, ...]  #: the method that was called, and the functions down to the one that holds the call
    line: int  #: of the expression, counted from the line of that function's ``def``
    column: int
    argument: int
    call: str  #: the source of the expression; where it is another by now, the plan does not hold
    value: int = -1


@dataclass(frozen=True)
class Plan:
    """What would be done: how many weights go where, which slices are cut, and what is left alone and why."""

    layers: tuple[LayerPlan, ...] = ()
    cuts: tuple[Cut, ...] = ()
    skipped: Mapping[str, str] = field(default_factory=dict)  #: layer -> reason
    attributes: Mapping[str, int] = field(default_factory=dict)  #: ``module.attribute`` or ``module.attribute[i]`` -> new value
    dropped: tuple[str, ...] = ()  #: whole blocks that are taken out, after the cuts
    rewrites: tuple[Rewrite, ...] = ()  #: reshapes in forwards whose sizes no attribute gives
    groups: tuple[GroupPlan, ...] = ()  #: what is coupled to what, where units are cut
    budget: Budget | None = None  #: where one was given

    @property
    def structural(self) -> bool:
        """Whether the model that it makes has other tensors than the original: something is cut out, not masked."""
        return bool(self.cuts or self.dropped)

    @property
    def sparsity(self) -> float:
        """Fraction removed, over the layers of the plan."""
        total = sum(p.parameters for p in self.layers)
        return 1.0 - sum(p.kept for p in self.layers) / total if total else 0.0

    def to_json(self) -> dict[str, Any]:
        """Plain lists and dicts, as `from_json` reads them."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Plan:
        """The plan that `to_json` wrote."""
        layers = tuple(LayerPlan(**{**p, "shape": tuple(p["shape"])}) for p in data["layers"])
        cuts = tuple(Cut(c["tensor"], int(c["dim"]), tuple(c["kept"])) for c in data["cuts"])
        attributes, dropped = dict(data.get("attributes", {})), tuple(data.get("dropped", ()))
        groups = tuple(
            GroupPlan(**{**g, "members": tuple(g["members"]), "links": {how: tuple(at) for how, at in g["links"].items()}})
            for g in data.get("groups", ())
        )
        rewrites = tuple(Rewrite(**{**r, "functions": tuple(r["functions"])}) for r in data.get("rewrites", ()))
        budget = Budget(**data["budget"]) if data.get("budget") else None
        return cls(layers, cuts, dict(data["skipped"]), attributes, dropped, rewrites, groups, budget)


@dataclass(frozen=True)
class Latency:
    """Median wall-clock time of one forward pass, and the conditions without which it means nothing."""

    median_ms: float
    low_ms: float  #: 25th percentile
    high_ms: float  #: 75th percentile
    runs: int
    batch: int
    threads: int
    dtype: str
    device: str


@dataclass(frozen=True)
class Measurement:
    """Sizes, cost and quality of one model. None = not measured, with the reason in the report's notes."""

    parameters: int
    nonzeros: int
    bytes_memory: int  #: parameters and buffers as they lie in memory
    bytes_disk: int | None = None  #: what `sc.save` writes for the weights
    macs: int | None = None  #: multiply-adds of one forward pass of the example, dense
    macs_nonzero: int | None = None  #: the same, counting only nonzero weights
    latency: Latency | None = None
    quality: Mapping[str, float] = field(default_factory=dict)  #: what `evaluate` returned


@dataclass(frozen=True)
class LayerReport:
    """One layer after pruning."""

    name: str
    shape: tuple[int, ...]
    parameters: int
    kept: int
    pattern: str
    error: float | None = None  #: relative output error on the calibration data, where a solver measured it
    histogram_before: tuple[tuple[float, ...], tuple[int, ...]] | None = None  #: bin edges, counts
    histogram_after: tuple[tuple[float, ...], tuple[int, ...]] | None = None  #: the same edges, of nonzero weights
    picture: tuple[tuple[float, ...], ...] | None = None  #: local density of the mask, at most 64x64 cells

    @property
    def sparsity(self) -> float:
        """Fraction removed."""
        return 1.0 - self.kept / self.parameters if self.parameters else 0.0


@dataclass(frozen=True)
class Sensitivity:
    """Quality of the model when only `layer` is pruned to `sparsity`; `quality` runs parallel to it."""

    layer: str
    sparsity: tuple[float, ...]
    quality: tuple[float, ...]


@dataclass(frozen=True)
class Point:
    """One model on the accuracy-versus-sparsity curve."""

    label: str  #: method it belongs to: points of one label form a curve
    sparsity: float
    quality: float
    parameters: int | None = None
    macs: int | None = None
    bytes_disk: int | None = None
    latency_ms: float | None = None


@dataclass(frozen=True)
class DialPoint:
    """A model with gates at one budget: what its inputs cost on average and each, and its quality."""

    budget: float
    cost: float  #: mean share of the dense multiply-adds of the gated parts
    quality: float
    counts: tuple[int, ...]  #: inputs by their share, in equal steps from 0 to 1; the last counts what is above, too
    own: bool = False  #: whether it is the budget that the model was left at


@dataclass(frozen=True)
class Report:
    """Everything needed to show what pruning cost and won. Plain data: `to_json` and `from_json` lose nothing."""

    title: str
    before: Measurement
    after: Measurement
    metric: str | None = None  #: name of the quality that the curves show; higher is better unless it says loss or perplexity
    layers: tuple[LayerReport, ...] = ()
    skipped: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    sensitivity: tuple[Sensitivity, ...] = ()
    points: tuple[Point, ...] = ()
    recipe: str = ""  #: TOML
    environment: Mapping[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    budget: Budget | None = None  #: what the model was allowed to cost, where that was asked for
    dial: tuple[DialPoint, ...] = ()  #: of a model with gates, by falling budget

    def to_json(self) -> dict[str, Any]:
        """Plain lists and dicts, as `from_json` reads them."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Report:
        """The report that `to_json` wrote. Raises KeyError or TypeError where `data` is none."""
        data = dict(data)
        for key in ("before", "after"):
            m = dict(data[key])
            m["latency"] = Latency(**m["latency"]) if m.get("latency") else None
            data[key] = Measurement(**m)
        data["layers"] = tuple(_layer_report(x) for x in data["layers"])
        data["sensitivity"] = tuple(
            Sensitivity(s["layer"], tuple(s["sparsity"]), tuple(s["quality"])) for s in data["sensitivity"]
        )
        data["points"] = tuple(Point(**p) for p in data["points"])
        data["notes"] = tuple(data["notes"])
        data["budget"] = Budget(**data["budget"]) if data.get("budget") else None
        data["dial"] = tuple(DialPoint(**{**p, "counts": tuple(p["counts"])}) for p in data.get("dial", ()))
        return cls(**data)


def _layer_report(data: Mapping[str, Any]) -> LayerReport:
    values = {**data, "shape": tuple(data["shape"])}
    for key in ("histogram_before", "histogram_after"):
        if values[key] is not None:
            edges, counts = values[key]
            values[key] = (tuple(edges), tuple(counts))
    if values["picture"] is not None:
        values["picture"] = tuple(tuple(row) for row in values["picture"])
    return LayerReport(**values)


@dataclass(frozen=True)
class Result:
    """What `sc.prune` returns: the pruned model, its masks, the plan that was carried out and the report."""

    model: nn.Module
    masks: MaskSet
    plan: Plan
    report: Report
