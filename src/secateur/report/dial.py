"""The part of the page that shows a model with gates: quality along its dial, and what single inputs cost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from secateur.report import format as fmt
from secateur.report.metric import Metric
from secateur.report.svg import colour, drawn, new_axes, new_figure, series_colour
from secateur.types import DialPoint

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST = 3  #: budgets whose inputs are drawn


def rows(points: Sequence[DialPoint], metric: Metric) -> list[dict[str, str]]:
    """The table: budget, quality, mean cost, and between which shares the inputs lie."""
    found = []
    for point in points:
        used = [i for i, count in enumerate(point.counts) if count]
        span = f"{fmt.share(used[0] / len(point.counts))} to {fmt.share((used[-1] + 1) / len(point.counts))}" if used else ""
        found.append(
            {
                "budget": fmt.share(point.budget),
                "quality": metric.text(point.quality),
                "cost": fmt.share(point.cost),
                "span": span,
                "inputs": fmt.count(sum(point.counts)),
            }
        )
    return found


@drawn
def curve(points: Sequence[DialPoint], metric: Metric, width: float) -> Figure:
    """Quality over the mean cost."""
    figure = new_figure(width, 260)
    axes = new_axes(figure, 58, 14, 12, 42)
    ordered = sorted(points, key=lambda p: p.cost)
    axes.plot(
        [100 * p.cost for p in ordered], [metric.scaled(p.quality) for p in ordered], "o-", color=colour("leaf"), markersize=5
    )
    axes.set_xlabel("mean multiply-adds, percent of dense", color=colour("muted"))
    axes.set_ylabel(metric.label, color=colour("muted"))
    return figure


@drawn
def spread(points: Sequence[DialPoint], width: float) -> Figure:
    """How many inputs cost how much, at a few budgets."""
    figure = new_figure(width, 260)
    axes = new_axes(figure, 58, 14, 12, 42)
    for index, point in enumerate(chosen(points)):
        edges = [100 * i / len(point.counts) for i in range(len(point.counts) + 1)]
        shares = [100 * count / max(sum(point.counts), 1) for count in point.counts]
        axes.stairs(shares, edges, color=series_colour(index), linewidth=1.8)
    axes.set_xlim(0, 100)
    axes.set_ylim(0, None)
    axes.set_xlabel("multiply-adds of one input, percent of dense", color=colour("muted"))
    axes.set_ylabel("inputs, percent", color=colour("muted"))
    return figure


def chosen(points: Sequence[DialPoint]) -> list[DialPoint]:
    """The budgets below 1 whose inputs are drawn: the largest, the smallest and the middle."""
    below = [p for p in points if p.budget < 1]
    return [below[i] for i in sorted({0, len(below) // 2, len(below) - 1})] if below else []


def section(points: Sequence[DialPoint], metric: Metric, svg: Any, width: float) -> dict[str, Any] | None:
    """What the template needs; None where the model has no dial. ``svg(figure, key, label)`` makes a chart part of a page."""
    if not points:
        return None
    along = f"{metric.label} against the mean cost at {fmt.plural(len(points), 'budget')}; the table has the figures."
    costs = "How many inputs cost which share of the dense multiply-adds, at a few budgets."
    return {
        "curve": svg(curve(points, metric, width), "dial-curve", along),
        "spread": svg(spread(points, width), "dial-spread", costs) if chosen(points) else "",
        "legend": [(i, fmt.share(p.budget)) for i, p in enumerate(chosen(points))],
        "rows": rows(points, metric),
        "metric": metric,
    }
