"""A run that is killed goes on where it was, and ends in the same bytes as one that was never stopped."""

from __future__ import annotations

import contextlib
import hashlib
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import secateur as sc

CODE = """
import sys, torch
torch.set_num_threads(1)
import secateur as sc
from secateur.demo import digits, network
from secateur.data import accuracy
torch.manual_seed(0)
print("ready", flush=True)
sc.prune(network(8), sparsity=0.9, schedule="cubic", steps=3, data=digits("train")[:10],
         evaluate=accuracy(digits("test")[:2]), finetune={"epochs": 3}, out=sys.argv[1])
print("done", flush=True)
"""


def start(out: Path) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-c", CODE, str(out)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline().strip() == "ready"
    return process


def weights(out: Path) -> str:
    return hashlib.sha256((out / "model.safetensors").read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> str:
    """Digest of the weights of a run that nothing stopped."""
    out = tmp_path_factory.mktemp("whole") / "run"
    _, err = (process := start(out)).communicate(timeout=300)
    assert process.returncode == 0, err
    return weights(out)


def wait_for_news(out: Path, process: subprocess.Popen, known: set) -> set:
    """Wait until the run has written state that is not `known`, or has ended; what there is then."""
    state: set = set()
    while process.poll() is None and not state - known:
        with contextlib.suppress(FileNotFoundError):  # a file may go between the listing and the look
            state = {(p.name, p.stat().st_mtime_ns) for p in out.with_name(f".{out.name}.progress").glob("*.safetensors")}
        time.sleep(0.005)
    return known | state


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_stopped_again_and_again_it_ends_in_the_same_bytes(tmp_path, reference, how):
    out, known, stops = tmp_path / "run", set(), 0
    rng = random.Random(int(how))
    for _ in range(3):
        process = start(out)
        known = wait_for_news(out, process, known)
        time.sleep(rng.uniform(0, 0.2))
        process.send_signal(how)
        process.communicate(timeout=120)
        stops += process.returncode != 0
    if not out.exists():
        _, err = (process := start(out)).communicate(timeout=300)
        assert process.returncode == 0, err
    assert stops >= 1
    assert weights(out) == reference
    assert {p.name for p in tmp_path.iterdir()} <= {"run", ".run.lock"}, "the state of the run is gone once it is finished"


def test_what_a_kill_left_of_one_step_is_not_taken_for_the_next(tmp_path, monkeypatch):
    """Killed after a step was kept and before what led to it was removed, a run goes on; it once stopped with an error."""
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    x = torch.randn(16, 6, generator=torch.Generator().manual_seed(0))
    settings = {
        "sparsity": 0.5, "steps": 3, "schedule": "iterative", "solver": "sparsegpt", "finetune": {"epochs": 1},
        "data": [(x, torch.arange(16) % 3)],
    }  # fmt: skip
    expected = sc.prune(model, out=tmp_path / "whole", **settings).model.state_dict()

    unlink = type(tmp_path).unlink

    def killed(self, missing_ok=False):
        if self.name.startswith("training"):
            raise SystemExit
        unlink(self, missing_ok)

    with monkeypatch.context() as patch:
        patch.setattr(type(tmp_path), "unlink", killed)
        with pytest.raises(SystemExit):
            sc.prune(model, out=tmp_path / "run", **settings)
    assert (tmp_path / ".run.progress" / "step.safetensors").exists()
    resumed = sc.prune(model, out=tmp_path / "run", **settings).model.state_dict()
    assert all(torch.equal(value, resumed[name]) for name, value in expected.items())
