"""Large and sparse against small and dense: the table, and the picture of quality over nonzeros."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from secateur.report import format as fmt
from secateur.report.metric import Metric

if TYPE_CHECKING:
    from rich.table import Table

    from secateur.train.versus import Trained

_SPARSE, _DENSE = "#3f965e", "#9a4a3a"


def means(rows: Sequence[Trained]) -> list[tuple[Trained, list[float]]]:
    """One network of each kind, and the first quality of all its seeds, in the order in which they were trained."""
    found: dict[tuple[int, float], tuple[Trained, list[float]]] = {}
    for row in rows:
        found.setdefault((row.size, row.sparsity), (row, []))[1].append(next(iter(row.quality.values())))
    return list(found.values())


def contest_table(rows: Sequence[Trained]) -> Table:
    """A line for each network: what it is, its nonzeros, and its quality, the mean over seeds."""
    from rich.table import Table

    metric = _metric(rows)
    table = Table(title="large and sparse against small and dense", title_justify="left")
    table.add_column("network", overflow="fold", min_width=24)
    for head in ("nonzeros", metric.label, "over seeds"):
        table.add_column(head, justify="right")
    for row, values in means(rows):
        what = f"size {row.size}, {row.sparsity:.0%} pruned" if row.sparsity else f"size {row.size}, dense"
        span = f"{metric.text(min(values))} to {metric.text(max(values))}" if len(values) > 1 else ""
        table.add_row(what, f"{row.nonzeros:,}", metric.text(statistics.fmean(values)), span)
    return table


def draw(rows: Sequence[Trained], directory: Path, *, title: str) -> Path:
    """Write versus.json, the networks, and versus.svg, quality over nonzeros with a mark for each seed; returns the latter."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "versus.json").write_text(json.dumps([asdict(r) for r in rows], indent=1), encoding="utf-8")
    path = directory / "versus.svg"
    path.write_text(picture({title: rows}), encoding="utf-8")
    return path


def picture(contests: Mapping[str, Sequence[Trained]]) -> str:
    """SVG with a panel for each contest."""
    import io

    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.hashsalt": "secateur", "svg.fonttype": "none"}):
        figure = Figure(figsize=(4.6 * len(contests), 3.8), layout="constrained")
        FigureCanvasSVG(figure)
        panels = figure.subplots(1, len(contests), squeeze=False)[0]
        for panel, (title, rows) in zip(panels, contests.items(), strict=True):
            _panel(panel, rows, title)
        panels[0].legend(frameon=False, fontsize=9)
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()


def _panel(axes: Any, rows: Sequence[Trained], title: str) -> None:
    metric = _metric(rows)
    large = max(row.size for row in rows)
    for label, colour, sizes in (("large, pruned", _SPARSE, True), ("small, dense", _DENSE, False)):
        lines = [(r, v) for r, v in means(rows) if (r.size == large) == sizes or (r.size == large and not r.sparsity)]
        lines.sort(key=lambda line: line[0].nonzeros)
        axes.plot(
            [r.nonzeros for r, _ in lines], [metric.scaled(statistics.fmean(v)) for _, v in lines], color=colour, label=label
        )
        for row, values in lines:
            axes.plot([row.nonzeros] * len(values), [metric.scaled(v) for v in values], "o", ms=4, color=colour)
    axes.set_xscale("log")
    axes.set_xlabel("nonzero parameters")
    axes.set_ylabel(metric.label + (", percent" if metric.percent else ""))
    axes.set_title(fmt.printable(title), fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)


def _metric(rows: Sequence[Trained]) -> Metric:
    name = next(iter(rows[0].quality))
    return Metric.of(name, [row.quality[name] for row in rows])
