"""Structural pruning: trace, couple, cut. Which slices live or die together, and removing them for real."""

from secateur.graph.cut import cut, recut
from secateur.graph.graph import Graph, Group, Member, trace
from secateur.graph.prune import choose_groups, make_plan, prune_channels, select, unit_scores
from secateur.graph.rules import rule
from secateur.graph.verify import difference, masked_output

__all__ = [
    "Graph",
    "Group",
    "Member",
    "choose_groups",
    "cut",
    "difference",
    "make_plan",
    "masked_output",
    "prune_channels",
    "recut",
    "rule",
    "select",
    "trace",
    "unit_scores",
]
