"""LayerDrop and rewinding."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from secateur.errors import RecipeError, TrainingError, UnknownName
from secateur.graph import drop_blocks, removable_blocks, trace
from secateur.train.layerdrop import every_other, layerdrop
from secateur.train.rewind import Ticket
from secateur.types import MaskSet


class Residual(nn.Module):
    def __init__(self, pair=False):
        super().__init__()
        self.linear, self.pair = nn.Linear(6, 6), pair

    def forward(self, x):
        y = x + self.linear(x)
        return (y, "weights") if self.pair else y


def tower(depth=4):
    torch.manual_seed(0)
    return nn.Sequential(*[Residual() for _ in range(depth)], nn.Linear(6, 2))


def test_a_block_that_is_left_out_is_as_if_it_were_not_there():
    model, x = tower(), torch.randn(5, 6)
    names = [b.name for b in removable_blocks(model, trace(model, x))]
    assert names == ["0", "1", "2", "3"]
    smaller = {i: drop_blocks(model, x, [n for n in names if i >> int(n) & 1])[0](x) for i in range(15)}
    seen = set()
    model.train()
    with layerdrop(model, names, p=0.5):
        for seed in range(60):
            torch.manual_seed(seed)
            found = model(x)
            torch.manual_seed(seed)
            left_out = sum(1 << i for i in range(4) if float(torch.rand(())) < 0.5)
            seen.add(left_out)
            if left_out < 15:
                torch.testing.assert_close(found, smaller[left_out])
        model.eval()
        torch.testing.assert_close(model(x), smaller[0])
    assert len(seen) > 8
    assert not any(m._forward_hooks for m in model.modules())


def test_blocks_that_return_more_than_a_tensor():
    block, x = Residual(pair=True), torch.randn(2, 6)
    block.train()
    with layerdrop(nn.ModuleDict({"a": block}), ["a"], p=0.999):
        first, second = block(x)
    assert first is x
    assert second == "weights"


def test_share_of_passes():
    model, x = nn.Sequential(Residual()), torch.randn(1, 6)
    torch.manual_seed(0)
    with layerdrop(model.train(), ["0"], p=0.2):
        out = sum(torch.equal(model(x), x) for _ in range(2000))
    assert 330 < out < 470


def test_every_other_keeps_as_many_as_asked_evenly():
    names = [str(i) for i in range(12)]
    for keep in range(1, 13):
        gone = every_other(names, keep)
        stay = [int(n) for n in names if n not in gone]
        assert len(stay) == keep
        assert stay[0] == 0
        gaps = [b - a for a, b in zip(stay, [*stay[1:], 12], strict=True)]
        assert max(gaps) - min(gaps) <= 1
    for keep in (0, 13):
        with pytest.raises(RecipeError, match=f"{keep} of 12 blocks cannot stay"):
            every_other(names, keep)


def test_what_cannot_be_left_out():
    model = tower()
    for p in (1.0, -0.1, True, "0.2"):
        with pytest.raises(RecipeError, match=r"in \[0, 1\)"), layerdrop(model, ["0"], p=p):
            pass
    with pytest.raises(UnknownName, match="block"), layerdrop(model, ["x"]):
        pass
    with pytest.raises(TrainingError, match="'4' has not the shape"), layerdrop(model.train(), ["4"], p=0.999):
        model(torch.randn(2, 6))


def test_a_ticket_brings_back_the_kept_weights_and_buffers():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    early = {k: v.clone() for k, v in model.state_dict().items()}
    ticket = Ticket(model)
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(3):
        model(torch.randn(8, 4)).square().sum().backward()
        optimizer.step()
    masks = MaskSet({"0.weight": model[0].weight.detach().abs() > 0.5})
    again = Ticket.of(ticket.state_dict())
    again.rewind(model, masks)
    for name, value in model.state_dict().items():
        expected = early[name] * masks[name] if name in masks else early[name]
        assert torch.equal(value, expected), name
    with pytest.raises(TrainingError, match="another model"):
        ticket.rewind(nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(4)), {})
