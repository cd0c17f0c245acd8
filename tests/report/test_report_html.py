from __future__ import annotations

import base64
import dataclasses
import io
import json
import re
from html.parser import HTMLParser

import matplotlib
import numpy as np
import pytest
from example_reports import EVIL, hostile, large, minimal, small

from secateur.errors import SecateurError
from secateur.report import charts, picture, rows
from secateur.report.html import render, render_comparison
from secateur.report.svg import colour, to_svg
from secateur.types import Report

VOID = {"meta", "img", "br", "wbr", "link", "input", "hr", "base"}


class Page(HTMLParser):
    """Tags, attributes and texts of a page; fails on tags that do not nest."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.stack: list[str] = []
        self.texts: list[str] = []
        self.ids: list[str] = []
        self.scripts: list[str] = []
        self.feed(text)
        self.close()
        assert self.stack == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.ids += [value for name, value in attrs if name == "id"]
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.ids += [value for name, value in attrs if name == "id"]

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag

    def handle_data(self, data):
        (self.scripts if self.stack and self.stack[-1] in ("script", "style") else self.texts).append(data)

    @property
    def text(self) -> str:
        return " ".join("".join(self.texts).split())

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)


@pytest.fixture(scope="module")
def pages() -> dict[str, str]:
    reports = {"small": small(), "large": large(), "minimal": minimal(), "hostile": hostile()}
    return {name: render(report) for name, report in reports.items()} | {"compare": render_comparison([small(4), small(5)])}


@pytest.mark.parametrize("name", ["small", "large", "minimal", "hostile", "compare"])
def test_page_needs_nothing_from_elsewhere(pages, name):
    page = Page(pages[name])
    for tag, attributes in page.tags:
        assert tag not in ("link", "iframe", "object", "embed", "base", "form")
        for key, value in attributes.items():
            assert not key.startswith("on"), (tag, key)
            if key in ("src", "href", "xlink:href", "srcset", "action", "poster", "data", "background"):
                assert value.startswith(("#", "data:image/png;base64,")), (tag, key, value)
            if key == "style" or tag == "style":
                assert "url(" not in (value or "").replace("url(#", "")
    sheet = re.search(r"<style>(.*?)</style>", pages[name], re.S)[1]
    assert "@import" not in sheet
    assert "url(" not in sheet
    assert "http" not in pages[name].replace("http-equiv", "")


@pytest.mark.parametrize("name", ["small", "large", "minimal", "hostile", "compare"])
def test_page_is_well_formed_and_accessible(pages, name):
    page = Page(pages[name])
    assert len(page.ids) == len(set(page.ids))
    links = {a["href"][1:] for t, a in page.tags if t in ("a", "use") and a.get("href", "").startswith("#")}
    assert links <= set(page.ids)
    clips = set(re.findall(r"url\(#([^)]+)\)", pages[name]))
    assert clips <= set(page.ids)
    assert page.count("h1") == 1
    assert page.count("table") == page.count("caption")
    assert page.count("script") == 1
    for tag, attributes in page.tags:
        if tag == "svg":
            assert attributes["role"] == "img"
            assert len(attributes["aria-label"]) > 10
        if tag == "img":
            assert len(attributes["alt"]) > 10
        if tag == "th":
            assert attributes["scope"] in ("row", "col")


def test_small_page_says_everything(pages):
    text = Page(pages["small"]).text
    report = small()
    for row in rows.before_after_rows(report):
        assert f"{row.label}{row.note}{row.before}{row.after}{row.change}" in text
    for layer in report.layers:
        assert layer.name in text
    assert "accuracy went from 97.2% to 96.9%; 3.4x smaller on disk; not faster" in text
    for heading in (
        "Before and after",
        "Quality against cost",
        "Sparsity of each layer",
        "Sensitivity",
        "Weights before and after",
    ):
        assert heading in text
    for word in (
        "Masks",
        "Layers left alone",
        "ignored as asked",
        "Notes",
        "Recipe",
        'criterion = "magnitude"',
        "AMD EPYC 7B13",
    ):
        assert word in text
    assert "Pareto front" in text
    assert Page(pages["small"]).count("img") == 20


def test_minimal_page_leaves_out_what_has_no_data(pages):
    page = Page(pages["minimal"])
    assert (page.count("svg"), page.count("img"), page.count("table"), page.count("h2")) == (0, 0, 1, 2)
    assert page.text.count("not measured") >= 8


def test_large_page_is_small_and_says_what_it_leaves_out(pages):
    text = Page(pages["large"]).text
    assert len(pages["large"].encode()) < 3_000_000
    assert "276 more layers have their histograms in the report's data and are left out here" in text
    assert "276 more layers have their masks" in text
    assert Page(pages["large"]).count("img") == 24
    assert all(layer.name in text for layer in large().layers)
    assert "294 others drawn in grey" in text


def test_hostile_texts_are_inert(pages):
    page = Page(pages["hostile"])
    assert page.count("script") == 1
    assert [a for t, a in page.tags if t == "img" and not a["src"].startswith("data:")] == []
    assert "{{ 7*7 }}" in page.text
    assert EVIL[:50] in page.text
    assert "\ud800" not in pages["hostile"]
    assert "\x00" not in pages["hostile"]
    assert pages["hostile"].encode("utf-8")


def test_same_report_same_bytes_whatever_the_users_settings(pages):
    kept = dict(matplotlib.rcParams)
    with matplotlib.rc_context({"font.size": 31, "axes.facecolor": "red", "svg.fonttype": "path", "lines.linewidth": 9}):
        inside = dict(matplotlib.rcParams)
        assert render(small()) == pages["small"]
        assert dict(matplotlib.rcParams) == inside
    assert dict(matplotlib.rcParams) == kept


@pytest.mark.parametrize("make", [small, minimal, hostile])
def test_through_json_to_the_same_bytes(pages, make):
    report = Report.from_json(json.loads(json.dumps(make().to_json())))
    assert render(report) == pages[make.__name__]


def test_script_is_allowed_by_its_hash_only(pages):
    import hashlib

    script = re.search(r"<script>(.*?)</script>", pages["small"], re.S)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = next(a["content"] for t, a in Page(pages["small"]).tags if a.get("http-equiv") == "Content-Security-Policy")
    assert f"script-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy


def test_comparison(pages):
    text = Page(pages["compare"]).text
    assert "2 runs side by side." in text
    assert "global magnitude (2)" in text
    with pytest.raises(SecateurError, match="no report"):
        render_comparison([])
    other = dataclasses.replace(minimal(), title="No quality")
    assert "Quality against cost" not in Page(render_comparison([other, minimal()])).text


def test_charts_use_the_colours_and_font_of_the_page():
    report = small(4)
    text = to_svg(charts.layer_bars(report.layers, 0.9, 500), "k", 'a "label" <b>')
    assert "var(--leaf)" in text
    assert colour("leaf") not in text
    assert "font-family" not in text
    assert "<style" not in text
    assert 'aria-label="a &quot;label&quot; &lt;b&gt;"' in text
    assert ">layer1.0.conv1.weight</text>" in text
    assert not re.search(r"(fill|stroke): ?#", text)


def test_bars_have_the_lengths_of_the_figures():
    report = small(4)
    (axes,) = charts.layer_bars(report.layers, 0.9, 500).axes
    bars = [patch.get_width() for patch in axes.patches]
    assert bars == pytest.approx([100] * 4 + [100 * layer.sparsity for layer in report.layers])


def test_mask_image_has_one_pixel_for_each_cell():
    from PIL import Image

    source, top = picture.mask_image(((0.0, 0.25), (0.5, 0.125)))
    image = np.asarray(Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))))
    assert top == 0.5
    assert image.shape == (2, 2, 4)
    assert image[..., 3].tolist() == [[0, 128], [255, 64]]
    assert picture.mask_image(((0.0, 0.0),))[1] == 1.0


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_every_text_colour_has_contrast_in_light_and_dark(pages):
    blocks = re.findall(r":root \{(.*?)\}", pages["small"], re.S)
    light, dark = (dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", block)) for block in blocks[:2])
    assert set(light) == set(dark)
    for theme in (light, dark):
        for name in ("ink", "muted", "leaf", "bad", *(f"s{i}" for i in range(8))):
            for ground in ("page", "surface"):
                low, high = sorted((luminance(theme[name]), luminance(theme[ground])))
                assert (high + 0.05) / (low + 0.05) >= 4.5, (name, ground)
