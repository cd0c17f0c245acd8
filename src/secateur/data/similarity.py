"""Embedding similarity: how well the cosines of a sentence encoder rank pairs of texts, as people judged them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secateur.data.batches import Batch, forward, output_tensor, token_mean
from secateur.data.evaluate import Evaluate, evaluating
from secateur.errors import DataError
from secateur.progress import track


def similarity(batches: Iterable[Batch]) -> Evaluate:
    """Spearman's correlation of the cosine of two embeddings with the label, -1 to 1. Key ``spearman``.

    Batches are mappings with ``first`` and ``second``, each an encoding, and ``labels``, as ``text:FILE?columns=5,6&label=4
    &apart=true`` gives them. An embedding is the mean of the token vectors over the attention mask; an output ``[batch,
    width]`` is taken as it is. Raises DataError for labels that are all alike, which rank nothing.

    Source: Reimers and Gurevych 2019, Sentence-BERT, section 4.
    """

    def evaluate(model: nn.Module) -> dict[str, float]:
        found, judged = [], []
        with evaluating(model):
            for batch in track(batches, "evaluate"):
                if not is_apart(batch) or not isinstance(batch.get("labels"), Tensor):
                    raise DataError("similarity needs pairs with a label: text:FILE?columns=A,B&label=C&apart=true")
                one, other = (_embed(model, batch[side]) for side in ("first", "second"))
                found.append(F.cosine_similarity(one, other).double().cpu())
                judged.append(batch["labels"].double().cpu())
        if not judged:
            raise DataError("similarity: the data gave no batches")
        if bool((torch.cat(judged) == judged[0][0]).all()):
            raise DataError("similarity: all labels are alike, so there is no order to agree with")
        return {"spearman": _correlation(ranks(torch.cat(found)), ranks(torch.cat(judged)))}

    return evaluate


def is_apart(batch: Batch) -> bool:
    """Whether the two texts of each pair are encoded each for itself."""
    return isinstance(batch, Mapping) and isinstance(batch.get("first"), Mapping) and isinstance(batch.get("second"), Mapping)


def ranks(values: Tensor) -> Tensor:
    """Ranks from 0 in float64, equal values sharing the mean of theirs.

    Example:
        >>> ranks(torch.tensor([5.0, 1.0, 5.0, 7.0])).tolist()
        [1.5, 0.0, 1.5, 3.0]
    """
    _, inverse, counts = values.unique(return_inverse=True, return_counts=True)
    return (counts.cumsum(0).double() - (counts.double() + 1) / 2)[inverse]


def _embed(model: nn.Module, encoding: Mapping[str, Any]) -> Tensor:
    output = output_tensor(forward(model, encoding))
    if output.dim() == 2:
        return output
    mask = encoding.get("attention_mask")
    if output.dim() != 3 or (isinstance(mask, Tensor) and mask.shape != output.shape[:2]):
        raise DataError(f"similarity needs token vectors [batch, positions, width], the model gave {tuple(output.shape)}")
    return token_mean(output, mask)


def _correlation(one: Tensor, other: Tensor) -> float:
    """Pearson's; 0 where the model gives every pair the same score."""
    if bool((one == one[0]).all()) or not bool(one.isfinite().all()):
        return 0.0
    return float(torch.corrcoef(torch.stack((one, other)))[0, 1])
