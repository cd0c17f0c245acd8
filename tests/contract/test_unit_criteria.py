"""Every registered unit criterion: form, determinism, order, the statistics it declares, and the model as it was."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from contract import criteria_checks as checks
from torch import nn

import secateur as sc
from secateur.criteria import CRITERIA, UNIT_CRITERIA
from secateur.types import UnitNeed, UnitStats

every = pytest.mark.parametrize("name", list(UNIT_CRITERIA))
ON_UNITS = [n for n, e in UNIT_CRITERIA.items() if e.facts["on"] != "blocks" and UnitNeed.VISUAL_RATIO not in e.facts["needs"]]


def stats(units: int, elements: int) -> UnitStats:
    generator = torch.Generator().manual_seed(0)
    values = {n.value: torch.rand(units, generator=generator) for n in UnitNeed}
    values["visual_ratio"] = torch.rand(units, 7, generator=generator)
    return UnitStats("a.weight", torch.randn(units, elements, generator=generator), **values)


def tensors_of(given: UnitStats) -> dict[str, torch.Tensor]:
    return {f.name: getattr(given, f.name) for f in dataclasses.fields(given) if f.name != "name"}


@every
def test_declares_what_it_is(name):
    entry = UNIT_CRITERIA[name]
    assert entry.facts["on"] in ("outputs", "inputs", "norms", "blocks")
    assert all(isinstance(n, UnitNeed) for n in entry.facts["needs"])
    assert entry.source
    assert entry.summary.endswith(".")
    assert name not in CRITERIA, "one name, one criterion"


@every
@pytest.mark.parametrize("shape", [(6, 9), (2, 1), (1, 4)])
def test_form_determinism_and_order(name, shape):
    given, score = stats(*shape), UNIT_CRITERIA[name].make
    before = {k: v.clone() for k, v in tensors_of(given).items()}
    state = torch.get_rng_state()
    found = score(given)
    assert found.shape == shape[:1]
    assert found.dtype == torch.float32
    assert torch.isfinite(found).all()
    assert torch.equal(found, score(given))
    assert torch.equal(state, torch.get_rng_state())
    found.add_(1)
    assert all(torch.equal(before[k], v) for k, v in tensors_of(given).items()), "it reads only"
    order = torch.arange(shape[0] - 1, -1, -1)
    turned = UnitStats("a.weight", **{k: v[order] for k, v in tensors_of(given).items()})
    torch.testing.assert_close(score(turned), score(given)[order], rtol=1e-5, atol=0)


@every
def test_reads_what_it_declares_and_nothing_else(name):
    entry, given = UNIT_CRITERIA[name], stats(5, 3)
    entry.make(dataclasses.replace(given, **{n.value: None for n in UnitNeed if n not in entry.facts["needs"]}))
    for need in entry.facts["needs"]:
        with pytest.raises(LookupError, match=need.value):
            entry.make(dataclasses.replace(given, **{need.value: None}))


class Net(nn.Module):
    """Everything a site can be: grouped and depthwise convolutions, norms of each layout, a shared linear layer."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.depth, self.mix = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Conv2d(8, 6, 1)
        self.flat, self.again, self.last = nn.Linear(6, 10), nn.Linear(10, 10), nn.Linear(10, 3)
        self.scale = nn.LayerNorm(10)

    def forward(self, x):
        x = torch.relu(self.mix(self.depth(torch.relu(self.norm(self.stem(x))))))
        x = self.scale(self.flat(x.mean((2, 3))))
        return self.last(torch.relu(self.again(torch.relu(self.again(x)))))


@pytest.mark.parametrize("name", ON_UNITS)
def test_real_models_are_cut_by_it_and_left_as_they_were(name):
    torch.manual_seed(0)
    model, data = Net(), [(torch.randn(4, 3, 5, 5), torch.arange(4) % 3), (torch.randn(3, 3, 5, 5), torch.arange(3))]
    before = checks.snapshot(model)
    runs = [sc.prune(model, pattern="channel", sparsity=0.5, criterion=name, data=data) for _ in range(2)]
    checks.assert_same(before, checks.snapshot(model))
    assert runs[0].plan == runs[1].plan
    assert runs[0].plan.cuts
