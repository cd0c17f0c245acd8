"""Exporters to formats that other runtimes execute: each writes a file and returns how to run what lies on the disk."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from secateur.data.batches import Batch
from secateur.errors import ExportError, MissingExtra
from secateur.export.parity import Example, Runner, tensors_in
from secateur.export.program import quiet, traced

PLANNED = 8  #: samples in a batch of ExecuTorch, whose memory is planned for the largest
OPSET = 20  #: of ONNX, unless another is asked for
_SINGLE_FILE = 1_900_000_000  # bytes of weights; protobuf ends at 2 GB


def need(package: str, extra: str, purpose: str) -> Any:
    """The package, or MissingExtra with the line that installs it."""
    import importlib

    try:
        return importlib.import_module(package)
    except ImportError:
        raise MissingExtra(package, extra, purpose) from None


def to_torch(model: nn.Module, example: Example, path: Path) -> None:
    """``.pt2``: the traced program."""
    torch.export.save(traced(model, example), path)


def run_torch(path: Path) -> Runner:
    """The program on the disk."""
    module = torch.export.load(path).module()
    return lambda args, kwargs: tensors_in(module(*args, **kwargs))


def to_onnx(model: nn.Module, example: Example, path: Path, *, opset: int = OPSET) -> None:
    """``.onnx``: one file under 2 GB, else with ``.onnx.data`` beside it; dynamic axes, BatchNorms folded, checked by ONNX."""
    for package in ("onnx", "onnxscript"):
        need(package, "onnx", "export to ONNX")
    program = traced(model, example)
    size = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    try:
        with quiet():
            made = torch.onnx.export(program, dynamo=True, opset_version=opset, verbose=False)
    except torch.onnx.OnnxExporterError as error:
        raise ExportError(_operator("ONNX", error)) from error
    assert made is not None
    made.save(str(path), external_data=size > _SINGLE_FILE)
    need("onnx", "onnx", "export to ONNX").checker.check_model(str(path))


def run_onnx(path: Path) -> Runner:
    """ONNX Runtime on the CPU."""
    runtime = need("onnxruntime", "onnx", "running an ONNX file")
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [i.name for i in session.get_inputs()]

    def run(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        feed = dict(zip(names, (t.numpy() for t in _inputs(names, args, kwargs)), strict=True))
        return [torch.from_numpy(np.asarray(o)) for o in session.run(None, feed)]

    return run


def quantise_onnx(source: Path, path: Path, data: Iterable[Batch]) -> None:
    """int8 by Q/DQ nodes, per channel, ranges of activations from `data`; weights are symmetric, so that zeros stay zero."""
    need("onnxruntime", "onnx", "export to int8 ONNX")
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        """Feeds the calibration batches."""

        def __init__(self) -> None:
            names = _input_names(source)
            examples = (Example.of(batch) for batch in data)
            self._feeds = (
                dict(zip(names, (t.numpy() for t in _inputs(names, e.args, e.kwargs)), strict=True)) for e in examples
            )

        def get_next(self) -> dict[str, Any] | None:
            return next(self._feeds, None)

    with quiet():
        quantize_static(
            str(source), str(path), Reader(), quant_format=QuantFormat.QDQ, per_channel=True,
            activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
            extra_options={"WeightSymmetric": True, "ActivationSymmetric": False},
        )  # fmt: skip


def _input_names(path: Path) -> list[str]:
    import onnx

    return [i.name for i in onnx.load(str(path), load_external_data=False).graph.input]


def to_openvino(model: nn.Module, example: Example, path: Path) -> None:
    """``.xml`` and ``.bin``: OpenVINO's intermediate representation, weights in float32."""
    openvino = need("openvino", "openvino", "export to OpenVINO")
    program = traced(model, example)
    try:
        with quiet():
            made = openvino.convert_model(program)
    except Exception as error:  # openvino raises what its front end happens to raise
        raise ExportError(_operator("OpenVINO", error)) from error
    openvino.save_model(made, str(path), compress_to_fp16=False)


def run_openvino(path: Path) -> Runner:
    """OpenVINO on the CPU, in float32."""
    openvino = need("openvino", "openvino", "running an OpenVINO model")
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    compiled = openvino.Core().compile_model(str(path), "CPU", settings)
    names = [i.get_any_name() if i.get_names() else str(n) for n, i in enumerate(compiled.inputs)]

    def run(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        found = compiled([t.numpy() for t in _inputs(names, args, kwargs)])
        return [torch.from_numpy(np.array(found[o])) for o in compiled.outputs]

    return run


def to_executorch(model: nn.Module, example: Example, path: Path) -> None:
    """``.pte``: ExecuTorch with the XNNPACK backend, for batches up to 8: memory is planned for the largest."""
    need("executorch.exir", "executorch", "export to ExecuTorch")
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    program = traced(model, example, most=PLANNED)
    try:
        with quiet():
            made = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()]).to_executorch()
    except Exception as error:  # the lowering raises what its passes happen to raise
        raise ExportError(_operator("ExecuTorch", error)) from error
    with open(path, "xb") as file:
        file.write(made.buffer)


def run_executorch(path: Path) -> Runner:
    """The portable runtime, in this process."""
    need("executorch.runtime", "executorch", "running an ExecuTorch program")
    from executorch.runtime import Runtime

    program = Runtime.get().load_program(path.read_bytes())
    method = program.load_method("forward")

    def run(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        assert program is not None  # the method reads its memory
        assert method is not None
        return [t.clone() for t in method.execute([t.contiguous() for t in tensors_in((args, kwargs))])]

    return run


def _inputs(names: list[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors in the order of the file's inputs: by name where all have theirs, else as they are given."""
    if kwargs and set(names) <= set(kwargs):
        return [kwargs[name] for name in names]
    tensors = tensors_in((args, kwargs))
    if len(tensors) != len(names):
        raise ExportError(f"the file has the inputs {', '.join(names)}; the model was given {len(tensors)} tensors")
    return tensors


def _operator(where: str, error: BaseException) -> str:
    """The operator that a format lacks, found in the chain of causes; else the innermost reason."""
    reasons, at = [], error
    while at is not None:
        reasons.append(str(at))
        at = at.__cause__ or at.__context__  # type: ignore[assignment]
    for reason in reversed(reasons):
        if found := re.search(r"aten[.:]+[\w.]+|torchvision[.:]+[\w.]+", reason):
            return f"{where} cannot express the operator {found.group()}. Replace it in the model, or export to another format."
    return f"{where} cannot express this model: {reasons[-1].strip()[:300]}"
