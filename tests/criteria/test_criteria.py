"""What single criteria promise beyond the shared contract, and the decorator that files them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from secateur.criteria import CRITERIA, criterion
from secateur.criteria.registry import CRITERIA as REGISTRY
from secateur.data.batches import Batches
from secateur.errors import LayerError, UnknownName
from secateur.layers import find_layers
from secateur.stats import collect
from secateur.types import LayerStats, Need


def synflow(model, **keywords):
    return collect(model, find_layers(model)[0], {Need.SYNFLOW_GRAD}, **keywords)


def test_random_depends_on_the_seed_only():
    make = CRITERIA["random"].make
    weight = torch.randn(40, 50)
    first = make(LayerStats("a", weight, seed=1))
    assert torch.equal(first, make(LayerStats("b", weight * 0, seed=1, grad=weight)))
    assert not torch.equal(first, make(LayerStats("a", weight, seed=2)))
    assert first.min() >= 0
    assert first.max() < 1
    assert abs(first.mean() - 0.5) < 0.03


def test_default_reductions():
    found = {n: e.facts["reduction"] for n, e in CRITERIA.items()}
    assert found.pop("taylor") == "l2"
    assert found.pop("random") == "mean"
    assert set(found.values()) == {"sum"}


def test_a_new_criterion_is_one_decorated_function(monkeypatch):
    monkeypatch.setattr(REGISTRY, "_entries", dict(REGISTRY._entries))

    @criterion("squared", needs={Need.GRAD}, source="an example")
    def squared(layer: LayerStats) -> torch.Tensor:
        """The square of the weight."""
        return layer.weight.square()

    entry = CRITERIA["squared"]
    assert entry.make is squared
    assert entry.facts == {"needs": frozenset({Need.GRAD, Need.WEIGHT}), "reduction": "sum", "in_turn": False}
    assert entry.summary == "The square of the weight."
    with pytest.raises(ValueError, match="twice"):
        criterion("squared", needs=(), source="again")(squared)
    with pytest.raises(UnknownName, match="magnitude"):
        CRITERIA["magnitud"]


def test_synflow_needs_a_shape_and_no_data():
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 2))
    a = synflow(model, example=torch.randn(1, 2, 4, 4)).layers
    b = synflow(model, batches=Batches([(torch.full((5, 2, 4, 4), 9.0), torch.zeros(5))])).layers
    for name in a:
        assert torch.equal(a[name].synflow_grad, b[name].synflow_grad)
        assert (a[name].synflow_grad >= 0).all()


@pytest.mark.parametrize("scale", [1e4, 1e-5])
def test_synflow_beyond_float32_goes_on_in_float64(scale):
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(12)))
    example = torch.ones(1, 4)
    plain = synflow(model, example=example)
    with torch.no_grad():
        for layer in model:
            layer.weight.mul_(scale)
    scaled = synflow(model, example=example)
    assert plain.notes == ()
    assert "float64" in scaled.notes[0]
    flat = [torch.cat([s.synflow_grad.flatten() for s in c.layers.values()]).double() for c in (plain, scaled)]
    torch.testing.assert_close(flat[1] / flat[1].max(), flat[0] / flat[0].max(), rtol=1e-5, atol=0)


def test_synflow_without_flow_says_so():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    with pytest.raises(LayerError, match=r"dies.* 2 of the layers"):
        synflow(model, example=torch.ones(1, 3))


def test_synflow_that_saturates_names_the_layers():
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU6(), nn.Linear(3, 2))
    nn.init.constant_(model[0].bias, 10.0)
    with pytest.raises(LayerError, match=r"saturates.* 1 of the layers: '0.weight'"):
        synflow(model, example=torch.ones(1, 3))


def test_synflow_takes_token_ids_as_they_are():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.fc = nn.Embedding(5, 4), nn.Linear(4, 2, bias=False)

        def forward(self, input_ids):
            return self.fc(self.embed(input_ids).mean(1))

    model = Tokens()
    found = synflow(model, example={"input_ids": torch.tensor([[1, 3], [2, 2]])})
    expected = model.embed.weight[[1, 3]].abs().mean(0).detach()
    torch.testing.assert_close(found.layers["fc.weight"].synflow_grad, expected.expand(2, 4))
