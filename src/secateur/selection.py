"""From statistics to masks: score, fold, allocate, choose. The path that every kind of pruning of weights takes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import IntTensor, Tensor, nn

from secateur.allocation import ALLOCATIONS
from secateur.criteria import CRITERIA, UNIT_CRITERIA
from secateur.errors import LayerError, NonFiniteError, RecipeError
from secateur.layers import Layer, check_finite, find_layers, non_finite_message
from secateur.patterns import REDUCTIONS, Units, make_pattern, reduce
from secateur.quadratic import output_error
from secateur.registry import Named, bind, name_of
from secateur.select import top
from secateur.solved import SolvedSoFar
from secateur.solvers import SOLVERS
from secateur.sparsity import check_sparsity
from secateur.types import LayerStats, MaskSet, Need, Pattern, Solution, Solved, UnitScores


@dataclass(frozen=True)
class Method:
    """A resolved way of choosing weights: every name looked up, every option checked, nothing computed yet."""

    criterion: Callable[[LayerStats], Tensor]
    criterion_name: str
    needs: frozenset[Need]  #: of the criterion
    in_turn: frozenset[Need]  #: what is collected a few layers at a time, on the model pruned so far
    reduction: str
    pattern: Pattern
    allocation: Callable[[Mapping[str, UnitScores], float], Mapping[str, IntTensor]]
    solver: Callable[..., Solution]
    compares: bool = True  #: whether the allocation looks at the scores of all layers
    curves: bool = False  #: whether it looks at the error curve of every layer

    @property
    def before(self) -> frozenset[Need]:
        """Of the criterion's needs those that are collected before the first layer is pruned."""
        return self.needs if self.compares else self.needs - self.in_turn


def resolve(
    *,
    criterion: Named = "magnitude",
    pattern: Named | Pattern = "element",
    allocation: Named | None = None,
    reduction: str | None = None,
    solver: Named = "keep",
) -> Method:
    """Look up and check the pieces of a method. The allocation defaults to global, or to uniform where the pattern fixes it."""
    made = make_pattern(pattern)
    if isinstance(made, Units):
        raise RecipeError(
            f"pattern {made.name!r} cuts units out and makes no masks: use sc.prune, or pattern 'neuron' for masks"
        )
    fixed = made.sparsity is not None
    name, allocate = bind(ALLOCATIONS, allocation or ("uniform" if fixed else "global"))
    if fixed and name != "uniform":
        raise RecipeError(
            f"pattern {made.name} fixes the sparsity of every group, so allocation {name!r} has nothing to decide. "
            "Leave the allocation out or use 'uniform'."
        )
    if name_of(criterion) in UNIT_CRITERIA:
        raise RecipeError(
            f"criterion {name_of(criterion)!r} scores whole units, which pattern {made.name!r} does not cut: "
            "use pattern='channel', 'ffn', 'head' or another that does"
        )
    criterion_name, score = bind(CRITERIA, criterion)
    facts = CRITERIA[criterion_name].facts
    solver_name, solve = bind(SOLVERS, solver)
    reduction = reduction or facts["reduction"]
    if reduction not in REDUCTIONS:
        reduce(torch.zeros(1, 1, 1), reduction)
    needs, in_turn = frozenset(facts["needs"]), frozenset(SOLVERS[solver_name].facts["needs"])
    if facts.get("in_turn") and Need.GRAD_SAMPLES not in in_turn:
        in_turn |= {Need.INPUT_NORM}
    looks = ALLOCATIONS[name].facts
    return Method(
        score, criterion_name, needs, in_turn, reduction, made, allocate, solve, looks.get("scores", True), "curves" in looks
    )


def target_sparsity(sparsity: object, pattern: Pattern) -> float:
    """The sparsity to reach: the one asked for, or the one that the pattern fixes."""
    if pattern.sparsity is None:
        if sparsity is None:
            raise RecipeError("sparsity is missing: give the fraction of weights to remove, such as sparsity=0.5")
        return check_sparsity(sparsity)
    if sparsity is not None and abs(check_sparsity(sparsity) - pattern.sparsity) > 1e-9:
        raise RecipeError(
            f"pattern {pattern.name} removes exactly {pattern.sparsity:g} of the weights; sparsity={sparsity!r} is another. "
            "Leave the sparsity out."
        )
    return pattern.sparsity


def prunable(
    model: nn.Module, pattern: Pattern, *, layers: Sequence[str] | None = None, ignore: Sequence[str] = ()
) -> tuple[dict[str, Layer], dict[str, str]]:
    """The layers to prune, and for each one that is left alone the reason: among them that its shape cannot have the pattern.

    Raises LayerError where none is left, and where a layer that `layers` asks for cannot have the pattern; UnknownName for
    names that match nothing; NonFiniteError for NaN or infinite weights.
    """
    found, skipped = find_layers(model, layers=layers, ignore=ignore)
    refusals = {n: pattern.refuses(layer.shape) for n, layer in found.items()}
    refused = {n: reason for n, reason in refusals.items() if reason is not None}
    if refused and layers is not None:
        name, why = next(iter(refused.items()))
        raise LayerError(f"the layer {name!r} was asked for, but cannot have pattern {pattern.name}: {why}")
    fit = {n: layer for n, layer in found.items() if n not in refused}
    if not fit:
        reasons = "; ".join(f"{n}: {r}" for n, r in list({**skipped, **refused}.items())[:5])
        raise LayerError(f"there is nothing to prune. {reasons or 'The model has no linear, convolution or recurrent layer'}.")
    check_finite(fit.values())
    return fit, {**skipped, **refused}


_KEPT = 1 << 25  # weights up to which scores are kept while an allocation goes over them several times: 128 MB
#: Scores and whether each unit was kept so far, both ``[groups, units]`` -> the scores to choose by.
Prefer = Callable[[Tensor, Tensor], Tensor]


def stays_removed(scores: Tensor, kept: Tensor) -> Tensor:
    """-inf where a unit was removed before: what is gone stays gone, and counts as removed."""
    below = kept.view(torch.int8).to(scores.dtype).reciprocal_().sub_(1)  # 0 or infinite: a fifth of the time of torch.where
    return torch.sub(scores, below, out=below)


class Scores(Mapping[str, UnitScores]):
    """Unit scores of every layer, computed one layer at a time whenever they are asked for; kept where all are small.

    What becomes of units that `previous` masks removed is up to `prefer`.
    """

    def __init__(
        self,
        layers: Mapping[str, Layer],
        stats: Mapping[str, LayerStats],
        method: Method,
        previous: MaskSet | None = None,
        prefer: Prefer = stays_removed,
    ):
        masks: Mapping[str, Tensor] = previous or {}
        keep = sum(layer.shape.numel() for layer in layers.values()) <= _KEPT
        self._units = {n: _units(layer, stats[n], method, masks.get(n), prefer, keep) for n, layer in layers.items()}

    def __getitem__(self, name: str) -> UnitScores:
        return self._units[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._units)

    def __len__(self) -> int:
        return len(self._units)


def _units(layer: Layer, stats: LayerStats, method: Method, mask: Tensor | None, prefer: Prefer, keep: bool) -> UnitScores:
    """What is asked for later holds the layer and its statistics alone: they go with it, and need no garbage collector."""
    groups, units, elements = method.pattern.fold(torch.empty(layer.shape, device="meta")).shape
    after = functools.partial(_preferred, layer, method, mask, prefer)
    compute: Callable[[], Tensor] = functools.partial(_scores, layer, stats, method, after)
    compute = functools.cache(compute) if keep else compute
    weigh = functools.partial(_magnitudes, stats, method, after)
    return UnitScores(layer.name, layer.shape, groups, units, elements, compute, stats.curve, weigh)


@torch.no_grad()
def _scores(layer: Layer, stats: LayerStats, method: Method, after: Callable[[Tensor], Tensor]) -> Tensor:
    saliency = method.criterion(stats)
    if saliency.shape != layer.shape:
        raise LayerError(
            f"criterion {method.criterion_name!r} gave shape {tuple(saliency.shape)} for the weight {layer.name!r} "
            f"of shape {tuple(layer.shape)}"
        )
    scores = reduce(method.pattern.fold(saliency), method.reduction).float()
    low, high = torch.aminmax(scores)
    if not (torch.isfinite(low) and torch.isfinite(high)):
        what = f"the scores of {layer.name!r} by criterion {method.criterion_name!r}"
        raise NonFiniteError(non_finite_message(what, scores))
    return after(scores)


@torch.no_grad()
def _magnitudes(stats: LayerStats, method: Method, after: Callable[[Tensor], Tensor]) -> Tensor:
    return after(reduce(method.pattern.fold(stats.weight.abs()), "sum").float())


def _preferred(layer: Layer, method: Method, mask: Tensor | None, prefer: Prefer, scores: Tensor) -> Tensor:
    """The scores with what `prefer` makes of units that were removed before."""
    if mask is None:
        return scores
    return prefer(scores, method.pattern.fold(layer.canonical(mask).to(scores.device)).any(2))


def choose(
    layers: Mapping[str, Layer],
    stats: Mapping[str, LayerStats],
    *,
    sparsity: float,
    method: Method,
    previous: MaskSet | None = None,
    prefer: Prefer = stays_removed,
) -> MaskSet:
    """Masks that remove `sparsity` of the units of `layers`, by the method; the solver's weights are not wanted.

    `previous` masks are respected: what they removed stays removed and counts towards the sparsity, unless `prefer` says
    otherwise.
    """
    scores = Scores(layers, stats, method, previous, prefer)
    counts = method.allocation(scores, sparsity)
    return to_masks(layers, method, {name: top(scores[name].scores, counts[name]) for name in layers})


def to_masks(layers: Mapping[str, Layer], method: Method, kept: Mapping[str, Tensor]) -> MaskSet:
    """The masks of kept units ``[groups, units]``; where the pattern removes whole outputs, of their biases too."""
    masks: dict[str, Tensor] = {}
    for name, layer in layers.items():
        _add_masks(masks, layer, method, method.pattern.unfold(kept[name], layer.shape))  # type: ignore[arg-type]
    return MaskSet(masks)


@torch.no_grad()
def solve(
    layers: Mapping[str, Layer],
    stats: Mapping[str, LayerStats],
    *,
    sparsity: float,
    method: Method,
    previous: MaskSet | None = None,
    known: Iterable[Mapping[str, LayerStats]] | None = None,
    so_far: SolvedSoFar | None = None,
) -> Solved:
    """As `choose`, and the solver writes the surviving weights into the model the layers belong to.

    `known` gives `stats` with what is collected in turn, a few layers at a time, and is asked for the next ones after the
    weights of these were written; the layers are solved in that order, and without it `stats` has to have all. How much each
    keeps is decided by `stats`, what it keeps by what is known in its turn. `so_far` holds what an earlier, stopped run
    solved, and is told of every layer.
    """
    counts = method.allocation(Scores(layers, stats, method, previous), sparsity)
    so_far = so_far or SolvedSoFar()
    so_far.write(layers)
    for part in known if known is not None else [stats]:
        scores = Scores({n: layers[n] for n in part}, part, method, previous)
        for name, layer_stats in part.items():
            so_far.add(name, *solve_layer(layers[name], layer_stats, scores[name], counts[name], method))
        so_far.save(layers)
    masks: dict[str, Tensor] = {}
    for name, layer in layers.items():
        _add_masks(masks, layer, method, layer.canonical(so_far.masks[name]))
        if layer.bias in masks:
            layer.module.bias.masked_fill_(~masks[layer.bias], 0)  # type: ignore[operator, union-attr, index]
    return Solved(MaskSet(masks), so_far.errors, tuple(so_far.notes))


def solve_layer(
    layer: Layer, stats: LayerStats, units: UnitScores, keep: IntTensor, method: Method
) -> tuple[Tensor, float | None, tuple[str, ...]]:
    """The solver's answer, written into the layer's parameter: mask as stored, relative output error if known, notes."""
    before = layer.canonical(layer.parameter.detach())
    solution = method.solver(before, units.scores, keep, method.pattern, stats)
    weight = solution.weight.to(layer.parameter.dtype)
    if not bool(torch.isfinite(weight.sum(dtype=torch.float32))):
        raise NonFiniteError(non_finite_message(f"the repaired weight {layer.name!r}", weight))
    error = None if stats.gram is None else output_error(stats.gram, before, weight)
    layer.parameter.copy_(layer.stored(weight))
    return layer.stored(solution.mask), error, solution.notes


def _add_masks(masks: dict[str, Tensor], layer: Layer, method: Method, mask: Tensor) -> None:
    masks[layer.name] = layer.stored(mask)
    if method.pattern.whole_outputs and layer.bias is not None:
        masks[layer.bias] = mask.flatten(1).any(1)
