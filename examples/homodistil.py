"""HomoDistil: the student begins as the teacher, and loses half of its channels step by step while it is taught. No labels."""

import copy

import torch

import secateur as sc
from secateur.data import accuracy
from secateur.demo import digits, trained
from secateur.train.distill import Distillation

teacher = trained()
student = copy.deepcopy(teacher).train()
batches, measure = digits("train"), accuracy(digits("test"))
optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
loss = Distillation(teacher, logits=1.0, hidden=1.0, blocks=["1.0", "1.1"])
epochs, steps = 6, 6 * len(batches)

# columns go by sensitivity (weight times gradient of the distillation itself), along a cubic; all that depends on them too
units = {"pattern": "channel", "criterion": "taylor", "sparsity": 0.5, "example": batches[0], "layers": ["*.conv1*"]}
with sc.gradual(student, optimizer, begin=0, end=steps * 2 // 3, every=4, **units) as pruner:
    for step in range(steps):
        if step % len(batches) == 0:
            order = torch.randperm(len(batches), generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        loss(student, batches[order[step % len(batches)]][0]).backward()
        optimizer.step()
        pruner.step()
    smaller, _ = pruner.cut()

before, after = (sum(p.numel() for p in m.parameters()) for m in (teacher, smaller))
print(f"teacher {measure(teacher)['accuracy']:.3f}, {before:,} parameters; student {after:,}")
print(f"test accuracy {measure(smaller)['accuracy']:.3f}")
