"""Every figure that a reader sees is written here: units, significant digits, separators, signs and plain words.

Bytes are counted in thousands (1 kB = 1000 bytes), as disks are sold. Shares are percent, differences of shares are percent
points, ratios are "3.4x". A figure that is not zero is never rounded to look like zero, nor 99.97% to look like 100%.
"""

from __future__ import annotations

import math
import re

from secateur.types import Latency

NOT_MEASURED = "not measured"
_PREFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
_CONTROLS = r"\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f"
_UNPRINTABLE = re.compile(rf"[{_CONTROLS}\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]")


def printable(text: str) -> str:
    """`text` with control characters, direction overrides and lone surrogates replaced, so that it can be shown and encoded."""
    return _UNPRINTABLE.sub("\ufffd", text)


def shorten(text: str, limit: int) -> str:
    """`text` in at most `limit` characters; what does not fit is cut from the middle: names differ at their ends."""
    if len(text) <= limit:
        return text
    head = (limit - 1) // 2
    return text[:head] + "…" + text[len(text) - (limit - 1 - head) :]


def count(value: int) -> str:
    """``1234567 -> '1,234,567'``."""
    return f"{value:,}"


def number(value: float, digits: int = 4) -> str:
    """A plain figure with `digits` significant digits: ``27.659 -> '27.66'``, ``0.03123 -> '0.03123'``, ``nan -> 'NaN'``."""
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "infinite" if value > 0 else "-infinite"
    if value == 0:
        return "0"
    magnitude = math.floor(math.log10(abs(float(f"{value:.{digits - 1}e}"))))
    if -5 <= magnitude < 9:
        return f"{value:,.{max(digits - 1 - magnitude, 0)}f}"
    return f"{value:.{digits - 1}e}"


def unit_for(largest: float, bytes_: bool = False) -> tuple[float, str]:
    """Divisor and prefix that bring `largest` to 1..1000: ``4.1e9 -> (1e9, 'G')``. With `bytes_` the unit itself is added."""
    for factor, prefix in _PREFIXES:
        if abs(largest) >= factor * 0.9995:
            return factor, prefix + "B" * bytes_
    return 1.0, "bytes" if bytes_ else ""


def compact(value: int) -> str:
    """A large count with its prefix: ``4089284608 -> '4.09 G'``, ``950 -> '950'``."""
    factor, prefix = unit_for(value)
    return f"{number(value / factor, 3)} {prefix}" if prefix else count(value)


def size(value: int) -> str:
    """Bytes, 1 kB = 1000 bytes: ``1234567 -> '1.23 MB'``, ``950 -> '950 bytes'``."""
    factor, unit = unit_for(value, bytes_=True)
    return f"{number(value / factor, 3)} {unit}" if factor > 1 else f"{count(value)} bytes"


def share(value: float, digits: int = 1) -> str:
    """A fraction as percent: ``0.9 -> '90.0%'``; digits are added until 0.99996 does not read 100%."""
    if not math.isfinite(value):
        return number(value)
    for places in range(digits, 7):
        text = f"{100 * value:.{places}f}"
        if float(text) not in (0.0, 100.0) or value in (0.0, 1.0):
            return text + "%"
    return "under 0.000001%" if value < 0.5 else "over 99.999999%"


def points(difference: float) -> str:
    """A difference of two percentages, itself in percent: ``-0.3 -> '-0.3 points'``; a second digit where one shows nothing."""
    if not math.isfinite(difference):
        return number(difference)
    if abs(difference) < 0.005:
        return "no change" if difference == 0 else "under 0.01 points"
    return f"{difference:+.{1 if abs(difference) >= 0.15 else 2}f} points"


def difference(value: float) -> str:
    """A signed difference of plain figures: ``9.19 -> '+9.19'``."""
    if value == 0:
        return "no change"
    return f"{'+' if value > 0 else ''}{number(value, 3)}"


def times(before: float, after: float, less: str = "smaller", more: str = "larger") -> str:
    """A ratio in words: ``(34, 10) -> '3.4x smaller'``, ``(100, 98) -> '2.0% smaller'``, ``(1, 1) -> 'unchanged'``."""
    if before == after:
        return "unchanged"
    if after <= 0 or before <= 0:
        return "all gone" if after <= 0 else f"from 0, {more}"
    ratio, word = (before / after, less) if after < before else (after / before, more)
    if ratio >= 1.095:
        return f"{factor(ratio)}x {word}"
    percent = 100 * abs(1 - after / before)
    return f"{percent:.1f}% {word}" if percent >= 0.05 else "unchanged (under 0.1%)"


def factor(ratio: float) -> str:
    """A ratio of at least one: ``3.42 -> '3.4'``, ``12.3 -> '12.3'``, ``153.2 -> '153'``."""
    return f"{ratio:,.0f}" if ratio >= 99.95 else f"{ratio:.1f}" if ratio >= 1.995 else f"{ratio:.2f}".removesuffix("0")


def milliseconds(value: float) -> str:
    """``12.345 -> '12.3 ms'``, ``0.0123 -> '0.0123 ms'``, ``1234 -> '1.23 s'``."""
    return f"{number(value / 1000, 3)} s" if value >= 1000 else f"{number(value, 3)} ms"


def latency(value: Latency) -> str:
    """Median and quartiles: ``'12.3 ms (12.1 to 12.8)'``."""
    unit = 1000.0 if value.median_ms >= 1000 else 1.0
    low, high = (number(v / unit, 3) for v in (value.low_ms, value.high_ms))
    return f"{milliseconds(value.median_ms)} ({low} to {high})"


def conditions(value: Latency) -> str:
    """What a latency was measured under: ``'batch 1, 2 threads, float32, cpu, 50 runs'``."""
    threads = "1 thread" if value.threads == 1 else f"{value.threads} threads"
    return f"batch {value.batch}, {threads}, {value.dtype.removeprefix('torch.')}, {value.device}, {count(value.runs)} runs"


def duration(seconds: float) -> str:
    """``4.26 -> '4.3 s'``, ``83 -> '1 min 23 s'``, ``7500 -> '2 h 5 min'``."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min"


def shape(dims: tuple[int, ...]) -> str:
    """``(64, 3, 7, 7) -> '64 x 3 x 7 x 7'``."""
    return " x ".join(str(d) for d in dims) or "scalar"


def plural(n: int, word: str) -> str:
    """``(1, 'layer') -> '1 layer'``, ``(20, 'layer') -> '20 layers'``."""
    return f"{count(n)} {word}{'' if n == 1 else 's'}"
