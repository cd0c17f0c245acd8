"""Small language models of characters, and their vocabulary: an LSTM and a transformer whose `width` may vary.

    secateur versus "examples/characters.py:lstm?width=256" --train "text:wikitext2/valid.txt?seqlen=64" \\
        --test "text:wikitext2/test.txt?seqlen=64" --sparsity 0.8,0.9 --epochs 2
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secateur.models import Loaded

CHARACTERS = [chr(i) for i in range(32, 127)]  # all others are one more symbol
SYMBOLS = len(CHARACTERS) + 1


class Characters:
    """Text as numbers of characters, with the call of a tokenizer."""

    pad_token = None

    def __init__(self) -> None:
        self._codes = {c: i + 1 for i, c in enumerate(CHARACTERS)}

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:  # noqa: D102
        return {"input_ids": [self._codes.get(c, 0) for c in text]}


@dataclass
class Output:
    """Scores ``[batch, positions, symbols]`` and the mean loss of predicting each next character."""

    logits: Tensor
    loss: Tensor | None = None


class Language(nn.Module):
    """A body between an embedding and scores; ``body`` maps ``[batch, positions, width]`` to the same shape."""

    def __init__(self, width: int, body: nn.Module):
        super().__init__()
        self.embed = nn.Embedding(SYMBOLS, width)
        self.body = body
        self.head = nn.Linear(width, SYMBOLS)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None) -> Output:  # noqa: D102
        logits = self.head(self.body(self.embed(input_ids)))
        if labels is None:
            return Output(logits)
        return Output(logits, F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()))


class Recurrent(nn.Module):
    """One layer of LSTM."""

    def __init__(self, width: int):
        super().__init__()
        self.lstm = nn.LSTM(width, width, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        return self.lstm(x)[0]


class Block(nn.Module):
    """Causal attention of `heads` heads with positions by rotation, and a feed-forward of four widths; norms before both."""

    def __init__(self, width: int, heads: int = 4):
        super().__init__()
        self.heads, self.inner = heads, 2 * (-(-width // (2 * heads))) * heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * self.inner), nn.Linear(self.inner, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        batch, length, _ = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(rotated(q), rotated(k), v, is_causal=True)
        x = x + self.out(seen.transpose(1, 2).reshape(batch, length, self.inner))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


def rotated(x: Tensor) -> Tensor:
    """Queries or keys ``[batch, heads, positions, size]`` turned by angles that grow with the position (RoPE)."""
    half = x.shape[-1] // 2
    angles = torch.arange(x.shape[-2])[:, None] / 1000.0 ** (torch.arange(half) / half)
    a, b = x[..., :half], x[..., half:]
    return torch.cat((a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()), -1)


def lstm(width: int = 256) -> Loaded:
    """An embedding, one layer of LSTM and scores."""
    return _loaded(Language(width, Recurrent(width)))


def transformer(width: int = 128) -> Loaded:
    """Three blocks of a transformer."""
    return _loaded(Language(width, nn.Sequential(*[Block(width) for _ in range(3)], nn.LayerNorm(width))))


def _loaded(model: nn.Module) -> Loaded:
    example = {"input_ids": torch.zeros(1, 16, dtype=torch.long)}
    return Loaded(model, task="text-lm", example=example, tokenizer=Characters())
