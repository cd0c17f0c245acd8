"""`nn.MultiheadAttention` with heads of a size of their own, so that some of them can go."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class HeadAttention(nn.MultiheadAttention):
    """`nn.MultiheadAttention` whose heads need not fill its width: what is left of one when heads were cut.

    The original checks that queries are as wide as all heads together. This one takes the number and the size of its heads
    from `num_heads` and `head_dim`. Otherwise it does the same: same parameters under the same names, same arguments, same
    results. Modules become one by assigning to ``__class__``; it is never constructed.
    """

    #: Keeps `nn.TransformerEncoderLayer` from its fused kernel, which knows the original's sizes only.
    _qkv_same_embed_dim = property(lambda self: False)  # type: ignore[assignment]

    def forward(  # type: ignore[override]
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
        """As `nn.MultiheadAttention.forward`."""
        batched = query.dim() == 3
        q, k, v = self._projected(query, key, value)
        if not batched:
            q, k, v = (t.unsqueeze(0) for t in (q, k, v))
        elif not self.batch_first:
            q, k, v = (t.transpose(0, 1) for t in (q, k, v))
        q, k, v = (t.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2) for t in (q, k, v))
        mask = self._mask(q, k, key_padding_mask, attn_mask)
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = q @ k.transpose(-2, -1) * self.head_dim**-0.5
            weights = F.dropout((scores if mask is None else scores + mask).softmax(-1), dropout)
            out = weights @ v
        else:
            out = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal and mask is None)
        out = self.out_proj(out.transpose(1, 2).flatten(2))
        if weights is not None and average_attn_weights:
            weights = weights.mean(1)
        if not batched:
            return out.squeeze(0), None if weights is None else weights.squeeze(0)
        return out if self.batch_first else out.transpose(0, 1), weights

    def _projected(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        if self.in_proj_weight is not None and query is key is value:
            return F.linear(query, self.in_proj_weight, self.in_proj_bias).chunk(3, -1)
        weights: tuple[Tensor, ...] = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        if self.in_proj_weight is not None:
            weights = self.in_proj_weight.chunk(3)
        biases = (None, None, None) if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        return tuple(F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True))

    def _mask(self, q: Tensor, k: Tensor, padding: Tensor | None, mask: Tensor | None) -> Tensor | None:
        """Both masks as one that is added to scores ``[batch, heads, queries, keys]``."""
        if mask is not None:
            mask = _added(mask, q)
            if mask.dim() == 3:
                mask = mask.unflatten(0, (q.shape[0], self.num_heads))
        if padding is None:
            return mask
        padding = _added(padding, q).reshape(q.shape[0], 1, 1, k.shape[2])
        return padding if mask is None else mask + padding


def _added(mask: Tensor, like: Tensor) -> Tensor:
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill(mask, -torch.inf) if mask.dtype == torch.bool else mask


def _replaceable(module: nn.Module) -> bool:
    return (
        type(module) is nn.MultiheadAttention
        and module.bias_k is None
        and module.bias_v is None
        and not module.add_zero_attn
        and module.head_dim * module.num_heads == module.embed_dim
    )


@contextlib.contextmanager
def explicit_heads(modules: Iterable[nn.Module]) -> Iterator[bool]:
    """Inside, every `nn.MultiheadAttention` that can be is a `HeadAttention`. Yields whether there is any."""
    changed = [module for module in modules if _replaceable(module)]
    for module in changed:
        module.__class__ = HeadAttention
    try:
        yield bool(changed)
    finally:
        for module in changed:
            module.__class__ = nn.MultiheadAttention


def refresh_heads(module: nn.MultiheadAttention) -> None:
    """After a cut: the width as its parameters tell it, and the class that can do with what is left."""
    separate = module.in_proj_weight is None
    module.embed_dim = module.out_proj.weight.shape[0]
    module.kdim = module.k_proj_weight.shape[1] if separate else module.in_proj_weight.shape[1]
    module.vdim = module.v_proj_weight.shape[1] if separate else module.in_proj_weight.shape[1]
    if _replaceable(module) and module.out_proj.weight.shape[1] == module.embed_dim:
        return
    if type(module) is nn.MultiheadAttention and module.bias_k is None and module.bias_v is None and not module.add_zero_attn:
        module.__class__ = HeadAttention
