"""Adapters of low rank (LoRA) trained on a pruned model: what merging them does to the zeros, and how masks keep them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import secateur as sc
from secateur.models.torchvision_shim import prepare_torchvision


def test_masks_hold_through_the_merge_of_adapters():
    prepare_torchvision()
    peft = pytest.importorskip("peft", reason="the adapters are peft's")
    torch.manual_seed(0)
    pruned = sc.prune(nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 4)), sparsity=0.8)
    x, y = torch.randn(64, 12), torch.randint(4, (64,))
    adapted = peft.get_peft_model(pruned.model, peft.LoraConfig(r=2, target_modules=["0", "2"]))
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = F.cross_entropy(adapted(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    merged = adapted.merge_and_unload().requires_grad_(True)
    assert all(bool(merged.get_parameter(n).detach()[~m].any()) for n, m in pruned.masks.items()), "merging fills the zeros"

    pruned.masks.apply(merged)
    filled = F.cross_entropy(merged(x), y).item()
    optimizer = torch.optim.AdamW(merged.named_parameters(), lr=0.01)
    with sc.hold(optimizer, pruned.masks):
        for _ in range(60):
            optimizer.zero_grad()
            loss = F.cross_entropy(merged(x), y)
            loss.backward()
            optimizer.step()
    assert loss.item() < filled
    for name, mask in pruned.masks.items():
        assert not merged.get_parameter(name).detach()[~mask].any()
