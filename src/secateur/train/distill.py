"""Distillation: a loss that asks a model to do what its teacher does."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from secateur.data.batches import Batch, Loss, forward, loss_of, output_tensor, token_mask
from secateur.errors import RecipeError, TrainingError
from secateur.layers import find_layers
from secateur.measure.modes import evaluating
from secateur.stats.blocks import find_blocks

#: A constant, or the values at the begin and at the end of the training, between which it moves in a straight line.
Weight = float | tuple[float, float]


class Distillation:
    """A loss ``(model, batch) -> scalar``: how far `model` is from `teacher` on the batch, and the task's own loss if wanted.

    Each part is a mean and has a weight. Positions that ``attention_mask`` pads take no part in `output` and `hidden`.

    Args:
        teacher: run in eval mode and without gradients; the unpruned model, most often. Nothing of it is changed.
        logits: of the Kullback-Leibler divergence of the softened outputs, times the squared temperature (Hinton et al. 2015).
        output: of the mean squared difference of the outputs relative to the teacher's mean square: for embeddings, regression.
        hidden: of the same, mean over the outputs of `blocks` (as TinyBERT, Jiao et al. 2020, eq. 8, but relative).
        attention: of the divergence between attention maps, mean over all calls of scaled dot-product attention, heads and
            queries (MiniLM, Wang et al. 2020, eq. 3). Maps are averaged over heads where the two have different numbers.
        task: of the model's own loss, or of `loss`.
        temperature: of `logits`.
        blocks: names of the modules whose outputs are compared, or a mapping from the model's names to the teacher's. By
            default the repeated blocks that both have.
        loss: ``loss(model, batch)`` of the task; it costs another forward pass.
        progress: 0..1, where in the training we are; `finetune` sets it. Weights that are pairs move with it.

    Raises:
        RecipeError: no weight above zero, or weights that are no numbers.
        TrainingError: when it is called: outputs, hidden states or attention maps of other shapes (a teacher with another
            head), no attention seen.

    Example:
        >>> teacher, student = nn.Linear(4, 3), nn.Linear(4, 3)
        >>> loss = Distillation(teacher, logits=1.0, temperature=2.0)
        >>> loss(teacher, torch.ones(2, 4)).item()
        0.0
    """

    def __init__(
        self,
        teacher: nn.Module,
        *,
        logits: Weight = 0.0,
        output: Weight = 0.0,
        hidden: Weight = 0.0,
        attention: Weight = 0.0,
        task: Weight = 0.0,
        temperature: float = 2.0,
        blocks: Sequence[str] | Mapping[str, str] | None = None,
        loss: Loss | None = None,
    ):
        weights: dict[str, Weight] = {
            "logits": logits,
            "output": output,
            "hidden": hidden,
            "attention": attention,
            "task": task,
        }
        self._weights = {name: _checked(name, weight) for name, weight in weights.items()}
        if not any(max(pair) > 0 for name, pair in self._weights.items() if name != "task"):
            raise RecipeError("distillation: give logits, output, hidden or attention a weight above 0, such as logits=1.0")
        if not (math.isfinite(temperature) and temperature > 0):
            raise RecipeError(f"distillation: temperature must be above 0, got {temperature!r}")
        self._teacher, self._temperature, self._loss = teacher, temperature, loss
        self._blocks = blocks
        self.progress = 0.0

    def weight(self, part: str) -> float:
        """Of one part, now."""
        start, end = self._weights[part]
        return start + (end - start) * self.progress

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        """The weighted sum of all parts, a scalar that has gradients with respect to `model` only."""
        blocks = self._pairs(model)
        with _watched(model, list(blocks), self.weight("attention") > 0) as student:
            made = forward(model, batch)
        with (
            evaluating(self._teacher),
            torch.no_grad(),
            _watched(self._teacher, list(blocks.values()), self.weight("attention") > 0) as teacher,
        ):
            wanted = forward(self._teacher, batch)
        mask = token_mask(batch)
        parts: dict[str, Any] = {
            "logits": lambda: self._divergence(output_tensor(made), output_tensor(wanted)),
            "output": lambda: _relative("the output", output_tensor(made), output_tensor(wanted), mask),
            "hidden": lambda: _mean(
                [_relative(f"the output of {a!r}", student.hidden[a], teacher.hidden[b], mask) for a, b in blocks.items()]
            ),
            "attention": lambda: _attention(student.maps, teacher.maps),
            "task": lambda: loss_of(made, batch) if self._loss is None else self._loss(model, batch),
        }
        return torch.stack([self.weight(n) * part() for n, part in parts.items() if self.weight(n) > 0]).sum()

    def _pairs(self, model: nn.Module) -> dict[str, str]:
        """Blocks to compare, by the model's names; none where hidden states have no weight."""
        if self.weight("hidden") == 0:
            return {}
        if self._blocks is None:
            theirs = {n for names in find_blocks(self._teacher, find_layers(self._teacher)[0]) for n in names}
            ours = [n for names in find_blocks(model, find_layers(model)[0]) for n in names]
            self._blocks = [n for n in ours if n in theirs]
            if not self._blocks:
                raise TrainingError("distillation: the two models share no repeated blocks; name them: blocks=[...]")
        return dict(self._blocks) if isinstance(self._blocks, Mapping) else {n: n for n in self._blocks}

    def _divergence(self, made: Tensor, wanted: Tensor) -> Tensor:
        _check_shapes("the output", made, wanted)
        t = self._temperature
        divergence = F.kl_div((made / t).log_softmax(-1), (wanted / t).log_softmax(-1), reduction="none", log_target=True)
        return divergence.sum(-1).mean() * t * t


class _Seen:
    """What was seen of one forward pass: outputs of blocks by name, attention maps in the order of the calls."""

    def __init__(self) -> None:
        self.hidden: dict[str, Tensor] = {}
        self.maps: list[Tensor] = []


class _Attention(TorchFunctionMode):
    """Writes down the maps of scaled dot-product attention."""

    def __init__(self, seen: _Seen):
        super().__init__()
        self.seen = seen

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            self.seen.maps.append(_map(*args, **kwargs))
        return func(*args, **kwargs)


def _map(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Log of the attention map ``[batch, heads, queries, keys]``."""
    if query.shape[-3] != key.shape[-3]:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
    scores = query @ key.transpose(-2, -1) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -torch.inf)
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
    # Finite where masked, so that what is impossible for both adds 0 and not NaN; a row of nothing but masks becomes even.
    return scores.clamp_min(torch.finfo(scores.dtype).min / 2).log_softmax(-1)


@contextmanager
def _watched(model: nn.Module, blocks: Sequence[str], attention: bool) -> Iterator[_Seen]:
    seen = _Seen()

    def hook(name: str) -> Any:
        return lambda _, __, output: seen.hidden.update({name: output_tensor(output)})

    handles = [model.get_submodule(name).register_forward_hook(hook(name)) for name in blocks]
    try:
        if attention:
            with _Attention(seen):
                yield seen
        else:
            yield seen
    finally:
        for handle in handles:
            handle.remove()


def _relative(what: str, made: Tensor, wanted: Tensor, mask: Tensor | None) -> Tensor:
    """Mean squared difference over the mean square of what is wanted, padding left out."""
    _check_shapes(what, made, wanted)
    if mask is not None and made.dim() > 2 and made.shape[:2] == mask.shape:
        made, wanted = made[mask.bool()], wanted[mask.bool()]
    return (made.float() - wanted.float()).square().mean() / wanted.float().square().mean().clamp_min(1e-12)


def _attention(made: list[Tensor], wanted: list[Tensor]) -> Tensor:
    if not wanted or len(made) != len(wanted):
        raise TrainingError(
            f"distillation: the model called scaled_dot_product_attention {len(made)} times and the teacher {len(wanted)} "
            "times; attention maps are read from those calls, one for one. Use attn_implementation='sdpa', or leave it out."
        )
    return _mean([_divergence_of_maps(a, b) for a, b in zip(made, wanted, strict=True)])


def _divergence_of_maps(made: Tensor, wanted: Tensor) -> Tensor:
    if made.shape[-3] != wanted.shape[-3]:
        made, wanted = (torch.logsumexp(m, -3) - math.log(m.shape[-3]) for m in (made, wanted))
    _check_shapes("an attention map", made, wanted)
    return F.kl_div(made, wanted, reduction="none", log_target=True).sum(-1).mean()


def _mean(values: list[Tensor]) -> Tensor:
    return torch.stack(values).mean()


def _check_shapes(what: str, made: Tensor, wanted: Tensor) -> None:
    if made.shape != wanted.shape:
        raise TrainingError(
            f"distillation: {what} is {tuple(made.shape)} in the model and {tuple(wanted.shape)} in the teacher. "
            "Compare what has one shape: other parts, or other blocks, or a teacher with the same head."
        )


def _checked(name: str, weight: object) -> tuple[float, float]:
    pair = weight if isinstance(weight, (tuple, list)) else (weight, weight)
    fits = len(pair) == 2 and all(
        isinstance(w, (int, float)) and not isinstance(w, bool) and math.isfinite(w) and w >= 0 for w in pair
    )
    if not fits:
        raise RecipeError(f"distillation: {name} is a weight of at least 0, or a pair of them (begin, end); got {weight!r}")
    return float(pair[0]), float(pair[1])
