"""The charts of the report, each a function from plain data to a matplotlib figure that `secateur.report.svg` writes out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from secateur.report import format as fmt
from secateur.report.metric import Metric
from secateur.report.pareto import front
from secateur.report.rows import SensitivityRow
from secateur.report.svg import colour, drawn, new_axes, new_figure, series_colour
from secateur.types import LayerReport, Point

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    from secateur.report.deployed import LayerTime

MOST_BARS = 40  #: layers up to which each has a bar with its name; above, all are drawn side by side without names
HIGHLIGHTED = 6  #: sensitivity curves that are drawn in colour and numbered
MARKERS = "os^DvPX*"  #: shapes by label, with `MARKER_SIGNS` their signs in running text
MARKER_SIGNS = "●■▲◆▼✚✖★"
#: What a model can be drawn against: field of Point, words of the axis, whether more is better.
AXES = {
    "sparsity": ("weights removed", True),
    "macs": ("MACs", False),
    "bytes_disk": ("size on disk", False),
    "latency_ms": ("median latency", False),
}


@drawn
def layer_bars(layers: Sequence[LayerReport], overall: float, width: float) -> Figure:
    """One horizontal bar for each layer: the fraction removed. The dashed line is all layers together."""
    longest = max(len(fmt.printable(layer.name)) for layer in layers)
    limit = min(longest, int(width * 0.42 / 6.3))
    figure = new_figure(width, 22 * len(layers) + 48)
    axes = new_axes(figure, 6.3 * limit + 14, 52, 6, 42)
    rows = range(len(layers))
    axes.barh(rows, [100] * len(layers), height=0.62, color=colour("track"))
    axes.barh(rows, [100 * layer.sparsity for layer in layers], height=0.62, color=colour("leaf"))
    axes.axvline(100 * overall, color=colour("ink"), linewidth=1.2, linestyle=(0, (3, 3)))
    axes.set_yticks(rows, [fmt.shorten(fmt.printable(layer.name), limit) for layer in layers], color=colour("ink"))
    for row, layer in enumerate(layers):
        axes.text(101.5, row, fmt.share(layer.sparsity), va="center", color=colour("ink"), fontsize=11)
    axes.set_ylim(len(layers) - 0.4, -0.6)
    _percent_x(axes)
    axes.spines["bottom"].set_visible(False)
    return figure


@drawn
def layer_skyline(layers: Sequence[LayerReport], overall: float, width: float) -> Figure:
    """The fraction removed of very many layers, side by side in the model's order."""
    figure = new_figure(width, 260)
    axes = new_axes(figure, 48, 12, 12, 42)
    edges = [i + 0.5 for i in range(len(layers) + 1)]
    axes.stairs([100] * len(layers), edges, fill=True, color=colour("track"), linewidth=0)
    axes.stairs([100 * layer.sparsity for layer in layers], edges, fill=True, color=colour("leaf"), linewidth=0)
    axes.axhline(100 * overall, color=colour("ink"), linewidth=1.2, linestyle=(0, (3, 3)))
    axes.set_xlim(edges[0], edges[-1])
    axes.set_ylim(0, 100)
    axes.set_yticks(range(0, 101, 25), [f"{t}%" for t in range(0, 101, 25)])
    _label(axes, "Position of the layer in the model", "")
    return figure


@drawn
def time_bars(layers: Sequence[LayerTime], width: float) -> Figure:
    """Two horizontal bars for each layer: milliseconds dense and in the best sparse runtime, pale where dense was faster."""
    longest = max(len(fmt.printable(layer.name)) for layer in layers)
    limit = min(longest, int(width * 0.42 / 6.3))
    figure = new_figure(width, 30 * len(layers) + 48)
    axes = new_axes(figure, 6.3 * limit + 14, 60, 6, 42)
    rows = range(len(layers))
    shades = [colour("leaf" if layer.replaced else "leaf-soft") for layer in layers]
    axes.barh([row - 0.19 for row in rows], [layer.dense_ms or 0.0 for layer in layers], height=0.34, color=colour("muted"))
    axes.barh([row + 0.19 for row in rows], [layer.sparse_ms or 0.0 for layer in layers], height=0.34, color=shades)
    axes.set_yticks(rows, [fmt.shorten(fmt.printable(layer.name), limit) for layer in layers], color=colour("ink"))
    axes.set_ylim(len(layers) - 0.4, -0.6)
    for row, layer in enumerate(layers):
        dense, sparse = layer.dense_ms or 0.0, layer.sparse_ms or 0.0
        text = f"{dense / sparse:.1f}x" if layer.replaced and sparse else "dense"
        axes.annotate(text, (max(dense, sparse), row), (5, 0), textcoords="offset points", va="center", color=colour("ink"))
    axes.set_xlim(0, None)
    axes.xaxis.set_major_locator(_few_ticks())
    _label(axes, "Milliseconds", "")
    return figure


@drawn
def time_skyline(layers: Sequence[LayerTime], width: float) -> Figure:
    """Milliseconds of very many layers side by side in the model's order: dense behind, the best sparse runtime before."""
    figure = new_figure(width, 260)
    axes = new_axes(figure, 48, 12, 12, 42)
    edges = [i + 0.5 for i in range(len(layers) + 1)]
    axes.stairs([layer.dense_ms or 0.0 for layer in layers], edges, fill=True, color=colour("muted"), linewidth=0)
    for shade, chosen in (("leaf-soft", False), ("leaf", True)):
        heights = [(layer.sparse_ms or 0.0) if layer.replaced == chosen else 0.0 for layer in layers]
        axes.stairs(heights, edges, fill=True, color=colour(shade), linewidth=0)
    axes.set_xlim(edges[0], edges[-1])
    axes.set_ylim(0, None)
    _label(axes, "Position of the layer in the model", "Milliseconds")
    return figure


@drawn
def sensitivity(rows: Sequence[SensitivityRow], metric: Metric, before: float | None, width: float) -> Figure:
    """Quality against the sparsity of one layer at a time; `rows` come worst first and the first ones are numbered."""
    figure = new_figure(width, 340)
    axes = new_axes(figure, 58, 28, 12, 42)
    for rank, row in reversed(list(enumerate(rows))):
        x = [100 * s for s in row.curve.sparsity]
        y = [metric.scaled(q) for q in row.curve.quality]
        if rank < HIGHLIGHTED:
            axes.plot(x, y, color=series_colour(rank), linewidth=2, marker="o", markersize=3.5, clip_on=False)
        else:
            axes.plot(x, y, color=colour("muted"), linewidth=1, alpha=0.35 if len(rows) < 60 else 0.15)
    if before is not None and math.isfinite(before):
        axes.axhline(metric.scaled(before), color=colour("ink"), linewidth=1.2, linestyle=(0, (3, 3)))
    _quality_y(axes, metric)
    reach = max((100 * s for r in rows for s in r.curve.sparsity), default=0.0) or 1.0
    axes.set_xlim(-0.02 * reach, 1.02 * reach)
    _number_ends(axes, rows[:HIGHLIGHTED], metric)
    axes.xaxis.set_major_formatter(lambda v, _: f"{v:g}%")
    _label(axes, "Weights removed from one layer", metric.label)
    return figure


@drawn
def tradeoff(points: Sequence[Point], field: str, metric: Metric, before: float | None, width: float) -> Figure:
    """Quality against one cost of the models, a curve for each label, and the Pareto front as a broad stepped band."""
    label, more = AXES[field]
    known = [
        p for p in points if math.isfinite(p.quality) and math.isfinite(math.nan if (x := getattr(p, field)) is None else x)
    ]
    xs = [float(getattr(p, field)) for p in known]
    divisor, unit = (0.01, "") if field == "sparsity" else (1.0, "ms")
    if field in ("macs", "bytes_disk"):
        divisor, unit = fmt.unit_for(max(xs, default=0.0), bytes_=field == "bytes_disk")
    figure = new_figure(width, 300)
    axes = new_axes(figure, 58, 16, 12, 42)
    best = front(xs, [p.quality for p in known], first_higher=more, second_higher=metric.higher)
    axes.plot(
        [xs[i] / divisor for i in best],
        [metric.scaled(known[i].quality) for i in best],
        drawstyle="steps-pre" if more else "steps-post",
        color=colour("leaf-soft"),
        linewidth=9,
        marker="o",
        markersize=15,
        markeredgewidth=0,
        solid_capstyle="round",
        solid_joinstyle="round",
    )
    if before is not None and math.isfinite(before):
        axes.axhline(metric.scaled(before), color=colour("ink"), linewidth=1.2, linestyle=(0, (3, 3)))
    for index, name in enumerate(dict.fromkeys(p.label for p in points)):
        own = sorted((x / divisor, metric.scaled(p.quality)) for x, p in zip(xs, known, strict=True) if p.label == name)
        axes.plot(
            [x for x, _ in own],
            [y for _, y in own],
            color=series_colour(index),
            marker=marker(index, MARKERS),
            markersize=8,
            markeredgecolor=colour("surface"),
            linewidth=1.6,
        )
    _quality_y(axes, metric)
    axes.margins(x=0.06)
    if field == "sparsity":
        axes.xaxis.set_major_formatter(lambda v, _: f"{v:g}%")
    axes.xaxis.set_major_locator(_few_ticks())
    _label(axes, f"{label[0].upper()}{label[1:]}" + (f" ({unit})" if unit else ""), metric.label)
    return figure


@drawn
def histogram(layer: LayerReport) -> Figure:
    """Weights before as an outline and the nonzero weights after as a filled shape, on the same edges."""
    figure = new_figure(168, 96)
    axes = new_axes(figure, 3, 3, 4, 20)
    for values, filled in ((layer.histogram_before, False), (layer.histogram_after, True)):
        if values is not None and len(values[0]) == len(values[1]) + 1 and values[1]:
            edges, counts = values
            if filled:
                axes.stairs(counts, edges, fill=True, color=colour("leaf"), linewidth=0)
            else:
                axes.stairs(counts, edges, color=colour("muted"), linewidth=1.3)
    axes.set_ylim(bottom=0)
    axes.set_yticks([])
    low, high = axes.get_xlim()
    edges = next((h[0] for h in (layer.histogram_before, layer.histogram_after) if h and h[0]), (low, high))
    low, high = min(edges), max(edges)
    axes.set_xlim(low, high if high > low else low + 1)
    axes.set_xticks([low, 0, high] if low < 0 < high else [low, high])
    for text, where in zip(axes.set_xticklabels([fmt.number(t, 2) for t in axes.get_xticks()]), axes.get_xticks(), strict=True):
        text.set_horizontalalignment("left" if where == low else "right" if where == high else "center")
    axes.tick_params(labelsize=10)
    return figure


def marker(index: int, signs: str) -> str:
    """The shape of the `index`-th label: with the eight colours it makes 64 distinct pairs."""
    return signs[(index + index // len(signs)) % len(signs)]


def _few_ticks() -> MaxNLocator:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(nbins=6, steps=[1, 2, 2.5, 5, 10])


def _percent_x(axes: Axes) -> None:
    axes.set_xlim(0, 100)
    axes.set_xticks(range(0, 101, 25), [f"{t}%" for t in range(0, 101, 25)])
    axes.set_xlabel("Weights removed", color=colour("muted"), fontsize=11, labelpad=6)


def _quality_y(axes: Axes, metric: Metric) -> None:
    axes.grid(axis="y", color=colour("line"), linewidth=0.8)
    if metric.percent:
        axes.yaxis.set_major_formatter(lambda v, _: f"{v:g}%")
    else:
        axes.yaxis.set_major_formatter(lambda v, _: f"{v:,.10g}")


def _label(axes: Axes, x: str, y: str) -> None:
    axes.set_xlabel(x, color=colour("muted"), fontsize=11, labelpad=6)
    if y:
        axes.set_ylabel(fmt.shorten(y, 40), color=colour("muted"), fontsize=11, labelpad=4)


def _number_ends(axes: Axes, rows: Sequence[SensitivityRow], metric: Metric) -> None:
    """Write each highlighted curve's rank at its right end, moved apart where ends meet."""
    ends = [
        (metric.scaled(r.curve.quality[-1]), 100 * r.curve.sparsity[-1], rank)
        for rank, r in enumerate(rows)
        if r.curve.quality and math.isfinite(r.curve.quality[-1])
    ]
    low, high = axes.get_ylim()
    gap = (high - low) * 0.047
    ends.sort()
    heights = [y for y, _, _ in ends]
    for i in range(1, len(heights)):
        heights[i] = max(heights[i], heights[i - 1] + gap)
    overflow = max(heights[-1] - high, 0) if heights else 0
    for i in range(len(heights) - 1, -1, -1):
        ceiling = high if i == len(heights) - 1 else heights[i + 1] - gap
        heights[i] = min(heights[i], ceiling) if overflow else heights[i]
    right = axes.get_xlim()[1]
    for (_, _, rank), height in zip(ends, heights, strict=True):
        axes.annotate(
            str(rank + 1),
            (right, height),
            xytext=(8, 0),
            textcoords="offset points",
            va="center",
            color=series_colour(rank),
            fontsize=12,
            fontweight="bold",
            annotation_clip=False,
        )
