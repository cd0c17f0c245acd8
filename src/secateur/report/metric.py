"""A quality as a reader expects it: accuracy in percent, perplexity as it is, and which direction is the better one."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

from secateur.measure.quality import higher_is_better
from secateur.report import format as fmt
from secateur.types import Report

_PLAIN = ("loss", "perplexity")
_SHARE = re.compile(r"acc|error|precision|recall|auc|top[-_ ]?\d|(^|[^a-z])(f1|iou|miou|map|dice|exact[-_ ]?match)([^a-z]|$)")


@dataclass(frozen=True)
class Metric:
    """One quality: its name, whether more is better, and by what its values are multiplied to be percent (None: not a share).

    >>> Metric.of("accuracy", [0.972, 0.969]).text(0.972)
    '97.2%'
    """

    name: str
    higher: bool
    percent: float | None

    @classmethod
    def of(cls, name: str, values: Iterable[float]) -> Metric:
        """The metric `name`. Shares such as accuracy come as 0..1 or as 0..100; `values`, all that is known, tell which."""
        lower = name.lower()
        finite = [v for v in values if math.isfinite(v)]
        percent = None
        if _SHARE.search(lower) and not any(w in lower for w in _PLAIN) and all(0 <= v <= 100 for v in finite):
            percent = 100.0 if all(v <= 1 for v in finite) else 1.0
        return cls(name, higher_is_better(name), percent)

    @property
    def label(self) -> str:
        """The name as a row or an axis is headed."""
        text = fmt.printable(self.name).replace("_", " ")
        return text[:1].upper() + text[1:]

    def scaled(self, value: float) -> float:
        """`value` as it is drawn on an axis: percent where it is a share."""
        return value * self.percent if self.percent else value

    def text(self, value: float, digits: int = 1) -> str:
        """``'97.2%'`` or ``'27.66'``."""
        return fmt.share(self.scaled(value) / 100, digits) if self.percent else fmt.number(value)

    def pair(self, before: float, after: float) -> tuple[str, str]:
        """Both values, with a second digit where one would hide the difference."""
        close = 0 < abs(self.scaled(after) - self.scaled(before)) < 0.15
        digits = 2 if close else 1
        return self.text(before, digits), self.text(after, digits)

    def change(self, before: float, after: float) -> str:
        """``'-0.3 points'`` or ``'+9.19'``."""
        difference = self.scaled(after) - self.scaled(before)
        return fmt.points(round(difference, 9)) if self.percent else fmt.difference(difference)

    def gain(self, before: float, after: float) -> float:
        """How much better `after` is, in the metric's own unit; negative where it is worse."""
        return after - before if self.higher else before - after


def main_metric(report: Report) -> Metric | None:
    """The quality that the verdict and the curves are about: `report.metric`, else the first that was measured."""
    name = report.metric or next(iter({**report.before.quality, **report.after.quality}), None)
    return None if name is None else metric_named(report, name)


def metric_named(report: Report, name: str) -> Metric:
    """The metric `name` with its unit read off every value of it in the report."""
    values = [m.quality[name] for m in (report.before, report.after) if name in m.quality]
    if name == report.metric:
        values += [p.quality for p in report.points] + [p.quality for p in report.dial]
        values += [q for s in report.sensitivity for q in s.quality]
    return Metric.of(name, values)
