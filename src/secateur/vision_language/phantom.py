"""Phantom: attention that is wider while it attends, and as wide as before everywhere else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secateur.errors import LayerError, RecipeError
from secateur.layers import matches


class PhantomAttention(nn.Module):
    """`nn.MultiheadAttention` whose heads have `extra` more dimensions for queries, keys and values.

    The extra part of the keys begins at zero, and so does what the extra values give back: at first the module computes what
    the original does. Training fills the extra part; the residual stream stays as wide as it is. The same arguments and results
    as the original, whose parameters are kept under ``attention``.

    The paper takes the extra part from a cross-attention with the first token and averages its output with the original's by a
    learned weight; here it is a projection of the same inputs, and its output is added.

    Source: Lee et al. 2024, Phantom of Latent for Large Language and Vision Models, section 3.

    Args:
        attention: the module to widen; it is taken over, not copied.
        extra: further dimensions of each head.
    """

    def __init__(self, attention: nn.MultiheadAttention, extra: int):
        super().__init__()
        if isinstance(extra, bool) or not isinstance(extra, int) or extra < 1:
            raise RecipeError(f"phantom attention needs a whole number of extra dimensions, at least 1; got {extra!r}")
        if attention.bias_k is not None or attention.add_zero_attn:
            raise LayerError("an attention with bias_k or add_zero_attn cannot be widened")
        self.attention, self.extra = attention, extra
        width, like = attention.num_heads * extra, attention.out_proj.weight
        options: dict[str, Any] = {"device": like.device, "dtype": like.dtype, "bias": False}
        self.query = nn.Linear(attention.embed_dim, width, **options)
        self.key = nn.Linear(attention.kdim, width, **options)
        self.value = nn.Linear(attention.vdim, width, **options)
        self.back = nn.Linear(width, attention.embed_dim, **options)
        nn.init.zeros_(self.key.weight)
        nn.init.zeros_(self.back.weight)

    @property
    def batch_first(self) -> bool:
        """Whether samples are the first dimension: as the original."""
        return self.attention.batch_first

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As `nn.MultiheadAttention.forward`, of batches ``[samples, positions, width]`` or with the first two exchanged."""
        inner = self.attention
        q, k, v = (t if self.batch_first else t.transpose(0, 1) for t in (query, key, value))
        wide_q, wide_k, wide_v = self.query(q), self.key(k), self.value(v)
        plain = _projections(inner, q, k, v)
        q, k, v = (_heads(t, inner.num_heads) for t in plain)
        wide_q, wide_k, wide_v = (_heads(t, inner.num_heads) for t in (wide_q, wide_k, wide_v))
        scores = q @ k.transpose(-2, -1) * inner.head_dim**-0.5 + wide_q @ wide_k.transpose(-2, -1) * self.extra**-0.5
        weights = F.dropout(_masked(scores, key_padding_mask, attn_mask).softmax(-1), inner.dropout, self.training)
        out = inner.out_proj((weights @ v).transpose(1, 2).flatten(2)) + self.back(
            (weights @ wide_v).transpose(1, 2).flatten(2)
        )
        out = out if self.batch_first else out.transpose(0, 1)
        if not need_weights:
            return out, None
        return out, weights.mean(1) if average_attn_weights else weights


def widen(model: nn.Module, extra: int, *, layers: str = "*") -> list[str]:
    """Make every `nn.MultiheadAttention` of `model` whose name matches `layers` a `PhantomAttention`, in place; their names.

    Raises LayerError where none matches.

    Example:
        >>> model = nn.ModuleDict({"attend": nn.MultiheadAttention(8, 2)})
        >>> widen(model, extra=2)
        ['attend']
        >>> narrow(model)
        ['attend']
    """
    found = {n: m for n, m in model.named_modules() if type(m) is nn.MultiheadAttention and matches(layers, n)}
    if not found:
        raise LayerError(f"no nn.MultiheadAttention of the model is named {layers!r}: there is nothing to widen")
    _replace(model, {name: PhantomAttention(module, extra) for name, module in found.items()})
    return list(found)


def narrow(model: nn.Module) -> list[str]:
    """Put the original attentions back, in place, without the extra width; the names of what was changed.

    What training put into the extra width is lost with it: fine-tune afterwards, or keep it for inference.
    """
    found = {n: m.attention for n, m in model.named_modules() if isinstance(m, PhantomAttention)}
    _replace(model, found)
    return list(found)


def _replace(model: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    for name, module in modules.items():
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, module)


def _projections(inner: nn.MultiheadAttention, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    if inner.in_proj_weight is not None:
        weights: tuple[Tensor, ...] = inner.in_proj_weight.chunk(3)
    else:
        weights = (inner.q_proj_weight, inner.k_proj_weight, inner.v_proj_weight)  # type: ignore[assignment]
    biases = (None,) * 3 if inner.in_proj_bias is None else inner.in_proj_bias.chunk(3)
    return tuple(F.linear(x, w, b) for x, w, b in zip((q, k, v), weights, biases, strict=True))


def _heads(tensor: Tensor, heads: int) -> Tensor:
    return tensor.unflatten(-1, (heads, -1)).transpose(1, 2)


def _masked(scores: Tensor, padding: Tensor | None, mask: Tensor | None) -> Tensor:
    """Scores ``[samples, heads, queries, keys]`` with both masks of `nn.MultiheadAttention` on them."""
    if mask is not None:
        mask = mask.unflatten(0, scores.shape[:2]) if mask.dim() == 3 else mask
        scores = scores.masked_fill(mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    if padding is not None:
        wide = padding[:, None, None]
        scores = scores.masked_fill(wide, -torch.inf) if padding.dtype == torch.bool else scores + wide
    return scores
