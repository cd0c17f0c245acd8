"""Calibration: the statistics that criteria ask for, collected in one pass that leaves the model as it was."""

from __future__ import annotations

from secateur.stats.collect import Calibration, collect

__all__ = ["Calibration", "collect"]
