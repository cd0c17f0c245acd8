"""Masks on disk: one bit for each weight, in a safetensors file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import BoolTensor, Tensor

from secateur.errors import ArtifactError
from secateur.export import container
from secateur.export.container import Container, Part
from secateur.export.reader import Artifact
from secateur.export.state import State
from secateur.runtime.formats import bitmask
from secateur.types import MaskSet

_BITS, _SHAPE = "::bits", "::shape"


def save_masks(masks: Mapping[str, Tensor], path: str | os.PathLike[str]) -> Path:
    """Write masks (bool, True = kept) to one safetensors file, bit-packed; returns its path.

    For each name the file has ``NAME::bits`` (uint8, least significant bit first, row-major) and ``NAME::shape``. An
    existing file is replaced in one step. Raises ArtifactError where the file cannot be written.

    >>> save_masks(result.masks, "masks.safetensors")   # doctest: +SKIP
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        temporary.unlink(missing_ok=True)
        container.write(temporary, _parts(masks))
        os.replace(temporary, path)
    except OSError as error:
        raise ArtifactError(f"the masks cannot be written to {path}: {error.strerror}") from error
    finally:
        temporary.unlink(missing_ok=True)
    return path


def load_masks(path: str | os.PathLike[str]) -> MaskSet:
    """The masks in a file that `save_masks` wrote, or in an artifact directory. Raises ArtifactError for anything else."""
    path = Path(path)
    if path.is_dir():
        with Artifact(path) as artifact:
            return _artifact_masks(artifact)
    with Container.open(path) as file:
        return MaskSet(_decoded(file))


def mask_parts(masks: Mapping[str, Tensor], state: State) -> tuple[dict[str, Literal["nonzero", "stored"]], list[Part]]:
    """How `sc.save` keeps masks: by name whether the weight's nonzeros show it, and the parts of those that must be stored.

    Raises ArtifactError for a mask without its tensor, of another shape, or that removes weights which are not zero.
    """
    table: dict[str, Literal["nonzero", "stored"]] = {}
    stored: dict[str, Tensor] = {}
    for name, mask in masks.items():
        first = state.aliases.get(name, name)
        if first not in state.tensors:
            raise ArtifactError(f"there is a mask for {name!r}, but the model has no such parameter")
        weight = state.tensors[first][1].detach()
        if mask.dtype != torch.bool or mask.shape != weight.shape:
            raise ArtifactError(f"the mask of {name!r} must be bool {list(weight.shape)}, got {mask.dtype} {list(mask.shape)}")
        nonzero, kept = weight != 0, mask.to(weight.device)
        if leaks := int((nonzero & ~kept).sum()):
            raise ArtifactError(f"{leaks} weights of {name!r} are removed by its mask but are not zero: apply the masks first")
        table[name] = "nonzero" if torch.equal(nonzero, kept) else "stored"
        if table[name] == "stored":
            stored[name] = mask
    return table, _parts(stored) if stored else []


def _artifact_masks(artifact: Artifact) -> MaskSet:
    table, aliases = artifact.manifest.masks, artifact.manifest.aliases
    masks: dict[str, Tensor] = {}
    if "stored" in table.values():
        with artifact.masks_file() as file:
            masks = {name: mask for name, mask in _decoded(file).items() if table.get(name) == "stored"}
    wanted = {aliases.get(name, name) for name, how in table.items() if how == "nonzero"}
    shown = {name: tensor != 0 for name, tensor in artifact.tensors() if name in wanted} if wanted else {}
    masks.update({name: shown[aliases.get(name, name)] for name, how in table.items() if how == "nonzero"})
    if missing := table.keys() - masks.keys():
        raise ArtifactError(f"{artifact.path} lacks the stored mask of {min(missing)!r}")
    for name, mask in masks.items():
        shape = artifact.manifest.tensors[aliases.get(name, name)].shape
        if list(mask.shape) != shape:
            raise ArtifactError(f"{artifact.path}: the mask of {name!r} is {list(mask.shape)}, its tensor {shape}")
    return MaskSet({name: masks[name] for name in table})


def _parts(masks: Mapping[str, Tensor]) -> list[Part]:
    parts = []
    for name, mask in masks.items():
        if mask.dtype != torch.bool:
            raise ArtifactError(f"the mask of {name!r} must be a bool tensor, got {mask.dtype}")
        shape = torch.tensor(mask.shape, dtype=torch.int64)
        parts.append(Part(name + _BITS, torch.uint8, (-(-mask.numel() // 8),), partial(bitmask.pack_mask, mask)))
        parts.append(Part(name + _SHAPE, torch.int64, (mask.dim(),), partial(torch.clone, shape)))
    return parts


def _decoded(file: Container) -> dict[str, BoolTensor]:
    names = [key.removesuffix(_BITS) for key in file.entries if key.endswith(_BITS)]
    if len(names) * 2 != len(file.entries):
        raise ArtifactError(f"{file.name} is not a file of masks: it must hold NAME{_BITS} and NAME{_SHAPE} for each mask")
    masks = {}
    for name in names:
        entry = file.entries.get(name + _SHAPE)
        if entry is None or entry.dtype != torch.int64 or len(entry.shape) != 1 or entry.shape[0] > 64:
            raise ArtifactError(f"{file.name}: the mask {name!r} has no proper {_SHAPE}")
        shape = file.read(name + _SHAPE).tolist()
        if any(d < 0 for d in shape) or container.elements(shape) is None:
            raise ArtifactError(f"{file.name}: the mask {name!r} has an impossible shape: {str(shape)[:200]}")
        bits = file.read(name + _BITS)
        try:
            masks[name] = bitmask.unpack_mask(bits, shape)
        except ValueError as error:
            raise ArtifactError(f"{file.name}: the mask {name!r} is broken: {error}") from None
    return masks
