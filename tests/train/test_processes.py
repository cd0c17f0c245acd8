"""Two gloo processes: replicated (DDP) and sharded (FSDP2) models prune as one process does, with one mask on all ranks."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.multiprocessing import spawn

import secateur as sc

SETTINGS = {
    "splice": {"regrow": "splice"},
    "rigl": {"regrow": "rigl", "schedule": "one-shot", "begin": 1},
    "movement": {"criterion": "movement", "regrow": "frozen"},
    "taylor": {"criterion": "taylor"},
}


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(10, 14), nn.ReLU(), nn.Linear(14, 5)).double()


def data():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(8, 10, generator=generator).double(), torch.randint(5, (8,), generator=generator)


def pruned(model, x, y, settings, steps=9):
    """Train and prune; the state goes through `state_dict` half-way, as in a run that was stopped."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    options = {"sparsity": 0.8, "begin": 2, "end": 7, "every": 2, **settings}
    first, second = (sc.gradual(model, optimizer, **options) for _ in range(2))
    for pruner, count in ((first, 4), (second, steps - 4)):
        with pruner:
            for _ in range(count):
                optimizer.zero_grad()
                F.cross_entropy(model(x), y).backward()
                optimizer.step()
                pruner.step()
            state = pruner.state_dict()
        if pruner is first:
            if isinstance(next(model.parameters()), torch.nn.Parameter) and state["full"]:
                assert all(v.shape == state["masks"][n].shape for n, v in state["full"].items())
            second.load_state_dict(copy.deepcopy(state))
    return second.masks


def process(rank, folder):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    x, y = data()
    x, y = x[rank::2], y[rank::2]
    mesh = init_device_mesh("cpu", (2,))
    for name, settings in SETTINGS.items():
        replicated, sharded = network(), network()
        masks = {"ddp": pruned(DistributedDataParallel(replicated), x, y, settings)}
        for layer in (sharded[0], sharded[2], sharded):
            fully_shard(layer, mesh=mesh)
        masks["fsdp"] = pruned(sharded, x, y, settings)
        weights = {"ddp": replicated.state_dict(), "fsdp": {k: v.full_tensor() for k, v in sharded.state_dict().items()}}
        torch.save([{k: dict(v) for k, v in masks.items()}, weights], f"{folder}/{name}-{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("processes")
    spawn(process, (str(path),), nprocs=2)
    return path


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
@pytest.mark.parametrize("name", SETTINGS)
def test_masks_hold_and_are_those_of_one_process_on_every_rank(folder, name, kind):
    alone = network()
    expected = pruned(alone, *data(), SETTINGS[name])
    assert expected.kept() == 210 - int(0.8 * 210 + 0.5)
    for rank in (0, 1):
        masks, weights = torch.load(folder / f"{name}-{rank}.pt", weights_only=True)
        assert expected.diff(masks[kind]) == {}
        for key, value in alone.state_dict().items():
            torch.testing.assert_close(weights[kind][key], value, rtol=1e-6, atol=1e-8)
        for key, mask in expected.items():
            assert not weights[kind][key][~mask].any()
