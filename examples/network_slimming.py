"""Network Slimming (Liu et al. 2017) on scikit-learn's digits: train with sparse scales, cut, fine-tune."""

import torch
from torch import nn

import secateur as sc
from secateur.data import accuracy
from secateur.demo import digits

torch.manual_seed(0)


def layer(inputs, outputs):
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU())


body = [layer(1, 32), layer(32, 32), nn.MaxPool2d(2), layer(32, 64), layer(64, 64), nn.AdaptiveAvgPool2d(1)]
model = nn.Sequential(*body, nn.Flatten(), nn.Linear(64, 10))
train, evaluate = digits("train"), accuracy(digits("test"))

# 1. Training with lambda * sum |gamma| in the loss. In a loop of your own: loss + slimming_penalty(model, 1e-2).
sc.finetune(model, train, epochs=15, optimizer="sgd", lr=0.2, weight_decay=1e-4, slimming=1e-2)
scales = torch.cat([m.weight.detach().abs() for m in model.modules() if isinstance(m, nn.BatchNorm2d)])
print(f"{(scales < 0.01).float().mean():.0%} of the scales are below 0.01")

# 2. One percentile over all scales, cut, fine-tune.
result = sc.prune(
    model, pattern="channel", criterion="bn_scale", allocation="global", sparsity=0.5, data=train, evaluate=evaluate,
    finetune={"epochs": 3, "optimizer": "sgd", "lr": 0.02},
)  # fmt: skip
before, after = result.report.before, result.report.after
print(f"accuracy {before.quality['accuracy']:.1%} -> {after.quality['accuracy']:.1%}")
print(f"parameters {before.parameters:,} -> {after.parameters:,}; MACs {before.macs / after.macs:.1f} times fewer")
