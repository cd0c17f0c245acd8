"""Movement pruning: a network that knows all digits learns a task of its own, odd or even, and keeps what that task moves."""

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

body = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU())
pretrained = nn.Sequential(body, nn.Linear(64, 10))
sc.finetune(pretrained, [(x[b], y[b]) for b in train.split(60)], epochs=20, lr=3e-3)

model = nn.Sequential(body, nn.Linear(64, 2))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
batches = [b for _ in range(30) for b in train[torch.randperm(len(train))].split(60)]  # 600 steps
method = {"criterion": "movement", "regrow": "frozen", "allocation": "uniform", "layers": ["0.*"]}

with sc.gradual(model, optimizer, sparsity=0.9, begin=60, end=450, every=10, **method) as pruner:
    for batch in batches:
        optimizer.zero_grad()
        F.cross_entropy(model(x[batch]), y[batch] % 2).backward()
        optimizer.step()
        pruner.step()

accuracy = (model(x[test]).argmax(1) == y[test] % 2).float().mean()
print(f"{pruner.masks.kept()} of {pruner.masks.total()} weights of the body, test accuracy {accuracy:.3f}")
