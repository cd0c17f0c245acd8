"""Real networks through every exporter: how far outputs are from the model's at batch 1, 2 and 7, relative, after a reload.

python benchmarks/exporting.py rows.json --models minilm,efficientnet_lite0 --formats onnx,openvino,torch
python benchmarks/exporting.py rows.json --out docs/benchmarks/exporting.md
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from conditions import ROOT, Rows, conditions, show, table

sys.path.insert(0, str(ROOT / "examples"))
SUFFIX = {"onnx": "model.onnx", "torch": "model.pt2", "executorch": "model.pte", "openvino": "ir", "hf": "hf"}


def made(name: str) -> tuple[Any, Any]:
    """A model of examples/ and a batch."""
    import importlib

    import torch

    loaded = importlib.import_module(name).make()
    if name == "minilm":
        text = ["A cut in spring is a branch in summer.", "Prune hard.", "The shears were sharp."]
        return loaded.model, dict(loaded.tokenizer(text, padding=True, return_tensors="pt"))
    return loaded.model, torch.randn(2, *loaded.example.shape[1:], generator=torch.Generator().manual_seed(0))


def run(name: str, to: str, threads: int) -> dict[str, Any]:
    import secateur as sc

    model, example = made(name)
    began = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / SUFFIX[to]
        try:
            found = sc.export(model, path, to=to, example=example)
        except sc.SecateurError as error:
            return {"failed": str(error), "conditions": conditions(threads, "seed 0", 0)}
        files = [path] if path.is_file() else list(path.rglob("*"))
        size = sum(f.stat().st_size for f in files)
    seconds = time.process_time() - began
    errors = [c.error for c in found.checks]
    return {"errors": errors, "bytes": size, "seconds": seconds, "conditions": conditions(threads, "seed 0", seconds)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cache", type=Path, help="JSON file of the rows measured so far")
    parser.add_argument("--models", default="", help="modules of examples/: minilm, efficientnet_lite0")
    parser.add_argument("--formats", default="onnx,openvino,torch,executorch")
    parser.add_argument("--out", type=Path, help="write the page there")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    import torch

    torch.set_num_threads(options.threads)
    rows = Rows(options.cache)
    for name in filter(None, options.models.split(",")):
        for to in options.formats.split(","):
            rows.measured(f"{name} {to}", partial(run, name, to, options.threads))
    lines = [
        [*key.split(), *(f"{e:.1e}" for e in row["errors"]), f"{row['bytes']:,}", f"{row['seconds']:.0f}"]
        if "errors" in row
        else [*key.split(), row["failed"], "", "", "", ""]
        for key, row in rows.items()
    ]
    head = ["model", "format", "batch 1", "batch 2", "batch 7", "bytes", "CPU seconds"]
    page = ["# Exporting real networks", "", "Largest difference of any output relative to the largest output.", ""]
    page += [*table(head, lines), "", *(f"- {key}: {row['conditions']}" for key, row in rows.items())]
    show(page, options.out)


if __name__ == "__main__":
    main()
