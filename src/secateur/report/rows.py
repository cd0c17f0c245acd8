"""A `Report` turned into rows of finished text: the one place that the page and the terminal take their tables from."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from secateur.report import format as fmt
from secateur.report.metric import Metric, main_metric, metric_named
from secateur.report.pareto import front
from secateur.types import Latency, LayerReport, Measurement, Point, Report, Sensitivity

LATENCY = "Latency, median (quartiles)"
DISK = "Size on disk"
#: Words by which a note says why something was not measured: a note that begins with one of them is the reason.
_REASONS = {
    "macs": ("macs", "multiply-adds"),
    "macs_nonzero": ("macs", "multiply-adds"),
    "bytes_disk": ("bytes on disk", "disk"),
    "latency": ("latency",),
}


@dataclass(frozen=True)
class Row:
    """One line of the before/after table. `better` is None where nothing changed or neither direction is the better one."""

    label: str
    before: str
    after: str
    change: str
    better: bool | None = None
    note: str = ""


@dataclass(frozen=True)
class LayerRow:
    """One line of the table of layers; `sparsity` is the number behind `removed`."""

    name: str
    shape: str
    parameters: int
    kept: int
    sparsity: float
    removed: str
    pattern: str
    error: str
    error_value: float | None


@dataclass(frozen=True)
class PointRow:
    """One line of the table of curves. Empty text = not measured."""

    label: str
    sparsity: str
    quality: str
    parameters: str
    macs: str
    bytes_disk: str
    latency: str
    best: bool  #: on the Pareto front of sparsity and quality


@dataclass(frozen=True)
class SensitivityRow:
    """One layer's curve, `drop` = mean loss of quality over it, in the metric's unit (percent points for shares)."""

    layer: str
    drop: float
    drop_text: str
    sparsity: tuple[str, ...]
    quality: tuple[str, ...]
    curve: Sensitivity


@dataclass(frozen=True)
class ComparisonTable:
    """Several runs side by side. A line holds its label, the figure before the first run, and each run's row or None."""

    runs: tuple[str, ...]
    lines: tuple[tuple[str, str, tuple[Row | None, ...]], ...]


def removed(report: Report) -> float:
    """Fraction of the weights removed: of the pruned layers where they are listed, else of all parameters."""
    if report.layers:
        total = sum(layer.parameters for layer in report.layers)
        return 1.0 - sum(layer.kept for layer in report.layers) / total if total else 0.0
    return removed_overall(report)


def removed_overall(report: Report) -> float:
    """Fraction of all the model's parameters that are gone, zeroed or cut away, relative to what was there before."""
    return 1.0 - report.after.nonzeros / report.before.parameters if report.before.parameters else 0.0


def before_after_rows(report: Report) -> tuple[Row, ...]:
    """Quality, then sizes, then cost: each before, after and the change in words."""
    before, after = report.before, report.after
    names = dict.fromkeys([*before.quality, *after.quality])
    rows = [_quality_row(report, metric_named(report, name)) for name in names]
    rows.append(_plain_row("Parameters", before.parameters, after.parameters, fmt.count))
    rows.append(_plain_row("Nonzero parameters", before.nonzeros, after.nonzeros, fmt.count))
    rows.append(_measured_row(report, "MACs, dense", "macs", fmt.compact, "fewer", "more"))
    rows.append(_measured_row(report, "MACs, nonzero weights", "macs_nonzero", fmt.compact, "fewer", "more"))
    rows.append(_plain_row("Size in memory", before.bytes_memory, after.bytes_memory, fmt.size))
    rows.append(_measured_row(report, DISK, "bytes_disk", fmt.size, "smaller", "larger"))
    rows.append(_latency_row(report))
    return tuple(rows)


def layer_rows(report: Report) -> tuple[LayerRow, ...]:
    """The layers in the order of the report."""
    return tuple(_layer_row(layer) for layer in report.layers)


def point_rows(points: Sequence[Point], metric: Metric | None = None) -> tuple[PointRow, ...]:
    """The curves' points in their order; without a `metric` higher is better and the figures are shown as they are."""
    metric = metric or Metric.of("quality", [p.quality for p in points])
    best = set(front([p.sparsity for p in points], [p.quality for p in points], first_higher=True, second_higher=metric.higher))
    return tuple(
        PointRow(
            fmt.printable(p.label),
            fmt.share(p.sparsity),
            metric.text(p.quality),
            _or_empty(fmt.count, p.parameters),
            _or_empty(fmt.compact, p.macs),
            _or_empty(fmt.size, p.bytes_disk),
            _or_empty(fmt.milliseconds, p.latency_ms),
            i in best,
        )
        for i, p in enumerate(points)
    )


def sensitivity_rows(report: Report) -> tuple[SensitivityRow, ...]:
    """Layers that suffer most come first; a curve with NaN in it is the worst of all. Curves without a point are left out."""
    metric = main_metric(report) or Metric.of("quality", [q for s in report.sensitivity for q in s.quality])
    reference = report.before.quality.get(metric.name)
    rows = []
    for curve in (s for s in report.sensitivity if s.quality):
        start = curve.quality[0] if reference is None else reference
        losses = [-metric.gain(metric.scaled(start), metric.scaled(q)) for q in curve.quality]
        drop = sum(losses) / len(losses)
        text = fmt.points(-round(drop, 9)) if metric.percent else fmt.difference(drop if not metric.higher else -drop)
        rows.append(
            SensitivityRow(
                fmt.printable(curve.layer),
                drop,
                text,
                tuple(fmt.share(s, 0) for s in curve.sparsity),
                tuple(metric.text(q) for q in curve.quality),
                curve,
            )
        )
    return tuple(sorted(rows, key=lambda r: (not math.isnan(r.drop), -r.drop)))


def titles(reports: Sequence[Report]) -> tuple[str, ...]:
    """The reports' titles, numbered where one comes twice."""
    seen: dict[str, int] = {}
    result = []
    for report in reports:
        seen[report.title] = seen.get(report.title, 0) + 1
        result.append(report.title if seen[report.title] == 1 else f"{report.title} ({seen[report.title]})")
    return tuple(result)


def comparison_rows(reports: Sequence[Report]) -> ComparisonTable:
    """All runs side by side: for each figure what it was before the first run, and after each with its change."""
    tables = [{row.label: row for row in before_after_rows(report)} for report in reports]
    labels = dict.fromkeys(label for table in tables for label in table)
    lines = []
    for label in labels:
        found = [_without_spread(table.get(label)) for table in tables]
        first = next(row for row in found if row is not None)
        lines.append((first.label, first.before, tuple(_with_own_start(row, first.before) for row in found)))
    return ComparisonTable(tuple(fmt.printable(t) for t in titles(reports)), tuple(lines))


def _without_spread(row: Row | None) -> Row | None:
    """The row without quartiles, for which a table of several runs has no room; each run's own page has them."""
    if row is None or row.label != LATENCY:
        return row
    before, after = (text.partition(" (")[0] for text in (row.before, row.after))
    return replace(row, label="Latency, median", before=before, after=after)


def _with_own_start(row: Row | None, shown: str) -> Row | None:
    """The row, saying in its change what it started from where that is not what the table shows for all runs."""
    if row is None or row.before == shown or not row.change:
        return row
    return replace(row, change=f"{row.change}, from {row.before}")


def comparison_points(reports: Sequence[Report]) -> tuple[Point, ...]:
    """Each run's outcome as a point under its title, where the runs share a quality; runs without it are left out."""
    metric = main_metric(reports[0])
    if metric is None:
        return ()
    return tuple(
        point_of(title, report.before, report.after, report.after.quality[metric.name])
        for title, report in zip(titles(reports), reports, strict=True)
        if metric.name in report.after.quality
    )


def same_conditions(a: Latency, b: Latency) -> bool:
    """Whether two latencies were measured alike, so that their ratio means something."""
    return (a.batch, a.threads, a.dtype, a.device) == (b.batch, b.threads, b.dtype, b.device)


def same_speed(a: Latency, b: Latency) -> bool:
    """Whether the difference is within the spread (each median inside the other's quartiles) or under 3%."""
    inside = a.low_ms <= b.median_ms <= a.high_ms and b.low_ms <= a.median_ms <= b.high_ms
    return inside or abs(b.median_ms - a.median_ms) < 0.03 * a.median_ms


def _quality_row(report: Report, metric: Metric) -> Row:
    before, after = report.before.quality.get(metric.name), report.after.quality.get(metric.name)
    if before is None or after is None:
        texts = [fmt.NOT_MEASURED if v is None else metric.text(v) for v in (before, after)]
        return Row(metric.label, texts[0], texts[1], "", None, _reason(report, (metric.name.lower(), "evaluat")))
    texts = list(metric.pair(before, after))
    gain = metric.gain(before, after)
    better = None if gain == 0 or math.isnan(gain) else gain > 0
    note = "higher is better" if metric.higher else "lower is better"
    return Row(metric.label, texts[0], texts[1], metric.change(before, after), better, note)


def _plain_row(
    label: str, before: int, after: int, text: Callable[[int], str], less: str = "smaller", more: str = "larger"
) -> Row:
    if text is fmt.count:
        less, more = "fewer", "more"
    better = None if before == after else after < before
    return Row(label, text(before), text(after), fmt.times(before, after, less, more), better)


def _measured_row(report: Report, label: str, field: str, text: Callable[[int], str], less: str, more: str) -> Row:
    before, after = getattr(report.before, field), getattr(report.after, field)
    if before is not None and after is not None:
        return _plain_row(label, before, after, text, less, more)
    texts = [fmt.NOT_MEASURED if v is None else text(v) for v in (before, after)]
    return Row(label, texts[0], texts[1], "", None, _reason(report, _REASONS[field]))


def _latency_row(report: Report) -> Row:
    before, after = report.before.latency, report.after.latency
    texts = [fmt.NOT_MEASURED if v is None else fmt.latency(v) for v in (before, after)]
    if before is None or after is None:
        measured = before or after
        note = _reason(report, _REASONS["latency"])
        reasons = (note, measured and fmt.conditions(measured))
        return Row(LATENCY, texts[0], texts[1], "", None, "; ".join(r for r in reasons if r))
    if not same_conditions(before, after):
        note = f"before: {fmt.conditions(before)}; after: {fmt.conditions(after)}"
        return Row(LATENCY, texts[0], texts[1], "conditions differ", None, note)
    if same_speed(before, after):
        return Row(LATENCY, texts[0], texts[1], "no faster", None, fmt.conditions(after))
    change = fmt.times(before.median_ms, after.median_ms, "faster", "slower")
    return Row(LATENCY, texts[0], texts[1], change, after.median_ms < before.median_ms, fmt.conditions(after))


def _reason(report: Report, words: Sequence[str]) -> str:
    notes = (fmt.printable(n) for n in report.notes)
    return next((n for n in notes if n.lower().startswith(tuple(words))), "")


def _layer_row(layer: LayerReport) -> LayerRow:
    return LayerRow(
        fmt.printable(layer.name),
        fmt.shape(layer.shape),
        layer.parameters,
        layer.kept,
        layer.sparsity,
        fmt.share(layer.sparsity),
        fmt.printable(layer.pattern),
        "" if layer.error is None else fmt.number(layer.error, 3),
        layer.error,
    )


def _or_empty(text: Callable[..., str], value: float | None) -> str:
    return "" if value is None else text(value)


def point_of(label: str, before: Measurement, after: Measurement, quality: float) -> Point:
    """A whole model as one point: what is left of `before` in `after`, and what it costs."""
    sparsity = 1.0 - after.nonzeros / before.parameters if before.parameters else 0.0
    latency = after.latency.median_ms if after.latency else None
    return Point(label, sparsity, quality, after.parameters, after.macs, after.bytes_disk, latency)
