"""A training state goes to a file and back unchanged, and never leaves half a file."""

from __future__ import annotations

import errno
import math
import os

import pytest
import torch
from torch import nn

from secateur.errors import ArtifactError
from secateur.train.checkpoint import load_state, save_state


def test_everything_comes_back_as_it_was(tmp_path):
    path = tmp_path / "deep" / "state.safetensors"
    tied = torch.randn(3, 4)
    state = {
        "tensors": [
            tied,
            tied,
            tied[:, ::2],
            tied.t(),
            torch.tensor(3),
            torch.ones(0, 2),
            torch.rand(5) < 0.5,
            torch.get_rng_state(),
        ],
        "half": (torch.randn(2).bfloat16(), torch.randn(2).half()),
        1: {"name": None, 2: True, "pi": math.pi, "tiny": 5e-324, "huge": 2**62, "inf": math.inf, "ü": "é\n"},
        "empty": [{}, [], ()],
    }
    save_state(path, state)
    back = load_state(path)
    assert list(back) == list(state)
    for ours, theirs in zip(state["tensors"] + list(state["half"]), back["tensors"] + list(back["half"]), strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)
    assert isinstance(back["half"], tuple)
    assert back[1] == state[1]
    assert back["empty"] == state["empty"]
    assert os.listdir(path.parent) == [path.name]


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.AdamW(p, amsgrad=True),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        lambda p: torch.optim.LBFGS(p, max_iter=3),
    ],
)
def test_an_optimizer_goes_on_to_the_same_bits(tmp_path, make):
    def steps(model, optimizer, count):
        def closure():
            optimizer.zero_grad()
            loss = model(torch.ones(2, 5)).square().mean()
            loss.backward()
            return loss

        for _ in range(count):
            optimizer.step(closure)

    torch.manual_seed(0)
    model = nn.Linear(5, 3)
    optimizer = make(model.parameters())
    steps(model, optimizer, 3)
    save_state(tmp_path / "s", {"model": dict(model.state_dict()), "optimizer": optimizer.state_dict()})
    steps(model, optimizer, 3)
    twin = nn.Linear(5, 3)
    other = make(twin.parameters())
    state = load_state(tmp_path / "s")
    twin.load_state_dict(state["model"])
    other.load_state_dict(state["optimizer"])
    steps(twin, other, 3)
    assert torch.equal(twin.weight, model.weight)


def test_what_is_not_plain_is_refused_and_the_old_file_stays(tmp_path):
    path = tmp_path / "s"
    save_state(path, {"a": 1})
    with pytest.raises(TypeError, match="a object cannot be kept"):
        save_state(path, {"a": object()})
    assert load_state(path) == {"a": 1}


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch, call):
    path = tmp_path / "s"
    save_state(path, {"a": 1})

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, call, full)
    with pytest.raises(ArtifactError, match=r"No space left.*old one is untouched"):
        save_state(path, {"a": 2})
    monkeypatch.undo()
    assert load_state(path) == {"a": 1}
    assert os.listdir(tmp_path) == ["s"]


def test_other_files_are_refused(tmp_path):
    from safetensors.torch import save_file

    with pytest.raises(ArtifactError, match="cannot read the checkpoint"):
        load_state(tmp_path / "absent")
    save_file({"w": torch.ones(2)}, tmp_path / "weights.safetensors")
    with pytest.raises(ArtifactError, match="no checkpoint of ours"):
        load_state(tmp_path / "weights.safetensors")
    (tmp_path / "hostile").write_bytes((80_000_000).to_bytes(8, "little") + b"{}")
    with pytest.raises(ArtifactError, match="header claims 80000000 bytes"):
        load_state(tmp_path / "hostile")
    for broken in ('{"dict": 5}', '{"tensor": "9"}', "[", '{"a": 1, "b": 2}'):
        save_file({"0": torch.ones(2)}, tmp_path / "broken", metadata={"secateur_state": broken})
        with pytest.raises(ArtifactError, match="is broken"):
            load_state(tmp_path / "broken")
