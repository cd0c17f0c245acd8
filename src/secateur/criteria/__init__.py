"""Criteria: how much each weight matters. Each is one function in one file, found by name in `CRITERIA`."""

from __future__ import annotations

from secateur.criteria import grasp, lamp, magnitude, movement, obd, random, snip, synflow, taylor, wanda
from secateur.criteria.registry import CRITERIA, Criterion, criterion

__all__ = ["CRITERIA", "Criterion", "criterion"]
_BUILT_IN = (grasp, lamp, magnitude, movement, obd, random, snip, synflow, taylor, wanda)  # importing one registers it
