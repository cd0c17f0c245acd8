"""Whole blocks: how little the network would miss them."""

from __future__ import annotations

from torch import Tensor

from secateur.criteria.registry import unit_criterion
from secateur.types import UnitNeed, UnitStats


@unit_criterion(
    "block_cosine",
    on="blocks",
    needs={UnitNeed.BLOCK_CHANGE},
    source="Men et al. 2024, ShortGPT: Layers in Large Language Models are More Redundant Than You Expect, eq. 1",
)
def block_cosine(blocks: UnitStats) -> Tensor:
    """``1 - cosine`` of a block's input and output, mean over all positions of the calibration data: how much it changes."""
    return blocks.need(UnitNeed.BLOCK_CHANGE)


@unit_criterion(
    "block_loss",
    on="blocks",
    needs={UnitNeed.BLOCK_LOSS},
    source="Song et al. 2024, SLEB: Streamlining LLMs through Redundancy Verification and Elimination of Blocks, algorithm 1",
)
def block_loss(blocks: UnitStats) -> Tensor:
    """How much the loss on the calibration data rises when the block is bypassed: dropped and measured, one after the other.

    With as many `steps` as blocks go, every block is measured anew after each drop, as the paper does.
    """
    return blocks.need(UnitNeed.BLOCK_LOSS)
