"""A masked network in every other runtime that is installed, as functions to be timed in turns with ours.

torch.compile and torch CSR always; ONNX Runtime and OpenVINO where they are installed (pip install onnxruntime onnx
onnxscript openvino); DeepSparse 1.8.0, at end of life, from a Python of its own: python3.10 -m venv, pip install
deepsparse==1.8.0, and that interpreter in DEEPSPARSE_PYTHON.
"""

from __future__ import annotations

import copy
import importlib.util
import os
import subprocess
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

Timed = Callable[[], float]  #: runs once and returns seconds
Clock = Callable[[], float]


def timed(clock: Clock, run: Callable[[], object]) -> Timed:
    def once() -> float:
        start = clock()
        run()
        return clock() - start

    return once


class CsrLinear(nn.Module):
    """A linear layer as torch's own CSR product."""

    def __init__(self, layer: nn.Linear):
        super().__init__()
        self.csr, self.bias = layer.weight.detach().to_sparse_csr(), layer.bias

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        y = (self.csr @ x.reshape(-1, x.shape[-1]).T).T.reshape(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias


class CsrConv2d(nn.Module):
    """A convolution as torch's own CSR product with unfolded images; torch has no sparse convolution."""

    def __init__(self, layer: nn.Conv2d):
        super().__init__()
        self.csr, self.bias = layer.weight.detach().flatten(1).to_sparse_csr(), layer.bias
        self.how = (layer.kernel_size, layer.dilation, layer.padding, layer.stride)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        (h, w), (dh, dw), (ph, pw), (sh, sw) = self.how
        columns = x.flatten(2) if self.how == ((1, 1), (1, 1), (0, 0), (1, 1)) else F.unfold(x, *self.how)
        y = torch.stack([self.csr @ image for image in columns])
        y = y if self.bias is None else y + self.bias[:, None]
        return y.unflatten(
            2, ((x.shape[2] + 2 * ph - dh * (h - 1) - 1) // sh + 1, (x.shape[3] + 2 * pw - dw * (w - 1) - 1) // sw + 1)
        )


def csr(model: nn.Module) -> nn.Module:
    """A copy whose layers of at least 30% zeros are CSR products; subclasses and grouped convolutions stay."""
    model = copy.deepcopy(model)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear and float((child.weight == 0).float().mean()) > 0.3:
                setattr(module, name, CsrLinear(child))
            elif type(child) is nn.Conv2d and child.groups == 1 and float((child.weight == 0).float().mean()) > 0.3:
                setattr(module, name, CsrConv2d(child))
    return model


def export(model: nn.Module, args: tuple[Tensor, ...], path: Path) -> None:
    """ONNX with every constant inside, in an old version that every runtime here reads, or where that fails in a new one."""
    import onnx

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            torch.onnx.export(model, args, path, dynamo=False, opset_version=14)
        except Exception:  # the old exporter does not know all that the new one does
            torch.onnx.export(model, args, path, dynamo=True, external_data=False, verbose=False, opset_version=18)
            return
    old = onnx.load(path)
    old.ir_version = min(old.ir_version, 8)
    onnx.save(old, path)


def onnxruntime_of(path: Path, args: tuple[Tensor, ...], threads: int) -> Callable[[], object]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0" if threads == 1 else "1")
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    feed = {node.name: value.numpy() for node, value in zip(session.get_inputs(), args, strict=True)}
    return lambda: session.run(None, feed)


def openvino_of(path: Path, args: tuple[Tensor, ...], threads: int, rate: float | None) -> Callable[[], object]:
    import openvino

    settings: dict[str, object] = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"}
    if rate is not None:
        settings["CPU_SPARSE_WEIGHTS_DECOMPRESSION_RATE"] = rate
    request = openvino.Core().compile_model(path, "CPU", settings).create_infer_request()
    feed = [value.numpy() for value in args]
    return lambda: request.infer(feed)


@contextmanager
def deepsparse_of(path: Path, args: tuple[Tensor, ...], threads: int) -> Iterator[Timed | str | None]:
    """A function that runs it once in its own interpreter, or why there is none; None where it is not installed."""
    python = os.environ.get("DEEPSPARSE_PYTHON")
    if not python:
        yield None
        return
    inputs = path.with_suffix(".npz")
    np.savez(inputs, **{f"input{i}": value.numpy() for i, value in enumerate(args)})
    server = Path(__file__).with_name("deepsparse_server.py")
    child = subprocess.Popen(
        [python, str(server), str(path), str(inputs), str(threads)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    assert child.stdin is not None
    assert child.stdout is not None
    sent, received = child.stdin, child.stdout

    def once() -> float:
        sent.write("\n")
        sent.flush()
        cpu, wall = received.readline().split()
        return float(cpu if threads == 1 else wall)

    try:
        lines = iter(received.readline, "")
        said = next(
            (line.strip() for line in lines if line.startswith("ready") or "Error" in line or "exception" in line), "ended"
        )
        yield once if said == "ready" else said
    finally:
        child.terminate()
        child.wait()


@contextmanager
def peers(
    model: nn.Module, args: tuple[Tensor, ...], folder: Path, threads: int, clock: Clock
) -> Iterator[tuple[dict[str, Timed], dict[str, str]]]:
    """Name -> function, and name -> why there is none."""
    sparse = csr(model)
    found: dict[str, Timed] = {"torch CSR": timed(clock, lambda: sparse(*args))}
    missing: dict[str, str] = {}
    if not all(importlib.util.find_spec(name) for name in ("onnxruntime", "onnx", "onnxscript")):
        yield found, {"ONNX Runtime": "not installed"}
        return
    path = folder / "model.onnx"
    started = time.perf_counter()
    export(model, args, path)
    print(f"    exported in {time.perf_counter() - started:.0f} s", flush=True)
    found["ONNX Runtime"] = timed(clock, onnxruntime_of(path, args, threads))
    if importlib.util.find_spec("openvino"):
        found["OpenVINO"] = timed(clock, openvino_of(path, args, threads, None))
        found["OpenVINO, sparse weights"] = timed(clock, openvino_of(path, args, threads, 0.3))
    with deepsparse_of(path, args, threads) as once:
        if callable(once):
            found["DeepSparse"] = once
        elif once:
            missing["DeepSparse"] = once
        yield found, missing
