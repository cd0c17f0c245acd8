"""Evaluators: ``evaluate(model) -> {"accuracy": 0.91}``, made from batches, from the model's task, or from the user's code."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secateur.data.batches import Batch, Loss, default_loss, forward, inputs_of, labels_of, output_tensor, size_of, token_mask
from secateur.errors import DataError
from secateur.models.loaded import Loaded
from secateur.progress import track
from secateur.sources import call, load_callable

log = logging.getLogger("secateur")

#: Quality of a model by name; higher is better unless the name says loss or perplexity.
Evaluate = Callable[[nn.Module], "dict[str, float]"]
IGNORED = -100  #: label of positions that do not count, as in torch's cross-entropy


def accuracy(batches: Iterable[Batch], topk: Sequence[int] = (1, 5)) -> Evaluate:
    """Share of samples whose label is the highest score (``accuracy``) and among the k highest (``top5``), 0..1.

    Scores are ``[batch, classes, ...]`` with whole labels ``[batch, ...]``; one score for each sample is that of class 1
    against class 0. Equal scores rank by index; a sample with a NaN score counts as wrong; a `k` that is not below the
    number of classes is left out. Labels of -100 do not count. Raises DataError for missing, fractional or impossible labels.
    """
    if not topk or min(topk) < 1:
        raise ValueError(f"topk must hold whole numbers from 1, got {topk!r}")

    def evaluate(model: nn.Module) -> dict[str, float]:
        hits, total, classes, seen = dict.fromkeys(topk, 0), 0, 2, set[int]()
        with evaluating(model):
            for batch in track(batches, "evaluate"):
                scores = output_tensor(forward(model, _without_labels(batch)))
                ranks, labels, classes = _ranks(scores, batch)
                total += len(ranks)
                seen |= set(labels.unique().tolist()) if len(seen) < 2 else set()
                for k in topk:
                    hits[k] += int((ranks < k).sum())
        if total == 0:
            raise DataError("accuracy: the data has no labelled sample")
        if len(seen) == 1 and total > 1:
            log.warning("all %d labels are of class %d: the accuracy says nothing of the others", total, seen.pop())
        return {_top_name(k): hits[k] / total for k in topk if k == 1 or k < classes}

    return evaluate


def perplexity(batches: Iterable[Batch]) -> Evaluate:
    """``exp`` of the mean negative log-likelihood of all predicted tokens, each token weighing the same.

    For mappings with ``input_ids`` (and tensors of tokens alone) position i predicts token i + 1; padding, by the attention
    mask, and labels of -100 do not count. For ``(inputs, labels)`` the labels are taken as shifted already. Key
    ``perplexity``; infinite where the model gives NaN.
    """

    def evaluate(model: nn.Module) -> dict[str, float]:
        total, count = 0.0, 0
        with evaluating(model):
            for batch in track(batches, "evaluate"):
                targets = _targets(batch)
                logits = output_tensor(forward(model, _without_labels(batch)))
                if logits.dim() != 3 or logits.shape[:2] != targets.shape:
                    shapes = f"logits {tuple(logits.shape)}, tokens {tuple(targets.shape)}"
                    raise DataError(f"perplexity needs a score for each word at each position: {shapes}")
                for row, target in zip(
                    logits, targets.to(logits.device), strict=True
                ):  # by sample: one row's float copy at a time
                    total += float(F.cross_entropy(row.float(), target, ignore_index=IGNORED, reduction="sum"))
                count += int((targets != IGNORED).sum())
        if count == 0:
            raise DataError("perplexity: the data has no token to predict")
        mean = total / count
        return {"perplexity": math.exp(mean) if mean < 700 else math.inf}

    return evaluate


def loss(batches: Iterable[Batch], loss: Loss | None = None) -> Evaluate:
    """Mean of ``loss(model, batch)`` over the samples; by default the model's own, else cross-entropy. Key ``loss``."""
    measure = loss or default_loss

    def evaluate(model: nn.Module) -> dict[str, float]:
        total, count = 0.0, 0
        with evaluating(model):
            for batch in track(batches, "evaluate"):
                size = size_of(batch)
                total += float(measure(model, batch)) * size
                count += size
        if count == 0:
            raise DataError("loss: the data gave no batches")
        return {"loss": total / count}

    return evaluate


def default_evaluator(loaded: Loaded, batches: Iterable[Batch]) -> Evaluate:
    """Perplexity for language models, similarity for pairs encoded apart, accuracy for whole labels, the loss for others.

    Raises DataError where the data has no labels, which leaves nothing to compare with.
    """
    if loaded.task == "text-lm":
        return perplexity(batches)
    from secateur.data.similarity import is_apart, similarity

    first = next(iter(batches), None)
    if is_apart(first):
        return similarity(batches)
    labels = labels_of(first) if first is not None else None
    if labels is None:
        raise DataError(
            f"{loaded.name or 'the model'} cannot be judged: its data has no labels. Give an evaluator of your own."
        )
    return loss(batches) if labels.is_floating_point() else accuracy(batches)


def load_evaluator(source: str) -> Evaluate:
    """The user's own: ``module:callable`` or ``file.py:callable``, called as ``callable(model, **options)``.

    It returns a float, which is then named after the callable, or a mapping of names to floats; else DataError.
    """
    function, parsed = load_callable(source, DataError)

    def evaluate(model: nn.Module) -> dict[str, float]:
        with evaluating(model):
            value = call(function, parsed, model)
        values = value if isinstance(value, Mapping) else {parsed.rest.rpartition(":")[2]: value}
        try:
            return {str(name): float(v) for name, v in values.items()}
        except (TypeError, ValueError) as error:
            raise DataError(
                f"{parsed.rest!r} returned {value!r:.100}; expected a float or a mapping of names to floats"
            ) from error

    return evaluate


def _ranks(scores: Tensor, batch: Batch) -> tuple[Tensor, Tensor, int]:
    """How many classes score above each label (ties: those before it), the labels that count, and the number of classes."""
    labels = labels_of(batch)
    if labels is None:
        raise DataError("accuracy needs labels: give (inputs, labels) or a mapping with 'labels'")
    if labels.is_floating_point() or labels.is_complex():
        raise DataError(f"accuracy needs whole labels, these are {labels.dtype}: use the loss or an evaluator of your own")
    if scores.dim() == labels.dim():
        scores = scores[:, None]
    if scores.dim() == 2 and scores.shape[1] == 1:
        scores = torch.cat((torch.zeros_like(scores), scores), 1)
    if scores.shape[:1] + scores.shape[2:] != labels.shape:
        raise DataError(f"scores of shape {tuple(scores.shape)} do not fit labels of shape {tuple(labels.shape)}")
    classes = scores.shape[1]
    scores = scores.movedim(1, -1).flatten(0, -2)
    labels = labels.to(scores.device).flatten().long()
    counted = labels != IGNORED
    scores, labels = scores[counted], labels[counted]
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        bad = int(labels.min()) if int(labels.min()) < 0 else int(labels.max())
        raise DataError(f"label {bad} is out of range: the model has {classes} classes, 0 to {classes - 1}")
    own = scores.gather(1, labels[:, None])
    before = torch.arange(classes, device=scores.device) < labels[:, None]
    ranks = ((scores > own) | ((scores == own) & before)).sum(1)
    return torch.where(scores.isnan().any(1), classes, ranks), labels, classes


def _targets(batch: Batch) -> Tensor:
    """The token that each position predicts, -100 where none counts: ``[batch, positions]``."""
    labels = labels_of(batch)
    if labels is not None and not isinstance(batch, Mapping):
        return labels.long()
    if isinstance(batch, Mapping):
        tokens = labels if labels is not None else batch.get("input_ids")
    else:
        tokens = inputs_of(batch)[0][0]
    if not isinstance(tokens, Tensor) or tokens.dim() != 2 or tokens.is_floating_point():
        raise DataError("perplexity needs tokens [batch, positions]: a mapping with input_ids, or (tokens, next tokens)")
    targets = torch.full_like(tokens, IGNORED, dtype=torch.long)
    targets[:, :-1] = tokens[:, 1:]
    mask = token_mask(batch)
    if mask is not None:
        targets[:, :-1][~(mask[:, 1:] & mask[:, :-1])] = IGNORED
    return targets


def _without_labels(batch: Batch) -> Batch:
    """The batch for a forward pass that is judged here: a model that gets labels computes a loss of its own too."""
    if isinstance(batch, Mapping) and isinstance(batch.get("labels"), Tensor):
        return {k: v for k, v in batch.items() if k != "labels"}
    return batch


def _top_name(k: int) -> str:
    return "accuracy" if k == 1 else f"top{k}"


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode and no gradients inside the block; every module's own mode is restored after it."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module, mode in training.items():
            module.training = mode
