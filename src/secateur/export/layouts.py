"""Weights in the layouts of others: compressed-tensors (bitmask and 2:4 bitmask), SciPy's CSR, plain safetensors."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from secateur.errors import ArtifactError, ExportError
from secateur.export.container import Container, Part, write
from secateur.export.state import state_of
from secateur.export.structure import keeps_n_of_m
from secateur.layers import find_layers
from secateur.runtime.formats import csr

CONFIG = "config.json"
_FORMATS = {"sparse-bitmask": "unstructured", "sparse-24-bitmask": "2:4"}


def write_safetensors(model: nn.Module, path: Path) -> None:
    """Every tensor dense, in one file that any safetensors reader opens."""
    write(path, [_part(name, tensor.detach()) for name, (_, tensor) in state_of(model).tensors.items()])


def write_compressed_tensors(model: nn.Module, folder: Path) -> str:
    """``model.safetensors`` and ``config.json`` as compressed-tensors 0.6 to 0.10 wrote them; returns the format's name.

    All sparse linear weights are in one format: "sparse-24-bitmask" where every one of them is 2:4, else "sparse-bitmask". A
    weight ``X.weight`` becomes ``X.shape``, ``X.compressed`` and ``X.bitmask`` (2:4), or ``X.weight.shape``, ``.compressed``,
    ``.bitmask`` and ``.row_offsets``. Raises ExportError where no linear weight has zeros.
    """
    linear = [n for n, la in find_layers(model)[0].items() if isinstance(la.module, nn.Linear) and la.parameter.dim() == 2]
    tensors = {name: tensor.detach() for name, (kind, tensor) in state_of(model).tensors.items() if kind != "transient"}
    sparse = [n for n in linear if n in tensors and n.endswith(".weight") and bool((tensors[n] == 0).any())]
    if not sparse:
        raise ExportError("no linear weight has a zero: there is nothing for compressed-tensors to leave out")
    two_four = all(keeps_n_of_m(tensors[n] != 0, 2, 4) for n in sparse)
    name = "sparse-24-bitmask" if two_four else "sparse-bitmask"
    parts: list[Part] = []
    for key, tensor in tensors.items():
        if key not in sparse:
            parts.append(_part(key, tensor))
        else:
            made = _two_four(key, tensor) if two_four else _bitmask(key, tensor)
            parts.extend(_part(k, t) for k, t in made.items())
    write(folder / "model.safetensors", parts)
    dense = [n.removesuffix(".weight") for n in linear if n not in sparse]
    zeros, total = (sum(count(tensors[n]) for n in sparse) for count in (lambda t: int((t == 0).sum()), torch.numel))
    config: dict[str, Any] = {
        "format": name,
        "sparsity_structure": _FORMATS[name],
        "global_sparsity": zeros / total,
        "targets": ["Linear"],
        "ignore": dense,
        "registry_requires_subclass": False,
    }
    own: Any = getattr(model, "config", None)
    base = own.to_dict() if hasattr(own, "to_dict") else {}
    base["quantization_config"] = {"quant_method": "compressed-tensors", "sparsity_config": config}
    (folder / CONFIG).write_text(json.dumps(base, indent=1, default=str), encoding="utf-8")
    return name


def read_compressed_tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """The dense tensors of a checkpoint in either layout, one at a time. Raises ArtifactError where its parts do not fit."""
    with Container.open(folder / "model.safetensors") as file:
        keys = set(file.entries)
        for key in file.entries:
            if key.endswith(".compressed"):
                stem = key.removesuffix(".compressed")
                name = stem if stem.endswith(".weight") else f"{stem}.weight"
                yield name, _dense(file, stem, name)
            elif not any(key.endswith(s) and key.removesuffix(s) + ".compressed" in keys for s in _SIDES):
                yield key, file.read(key)


def is_compressed_tensors(folder: Path) -> bool:
    """Whether a directory holds a checkpoint in one of the layouts."""
    try:
        with Container.open(folder / "model.safetensors") as file:
            masks = [k.removesuffix(".bitmask") for k in file.entries if k.endswith(".bitmask")]
            return any(f"{stem}.compressed" in file.entries for stem in masks)
    except ArtifactError:
        return False


def write_csr(model: nn.Module, folder: Path) -> None:
    """One ``NAME.npz`` for each weight that can be pruned, as ``scipy.sparse.load_npz`` reads them: ``[out, rest]``."""
    for name, layer in find_layers(model)[0].items():
        found = csr.to_csr(layer.canonical(layer.parameter.detach()).float().contiguous())
        np.savez_compressed(
            folder / f"{name}.npz", data=found.values.numpy(), indices=found.indices.numpy(), indptr=found.indptr.numpy(),
            shape=np.array(csr.matrix_shape(found.shape)), format=np.array(b"csr"), _is_array=np.array(True),
        )  # fmt: skip


def read_csr(path: Path) -> Tensor:
    """The dense matrix in a ``.npz`` of `write_csr` or of ``scipy.sparse.save_npz``. Raises ArtifactError for anything else."""
    try:
        with np.load(path, allow_pickle=False) as file:
            parts: Mapping[str, Any] = {key: file[key] for key in ("data", "indices", "indptr", "shape")}
        rows, cols = (int(x) for x in parts["shape"])
        found = [torch.from_numpy(np.ascontiguousarray(parts[k])) for k in ("indptr", "indices", "data")]
        return csr.from_csr(csr.Csr(found[0], found[1], found[2], (rows, cols)))
    except Exception as error:  # numpy and zipfile raise what their parsers happen to raise
        raise ArtifactError(f"{path} holds no CSR matrix ({type(error).__name__}: {str(error)[:200]})") from None


_SIDES = (".bitmask", ".shape", ".row_offsets")


def _part(key: str, tensor: Tensor) -> Part:
    return Part(key, tensor.dtype, tuple(tensor.shape), lambda: tensor.cpu().contiguous())


def _packed(mask: Tensor) -> Tensor:
    """``bool [rows, cols]`` -> ``uint8 [rows, ceil(cols / 8)]``, least significant bit first."""
    return torch.from_numpy(np.packbits(mask.cpu().numpy(), axis=-1, bitorder="little"))


def _bitmask(key: str, tensor: Tensor) -> dict[str, Tensor]:
    mask = tensor != 0
    counts = mask.sum(1)
    return {
        f"{key}.shape": torch.tensor(tensor.shape), f"{key}.compressed": tensor[mask], f"{key}.bitmask": _packed(mask),
        f"{key}.row_offsets": counts.cumsum(0) - counts,
    }  # fmt: skip


def _two_four(key: str, tensor: Tensor) -> dict[str, Tensor]:
    """Exactly two of each four are stored, zeros among them where more were removed."""
    stem = key.removesuffix(".weight")
    order = (tensor != 0).reshape(-1, 4).to(torch.uint8).argsort(dim=1, descending=True, stable=True)
    mask = torch.zeros(order.shape, dtype=torch.bool).scatter_(1, order[:, :2].cpu(), True).reshape(tensor.shape)
    values = tensor.cpu()[mask].reshape(tensor.shape[0], -1)
    return {
        f"{stem}.shape": torch.tensor(tensor.shape).reshape(-1, 1),
        f"{stem}.compressed": values,
        f"{stem}.bitmask": _packed(mask),
    }


def _dense(file: Container, stem: str, name: str) -> Tensor:
    for side in (".bitmask", ".shape"):
        if stem + side not in file.entries:
            raise ArtifactError(f"{file.name} lacks {stem + side!r}, which {name!r} needs")
    values, bits = file.read(f"{stem}.compressed").reshape(-1), file.read(f"{stem}.bitmask")
    shape = file.read(f"{stem}.shape").reshape(-1).tolist()
    if len(shape) != 2 or bits.dtype != torch.uint8 or list(bits.shape) != [shape[0], -(-shape[1] // 8)]:
        raise ArtifactError(f"{file.name}: the bitmask {list(bits.shape)} of {name!r} does not belong to a weight {shape}")
    mask = torch.from_numpy(np.unpackbits(bits.numpy(), axis=-1, count=shape[1], bitorder="little").view(np.bool_))
    if int(mask.sum()) != values.numel():
        raise ArtifactError(f"{file.name}: the bitmask of {name!r} keeps {int(mask.sum())} values, {values.numel()} are stored")
    dense = torch.zeros(shape, dtype=values.dtype)
    dense[mask] = values
    return dense
