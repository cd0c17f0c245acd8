"""A small model's tensors for the packed file's tests: every way of storing one occurs. The golden file was made of them."""

from __future__ import annotations

import torch

from secateur.coding.tensor import Coded


def tensors() -> list[tuple[str, torch.Tensor, Coded | None]]:
    """Names, values and codes; computed by whole numbers, so that they are the same everywhere and always."""
    codes = (torch.arange(48 * 40) * 7919 % 15 - 7).reshape(48, 40).to(torch.int16)
    codes[torch.arange(48 * 40).reshape(48, 40) * 31 % 11 > 3] = 0
    coded = Coded(codes, (torch.arange(48) + 1).float() / 64)
    shared = torch.tensor([0.0, 0.5, -0.25, 1.5])[torch.arange(600) ** 2 % 7 % 4].reshape(6, 4, 5, 5)
    sparse = torch.where(torch.arange(500) % 13 == 0, torch.arange(500) / 7.0, 0.0).reshape(20, 25)
    return [
        ("encoder.weight", coded.values(), coded),
        ("encoder.bias", torch.arange(48) / 3.0, None),
        ("conv.weight", shared, None),
        ("conv.few", torch.tensor([[float("nan"), -0.0, float("inf"), 0.0]]), None),
        ("sparse.weight", sparse, None),
        ("half", (torch.arange(30) / 8.0).half(), None),
        ("brain", (torch.arange(30) / 8.0).bfloat16(), None),
        ("steps", torch.tensor(1234567890123), None),
        ("flags", torch.arange(20) % 3 == 0, None),
        ("empty", torch.empty(0, 3), None),
        ("ones", torch.ones(1000), None),
    ]
