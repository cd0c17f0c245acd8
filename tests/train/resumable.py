"""A short training run with dropout, momentum and masks; as a program it tells each step, so that a test can kill it."""

from __future__ import annotations

import sys

import torch
import torch.nn.functional as F
from torch import nn

from secateur.errors import Interrupted
from secateur.train import loop
from secateur.train.finetune import finetune
from secateur.types import MaskSet


def digits():
    """Half of scikit-learn's digits in 15 batches, and the other half in one."""
    from sklearn.datasets import load_digits

    data = load_digits()
    x, y = torch.tensor(data.data, dtype=torch.float32) / 16, torch.tensor(data.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train, test = order[:900], order[900:]
    return [(x[i], y[i]) for i in train.split(60)], [(x[test], y[test])]


def digits_network():
    return nn.Sequential(nn.Linear(64, 64), nn.Dropout(0.1), nn.ReLU(), nn.Linear(64, 10))


def made_up():
    """15 batches of 60: which of ten directions is the input's largest."""
    x = torch.randn(900, 64, generator=torch.Generator().manual_seed(0))
    return [(part, part[:, :10].argmax(1)) for part in x.split(60)]


def run(path, loss=None, stop_at=None, say=False, pause_at=None):
    """45 steps in 3 epochs; the model and its history."""
    torch.manual_seed(0)
    model = digits_network()
    draw = torch.Generator().manual_seed(1)
    masks = MaskSet({n: torch.rand(p.shape, generator=draw) < 0.3 for n, p in model.named_parameters() if p.dim() == 2})
    count = 0

    def cross_entropy(m, batch):
        nonlocal count
        if count == stop_at:
            raise SystemExit
        count += 1
        if say:
            print(f"step {count}", flush=True)
        if count == pause_at:
            sys.stdin.readline()
        return F.cross_entropy(m(batch[0]), batch[1])

    def parameters(m):
        return sum(p.double().abs().sum().item() for p in m.parameters())

    history = finetune(
        model, made_up(), masks=masks, epochs=3, lr=0.01, warmup=0.1, loss=loss or cross_entropy, evaluate=parameters,
        seed=3, checkpoint=path,
    )  # fmt: skip
    return model, history


if __name__ == "__main__":
    torch.set_num_threads(1)
    loop._SAVE_EVERY_S = float(sys.argv[2])
    try:
        run(sys.argv[1], say=True, pause_at=int(sys.argv[3]))
    except Interrupted as stopped:
        print(stopped, file=sys.stderr)
        sys.exit(130)
