"""Matplotlib figures as SVG that belongs in a page: its colours and font, no ids that clash, the same bytes each time."""

from __future__ import annotations

import functools
import io
import re
import warnings
import xml.etree.ElementTree as ET
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ParamSpec

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

P = ParamSpec("P")

_LARGEST = 1.3  #: how far a chart may grow beyond the size it was drawn for
SERIES = 8  #: colours that curves of different labels take in turn
_TOKENS = ("ink", "muted", "line", "track", "leaf", "leaf-soft", "surface", *(f"s{i}" for i in range(SERIES)))
_HEX = {name: f"#0102{i:02x}" for i, name in enumerate(_TOKENS)}
_CSS = {value: f"var(--{name})" for name, value in _HEX.items()}
_NUMBER = re.compile(r"-?\d+\.\d{3,}")
_SVG = "{http://www.w3.org/2000/svg}"
_HREF = "{http://www.w3.org/1999/xlink}href"


def colour(token: str) -> str:
    """The stand-in by which a chart names a colour of the page: `to_svg` turns it into the CSS variable ``--token``."""
    return _HEX[token]


def series_colour(index: int) -> str:
    """Colour of the `index`-th curve."""
    return colour(f"s{index % SERIES}")


def drawn(draw: Callable[P, Figure]) -> Callable[P, Figure]:
    """Decorator: draw under matplotlib's defaults, whatever the user's own settings are, and leave those as they were."""

    @functools.wraps(draw)
    def under_defaults(*args: P.args, **kwargs: P.kwargs) -> Figure:
        import matplotlib

        with matplotlib.rc_context(_settings()):
            return draw(*args, **kwargs)

    return under_defaults


@functools.cache
def _settings() -> dict[Any, Any]:
    import matplotlib

    ours = {"svg.hashsalt": "secateur", "svg.fonttype": "none", "text.parse_math": False, "font.size": 11.0}
    return {k: v for k, v in matplotlib.rcParamsDefault.items() if not k.startswith(("backend", "interactive"))} | ours


def new_figure(width: float, height: float) -> Figure:
    """An empty transparent figure whose SVG is `width` x `height` CSS pixels."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width / 72, height / 72), dpi=72)
    figure.patch.set_visible(False)
    return figure


def new_axes(figure: Figure, left: float, right: float, top: float, bottom: float) -> Axes:
    """Axes with these margins in pixels, a quiet frame and the page's text colours."""
    width, height = figure.get_size_inches() * 72
    axes = figure.add_axes((left / width, bottom / height, (width - left - right) / width, (height - top - bottom) / height))
    axes.patch.set_visible(False)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(colour("line"))
    axes.tick_params(colors=colour("muted"), length=0, pad=5, labelsize=11)
    axes.set_axisbelow(True)
    return axes


def to_svg(figure: Figure, key: str, label: str) -> str:
    """Inline SVG with the description `label`. `key` must be unique in the page: it begins the ids that clips refer to."""
    buffer = io.BytesIO()
    import matplotlib

    with matplotlib.rc_context(_settings()), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # the browser's fonts draw the text
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    root = ET.fromstring(buffer.getvalue())
    for element in root.iter():
        for child in [c for c in element if c.tag == _SVG + "style" or not c.tag.startswith(_SVG)]:
            element.remove(child)
        for child in [c for c in element if c.tag == _SVG + "metadata"]:
            element.remove(child)
    _rename_ids(root, key)
    for element in root.iter():
        element.tag = element.tag.removeprefix(_SVG)
        for name, value in list(element.attrib.items()):
            element.set(name, _restyle(value) if name == "style" else _NUMBER.sub(_rounded, value))
    width, height = (f"{v * 72:g}" for v in figure.get_size_inches())
    root.attrib.clear()
    root.attrib.update({"class": "chart", "viewBox": f"0 0 {width} {height}", "role": "img", "aria-label": label})
    root.set("style", f"max-width:{float(width) * _LARGEST:g}px")
    return ET.tostring(root, encoding="unicode")


def _rename_ids(root: ET.Element, key: str) -> None:
    text = ET.tostring(root, encoding="unicode")
    used = {*re.findall(r"url\(#([^)]+)\)", text), *re.findall(r'href="#([^"]+)"', text)}
    short = {old: f"{key}-{i}" for i, old in enumerate(sorted(used))}
    for element in root.iter():
        if "id" in element.attrib:
            old = element.attrib.pop("id")
            if old in short:
                element.set("id", short[old])
        if _HREF in element.attrib:
            element.set("href", "#" + short[element.attrib.pop(_HREF)[1:]])
        for name, value in element.attrib.items():
            if "url(#" in value:
                element.set(name, re.sub(r"url\(#([^)]+)\)", lambda m: f"url(#{short[m[1]]})", value))


def _restyle(style: str) -> str:
    kept = []
    for declaration in style.split(";"):
        name, _, value = declaration.strip().partition(":")
        value = value.strip()
        if name == "font":
            kept += [f"font-size:{size}" for size in re.findall(r"[\d.]+px", value)[:1]]
            kept += ["font-weight:600" for _ in re.findall(r"\b(?:bold|[6-9]00)\b", value)[:1]]
        elif name and name not in ("font-family", "font-stretch", "font-variant"):
            kept.append(f"{name}:{_CSS.get(value, _NUMBER.sub(_rounded, value))}")
    return ";".join(kept)


def _rounded(match: re.Match[str]) -> str:
    return f"{float(match[0]):.2f}".rstrip("0").rstrip(".")
