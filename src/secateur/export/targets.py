"""`export`: a model in the format of another runtime, compared with the original before it is handed out."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import nn

from secateur.data.batches import Batch
from secateur.errors import ArtifactError, ExportError, did_you_mean
from secateur.export import layouts, runners
from secateur.export.atomic import replacing, replacing_file
from secateur.export.parity import Check, Example, Runner, compare, run_model
from secateur.export.structure import keeps_n_of_m
from secateur.layers import find_layers

MARK = "secateur-export.json"  #: in every directory that is written here, so that it may be replaced later
_SUFFIXES = {".onnx": "onnx", ".pt2": "torch", ".pte": "executorch", ".safetensors": "safetensors"}


@dataclass(frozen=True)
class Exported:
    """What was written, and how near it is to the model."""

    path: Path
    to: str
    checks: tuple[Check, ...] = ()  #: relative difference of the outputs at each batch size; empty for formats that only store
    notes: tuple[str, ...] = ()
    command: str | None = None  #: what to type next, for TensorRT


def export(
    model: nn.Module,
    path: str | Path,
    *,
    to: str | None = None,
    example: Batch | None = None,
    int8: Iterable[Batch] | None = None,
    opset: int = runners.OPSET,
    tolerance: float = 1e-4,
    overwrite: bool = False,
) -> Exported:
    """Write `model` for another runtime, load it from another directory, and compare outputs at batch 1, 2 and 7.

    Args:
        model: left untouched; exported in evaluation mode.
        path: a file (onnx, torch, executorch, safetensors) or a directory (openvino, tensorrt, hf, compressed-tensors, csr).
        to: the format; told by the suffix of `path` where it is not given.
        example: a batch to trace with, for all formats that run. Batches may then be of any size, token sequences of any
            length.
        int8: calibration batches. For onnx and tensorrt: Q/DQ nodes, per channel, zeros stay zero. The outputs then differ by
            more than rounding, so the difference is said and not judged.
        opset: of ONNX.
        tolerance: of the outputs' largest difference, relative to the largest output.
        overwrite: replace what was written before.

    Raises:
        MissingExtra: with the line that installs what is missing. ExportError: an operator that the format cannot express, by
            name; outputs that differ. ArtifactError: a target that exists or cannot be written. Nothing is left behind then.

    Example::

        sc.export(model, "model.onnx", example=x)
    """
    path = Path(path)
    kind = _kind(path, to)
    maker = _MAKERS[kind]
    given = None if example is None else Example.of(example)
    if kind in _RUNNABLE and given is None:
        raise ExportError(f"export to {kind} follows the model on an example: pass example=, a batch of inputs")
    if int8 is not None and kind not in ("onnx", "tensorrt"):
        raise ExportError(f"int8= is for onnx and tensorrt, which carry it as Q/DQ nodes; {kind} does not")
    wanted = _Wanted(given, int8, opset, tolerance)
    if kind in _SUFFIXES.values():
        with replacing_file(path, overwrite=overwrite) as fresh:
            return replace(maker(model, fresh, wanted), path=path)
    with replacing(path, overwrite=overwrite, sizes=[], foreign=_foreign) as folder:
        found = replace(maker(model, folder, wanted), path=path)
        (folder / MARK).write_text(json.dumps({"to": kind, "checks": [asdict(c) for c in found.checks]}), encoding="utf-8")
    return found


@dataclass(frozen=True)
class _Wanted:
    """What the caller asked for."""

    example: Example | None
    int8: Iterable[Batch] | None
    opset: int
    tolerance: float

    def checked(self, model: nn.Module, file: Path, runner: Callable[[Path], Runner], what: str) -> tuple[Check, ...]:
        """Copy what was written to another directory, load it there, and compare."""
        assert self.example is not None
        with tempfile.TemporaryDirectory() as elsewhere:
            for part in file.parent.glob(f"{file.stem}*"):
                shutil.copy(part, elsewhere)
            tolerance = self.tolerance if self.int8 is None else float("inf")
            return compare(model, runner(Path(elsewhere) / file.name), self.example, tolerance=tolerance, what=what)


def _kind(path: Path, to: str | None) -> str:
    kind = to or _SUFFIXES.get(path.suffix)
    if kind is None:
        raise ExportError(f"what {str(path)!r} should be is not told by its suffix: pass to=, one of {', '.join(_MAKERS)}")
    if kind not in _MAKERS:
        raise ExportError(f"unknown format {kind!r}{did_you_mean(kind, _MAKERS)} Known: {', '.join(_MAKERS)}.")
    return kind


def _foreign(folder: Path) -> str | None:
    return None if (folder / MARK).is_file() else f"it holds no {MARK}, so it was not written by an export"


def _torch(model: nn.Module, file: Path, wanted: _Wanted) -> Exported:
    assert wanted.example is not None
    runners.to_torch(model, wanted.example, file)
    return Exported(file, "torch", wanted.checked(model, file, runners.run_torch, "program"))


def _onnx(model: nn.Module, file: Path, wanted: _Wanted) -> Exported:
    assert wanted.example is not None
    if wanted.int8 is None:
        runners.to_onnx(model, wanted.example, file, opset=wanted.opset)
    else:
        with tempfile.TemporaryDirectory() as folder:
            plain = Path(folder) / "float.onnx"
            runners.to_onnx(model, wanted.example, plain, opset=wanted.opset)
            runners.quantise_onnx(plain, file, wanted.int8)
    checks = wanted.checked(model, file, runners.run_onnx, "ONNX file")
    return Exported(file, "onnx", checks, (f"opset {wanted.opset}",))


def _openvino(model: nn.Module, folder: Path, wanted: _Wanted) -> Exported:
    assert wanted.example is not None
    runners.to_openvino(model, wanted.example, folder / "model.xml")
    return Exported(folder, "openvino", wanted.checked(model, folder / "model.xml", runners.run_openvino, "OpenVINO model"))


def _executorch(model: nn.Module, file: Path, wanted: _Wanted) -> Exported:
    assert wanted.example is not None
    runners.to_executorch(model, wanted.example, file)
    return Exported(file, "executorch", wanted.checked(model, file, runners.run_executorch, "ExecuTorch program"))


def _tensorrt(model: nn.Module, folder: Path, wanted: _Wanted) -> Exported:
    """The ONNX file, the line that builds the engine, and whether each layer is what ``--sparsity=enable`` needs."""
    found = _onnx(model, folder / "model.onnx", wanted)
    sparse, notes = two_four_layers(model)
    command = trtexec(folder / "model.onnx", sparse=bool(sparse))
    (folder / "trtexec.sh").write_text(f"#!/bin/sh\n{command}\n", encoding="utf-8")
    precision = "int8 by Q/DQ nodes" if wanted.int8 is not None else "float32; engines are strongly typed, pass int8= for Q/DQ"
    return replace(found, to="tensorrt", notes=(*found.notes, precision, *notes), command=command)


def two_four_layers(model: nn.Module) -> tuple[list[str], list[str]]:
    """Names of the weights that really are 2:4 along their inputs, and a note for each that has zeros and is not."""
    good, notes = [], []
    for name, layer in find_layers(model)[0].items():
        kept = layer.canonical(layer.parameter.detach()) != 0
        if keeps_n_of_m(kept, 2, 4):
            good.append(name)
        elif bool((~kept).any()):
            notes.append(f"{name} has zeros but is not 2:4: sparse tensor cores cannot use them")
    return good, notes


def trtexec(file: Path, *, sparse: bool) -> str:
    """The exact line for TensorRT 10 and 11, with the dynamic axes of the file."""
    import onnx

    inputs = onnx.load(str(file), load_external_data=False).graph.input

    def shapes(batch: int, length: int) -> str:
        made = []
        for given in inputs:
            dims = given.type.tensor_type.shape.dim
            sizes = [str(d.dim_value or (batch if i == 0 else length)) for i, d in enumerate(dims)]
            made.append(f"{given.name}:{'x'.join(sizes)}")
        return ",".join(made)

    ranges = f"--minShapes={shapes(1, 2)} --optShapes={shapes(8, 128)} --maxShapes={shapes(32, 512)}"
    return f"trtexec --onnx=model.onnx --saveEngine=model.engine {ranges}" + (" --sparsity=enable" if sparse else "")


def _hf(model: nn.Module, folder: Path, wanted: _Wanted) -> Exported:
    """A directory that ``from_pretrained`` of the model's class loads, compared on the example where one was given."""
    if not hasattr(model, "save_pretrained"):
        raise ExportError(f"{type(model).__name__} is no Hugging Face model (no save_pretrained): export to another format")
    model.save_pretrained(folder, safe_serialization=True)  # type: ignore[operator]
    again = type(model).from_pretrained(folder)  # type: ignore[attr-defined]
    if wanted.example is None:
        return Exported(folder, "hf", notes=("loaded again; pass example= to compare outputs too",))
    runner: Runner = lambda args, kwargs: run_model(again, Example(args, kwargs))  # noqa: E731
    return Exported(folder, "hf", compare(model, runner, wanted.example, tolerance=wanted.tolerance, what="directory"))


def _compressed_tensors(model: nn.Module, folder: Path, wanted: _Wanted) -> Exported:
    name = layouts.write_compressed_tensors(model, folder)
    tensors = dict(model.state_dict())
    for key, tensor in layouts.read_compressed_tensors(folder):
        if not torch.equal(tensor, tensors[key].cpu()):
            raise ArtifactError(f"{key!r} did not come back as it was written")
    return Exported(folder, "compressed-tensors", notes=(name, "read back bit by bit"))


def _csr(model: nn.Module, folder: Path, wanted: _Wanted) -> Exported:
    layouts.write_csr(model, folder)
    return Exported(folder, "csr", notes=("scipy.sparse.load_npz reads each file",))


def _safetensors(model: nn.Module, file: Path, wanted: _Wanted) -> Exported:
    layouts.write_safetensors(model, file)
    return Exported(file, "safetensors")


_MAKERS: dict[str, Callable[[nn.Module, Path, _Wanted], Exported]] = {
    "onnx": _onnx,
    "openvino": _openvino,
    "torch": _torch,
    "executorch": _executorch,
    "tensorrt": _tensorrt,
    "hf": _hf,
    "compressed-tensors": _compressed_tensors,
    "csr": _csr,
    "safetensors": _safetensors,
}
_RUNNABLE = ("onnx", "openvino", "torch", "executorch", "tensorrt")
FORMATS = tuple(_MAKERS)
