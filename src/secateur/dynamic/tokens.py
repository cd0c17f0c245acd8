"""Token pruning: after some layers only the tokens that others attend to go on, and the sequence is really shorter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from secateur.data.batches import Batches, arguments_of, first_batches, forward
from secateur.dynamic.blocks import spread
from secateur.dynamic.dial import Dial
from secateur.dynamic.gate import Gate, recording
from secateur.dynamic.registry import DYNAMIC
from secateur.dynamic.rows import first_tensor
from secateur.errors import ModelError, RecipeError
from secateur.graph import removable_blocks, trace

POINTS = 17  #: rates at which costs are calibrated
_FUSED = -1  #: position of a token that is made of dropped ones


@dataclass
class Route:
    """One forward pass, shared by its gates: which tokens are still there, and what was last known of the others."""

    rate: float = 1.0  #: share of the tokens that each place keeps; at 1 nothing is dropped
    full: Tensor | None = None  #: ``[batch, all tokens, width]``
    index: Tensor | None = None  #: ``[batch, slots]``: original positions, `_FUSED` for a fused token
    there: Tensor = field(default_factory=lambda: torch.empty(0))  #: bool ``[batch, slots]``: False where it is padding
    tokens: Tensor = field(default_factory=lambda: torch.empty(0))  #: ``[batch]``: how many there were at first


class TokenGate(Gate):
    """A transformer block that runs on the tokens still there; at a `place` the least attended leave behind it.

    They leave as one token, their mean weighted by the attention they got. Behind the last block every token is back in its
    place, the dropped ones as they were when they left, so that whoever reads the output finds its shape as always.
    """

    def __init__(self, block: nn.Module, dial: Dial, route: Route, score: str, *, place: bool, first: bool, last: bool):
        super().__init__()
        self.block, self.dial, self.route, self.score = block, dial, route, score
        self.place, self.first, self.last = place, first, last
        self.linear = sum(p.numel() for n, p in block.named_parameters() if p.dim() == 2 and n.endswith("weight"))

    def set_budget(self, budget: float) -> None:
        """All gates turn one dial."""
        self.route.rate = 1.0 if budget >= 1 else self.dial.setting(budget)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the block, which is given and gives back ``[batch, tokens, width]``."""
        route, x = self.route, first_tensor((args, kwargs))
        if x.dim() != 3:
            raise ModelError(f"tokens: a block is given shape {tuple(x.shape)}, expected [batch, tokens, width]")
        if self.first:
            route.full, route.index, route.there = None, None, _present((args, kwargs), x)
            if not route.there.any(1).all():
                raise ModelError("tokens: a member of the batch is all padding. Leave it out.")
        self._record(x, asked=self.place and route.rate < 1)
        if route.rate >= 1:
            return self.block(*args, **kwargs)
        if route.index is not None:
            args, kwargs = _followed((args, kwargs), x, route)
        if not self.place:
            return self._restored(self.block(*args, **kwargs))
        with _Attention(self.score, route.there) as seen:
            out = self.block(*args, **kwargs)
        if seen.received is None:
            raise ModelError(
                "tokens: a block calls neither scaled_dot_product_attention nor nn.MultiheadAttention; of transformers, load "
                "the model with attn_implementation='sdpa'"
            )
        return self._restored(self._shortened(out, seen.received))

    def _shortened(self, x: Tensor, received: Tensor) -> Tensor:
        """Keep the first token and those with the most attention ``received [batch, slots]``; fuse the others."""
        route, (size, slots, _) = self.route, x.shape
        index = torch.arange(slots, device=x.device).expand(size, -1) if route.index is None else route.index
        full = x.clone() if route.full is None else _put(route.full, index, x)
        counts = route.there.sum(1)
        keep = torch.minimum((counts * route.rate).ceil().long(), counts - 1).clamp(min=1)
        received = received.masked_fill(~route.there, -1)
        received[:, 0] = torch.inf
        order = received.argsort(dim=1, descending=True, stable=True)
        rank = order.argsort(1)
        dropped = route.there & (rank >= keep[:, None])
        weight = torch.where(dropped, received, 0)
        weight[:, 0] += (weight.sum(1) <= 0).to(weight)  # nothing to fuse: the first token once more, which changes nothing
        fused = torch.einsum("ns,nsd->nd", (weight / weight.sum(1, keepdim=True)).to(x.dtype), x)
        chosen = (rank + slots * dropped).argsort(1)[:, : int(keep.max())]  # kept, then padding, then dropped
        wide = chosen[..., None].expand(-1, -1, x.shape[2])
        route.full = full
        route.index = torch.cat([index.gather(1, chosen), torch.full((size, 1), _FUSED, device=x.device)], 1)
        yes = torch.ones(size, 1, dtype=torch.bool, device=x.device)
        route.there = torch.cat([route.there.gather(1, chosen), yes], 1)
        return torch.cat([x.gather(1, wide), fused[:, None]], 1)

    def _restored(self, x: Tensor) -> Tensor:
        if not self.last or self.route.full is None or self.route.index is None:
            return x
        return _put(self.route.full, self.route.index, x)

    def _record(self, x: Tensor, *, asked: bool) -> None:
        """Products of linear layers and attention, for the tokens that each member alone would have."""
        if self.meter is None:
            return
        width, now = x.shape[2], self.route.there.sum(1).double().cpu()
        if self.first:
            self.route.tokens = now
        dense = self.route.tokens
        deciding = asked * width * (now if self.score == "cls" else now**2)
        self.spend(self.linear * now + 2 * width * now**2 + deciding, self.linear * dense + 2 * width * dense**2)


class _Attention(TorchFunctionMode):
    """Sees the queries and keys of a block's attention, and adds up what each token receives."""

    def __init__(self, score: str, there: Tensor):
        super().__init__()
        self.score, self.there = score, there
        self.received: Tensor | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.multi_head_attention_forward:
            both: Any = func(*args, **{**kwargs, "need_weights": True, "average_attn_weights": True})
            self._keep(both[1])
            return both[0], both[1] if kwargs.get("need_weights", True) else None
        if func is F.scaled_dot_product_attention:
            self._see(*args, **kwargs)
        return func(*args, **kwargs)

    def _see(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        *rest: Any,
        scale: float | None = None,
        **more: Any,
    ) -> None:
        """``[batch, heads, slots, width]``. From the first token's attention, or the mean of all that are no padding."""
        rows = slice(0, 1) if self.score == "cls" else slice(None)
        logits = (
            query[:, :, rows].float() @ key.float().transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
        )
        if attn_mask is not None:
            mask = attn_mask[..., rows, :] if attn_mask.shape[-2] > 1 else attn_mask
            logits = logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask
        self._keep(logits.softmax(-1).mean(1))

    def _keep(self, attention: Tensor) -> None:
        """``[batch, slots or 1, slots]``, the mean over the heads."""
        if self.score == "cls":
            self.received = attention[:, 0]
        else:
            asking = self.there.to(attention)[..., None]
            self.received = (attention * asking).sum(1) / asking.sum(1)


def _present(tree: Any, x: Tensor) -> Tensor:
    """bool ``[batch, tokens]``: which tokens are no padding, as an attention mask ``[batch, 1, 1 or tokens, tokens]`` tells."""
    for leaf in pytree.tree_leaves(tree):
        if isinstance(leaf, Tensor) and leaf.dim() == 4 and leaf.shape[-1] == x.shape[1]:
            row = leaf[:, 0, 0].expand(len(x), -1)
            return row if row.dtype == torch.bool else row > -1
    return torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)


def _followed(tree: Any, hidden: Tensor, route: Route) -> Any:
    """The other arguments of a block cut to the tokens that are still there: masks and positions of all tokens."""
    assert route.index is not None
    assert route.full is not None
    index, tokens, size = route.index.clamp(min=0), route.full.shape[1], len(hidden)

    def cut(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or leaf is hidden or tokens not in leaf.shape[-2:]:
            return leaf
        if leaf.dim() < 3 or leaf.shape[0] not in (1, size):
            raise ModelError(
                f"tokens: a block is called with a tensor of shape {tuple(leaf.shape)}, which follows the tokens in a way "
                "that is not known; masks [batch, heads, tokens, tokens] and positions [batch, tokens, width] are"
            )
        leaf = leaf.expand(size, *leaf.shape[1:])
        for dim in (-1, -2):
            if leaf.shape[dim] == tokens:
                shape = [size] + [1] * (leaf.dim() - 1)
                shape[dim] = index.shape[1]
                sizes = list(leaf.shape)
                sizes[dim] = index.shape[1]
                leaf = leaf.gather(dim, index.reshape(shape).expand(sizes))
        return leaf

    return pytree.tree_map(cut, tree)


def _put(full: Tensor, index: Tensor, x: Tensor) -> Tensor:
    """`full` with the tokens ``x [batch, slots, width]`` at their positions; fused ones are left out."""
    spare = torch.cat([full, full[:, :1]], 1)  # a place for what has none
    where = torch.where(index < 0, full.shape[1], index)
    return spare.scatter(1, where[..., None].expand_as(x), x)[:, :-1]


@DYNAMIC.register(
    "tokens", source="Liang et al. 2022, EViT: Expediting Vision Transformers via Token Reorganizations, section 3.2"
)
@dataclass(frozen=True, kw_only=True)
class Tokens:
    """Tokens that get little attention leave a vision transformer or encoder early, and go on as one.

    At `places` of its blocks, by default behind a quarter, a half and three quarters of them, each input keeps its first
    token and those that receive the most attention: from the first (CLS) token, ``score="cls"``, or from all,
    ``score="mean"``, for models that average their tokens. The share kept is the dial, alike at all places. Nothing is
    trained; which tokens go depends on the input. Padding never counts: an input keeps what it would keep alone.

    Departures: tokens leave behind a block instead of within it, before its feed-forward part; the last block puts dropped
    tokens back as they were when they left, so that the output has its shape. Blocks must call
    scaled_dot_product_attention or nn.MultiheadAttention. `blocks` are found from the model and its first batch, and may
    be given instead.
    """

    score: str = "cls"
    places: int = 3
    samples: int = 128
    blocks: Sequence[str] = ()

    def __post_init__(self) -> None:
        if self.score not in ("cls", "mean"):
            raise RecipeError(f"tokens: score={self.score!r} must be 'cls' or 'mean'")
        for name in ("places", "samples"):
            if getattr(self, name) < 1:
                raise RecipeError(f"tokens: {name}={getattr(self, name)!r} must be at least 1")

    def prepare(self, model: nn.Module, data: Batches) -> dict[str, Any]:
        """The blocks through which tokens pass."""
        graph = trace(model, arguments_of(next(iter(data))))
        found = [b.name for b in removable_blocks(model, graph) if len(b.shape) == 3]
        return {"blocks": list(self.blocks) or found}

    def attach(self, model: nn.Module) -> nn.Module:
        """Every block becomes a `TokenGate`."""
        known = {name for name, _ in model.named_modules()}
        if len(self.blocks) < 2 or not known.issuperset(self.blocks):
            raise ModelError(
                f"tokens needs two transformer blocks or more, that pass on [batch, tokens, width]; a {type(model).__name__} "
                "has none"
            )
        dial, route, count = Dial(POINTS), Route(), len(self.blocks)
        places = spread(count, self.places)
        for i, name in enumerate(self.blocks):
            where = {"place": i in places, "first": i == 0, "last": i == count - 1}
            model.set_submodule(name, TokenGate(model.get_submodule(name), dial, route, self.score, **where))
        return model

    @torch.no_grad()
    def calibrate(self, model: nn.Module, data: Batches) -> None:
        """What each rate costs, on some of the data."""
        gate = next(m for m in model.modules() if isinstance(m, TokenGate))
        batches = first_batches(data, self.samples)

        def cost(rate: float) -> float:
            gate.route.rate = rate
            with recording(model) as costs:
                for batch in batches:
                    forward(model, batch)
            return costs.mean

        try:
            gate.dial.measure(0.02, 0.99, cost)
        finally:
            gate.route.rate = 1.0
