"""A bar chart as SVG text: what a profile needs, without a drawing library."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

_BAR, _HEIGHT, _LEFT, _TOP = 22, 180, 46, 34


def bars(title: str, values: Sequence[float], low: Sequence[float], high: Sequence[float]) -> str:
    """Bars of `values` with whiskers from `low` to `high`, numbered from 0, under a scale in percent.

    Example:
        >>> bars("One bar", [0.5], [0.2], [0.9]).count("<rect")
        1
    """
    top = max([*high, 1e-6])
    width = _LEFT + _BAR * len(values) + 12

    def y(value: float) -> float:
        return round(_TOP + _HEIGHT * (1 - value / top), 1)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{max(width, 380)}" height="{_TOP + _HEIGHT + 34}" '
        'font-family="sans-serif" font-size="11" fill="#333">',
        f"<title>{escape(title)}</title>",
        f'<text x="8" y="18" font-size="13">{escape(title)}</text>',
    ]
    for share in (0.0, 0.5, 1.0):
        at = y(share * top)
        parts.append(f'<line x1="{_LEFT}" x2="{width - 8}" y1="{at}" y2="{at}" stroke="#ddd"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{at + 4}" text-anchor="end">{share * top:.1%}</text>')
    for i, (value, least, most) in enumerate(zip(values, low, high, strict=True)):
        x, middle = _LEFT + _BAR * i + 3, _LEFT + _BAR * i + _BAR / 2
        parts.append(
            f'<rect x="{x}" y="{y(value)}" width="{_BAR - 6}" height="{y(0) - y(value):.1f}" fill="#4a7c59">'
            f"<title>layer {i}: {value:.2%}, heads {least:.2%} to {most:.2%}</title></rect>"
        )
        parts.append(f'<line x1="{middle}" x2="{middle}" y1="{y(most)}" y2="{y(least)}" stroke="#222"/>')
        if i % max(1, len(values) // 16) == 0:
            parts.append(f'<text x="{middle}" y="{_TOP + _HEIGHT + 16}" text-anchor="middle">{i}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"
