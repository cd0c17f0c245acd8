"""Distillation: a network loses 92% of its weights and learns again from what it was, without a single label."""

import torch
from sklearn.datasets import load_digits
from torch import nn

import secateur as sc
from secateur.train.distill import Distillation

torch.manual_seed(0)
data = load_digits()
x, y = torch.tensor(data.data, dtype=torch.float32) / 16, torch.tensor(data.target)
order = torch.randperm(len(x))
train, test = order[:1200], order[1200:]


def accuracy(model):
    return (model(x[test]).argmax(1) == y[test]).float().mean().item()


teacher = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))
sc.finetune(teacher, [(x[b], y[b]) for b in train.split(60)], epochs=30, lr=3e-3)

pruned = sc.prune(teacher, sparsity=0.92)
print(f"teacher {accuracy(teacher):.3f}, pruned at once {accuracy(pruned.model):.3f}")

unlabelled = [x[b] for b in train.split(60)]
loss = Distillation(teacher, logits=1.0, output=0.1)
sc.finetune(pruned.model, unlabelled, masks=pruned.masks, epochs=30, lr=1e-2, loss=loss)
print(f"after distillation, test accuracy {accuracy(pruned.model):.3f}")
