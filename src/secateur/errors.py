"""Every error that Secateur raises on purpose. Each says what is wrong, where, and what to do about it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class SecateurError(Exception):
    """Base of all errors that are the input's fault and not a bug. The command line prints it without a traceback."""


class RecipeError(SecateurError, ValueError):
    """A recipe or an argument has an unknown key, a wrong type or a value out of range."""


class UnknownName(RecipeError):
    """A name that no registry, model or layer has."""

    def __init__(self, kind: str, name: str, known: Iterable[str]):
        known = sorted(known)
        super().__init__(f"unknown {kind} {name!r}{did_you_mean(name, known)} Known: {', '.join(known) or 'none'}.")
        self.kind, self.name, self.known = kind, name, known


class BudgetError(RecipeError):
    """A budget that cannot be met. `nearest` is the least that the model can cost; `reasons` say what holds it there."""

    def __init__(self, text: str, unit: str, limit: float, nearest: float, dense: float, *reasons: str):
        figures = "{:.3g}" if unit == "ms" else "{:,.0f}"
        super().__init__(
            f"the budget {text!r} ({figures.format(limit)} {unit}) cannot be met: the nearest that can is "
            f"{figures.format(nearest)} {unit}, {nearest / dense:.1%} of the dense model's {figures.format(dense)}. "
            + "".join(f"{reason[0].upper()}{reason[1:]}. " for reason in reasons)
            + "Ask for that much, or allow more to be cut."
        )
        self.nearest, self.reasons = nearest, reasons


class LayerError(SecateurError, ValueError):
    """A layer whose weight cannot be pruned as asked."""


class PatternError(LayerError):
    """A pattern that does not fit the shape of a weight."""


class NonFiniteError(LayerError):
    """NaN or infinite values where numbers are needed."""


class DataError(SecateurError, ValueError):
    """Calibration, training or evaluation data that is empty, ragged, exhausted or of the wrong kind."""


class ModelError(SecateurError, ValueError):
    """A model that cannot be found, loaded, run or matched."""


class ArtifactError(SecateurError, ValueError):
    """An artifact directory that is missing, broken, hostile or in use."""


class ExportError(SecateurError, ValueError):
    """A model that a format cannot express, or whose exported form computes something else."""


class TrainingError(SecateurError, ValueError):
    """Training that cannot start, go on, or be resumed."""


class Interrupted(SecateurError, KeyboardInterrupt):
    """Ctrl-C during training, after its state was saved; the message says how to go on."""


class MissingExtra(SecateurError, ImportError):
    """A package of an optional extra is not installed."""

    def __init__(self, package: str, extra: str, purpose: str):
        super().__init__(f"{purpose} needs the package {package!r}. Install it with: pip install 'secateur[{extra}]'")
        self.package, self.extra = package, extra


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """``". Did you mean 'x'?"`` for the nearest of `known`, or ``"."`` where none is near."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f". Did you mean {near[0]!r}?" if near else "."
