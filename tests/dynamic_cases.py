"""A small model and its data for each dynamic method."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from secateur.data.batches import forward, output_tensor, samples_of
from secateur.models.torchvision_shim import prepare_torchvision


@dataclass(frozen=True)
class Case:
    """What tests/dynamic/test_contract.py needs of a method: a model made alike every time, batches, options."""

    method: str
    model: Callable[[], nn.Module]
    data: Callable[[], list[Any]]
    options: dict[str, Any] = field(default_factory=dict)
    slack: float = 0.03  #: by which the mean cost may exceed the budget on the calibration data

    def split(self, batch: Any) -> list[Any]:
        """The batch as batches of one."""
        return list(samples_of(batch))


@torch.no_grad()
def outputs(model: nn.Module, batch: Any) -> Tensor:
    """Logits."""
    return output_tensor(forward(model.eval(), batch))


def llama(hidden: int = 32, layers: int = 3) -> nn.Module:
    """A decoder of the kind of SmolLM2, with weights that make its activations uneven."""
    prepare_torchvision()
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=61, hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4 if parameter.dim() == 2 else 1)
    return model


def tokens() -> list[Any]:
    """Two batches of three sequences."""
    generator = torch.Generator().manual_seed(1)
    return [{"input_ids": torch.randint(0, 61, (3, 16), generator=generator)} for _ in range(2)]


class Residual(nn.Module):
    """A block of two linear layers."""

    def __init__(self, width: int):
        super().__init__()
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., width]``."""
        return x + self.down(torch.relu(self.up(x)))


def residual() -> nn.Module:
    """Blocks of plain torch."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Sequential(*[Residual(16) for _ in range(3)]), nn.Linear(16, 5)).eval()


def vectors() -> list[Any]:
    """Two batches of four vectors."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(4, 8, generator=generator) for _ in range(2)]


class Basic(nn.Module):
    """Two convolutions and a shortcut, as in a ResNet."""

    def __init__(self, width: int):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        """``[n, width, h, w]``."""
        return torch.relu(x + self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))))


def convolutional() -> nn.Module:
    """A small ResNet whose norms have seen data."""
    torch.manual_seed(0)
    blocks = nn.Sequential(*[Basic(8) for _ in range(4)])
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
    with torch.no_grad():
        model(4 * torch.randn(32, 3, 8, 8))
    return model.eval()


def pictures() -> list[Any]:
    """Three labelled batches of eight images, some brighter than others."""
    generator = torch.Generator().manual_seed(1)
    scale = torch.rand(3, 8, 1, 1, 1, generator=generator) * 4
    x = scale * torch.randn(3, 8, 3, 8, 8, generator=generator)
    return list(zip(x, torch.randint(0, 5, (3, 8), generator=generator), strict=True))


def bert() -> nn.Module:
    """An encoder of the kind of MiniLM, with weights that make its attention uneven."""
    prepare_torchvision()
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=61, hidden_size=32, intermediate_size=64, num_hidden_layers=6, num_attention_heads=4,
        max_position_embeddings=64,
    )  # fmt: skip
    model = transformers.BertModel(config, add_pooling_layer=False).eval()
    with torch.no_grad():
        for parameter in model.encoder.parameters():
            parameter.mul_(4 if parameter.dim() == 2 else 1)
    return model


def sentences() -> list[Any]:
    """Two batches of three sequences without padding."""
    return [{**batch, "attention_mask": torch.ones_like(batch["input_ids"])} for batch in tokens()]


CASES = {
    "early_exit": Case("early_exit", convolutional, pictures, {"exits": 2, "steps": 30, "hidden": 4}, slack=0.2),
    "rnp": Case("rnp", convolutional, pictures, {"epochs": 0, "episodes": 24, "steps": 10, "hidden": 4}, slack=0.05),
    "skip convolutional": Case("skip", convolutional, pictures, {"samples": 24}),
    "skip bert": Case("skip", bert, sentences, {"samples": 6}),
    "tokens": Case("tokens", bert, sentences, {"score": "mean", "places": 5}),
    "teal plain": Case("teal", residual, vectors, {"positions": 8, "step": 0.25}, slack=0.1),
    "dejavu plain": Case("dejavu", residual, vectors, {"rank": 2, "steps": 20}),
    "dejavu llama": Case("dejavu", llama, tokens, {"rank": 2, "steps": 20}),
    "teal llama": Case("teal", llama, tokens, {"positions": 48, "step": 0.25}),
}
