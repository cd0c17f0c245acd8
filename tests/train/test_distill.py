"""Distillation: every part against its formula, written out."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from train.resumable import digits

import secateur as sc
from secateur.errors import RecipeError, TrainingError
from secateur.train.distill import Distillation


class Block(nn.Module):
    def __init__(self, width, heads=2, causal=False):
        super().__init__()
        self.qkv, self.out, self.heads, self.causal = nn.Linear(width, 3 * width), nn.Linear(width, width), heads, causal

    def forward(self, x, mask=None):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        bias = None if mask is None else mask[:, None, None, :]
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=self.causal)
        return x + self.out(y.transpose(1, 2).flatten(2))


class Tower(nn.Module):
    def __init__(self, heads=2, causal=False, classes=3):
        super().__init__()
        self.blocks = nn.ModuleList([Block(8, heads, causal) for _ in range(3)])
        self.head = nn.Linear(8, classes)

    def forward(self, x, attention_mask=None):
        for block in self.blocks:
            x = block(x, None if attention_mask is None else attention_mask.bool())
        return self.head(x)


def pair(**changes):
    torch.manual_seed(0)
    return Tower(), Tower(**changes), torch.randn(4, 5, 8)


def test_logits_are_the_softened_divergence():
    teacher, student, x = pair()
    found = Distillation(teacher, logits=0.5, temperature=3.0)(student, x)
    p, q = (teacher(x) / 3).softmax(-1), (student(x) / 3).softmax(-1)
    expected = (p * (p.log() - q.log())).sum(-1).mean() * 9
    torch.testing.assert_close(found, 0.5 * expected)
    assert Distillation(teacher, logits=1.0)(teacher, x).item() == pytest.approx(0, abs=1e-6)


def test_output_and_hidden_are_relative_and_leave_padding_out():
    teacher, student, x = pair()
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0], [1, 1, 1, 1, 0]])
    batch = {"x": x, "attention_mask": mask}
    wanted, made = teacher(x, mask), student(x, mask)
    keep = mask.bool()
    expected = (made - wanted)[keep].square().mean() / wanted[keep].square().mean()
    torch.testing.assert_close(Distillation(teacher, output=1.0)(student, batch), expected)
    ours, theirs, a, b = [], [], x, x
    for one, other in zip(student.blocks, teacher.blocks, strict=True):
        a, b = one(a, keep), other(b, keep)
        ours.append(a[keep])
        theirs.append(b[keep])
    relative = [(o - t).square().mean() / t.square().mean() for o, t in zip(ours, theirs, strict=True)]
    torch.testing.assert_close(Distillation(teacher, hidden=2.0)(student, batch), 2 * torch.stack(relative).mean())
    only = Distillation(teacher, hidden=1.0, blocks={"blocks.0": "blocks.2"})(student, batch)
    torch.testing.assert_close(only, (ours[0] - theirs[2]).square().mean() / theirs[2].square().mean())


def maps_by_hand(tower, x, keep=None):
    maps = []
    for block in tower.blocks:
        q, k, _ = block.qkv(x).unflatten(-1, (3, block.heads, -1)).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
        if block.causal:
            scores = scores + torch.full_like(scores, -torch.inf).triu(1)
        if keep is not None:
            scores = scores.masked_fill(~keep[:, None, None, :], -torch.inf)
        maps.append(scores.softmax(-1))
        x = block(x, keep)
    return maps


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_attention_maps(causal, padded):
    if causal and padded:
        pytest.skip("scaled_dot_product_attention takes a mask or is_causal, not both")
    torch.manual_seed(0)
    teacher, student, x = Tower(causal=causal), Tower(causal=causal), torch.randn(4, 5, 8)
    mask = torch.ones(4, 5, dtype=torch.bool)
    mask[0, 3:] = False
    keep = mask if padded else None
    batch = {"x": x, "attention_mask": mask} if padded else x
    divergences = []
    for p, q in zip(maps_by_hand(teacher, x, keep), maps_by_hand(student, x, keep), strict=True):
        divergences.append(torch.special.xlogy(p, p).sub(torch.special.xlogy(p, q)).sum(-1).mean())
    found = Distillation(teacher, attention=1.0)(student, batch)
    torch.testing.assert_close(found, torch.stack(divergences).mean(), rtol=1e-4, atol=1e-6)
    found.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for n, p in student.named_parameters() if "qkv.weight" in n)
    assert all(p.grad is None for p in teacher.parameters())


def test_attention_of_other_numbers_of_heads_is_averaged():
    teacher, student, x = pair(heads=4)
    divergences = []
    for p, q in zip(maps_by_hand(teacher, x), maps_by_hand(student, x), strict=True):
        p, q = p.mean(1), q.mean(1)
        divergences.append((p * (p.log() - q.log())).sum(-1).mean())
    found = Distillation(teacher, attention=1.0)(student, x)
    torch.testing.assert_close(found, torch.stack(divergences).mean(), rtol=1e-4, atol=1e-6)


def test_parts_add_up_and_weights_move_with_the_progress():
    teacher, student, x = pair()
    labels = torch.randint(3, (4, 5))
    task = lambda m, b: F.cross_entropy(m(b[0]).flatten(0, 1), b[1].flatten())  # noqa: E731
    loss = Distillation(teacher, logits=(1.0, 0.0), output=(0.0, 2.0), task=1.0, loss=task)
    one = {n: Distillation(teacher, **{n: 1.0})(student, x) for n in ("logits", "output")}
    for progress in (0.0, 0.25, 1.0):
        loss.progress = progress
        expected = (1 - progress) * one["logits"] + 2 * progress * one["output"] + task(student, (x, labels))
        torch.testing.assert_close(loss(student, (x, labels)), expected)


def test_finetune_moves_the_weights_and_recovers_a_pruned_network_without_labels():
    train, [(x, y)] = digits()
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 10))
    sc.finetune(dense, train, epochs=15, lr=0.01)

    def accuracy(model):
        with torch.no_grad():
            return (model(x).argmax(1) == y).float().mean().item()

    unlabelled = [(images, torch.zeros_like(labels)) for images, labels in train]
    settings = {"epochs": 20, "lr": 0.01}
    plain = sc.prune(dense, sparsity=0.9)
    distilled = sc.prune(
        dense, sparsity=0.9, data=unlabelled, finetune={**settings, "distill": {"logits": [1.0, 0.5], "output": 0.1}}
    )
    assert accuracy(plain.model) < 0.8
    assert accuracy(distilled.model) > accuracy(dense) - 0.05
    assert distilled.masks.diff(plain.masks) == {}
    with pytest.raises(RecipeError, match="leave it out"):
        sc.prune(copy.deepcopy(dense), sparsity=0.9, data=train, inplace=True, finetune={"distill": {"logits": 1.0}})


def test_the_teacher_is_left_as_it_was():
    teacher, student, x = pair()
    teacher.train()
    teacher.blocks[0].eval()
    before = copy.deepcopy(teacher.state_dict())
    Distillation(teacher, hidden=1.0, attention=1.0, logits=1.0)(student, x).backward()
    assert [m.training for m in teacher.modules()] == [
        n not in ("blocks.0", "blocks.0.qkv", "blocks.0.out") for n, _ in teacher.named_modules()
    ]
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())
    assert all(not m._forward_hooks for tower in (teacher, student) for m in tower.modules())


def test_what_cannot_be_compared_is_named():
    teacher, student, x = pair(classes=7)
    for part in ("logits", "output"):
        with pytest.raises(TrainingError, match=r"the output is \(4, 5, 7\) in the model and \(4, 5, 3\) in the teacher"):
            Distillation(teacher, **{part: 1.0})(student, x)
    flat = nn.Linear(8, 3)
    with pytest.raises(TrainingError, match=r"called scaled_dot_product_attention 0 times and the teacher 3"):
        Distillation(teacher, attention=1.0)(flat, x)
    with pytest.raises(TrainingError, match="share no repeated blocks"):
        Distillation(teacher, hidden=1.0)(flat, x)
    for bad in ({}, {"task": 1.0}, {"logits": -1.0}, {"logits": (1.0, 2.0, 3.0)}, {"logits": True}, {"logits": float("nan")}):
        with pytest.raises(RecipeError, match="distillation"):
            Distillation(teacher, **bad)
    with pytest.raises(RecipeError, match="temperature"):
        Distillation(teacher, logits=1.0, temperature=0.0)
    with pytest.raises(RecipeError, match=r"finetune\.distill\.logit.*Did you mean 'logits'"):
        sc.Recipe.make({"finetune": {"distill": {"logit": 1.0}}})
