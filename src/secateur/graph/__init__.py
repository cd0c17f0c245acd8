"""Structural pruning: trace, couple, cut. Which slices live or die together, and removing them for real."""

from secateur.graph.blocks import (
    Residual,
    block_importance,
    bypass_difference,
    bypassing,
    passed_on,
    plan_without,
    removable_blocks,
)
from secateur.graph.checked import cut_checked, drop_blocks
from secateur.graph.choose import kept_counts, lowest, select
from secateur.graph.config import fit_config
from secateur.graph.cut import cut, recut
from secateur.graph.graph import Graph, Group, Member, trace
from secateur.graph.plan import make_plan
from secateur.graph.prune import choose_groups, prune_channels
from secateur.graph.rules import rule
from secateur.graph.scores import combined, normalized, unit_scores
from secateur.graph.verify import difference, masked_output

__all__ = [
    "Graph",
    "Group",
    "Member",
    "Residual",
    "block_importance",
    "bypass_difference",
    "bypassing",
    "choose_groups",
    "combined",
    "cut",
    "cut_checked",
    "difference",
    "drop_blocks",
    "fit_config",
    "kept_counts",
    "lowest",
    "make_plan",
    "masked_output",
    "normalized",
    "passed_on",
    "plan_without",
    "prune_channels",
    "recut",
    "removable_blocks",
    "rule",
    "select",
    "trace",
    "unit_scores",
]
