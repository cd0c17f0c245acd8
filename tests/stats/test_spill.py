"""Hidden states beyond a budget lie in a file without a name, and come back bit by bit."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from secateur import memory
from secateur.data.batches import Batches
from secateur.errors import DataError
from secateur.layers import find_layers
from secateur.memory import available_memory, total_memory
from secateur.stats import blocks, spill
from secateur.stats.blocks import inputs_in_turn
from secateur.stats.spill import Slot, Spill


def test_what_does_not_fit_is_written_and_read_back(tmp_path):
    kept = Spill(budget=100, folder=tmp_path)
    tensors = [torch.randn(4, 5), torch.randn(4, 5).bfloat16(), torch.arange(12).view(3, 4)]
    places = [kept.keep(t) for t in tensors]
    assert [isinstance(p, Slot) for p in places] == [False, True, True]
    for tensor, place in zip(tensors, places, strict=True):
        assert torch.equal(kept.get(place), tensor)
    before = kept.spilled
    again = kept.keep(tensors[1] * 2, places[1])
    assert kept.spilled == before, "the same place is used again"
    assert torch.equal(kept.get(again), tensors[1] * 2)
    assert list(tmp_path.iterdir()) == [], "the file has no name, so a kill leaves nothing"


def test_letting_go_makes_room_in_memory(tmp_path):
    kept = Spill(budget=80, folder=tmp_path)
    first = kept.keep(torch.zeros(20))
    assert isinstance(kept.keep(torch.ones(20)), Slot)
    assert isinstance(kept.keep(torch.ones(20), first), torch.Tensor)


def test_a_full_disk_is_said_with_the_remedy(tmp_path, monkeypatch):
    class Full:
        def seek(self, at):
            pass

        def write(self, data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(spill.tempfile, "TemporaryFile", lambda **options: Full())
    with pytest.raises(DataError, match=r"No space left.*TMPDIR"):
        Spill(budget=0, folder=tmp_path).keep(torch.zeros(3))


def test_matrices_are_the_same_with_all_states_on_disk(monkeypatch):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(4, 6), nn.Sequential(*[nn.TransformerEncoderLayer(6, 2, 8, batch_first=True) for _ in range(3)])
    )
    layers, batches = find_layers(model)[0], Batches([torch.randn(2, 5, 4), torch.randn(3, 5, 4)])
    expected = [{n: g.clone() for n, g in part.items()} for part in inputs_in_turn(model, layers, batches)]
    spills = []
    monkeypatch.setattr(blocks, "Spill", lambda folder: spills.append(Spill(0, folder)) or spills[-1])
    found = list(inputs_in_turn(model, layers, batches))
    assert spills[0].spilled == 5 * 5 * 6 * 4
    assert len(found) == len(expected) == 4
    for one, other in zip(expected, found, strict=True):
        assert all(torch.equal(one[n], other[n]) for n in one)


def test_memory_heeds_the_container_and_the_process(monkeypatch, tmp_path):
    limit, used = tmp_path / "max", tmp_path / "now"
    limit.write_text(str(3 << 30))
    used.write_text(str(1 << 30))
    monkeypatch.setattr(memory, "_CGROUPS", ((str(limit), str(used)),))
    assert total_memory() <= 3 << 30
    assert available_memory() <= 2 << 30
    limit.write_text("max")
    assert total_memory() == min([memory._physical(), *(of for of, _ in memory._own_limits())])
    code = (
        "import resource; resource.setrlimit(resource.RLIMIT_DATA, (1 << 30, 1 << 30));"
        "from secateur.memory import *; print(total_memory(), available_memory())"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(memory.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    total, left = map(int, done.stdout.split())
    assert total == 1 << 30
    assert 0 < left < 1 << 30
