"""A calibrated run that is killed between two blocks goes on there, and ends in the same bytes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import secateur as sc
from secateur import selection


class Killed(BaseException):
    pass


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        return x + self.down(self.up(x).relu())


def network():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 8), nn.Sequential(*[Residual() for _ in range(4)]), nn.Linear(8, 2))


def run(path, **options):
    data = [torch.randn(20, 6, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    return sc.prune(network(), sparsity=0.6, criterion="wanda", data=data, out=path, **{"solver": "sparsegpt", **options})


@pytest.mark.parametrize("solver", ["sparsegpt", "keep"])
@pytest.mark.parametrize("survives", range(10))
def test_killed_at_any_layer(tmp_path, monkeypatch, survives, solver):
    wanted = run(tmp_path / "whole", solver=solver)
    solve_layer, calls = selection.solve_layer, []

    def count(*args):
        calls.append(1)
        if len(calls) > survives:
            raise Killed
        return solve_layer(*args)

    with monkeypatch.context() as patch:
        patch.setattr(selection, "solve_layer", count)
        with pytest.raises(Killed):
            run(tmp_path / "run", solver=solver)
    assert not (tmp_path / "run").exists()
    calls.clear()
    with monkeypatch.context() as patch:
        patch.setattr(selection, "solve_layer", lambda *a: calls.append(1) or solve_layer(*a))
        found = run(tmp_path / "run", solver=solver)
    done_before = 0 if survives == 0 else 1 + 2 * ((survives - 1) // 2)
    assert len(calls) == 10 - done_before, "what was solved is not solved again"
    for name, tensor in wanted.model.state_dict().items():
        assert torch.equal(tensor, found.model.state_dict()[name])
    assert [x.error for x in found.report.layers] == [x.error for x in wanted.report.layers]
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()
    assert not list(tmp_path.glob(".*progress*"))
