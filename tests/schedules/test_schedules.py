"""Golden values of each schedule, worked by hand, and what makes a bad call fail."""

from __future__ import annotations

import doctest
import itertools
import math

import pytest

from secateur import schedules
from secateur.errors import RecipeError, UnknownName
from secateur.schedules import SCHEDULES, cubic, exponential, iterative, make_schedule, one_shot


def test_one_shot_is_the_target_from_the_start():
    assert [one_shot(p, 0.7) for p in (0.0, 0.3, 1.0)] == [0.7] * 3


def test_iterative_takes_equal_steps():
    reached = [iterative((t + 1) / 9, 0.9) for t in range(9)]
    assert reached == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9], abs=1e-12)
    assert iterative(0.25, 0.9, initial=0.5) == pytest.approx(0.6)


def test_cubic_is_equation_one_of_zhu_and_gupta():
    # s_f = .8, s_i = .2, a quarter of the way: .8 + (.2 - .8) * .75^3 = .8 - .6 * .421875 = .546875
    assert cubic(0.25, 0.8, initial=0.2) == pytest.approx(0.546875, abs=1e-15)
    assert cubic(0.0, 0.8, initial=0.2) == 0.2
    assert cubic(0.5, 0.8) == pytest.approx(0.7)  # .8 (1 - 1/8)


def test_exponential_keeps_the_same_share_at_each_step():
    # density .001 in three steps of a tenth each (SynFlow's rho^(k/n))
    assert [exponential(k / 3, 0.999) for k in (1, 2, 3)] == pytest.approx([0.9, 0.99, 0.999], abs=1e-12)
    # b = .5, s = .98: (1 - .5) * (.02/.5)^(1/2) = .5 * .2 = .1
    assert exponential(0.5, 0.98, initial=0.5) == pytest.approx(0.9, abs=1e-12)
    densities = [1.0 - exponential((t + 1) / 5, 0.95, initial=0.3) for t in range(5)]
    ratios = [b / a for a, b in itertools.pairwise(densities)]
    assert ratios == pytest.approx([(0.05 / 0.7) ** 0.2] * 4)


def test_examples_of_the_docstrings():
    assert doctest.testmod(schedules).failed == 0
    assert doctest.testmod(schedules).attempted == 5


@pytest.mark.parametrize("name", list(SCHEDULES))
@pytest.mark.parametrize("progress", [-0.1, 1.0000001, math.nan, math.inf])
def test_progress_out_of_range_is_refused(name, progress):
    with pytest.raises(RecipeError, match="progress"):
        SCHEDULES[name].make(progress, 0.5)


@pytest.mark.parametrize("name", list(SCHEDULES))
@pytest.mark.parametrize("target", [-0.5, 1.0, 1.5, math.nan])
def test_target_out_of_range_is_refused(name, target):
    with pytest.raises(RecipeError, match=r"\[0, 1\)"):
        SCHEDULES[name].make(0.5, target)


@pytest.mark.parametrize("schedule", [iterative, cubic, exponential])
@pytest.mark.parametrize("initial", [-0.1, 0.6, math.nan])
def test_initial_above_the_target_is_refused(schedule, initial):
    with pytest.raises(RecipeError, match="initial"):
        schedule(0.5, 0.5, initial=initial)


def test_unknown_name_suggests_the_nearest():
    with pytest.raises(UnknownName, match="Did you mean 'cubic'"):
        SCHEDULES["cubik"]
    with pytest.raises(RecipeError, match=r"no option .initail.\. Did you mean .initial."):
        SCHEDULES["cubic"].check_options("schedule", {"initail": 0.1})


def test_made_from_a_name_or_a_mapping():
    assert make_schedule("cubic")(0.5, 0.8) == cubic(0.5, 0.8)
    assert make_schedule({"name": "exponential", "initial": 0.3})(0.5, 0.9) == exponential(0.5, 0.9, initial=0.3)
    with pytest.raises(RecipeError, match="no option 'base'"):
        make_schedule({"name": "cubic", "base": 0.3})
    with pytest.raises(UnknownName):
        make_schedule({"initial": 0.3})
