"""Claim: pruned networks run faster on CPUs, by how much at which sparsity, beside dense torch and the other runtimes.

Float32. Every row times its candidates in turns, so that what disturbs the machine disturbs all alike; a figure is the
median over rounds of dense time / own time, with the quartiles in brackets. On one thread CPU time of the process counts,
on more wall-clock time. Run: python benchmarks/cpu_sparse.py [--part linear vector networks convert] [--threads 1 2]

Peers: torch dense (MKL, oneDNN) and torch CSR always; ONNX Runtime, OpenVINO and DeepSparse where they are installed
(pip install onnxruntime onnx onnxscript openvino; deepsparse 1.8.0 is at end of life).
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from conditions import processor
from torch import nn

from secateur.runtime import SparseLinear, deploy, native

EXAMPLES = Path(__file__).parents[1] / "examples"


def compare(candidates, seconds, threads):
    """Ratios of the first candidate's time to each one's, round by round: name -> (median, low, high, median ms)."""
    clock = time.process_time if threads == 1 else time.perf_counter
    for run in candidates.values():
        run()
        run()
    times = {name: [] for name in candidates}
    names, start, turn = list(candidates), time.perf_counter(), 0
    while turn < 5 or time.perf_counter() - start < seconds * len(candidates):
        for i in range(len(names)):
            name = names[(turn + i) % len(names)]
            begin = clock()
            candidates[name]()
            times[name].append(max(clock() - begin, 1e-7))
        turn += 1
    reference = times[names[0]]
    result = {}
    for name, own in times.items():
        low, middle, high = statistics.quantiles([r / t for r, t in zip(reference, own, strict=True)], n=4)
        result[name] = (middle, low, high, 1e3 * statistics.median(own))
    return result


def row(label, result):
    first = next(iter(result))
    cells = [f"{name} {m:.2f} [{low:.2f} {high:.2f}]" for name, (m, low, high, _) in result.items() if name != first]
    print(f"{label:36s} {first} {result[first][3]:8.3f} ms | " + "  ".join(cells), flush=True)


def masked(*shape, sparsity):
    return torch.randn(*shape) * (torch.rand(*shape) >= sparsity)


def in_blocks(out, columns, rows, cols, sparsity):
    keep = (torch.rand(out // rows, columns // cols) >= sparsity).repeat_interleave(rows, 0).repeat_interleave(cols, 1)
    return torch.randn(out, columns) * keep


def linear_part(threads, seconds):
    print("\n## Linear layers, 384 rows: speedup over dense torch (MKL)")
    for columns, out in ((768, 3072), (3072, 768)):
        x, bias = torch.randn(384, columns), torch.randn(out)
        for sparsity in (0.5, 0.7, 0.8, 0.9, 0.95):
            w = masked(out, columns, sparsity=sparsity)
            csr, transposed = w.to_sparse_csr(), x.T.contiguous()
            candidates = {"dense": lambda w=w, x=x, bias=bias: F.linear(x, w, bias)}
            for isa in native.instruction_sets():
                program = native.pack(w)
                candidates[isa] = lambda p=program, x=x, b=bias, w=w, isa=isa: native.linear(x, p, b, tuple(w.shape), 0, isa)
            for block in ((4, 1), (1, 4)):
                layer = SparseLinear.from_dense(in_blocks(out, columns, *block, sparsity), bias, block=block)
                candidates["{}x{}".format(*block)] = lambda layer=layer, x=x: layer(x)
            candidates["torch csr"] = lambda csr=csr, t=transposed: csr @ t
            row(f"{columns} -> {out} at {sparsity:.0%}, {threads} threads", compare(candidates, seconds, threads))


def vector_part(threads, seconds):
    print("\n## One row of activations, 4096 x 4096: speedup over dense torch")
    x = torch.randn(1, 4096)
    for sparsity in (0.5, 0.7, 0.8, 0.9):
        w = masked(4096, 4096, sparsity=sparsity)
        csr, column = w.to_sparse_csr(), x[0]
        candidates = {"dense": lambda w=w: F.linear(x, w)}
        for dtype in native.VALUE_TYPES:
            layer = SparseLinear.from_dense(w, kernel="bitmask", values=dtype)
            candidates[str(dtype).removeprefix("torch.")] = lambda layer=layer: layer(x)
        panel = SparseLinear.from_dense(w)
        candidates["panel"] = lambda panel=panel: panel(x)
        candidates["torch csr"] = lambda csr=csr, column=column: csr @ column
        row(f"4096 x 4096 at {sparsity:.0%}, {threads} threads", compare(candidates, seconds, threads))


def vgg16():
    layers, width = [], 3
    for stage in ([64, 64], [128, 128], [256] * 3, [512] * 3, [512] * 3):
        for out in stage:
            layers += [nn.Conv2d(width, out, 3, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU(inplace=True)]
            width = out
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(512 * 4, 1000)), torch.randn(1, 3, 64, 64)


def convolutions():
    layers, width = [], 3
    for out, stride in [(64, 1), (64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), (512, 1)]:
        layers += [nn.Conv2d(width, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU(inplace=True)]
        width = out
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 1000)), torch.randn(1, 3, 64, 64)


def minilm():
    from secateur.models import load_model

    model = load_model(f"{EXAMPLES / 'minilm.py'}:make").model
    tokens = torch.randint(1000, 20000, (1, 128))
    return model, {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


def efficientnet():
    from secateur.models import load_model

    return load_model(f"{EXAMPLES / 'efficientnet_lite0.py'}:make").model, torch.randn(1, 3, 224, 224)


NETWORKS = {
    "3x3 convolutions, strided": convolutions,
    "VGG-16, 64x64": vgg16,
    "MiniLM, 128 tokens": minilm,
    "EfficientNet-Lite0": efficientnet,
}


@torch.no_grad()
def prune(model, sparsity):
    """The smallest magnitudes of each layer; depthwise and first convolutions stay, as they carry too little to matter."""
    for module in model.modules():
        narrow = isinstance(module, nn.Conv2d) and (module.groups > 1 or module.in_channels <= 3)
        if isinstance(module, (nn.Linear, nn.Conv2d)) and not narrow:
            flat = module.weight.abs().flatten()
            drop = flat.argsort()[: round(sparsity * flat.numel())]
            module.weight.view(-1)[drop] = 0
    return model.eval().requires_grad_(False)


def network_part(threads, seconds, which):
    print("\n## Networks end to end, batch 1: speedup over torch eager")
    for name, make in NETWORKS.items():
        if which and which not in name:
            continue
        for sparsity in (0.8, 0.9):
            torch.manual_seed(0)
            try:
                model, example = make()
            except ImportError as error:
                print(f"{name}: skipped, {error}")
                break
            model = prune(model, sparsity)
            fast = deploy(model, example, seconds=0.1)
            args, kwargs = ((), example) if isinstance(example, dict) else ((example,), {})
            candidates = {
                "eager": lambda m=model, a=args, k=kwargs: m(*a, **k),
                "deployed": lambda m=fast, a=args, k=kwargs: m(*a, **k),
            }
            with tempfile.TemporaryDirectory() as folder:
                candidates |= peers(model, args, kwargs, Path(folder), threads)
                with torch.inference_mode():
                    result = compare(candidates, seconds, threads)
            row(f"{name} at {sparsity:.0%}, {threads} threads", result)
            sparse = sum(layer.runtime != "dense" for layer in fast.summary.layers)
            print(f"    {sparse} of {len(fast.summary.layers)} layers sparse, outputs differ by {fast.summary.error:.1e}")


def peers(model, args, kwargs, folder, threads):
    """The same masked model in every other runtime that is installed."""
    found = {}
    if importlib.util.find_spec("onnxruntime") is None or importlib.util.find_spec("onnxscript") is None:
        return found
    import onnxruntime

    path = folder / "model.onnx"
    torch.onnx.export(model, args, path, kwargs=kwargs, dynamo=True, external_data=False, verbose=False)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    values = [*args, *kwargs.values()]
    feed = {node.name: value.numpy() for node, value in zip(session.get_inputs(), values, strict=True)}
    found["onnxruntime"] = lambda: session.run(None, feed)
    if importlib.util.find_spec("openvino"):
        import openvino

        for label, extra in (("openvino", {}), ("openvino sparse", {"CPU_SPARSE_WEIGHTS_DECOMPRESSION_RATE": 0.75})):
            settings = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32", **extra}
            request = openvino.Core().compile_model(path, "CPU", settings).create_infer_request()
            found[label] = lambda request=request: request.infer(feed)
    if importlib.util.find_spec("deepsparse"):
        try:
            import deepsparse

            engine = deepsparse.Engine(model=str(path), batch_size=1, num_cores=threads)
            found["deepsparse"] = lambda: engine.run(list(feed.values()))
        except Exception as error:  # end of life: whatever it no longer finds is said, and the rest goes on
            print(f"    deepsparse does not run: {str(error).splitlines()[0]}")
    return found


def convert_part(threads):
    print("\n## Conversion")
    w = masked(8192, 12288, sparsity=0.9)
    for label, convert in (("panel", native.pack), ("bitmask", native.pack_bits)):
        start = time.perf_counter()
        convert(w)
        print(f"{w.numel() / 1e6:.0f}M weights at 90% to {label}: {time.perf_counter() - start:.2f} s, {threads} threads")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", default=["linear", "vector", "networks", "convert"])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--seconds", type=float, default=1.0, help="for each candidate of a row")
    parser.add_argument("--network", default="", help="only networks whose name holds this")
    options = parser.parse_args()
    print(f"{processor()}, {os.cpu_count()} CPUs, torch {torch.__version__}, kernels {', '.join(native.instruction_sets())}")
    for threads in options.threads:
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        with torch.no_grad():
            if "linear" in options.part:
                linear_part(threads, options.seconds)
            if "vector" in options.part:
                vector_part(threads, options.seconds)
            if "networks" in options.part:
                network_part(threads, options.seconds, options.network)
            if "convert" in options.part:
                convert_part(threads)


if __name__ == "__main__":
    main()
