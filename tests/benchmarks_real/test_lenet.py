"""LeNet-300-100 on MNIST, scaled down: an epoch of training, then pruned to a twelfth in steps with fine-tuning."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from assets import asset

import secateur as sc
from secateur.data import accuracy, load_data

sys.path.append(str(Path(__file__).parents[2] / "examples"))
SPARSITY, WEIGHTS = 0.92, 266_200


@pytest.fixture(scope="module")
def run():
    mnist = asset("mnist.npz")
    from lenet import lenet_300_100

    torch.set_num_threads(1)
    loaded = lenet_300_100(seed=0)
    train = load_data(f"npz:{mnist}[::4]?split=train", loaded=loaded, batch_size=100)
    test = list(load_data(f"npz:{mnist}?split=test", loaded=loaded, batch_size=2000))
    sc.finetune(loaded.model, train, epochs=2, lr=2e-3)
    dense = {name: tensor.clone() for name, tensor in loaded.model.state_dict().items()}
    recipe = {"sparsity": SPARSITY, "schedule": "exponential", "steps": 3, "finetune": {"epochs": 1, "lr": 2e-3}}
    result = sc.prune(loaded.model, recipe, train=train, evaluate=accuracy(test, topk=(1,)))
    return loaded.model, dense, result, sc.prune(loaded.model, sparsity=SPARSITY, evaluate=accuracy(test, topk=(1,)))


def test_exactly_a_twelfth_is_left(run):
    _, _, result, _ = run
    zeros = sum(int((result.model.get_parameter(name) == 0).sum()) for name in result.masks)
    assert zeros == WEIGHTS - result.masks.kept() == int(SPARSITY * WEIGHTS + 0.5)


def test_the_densities_fall_by_the_same_factor(run):
    _, _, result, _ = run
    densities = [1 - point.sparsity for point in result.report.points]
    assert densities == pytest.approx([0.08 ** (step / 3) for step in range(4)], abs=1e-4)


def test_accuracy_is_within_a_point_of_the_dense_network_and_steps_are_what_does_it(run):
    _, _, result, at_once = run
    dense, pruned = result.report.before.quality["accuracy"], result.report.after.quality["accuracy"]
    assert dense > 0.93
    assert pruned > dense - 0.01
    assert at_once.report.after.quality["accuracy"] < dense - 0.02


def test_the_dense_network_is_untouched(run):
    model, dense, _, _ = run
    assert all(torch.equal(tensor, dense[name]) for name, tensor in model.state_dict().items())
