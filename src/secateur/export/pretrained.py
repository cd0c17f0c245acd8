"""Whether `from_pretrained` of transformers rebuilds a cut model from its configuration alone."""

from __future__ import annotations

import copy
import logging
from typing import Any

import torch
from torch import nn

log = logging.getLogger("secateur")


def config_of(model: nn.Module) -> str | None:
    """The configuration of a transformers model as JSON, where its class builds this very model from it; None where not.

    The same model: the same modules with the same numbers in their attributes, parameters of the same shapes, and buffers
    that no state dict holds of the same values. `graph.fit_config` finds such a configuration for a cut model, if there is one.
    """
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "to_json_string") or not hasattr(type(model), "from_pretrained"):
        return None
    config = copy.deepcopy(config)
    try:
        with torch.device("meta"):
            same = _traits(type(model)(copy.deepcopy(config))) == _traits(model)
    except Exception as error:  # the model's own code raises what it happens to raise
        log.debug("%s cannot be built from its configuration: %s", type(model).__name__, error)
        return None
    if not same or not _same_buffers(model, config):
        return None
    config.architectures = [type(model).__name__]
    return str(config.to_json_string())


def _traits(model: nn.Module) -> dict[str, Any]:
    """What a model is, but for values: classes, numbers in attributes, shapes."""
    traits: dict[str, Any] = {name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False)}
    for path, module in model.named_modules():
        own = {k: v for k, v in vars(module).items() if not k.startswith("_") and k != "training"}
        numbers = {k: v for k, v in own.items() if isinstance(v, (int, float, tuple))}
        traits[f"{path}()"] = (type(module), numbers)
    return traits


def _same_buffers(model: nn.Module, config: Any) -> bool:
    stored = model.state_dict().keys()
    own = {name: buffer for name, buffer in model.named_buffers() if name not in stored}
    if not own:
        return True
    with torch.random.fork_rng(devices=[]):
        fresh = dict(type(model)(copy.deepcopy(config)).named_buffers())
    return all(n in fresh and fresh[n].shape == b.shape and torch.equal(fresh[n], b.cpu()) for n, b in own.items())
