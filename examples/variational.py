"""Sparse variational dropout: every weight learns how much noise it stands; those that drown in theirs are removed."""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

import secateur as sc
from secateur.train.variational import Variational

torch.manual_seed(0)
data = load_digits()
x, y = torch.tensor(data.data, dtype=torch.float32) / 16, torch.tensor(data.target)
order = torch.randperm(len(x))
train, test = order[:1200], order[1200:]

model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))
sc.finetune(model, [(x[b], y[b]) for b in train.split(60)], epochs=10, lr=3e-3)

with Variational(model) as noise:
    optimizer = torch.optim.Adam([*model.parameters(), *noise.parameters()], lr=1e-2)
    for epoch in range(60):
        for batch in train[torch.randperm(len(train))].split(60):
            optimizer.zero_grad()
            factor = min(1.0, epoch / 30)
            loss = F.cross_entropy(model(x[batch]), y[batch]) + factor * noise.divergence() / len(train)
            loss.backward()
            optimizer.step()

masks = noise.masks()
masks.apply(model)
accuracy = (model.eval()(x[test]).argmax(1) == y[test]).float().mean()
print(f"{masks.kept()} of {masks.total()} weights are left, test accuracy {accuracy:.3f}")
