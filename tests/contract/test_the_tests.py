"""Wrong criteria, none of them in the public registry, that the shared checks must catch."""

from __future__ import annotations

import itertools

import pytest
import torch
from contract import criteria_checks as checks

from secateur.criteria import CRITERIA
from secateur.data.batches import Batches, samples_of
from secateur.registry import Entry
from secateur.stats import collect
from secateur.types import Need


def wrong(make, *, needs=frozenset({Need.WEIGHT}), reduction="sum") -> Entry:
    return Entry("wrong", make, "none", {"needs": frozenset(needs) | {Need.WEIGHT}, "reduction": reduction, "gradual": True})


def last_sample_only(model, layers, needs, *, batches, loss=None):
    *_, last = itertools.chain.from_iterable(samples_of(batch) for batch in batches)
    return collect(model, layers, needs, batches=Batches([last]), loss=loss)


def test_a_negated_magnitude_is_caught():
    with pytest.raises(AssertionError, match="without the low half"):
        checks.check_direction(wrong(lambda layer: -layer.weight.abs()))


def test_grasp_with_the_papers_sign_is_caught():
    with pytest.raises(AssertionError, match="without the low half"):
        checks.check_direction(wrong(lambda layer: -layer.weight * layer.hessian_grad, needs={Need.HESSIAN_GRAD}))


@pytest.mark.parametrize("name", ["taylor", "obd", "wanda", "grasp"])
def test_statistics_of_the_last_sample_only_are_caught(name):
    with pytest.raises(AssertionError, match="depends on the order"):
        checks.check_uses_every_sample(CRITERIA[name], collect=last_sample_only)


def test_a_criterion_of_the_first_batch_only_does_not_pass_for_one_of_every_sample():
    with pytest.raises(AssertionError, match="depends on the order"):
        checks.check_uses_every_sample(CRITERIA["snip"])


@pytest.mark.parametrize(
    "make",
    [
        lambda layer: layer.weight.abs().t(),
        lambda layer: layer.weight.abs().sum(1),
        lambda layer: layer.weight.abs().double(),
        lambda layer: layer.weight.log(),
        lambda layer: layer.weight.abs() / 0,
        lambda layer: float(layer.weight.abs().sum()),
    ],
    ids=["transposed", "summed", "float64", "log", "infinite", "number"],
)
def test_a_wrong_form_is_caught(make):
    with pytest.raises(AssertionError):
        checks.check_form(wrong(make), checks.random_stats((6, 4)))


@pytest.mark.parametrize(
    "make",
    [lambda layer: torch.rand(layer.weight.shape), lambda layer: layer.weight.abs() + 0 * torch.rand(1)],
    ids=["other numbers", "other random state"],
)
def test_the_global_generator_is_caught(make):
    with pytest.raises(AssertionError):
        checks.check_deterministic(wrong(make), checks.random_stats((6, 4)))


@pytest.mark.parametrize("make", [lambda layer: layer.weight.abs_(), lambda layer: layer.weight], ids=["in place", "alias"])
def test_a_criterion_that_writes_is_caught(make):
    with pytest.raises(AssertionError, match="changed weight"):
        checks.check_reads_only(wrong(make), checks.random_stats((6, 4)))


def test_a_criterion_that_sees_positions_is_caught():
    with pytest.raises(AssertionError):
        checks.check_equivariant(wrong(lambda la: la.weight.abs() + torch.arange(6)[:, None]), checks.random_stats((6, 4)))


def test_undeclared_and_unread_needs_are_caught():
    with pytest.raises(LookupError):
        checks.check_needs_are_enough(wrong(lambda layer: layer.need(Need.GRAD) * layer.weight))
    with pytest.raises(AssertionError, match="does not read it"):
        checks.check_needs_are_enough(wrong(lambda layer: layer.weight.abs(), needs={Need.GRAD}))


def test_an_unknown_reduction_is_caught():
    with pytest.raises(AssertionError, match="reduction"):
        checks.check_declaration(wrong(lambda layer: layer.weight.abs(), reduction="median"))


def test_a_disturbed_model_is_caught():
    model, _, _ = checks.regression(steps=0)
    before = checks.snapshot(model)
    model[0].register_forward_hook(lambda *_: None)
    with pytest.raises(AssertionError, match="hooks"):
        checks.assert_same(before, checks.snapshot(model))
    model, _, _ = checks.regression(steps=0)
    before = checks.snapshot(model)
    model.eval()
    with pytest.raises(AssertionError, match="modes"):
        checks.assert_same(before, checks.snapshot(model))
