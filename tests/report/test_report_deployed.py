from __future__ import annotations

import re

from secateur.report import charts
from secateur.report.deployed import layer_times, render_deployed
from secateur.runtime.summary import LayerChoice, Summary


def summary(layers: int = 3) -> Summary:
    chosen = LayerChoice(
        "features.0", (64, 3, 3, 3), (1, 3, 8, 8), 0.9, "panel", 2.0, {"panel": 0.5, "panel-4x1": 0.7}, fused="act"
    )
    slower = LayerChoice(
        "features.1<b>", (64, 64, 3, 3), (1, 64, 8, 8), 0.4, "dense", 1.0, {"panel": 1.25}, reason="panel gives 0.80x"
    )
    untried = LayerChoice("head", (10, 64), (1, 64), 0.0, "dense", reason="only 0% of its weights are zero")
    many = tuple(LayerChoice(f"layer{i}", (4, 4), (1, 4), 0.9, "panel", 1.0, {"panel": 0.1}) for i in range(layers - 3))
    return Summary((chosen, slower, untried, *many), 3.0, 1.5, 2.0, 1e-7, 1, (("features.0", "bn"),), ("a note",))


def test_the_page_shows_each_layer_dense_and_sparse():
    page = render_deployed(summary(), "tiny")
    assert "2.00 times as fast on 1 thread." in page
    assert page.count('role="img"') == 2  # drawn for wide and for narrow windows
    assert "features.<wbr>1&lt;b&gt;" in page
    body = re.search(r'<section id="timings">.*?</section>', page, re.DOTALL)[0]
    cells = [re.sub("<[^>]+>", "", cell) for cell in re.findall(r"<td[^>]*>.*?</td>", body)]
    assert cells[1:6] == ["90.0%", "panel", "2.000", "0.500", "with act"]
    assert cells[6 + 4 : 6 + 6] == ["1.250", "panel gives 0.80x"]
    assert cells[12 + 3 : 12 + 5] == ["", ""]
    assert "a note" in page


def test_layers_without_times_are_in_the_table_only():
    times = layer_times(summary())
    assert [t.replaced for t in times] == [True, False, False]
    figure = charts.time_bars([t for t in times if t.sparse_ms is not None], 880)
    bars = [patch.get_width() for patch in figure.axes[0].patches]
    assert bars == [2.0, 1.0, 0.5, 1.25]
    nothing = Summary((LayerChoice("only", (1, 1), None, 0.0, "dense"),), 1.0, 1.0, 1.0, 0.0, 1)
    assert 'role="img"' not in render_deployed(nothing, "dense")


def test_many_layers_are_drawn_side_by_side():
    page = render_deployed(summary(charts.MOST_BARS + 5), "many")
    assert "Position of the layer in the model" in page
    assert "<details open>\n<summary>Table of 45 layers" not in page
