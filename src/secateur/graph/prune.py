"""Choose which units go, and remove them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from secateur.errors import LayerError, ModelError, RecipeError, UnknownName
from secateur.graph.cut import cut
from secateur.graph.graph import KINDS, Graph, Group, trace
from secateur.graph.plan import make_plan
from secateur.graph.verify import difference
from secateur.layers import find_layers, matches
from secateur.types import Plan

#: ``l1``; a callable ``(name, canonical weight) -> saliency``; or saliencies by parameter name. Higher = keep.
Scores = Literal["l1"] | Callable[[str, Tensor], Tensor] | Mapping[str, Tensor]
Reduction = Literal["sum", "mean", "l2", "max"]

#: A cut model's output may differ from the masked original's by this much, relative to its largest value.
TOLERANCE = 1e-4


def prune_channels(
    model: nn.Module,
    example: Any,
    sparsity: float,
    scores: Scores = "l1",
    *,
    kinds: Sequence[str] = ("channel", "neuron"),
    ignore: Sequence[str] = (),
    round_to: int = 1,
    min_width: int = 1,
    scope: Literal["local", "global"] = "local",
    reduction: Reduction = "mean",
    verify: bool = True,
) -> tuple[nn.Module, Plan]:
    """A smaller copy of `model` with the fraction `sparsity` of its units removed, and the plan that was carried out.

    `scope` says whether units compete within their group (local) or with all others (global). `kinds` are the kinds of
    units to remove (see `Group`), `ignore` names or shell patterns of parameters or modules to leave as they are, `round_to`
    the multiple that widths are rounded to, and `reduction` how the saliencies of a unit's coupled slices make its score.
    Unless `verify` is off, the result is compared on the example with the original in which the same units are masked.
    Raises RecipeError for a sparsity out of [0, 1), UnknownName where `ignore` matches nothing, LayerError where nothing can
    be cut, and ModelError where the forward fails or the comparison does.

    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> smaller, plan = prune_channels(model, torch.randn(1, 4), sparsity=0.5)
    >>> smaller[0]
    Linear(in_features=4, out_features=4, bias=True)
    """
    graph = trace(model, example)
    groups = choose_groups(graph, kinds, ignore)
    if not groups:
        reason = next((g.reason for g in graph.groups if g.reason and g.kind in kinds), "it has no units of these kinds")
        raise LayerError(f"nothing of {type(model).__name__} can be cut as {', '.join(kinds)}: {reason}")
    ranked = unit_scores(model, groups, scores, reduction)
    removed = select(graph, groups, ranked, sparsity, round_to=round_to, min_width=min_width, scope=scope)
    plan = make_plan(graph, model, removed)
    smaller = cut(model, plan)
    if verify and not any(p.is_meta for p in model.parameters()):
        error = difference(model, smaller, graph, graph.flags(removed), example)
        if not error <= TOLERANCE:
            raise ModelError(
                f"the cut model differs from the masked original by {error:.2g}, relative; at most {TOLERANCE:g} is rounding. "
                f"Leave out what does not follow the cut with ignore=, and report the model."
            )
    return smaller, plan


def choose_groups(graph: Graph, kinds: Sequence[str], ignore: Sequence[str] = ()) -> list[Group]:
    """Groups to cut: of two groups of one kind that cut the same dimension, the one with more units."""
    for kind in kinds:
        if kind not in KINDS:
            raise RecipeError(f"unknown kind of unit {kind!r}. Known: {', '.join(KINDS)}.")
    names = graph.recording.values
    for pattern in ignore:
        if not any(matches(pattern, name) for name in names):
            raise UnknownName("layer", pattern, {n.rpartition(".")[0] or n for n in names})
    wanted = [
        g for g in graph.units() if g.kind in kinds and not any(matches(p, m.tensor) for p in ignore for m in g.members)
    ]  # fmt: skip
    chosen: dict[int, Group] = {}
    for group in sorted(wanted, key=lambda g: -g.units):
        if not any(s in chosen and chosen[s].kind == group.kind for s in group.siblings):
            chosen[group.id] = group
    ids = set(chosen)
    return [g for g in wanted if g.id in ids and g.ties <= ids]


def unit_scores(model: nn.Module, groups: Iterable[Group], scores: Scores, reduction: Reduction = "mean") -> dict[int, Tensor]:
    """For each group ``[units]``: the saliencies of all weights that go with a unit, reduced to one number."""
    saliency = _Saliency(model, scores, reduction)
    return {group.id: _fold(group, saliency, reduction) for group in groups}


def _fold(group: Group, saliency: _Saliency, reduction: Reduction) -> Tensor:
    total = torch.zeros(group.units, dtype=torch.float64)
    elements = 0.0
    for member in group.members:
        values = saliency.along(member.tensor, member.dim)
        if values is None:
            continue
        units, values = torch.from_numpy(member.units), values[torch.from_numpy(member.indices)]
        if reduction == "max":
            total = total.scatter_reduce(0, units, values, "amax")
        else:
            total.index_add_(0, units, values)
            elements += saliency.slice_size(member.tensor, member.dim) * len(values) / group.units
    if reduction == "l2":
        return total.sqrt()
    return total / max(elements, 1.0) if reduction == "mean" else total


class _Saliency:
    """Saliencies of weights, summed (for l2 squared and summed, for max maximised) over all dimensions but one."""

    def __init__(self, model: nn.Module, scores: Scores, reduction: Reduction):
        self.layers, _ = find_layers(model)
        self.tensors = dict(model.named_parameters(remove_duplicate=False))
        self.scores, self.reduction = scores, reduction
        self._found: dict[str, dict[int, Tensor]] = {}
        self._scratch = torch.empty(0)

    def slice_size(self, name: str, dim: int) -> float:
        """Number of weights at one index of `dim`."""
        weight = self.tensors[name]
        return weight.numel() / weight.shape[dim]

    def along(self, name: str, dim: int) -> Tensor | None:
        """``[indices of dim]``, or None for what is no weight or has no saliency."""
        if name not in self._found:
            score = self._of(name)
            self._found[name] = (
                {d: self._reduce(score, d).double().cpu() for d in range(score.ndim)} if score is not None else {}
            )
        return self._found[name].get(dim)

    def _of(self, name: str) -> Tensor | None:
        layer = self.layers.get(name)
        if name not in self.tensors or self.tensors[name].ndim < 2:
            return None
        weight = self.tensors[name].detach()
        if self.scores == "l1":
            score = torch.abs(weight, out=self._room(weight))
        elif isinstance(self.scores, Mapping):
            given = self.scores.get(name)
            if given is None:
                return None
            score = layer.stored(given) if layer else given
        else:
            given = self.scores(name, layer.canonical(weight) if layer else weight)  # type: ignore[operator]
            score = layer.stored(given) if layer else given
        score = score.square() if self.reduction == "l2" else score
        if score.ndim <= 2 or layer is None or self.reduction == "max" or not score.is_floating_point():
            return score
        kernel = score.flatten(2)  # a matrix-vector product is the fastest of sums
        return kernel.squeeze(-1) if kernel.shape[-1] == 1 else kernel @ kernel.new_ones(kernel.shape[-1])

    def _room(self, like: Tensor) -> Tensor:
        """Memory that is used again and again: asking for new pages takes longer than the sums."""
        if self._scratch.numel() < like.numel() or self._scratch.dtype != like.dtype or self._scratch.device != like.device:
            self._scratch = torch.empty(like.numel(), dtype=like.dtype, device=like.device)
        return self._scratch[: like.numel()].view(like.shape)

    def _reduce(self, score: Tensor, dim: int) -> Tensor:
        rest = [d for d in range(score.ndim) if d != dim]
        if self.reduction == "max":
            return score.amax(rest)
        if score.ndim == 2 and score.is_floating_point():
            return score @ score.new_ones(score.shape[1]) if dim == 0 else score.new_ones(score.shape[0]) @ score
        return score.sum(rest)


def select(
    graph: Graph,
    groups: Sequence[Group],
    scores: Mapping[int, Tensor],
    sparsity: float,
    *,
    round_to: int = 1,
    min_width: int = 1,
    scope: str = "local",
) -> dict[int, list[int]]:
    """Units that go, by group: the lowest scores, exactly as many as the sparsity says, ties broken by index."""
    if isinstance(sparsity, bool) or not isinstance(sparsity, float) or not 0 <= sparsity < 1:
        raise RecipeError(f"sparsity is a fraction from 0.0 up to but not including 1.0, got {sparsity!r}")
    if scope not in ("local", "global"):
        raise RecipeError(f"scope is 'local' or 'global', got {scope!r}")
    keep = {g.id: g.units - round(g.units * sparsity) for g in groups}
    if scope == "global":
        keep |= _global_counts(groups, scores, sparsity, min_width)
    removed: dict[int, list[int]] = {}
    for group in groups:
        n = _alike(graph, group, keep, round_to, min_width)
        if n < group.units:
            order = torch.argsort(scores[group.id], stable=True)
            removed[group.id] = sorted(order[: group.units - n].tolist())
    return removed


def _alike(graph: Graph, group: Group, keep: Mapping[int, int], round_to: int, min_width: int) -> int:
    """How many units of `group` to keep: of groups that are tied, the same fraction in whole units of the smallest."""
    together = [graph.groups[g] for g in sorted({group.id, *group.ties})]
    smallest = min(g.units for g in together)
    share = sum(keep[g.id] / g.units for g in together) / len(together)
    n = _rounded(round(share * smallest), smallest, round_to, min_width)
    return n * group.units // smallest


def _global_counts(groups: Sequence[Group], scores: Mapping[int, Tensor], sparsity: float, min_width: int) -> dict[int, int]:
    free = [g for g in groups if not g.ties]
    if not free:
        return {}
    protected = []
    for g in free:
        s = scores[g.id].clone()
        s[torch.argsort(s, stable=True, descending=True)[: max(min_width, 1)]] = torch.inf
        protected.append(s)
    owner = torch.cat([torch.full((g.units,), i) for i, g in enumerate(free)])
    order = torch.argsort(torch.cat(protected), stable=True)
    gone = torch.bincount(owner[order[: round(len(owner) * sparsity)]], minlength=len(free))
    return {g.id: max(g.units - int(n), min(max(min_width, 1), g.units)) for g, n in zip(free, gone, strict=True)}


def _rounded(wanted: int, units: int, round_to: int, min_width: int) -> int:
    """The multiple of `round_to` nearest to `wanted`, at least `min_width` and one multiple, at most all units."""
    n = max(wanted, min_width, 1)
    if round_to > 1:
        n = max(round(n / round_to), 1) * round_to
        while n < min_width:
            n += round_to
    return min(n, units)


__all__ = ["TOLERANCE", "choose_groups", "prune_channels", "select", "unit_scores"]
