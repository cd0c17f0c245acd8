"""Criteria: how much each weight matters. Each is a function, found by name: `CRITERIA`, or of whole units `UNIT_CRITERIA`."""

from __future__ import annotations

from secateur.criteria import (
    activation,
    blocks,
    bn_scale,
    fpgm,
    gates,
    grasp,
    lamp,
    magnitude,
    movement,
    multiflow,
    obd,
    random,
    snip,
    synflow,
    taylor,
    wanda,
    woodfisher,
    yopo,
)  # fmt: skip
from secateur.criteria.registry import CRITERIA, UNIT_CRITERIA, Criterion, criterion, unit_criterion

__all__ = ["CRITERIA", "UNIT_CRITERIA", "Criterion", "criterion", "unit_criterion"]
_BUILT_IN = (  # importing one registers it
    activation, blocks, bn_scale, fpgm, gates, grasp, lamp, magnitude, movement, multiflow, obd, random, snip, synflow,
    taylor, wanda, woodfisher, yopo,
)  # fmt: skip
