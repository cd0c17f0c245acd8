"""What every registered schedule promises, whatever its formula."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from secateur.schedules import SCHEDULES

progresses = st.floats(0.0, 1.0)
targets = st.floats(0.0, 1.0, exclude_max=True)
shares = st.floats(0.0, 1.0)


def schedule_of(name: str, target: float, share: float):
    """The schedule with its option `initial`, where it has one, at a share of the target."""
    entry = SCHEDULES[name]
    options = {"initial": target * share} if "initial" in entry.options else {}
    return (lambda p: entry.make(p, target, **options)), options.get("initial", 0.0)


@pytest.mark.parametrize("name", list(SCHEDULES))
@given(target=targets, share=shares)
def test_ends_at_the_target_bit_for_bit(name, target, share):
    schedule, _ = schedule_of(name, target, share)
    assert schedule(1.0) == target


@pytest.mark.parametrize("name", list(SCHEDULES))
@given(target=targets, share=shares, progress=progresses)
def test_stays_between_initial_and_target(name, target, share, progress):
    schedule, initial = schedule_of(name, target, share)
    assert initial <= schedule(progress) <= target


@pytest.mark.parametrize("name", list(SCHEDULES))
@given(target=targets, share=shares, a=progresses, b=progresses)
def test_never_decreases(name, target, share, a, b):
    schedule, _ = schedule_of(name, target, share)
    early, late = sorted((a, b))
    assert schedule(early) <= schedule(late)


@pytest.mark.parametrize("name", [n for n in SCHEDULES if "initial" in SCHEDULES[n].options])
@given(target=targets, share=shares)
def test_starts_at_initial(name, target, share):
    schedule, initial = schedule_of(name, target, share)
    assert schedule(0.0) == pytest.approx(initial, abs=1e-12)


@pytest.mark.parametrize("name", list(SCHEDULES))
def test_is_documented_with_its_source(name):
    assert SCHEDULES[name].source
    assert SCHEDULES[name].summary
    assert all(default is not None for default in SCHEDULES[name].options.values())
