"""How much of their attention the text positions of a model give to visual ones: by layer, head and sample."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from secateur.data.batches import Batch, Batches, forward, inputs_of, token_mask
from secateur.errors import DataError, ModelError
from secateur.stats.guard import ordinary, untouched
from secateur.stats.reads import Reads, reads_of
from secateur.vision_language.draw import bars

#: ``visual(batch) -> bool [samples, positions]``: which positions of the row that attention goes over are visual.
Visual = Callable[[Batch], Tensor]
_SOFTMAX = ("_softmax", "_safe_softmax")


@dataclass(frozen=True)
class AttentionProfile:
    """Attention of text positions to visual ones, ``[samples, heads]`` for each attention module, in the model's order.

    `shares` are of all attention that the text positions of a sample pay: between 0 and 1. Padding neither pays nor counts.
    """

    shares: Mapping[str, Tensor]

    def ratio(self, name: str) -> Tensor:
        """YOPO's ratio ``[samples, heads]``: the sum of attention to visual positions over the sum to all others."""
        share = self.shares[name]
        return share / (1 - share).clamp_min(torch.finfo(share.dtype).tiny)

    def layers(self) -> dict[str, float]:
        """The mean share of each attention module, over samples and heads."""
        return {name: float(share.mean()) for name, share in self.shares.items()}

    def quiet_from(self, below: float = 0.02) -> str | None:
        """The first attention module from which on every one has a share below `below`; None where the last one has not."""
        found = None
        for name, share in reversed(self.layers().items()):
            if share >= below:
                break
            found = name
        return found

    def svg(self) -> str:
        """A bar for each layer, with its least and most attentive head."""
        low = [float(share.mean(0).min()) for share in self.shares.values()]
        high = [float(share.mean(0).max()) for share in self.shares.values()]
        return bars("Attention of text to visual positions, by layer", list(self.layers().values()), low, high)

    def save(self, path: str | Path) -> None:
        """Write the drawing as an SVG file."""
        Path(path).write_text(self.svg(), encoding="utf-8")


def attention_profile(
    model: nn.Module, data: Iterable[Batch], *, visual: Visual | None = None, seed: int = 0
) -> AttentionProfile:
    """Measure the visual attention of every attention whose row holds tokens and visual positions both.

    Any attention counts that ends in a softmax over positions: transformers' (eager or sdpa) and `nn.MultiheadAttention`. By
    default the visual positions are those of the model's image token (``config.image_token_id``), or the image positions that
    the forward pass joins to the tokens. The model is left as it was.

    Raises DataError where no visual position is found, ModelError where no attention goes over them.

    Example::

        profile = attention_profile(llava, batches)
        profile.save("attention.svg")
        profile.quiet_from(below=0.02)      # 'model.language_model.layers.12.self_attn'
    """
    batches = Batches(data)
    reads = None if visual is not None else reads_of(model, batches, seed)
    found: dict[str, list[Tensor]] = {}
    with untouched(model, [], seed), torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        for batch in batches:
            batch = ordinary(batch)
            rows = _Rows(batch, visual_positions(model, batch, reads) if visual is None else visual(batch))
            with _watching(model, rows.see):
                forward(model, batch)
            for name, share in rows.shares.items():
                found.setdefault(name, []).append(share)
    if not found:
        raise ModelError("no attention of the model goes over visual positions and tokens in one row: nothing to profile")
    return AttentionProfile({name: torch.cat(parts) for name, parts in found.items()})


def visual_positions(model: nn.Module, batch: Batch, reads: Reads | None) -> Tensor:
    """Which positions are visual, bool ``[samples, positions]``: where the image tokens are, or where images were joined on.

    Raises DataError where the model and the batch tell of neither.
    """
    _, kwargs = inputs_of(batch)
    config, ids = getattr(model, "config", None), kwargs.get("input_ids")
    token = next((t for key in ("image_token_id", "image_token_index") if (t := getattr(config, key, None)) is not None), None)
    if token is not None and isinstance(ids, Tensor):
        found = ids == token
        if not found.any():
            raise DataError(f"no visual position: none of the input_ids is the image token {token}. Give batches with images.")
        return found
    mask = token_mask(batch)
    if reads is None or not reads.joined or mask is None:
        raise DataError(
            "no visual position: the model has no image token, and its forward pass joins no image positions to tokens that "
            "have an attention_mask. Pass visual=, a function from a batch to a mask of positions."
        )
    extra, row = next(iter(reads.joined.items()))
    found = torch.zeros(len(mask), mask.shape[1] + extra, dtype=torch.bool, device=mask.device)
    for start, stop in row.images:
        found[:, start:stop] = True
    return found


class _Rows:
    """The shares of one batch, from the attention weights that `see` is given."""

    def __init__(self, batch: Batch, visual: Tensor):
        self.visual = visual.bool()
        mask = token_mask(batch)
        extra = 0 if mask is None else visual.shape[1] - mask.shape[1]
        self.text = ~self.visual
        if mask is not None and extra == 0:
            self.text &= mask.to(visual.device)
        elif mask is not None:  # tokens in a row of others: they are what is neither visual nor the model's own
            self.text &= _tokens(mask.to(visual.device), self.visual, extra)
        self.shares: dict[str, Tensor] = {}

    def see(self, name: str, weights: Tensor) -> None:
        """Take in ``[samples, heads, queries, keys]`` or, of `nn.MultiheadAttention`, ``[samples * heads, queries, keys]``."""
        samples, positions = self.visual.shape
        if weights.dim() == 3 and len(weights) % samples == 0:
            weights = weights.unflatten(0, (samples, -1))
        if weights.dim() != 4 or weights.shape[0] != samples or weights.shape[2:] != (positions, positions):
            return
        queries = self.text[:, None, :, None].to(weights.dtype)
        paid = (weights.double() * queries).sum(2)
        share = (paid * self.visual[:, None, :]).sum(2) / paid.sum(2).clamp_min(torch.finfo(torch.float64).tiny)
        self.shares[name] = share.float().cpu()


def _tokens(mask: Tensor, visual: Tensor, extra: int) -> Tensor:
    """The token mask where its tokens stand in a row of `extra` further positions: in the longest run that is not visual."""
    row = visual[0].tolist()
    tokens = mask.shape[1]
    starts = [i for i in range(extra + 1) if not any(row[i : i + tokens])]
    if not starts:
        raise DataError(f"the visual positions leave no {tokens} positions in a row for the tokens")
    start = starts[-1] if any(row[: starts[-1]]) else starts[0]
    return nn.functional.pad(mask, (start, extra - start), value=False)


class _Softmaxes(TorchDispatchMode):
    """Hands every softmax over positions to `see`, with the name of the module at work."""

    def __init__(self, stack: list[str], see: Callable[[str, Tensor], None]):
        super().__init__()
        self._stack, self._see = stack, see

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Carries the operation out, and looks at what it gave."""
        result = func(*args, **(kwargs or {}))
        if func.name().removeprefix("aten::").split(".")[0] in _SOFTMAX and result.dim() in (3, 4):
            self._see(self._stack[-1] if self._stack else "", result)
        return result


@contextmanager
def _watching(model: nn.Module, see: Callable[[str, Tensor], None]) -> Iterator[None]:
    stack: list[str] = []
    with ExitStack() as hooks:
        for name, module in model.named_modules():
            enter = module.register_forward_pre_hook(lambda m, args, name=name: stack.append(name))
            leave = module.register_forward_hook(lambda m, args, out: stack.pop() and None, always_call=True)
            hooks.callback(enter.remove)
            hooks.callback(leave.remove)
        hooks.enter_context(_Softmaxes(stack, see))
        yield
