"""Every registered criterion through the shared checks."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from contract import criteria_checks as checks
from torch import nn

from secateur.criteria import CRITERIA
from secateur.types import Need

NAMES = list(CRITERIA)
COLLECTED = [
    n for n, e in CRITERIA.items() if Need.MOVEMENT not in e.facts["needs"]
]  # a training gives it: tests/train/test_regrow.py
SHAPES = [(6, 4), (1, 5), (5, 1), (1, 1), (8, 3, 3), (6, 4, 3, 3), (8, 1, 3, 3), (4, 2, 2, 3, 3)]
EVERY_SAMPLE = {Need.GRAD, Need.GRAD_SQ, Need.INPUT_NORM, Need.HESSIAN_GRAD}
every = pytest.mark.parametrize("name", NAMES)
collected = pytest.mark.parametrize("name", COLLECTED)


@every
def test_declares_what_it_is_and_what_it_needs(name):
    checks.check_declaration(CRITERIA[name])
    checks.check_needs_are_enough(CRITERIA[name])


@every
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_form_and_determinism(name, shape):
    stats = checks.random_stats(shape)
    checks.check_form(CRITERIA[name], stats)
    checks.check_deterministic(CRITERIA[name], stats)
    checks.check_reads_only(CRITERIA[name], stats)
    if name not in ("random", "woodfisher"):  # whose blocks are of consecutive weights, across outputs
        checks.check_equivariant(CRITERIA[name], stats)


@every
@pytest.mark.parametrize("value", [0.0, 1.0, 1e-30, 65504.0])
def test_form_of_constant_weights(name, value):
    stats = checks.random_stats((6, 4), weight=torch.full((6, 4), value))
    checks.check_form(CRITERIA[name], stats)


@every
def test_form_of_a_transposed_view(name):
    stats = checks.random_stats((6, 4))
    turned = {k: v.t().contiguous().t() if v.dim() == 2 else v for k, v in checks.tensors_of(stats).items()}
    score = CRITERIA[name].make(dataclasses.replace(stats, **turned))
    assert torch.equal(score, CRITERIA[name].make(stats))


def _mlp():
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), torch.randn(4, 6)


def _conv1d():
    return nn.Sequential(nn.Conv1d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)), torch.randn(4, 3, 6)


def _conv2d():
    body = [nn.Conv2d(4, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2, stride=2)]
    body += [nn.Conv2d(8, 16, 1, groups=8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(), nn.Linear(16, 3)]
    return nn.Sequential(*body), torch.randn(4, 4, 7, 7)


def _conv3d():
    return nn.Sequential(nn.Conv3d(1, 2, 2), nn.Flatten(), nn.Linear(16, 3)), torch.randn(4, 1, 3, 3, 3)


def _transposed():
    body = [nn.ConvTranspose2d(4, 6, 3, stride=2), nn.ReLU(), nn.ConvTranspose2d(6, 4, 2, groups=2)]
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)), torch.randn(4, 4, 3, 3)


def _attention():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    return nn.Sequential(layer, nn.Flatten(), nn.Linear(24, 3)), torch.randn(4, 3, 8)


MODELS = {f.__name__[1:]: f for f in (_mlp, _conv1d, _conv2d, _conv3d, _transposed, _attention)}


@collected
@pytest.mark.parametrize("kind", MODELS)
def test_real_models_are_left_as_they_were(name, kind):
    model, x = MODELS[kind]()
    checks.check_leaves_model(CRITERIA[name], model, [(x[:3], torch.tensor([0, 1, 2])), (x[3:], torch.tensor([0]))])


@collected
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_other_precisions(name, dtype):
    model, x = _mlp()
    checks.check_leaves_model(CRITERIA[name], model.to(dtype), [(x.to(dtype), torch.tensor([0, 1, 2, 0]))])


@pytest.mark.parametrize("name", [n for n, e in CRITERIA.items() if e.facts["needs"] & EVERY_SAMPLE])
def test_every_sample_has_a_part(name):
    checks.check_uses_every_sample(CRITERIA[name])


@pytest.mark.parametrize("name", [n for n in COLLECTED if n != "random"])
def test_low_scores_are_the_ones_to_remove(name):
    checks.check_direction(CRITERIA[name])
