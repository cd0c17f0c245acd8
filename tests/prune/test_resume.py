"""A run that is killed goes on where it was, and ends in the same bytes as one that was never stopped."""

from __future__ import annotations

import hashlib
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

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
def reference(tmp_path_factory) -> tuple[str, float]:
    """Digest of the weights of a run that nothing stopped, and the seconds it took."""
    out = tmp_path_factory.mktemp("whole") / "run"
    process = start(out)
    begin = time.monotonic()
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return weights(out), time.monotonic() - begin


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_stopped_again_and_again_it_ends_in_the_same_bytes(tmp_path, reference, how):
    digest, seconds = reference
    out = tmp_path / "run"
    rng = random.Random(int(how))
    stops = 0
    for patience in (0.3, 0.5, 0.7, 100):
        process = start(out)
        try:
            process.communicate(timeout=patience * rng.uniform(0.6, 1.4) * seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(how)
            process.communicate(timeout=120)
        stops += process.returncode != 0
        if out.exists():
            break
    assert stops >= 1
    assert weights(out) == digest
    assert {p.name for p in tmp_path.iterdir()} <= {"run", ".run.lock"}, "the state of the run is gone once it is finished"
