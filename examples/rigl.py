"""RigL: sparse from the first step to the last. The network never holds more than 10% of its weights."""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

import secateur as sc

torch.manual_seed(0)
data = load_digits()
x, y = torch.tensor(data.data, dtype=torch.float32) / 16, torch.tensor(data.target)
order = torch.randperm(len(x))
train, test = order[:1200], order[1200:]

model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
batches = [b for _ in range(40) for b in train[torch.randperm(len(train))].split(60)]  # 800 steps
method = {"schedule": "one-shot", "allocation": "erk", "regrow": {"name": "rigl", "fraction": 0.3}}

with sc.gradual(model, optimizer, sparsity=0.9, end=600, every=20, **method) as pruner:  # end: 75% of the training
    for batch in batches:
        optimizer.zero_grad()
        F.cross_entropy(model(x[batch]), y[batch]).backward()
        optimizer.step()
        pruner.step()

accuracy = (model(x[test]).argmax(1) == y[test]).float().mean()
print(f"{pruner.masks.kept()} of {pruner.masks.total()} weights, test accuracy {accuracy:.3f}")
