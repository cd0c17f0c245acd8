"""Deployed models on disk: one safetensors file, and no pickle."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import ArtifactError
from secateur.runtime import fold
from secateur.runtime.modules import DepthwiseConv2d, SparseConv2d, SparseLayer, SparseLinear
from secateur.runtime.pool import SlicedMaxPool2d
from secateur.runtime.triton_matvec import TritonLinear

_KEY = "secateur.deployed"
_VERSION = 1
_KINDS: dict[str, Any] = {
    "linear": SparseLinear,
    "conv2d": SparseConv2d,
    "depthwise": DepthwiseConv2d,
    "pool": SlicedMaxPool2d,
}
_DTYPES = {str(d).removeprefix("torch."): d for d in (torch.float32, torch.bfloat16, torch.int8)}


def save(model: nn.Module, path: str | Path) -> None:
    """Write a model that `deploy` returned. `load` needs a fresh dense model of the same architecture to read it into.

    Layers that run on GPUs (2:4, Triton) are not saved: ArtifactError.
    """
    from safetensors.torch import save_file

    path = Path(path)
    if any(isinstance(module, TritonLinear) for module in model.modules()):
        raise ArtifactError("layers of the Triton kernel are made on their GPU and are not saved; save the dense model")
    names = {module: name for name, module in model.named_modules()}
    layers = {names[m]: _describe(m) for m in model.modules() if isinstance(m, (SparseLayer, DepthwiseConv2d, SlicedMaxPool2d))}
    summary = getattr(model, "summary", None)
    folded = [list(pair) for pair in summary.folded] if summary else []
    state: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        if tensor.layout != torch.strided or type(tensor) not in (Tensor, nn.Parameter):
            raise ArtifactError(
                f"{name!r} is a {type(tensor).__name__}, which only its own device can read; save the dense model"
            )
        state[name] = tensor.detach().contiguous().clone()
    fused = list(dict.fromkeys(layer.fused for layer in summary.layers if layer.fused)) if summary else []
    facts = json.dumps({"version": _VERSION, "layers": layers, "folded": folded, "fused": fused})
    temporary = path.with_name(path.name + ".partial")
    save_file(state, temporary, metadata={_KEY: facts})
    temporary.replace(path)


def load(path: str | Path, model: nn.Module) -> nn.Module:
    """Read a file of `save` into a copy of `model`, a dense model of the same architecture (its weights do not matter)."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            facts = (file.metadata() or {}).get(_KEY)
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ArtifactError(f"{path} cannot be read: {error}") from None
    if facts is None:
        raise ArtifactError(f"{path} holds no deployed model: secateur.runtime.save writes them")
    fast = copy.deepcopy(model).eval().requires_grad_(False)
    try:
        _rebuild(fast, json.loads(facts))
        fast.load_state_dict(state)
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ArtifactError(f"{path} does not fit this model: {error}") from None
    return fast


def _describe(layer: nn.Module) -> dict[str, Any]:
    if isinstance(layer, SparseLinear):
        values = str(layer.values).removeprefix("torch.")
        return {
            "type": "linear",
            "in_features": layer.in_features,
            "out_features": layer.out_features,
            "bias": layer.bias is not None,
            "kernel": layer.kernel,
            "block": layer.block,
            "values": values,
            "activation": layer.activation,
        }
    if isinstance(layer, SlicedMaxPool2d):
        return {"type": "pool"}
    assert isinstance(layer, (SparseConv2d, DepthwiseConv2d))
    common = {
        "stride": layer.geometry.stride,
        "padding": layer.geometry.padding,
        "dilation": layer.geometry.dilation,
        "padding_end": layer.geometry.padding_end,
        "bias": layer.bias is not None,
        "activation": layer.activation,
    }
    if isinstance(layer, DepthwiseConv2d):
        return {"type": "depthwise", "shape": tuple(layer.weight.shape), **common}
    return {"type": "conv2d", "shape": layer.shape, "groups": layer.groups, "block": layer.block, **common}


def _rebuild(model: nn.Module, facts: dict[str, Any]) -> None:
    if facts["version"] != _VERSION:
        raise ValueError(f"it was written in version {facts['version']} of the format, this is {_VERSION}")
    for layer, norm in facts["folded"]:
        fold.replace(model, model.get_submodule(norm), nn.Identity())
        dense: Any = model.get_submodule(layer)
        if dense.bias is None:
            dense.bias = nn.Parameter(torch.zeros(dense.weight.shape[0]), requires_grad=False)
    for name in facts["fused"]:
        fold.replace(model, model.get_submodule(name), nn.Identity())
    for name, options in facts["layers"].items():
        options = dict(options)
        kind = _KINDS[options.pop("type")]
        if "values" in options:
            options["values"] = _DTYPES[options["values"]]
        if name:
            fold.replace(model, model.get_submodule(name), kind(**options))
