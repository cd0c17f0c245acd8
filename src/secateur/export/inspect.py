"""`inspect`: the truth about a checkpoint, whoever wrote it."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur.coding.packed import PackedFile
from secateur.errors import ArtifactError
from secateur.export import manifest
from secateur.export.container import Container, parse_json
from secateur.export.layouts import is_compressed_tensors, read_compressed_tensors, read_csr
from secateur.export.reader import Artifact
from secateur.export.runners import need
from secateur.export.structure import TensorInfo, look
from secateur.progress import track

_INDEX_CAP = 64_000_000  # bytes of a shard index that are read at most
_TORCH_ENDINGS = {".pt", ".pth", ".bin", ".ckpt"}


@dataclass(frozen=True)
class Inspection:
    """What `inspect` found: every tensor in the checkpoint's order, and the sums."""

    path: str
    #: "artifact", "packed", "safetensors", "sharded safetensors", "compressed-tensors", "csr", "onnx", "openvino" or "torch"
    kind: str
    bytes_disk: int  #: of the files that hold the tensors
    aliases: Mapping[str, str]  #: further name of a tied tensor -> name
    tensors: tuple[TensorInfo, ...]

    @property
    def elements(self) -> int:
        """Values, over all tensors."""
        return sum(t.elements for t in self.tensors)

    @property
    def zeros(self) -> int:
        """Zeros, over all tensors."""
        return sum(t.zeros for t in self.tensors)

    @property
    def sparsity(self) -> float:
        """Fraction of zeros, over all tensors."""
        return self.zeros / self.elements if self.elements else 0.0

    @property
    def bytes_best(self) -> int:
        """Bytes with each tensor in the smaller of dense and bitmask: what `sc.save` would write."""
        return sum(min(t.bytes_dense, t.bytes_bitmask) for t in self.tensors)

    @property
    def collapsed(self) -> tuple[str, ...]:
        """Names of matrices and kernels that are all zero or all the same. Vectors are often constant for good reason."""
        return tuple(t.name for t in self.tensors if t.collapsed and len(t.shape) >= 2)

    @property
    def broken(self) -> tuple[str, ...]:
        """Names of tensors with NaN or infinite values."""
        return tuple(t.name for t in self.tensors if t.nan or t.inf)

    def to_json(self) -> dict[str, Any]:
        """Plain lists and dicts, ready for json.dumps."""
        totals: dict[str, Any] = {
            key: getattr(self, key) for key in ("elements", "zeros", "sparsity", "bytes_disk", "bytes_best")
        }
        for key in ("bytes_dense", "bytes_bitmask", "bytes_csr"):
            totals[key] = sum(getattr(t, key) for t in self.tensors)
        return {
            "path": self.path,
            "kind": self.kind,
            "totals": {**totals, "tensors": len(self.tensors)},
            "collapsed": list(self.collapsed),
            "broken": list(self.broken),
            "aliases": dict(self.aliases),
            "tensors": [{**t.to_json(), "shape": list(t.shape), "patterns": list(t.patterns)} for t in self.tensors],
        }


@dataclass(frozen=True)
class _Checkpoint:
    kind: str
    files: tuple[Path, ...]
    tensors: Iterator[tuple[str, Tensor]]
    count: int | None
    aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)


def inspect(path: str | os.PathLike[str]) -> Inspection:
    """Look at every tensor of a checkpoint, one at a time.

    `path` is an artifact directory, a ``.safetensors`` file, a Hugging Face directory (one file or shards with their
    index), what `sc.export` writes (ONNX, OpenVINO, CSR, compressed-tensors), a packed file, or a state dict saved by torch
    (``.pt``, ``.pth``, ``.bin``, ``.ckpt``; read with ``weights_only=True``, so that no code in it runs). Raises
    ArtifactError for anything else and for files that are damaged.

    >>> inspect("runs/first").sparsity            # doctest: +SKIP
    0.9
    """
    path = Path(path)
    found = _opened(path)
    infos = tuple(look(name, tensor) for name, tensor in track(found.tensors, "inspecting", found.count))
    size = sum(file.stat().st_size for file in found.files)
    return Inspection(str(path), found.kind, size, found.aliases, infos)


def _opened(path: Path) -> _Checkpoint:
    if path.is_dir():
        return _directory(path)
    if not path.exists():
        if (path.parent / f".{path.name}.secateur-old").is_dir():
            return _artifact(path)
        raise ArtifactError(f"{path} does not exist")
    if path.suffix == ".safetensors":
        return _safetensors("safetensors", (path,))
    if path.suffix in _TORCH_ENDINGS:
        return _torch((path,))
    if path.suffix in _OTHERS:
        return _OTHERS[path.suffix](path)
    endings = ", ".join((".safetensors", *sorted(_TORCH_ENDINGS), *_OTHERS))
    raise ArtifactError(f"{path} is no checkpoint that can be inspected; expected a directory or a file ending in {endings}")


def _directory(path: Path) -> _Checkpoint:
    if (path / manifest.NAME).exists():
        return _artifact(path)
    if (path / "model.safetensors").exists() and is_compressed_tensors(path):
        return _Checkpoint("compressed-tensors", (path / "model.safetensors",), read_compressed_tensors(path), None)
    for name, read in (("model.onnx", _onnx), ("model.xml", _openvino)):
        if (path / name).exists():
            return read(path / name)
    if files := tuple(sorted(path.glob("*.npz"))):
        return _Checkpoint("csr", files, ((file.stem, read_csr(file)) for file in files), len(files))
    indexes = sorted(path.glob("*.safetensors.index.json"))
    if indexes:
        return _sharded(indexes[0])
    files = tuple(sorted(path.glob("*.safetensors")))
    if files:
        return _safetensors("safetensors" if len(files) == 1 else "sharded safetensors", files)
    files = tuple(sorted(file for file in path.iterdir() if file.suffix in _TORCH_ENDINGS))
    if files:
        return _torch(files)
    raise ArtifactError(f"{path} holds no {manifest.NAME}, no .safetensors file and no torch state dict")


def _artifact(path: Path) -> _Checkpoint:
    with Artifact(path) as artifact:
        found = artifact.manifest

    def tensors() -> Iterator[tuple[str, Tensor]]:
        with Artifact(path) as artifact:
            yield from artifact.tensors()

    return _Checkpoint("artifact", (path / found.weights,), tensors(), len(found.tensors), found.aliases)


def _safetensors(kind: str, files: tuple[Path, ...], expected: Mapping[str, str] | None = None) -> _Checkpoint:
    """Tensors of one or several files. `expected` is the index: name -> file name."""
    headers = {}
    for file in files:
        with Container.open(file) as container:
            headers[file] = list(container.entries)
    for name, file_name in (expected or {}).items():
        if name not in headers[files[0].parent / file_name]:
            raise ArtifactError(f"{files[0].parent / file_name} lacks the tensor {name!r}, which the index places there")

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for file, names in headers.items():
            with Container.open(file) as container:
                for name in names:
                    yield name, container.read(name)

    return _Checkpoint(kind, files, tensors(), sum(len(names) for names in headers.values()))


def _sharded(index: Path) -> _Checkpoint:
    if index.stat().st_size > _INDEX_CAP:
        raise ArtifactError(f"{index} has {index.stat().st_size} bytes; at most {_INDEX_CAP} are read")
    content = parse_json(index.read_bytes(), str(index), containers=1000)
    table = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(table, dict) or not table or not all(isinstance(v, str) for v in table.values()):
        raise ArtifactError(f"{index} has no weight_map of tensor names to files")
    for name in set(table.values()):
        manifest.check_file_name(name)
    return _safetensors("sharded safetensors", tuple(index.parent / name for name in sorted(set(table.values()))), table)


def _packed(path: Path) -> _Checkpoint:
    with PackedFile.open(path) as file:
        count = len(file.entries)

    def tensors() -> Iterator[tuple[str, Tensor]]:
        with PackedFile.open(path) as file:
            yield from file.tensors()

    return _Checkpoint("packed", (path,), tensors(), count)


def _csr(path: Path) -> _Checkpoint:
    return _Checkpoint("csr", (path,), iter([(path.stem, read_csr(path))]), 1)


def _onnx(path: Path) -> _Checkpoint:
    """The initialisers of an ONNX file; int8 weights of Q/DQ nodes are shown as they are stored."""
    onnx = need("onnx", "onnx", "inspecting an ONNX file")
    try:
        found = onnx.load(str(path)).graph.initializer
        tensors = {t.name: torch.from_numpy(onnx.numpy_helper.to_array(t).copy()) for t in found if t.data_type not in (8,)}
    except Exception as error:  # protobuf raises what its parser happens to raise
        raise ArtifactError(f"{path} is no ONNX file ({type(error).__name__}: {str(error)[:200]})") from None
    return _Checkpoint("onnx", (path,), iter(tensors.items()), len(tensors))


def _openvino(path: Path) -> _Checkpoint:
    """The constants of an OpenVINO model that are matrices or kernels, and vectors as long as they have a name."""
    openvino = need("openvino", "openvino", "inspecting an OpenVINO model")
    try:
        operations = openvino.Core().read_model(str(path)).get_ops()
    except RuntimeError as error:
        raise ArtifactError(f"{path} is no OpenVINO model ({str(error)[:200]})") from None
    tensors = {
        op.get_friendly_name(): torch.from_numpy(op.data.copy())
        for op in operations
        if op.get_type_name() == "Constant" and op.data.ndim and op.data.dtype.kind in "fiu"
    }
    return _Checkpoint("openvino", (path, path.with_suffix(".bin")), iter(tensors.items()), len(tensors))


_OTHERS: dict[str, Callable[[Path], _Checkpoint]] = {".packed": _packed, ".npz": _csr, ".onnx": _onnx, ".xml": _openvino}


def _torch(files: tuple[Path, ...]) -> _Checkpoint:
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    for file in files:
        try:
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=_is_zip(file))
        except Exception as error:  # torch raises what its parsers happen to raise
            reason = str(error).split("\n")[0][:300]
            raise ArtifactError(
                f"{file} cannot be read as a state dict without running code in it ({type(error).__name__}: {reason}). "
                "Save the model's state_dict() instead of the model."
            ) from None
        _collect(content, "", tensors, aliases, {}, 0)
    if not tensors:
        raise ArtifactError(f"{files[0]} holds no tensors")
    return _Checkpoint("torch", files, iter(tensors.items()), len(tensors), aliases)


def _collect(
    content: Any, prefix: str, tensors: dict[str, Tensor], aliases: dict[str, str], seen: dict[Any, str], depth: int
) -> None:
    """The dense tensors in nested dicts and lists, by dotted name; the same memory under a second name is an alias."""
    if isinstance(content, Tensor):
        name = prefix or "tensor"
        if content.layout != torch.strided or content.is_quantized or content.is_meta:
            raise ArtifactError(f"the tensor {name!r} is not plain and dense ({content.layout}, {content.dtype})")
        key = (content.data_ptr(), content.dtype, tuple(content.shape), content.stride()) if content.numel() else id(content)
        if key in seen:
            aliases[name] = seen[key]
        else:
            seen[key] = name
            tensors[name] = content.detach()
    elif isinstance(content, (Mapping, list, tuple)) and depth < 20:
        items = content.items() if isinstance(content, Mapping) else enumerate(content)
        for key, value in items:
            _collect(value, f"{prefix}.{key}" if prefix else str(key), tensors, aliases, seen, depth + 1)


def _is_zip(file: Path) -> bool:
    """Whether torch can map the file into memory: its format since 1.6 is a zip archive."""
    with open(file, "rb") as opened:
        return opened.read(4) == b"PK\x03\x04"
