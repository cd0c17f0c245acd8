"""TEAL: a small language model reads no weights for activations near zero. Nothing is trained for it."""

import argparse
import inspect

import torch

import secateur as sc
from secateur.models.torchvision_shim import prepare_torchvision

prepare_torchvision()
from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402

torch.manual_seed(0)
text = torch.tensor(list(inspect.getsource(argparse).encode("ascii", "ignore")))
rows = text[: len(text) // 64 * 64].view(-1, 64)  # windows of 64 characters
train, test = rows[:-64], rows[-64:]

sizes = {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4}
model = LlamaForCausalLM(LlamaConfig(vocab_size=128, num_key_value_heads=2, **sizes))
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
for _ in range(120):
    batch = train[torch.randint(len(train), (16,))]
    optimizer.zero_grad()
    model(input_ids=batch, labels=batch).loss.backward()
    optimizer.step()

gated = sc.dynamic(model.eval(), method="teal", data=[{"input_ids": train[:32]}], budget=0.6)
for budget in (1.0, 0.75, 0.6, 0.5):
    gated.budget = budget
    with torch.no_grad(), gated.recording() as costs:
        loss = gated(input_ids=test, labels=test).loss
    print(f"budget {budget:.2f}: loss {loss:.3f}; {costs}")
