"""Sizes, cost, speed and quality of a model, and how sensitive each of its layers is."""

from __future__ import annotations

from secateur.measure.latency import compare_latency, latency
from secateur.measure.measure import measure
from secateur.measure.quality import higher_is_better, qualities
from secateur.measure.scan import scan

__all__ = ["compare_latency", "higher_is_better", "latency", "measure", "qualities", "scan"]
