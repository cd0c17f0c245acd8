"""Removed weights that come back: each rule against a plain loop that does by hand what its paper says."""

from __future__ import annotations

import copy
import io
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from train.resumable import digits

import secateur as sc
from secateur.errors import RecipeError, TrainingError, UnknownName
from secateur.train.regrow import REGROW
from secateur.train.shadow import Shadow

RULES = {"splice": "magnitude", "frozen": "movement", "rigl": "magnitude", "set": "magnitude"}


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


def batch_of(step):
    batches = digits()[0]
    return batches[step % len(batches)]


def backward(model, step):
    x, y = batch_of(step)
    model.zero_grad()
    F.cross_entropy(model(x), y).backward()


def train(model, optimizer, pruner, steps, *, start=0, each=lambda step: None):
    for step in range(start, start + steps):
        backward(model, step)
        optimizer.step()
        pruner.step()
        each(step + 1)


def weights(model):
    return {n: p for n, p in model.named_parameters() if p.dim() == 2}


def top_per_layer(scores, sparsity):
    keep = scores.numel() - int(sparsity * scores.numel() + 0.5)
    order = scores.flatten().argsort(descending=True, stable=True)
    mask = torch.zeros(scores.numel(), dtype=torch.bool)
    mask[order[:keep]] = True
    return mask.view_as(scores)


def by_hand_straight_through(model, steps, chosen_at, sparsities, *, hysteresis):
    """Dense values trained with the gradients of the masked model, by SGD with momentum and weight decay."""
    full = {n: p.detach().clone() for n, p in model.named_parameters()}
    speed = {n: torch.zeros_like(p) for n, p in full.items()}
    masks = {n: torch.ones_like(p, dtype=torch.bool) for n, p in full.items()}
    for step in range(steps):
        with torch.no_grad():
            for n, p in model.named_parameters():
                p.copy_(full[n] * masks[n])
        backward(model, step)
        for n, p in model.named_parameters():
            grad = p.grad + 1e-3 * full[n]
            speed[n] = grad.clone() if step == 0 else 0.9 * speed[n] + grad
            full[n] = full[n] - 0.05 * speed[n]
        if step + 1 in chosen_at:
            for n in weights(model):
                favour = torch.where(masks[n], 1 + hysteresis, 1 - hysteresis)
                masks[n] = top_per_layer(full[n].abs() * favour, sparsities[chosen_at.index(step + 1)])
    return {n: full[n] * masks[n] for n in full}, masks


@pytest.mark.parametrize("hysteresis", [0.0, 0.1])
def test_splice_is_the_straight_through_estimator_with_two_thresholds(hysteresis):
    model = network()
    reference = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
    rule = {"name": "splice", "hysteresis": hysteresis}
    returned = 0
    with sc.gradual(
        model, optimizer, sparsity=0.9, schedule="one-shot", allocation="uniform", regrow=rule, begin=2, end=10, every=2
    ) as pruner:
        before = pruner.masks

        def each(step):
            nonlocal returned, before
            returned += sum(int((pruner.masks[n] & ~before[n]).sum()) for n in before)
            before = pruner.masks
            for n, mask in pruner.masks.items():
                assert not model.get_parameter(n)[~mask].any()

        train(model, optimizer, pruner, 10, each=each)
        expected, masks = by_hand_straight_through(reference, 10, [2, 4, 6, 8, 10], [0.9] * 5, hysteresis=hysteresis)
        for n, mask in pruner.masks.items():
            assert torch.equal(mask, masks[n])
        for n, value in expected.items():
            torch.testing.assert_close(model.get_parameter(n).detach(), value, rtol=1e-5, atol=1e-6)
    assert returned > 0


def test_frozen_weights_come_back_with_the_value_they_had_and_movement_adds_up():
    model = network()
    reference, full = copy.deepcopy(model), {}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    settings = {"criterion": "movement", "regrow": "frozen", "allocation": "uniform", "schedule": "one-shot"}
    masks = {n: torch.ones_like(p, dtype=torch.bool) for n, p in weights(reference).items()}
    full = {n: p.detach().clone() for n, p in reference.named_parameters()}
    moved = {n: torch.zeros_like(full[n]) for n in masks}
    returned = 0
    with sc.gradual(model, optimizer, sparsity=0.8, begin=1, end=9, every=2, **settings) as pruner:
        for step in range(9):
            train(model, optimizer, pruner, 1, start=step)
            with torch.no_grad():
                for n, p in reference.named_parameters():
                    p.copy_(full[n] * masks[n] if n in masks else full[n])
            backward(reference, step)
            for n, p in reference.named_parameters():
                if n in masks:
                    moved[n] -= p.grad * full[n]
                    full[n] = torch.where(masks[n], full[n] - 0.5 * p.grad, full[n])
                else:
                    full[n] = full[n] - 0.5 * p.grad
            if (step + 1) % 2 == 1:
                new = {n: top_per_layer(moved[n], 0.8) for n in masks}
                returned += sum(int((new[n] & ~masks[n]).sum()) for n in new) if step else 0
                masks = new
            for n, mask in masks.items():
                assert torch.equal(pruner.masks[n], mask)
                torch.testing.assert_close(model.get_parameter(n).detach(), full[n] * mask, rtol=1e-5, atol=1e-6)
    assert returned > 20


@pytest.mark.parametrize("rule", ["rigl", "set"])
def test_drop_and_grow_keep_the_count_and_change_the_share_of_the_cosine(rule):
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    settings = {"schedule": "one-shot", "allocation": "erk", "regrow": {"name": rule, "fraction": 0.4}}
    with sc.gradual(model, optimizer, sparsity=0.8, end=20, every=5, **settings) as pruner:
        first = {n: int(m.sum()) for n, m in pruner.masks.items()}
        for done in (5, 10, 15, 20):
            before = pruner.masks
            train(model, optimizer, pruner, 4, start=done - 5)
            assert pruner.masks is before
            backward(model, done - 1)
            gradient = {n: p.grad.clone() for n, p in weights(model).items()}
            optimizer.step()
            trained = {n: p.detach().clone() for n, p in weights(model).items()}
            pruner.step()
            share = 0.2 * (1 + math.cos(math.pi * done / 20))
            for n, mask in pruner.masks.items():
                assert int(mask.sum()) == first[n]
                moved = int(share * first[n])
                stay = top_per_layer(torch.where(before[n], trained[n].abs(), -1.0), 1 - (first[n] - moved) / mask.numel())
                assert (mask & stay).sum() == stay.sum() == first[n] - moved
                if rule == "rigl":
                    grown = gradient[n].abs().masked_fill(stay, -1.0).flatten().argsort(descending=True, stable=True)[:moved]
                    expected = stay.flatten().index_fill(0, grown, True).view_as(stay)
                    assert torch.equal(mask, expected)
                    new = mask & ~before[n]
                    assert not model.get_parameter(n)[new].any()
    assert done == 20


def test_growth_at_random_depends_on_the_seed():
    found = []
    for seed in (0, 0, 1):
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        settings = {"schedule": "one-shot", "regrow": "set", "seed": seed}
        with sc.gradual(model, optimizer, sparsity=0.8, end=9, every=3, **settings) as pruner:
            train(model, optimizer, pruner, 6)
            found.append(pruner.masks)
            pruner._step = 9
    assert found[0].diff(found[1]) == {}
    assert found[0].diff(found[2])


@pytest.mark.parametrize("rule", RULES)
def test_a_growing_schedule_ends_at_the_target_and_the_mask_is_fixed_then(rule):
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.003)
    reached = []
    with sc.gradual(model, optimizer, sparsity=0.9, criterion=RULES[rule], regrow=rule, begin=2, end=20, every=3) as pruner:
        train(model, optimizer, pruner, 20, each=lambda _: reached.append(pruner.sparsity))
        final = pruner.masks
        assert not isinstance(pruner._held, Shadow)
        train(model, optimizer, pruner, 5, start=20)
        assert pruner.masks is final
        for n, mask in final.items():
            assert not model.get_parameter(n)[~mask].any()
    assert reached == sorted(reached)
    total = 64 * 32 + 320
    assert final.kept() == total - int(0.9 * total + 0.5)


@pytest.mark.parametrize("rule", RULES)
def test_state_goes_through_a_file_and_ends_in_the_same_bits(rule):
    def start():
        model = network()
        optimizer = torch.optim.AdamW(model.named_parameters(), lr=0.003)
        settings = {"criterion": RULES[rule], "regrow": rule}
        return model, optimizer, sc.gradual(model, optimizer, sparsity=0.9, begin=2, end=20, every=3, **settings)

    whole, optimizer, pruner = start()
    with pruner:
        train(whole, optimizer, pruner, 24)
    for stop in (1, 7, 8, 22):
        model, optimizer, first = start()
        with first:
            train(model, optimizer, first, stop)
            file = io.BytesIO()
            torch.save([model.state_dict(), optimizer.state_dict(), first.state_dict()], file)
        file.seek(0)
        states = torch.load(file, weights_only=True)
        model, optimizer, second = start()
        if stop == 8:
            second.__enter__()  # a state may be loaded inside the block too
        for part, state in zip((model, optimizer, second), states, strict=True):
            part.load_state_dict(state)
        if stop != 8:
            second.__enter__()
        train(model, optimizer, second, 24 - stop, start=stop)
        second.__exit__(None)
        assert second.masks.diff(pruner.masks) == {}
        for name, value in whole.state_dict().items():
            assert torch.equal(value, model.state_dict()[name]), (stop, name)


def test_statistics_are_means_over_the_steps_since_the_last_choice():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with sc.gradual(
        model, optimizer, sparsity=0.5, criterion="obd", schedule="one-shot", allocation="uniform", begin=3, end=6, every=3
    ) as pruner:
        squares = {n: torch.zeros_like(p) for n, p in weights(model).items()}
        for step in range(3):
            backward(model, step)
            for n, p in weights(model).items():
                squares[n] += p.grad.square() / 3
            optimizer.step()
            pruner.step()
        for n, mask in pruner.masks.items():
            score = torch.where(mask, model.get_parameter(n).detach().square(), 0) * squares[n]
            assert mask.sum() == mask.numel() // 2
            assert score[mask].min() > 0
        state = pruner.state_dict()["running"]
        assert state["steps"] == 0
        assert state["grad_sq"] == {}


def test_gradients_of_a_scaler_that_leaves_unscaling_to_the_optimizer_are_unscaled():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with sc.gradual(model, optimizer, sparsity=0.5, criterion="movement", regrow="frozen", begin=3, end=4) as pruner:
        backward(model, 0)
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(4.0), torch.tensor(0.0)
        expected = {n: -p.grad / 4 * p.detach() for n, p in weights(model).items()}
        pruner._running._before_step(optimizer)
        optimizer.found_inf = torch.tensor(1.0)
        pruner._running._before_step(optimizer)
        for n, value in pruner.state_dict()["running"]["movement"].items():
            torch.testing.assert_close(value, expected[n])
        pruner._step = 4


def test_no_optimizer_state_is_left_at_removed_weights():
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.003)
    with sc.gradual(model, optimizer, sparsity=0.9, regrow="splice", begin=1, end=6) as pruner:
        train(model, optimizer, pruner, 3)
        removed = ~pruner.masks["0.weight"]
        assert optimizer.state[model[0].weight]["exp_avg"][removed].any(), "removed weights are trained until the end"
        train(model, optimizer, pruner, 4, start=3)
    for n, mask in pruner.masks.items():
        assert not optimizer.state[model.get_parameter(n)]["exp_avg"][~mask].any()
    assert not optimizer._optimizer_step_pre_hooks


def test_what_cannot_be_is_refused():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with pytest.raises(UnknownName, match="Did you mean 'splice'"):
        sc.gradual(model, optimizer, sparsity=0.5, end=5, regrow="splic")
    with pytest.raises(RecipeError, match="hysteresis is a share"):
        sc.gradual(model, optimizer, sparsity=0.5, end=2, regrow={"name": "splice", "hysteresis": 2})
    with pytest.raises(RecipeError, match="no option 'hysteresi'"):
        sc.gradual(model, optimizer, sparsity=0.5, end=2, regrow={"name": "splice", "hysteresi": 0.2})
    with sc.gradual(model, optimizer, sparsity=0.5, begin=1, end=5, regrow="splice") as pruner:
        train(model, optimizer, pruner, 2)
        with pytest.raises(TrainingError, match="was given a closure"):
            optimizer.step(lambda: torch.tensor(0.0))
        pruner._step = 5
    with pytest.raises(RecipeError, match=r"use sc\.gradual"):
        sc.prune(model, sparsity=0.5, regrow="rigl")
    with pytest.raises(RecipeError, match="'movement' follows the weights through a training"):
        sc.prune(model, sparsity=0.5, criterion="movement")
    state = sc.gradual(model, optimizer, sparsity=0.9, end=30).state_dict()
    with pytest.raises(TrainingError, match="regrow was none, is splice"):
        sc.gradual(model, optimizer, sparsity=0.9, end=30, regrow="splice").load_state_dict(state)


def test_every_rule_is_tested_here():
    assert set(RULES) | {"none"} == set(REGROW)
