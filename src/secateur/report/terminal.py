"""The report's tables in the terminal: the same rows as the page, readable at 80 columns and without colour."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from secateur.report import format as fmt
from secateur.report import rows
from secateur.report.metric import Metric
from secateur.types import Measurement, Point, Report

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

_TONES = {True: "green", False: "red", None: ""}


def before_after(report: Report) -> Table:
    """The table of figures before and after, with the change in words.

    Example::

        rich.print(before_after(result.report))
    """
    table = _table(report.title)
    table.add_column("", ratio=1, min_width=18)
    for head in ("Before", "After", "Change"):
        table.add_column(head, justify="right")
    remarks = []
    for row in rows.before_after_rows(report):
        cells = (_text(row.label), _text(row.before), _text(row.after), _text(row.change, _TONES[row.better]))
        table.add_row(*cells, style="" if row.change else "dim")
        if row.label == rows.LATENCY and row.change:
            remarks.append(f"Latency: {row.note}")
        elif row.note and not row.change:
            remarks.append(row.note)
    if remarks:
        table.caption = _text("\n".join(dict.fromkeys(remarks)))
    return table


def measurement(found: Measurement) -> Table:
    """The figures of one model, and under which conditions the latency was measured."""
    table = _table("Measured")
    table.add_column("", ratio=1, min_width=18)
    table.add_column("", justify="right")
    for row in rows.before_after_rows(Report("", found, found)):
        table.add_row(_text(row.label), _text(row.before))
    if found.latency is not None:
        table.caption = _text(f"Latency: {fmt.conditions(found.latency)}")
    return table


def layers_table(report: Report) -> Table:
    """One line for each pruned layer: what was removed and what is left."""
    lines = rows.layer_rows(report)
    errors = any(line.error for line in lines)
    table = _table("Layers")
    table.add_column("Layer", ratio=1, overflow="fold", min_width=16)
    for head in ("Removed", "Weights", "Left"):
        table.add_column(head, justify="right", no_wrap=True)
    table.add_column("Pattern", overflow="fold")
    if errors:
        table.add_column("Error", justify="right", no_wrap=True)
    for line in lines:
        cells = [line.name, line.removed, fmt.count(line.parameters), fmt.count(line.kept), line.pattern]
        table.add_row(*map(_text, [*cells, line.error] if errors else cells))
    if lines:
        total, kept = sum(line.parameters for line in lines), sum(line.kept for line in lines)
        table.add_section()
        table.add_row("All pruned layers", fmt.share(rows.removed(report)), fmt.count(total), fmt.count(kept), "")
    return table


def points_table(points: Sequence[Point], metric: Metric | None = None) -> Table:
    """The models on the curves; those on the Pareto front of sparsity and quality are marked with an asterisk."""
    lines = rows.point_rows(points, metric)
    table = _table("Models")
    table.add_column("Method", ratio=1, overflow="fold", min_width=14)
    shown = {"sparsity": "Removed", "quality": metric.label if metric else "Quality"}
    extra = {"parameters": "Parameters", "macs": "MACs", "bytes_disk": "On disk", "latency": "Latency"}
    shown |= {field: head for field, head in extra.items() if any(getattr(line, field) for line in lines)}
    for head in shown.values():
        table.add_column(_text(head), justify="right", no_wrap=True)
    for line in lines:
        cells = [line.label + " *" * line.best, *(getattr(line, field) for field in shown)]
        table.add_row(*map(_text, cells), style="green" if line.best else "")
    if lines:
        table.caption = "* on the Pareto front: no other model is better in both sparsity and quality"
    return table


def comparison(reports: Sequence[Report]) -> Table:
    """Several runs side by side: each figure before, and after each run with its change."""
    found = rows.comparison_rows(reports)
    table = _table("Runs")
    table.add_column("", ratio=1, min_width=14)
    for head in ("Before", *found.runs):
        table.add_column(_text(head), justify="right")
    for label, before, cells in found.lines:
        texts = [f"{row.after}\n{row.change}".strip() if row else fmt.NOT_MEASURED for row in cells]
        table.add_row(*map(_text, [label, before, *texts]))
    return table


def _table(title: str) -> Table:
    from rich import box
    from rich.table import Table

    return Table(title=_text(title, "bold"), box=box.SIMPLE_HEAD, pad_edge=False, title_justify="left", caption_justify="left")


def _text(text: str, style: str = "") -> Text:
    from rich.text import Text

    return Text(fmt.printable(text), style=style)  # Text and not str: square brackets in names are no markup
