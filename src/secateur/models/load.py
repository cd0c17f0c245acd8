"""`load_model`: one line of text in, a model ready to be pruned out."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from secateur.errors import ModelError
from secateur.models.loaded import Loaded
from secateur.models.registry import MODELS, note
from secateur.models.safety import seeded
from secateur.sources import CALLABLE, Source, parse_source

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64}


def load_model(source: str | os.PathLike[str], *, dtype: str | torch.dtype | None = None) -> Loaded:
    """Load the model that `source` names, in eval mode, on the CPU.

    Sources: ``hf:NAME_OR_DIR`` (``?gguf_file=x.gguf``), ``timm:NAME?pretrained=true``, ``torchvision:NAME?weights=DEFAULT``,
    ``module:callable?key=value``, ``file.py:callable``, and a directory that `secateur.save` wrote. `dtype` (or the option
    ``?dtype=bfloat16``) turns the floating-point weights into that type; without it they stay as they are stored. What
    is drawn at random while building is drawn from seed 0. No pickle is read and no code of a hub is run.

    Raises ModelError, naming the source, for whatever goes wrong, and MissingExtra where a package is not installed.

    Example::

        loaded = load_model("timm:resnet18?pretrained=true")
        loaded.model(loaded.example)
    """
    parsed = _parse(source)
    if parsed.select is not None:
        raise ModelError(f"the model source {str(source)!r} ends in a slice, which only data has")
    options = dict(parsed.options)
    wanted = _dtype(dtype if dtype is not None else options.get("dtype"))
    options.pop("dtype", None)
    entry = MODELS[parsed.kind]
    if not _takes_any(entry.make):
        entry.check_options("model source", options)
    given = {"dtype": wanted} if entry.facts.get("dtype") else {}
    with seeded():
        loaded = entry.make(replace(parsed, options=options), **options, **given)
    model = _checked(loaded.model, str(source)).eval()
    example = loaded.example
    if wanted is not None:
        model = model.to(wanted)
        example = _floats_to(example, wanted)
    return note(replace(loaded, model=model, example=example, source=_with_dtype(loaded.source, wanted)))


def _parse(source: str | os.PathLike[str]) -> Source:
    """The parsed source; a bare directory is an artifact."""
    text = os.fspath(source) if isinstance(source, os.PathLike) else source
    if isinstance(text, str) and os.path.isdir(text):
        return Source("artifact", text, error=ModelError)
    if isinstance(text, str) and ":" not in text and ("/" in text or os.sep in text):
        raise ModelError(
            f"no directory {text!r}. An artifact is a directory with secateur.json; for a hub's model write hf:{text}"
        )
    return parse_source(text, MODELS, ModelError)


def _dtype(value: Any) -> torch.dtype | None:
    if value is None or value in _DTYPES.values():
        return value
    name = str(value).removeprefix("torch.")
    if name not in _DTYPES:
        raise ModelError(f"dtype {value!r} is not one of {', '.join(_DTYPES)}")
    return _DTYPES[name]


def _takes_any(make: Any) -> bool:
    return any(p.kind is p.VAR_KEYWORD for p in inspect.signature(make).parameters.values())


def _checked(model: Any, source: str) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise ModelError(f"{source!r} gave a {type(model).__name__}; expected a torch.nn.Module")
    return model


def _floats_to(batch: Any, dtype: torch.dtype) -> Any:
    def cast(leaf: Any) -> Any:
        return leaf.to(dtype) if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() else leaf

    return {k: cast(v) for k, v in batch.items()} if isinstance(batch, Mapping) else pytree.tree_map(cast, batch)


def _with_dtype(source: str, dtype: torch.dtype | None) -> str:
    if dtype is None:
        return source
    parsed = parse_source(source, [*MODELS, CALLABLE], ModelError)
    return str(replace(parsed, options={**parsed.options, "dtype": str(dtype).removeprefix("torch.")}))
