"""What becomes of removed weights in gradual pruning: whether, and by which rule, they come back."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Generator, IntTensor, Tensor

from secateur.errors import RecipeError
from secateur.layers import Layer
from secateur.registry import Named, Registry, bind
from secateur.select import top
from secateur.selection import Method, Scores, choose, to_masks
from secateur.train.loop import mixed
from secateur.types import LayerStats, MaskSet, Need


@dataclass(frozen=True)
class Choice:
    """Everything that a choice of new masks may look at."""

    layers: Mapping[str, Layer]
    stats: Mapping[str, LayerStats]
    method: Method
    sparsity: float  #: to have now
    previous: MaskSet  #: the masks so far
    progress: float  #: of the pruning, 0..1
    seed: int  #: of this choice


#: ``regrow(choice, *, options) -> MaskSet``. The entry's facts say what removed weights do between two choices
#: (``removed``: "zero", "frozen" or "trained") and which statistics the rule needs beside the criterion's (``needs``).
Regrow = Callable[..., MaskSet]
REGROW: Registry[Regrow] = Registry("regrow")


def make_regrow(spec: Named) -> tuple[str, Regrow]:
    """Name and rule of a name, or of a mapping with the name and options; every option is a share in [0, 1)."""
    name, rule = bind(REGROW, spec)
    for option, value in ({} if isinstance(spec, str) else spec).items():
        if option == "name":
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0.0 <= value < 1.0:
            raise RecipeError(f"regrow {name!r}: {option} is a share in [0, 1), got {value!r}")
    return name, rule


@REGROW.register("none", source="Zhu and Gupta 2017, To prune, or not to prune", removed="zero", needs=frozenset())
def none(choice: Choice) -> MaskSet:
    """Nothing comes back: what is removed stays removed."""
    return choose(choice.layers, choice.stats, sparsity=choice.sparsity, method=choice.method, previous=choice.previous)


@REGROW.register("frozen", source="Sanh et al. 2020, Movement Pruning, section 4", removed="frozen", needs=frozenset())
def frozen(choice: Choice) -> MaskSet:
    """Removed weights wait with the value they had. Each choice is made among all, and who comes back has that value."""
    return choose(choice.layers, choice.stats, sparsity=choice.sparsity, method=choice.method)


@REGROW.register(
    "splice",
    source="Guo et al. 2016, Dynamic Network Surgery, eq. 3; Lin et al. 2020, Dynamic Model Pruning with Feedback",
    removed="trained",
    needs=frozenset(),
)
def splice(choice: Choice, *, hysteresis: float = 0.1) -> MaskSet:
    """Removed weights go on being trained with the gradients of the masked model, and come back when they matter again.

    A kept weight counts ``1 + hysteresis`` times its score and a removed one ``1 - hysteresis`` times, so that those near
    the threshold do not go to and fro: the paper's two thresholds, .9 and 1.1 of one value. That value is chosen here so
    that the schedule's sparsity is met exactly, where the paper takes it from mean and deviation of each layer, and masks
    change every `every` steps instead of with a falling probability.
    """

    def prefer(scores: Tensor, kept: Tensor) -> Tensor:
        return scores + hysteresis * scores.abs() * torch.where(kept, 1.0, -1.0)

    return choose(
        choice.layers,
        choice.stats,
        sparsity=choice.sparsity,
        method=choice.method,
        previous=choice.previous,
        prefer=prefer,
    )


@REGROW.register("rigl", source="Evci et al. 2020, Rigging the Lottery, section 3", removed="zero", needs={Need.GRAD_ONE})
def rigl(choice: Choice, *, fraction: float = 0.3) -> MaskSet:
    """Each choice drops the kept units that score lowest, and grows as many where the gradient of this step is largest.

    The share that changes falls from `fraction` to 0 along half a cosine: ``fraction / 2 (1 + cos(pi progress))``. Grown
    weights begin at zero. From scratch: ``schedule="one-shot"``, ``allocation="erk"``, and `end` at 75% of the training.
    """

    def growth(stats: LayerStats) -> Tensor:
        return stats.need(Need.GRAD_ONE).abs()

    method = replace(choice.method, criterion=growth, criterion_name="gradient", reduction="sum")
    scores = Scores(choice.layers, choice.stats, method)
    return _exchange(choice, fraction, lambda name: scores[name].scores)


@REGROW.register(
    "set", source="Mocanu et al. 2018, Scalable training of artificial neural networks (SET)", removed="zero", needs=frozenset()
)
def set_(choice: Choice, *, fraction: float = 0.3) -> MaskSet:
    """Each choice drops the kept units that score lowest, and grows as many at random among the removed.

    The share that changes falls from `fraction` to 0 along half a cosine, as in RigL; the paper keeps it constant. It drops
    the lowest magnitudes of each sign; here the criterion decides.
    """
    shapes = Scores(choice.layers, choice.stats, choice.method)

    def growth(name: str) -> Tensor:
        generator = Generator().manual_seed(mixed(choice.seed, name))
        return torch.rand(shapes[name].groups, shapes[name].units, generator=generator)

    return _exchange(choice, fraction, growth)


def _exchange(choice: Choice, fraction: float, growth: Callable[[str], Tensor]) -> MaskSet:
    """Drop by score, grow by `growth` (higher = grown); each layer ends with the number that its allocation gives it."""
    share = fraction / 2.0 * (1.0 + math.cos(math.pi * choice.progress))
    scores = Scores(choice.layers, choice.stats, choice.method, choice.previous)
    counts = choice.method.allocation(scores, choice.sparsity)
    kept = {n: _exchanged(scores[n].scores, counts[n], share, lambda n=n: growth(n)) for n in choice.layers}  # type: ignore[misc]
    return to_masks(choice.layers, choice.method, kept)


def _exchanged(scores: Tensor, count: IntTensor, share: float, growth: Callable[[], Tensor]) -> Tensor:
    """Kept units ``[groups, units]``. Those that were removed before have scores of -inf."""
    removed = torch.isneginf(scores).sum(1).to(count.device)
    grown = torch.minimum((share * count).int(), removed.int()).int()
    stay = torch.minimum(count - grown, (scores.shape[1] - removed).int()).int()
    kept = top(scores, stay)  # type: ignore[arg-type]
    if not bool((count > stay).any()):
        return kept
    candidates = growth().to(scores.device).masked_fill(kept, -torch.inf)
    return kept | top(candidates, count - stay)  # type: ignore[arg-type]
