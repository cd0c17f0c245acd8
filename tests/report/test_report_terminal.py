from __future__ import annotations

import io

from example_reports import EVIL, hostile, large, minimal, small
from rich.console import Console

from secateur.report import rows, terminal
from secateur.report.metric import main_metric


def shown(table, width=80) -> str:
    out = io.StringIO()
    Console(file=out, width=width, no_color=True, color_system=None).print(table)
    text = out.getvalue()
    assert max(len(line) for line in text.splitlines()) <= width
    assert "\x1b" not in text
    return text


def test_before_after_has_the_rows_of_the_page():
    text = " ".join(shown(terminal.before_after(small())).split())
    for row in rows.before_after_rows(small()):
        assert row.change in text
    assert "Accuracy 97.2% 96.9% -0.3 points" in text
    assert "Latency: batch 1, 1 thread, float32, cpu, 50 runs" in text


def test_before_after_without_figures_gives_the_reasons():
    text = shown(terminal.before_after(large()))
    assert text.count("not measured") == 8
    assert "MACs: no example input was given." in text
    assert "Latency was switched off in the recipe." in text
    assert "not measured" in shown(terminal.before_after(minimal()))


def test_layers_table_at_80_columns_keeps_every_name_and_figure():
    report = small()
    text = shown(terminal.layers_table(report))
    for row in rows.layer_rows(report):
        assert row.name in text
        assert row.removed in text
    assert "All pruned layers" in text
    assert shown(terminal.layers_table(minimal()))


def test_points_table_marks_the_front():
    report = small()
    lines = shown(terminal.points_table(report.points, main_metric(report)), width=100).splitlines()
    assert sum("LAMP *" in line for line in lines) == 5
    assert any("2:4 *" in line for line in lines)
    assert not any("Taylor, channels *" in line for line in lines)
    assert any("Accuracy" in line for line in lines)
    assert shown(terminal.points_table(report.points))
    assert shown(terminal.points_table(()))


def test_comparison():
    text = shown(terminal.comparison([small(4), small(5)]))
    assert text.count("3.4x smaller") == 2


def test_markup_in_names_is_shown_and_not_obeyed():
    for table in (terminal.before_after(hostile()), terminal.layers_table(hostile()), terminal.points_table(hostile().points)):
        text = "".join(shown(table, width=400).split())
        assert "[bold]" in text
        assert "\x00" not in text
    assert "[bold]" in EVIL
