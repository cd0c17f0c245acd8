"""Units that are cut out of the network for real: channels, heads and their like. The graph finds which slices go together."""

from __future__ import annotations

from dataclasses import dataclass

from secateur.errors import RecipeError


@dataclass(frozen=True)
class Units:
    """Which kinds of units are cut, the multiple that widths are rounded to and the least that stays of a width."""

    name: str
    kinds: tuple[str, ...]
    round_to: int = 1
    min_width: int = 1

    def __post_init__(self) -> None:
        for what, value in (("round_to", self.round_to), ("min_width", self.min_width)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise RecipeError(f"pattern {self.name!r}: {what} must be a whole number of at least 1, got {value!r}")


def channel(*, round_to: int = 1, min_width: int = 1) -> Units:
    """Channels of convolutions and neurons of linear layers, cut out with all that depends on them: a smaller dense model."""
    return Units("channel", ("channel", "neuron"), round_to, min_width)


def head(*, min_width: int = 1) -> Units:
    """Attention heads, with their share of the projections (and grouped-query heads with their key and value)."""
    return Units("head", ("head",), 1, min_width)


def head_dim(*, round_to: int = 1, min_width: int = 1) -> Units:
    """Dimensions inside attention heads, the same number in each head."""
    return Units("head_dim", ("head_dim",), round_to, min_width)


def width(*, round_to: int = 1, min_width: int = 1) -> Units:
    """Features of the residual stream, through the whole network."""
    return Units("width", ("width",), round_to, min_width)
