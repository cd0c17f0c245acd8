"""``torchvision:NAME?weights=DEFAULT``: the model builders of torchvision."""

from __future__ import annotations

import inspect
from typing import Any

import torch

from secateur.errors import ModelError, did_you_mean
from secateur.models.loaded import ImageInput, Loaded, Task
from secateur.models.registry import MODELS
from secateur.models.safety import no_pickle
from secateur.models.torchvision_shim import import_torchvision
from secateur.sources import Source, blaming


@MODELS.register("torchvision", source="torchvision.models.get_model")
def from_torchvision(source: Source, *, weights: str | None = None, **options: Any) -> Loaded:
    """``torchvision:NAME?weights=DEFAULT``: a torchvision model, with weights only where asked for (they are downloaded)."""
    torchvision = import_torchvision("a torchvision: model")
    known = torchvision.models.list_models()
    if source.rest not in known:
        near = did_you_mean(source.rest, known)
        raise ModelError(f"torchvision has no model {source.rest!r}{near} `torchvision.models.list_models()` lists all.")
    chosen = _weights(torchvision, source.rest, weights)
    builder = torchvision.models.get_model_builder(source.rest)
    if "weights_backbone" in inspect.signature(builder).parameters:
        options.setdefault("weights_backbone", None)  # its default would download, though no weights were asked for
    with no_pickle(), blaming(f"torchvision's {source.rest}", ModelError):
        model = builder(weights=chosen, **options)
    image = _image(torchvision, chosen or _default_weights(torchvision, source.rest))
    example = None if image is None else torch.zeros(1, image.channels, *image.size)
    task: Task = "other" if image is None else "image"
    return Loaded(model, source=str(source), name=source.rest, task=task, example=example, image=image)


def _weights(torchvision: Any, name: str, weights: str | None) -> Any:
    if weights is None:
        return None
    choices = torchvision.models.get_model_weights(name)
    if weights not in choices.__members__:
        near = did_you_mean(str(weights), choices.__members__)
        raise ModelError(f"torchvision's {name} has no weights {weights!r}{near} Known: {', '.join(choices.__members__)}.")
    return choices[weights]


def _default_weights(torchvision: Any, name: str) -> Any:
    choices = torchvision.models.get_model_weights(name)
    return choices.DEFAULT if len(choices) else None


def _image(torchvision: Any, weights: Any) -> ImageInput | None:
    """The preprocessing that weights were made for, where it is that of image classification."""
    if weights is None:
        return None
    transform = weights.transforms()
    if type(transform).__name__ != "ImageClassification":
        return None
    side = transform.crop_size[0]
    mean, std = tuple(transform.mean), tuple(transform.std)
    return ImageInput((side, side), len(mean), mean, std, transform.resize_size[0], transform.interpolation.value)
