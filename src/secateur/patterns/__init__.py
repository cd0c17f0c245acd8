"""How the elements of a weight fold into removable units: one file a pattern, found by name or by short spelling."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from secateur.errors import RecipeError
from secateur.patterns.block import block
from secateur.patterns.element import element, neuron, row
from secateur.patterns.nm import n_m
from secateur.patterns.reduce import REDUCTIONS, reduce
from secateur.patterns.units import Units, channel, ffn, ffn_head, head, head_dim, layer, width
from secateur.registry import Registry
from secateur.types import Pattern

PATTERNS: Registry[Any] = Registry("pattern")
PATTERNS.register("element", source="Han et al. 2015, Learning both Weights and Connections")(element)
PATTERNS.register("row", source="Sun et al. 2023, A Simple and Effective Pruning Approach, section 3")(row)
PATTERNS.register("neuron", source="Li et al. 2017, Pruning Filters for Efficient ConvNets")(neuron)
PATTERNS.register("n:m", source="Mishra et al. 2021, Accelerating Sparse Deep Neural Networks")(n_m)
PATTERNS.register("block", source="Narang et al. 2017, Block-Sparse Recurrent Neural Networks")(block)
PATTERNS.register("channel", source="Li et al. 2017; Fang et al. 2023, DepGraph")(channel)
PATTERNS.register("ffn", source="Li et al. 2017; Frantar and Alistarh 2023, ZipLM, for transformers")(ffn)
PATTERNS.register("head", source="Michel et al. 2019, Are Sixteen Heads Really Better than One?")(head)
PATTERNS.register("ffn_head", source="Michel et al. 2019; Liang et al. 2023, HomoDistil")(ffn_head)
PATTERNS.register("head_dim", source="Ma et al. 2023, LLM-Pruner")(head_dim)
PATTERNS.register("layer", source="Men et al. 2024, ShortGPT; Song et al. 2024, SLEB")(layer)
PATTERNS.register("width", source="Ashkboos et al. 2024, SliceGPT; He et al. 2016 for residual dimensions")(width)

__all__ = ["PATTERNS", "REDUCTIONS", "Units", "make_pattern", "reduce"]


def make_pattern(spec: str | Mapping[str, Any] | Pattern) -> Pattern | Units:
    """A pattern from its name, a short spelling, or a mapping with the name and its options.

    ``"2:4"`` keeps 2 of every 4 consecutive inputs, ``"4x1"`` is a block of 4 outputs by 1 input.

    Example:
        >>> make_pattern("2:4") == make_pattern({"name": "n:m", "keep": 2, "of": 4})
        True
    """
    if isinstance(spec, Mapping):
        options = {k: v for k, v in spec.items() if k != "name"}
        if "name" not in spec:
            raise RecipeError(f"a pattern given as a table needs a 'name', got {dict(spec)}")
        entry = PATTERNS[spec["name"]]
        entry.check_options("pattern", options)
        return entry.make(**options)
    if not isinstance(spec, str):
        return spec
    if found := re.fullmatch(r"n:(\d+)", spec):
        return n_m(keep=None, of=int(found[1]))
    if found := re.fullmatch(r"(\d+):(\d+)", spec):
        return n_m(keep=int(found[1]), of=int(found[2]))
    if found := re.fullmatch(r"(\d+)x(\d+)", spec):
        return block(rows=int(found[1]), cols=int(found[2]))
    return make_pattern({"name": spec})
