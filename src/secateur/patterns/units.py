"""Units that are cut out of the network for real: channels, heads and their like. The graph finds which slices go together."""

from __future__ import annotations

from dataclasses import dataclass

from secateur.errors import RecipeError

#: How the tensors that a unit has slices in make its score.
COMBINE = ("together", "sum", "mean", "max", "first")
#: By what the scores of a group are divided.
NORMALIZE = ("auto", "none", "mean", "max")


@dataclass(frozen=True)
class Units:
    """Which kinds of units are cut, the multiple that widths are rounded to, the least that stays of a width, and their scores.

    A unit has slices in several tensors. `combine` says how they make its score: ``together`` folds all of them as one long
    slice; ``sum``, ``mean`` and ``max`` are over the scores of each tensor's slice, ``first`` takes that of the layer that
    makes the unit. (Criteria of whole units give a score for each tensor: ``together`` is their mean.)
    `normalize` divides the scores of a group by their ``mean`` or ``max``, so that groups compete on equal terms;
    ``none`` leaves them as they are. By default (``auto``) it is the mean under the allocation global, but for criteria that
    are made to be compared between layers, as the scales of Network Slimming are, and nothing else. With `outputs` what the
    model returns may become narrower as well: of a backbone, for instance, whose features others read.
    """

    name: str
    kinds: tuple[str, ...]
    round_to: int = 1
    min_width: int = 1
    combine: str = "together"
    normalize: str = "auto"
    outputs: bool = False

    @property
    def whole_blocks(self) -> bool:
        """Whether the units are whole blocks, which are taken out and not cut."""
        return self.kinds == ("layer",)

    @property
    def sparsity(self) -> float | None:
        """What is removed of a single one: all of a block, which goes or stays. Of other units it is free: None."""
        return 1.0 if self.whole_blocks else None

    def __post_init__(self) -> None:
        for what, value in (("round_to", self.round_to), ("min_width", self.min_width)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise RecipeError(f"pattern {self.name!r}: {what} must be a whole number of at least 1, got {value!r}")
        for what, given, known in (("combine", self.combine, COMBINE), ("normalize", self.normalize, NORMALIZE)):
            if given not in known:
                raise RecipeError(f"pattern {self.name!r}: {what} is one of {', '.join(known)}; got {given!r}")


def channel(
    *,
    round_to: int = 1,
    min_width: int = 1,
    combine: str = "together",
    normalize: str = "auto",
    outputs: bool = False,
) -> Units:
    """Channels of convolutions and neurons of linear layers, cut out with all that depends on them: a smaller dense model."""
    return Units("channel", ("channel", "neuron"), round_to, min_width, combine, normalize, outputs)


def ffn(
    *,
    round_to: int = 1,
    min_width: int = 1,
    combine: str = "together",
    normalize: str = "auto",
    outputs: bool = False,
) -> Units:
    """Feed-forward neurons, cut out: features between linear layers, as in the MLPs of transformers. Convolutions stay.

    The pattern ``neuron`` only masks them, which holds in any training loop but leaves the layer as wide as it was.
    """
    return Units("ffn", ("neuron",), round_to, min_width, combine, normalize, outputs)


def head(*, min_width: int = 1, combine: str = "together", normalize: str = "auto") -> Units:
    """Attention heads, with their share of the projections (and grouped-query heads with their key and value)."""
    return Units("head", ("head",), 1, min_width, combine, normalize)


def ffn_head(*, min_width: int = 1, combine: str = "together", normalize: str = "auto") -> Units:
    """Feed-forward neurons and attention heads together: all that lies inside the blocks of a transformer."""
    return Units("ffn_head", ("neuron", "head"), 1, min_width, combine, normalize)


def head_dim(*, round_to: int = 1, min_width: int = 1, combine: str = "together", normalize: str = "auto") -> Units:
    """Dimensions inside attention heads, the same number in each head."""
    return Units("head_dim", ("head_dim",), round_to, min_width, combine, normalize)


def width(
    *,
    round_to: int = 1,
    min_width: int = 1,
    combine: str = "together",
    normalize: str = "auto",
    outputs: bool = False,
) -> Units:
    """Features of the residual stream, through the whole network."""
    return Units("width", ("width",), round_to, min_width, combine, normalize, outputs)


def layer() -> Units:
    """Whole residual or transformer blocks, taken out: their input goes straight to the next. The fraction is of blocks.

    `criterion` is ``block_cosine`` or ``block_loss``, or one of weights, of which a block's are folded into one score.
    """
    return Units("layer", ("layer",))
