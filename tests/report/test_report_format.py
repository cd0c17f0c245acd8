from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from secateur.report import format as fmt
from secateur.types import Latency


@pytest.mark.parametrize(
    ("value", "digits", "text"),
    [
        (27.659, 4, "27.66"),
        (0.0312345, 4, "0.03123"),
        (193, 4, "193.0"),
        (1234567.8, 4, "1,234,568"),
        (9.9996, 4, "10.00"),
        (1e-7, 3, "1.00e-07"),
        (0, 4, "0"),
        (-2.5, 2, "-2.5"),
        (math.nan, 4, "NaN"),
        (math.inf, 4, "infinite"),
        (-math.inf, 4, "-infinite"),
    ],
)
def test_number(value, digits, text):
    assert fmt.number(value, digits) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0 bytes"), (950, "950 bytes"), (1000, "1.00 kB"), (1_234_567, "1.23 MB"), (999_999, "1.00 MB"), (4.2e9, "4.20 GB")],
)
def test_bytes_count_in_thousands(value, text):
    assert fmt.size(int(value)) == text


@pytest.mark.parametrize(
    ("value", "text"), [(950, "950"), (40_560_000, "40.6 M"), (4_089_284_608, "4.09 G"), (12_300, "12.3 k")]
)
def test_compact(value, text):
    assert fmt.compact(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.9, "90.0%"),
        (0, "0.0%"),
        (1, "100.0%"),
        (0.9996, "99.96%"),
        (0.99996, "99.996%"),
        (0.0001, "0.01%"),
        (1 - 1e-12, "over 99.999999%"),
        (1e-12, "under 0.000001%"),
        (math.nan, "NaN"),
    ],
)
def test_share_never_rounds_to_all_or_nothing(value, text):
    assert fmt.share(value) == text


@given(st.floats(0, 1))
def test_share_says_100_and_0_only_where_it_is(value):
    text = fmt.share(value)
    assert (text == "100.0%") == (value == 1)
    assert (text == "0.0%") == (value == 0)


@pytest.mark.parametrize(
    ("value", "text"),
    [(-0.3, "-0.3 points"), (1.25, "+1.2 points"), (0.05, "+0.05 points"), (0, "no change"), (-0.001, "under 0.01 points")],
)
def test_points(value, text):
    assert fmt.points(value) == text


@pytest.mark.parametrize(
    ("before", "after", "text"),
    [
        (34, 10, "3.4x smaller"),
        (10, 34, "3.4x larger"),
        (153, 1, "153x smaller"),
        (123, 10, "12.3x smaller"),
        (15, 10, "1.5x smaller"),
        (125, 100, "1.25x smaller"),
        (100, 98, "2.0% smaller"),
        (100, 101, "1.0% larger"),
        (10_000, 9_999, "unchanged (under 0.1%)"),
        (7, 7, "unchanged"),
        (7, 0, "all gone"),
        (0, 7, "from 0, larger"),
    ],
)
def test_times(before, after, text):
    assert fmt.times(before, after) == text


def test_time_and_its_conditions():
    fast = Latency(12.345, 12.1, 12.84, 1000, 8, 2, "torch.float32", "cpu")
    assert fmt.latency(fast) == "12.3 ms (12.1 to 12.8)"
    assert fmt.conditions(fast) == "batch 8, 2 threads, float32, cpu, 1,000 runs"
    assert fmt.latency(Latency(1234, 1200, 1300, 5, 1, 1, "torch.float16", "cuda")) == "1.23 s (1.20 to 1.30)"
    assert fmt.milliseconds(0.01234) == "0.0123 ms"


@pytest.mark.parametrize(
    ("seconds", "text"), [(4.26, "4.3 s"), (59.96, "1 min 0 s"), (83.4, "1 min 23 s"), (7500, "2 h 5 min"), (7199, "2 h 0 min")]
)
def test_duration(seconds, text):
    assert fmt.duration(seconds) == text


def test_names_are_shortened_in_the_middle_and_made_printable():
    assert fmt.shorten("model.layers.11.weight", 11) == "model…eight"
    assert fmt.shorten("short", 11) == "short"
    assert fmt.printable("a\x00b\u202ec\ud800d\te\nf") == "a\ufffdb\ufffdc\ufffdd\te\nf"


@given(st.text(), st.integers(3, 30))
def test_shorten_keeps_to_its_limit(text, limit):
    assert len(fmt.shorten(text, limit)) <= limit


def test_words():
    assert (fmt.plural(1, "layer"), fmt.plural(1200, "layer")) == ("1 layer", "1,200 layers")
    assert fmt.shape((64, 3, 7, 7)) == "64 x 3 x 7 x 7"
    assert fmt.shape(()) == "scalar"
