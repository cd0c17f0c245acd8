"""LayerDrop: one training, any depth afterwards. Eight residual blocks, of which six, four or two are kept."""

import torch
from sklearn.datasets import load_digits
from torch import nn

import secateur as sc
from secateur.graph import drop_blocks, removable_blocks, trace
from secateur.train.layerdrop import every_other, layerdrop


class Residual(nn.Module):
    """What it is given plus a small network of it."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))

    def forward(self, x):  # noqa: D102
        return x + self.inner(x)


torch.manual_seed(0)
data = load_digits()
x, y = torch.tensor(data.data, dtype=torch.float32) / 16, torch.tensor(data.target)
order = torch.randperm(len(x))
train, test = order[:1200], order[1200:]

model = nn.Sequential(*[Residual() for _ in range(8)], nn.LayerNorm(64), nn.Linear(64, 10))
blocks = [block.name for block in removable_blocks(model, trace(model, x[:2]))]
with layerdrop(model, blocks, p=0.3):
    sc.finetune(model, [(x[b], y[b]) for b in train.split(60)], epochs=20, lr=1e-3)

for keep in (8, 6, 4, 2):
    smaller = drop_blocks(model, x[:2], every_other(blocks, keep))[0] if keep < 8 else model
    accuracy = (smaller(x[test]).argmax(1) == y[test]).float().mean()
    print(f"{keep} blocks, {sum(p.numel() for p in smaller.parameters())} weights, test accuracy {accuracy:.3f}")
