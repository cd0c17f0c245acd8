"""The page in a real browser: what it shows, in light and dark, wide and narrow, on screen and on paper."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
from example_reports import hostile, large, small

from secateur.report import rows
from secateur.report.html import render, render_comparison

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine: the page is not looked at")
QUIET = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-sync", "--disable-component-update", "--disable-extensions", "--disable-dev-shm-usage", "--hide-scrollbars"),
]
#: Measures each frame once all are loaded, and sorts the table of layers in each by its third column.
PROBE = """
addEventListener("load", () => {
  const found = [...document.querySelectorAll("iframe")].map((frame) => {
    const page = frame.contentDocument, root = page.documentElement;
    const names = () => [...page.querySelectorAll("#layers tbody tr")].map((row) => row.cells[2].dataset.v);
    const button = page.querySelector("#layers th:nth-child(3) button");
    button?.click();
    const falling = names();
    button?.click();
    return {
      width: root.scrollWidth, client: root.clientWidth, falling, rising: names(), title: page.title,
      sticking: [...page.querySelectorAll("main > section > *, .tiles > div, figure")]
        .filter((e) => e.getBoundingClientRect().right > root.clientWidth + 1).map((e) => e.outerHTML.slice(0, 80)),
      shown: [...page.querySelectorAll(".wide, .narrow")].filter((e) => e.getBoundingClientRect().height > 0).length,
      smallest: Math.min(...[...page.querySelectorAll("svg text")].filter((e) => e.getBoundingClientRect().height > 0)
        .map((e) => parseFloat(getComputedStyle(e).fontSize) * e.ownerSVGElement.getBoundingClientRect().width
          / e.ownerSVGElement.viewBox.baseVal.width)),
    };
  });
  document.body.dataset.found = JSON.stringify(found);
});
"""


def browse(folder, page, *options) -> str:
    file = folder / "page.html"
    file.write_text(page, encoding="utf-8")
    command = [BROWSER, *QUIET, f"--user-data-dir={folder / 'profile'}", *options, file.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


def picture(folder, page, *options) -> np.ndarray:
    from PIL import Image

    browse(folder, page, f"--screenshot={folder / 'shot.png'}", "--window-size=1000,900", *options)
    return np.asarray(Image.open(folder / "shot.png").convert("RGB")).astype(int)


def test_rows_are_in_the_page_and_the_script_is_let_run(tmp_path):
    page = browse(tmp_path, render(small()), "--dump-dom")
    for row in rows.before_after_rows(small()):
        assert f'<td class="num">{row.before}</td><td class="num">{row.after}</td>' in page
    assert page.count('<th scope="col" class="num"><button type="button">') >= 3
    assert '<button type="button" class="copy" data-copies="recipe-text">Copy</button>' in page


def test_page_fits_any_width_and_sorts(tmp_path):
    pages = [render(small()), render(large(60)), render(hostile()), render_comparison([small(4), small(5)])]
    frames = "".join(
        f'<iframe style="border:0;width:{width}px;height:900px" srcdoc="{html.escape(page)}"></iframe>'
        for page in pages
        for width in (320, 390, 1200)
    )
    dump = browse(tmp_path, f"<!DOCTYPE html><body>{frames}<script>{PROBE}</script>", "--dump-dom", "--window-size=1300,900")
    found = json.loads(html.unescape(re.search(r'data-found="([^"]*)"', dump)[1]))
    assert len(found) == 12
    for frame in found:
        assert frame["width"] <= frame["client"], frame
        assert frame["sticking"] == []
        assert frame["title"] != "pwned"
        assert frame["smallest"] > (7 if frame["client"] < 390 else 8.5)
    for frame in found[:6]:
        assert frame["shown"] == 2
        weights = [int(v) for v in frame["falling"]]
        assert weights == sorted(weights, reverse=True)
        assert frame["rising"] == [str(v) for v in sorted(weights)]


def test_light_and_dark(tmp_path):
    light = picture(tmp_path, render(small(4)), "--blink-settings=preferredColorScheme=1")
    dark = picture(tmp_path, render(small(4)), "--blink-settings=preferredColorScheme=0")
    for shot in (light, dark):
        assert shot.shape == (900, 1000, 3)
        assert len(np.unique(shot @ [65536, 256, 1])) > 200
        green = (shot[..., 1] > shot[..., 0] + 30) & (shot[..., 1] > shot[..., 2] + 20)
        assert green.sum() > 2000
    assert light[5, 5].min() > 235
    assert dark[5, 5].max() < 40
    assert np.median(light) > 235
    assert np.median(dark) < 40


def test_prints_on_paper_with_the_closed_tables_open(tmp_path):
    browse(tmp_path, render(large(60)), f"--print-to-pdf={tmp_path / 'page.pdf'}", "--no-pdf-header-footer")
    paper = (tmp_path / "page.pdf").read_bytes()
    assert paper.startswith(b"%PDF")
    sheets = len(re.findall(rb"/Type\s*/Page\b", paper))
    assert 8 <= sheets <= 14  # two tables of 60 lines are on it, which are closed on the screen
