"""What a run has solved so far, kept on disk so that it can be stopped and gone on with."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur.layers import Layer
from secateur.train.checkpoint import load_state, save_state

log = logging.getLogger("secateur")


class SolvedSoFar:
    """Masks, errors and notes of the layers that were solved; with a folder, their weights too, one file for each part.

    A run that is stopped loses no more than the part in hand. The files are written beside their place and renamed.
    """

    def __init__(self, folder: Path | None = None):
        self._folder = folder
        self._parts = 0
        self._unsaved: list[str] = []
        self._told = 0  # notes that are on disk already
        self._weights: dict[str, Tensor] = {}
        self.masks: dict[str, Tensor] = {}
        self.errors: dict[str, float] = {}
        self.notes: list[str] = []
        while folder is not None and (file := folder / f"{self._parts}.safetensors").exists():
            self._take(load_state(file))
            self._parts += 1
        self._told = len(self.notes)
        if self._parts:
            log.warning("resuming after %d layers", len(self.masks))

    def _take(self, state: Mapping[str, Any]) -> None:
        self.masks.update(state["masks"])
        self.errors.update(state["errors"])
        self._weights.update(state["weights"])
        self.notes += state["notes"]

    @torch.no_grad()
    def write(self, layers: Mapping[str, Layer]) -> None:
        """Put the weights that an earlier run solved into the model, and let go of them."""
        for name, weight in self._weights.items():
            layers[name].parameter.copy_(weight)
        self._weights.clear()

    def add(self, name: str, mask: Tensor, error: float | None, notes: tuple[str, ...]) -> None:
        """One more layer, whose weight is in the model."""
        self.masks[name] = mask
        if error is not None:
            self.errors[name] = error
        self.notes += notes
        self._unsaved.append(name)

    def save(self, layers: Mapping[str, Layer]) -> None:
        """Keep what was added since the last time."""
        if self._folder is not None and self._unsaved:
            state = {
                "masks": {n: self.masks[n] for n in self._unsaved},
                "weights": {n: layers[n].parameter.detach() for n in self._unsaved},
                "errors": {n: self.errors[n] for n in self._unsaved if n in self.errors},
                "notes": self.notes[self._told :],
            }
            save_state(self._folder / f"{self._parts}.safetensors", state)
            self._parts += 1
        self._unsaved, self._told = [], len(self.notes)
