"""A budget as users write it: ``"50% MACs"``, ``"5 ms"``, ``"2M params"``, ``"10 MB"``."""

from __future__ import annotations

import re
from dataclasses import dataclass

from secateur.errors import RecipeError

#: What a budget can be in, as it is written beside the figures.
UNITS = ("params", "MACs", "bytes", "ms")
_SUFFIXES = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9}
_BYTES = {"B": 1, "kB": 1e3, "KB": 1e3, "MB": 1e6, "GB": 1e9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
_ALLOWED = "Write an amount and a unit: '50% MACs', '2M params', '10 MB', '900 KiB', '50% bytes', '5 ms'."
_FORM = re.compile(r"\s*(\d+(?:\.\d*)?(?:[eE][+-]?\d+)?|\.\d+)\s*(%|[kMG](?![iB]|[Aa][Cc]))?\s*([A-Za-z]+)\s*")


@dataclass(frozen=True)
class Amount:
    """What a model may cost at most: `amount` of `unit`, or where it is a `share` that fraction of what the dense model costs.

    >>> parse_budget("50% MACs").limit(1000)
    500.0
    """

    text: str
    amount: float
    unit: str  #: one of `UNITS`
    share: bool

    def limit(self, dense: float) -> float:
        """The most that the pruned model may cost when the dense one costs `dense`."""
        return self.amount * dense if self.share else self.amount


def parse_budget(text: object) -> Amount:
    """The budget that `text` means, or a RecipeError that says what is wrong with it and what is allowed."""
    if not isinstance(text, str):
        raise RecipeError(f"a budget is text, got {type(text).__name__} {text!r}. {_ALLOWED}")
    found = _FORM.fullmatch(text)
    if found is None:
        raise RecipeError(f"the budget {text!r} is not understood. {_ALLOWED}")
    number, suffix, word = float(found[1]), found[2] or "", found[3]
    unit, factor = _unit(text, word, suffix)
    amount = number * (0.01 if suffix == "%" else _SUFFIXES[suffix] * factor)
    if not 0 < amount < float("inf"):
        raise RecipeError(f"the budget {text!r} leaves nothing: the amount must be more than 0. {_ALLOWED}")
    if suffix == "%" and amount > 1:
        raise RecipeError(f"the budget {text!r} is more than the dense model costs: a percentage is at most 100.")
    return Amount(text.strip(), amount, unit, suffix == "%")


def _unit(text: str, word: str, suffix: str) -> tuple[str, float]:
    """The unit that a word means, and how many of it one such word is."""
    if word.lower() in ("flop", "flops", "gflops", "mflops"):
        raise RecipeError(
            f"the budget {text!r} is in FLOPs; multiply-adds are counted here, and one MAC is two FLOPs. {_ALLOWED}"
        )
    for unit in UNITS:
        if word.lower() in (unit.lower(), unit.lower().removesuffix("s") if unit != "ms" else unit):
            return unit, 1.0
    if word in _BYTES and (not suffix or word == "B"):
        return "bytes", _BYTES[word]
    raise RecipeError(
        f"the budget {text!r} has no unit that is known: params, MACs, bytes (B, kB, MB, KiB, MiB) or ms. {_ALLOWED}"
    )
