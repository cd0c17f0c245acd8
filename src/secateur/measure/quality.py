"""What a user's `evaluate` returns, checked and in one form."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from secateur.errors import DataError
from secateur.measure.modes import evaluating

#: ``evaluate(model) -> float`` or a mapping of names to floats.
Evaluate = Callable[[nn.Module], Any]

_LOWER = ("loss", "perplexity", "error")


def qualities(evaluate: Evaluate, model: nn.Module) -> dict[str, float]:
    """What `evaluate` says of the model, as floats by name; a bare number is called ``"quality"``.

    The model is in evaluation mode and without gradients meanwhile. Raises DataError for NaN and what is no number, and
    for an empty mapping; an infinite perplexity is one.

    >>> qualities(lambda model: 0.5, nn.Identity())
    {'quality': 0.5}
    """
    with evaluating(model), torch.no_grad():
        value = evaluate(model)
    if not isinstance(value, Mapping):
        return {"quality": _number("quality", value)}
    if not value:
        raise DataError("evaluate returned an empty mapping; it must return a number, or numbers by name")
    return {str(name): _number(str(name), v) for name, v in value.items()}


def higher_is_better(name: str) -> bool:
    """Whether more of the quality `name` is better: not where the name says loss, perplexity or error."""
    return not any(word in name.lower() for word in _LOWER)


def _number(name: str, value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError, RuntimeError):
        number = None
    if number is None or isinstance(value, (str, bytes)):
        raise DataError(f"evaluate returned a {type(value).__name__} for {name!r}; it must return a number, or numbers by name")
    if math.isnan(number):
        raise DataError(f"evaluate returned NaN for {name!r}. A number is needed to compare models; one that diverged is inf.")
    return number
