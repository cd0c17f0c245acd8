"""Gradual pruning in a training loop of the user's own."""

from __future__ import annotations

import copy
import io
import itertools
import logging
import runpy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from train.resumable import digits

import secateur as sc
from secateur.criteria import CRITERIA
from secateur.errors import LayerError, NonFiniteError, RecipeError, TrainingError, UnknownName
from secateur.schedules import SCHEDULES, cubic
from secateur.types import Need

EXAMPLE = Path(__file__).parents[2] / "examples" / "gradual.py"


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 32), nn.ReLU(), nn.Linear(32, 10))


def train(model, optimizer, pruner, steps, *, start=0, each=lambda step: None):
    batches = digits()[0]
    for step in range(start, start + steps):
        x, y = batches[step % len(batches)]
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        pruner.step()
        each(step + 1)


def adam(model):
    return torch.optim.AdamW(model.parameters(), lr=0.003)


def assert_held(model, masks):
    for name, mask in masks.items():
        assert not model.get_parameter(name).detach()[~mask].any()


TOTAL = 64 * 48 + 48 * 32 + 32 * 10


@pytest.mark.parametrize("schedule", list(SCHEDULES))
@pytest.mark.parametrize("sparsity", [0.9, 0.333])
def test_ends_at_the_target_to_the_weight(schedule, sparsity):
    model = network()
    optimizer = adam(model)
    with sc.gradual(model, optimizer, sparsity=sparsity, begin=3, end=24, every=5, schedule=schedule) as pruner:
        train(model, optimizer, pruner, 24)
        expected = sc.prune(model, sparsity=sparsity, allocation="global").masks.kept()
        assert pruner.masks.kept() == expected
        assert abs(pruner.masks.kept() - (1 - sparsity) * TOTAL) <= 1
        train(model, optimizer, pruner, 6, start=24)
        assert pruner.masks.kept() == expected
        assert_held(model, pruner.masks)


def test_follows_the_schedule_and_what_is_removed_stays_removed():
    model, reached, before = network(), {}, []
    optimizer = adam(model)
    with sc.gradual(model, optimizer, sparsity=0.8, begin=4, end=20, every=5) as pruner:

        def each(step):
            reached[step] = pruner.sparsity
            assert_held(model, pruner.masks)
            if before:
                assert not any((pruner.masks[n] & ~before[-1][n]).any() for n in pruner.masks)
            before.append(pruner.masks)

        assert pruner.sparsity == 0.0
        train(model, optimizer, pruner, 22, each=each)
    changes = {step: reached[step] for step in reached if reached[step] != reached.get(step - 1, 0.0)}
    assert list(changes) == [9, 14, 19, 20]  # 4 + 5k, where cubic starts from 0 at 4, and the end
    for step, sparsity in changes.items():
        assert sparsity == pytest.approx(cubic((step - 4) / 16, 0.8), abs=1 / TOTAL)


def test_gradual_keeps_accuracy_that_one_shot_loses():
    train_batches, [(x, y)] = digits()
    dense = network()
    sc.finetune(dense, train_batches, epochs=20, lr=0.01)

    def accuracy(model):
        with torch.no_grad():
            return (model(x).argmax(1) == y).float().mean().item()

    one_shot = sc.prune(dense, sparsity=0.9).model
    model = copy.deepcopy(dense)
    optimizer = adam(model)
    with sc.gradual(model, optimizer, sparsity=0.9, end=150, every=10) as pruner:
        train(model, optimizer, pruner, 300)
    assert accuracy(dense) > 0.93
    assert accuracy(one_shot) < accuracy(dense) - 0.2
    assert accuracy(model) > accuracy(dense) - 0.04
    assert pruner.sparsity == pytest.approx(0.9, abs=1 / TOTAL)


@pytest.fixture
def perverse():
    """A criterion that keeps the smallest weights, so that removed ones, which are zero, score best."""
    CRITERIA.register("smallest", source="a test", needs=frozenset({Need.WEIGHT}), reduction="sum")(lambda s: -s.weight.abs())
    yield "smallest"
    del CRITERIA._entries["smallest"]


def test_what_is_removed_stays_removed_whatever_the_criterion_says(perverse):
    model, before = network(), []
    optimizer = adam(model)
    with sc.gradual(model, optimizer, sparsity=0.8, criterion=perverse, end=20, every=5) as pruner:
        train(model, optimizer, pruner, 20, each=lambda _: before.append(pruner.masks))
    for early, late in itertools.pairwise(before):
        assert not any((late[n] & ~early[n]).any() for n in late)
    assert pruner.masks.kept() == pytest.approx(0.2 * TOTAL, abs=1)


def served():
    """Criteria that a training step can feed, as their declared needs say."""
    fed = {Need.WEIGHT, Need.GRAD, Need.GRAD_ONE, Need.GRAD_SQ, Need.MOVEMENT}
    return {name: CRITERIA[name].facts["needs"] <= fed for name in CRITERIA}


@pytest.mark.parametrize("name", [n for n, fits in served().items() if fits])
def test_criteria_of_weights_and_gradients_work_in_the_loop(name):
    model = network()
    optimizer = adam(model)
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    with sc.gradual(model, optimizer, sparsity=0.7, criterion=name, begin=1, end=13, every=4) as pruner:
        train(model, optimizer, pruner, 13)
    assert len(calls) == 13, "no extra pass through the model"
    assert pruner.masks.kept() == pytest.approx(0.3 * TOTAL, abs=1)


@pytest.mark.parametrize("name", [n for n, fits in served().items() if not fits])
def test_criteria_that_need_more_are_refused(name):
    model = network()
    with pytest.raises(RecipeError, match=f"'{name}' needs .*a training step does not give"):
        sc.gradual(model, adam(model), sparsity=0.5, criterion=name, end=5)


def test_taylor_reads_the_gradients_of_the_steps():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with sc.gradual(model, optimizer, sparsity=0.5, criterion="taylor", begin=1, end=2, schedule="one-shot") as pruner:
        x, y = digits()[0][0]
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        scores = {n: (p.grad * p).detach().abs() for n, p in model.named_parameters() if p.dim() == 2}
        pruner.step()
        cut = torch.cat([s.flatten() for s in scores.values()]).sort().values[TOTAL // 2]
        for name, mask in pruner.masks.items():
            assert torch.equal(mask, scores[name] >= cut)


def test_missing_gradients_are_explained():
    model = network()
    optimizer = adam(model)
    with sc.gradual(model, optimizer, sparsity=0.5, criterion="snip", begin=0, end=5) as pruner:
        optimizer.step()
        with pytest.raises(
            TrainingError, match=r"gradients are needed \(grad_one\), and '0\.weight' has none.*backward\(\) before"
        ):
            pruner.step()
    with (
        pytest.raises(TrainingError, match="begin at 1 or later"),
        sc.gradual(model, adam(model), sparsity=0.5, criterion="snip", schedule="one-shot", end=5),
    ):
        pass


@pytest.mark.parametrize(("pattern", "kept"), [("row", 0.25), ("neuron", 0.25)])
def test_patterns_of_units(pattern, kept):
    model = network()
    optimizer = adam(model)
    with sc.gradual(
        model, optimizer, sparsity=1 - kept, pattern=pattern, allocation="uniform", layers=["0", "2"], end=8, every=2
    ) as pruner:
        train(model, optimizer, pruner, 8)
    biases = {"0.bias", "2.bias"} if pattern == "neuron" else set()
    assert set(pruner.masks) == {"0.weight", "2.weight"} | biases
    again = sc.gradual(
        model, optimizer, sparsity=1 - kept, pattern=pattern, allocation="uniform", layers=["0", "2"], end=8, every=2
    )
    again.load_state_dict(pruner.state_dict())
    assert again.sparsity == pruner.sparsity
    assert_held(model, pruner.masks)
    assert pruner.sparsity == pytest.approx(1 - kept)
    if pattern == "neuron":
        assert all(set(m.float().mean(1).tolist()) == {0.0, 1.0} for m in pruner.masks.values() if m.dim() == 2)


def test_n_m_prunes_at_once_and_does_not_grow():
    model = network()
    optimizer = adam(model)
    with sc.gradual(model, optimizer, pattern="2:4", schedule="one-shot", begin=2, end=4) as pruner:
        train(model, optimizer, pruner, 1)
        assert pruner.sparsity == 0.0
        train(model, optimizer, pruner, 4, start=1)
    for mask in pruner.masks.values():
        assert torch.equal(mask.view(-1, 4).sum(1), torch.full((mask.numel() // 4,), 2))
    with pytest.raises(RecipeError, match=r"2:4 has one sparsity and nothing in between"):
        sc.gradual(model, optimizer, pattern="2:4", end=4)


def test_one_shot_from_step_zero_prunes_on_entering():
    model = network()
    with sc.gradual(model, adam(model), sparsity=0.5, schedule="one-shot", end=3) as pruner:
        assert pruner.masks.kept() == TOTAL // 2
        assert_held(model, pruner.masks)


def test_state_goes_through_a_file_and_ends_in_the_same_bits():
    def start():
        model = network()
        optimizer = torch.optim.AdamW(model.named_parameters(), lr=0.003)
        return model, optimizer, sc.gradual(model, optimizer, sparsity=0.9, begin=2, end=30, every=7)

    whole, optimizer, pruner = start()
    with pruner:
        train(whole, optimizer, pruner, 40)
    for stop in (1, 9, 16, 35):
        model, optimizer, first = start()
        with first:
            train(model, optimizer, first, stop)
            file = io.BytesIO()
            torch.save([model.state_dict(), optimizer.state_dict(), first.state_dict()], file)
        file.seek(0)
        states = torch.load(file, weights_only=True)
        model, optimizer, second = start()
        for part, state in zip((model, optimizer, second), states, strict=True):
            part.load_state_dict(state)
        with second:
            train(model, optimizer, second, 40 - stop, start=stop)
        assert second.masks.diff(pruner.masks) == {}
        for name, value in whole.state_dict().items():
            assert torch.equal(value, model.state_dict()[name]), (stop, name)


def test_state_of_another_run_is_refused():
    model = network()
    optimizer = adam(model)
    state = sc.gradual(model, optimizer, sparsity=0.9, end=30).state_dict()
    with pytest.raises(TrainingError, match=r"sparsity was 0\.9, is 0\.8; end was 30, is 40"):
        sc.gradual(model, optimizer, sparsity=0.8, end=40).load_state_dict(state)
    with pytest.raises(TrainingError, match=r"other layers: 4\.weight"):
        sc.gradual(model, optimizer, sparsity=0.9, end=30, ignore=["4"]).load_state_dict(state)


def test_compiled_model():
    model = network()
    compiled = torch.compile(model, backend="eager")
    optimizer = adam(compiled)
    with sc.gradual(compiled, optimizer, sparsity=0.9, end=10, every=5) as pruner:
        train(compiled, optimizer, pruner, 12)
    assert list(pruner.masks) == ["0.weight", "2.weight", "4.weight"]
    assert_held(model, pruner.masks)


def test_schedules_that_make_no_sense():
    model = network()
    for arguments, words in (
        ({"begin": 10, "end": 5}, "from step 10 to 5 ends before it begins"),
        ({"begin": 10, "end": 10}, "has no step"),
        ({"begin": -1, "end": 5}, "begin must be 0 or more"),
        ({"end": 0}, "has no step"),
        ({"end": 5, "every": 0}, r"every must lie in 1\.\.5"),
        ({"begin": 1, "end": 5, "every": 5}, r"every must lie in 1\.\.4"),
        ({"end": 5.0}, r"a whole number; got 5\.0"),
        ({"end": 5, "begin": True}, "a whole number; got True"),
    ):
        with pytest.raises(RecipeError, match=words):
            sc.gradual(model, adam(model), sparsity=0.5, **arguments)


def test_other_bad_arguments():
    model = network()
    optimizer = adam(model)
    for sparsity in (1, 1.0, -0.5, None):
        with pytest.raises(RecipeError, match="sparsity"):
            sc.gradual(model, optimizer, sparsity=sparsity, end=5)
    with pytest.raises(UnknownName, match="Did you mean 'magnitude'"):
        sc.gradual(model, optimizer, sparsity=0.5, end=5, criterion="magnitud")
    with pytest.raises(UnknownName, match="Did you mean 'cubic'"):
        sc.gradual(model, optimizer, sparsity=0.5, end=5, schedule="cubi")
    with pytest.raises(LayerError, match="nothing to prune"):
        sc.gradual(nn.ReLU(), optimizer, sparsity=0.5, end=5)
    with pytest.raises(TrainingError, match="inside its block"):
        sc.gradual(model, optimizer, sparsity=0.5, end=5).step()
    other = torch.optim.SGD(network().parameters(), lr=0.1)
    with (
        pytest.raises(TrainingError, match=r"does not own the masked parameter '0\.weight'"),
        sc.gradual(model, other, sparsity=0.5, end=5),
    ):
        pass


def test_nan_weights_stop_the_choice_and_keep_the_masks():
    model = network()
    optimizer = adam(model)
    with sc.gradual(model, optimizer, sparsity=0.5, end=4, schedule="iterative") as pruner:
        train(model, optimizer, pruner, 1)
        masks = pruner.masks
        with torch.no_grad():
            model[0].weight[masks["0.weight"]] = float("nan")
        with pytest.raises(NonFiniteError, match=r"0\.weight"):
            pruner.step()
        assert pruner.masks is masks


def test_leaving_before_the_end_is_said_and_the_optimizer_is_free_again(caplog):
    model = network()
    optimizer = adam(model)
    with caplog.at_level(logging.WARNING, "secateur"), sc.gradual(model, optimizer, sparsity=0.5, end=9) as pruner:
        train(model, optimizer, pruner, 3)
    assert "left at step 3 of 9" in caplog.text
    assert not optimizer._optimizer_step_post_hooks
    sc.hold(optimizer, pruner.masks, model).release()


def test_the_example_runs_and_keeps_its_accuracy(capsys):
    state = runpy.run_path(str(EXAMPLE))
    assert len(EXAMPLE.read_text().splitlines()) < 40
    assert state["pruner"].sparsity == pytest.approx(0.95, abs=1e-4)
    assert state["accuracy"] > 0.93
    assert "sparsity 0.950" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("steps", 3), ("solver", "obc"), ("finetune", {"epochs": 1}), ("reestimate_norms", True), ("budget", "50% params"),
        ("repair", "bias"), ("slimming", {"epochs": 1}), ("compress", {"bits": 4}), ("force", ("0",)),
    ],
)  # fmt: skip
def test_what_a_training_loop_of_the_users_own_does_not_do_is_refused(key, value):
    model = network()
    with pytest.raises(RecipeError, match=f"{key} belong to sc.prune"):
        sc.gradual(model, adam(model), sparsity=None if key == "budget" else 0.5, end=5, **{key: value})


def test_nothing_is_watched_where_nothing_is_asked_and_after_the_end():
    for criterion, hooks in (("magnitude", 0), ("taylor", 1)):
        model = network()
        optimizer = adam(model)
        with sc.gradual(model, optimizer, sparsity=0.5, criterion=criterion, begin=1, end=3) as pruner:
            assert len(optimizer._optimizer_step_pre_hooks) == hooks
            train(model, optimizer, pruner, 3)
            assert not optimizer._optimizer_step_pre_hooks
