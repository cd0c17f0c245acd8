"""Budgets kept by taking whole blocks out: the choice, the figures, and the clock's part in it."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys

import pytest
import torch
from torch import nn

import secateur as sc
from secateur.budgets.amount import parse_budget
from secateur.budgets.blocks import BlockProblem, cheapest, fit_blocks_latency
from secateur.errors import BudgetError, RecipeError
from secateur.graph import block_importance, cut, drop_blocks, removable_blocks, trace
from secateur.measure.macs import macs
from secateur.measure.sensitivity import propose
from secateur.measure.sizes import sizes
from secateur.types import Latency, Plan

WIDTHS = (4, 8, 32, 8, 16)


class Block(nn.Module):
    """A bottleneck around a shortcut; the wider it is, the more it costs."""

    def __init__(self, width):
        super().__init__()
        self.norm, self.up, self.down = nn.BatchNorm2d(6), nn.Conv2d(6, width, 1), nn.Conv2d(width, 6, 3, padding=1)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3)
        self.blocks = nn.Sequential(*(Block(w) for w in WIDTHS))
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


def build():
    torch.manual_seed(0)
    return Network().eval()


def batches():
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(6, 3, 8, 8, generator=generator), torch.arange(6) % 4) for _ in range(2)]


@pytest.fixture
def data():
    return batches()


def best_by_force(worth, saved, needed):
    choices = [c for n in range(len(worth) + 1) for c in itertools.combinations(range(len(worth)), n)]
    enough = [c for c in choices if sum(saved[i] for i in c) >= needed]
    return min(sum(max(worth[i], 0.0) for i in c) for c in enough) if enough else None


def test_the_choice_is_the_best_of_all():
    generator = torch.Generator().manual_seed(0)
    for case in range(60):
        worth = (torch.rand(9, generator=generator, dtype=torch.float64) - 0.15).tolist()
        saved = torch.randint(1, 8 if case % 2 else 1000, (9,), generator=generator).double().tolist()
        for share in (0.01, 0.3, 0.7, 1.0, 1.01):
            found, wanted = cheapest(worth, saved, share * sum(saved)), best_by_force(worth, saved, share * sum(saved))
            assert (found is None) == (wanted is None)
            if found is not None:
                assert sum(max(worth[i], 0.0) for i in found) == pytest.approx(wanted)
                assert not any(sum(saved[j] for j in found if j != i) >= share * sum(saved) for i in found)


def test_hundreds_of_equal_blocks_are_no_trouble():
    worth = [float(i) for i in range(200)]
    assert cheapest(worth, [7.0] * 200, 7 * 99.5) == list(range(100))


@pytest.mark.parametrize("budget", ["70% params", "50% MACs", "60% bytes", "3 kB", "500 params"])
def test_the_promise_is_what_the_model_has_and_nothing_worth_less_would_do(budget, data):
    model, x = build(), data[0][0]
    plan = sc.plan(model, pattern="layer", budget=budget, criterion="block_cosine", data=data)
    kept = plan.budget

    def cost(network):
        found = sizes(network)
        each = {"params": found.parameters, "bytes": found.bytes_memory, "MACs": macs(network, data[0]).dense}
        return each[kept.unit]

    assert kept.promised == cost(cut(model, plan)) <= kept.limit < kept.dense == cost(model)
    names = [f"blocks.{i}" for i in range(5)]
    change = block_importance(model, removable_blocks(model, trace(model, x)), [x for x, _ in data])
    worth = sum(change[n] for n in plan.dropped)
    for gone in itertools.chain.from_iterable(itertools.combinations(names, n) for n in range(1, 5)):
        if sum(change[n] for n in gone) < worth - 1e-6:
            assert cost(cut(model, Plan(dropped=gone))) > kept.limit


def test_a_budget_out_of_reach_says_the_nearest(data):
    keys = {"pattern": "layer", "criterion": "block_cosine", "data": data}
    with pytest.raises(BudgetError, match=r"nearest that can .* 5 blocks may go, but one of them stays") as caught:
        sc.plan(build(), budget="10% params", **keys)
    least = cut(build(), Plan(dropped=tuple(f"blocks.{i}" for i in range(1, 5))))
    assert caught.value.nearest == sizes(least).parameters
    assert len(sc.plan(build(), budget=f"{caught.value.nearest} params", **keys).dropped) == 4
    with pytest.raises(BudgetError, match="2 blocks may go, and"):
        sc.plan(build(), budget="10% params", layers=["blocks.0", "blocks.1"], **keys)


def test_forced_blocks_go_and_ignored_ones_stay(data):
    keys = {"pattern": "layer", "criterion": "block_cosine", "data": data}
    dropped = sc.plan(build(), budget="60% params", force=["blocks.0"], ignore=["blocks.2"], **keys).dropped
    assert "blocks.0" in dropped
    assert "blocks.2" not in dropped
    assert sc.plan(build(), budget="99% params", force=["blocks.2"], **keys).dropped == ("blocks.2",)
    assert sc.plan(build(), budget="100% params", **keys).dropped == ()


def test_in_steps_what_is_left_is_measured_anew(data):
    """Equal blocks, so each of three rounds takes the one without which, the earlier ones gone, the loss is least."""
    model = build()
    model.blocks = nn.Sequential(*(Block(8) for _ in range(5))).eval()
    gone = []
    for _ in range(3):
        left = [f"blocks.{i}" for i in range(5) if f"blocks.{i}" not in gone]
        gone.append(min(left, key=lambda name: loss_of(cut(model, Plan(dropped=(*gone, name))), data)))
    keys = {"pattern": "layer", "criterion": "block_loss", "data": data}
    block = sizes(model.blocks[0]).parameters
    plan = sc.plan(model, budget=f"{sizes(model).parameters - 3 * block} params", steps=3, **keys)
    assert set(plan.dropped) == set(gone)


@torch.no_grad()
def loss_of(model, data):
    return sum(float(nn.functional.cross_entropy(model(x), y)) for x, y in data)


class FakeClock:
    """Milliseconds by the widths of the blocks, of which the time inside the dense model shows only a part."""

    def __init__(self, factor=1.0):
        self.factor, self.timed = factor, 0

    def inside(self, names):
        return {name: WIDTHS[int(name.split(".")[1])] / self.factor for name in names}

    def model(self, model):
        self.timed += 1
        ms = 10.0 + sum(b.up.out_channels for b in model.blocks)
        return Latency(ms, ms - 1, ms + 1, 5, batch=1, threads=1, dtype="float32", device="cpu")


@pytest.mark.parametrize("factor", [1.0, 2.0, 0.6])
@pytest.mark.parametrize("limit", [74.5, 60.5, 46.5, 30.5, 14.5])
def test_milliseconds_are_kept_whatever_the_table_says(data, factor, limit):
    model, clock = build(), FakeClock(factor)
    graph = trace(model, data[0][0])
    names = [b.name for b in removable_blocks(model, graph)]
    worth = [1.0, 2.0, 3.0, 1.5, 4.0]

    def choose(cost, most):
        chosen = cheapest(worth, [cost([]) - cost([n]) for n in names], cost([]) - most)
        return None if chosen is None or len(chosen) == 5 else [names[i] for i in chosen]

    problem = BlockProblem(model, graph, names, choose, one_stays=True)
    gone, budget = fit_blocks_latency(problem, parse_budget(f"{limit} ms"), clock)
    assert budget.achieved == 10 + sum(WIDTHS) - sum(WIDTHS[int(n[-1])] for n in gone) <= limit
    assert clock.timed <= 12
    wanted = best_by_force(worth, WIDTHS, 10 + sum(WIDTHS) - limit)
    assert sum(worth[names.index(n)] for n in gone) == pytest.approx(wanted)
    with pytest.raises(BudgetError, match=r"nearest that can is 14 ms"):
        fit_blocks_latency(problem, parse_budget("12 ms"), clock)


def test_real_milliseconds(data):
    result = sc.prune(build(), pattern="layer", budget="80% ms", criterion="block_cosine", data=data)
    budget = result.report.budget
    assert budget.achieved <= budget.limit
    assert budget.low <= budget.achieved <= budget.high
    assert 1 <= len(result.plan.dropped) <= 4


def test_a_scan_drops_every_block_and_pruning_goes_by_it(data):
    model = build()
    x = data[0][0]
    wanted = model(x).detach()
    curves = sc.scan(model, pattern="layer", evaluate=lambda m: {"loss": float((m(x) - wanted).detach().norm())}, data=data)
    assert [c.layer for c in curves] == [f"blocks.{i}" for i in range(5)]
    assert {c.sparsity for c in curves} == {(0.0, 1.0)}
    for curve in curves:
        assert curve.quality[1] == pytest.approx(float((drop_blocks(model, x, [curve.layer])[0](x) - wanted).detach().norm()))
    ranked = sorted(curves, key=lambda c: c.quality[1])
    keys = {"pattern": "layer", "allocation": "sensitivity", "data": data}
    assert set(sc.plan(model, sparsity=0.4, sensitivity=curves, **keys).dropped) == {c.layer for c in ranked[:2]}
    assert sc.plan(model, budget="99% params", sensitivity=curves, **keys).dropped == (ranked[0].layer,)
    bearable = ranked[1].quality[1] * 1.001
    shifted = [sc.types.Sensitivity(c.layer, c.sparsity, (1.0, 1.0 + c.quality[1])) for c in curves]
    assert {n for n, s in propose(shifted, loss=bearable).items() if s} == {c.layer for c in ranked[:2]}
    assert set(propose(shifted, loss=bearable).values()) == {0.0, 1.0}
    with pytest.raises(RecipeError, match="sparsities"):
        sc.scan(model, pattern="layer", evaluate=lambda m: 1.0, data=data, sparsities=[0.5])
    with pytest.raises(RecipeError, match=r"blocks\.4"):
        sc.plan(model, sparsity=0.4, sensitivity=curves[:4], **keys)
    with pytest.raises(RecipeError, match=r"sensitivity=sc\.scan"):
        sc.plan(model, sparsity=0.4, **keys)
    assert len(model.blocks) == 5


def test_on_the_command_line(tmp_path):
    def secateur(*words):
        words = (words[0], f"{__file__}:build", *words[1:], "-p", "layer", "--test", f"{__file__}:batches", "--json")
        done = subprocess.run([sys.executable, "-m", "secateur", *words], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    curves = secateur("scan")
    assert [c["sparsity"] for c in curves] == [[0.0, 1.0]] * 5
    report = secateur("prune", "--budget", "60% params", "-a", "sensitivity", "--data", f"{__file__}:batches", "--out", "run")
    assert report["budget"]["achieved"] == report["budget"]["promised"] <= report["budget"]["limit"]
