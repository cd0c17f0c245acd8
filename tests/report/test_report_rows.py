from __future__ import annotations

import dataclasses
import math

import pytest
from example_reports import minimal, small
from hypothesis import given
from hypothesis import strategies as st

from secateur.report import rows
from secateur.report.metric import Metric, main_metric
from secateur.report.pareto import front
from secateur.report.rows import Row
from secateur.report.verdict import verdict
from secateur.types import Latency, LayerReport, Measurement, Point, Report, Sensitivity

DENSE = Measurement(
    1000,
    1000,
    4000,
    3400,
    5_000_000,
    5_000_000,
    Latency(12.0, 11.5, 12.5, 50, 1, 2, "torch.float32", "cpu"),
    {"accuracy": 0.972},
)
SPARSE = Measurement(
    1000, 100, 4000, 1000, 5_000_000, 500_000, Latency(12.1, 11.6, 12.4, 50, 1, 2, "torch.float32", "cpu"), {"accuracy": 0.969}
)


def with_latency(measurement, median, spread=0.02, **changes):
    quartiles = {"low_ms": median * (1 - spread), "high_ms": median * (1 + spread)}
    latency = dataclasses.replace(measurement.latency, median_ms=median, **quartiles, **changes)
    return dataclasses.replace(measurement, latency=latency)


def test_before_after_golden():
    note = "batch 1, 2 threads, float32, cpu, 50 runs"
    assert rows.before_after_rows(Report("t", DENSE, SPARSE)) == (
        Row("Accuracy", "97.2%", "96.9%", "-0.3 points", False, "higher is better"),
        Row("Parameters", "1,000", "1,000", "unchanged", None),
        Row("Nonzero parameters", "1,000", "100", "10.0x fewer", True),
        Row("MACs, dense", "5.00 M", "5.00 M", "unchanged", None),
        Row("MACs, nonzero weights", "5.00 M", "500 k", "10.0x fewer", True),
        Row("Size in memory", "4.00 kB", "4.00 kB", "unchanged", None),
        Row("Size on disk", "3.40 kB", "1.00 kB", "3.4x smaller", True),
        Row("Latency, median (quartiles)", "12.0 ms (11.5 to 12.5)", "12.1 ms (11.6 to 12.4)", "no faster", None, note),
    )


def test_what_was_not_measured_says_so_with_the_reason():
    report = dataclasses.replace(minimal(), notes=("Unrelated.", "MACs: no example was given", "latency: switched off"))
    table = {row.label: row for row in rows.before_after_rows(report)}
    assert table["MACs, dense"] == Row("MACs, dense", "not measured", "not measured", "", None, "MACs: no example was given")
    assert table["Latency, median (quartiles)"].note == "latency: switched off"
    assert table["Size on disk"] == Row("Size on disk", "not measured", "not measured", "")


def test_one_side_measured_is_not_a_change():
    report = Report("t", DENSE, dataclasses.replace(SPARSE, bytes_disk=None, latency=None, quality={}))
    table = {row.label: row for row in rows.before_after_rows(report)}
    assert (table["Size on disk"].before, table["Size on disk"].after, table["Size on disk"].change) == (
        "3.40 kB",
        "not measured",
        "",
    )
    assert table["Accuracy"].after == "not measured"


@pytest.mark.parametrize(
    ("after", "change", "better"),
    [
        (with_latency(SPARSE, 6.0), "2.0x faster", True),
        (with_latency(SPARSE, 24.0), "2.0x slower", False),
        (with_latency(SPARSE, 6.0, threads=1), "conditions differ", None),
        (with_latency(SPARSE, 11.5, spread=0.06), "no faster", None),
        (with_latency(SPARSE, 11.5, spread=0.01), "4.2% faster", True),
    ],
)
def test_latency_is_compared_under_equal_conditions_only(after, change, better):
    row = rows.before_after_rows(Report("t", DENSE, after))[-1]
    assert (row.change, row.better) == (change, better)


@pytest.mark.parametrize(
    ("after", "end"),
    [
        (SPARSE, "3.4x smaller on disk; not faster: zeros alone do not speed up dense kernels."),
        (with_latency(SPARSE, 6.0), "3.4x smaller on disk; 2.0x faster."),
        (with_latency(SPARSE, 24.0), "2.0x slower: zeros alone do not speed up dense kernels."),
        (with_latency(SPARSE, 6.0, batch=8), "speed cannot be compared: the conditions differ."),
        (dataclasses.replace(SPARSE, latency=None, bytes_disk=None), "size on disk was not measured; speed was not measured."),
        (
            dataclasses.replace(SPARSE, bytes_disk=3400),
            "no smaller on disk; not faster: zeros alone do not speed up dense kernels.",
        ),
        (dataclasses.replace(SPARSE, parameters=100, macs=500_000), "3.4x smaller on disk; not faster."),
    ],
)
def test_verdict(after, end):
    text = verdict(Report("t", DENSE, after))
    assert text.startswith("90.0% of the weights are gone; accuracy went from 97.2% to 96.9%; ")
    assert text.endswith(end)


def test_verdict_of_the_pruned_layers_names_the_whole_model_too():
    layer = LayerReport("fc", (10, 90), 900, 90, "element")
    after = dataclasses.replace(SPARSE, nonzeros=190, quality={"accuracy": 0.972})
    text = verdict(Report("t", DENSE, after, layers=(layer,)))
    assert text.startswith("90.0% of the weights are gone (81.0% of all parameters); accuracy stayed at 97.2%; ")
    assert verdict(Report("t", DENSE, DENSE)).startswith("No weight is gone; ")


@pytest.mark.parametrize(
    ("name", "values", "higher", "texts"),
    [
        ("accuracy", (0.972, 0.969), True, ("97.2%", "96.9%", "-0.3 points")),
        ("top1_acc", (76.15, 76.2), True, ("76.15%", "76.20%", "+0.05 points")),
        ("error", (0.016, 0.02), False, ("1.6%", "2.0%", "+0.4 points")),
        ("perplexity", (27.656, 36.85), False, ("27.66", "36.85", "+9.19")),
        ("validation loss", (0.5, 0.25), False, ("0.5000", "0.2500", "-0.250")),
        ("reward", (0.5, 0.75), True, ("0.5000", "0.7500", "+0.250")),
    ],
)
def test_metric(name, values, higher, texts):
    metric = Metric.of(name, values)
    assert metric.higher is higher
    assert (*metric.pair(*values), metric.change(*values)) == texts
    assert (metric.gain(*values) > 0) == ((values[1] > values[0]) == higher)


def test_percent_or_fraction_is_read_off_all_values_of_the_report():
    report = Report(
        "t",
        dataclasses.replace(DENSE, quality={"accuracy": 0.8}),
        dataclasses.replace(SPARSE, quality={"accuracy": 0.6}),
        metric="accuracy",
        points=(Point("a", 0.5, 80.0),),
    )
    assert main_metric(report).percent == 1.0
    assert main_metric(dataclasses.replace(report, points=())).percent == 100.0
    assert main_metric(minimal()) is None


def test_layer_rows():
    layer = LayerReport("a\x00b", (4, 2), 8, 3, "element", 0.12345)
    (row,) = rows.layer_rows(Report("t", DENSE, SPARSE, layers=(layer,)))
    assert (row.name, row.shape, row.parameters, row.kept, row.removed, row.error) == (
        "a\ufffdb",
        "4 x 2",
        8,
        3,
        "62.5%",
        "0.123",
    )


def test_point_rows_mark_the_front():
    points = (
        Point("a", 0.5, 0.97, macs=5_000_000, latency_ms=1.5),
        Point("a", 0.9, 0.9),
        Point("b", 0.8, 0.89, 10, None, 2048),
    )
    found = rows.point_rows(points, Metric.of("accuracy", [p.quality for p in points]))
    assert [r.best for r in found] == [True, True, False]
    assert found[0].macs == "5.00 M"
    assert (found[2].parameters, found[2].macs, found[2].bytes_disk, found[2].latency) == ("10", "", "2.05 kB", "")
    worse = rows.point_rows(points, Metric.of("loss", [p.quality for p in points]))
    assert [r.best for r in worse] == [False, True, True]


def test_sensitive_layers_come_first_and_nan_before_all():
    curves = (
        Sensitivity("sturdy", (0.5, 0.9), (0.97, 0.96)),
        Sensitivity("frail", (0.5, 0.9), (0.95, 0.55)),
        Sensitivity("broken", (0.5, 0.9), (0.97, math.nan)),
        Sensitivity("empty", (), ()),
    )
    report = Report("t", DENSE, SPARSE, metric="accuracy", sensitivity=curves)
    found = rows.sensitivity_rows(report)
    assert [r.layer for r in found] == ["broken", "frail", "sturdy"]
    assert found[1].drop == pytest.approx(22.2)
    assert found[1].drop_text == "-22.2 points"
    assert (found[1].sparsity, found[1].quality) == (("50%", "90%"), ("95.0%", "55.0%"))


def test_comparison_holds_each_run_with_its_own_change():
    table = rows.comparison_rows([Report("a", DENSE, SPARSE), Report("a", DENSE, DENSE)])
    assert table.runs == ("a", "a (2)")
    lines = {label: (before, cells) for label, before, cells in table.lines}
    before, (first, second) = lines["Size on disk"]
    assert (before, first.change, second.change) == ("3.40 kB", "3.4x smaller", "unchanged")
    points = rows.comparison_points([Report("a", DENSE, SPARSE), Report("b", DENSE, dataclasses.replace(DENSE, quality={}))])
    assert points == (Point("a", 0.9, 0.969, 1000, 5_000_000, 1000, 12.1),)


def test_example_reports_have_rows_for_all_layers():
    assert len(rows.layer_rows(small())) == 20


coordinates = st.floats(-5, 5, width=16) | st.just(math.nan) | st.integers(0, 3).map(float)


@given(st.lists(st.tuples(coordinates, coordinates), max_size=12), st.booleans(), st.booleans())
def test_front_against_brute_force(pairs, first_higher, second_higher):
    a = [x if first_higher else -x for x, _ in pairs]
    b = [y if second_higher else -y for _, y in pairs]
    real = [i for i in range(len(pairs)) if not (math.isnan(a[i]) or math.isnan(b[i]))]
    expected = {i for i in real if not any(a[j] >= a[i] and b[j] >= b[i] and (a[j] > a[i] or b[j] > b[i]) for j in real)}
    found = front([x for x, _ in pairs], [y for _, y in pairs], first_higher=first_higher, second_higher=second_higher)
    assert set(found) == expected
    assert [pairs[i][0] for i in found] == sorted(pairs[i][0] for i in found)
