"""A module around a model, which passes for the model."""

from __future__ import annotations

from typing import Any

from torch import nn


class Around(nn.Module):
    """Attributes that it lacks are those of the model inside, ``self.model``."""

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model" or name.startswith("__"):
                raise
            return getattr(self.model, name)
