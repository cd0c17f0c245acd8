"""Dynamic Network Surgery: weights that were cut by mistake come back. 97% of a perceptron for scikit-learn's digits goes."""

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
batches = [b for _ in range(60) for b in train[torch.randperm(len(train))].split(60)]  # 1,200 steps
returned = 0

with sc.gradual(model, optimizer, sparsity=0.97, regrow="splice", begin=200, end=900, every=20) as pruner:
    for batch in batches:
        before = pruner.masks
        optimizer.zero_grad()
        F.cross_entropy(model(x[batch]), y[batch]).backward()
        optimizer.step()
        pruner.step()
        returned += sum(int((pruner.masks[name] & ~before[name]).sum()) for name in before)

accuracy = (model(x[test]).argmax(1) == y[test]).float().mean()
print(f"{pruner.masks.kept()} of {pruner.masks.total()} weights are left; {returned} came back on the way")
print(f"test accuracy {accuracy:.3f}")
