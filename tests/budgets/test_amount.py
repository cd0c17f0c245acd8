"""Budgets as text: what is understood, and what is refused with which words."""

from __future__ import annotations

import pytest

from secateur.budgets.amount import parse_budget
from secateur.errors import RecipeError


@pytest.mark.parametrize(
    ("text", "amount", "unit", "share"),
    [
        ("50% MACs", 0.5, "MACs", True),
        ("50 % macs", 0.5, "MACs", True),
        ("12.5% params", 0.125, "params", True),
        ("100% bytes", 1.0, "bytes", True),
        ("2M params", 2e6, "params", False),
        ("1.2 G MACs", 1.2e9, "MACs", False),
        ("30k params", 3e4, "params", False),
        ("1e6 MACs", 1e6, "MACs", False),
        ("1 param", 1, "params", False),
        ("10 MB", 1e7, "bytes", False),
        ("900kB", 9e5, "bytes", False),
        ("1.5 MiB", 1.5 * 2**20, "bytes", False),
        ("4096 B", 4096, "bytes", False),
        ("5 ms", 5.0, "ms", False),
        (" .5ms ", 0.5, "ms", False),
        ("60% ms", 0.6, "ms", True),
    ],
)
def test_what_is_understood(text, amount, unit, share):
    found = parse_budget(text)
    assert (found.amount, found.unit, found.share) == (pytest.approx(amount), unit, share)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("50%", "is not understood"),
        ("MACs", "is not understood"),
        ("-5 ms", "is not understood"),
        ("half MACs", "is not understood"),
        ("5 s", "no unit that is known"),
        ("50% MB", "no unit that is known"),
        ("2 GFLOPs", "one MAC is two FLOPs"),
        ("0 ms", "more than 0"),
        ("0% MACs", "more than 0"),
        ("120% MACs", "at most 100"),
        (0.5, "a budget is text"),
        (True, "a budget is text"),
    ],
)
def test_what_is_refused_says_why_and_what_is_allowed(text, words):
    with pytest.raises(RecipeError, match=words):
        parse_budget(text)


def test_a_limit_is_absolute_or_a_share_of_the_dense_cost():
    assert parse_budget("40% params").limit(1000) == 400
    assert parse_budget("40 params").limit(1000) == 40
