"""The configuration of a cut transformers model, so that `from_pretrained` builds the same shapes again."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from secateur.errors import ModelError
from secateur.graph.trace import Node, Value, record

log = logging.getLogger("secateur")

_SIZES = ("size", "dim", "heads", "embd", "inner", "d_model", "d_ff", "d_kv", "channels", "filters", "width", "rank")


def fit_config(model: nn.Module, original: Mapping[str, torch.Size], example: Any) -> dict[str, int]:
    """Give the configuration of a cut model sizes from which its class builds the very model it is.

    `original` holds the shapes of the uncut model's parameters. Sizes are searched one after the other among those that
    some parameter shrank by, and each try builds the model on the meta device; nothing is guessed from names of layers. A
    configuration is right where all parameters have the same shapes, the forward on `example` consists of the same
    operations on the same sizes and numbers, and the buffers that no state dict holds have the same values.
    Returns the sizes that changed. Raises ModelError where no configuration says what the model is: layers that differ in
    width, or heads that no longer fill the width. Such a model is loaded with its plan instead.

    In short: ``before = {name: p.shape for name, p in model.named_parameters()}``, cut the model, then
    ``fit_config(smaller, before, example)``, which gives for example ``{'intermediate_size': 48}``.
    """
    config: Any = model.config
    search = _Search(model, config, example)
    old = {k: v for k, v in vars(config).items() if type(v) is int and v > 1 and any(s in k for s in _SIZES)}
    fractions = search.fractions(original)
    best, left = dict(old), search.mismatches(old)
    improved = True
    while left and improved:
        improved = False
        for key in old:
            for value in [round(old[key] * f) for f in fractions if abs(round(old[key] * f) - old[key] * f) < 1e-6]:
                count = search.mismatches({**best, key: value})
                if count < left:
                    best, left, improved = {**best, key: value}, count, True
    if left or not search.same_buffers(best):
        raise ModelError(
            f"no configuration of {type(model).__name__} builds this model: {left} parameters or operations would differ. "
            f"Save it with its plan, or cut every layer to the same width."
        )
    changed = {k: v for k, v in best.items() if v != old[k]}
    for key, value in changed.items():
        setattr(config, key, value)
    return changed


def describe_config(model: nn.Module, original: Mapping[str, torch.Size], example: Any) -> str | None:
    """`fit_config` of a transformers model that was cut, and a sentence that says what came of it; None for other models."""
    if not hasattr(getattr(model, "config", None), "to_json_string") or not hasattr(type(model), "from_pretrained"):
        return None
    try:
        changed = fit_config(model, original, example)
    except ModelError as error:
        return str(error)
    told = ", ".join(f"{key}={value}" for key, value in changed.items()) or "as it was"
    return f"its configuration builds it ({told}), so that from_pretrained loads what sc.save writes"


class _Search:
    """Models built from tried configurations, compared with the one that is wanted."""

    def __init__(self, model: nn.Module, config: Any, example: Any):
        self.model, self.config, self.example = model, config, example
        self.shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        self.forward = [_signature(node) for node in record(model, example).nodes]

    def fractions(self, original: Mapping[str, torch.Size]) -> list[float]:
        """By how much dimensions shrank, and 1."""
        pairs = [(new, old) for name, shape in self.shapes.items() for new, old in zip(shape, original[name], strict=True)]
        return sorted({new / old for new, old in pairs} | {1.0})

    def build(self, values: Mapping[str, int]) -> nn.Module:
        """A fresh model with these values in its configuration."""
        config = copy.deepcopy(self.config)
        for key, value in values.items():
            setattr(config, key, value)
        return type(self.model)(config).train(self.model.training)

    def mismatches(self, values: Mapping[str, int]) -> int:
        """How many parameters have another shape; 1 where only the forward does other things."""
        try:
            with torch.device("meta"):
                fresh = self.build(values)
        except (ValueError, RuntimeError, ZeroDivisionError, AssertionError) as error:
            log.debug("%s refuses %s: %s", type(self.model).__name__, dict(values), error)
            return len(self.shapes) + 1
        shapes = {name: tuple(p.shape) for name, p in fresh.named_parameters()}
        wrong = sum(shapes.get(name) != shape for name, shape in self.shapes.items()) + len(shapes.keys() - self.shapes.keys())
        if wrong:
            return 1 + wrong
        return int([_signature(node) for node in record(fresh, self.example).nodes] != self.forward)

    def same_buffers(self, values: Mapping[str, int]) -> bool:
        """Whether the buffers that a state dict does not hold come out the same."""
        with torch.random.fork_rng(devices=[]):
            fresh = dict(self.build(values).named_buffers())
        stored = self.model.state_dict().keys()
        own = {name: b for name, b in self.model.named_buffers() if name not in stored}
        return all(
            name in fresh and fresh[name].shape == b.shape and torch.equal(fresh[name], b.cpu()) for name, b in own.items()
        )


def _signature(node: Node) -> str:
    """An operation and all it was given, tensors by their shapes."""

    def show(x: Any) -> str:
        if isinstance(x, Value):
            return str(x.shape)
        if isinstance(x, (tuple, list)):
            return f"[{', '.join(map(show, x))}]"
        return "" if isinstance(x, (torch.device, torch.layout)) else str(x)

    return f"{node.op} {show(node.args)} {show(sorted(node.kwargs.items()))}"
