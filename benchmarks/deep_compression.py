"""Deep Compression: how small networks become on disk, at what accuracy, and how fast the coder is.

LeNet-300-100 and LeNet-5 on MNIST are trained and pruned here, their weights shared and the shared values trained;
EfficientNet-Lite0 and MiniLM are compressed without training, on calibration data only. The size is that of the whole packed
file, the factor that of all parameters and buffers in float32 to it. Nothing is chosen by test data: the last weights count.
Each row is kept in a JSON file as soon as it is known, and not computed again.

    python benchmarks/deep_compression.py rows.json --rows lenet_300_100:0,efficientnet:own,minilm,speed
    python benchmarks/deep_compression.py rows.json --out docs/benchmarks/deep_compression.md
    python benchmarks/deep_compression.py rows.json --rows fuzz          # 10,000 damaged files
"""

from __future__ import annotations

import argparse
import random
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from conditions import ROOT, Rows, asset, conditions, show, table

sys.path[:0] = [str(ROOT / "examples"), str(ROOT / "tests")]
GOALS = {
    "lenet_300_100": ("150x at 1.8% error", "40x at 1.58% (Deep Compression), 113x (Bayesian compression)"),
    "lenet_5": ("800x at 0.95% error", "39x at 0.74% (Deep Compression), 771x at 1.0% (Bayesian compression)"),
    "efficientnet": ("8x at 2 points", "zstandard -19 of the float32 file"),
    "minilm": ("10x at Spearman .80", "zstandard -19 of the float32 file"),
}
Row = dict[str, Any]


def outcome(found: Any, dense: float, pruned: float | None, final: float, began: float) -> Row:
    """What one run comes to, in numbers that JSON keeps."""
    layers = [
        {
            "name": x.name, "shape": list(x.shape), "bits": x.bits, "kept": x.coded.kept, "values": x.coded.values,
            "positions": x.coded.positions, "positions_bound": x.coded.positions_bound, "values_bound": x.coded.values_bound,
        }
        for x in found.layers
    ]  # fmt: skip
    return {
        "dense": dense, "pruned": pruned, "final": final, "bytes": found.bytes, "before": found.bytes_before,
        "layers": layers, "seconds": time.process_time() - began,
    }  # fmt: skip


def lenet_300_100(seed: int, options: argparse.Namespace) -> Row:
    """A 42nd of the weights, as benchmarks/training.py prunes; 4 bits, their values trained."""
    return lenet("lenet_300_100", seed, options.factor or 42.0, options.bits or 4, options)


def lenet_5(seed: int, options: argparse.Namespace) -> Row:
    """A 300th of the weights, the networks of benchmarks/training.py; 4 bits, their values trained."""
    return lenet("lenet_5", seed, options.factor or 300.0, options.bits or 4, options)


def lenet(name: str, seed: int, factor: float, bits: float, options: argparse.Namespace) -> Row:
    """A LeNet pruned while it trains, shared, and the shared values trained: learning from labels and the dense network."""
    import training

    import secateur as sc
    from secateur.train.distill import Distillation

    began = time.process_time()
    data, dense, small = training.kept_lenet(name, seed, factor, options.holdout)
    found = sc.compress(
        small, bits=bits, vector_bits=3, train=data.batches(seed), seed=seed,
        loss=Distillation(dense, logits=0.5, task=0.5, temperature=2.0), finetune={"epochs": options.epochs or 5, "lr": 1e-3},
    )  # fmt: skip
    row = outcome(found, data.error(dense), data.error(small), data.error(found.model), began)
    return {**row, "before": sum(t.numel() * t.element_size() for t in dense.state_dict().values())}


def efficientnet(normalise: str, options: argparse.Namespace) -> Row:
    """Whole numbers in steps chosen by the network's output, rounding errors made up for; every twelfth image calibrates."""
    import secateur as sc
    from secateur.data import accuracy, load_data
    from secateur.models import load_model

    began = time.process_time()
    loaded = load_model(f"{ROOT / 'examples' / 'efficientnet_lite0.py'}:make?normalise={normalise}")
    images = f"npz:{asset('imagenet_sample_1000.npz')}"
    data = list(load_data(f"{images}[0::12]", loaded=loaded, batch_size=21))
    measure = accuracy(list(load_data(f"{images}[1::2]", loaded=loaded, batch_size=25)), topk=(1,))
    settings = {"scheme": "entropy", "budget": options.budget, "data": data, "fold_norms": True}
    found = sc.compress(loaded.model, reestimate_norms=options.reestimate, **settings)
    dense, final = (100 * measure(m)["accuracy"] for m in (loaded.model, found.model))
    return outcome(found, dense, None, final, began)


def minilm(_: str, options: argparse.Namespace) -> Row:
    """SparseGPT at 50%, then whole numbers with rounding errors made up for; embeddings rounded alone."""
    import minilm as example
    import stsb

    import secateur as sc

    began = time.process_time()
    loaded = example.make()
    text = (stsb.ASSETS / "wikitext2" / "valid.txt").read_text(encoding="utf-8")
    lines = [line.strip() for line in text.split("\n") if len(line.split()) > 8][:128]
    batches = [
        dict(stsb.tokenizer()(lines[i : i + 32], padding=True, truncation=True, max_length=128, return_tensors="pt"))
        for i in range(0, len(lines), 32)
    ]
    pruned = sc.prune(
        loaded.model, sparsity=0.5, solver="sparsegpt", allocation="uniform", data=batches, ignore=("pooler",)
    ).model  # fmt: skip
    bits = {"*embeddings*": options.bits or 3.6, "*": 3.3}
    found = sc.compress(pruned, scheme="entropy", bits=bits, data=batches)
    scores = [stsb.spearman(m)["spearman"] for m in (loaded.model, pruned, found.model)]
    return outcome(found, *scores, began)


def zstandard(name: str, options: argparse.Namespace) -> Row:
    """The float32 safetensors of a model through zstandard -19."""
    import importlib

    from safetensors.torch import save
    from zstandard import ZstdCompressor

    model = importlib.import_module({"efficientnet": "efficientnet_lite0"}.get(name, name)).make().model
    raw = save({k: v.contiguous().clone() for k, v in model.state_dict().items()})
    return {"before": len(raw), "bytes": len(ZstdCompressor(level=19).compress(raw))}


def speed(_: str, options: argparse.Namespace) -> Row:
    """One core's MB of float32 a second, and peak memory, on four weights of 8 million values; peers on the same symbols."""
    import numpy as np
    import torch

    from secateur.coding import positions, streams, tensor
    from secateur.coding.bits import ByteReader
    from secateur.coding.kernels import numpy_only

    torch.manual_seed(0)
    weight = torch.randn(4096, 2048)
    cases = {
        "4 bits, dense": torch.round(weight * 2),
        "50% zeros, 4 bits": torch.round(weight * 2.6) * (weight.abs() > 0.674),
        "90% zeros, 4 bits": torch.round(weight * 2) * (weight.abs() > 1.645),
        "95% zeros, float32": weight * (weight.abs() > 1.96),
    }
    rows = []
    for name, values in cases.items():
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        encoding, (data, bits) = timed(lambda values=values: tensor.encode(values))
        decoding, found = timed(lambda data=data, values=values: tensor.decode(data, values.dtype, values.shape))
        assert torch.equal(found, values)
        peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        with numpy_only():
            slow, _ = timed(lambda data=data, values=values: tensor.decode(data, values.dtype, values.shape), repeats=1)
        size = 4 * values.numel() / 1e6
        bound = (bits.positions_bound + bits.values_bound) / 8
        rows.append([name, size / encoding, size / decoding, size / slow, len(data), bound, peak])
    symbols = ((cases["4 bits, dense"].numpy().reshape(-1)[: 1 << 22]) + 20).astype(np.uint16)
    return {"rows": rows, "peers": peers(symbols), "mask": mask_speed(weight, positions, ByteReader), "n": len(symbols),
            "entropy": streams.entropy_bits(np.bincount(symbols)) / 8}  # fmt: skip


def mask_speed(weight: Any, positions: Any, reader: Any) -> list[list[Any]]:
    """Positions alone: distances and cell by cell, on 4 million cells a tenth full."""
    mask = (weight[:2048, :2048].abs() > 1.645).numpy()
    rows = []
    for kind in ("gaps", "context"):
        encoding, data = timed(lambda kind=kind: positions.encode(mask, positions=kind))
        decoding, _ = timed(lambda data=data: positions.decode(reader(data), mask.shape))
        size = 4 * mask.size / 1e6
        rows.append([kind, size / encoding, size / decoding, 8 * len(data) / positions.bound_bits(mask.size, int(mask.sum()))])
    return rows


def peers(symbols: Any) -> list[list[Any]]:
    """Our coders, constriction's range coder and zstandard on the same symbols: bytes, MB of float32 a second both ways."""
    import constriction
    import numpy as np
    from zstandard import ZstdCompressor, ZstdDecompressor

    from secateur.coding import streams
    from secateur.coding.bits import ByteReader

    size, rows = 4 * len(symbols) / 1e6, []
    for name in ("rans", "huffman"):
        encoding, data = timed(lambda name=name: streams.encode(symbols, name))
        decoding, _ = timed(lambda data=data: streams.decode(ByteReader(data), len(symbols)))
        rows.append([f"ours, {name}", len(data), size / encoding, size / decoding])
    share = np.bincount(symbols) / len(symbols)
    model = constriction.stream.model.Categorical(share.astype(np.float32), perfect=False)
    wide = symbols.astype(np.int32)

    def encode() -> Any:
        coder = constriction.stream.queue.RangeEncoder()
        coder.encode(wide, model)
        return coder.get_compressed()

    encoding, data = timed(encode)
    decoding, _ = timed(lambda: constriction.stream.queue.RangeDecoder(data).decode(model, len(symbols)))
    rows.append(["constriction, range coder", data.nbytes, size / encoding, size / decoding])
    raw = symbols.astype(np.uint8).tobytes()
    encoding, packed = timed(lambda: ZstdCompressor(level=19).compress(raw), repeats=1)
    decoding, _ = timed(lambda: ZstdDecompressor().decompress(packed))
    rows.append(["zstandard -19", len(packed), size / encoding, size / decoding])
    return rows


def timed(work: Callable[[], Any], repeats: int = 3) -> tuple[float, Any]:
    """Least CPU seconds of `repeats`, and the result."""
    best, result = float("inf"), None
    for _ in range(repeats):
        began = time.process_time()
        result = work()
        best = min(best, time.process_time() - began)
    return best, result


def fuzz(_: str, options: argparse.Namespace) -> Row:
    """10,000 damaged packed files: how each ended, the longest and the most memory."""
    from packed_fuzz import mutants

    from secateur.coding.packed import PackedFile
    from secateur.errors import ArtifactError

    good = [(ROOT / "tests" / "coding" / "golden" / "version1.packed").read_bytes()]
    before, longest, refused = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, 0.0, 0
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x"
        for data in mutants(good, random.Random(1), 10_000):
            path.write_bytes(data)
            began = time.process_time()
            try:
                with PackedFile.open(path) as file:
                    for _ in file.tensors():
                        pass
            except ArtifactError:
                refused += 1
            longest = max(longest, time.process_time() - began)
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    return {"files": 10_000, "refused": refused, "longest": longest, "memory": peak}


MAKERS = {f.__name__: f for f in (lenet_300_100, lenet_5, efficientnet, minilm, zstandard, speed, fuzz)}


def run(key: str, options: argparse.Namespace) -> Row:
    name, _, detail = key.partition(":")
    row = MAKERS[name](int(detail or 0) if name.startswith("lenet") else detail or "own", options)
    return {**row, "conditions": conditions(options.threads, "seeds as named", row.get("seconds", 0.0))}


def sizes_table(rows: dict[str, Row]) -> list[str]:
    lines = []
    for key, row in rows.items():
        name = key.partition(":")[0]
        if name not in GOALS:
            continue
        goal, beside = GOALS[name]
        digits = 4 if name == "minilm" else 2
        quality = " → ".join(f"{v:.{digits}f}" for v in (row["dense"], row["pruned"], row["final"]) if v is not None)
        plain = rows.get(f"zstandard:{name}")
        zstd = f"zstandard -19: {plain['before'] / plain['bytes']:.2f}x" if plain else beside
        lines.append(
            [key, f"{row['before']:,}", f"{row['bytes']:,}", f"{row['before'] / row['bytes']:.1f}x", quality, goal, zstd]
        )
    head = [
        "network",
        "bytes before",
        "bytes after",
        "factor",
        "error, top-1 or Spearman: dense → (pruned →) compressed",
        "goal",
        "beside",
    ]
    return table(head, lines)


def bits_table(rows: dict[str, Row]) -> list[str]:
    """Of each network, the bits of positions and values beside their bounds."""
    lines = []
    for key, row in rows.items():
        if "layers" in row:
            apart = [x for x in row["layers"] if x["positions"]]
            joint = [x for x in row["layers"] if not x["positions"] and x["bits"]]
            where, bound = (sum(x[k] for x in apart) for k in ("positions", "positions_bound"))
            values, low = (sum(x[k] for x in apart) for k in ("values", "values_bound"))
            both, least = sum(x["values"] for x in joint), sum(x["values_bound"] + x["positions_bound"] for x in joint)
            cell = [f"{a:,.0f} ({a / b:.3f})" if b else "" for a, b in ((where, bound), (values, low), (both, least))]
            kept = sum(x["kept"] for x in row["layers"] if x["bits"])
            lines.append([key, f"{kept:,}", *cell])
    head = ["network", "weights kept", "positions, bits (of their bound)", "their values", "layers with zeros as symbols"]
    return table(head, lines)


def page(rows: dict[str, Row]) -> list[str]:
    lines = [
        "# Deep Compression", "",
        "Whole packed files against all parameters and buffers in float32. LeNets: error in percent on the 10,000 test images; "
        "the number after the colon is the seed. EfficientNet-Lite0: top-1 of the 500 odd images, by the normalisation named "
        "(the weights were trained with `own`). MiniLM: Spearman on the STS-B test pairs.", "",
        *sizes_table(rows), "", "## Where the bits went", "", *bits_table(rows), "",
        "The bound of positions is the logarithm of the number of masks with as many ones in each layer; of values, the "
        "order-0 entropy of the codes, without their tables. Below 1: rows and columns differ, and the coder learns it.", "",
    ]  # fmt: skip
    if "speed" in rows:
        row = rows["speed"]
        head = [
            "weight 4096 x 2048",
            "encode, MB/s",
            "decode, MB/s",
            "decode by numpy alone",
            "bytes",
            "of the entropy",
            "peak memory, MB",
        ]
        made = [
            [n, f"{a:.0f}", f"{b:.0f}", f"{c:.0f}", f"{d:,}", f"{d / e:.3f}", f"{p:.0f}"] for n, a, b, c, d, e, p in row["rows"]
        ]
        lines += ["## Speed", "", "MB of float32 for each second of one core's CPU time.", "", *table(head, made), ""]
        head = ["coder, 4 million symbols", "bytes", "of the entropy", "encode, MB/s", "decode, MB/s"]
        made = [[n, f"{d:,}", f"{d / row['entropy']:.4f}", f"{a:.0f}", f"{b:.0f}"] for n, d, a, b in row["peers"]]
        lines += [*table(head, made), ""]
        head = ["positions, 2048 x 2048, a tenth kept", "encode, MB/s", "decode, MB/s", "of the bound"]
        lines += [*table(head, [[n, f"{a:.0f}", f"{b:.0f}", f"{c:.4f}"] for n, a, b, c in row["mask"]]), ""]
    if "fuzz" in rows:
        row = rows["fuzz"]
        lines += [
            f"{row['files']:,} damaged files: {row['refused']:,} refused with an ArtifactError, the others decoded; none ended "
            f"otherwise. The longest took {row['longest']:.2f} s; memory grew by {row['memory']:.0f} MB.", "",
        ]  # fmt: skip
    for key, row in rows.items():
        lines += [f"- {key}: {row['conditions']}"]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cache", type=Path, help="JSON file of the rows measured so far")
    parser.add_argument("--rows", default="", help=f"what to measure: {', '.join(MAKERS)}, with :seed or :normalisation")
    parser.add_argument("--out", type=Path, help="write the page there")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--epochs", type=int, help="1 makes a quick trial of the LeNets")
    parser.add_argument("--bits", type=float, help="instead of the bits that most weights get")
    parser.add_argument("--factor", type=float, help="LeNets: how many times fewer parameters before they are shared")
    parser.add_argument("--holdout", action="store_true", help="LeNets: judge by training images held out")
    parser.add_argument("--budget", type=int, default=2_270_000, help="EfficientNet: bytes of its weights")
    parser.add_argument("--reestimate", action="store_true", help="EfficientNet: re-estimate BatchNorm statistics")
    options = parser.parse_args()
    import torch

    torch.set_num_threads(options.threads)
    rows = Rows(options.cache)
    for key in filter(None, options.rows.split(",")):
        rows.measured(key, partial(run, key, options))
    show(page(rows), options.out)


if __name__ == "__main__":
    main()
