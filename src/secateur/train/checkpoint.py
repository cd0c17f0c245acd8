"""State of a training run in one file: safetensors with the structure as JSON in its header. No pickle."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from secateur.errors import ArtifactError

_KEY = "secateur_state"
_HEADER_LIMIT = 10_000_000  # a header is parsed before anything is checked: a hostile one of 80 MB costs half a gigabyte


def save_state(path: Path, state: Any) -> None:
    """Write nested dicts, lists and tuples of tensors, numbers, strings, bools and None to `path`.

    The file is written beside its place, synced and renamed, so that a kill at any moment leaves the old one or the new
    one. Raises ArtifactError where it cannot be written, TypeError for anything else inside `state`.
    """
    tensors: dict[str, Tensor] = {}
    structure = json.dumps(_pack(state, tensors))
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, temporary, metadata={_KEY: structure})
        _sync(temporary)
        os.replace(temporary, path)
        _sync(path.parent)
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        raise ArtifactError(
            f"cannot write the checkpoint {path}: {error}. The old one is untouched; free space or choose another path."
        ) from error


def load_state(path: Path) -> Any:
    """What `save_state` wrote, tensors on the CPU. Raises ArtifactError where the file is missing, broken or another's."""
    try:
        with open(path, "rb") as file:
            header = int.from_bytes(file.read(8), "little")
        if header > _HEADER_LIMIT:
            raise ArtifactError(f"{path} is no checkpoint of ours: its header claims {header} bytes")
        with safe_open(path, framework="pt") as file:
            structure = (file.metadata() or {}).get(_KEY)
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - it is no dict
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"cannot read the checkpoint {path}: {error}. Delete it to start again.") from error
    if structure is None:
        raise ArtifactError(f"{path} is a safetensors file, but no checkpoint of ours. Choose another path for the checkpoint.")
    try:
        return _unpack(json.loads(structure), tensors)
    except (ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"the checkpoint {path} is broken: {error!r}. Delete it to start again.") from error


def _pack(value: Any, tensors: dict[str, Tensor]) -> Any:
    """JSON for `value`: containers become ``{kind: content}``, since JSON has neither tuples nor keys that are numbers."""
    if isinstance(value, Tensor):
        key = str(len(tensors))
        tensors[key] = value.detach().to("cpu", copy=True).contiguous()
        return {"tensor": key}
    if isinstance(value, dict):
        return {"dict": [[_pack(k, tensors), _pack(v, tensors)] for k, v in value.items()]}
    if isinstance(value, (list, tuple)):
        return {"tuple" if isinstance(value, tuple) else "list": [_pack(v, tensors) for v in value]}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(
        f"a {type(value).__name__} cannot be kept in a checkpoint: only tensors, numbers, strings and containers of them"
    )


def _unpack(value: Any, tensors: dict[str, Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {_unpack(k, tensors): _unpack(v, tensors) for k, v in content}
    items = [_unpack(v, tensors) for v in content]
    return tuple(items) if kind == "tuple" else items


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
