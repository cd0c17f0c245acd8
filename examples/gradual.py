"""Prune a perceptron to 95% while it learns scikit-learn's digits: 3 lines more than a plain training loop."""

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

with sc.gradual(model, optimizer, sparsity=0.95, schedule="cubic", begin=190, end=590, every=20) as pruner:
    for step, batch in enumerate(batches):
        optimizer.zero_grad()
        F.cross_entropy(model(x[batch]), y[batch]).backward()
        optimizer.step()
        pruner.step()  # new masks where they are due; held in every other step
        if step % 100 == 99:
            accuracy = (model(x[test]).argmax(1) == y[test]).float().mean()
            print(f"step {step + 1}: sparsity {pruner.sparsity:.3f}, test accuracy {accuracy:.3f}")

print(f"{pruner.masks.kept()} of {pruner.masks.total()} weights are left")
