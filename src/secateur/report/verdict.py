"""The outcome in one sentence of plain words, made from the figures alone."""

from __future__ import annotations

from secateur.report import format as fmt
from secateur.report.metric import main_metric
from secateur.report.rows import removed, removed_overall, same_conditions, same_speed
from secateur.types import Report


def verdict(report: Report) -> str:
    """What went, what it cost in quality, and what it won on disk and on the clock.

    ``"90.0% of the weights are gone; accuracy went from 97.2% to 96.9%; 3.4x smaller on disk; not faster: zeros alone do not
    speed up dense kernels."``
    """
    for point in (p for p in report.dial if p.own):
        computed = f"{fmt.share(point.cost)} of the gated multiply-adds are computed on average"
        return fmt.printable(f"{computed}, within a budget of {fmt.share(point.budget)}; {_quality(report)}.")
    return fmt.printable("; ".join([_weights(report), _quality(report), _disk(report), _speed(report)])) + "."


def _weights(report: Report) -> str:
    share, overall = fmt.share(removed(report)), fmt.share(removed_overall(report))
    if removed(report) <= 0:
        return "No weight is gone"
    return f"{share} of the weights are gone" + ("" if share == overall else f" ({overall} of all parameters)")


def _quality(report: Report) -> str:
    metric = main_metric(report)
    if metric is None:
        return "quality was not measured"
    name = metric.name.replace("_", " ")
    before, after = report.before.quality.get(metric.name), report.after.quality.get(metric.name)
    if before is None or after is None:
        return f"{name} was not measured on both sides"
    texts = metric.pair(before, after)
    return f"{name} stayed at {texts[0]}" if texts[0] == texts[1] else f"{name} went from {texts[0]} to {texts[1]}"


def _disk(report: Report) -> str:
    before, after = report.before.bytes_disk, report.after.bytes_disk
    if before is None or after is None:
        return "size on disk was not measured"
    text = fmt.times(before, after)
    return "no smaller on disk" if text.startswith("unchanged") else f"{text} on disk"


def _speed(report: Report) -> str:
    before, after = report.before.latency, report.after.latency
    if before is None or after is None:
        return "speed was not measured"
    if not same_conditions(before, after):
        return "speed cannot be compared: the conditions differ"
    if after.median_ms < before.median_ms and not same_speed(before, after):
        return fmt.times(before.median_ms, after.median_ms, "faster", "slower")
    dense = report.after.macs is None or report.before.macs is None or report.after.macs >= report.before.macs
    zeros = report.after.nonzeros < report.after.parameters
    why = ": zeros alone do not speed up dense kernels" if dense and zeros else ""
    how = "not faster" if same_speed(before, after) else fmt.times(before.median_ms, after.median_ms, "faster", "slower")
    return how + why
