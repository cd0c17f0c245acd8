"""What the report has to say of calibration: statistics that rank nothing, padding that could not be told apart."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping

from torch import Tensor

from secateur.stats.guard import listed
from secateur.types import Need

log = logging.getLogger("secateur")


def zero_notes(need: Need, tensors: Mapping[str, Tensor]) -> list[str]:
    """A note where a statistic is zero throughout a layer: dead or saturated units, or all weights gone."""
    names = [name for name, tensor in tensors.items() if not tensor.any()]
    return [f"the statistic {need.value!r} is zero throughout {listed(names)}: it ranks no weights there"] if names else []


def unmasked_notes(layers: Collection[str]) -> list[str]:
    """A note where padding could not be told from what is read."""
    if not layers:
        return []
    return [f"padding is counted among the inputs of {listed(sorted(layers))}: their positions are not those of attention_mask"]


def say(found: Iterable[str], notes: list[str]) -> None:
    """Log what is not among `notes` yet, and add it."""
    for note in found:
        if note not in notes:
            log.warning(note)
            notes.append(note)
