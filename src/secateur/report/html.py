"""`Report` -> one HTML page that needs nothing else: no network, no script, no file beside it."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import TYPE_CHECKING, Any

from secateur.errors import SecateurError
from secateur.report import charts, dial, picture, rows, terms
from secateur.report import format as fmt
from secateur.report.metric import Metric, main_metric
from secateur.report.svg import SERIES, to_svg
from secateur.report.verdict import verdict
from secateur.types import LayerReport, Point, Report

if TYPE_CHECKING:
    from markupsafe import Markup

MOST_SMALL = 24  #: small pictures (histograms, masks) of one kind
WIDE, NARROW, _HALF = 880, 360, 390  #: widths that charts are drawn for, in CSS pixels


def render(report: Report) -> str:
    """The whole report as one self-contained page. The same report gives the same bytes.

    Every text of the report is escaped; control characters are replaced. Parts without data are left out.

    Example::

        Path("report.html").write_text(render(result.report), encoding="utf-8")
    """
    metric = main_metric(report)
    context = empty_context() | {
        "title": report.title,
        "verdict": verdict(report),
        "tiles": _tiles(report),
        "rows": rows.before_after_rows(report),
        "seconds": fmt.duration(report.seconds) if report.seconds else "",
        "layers": _layers(report),
        "sensitivity": _sensitivity(report, metric),
        "curves": _curves(report.points, metric, report),
        "dial": _dial(report, metric),
        "histograms": _histograms(report.layers),
        "masks": _masks(report.layers),
        "skipped": report.skipped,
        "notes": report.notes,
        "recipe": report.recipe.strip(),
        "environment": report.environment,
    }
    return page(context)


def render_comparison(reports: Sequence[Report], title: str = "Comparison") -> str:
    """Several runs on one page: a table with one column a run, and all models on the same charts. Same template as `render`.

    Raises SecateurError where `reports` is empty.
    """
    if not reports:
        raise SecateurError("there is no report to compare: give at least one")
    table = rows.comparison_rows(reports)
    points = rows.comparison_points(reports)
    context = empty_context() | {
        "title": title,
        "verdict": f"{fmt.plural(len(reports), 'run')} side by side.",
        "curves": _curves(points, main_metric(reports[0]), reports[0]) if points else None,
        "notes": tuple(f"{name}: {note}" for name, r in zip(rows.titles(reports), reports, strict=True) for note in r.notes),
        "environment": _shared([r.environment for r in reports]),
        "runs": table,
    }
    return page(context)


def empty_context() -> dict[str, Any]:
    """Every part of the page, left out."""
    parts = ("timings", "layers", "sensitivity", "curves", "dial", "histograms", "masks", "runs")
    return {"tiles": (), "rows": (), "seconds": "", "skipped": {}, "notes": (), "recipe": "", **dict.fromkeys(parts)}


def page(context: dict[str, Any]) -> str:
    """The template filled with a context that has every key of `empty_context`."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=PackageLoader("secateur.report", "page"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(count=fmt.count, plural=fmt.plural, breakable=_breakable)
    script = _asset("page.js").strip()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")
    context |= {
        "style": Markup(_asset("page.css")),
        "script": Markup(script),
        "script_hash": digest,
        "terms": terms.GLOSSARY,
    }
    page = environment.get_template("page.html").render(context)
    return fmt.printable(page.replace("\r\n", "\n").replace("\r", "\n"))


def _breakable(name: str) -> Markup:
    """A dotted name that lines may break in, after its dots, slashes and underscores."""
    from markupsafe import Markup, escape

    return Markup(re.sub(r"([./_])", r"\1<wbr>", str(escape(name))))


def _asset(name: str) -> str:
    return resources.files("secateur.report").joinpath("page", name).read_text(encoding="utf-8")


def inline_svg(figure: Any, key: str, label: str) -> Markup:
    """A chart as SVG in the page; `key` is unique there, `label` what readers of the screen hear."""
    from markupsafe import Markup

    return Markup(to_svg(figure, key, fmt.printable(label)))


def _tiles(report: Report) -> tuple[dict[str, str], ...]:
    """The four figures that people ask for first."""
    table = {row.label: row for row in rows.before_after_rows(report)}
    metric = main_metric(report)
    tiles = [{"label": "Weights removed", "value": fmt.share(rows.removed(report)), "detail": ""}]
    kept = f"{fmt.count(report.after.nonzeros)} of {fmt.count(report.before.parameters)} parameters are left"
    tiles[0]["detail"] = kept
    for point in (p for p in report.dial if p.own):
        detail = f"of the gated multiply-adds, within a budget of {fmt.share(point.budget)}"
        tiles = [{"label": "Computed on average", "value": fmt.share(point.cost), "detail": detail}]
    quality = metric.label if metric else ""
    for label, name in ((quality, quality), (rows.DISK, rows.DISK), (rows.LATENCY, "Latency")):
        row = table.get(label)
        if row is not None and row.change:
            arrow = f"{_first(row.before)} to {_first(row.after)}"
            tiles.append({"label": name, "value": row.change, "detail": arrow})
    return tuple(tiles)


def _first(text: str) -> str:
    return text.split(" (")[0]


def _layers(report: Report) -> dict[str, Any] | None:
    if not report.layers:
        return None
    overall = rows.removed(report)
    draw = charts.layer_bars if len(report.layers) <= charts.MOST_BARS else charts.layer_skyline
    lowest, highest = (pick(layer.sparsity for layer in report.layers) for pick in (min, max))
    label = (
        f"Fraction of the weights removed in each of {fmt.plural(len(report.layers), 'layer')}: from {fmt.share(lowest)} to "
        f"{fmt.share(highest)}, {fmt.share(overall)} over all. The table below has the figures."
    )
    table = rows.layer_rows(report)
    return {
        "wide": inline_svg(draw(report.layers, overall, WIDE), "layers-wide", label),
        "narrow": inline_svg(draw(report.layers, overall, NARROW), "layers-narrow", label),
        "named": draw is charts.layer_bars,
        "overall": fmt.share(overall),
        "table": table,
        "parameters": sum(row.parameters for row in table),
        "kept": sum(row.kept for row in table),
        "errors": any(row.error for row in table),
        "open": len(table) <= charts.MOST_BARS,
    }


def _sensitivity(report: Report, metric: Metric | None) -> dict[str, Any] | None:
    ranked = rows.sensitivity_rows(report)
    if not ranked:
        return None
    metric = metric or Metric.of("quality", [q for r in ranked for q in r.curve.quality])
    before = report.before.quality.get(metric.name)
    label = (
        f"{metric.label} against the fraction removed when one layer alone is pruned, for {fmt.plural(len(ranked), 'layer')}. "
        f"Most sensitive: {', '.join(r.layer for r in ranked[: charts.HIGHLIGHTED])}."
    )
    steps = list(dict.fromkeys(s for r in sorted(ranked, key=lambda r: -len(r.sparsity)) for s in r.sparsity))
    steps.sort(key=lambda s: float(s.rstrip("%")))
    return {
        "wide": inline_svg(charts.sensitivity(ranked, metric, before, 540), "sensitivity-wide", label),
        "narrow": inline_svg(charts.sensitivity(ranked, metric, before, NARROW), "sensitivity-narrow", label),
        "top": [(i, r) for i, r in enumerate(ranked[: charts.HIGHLIGHTED])],
        "others": max(len(ranked) - charts.HIGHLIGHTED, 0),
        "rows": ranked,
        "steps": steps,
        "metric": metric,
        "cells": [dict(zip(r.sparsity, r.quality, strict=True)) for r in ranked],
    }


def _curves(points: Sequence[Point], metric: Metric | None, report: Report) -> dict[str, Any] | None:
    if not points:
        return None
    metric = metric or Metric.of("quality", [p.quality for p in points])
    before = report.before.quality.get(metric.name)
    drawn = []
    for field, (words, _) in charts.AXES.items():
        values = {getattr(p, field) for p in points} - {None}
        if field == "sparsity" or len(values) > 1:
            label = f"{metric.label} against {words} for {fmt.plural(len(points), 'model')}; the table has the figures."
            figure = charts.tradeoff(points, field, metric, before, _HALF)
            drawn.append({"title": f"{metric.label} and {words}", "svg": inline_svg(figure, f"curve-{field}", label)})
    table = rows.point_rows(points, metric)
    names = dict.fromkeys(fmt.printable(p.label) for p in points)
    return {
        "charts": drawn,
        "legend": [(i % SERIES, charts.marker(i, charts.MARKER_SIGNS), name) for i, name in enumerate(names)],
        "table": table,
        "values": [(p.sparsity, p.quality, p.parameters, p.macs, p.bytes_disk, p.latency_ms) for p in points],
        "columns": {f: any(getattr(r, f) for r in table) for f in ("parameters", "macs", "bytes_disk", "latency")},
        "metric": metric,
        "best": sum(row.best for row in table),
    }


def _dial(report: Report, metric: Metric | None) -> dict[str, Any] | None:
    metric = metric or Metric.of("quality", [p.quality for p in report.dial])
    return dial.section(report.dial, metric, inline_svg, _HALF)


def _histograms(layers: Sequence[LayerReport]) -> dict[str, Any] | None:
    having = [layer for layer in layers if layer.histogram_before or layer.histogram_after]
    shown = _largest(having)
    items = []
    for i, layer in enumerate(shown):
        left = f"{fmt.count(layer.kept)} of {fmt.count(layer.parameters)} left"
        label = f"Histogram of the weights of {layer.name} before and after: {left}"
        items.append({"name": layer.name, "detail": left, "svg": inline_svg(charts.histogram(layer), f"histogram-{i}", label)})
    return {"items": items, "left_out": len(having) - len(shown)} if items else None


def _masks(layers: Sequence[LayerReport]) -> dict[str, Any] | None:
    having = [layer for layer in layers if layer.picture and layer.picture[0]]
    items = []
    for layer in _largest(having):
        assert layer.picture is not None
        source, top = picture.mask_image(layer.picture)
        height, width = len(layer.picture), len(layer.picture[0])
        exact = picture.of_elements(layer.picture) and height * width == layer.parameters
        how = "each pixel one weight" if exact else f"full green = {fmt.share(top, 0)} kept"
        alt = f"Mask of {layer.name}, {height} by {width} cells, {fmt.share(1 - layer.sparsity)} kept; {how}."
        kept, dims = fmt.share(1 - layer.sparsity), fmt.shape(layer.shape)
        items.append({"name": layer.name, "source": source, "alt": alt, "shape": dims, "how": how, "kept": kept})
    return {"items": items, "left_out": len(having) - len(items)} if items else None


def _largest(layers: Sequence[LayerReport]) -> list[LayerReport]:
    """The layers with most weights, in the model's order."""
    order = sorted(range(len(layers)), key=lambda i: (-layers[i].parameters, i))[:MOST_SMALL]
    return [layers[i] for i in sorted(order)]


def _shared(environments: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """What the runs' environments say; where they differ, every value."""
    keys = dict.fromkeys(key for e in environments for key in e)
    return {key: "; ".join(dict.fromkeys(e.get(key, "not recorded") for e in environments)) for key in keys}
