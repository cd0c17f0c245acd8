"""The lottery ticket: train, prune, go back to the beginning, train what is left. Against a random network as sparse."""

import torch
from sklearn.datasets import load_digits
from torch import nn

import secateur as sc
from secateur.train.rewind import Ticket

torch.manual_seed(0)
data = load_digits()
x, y = torch.tensor(data.data, dtype=torch.float32) / 16, torch.tensor(data.target)
order = torch.randperm(len(x))
train, test = order[:1200], order[1200:]
batches = [(x[b], y[b]) for b in train.split(60)]

model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))
ticket, masks = Ticket(model), None
for sparsity in (0.5, 0.75, 0.875, 0.94, 0.97):  # half of what is left, again and again
    sc.finetune(model, batches, masks=masks, epochs=10, lr=3e-3)
    masks = sc.prune(model, sparsity=sparsity).masks
    ticket.rewind(model, masks)
sc.finetune(model, batches, masks=masks, epochs=30, lr=3e-3)
found = (model(x[test]).argmax(1) == y[test]).float().mean()

masks = sc.prune(model, sparsity=0.97, criterion="random").masks
ticket.rewind(model, masks)
sc.finetune(model, batches, masks=masks, epochs=30, lr=3e-3)
chance = (model(x[test]).argmax(1) == y[test]).float().mean()
print(f"3% of the weights: random {chance:.3f}, the ticket has test accuracy {found:.3f}")
