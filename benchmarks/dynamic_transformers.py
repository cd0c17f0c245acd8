"""The parts of benchmarks/dynamic_vision.py that are transformers: all-MiniLM-L6-v2 on STS-B, a ViT-S/14 by its own output."""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from conditions import ROOT, Rows, asset
from torch import Tensor, nn
from turning import time_by_turns

import secateur as sc
from secateur.dynamic import Dynamic
from secateur.models import IMAGENET_MEAN, IMAGENET_STD

sys.path.append(str(ROOT / "examples"))
BUDGETS = (0.9, 0.8, 0.7, 0.6)
TIMED = (0.9, 0.8, 0.6)
MINILM: Mapping[str, dict[str, Any]] = {"tokens": {"score": "mean"}, "skip": {"samples": 256}}
VIT: Mapping[str, dict[str, Any]] = {"tokens": {"score": "cls", "samples": 16}, "skip": {"samples": 48}}
JUDGED = 64  # images of odd class; those of even class calibrate
Quality = Callable[[nn.Module], dict[str, float]]


def gated(rows: Rows, folder: Path, name: str, make: Callable[[], nn.Module], method: str, **how: Any) -> Dynamic:
    """The model with calibrated gates: from its folder where it is there."""
    place = folder / f"{name} {method}"
    if place.exists():
        return sc.load(place, model=make())  # type: ignore[return-value]
    started = time.process_time()
    found = sc.dynamic(make(), method=method, budget=1.0, inplace=True, **how)
    rows.keep(f"{name}/{method}/seconds", {"seconds": time.process_time() - started})
    sc.save(found, place, overwrite=True)
    return found


def curve(rows: Rows, name: str, model: Dynamic, quality: Quality) -> None:
    """Rows of the dial: `quality` gives one figure for each name by which the network is shown."""
    for budget in BUDGETS:
        if f"{name}/{model.method}/{budget}" in rows:
            continue
        model.budget = budget
        with model.recording() as costs:
            found = quality(model)
        spread = list(costs.quantiles(0.05, 0.25, 0.5, 0.75, 0.95))
        for shown, figure in found.items():
            rows.keep(f"{shown}/{model.method}/{budget}", {"quality": figure, "macs": costs.mean, "spread": spread})


def minilm(rows: Rows, folder: Path, quick: bool) -> None:
    """Spearman's correlation times 100 on the STS-B pairs; calibrated on sentences of SST-2."""
    import stsb

    data = batches(sentences(32 if quick else 256))

    @torch.no_grad()
    def quality(model: nn.Module) -> dict[str, float]:
        return {"minilm": 100 * stsb.spearman(model, 100 if quick else None)["spearman"]}

    rows.measured("minilm/dense", lambda: {"quality": quality(encoder())["minilm"], "macs": 1.0})
    for method, options in MINILM.items():
        curve(rows, "minilm", gated(rows, folder, "minilm", encoder, method, data=data, **options), quality)


def encoder() -> nn.Module:
    from minilm import make

    return make().model.eval()


def batches(lines: Sequence[str], size: int = 16) -> list[dict[str, Tensor]]:
    """Sentences as batches of tokens."""
    import stsb

    tokenizer = stsb.tokenizer()
    return [dict(tokenizer(lines[i : i + size], padding=True, return_tensors="pt")) for i in range(0, len(lines), size)]


def sentences(count: int) -> list[str]:
    """Sentences of SST-2's file that have five words or more, the first ones."""
    file = sorted(p for p in asset("sst2").iterdir() if p.suffix in (".tsv", ".csv", ".txt"))[0]
    lines = [line.split("\t")[0].strip() for line in file.read_text(encoding="utf-8").splitlines()[1:]]
    return [line for line in lines if len(line.split()) > 4][:count]


def vit(rows: Rows, folder: Path, quick: bool) -> None:
    """How alike its maps, and its first tokens, are those of the dense network: correlation and cosine, times 100."""
    images = pictures(1, 2 if quick else JUDGED).split(8)
    data = pictures(0, 48).split(8)
    dense = [seen(focus(), x) for x in images]

    def quality(model: nn.Module) -> dict[str, float]:
        maps, tokens = [], []
        for x, (whole, first) in zip(images, dense, strict=True):
            found, token = seen(model, x)
            maps.append(torch.stack([torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(found, whole, strict=True)]))
            tokens.append(torch.cosine_similarity(token, first))
        return {"vit": 100 * float(torch.cat(maps).mean()), "vit_token": 100 * float(torch.cat(tokens).mean())}

    for name in ("vit", "vit_token"):
        rows.measured(f"{name}/dense", lambda: {"quality": 100.0, "macs": 1.0})
    for method, options in VIT.items():
        curve(rows, "vit", gated(rows, folder, "vit", focus, method, data=data, **options), quality)


def focus() -> nn.Module:
    from vit_s14 import make

    return make().model.eval()


@torch.no_grad()
def seen(model: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Maps ``[n, pixels]`` and first tokens ``[n, width]``."""
    tokens = list[Tensor]()
    handle = model.backbone.layernorm.register_forward_hook(lambda _, args, out: tokens.append(out[:, 0]))
    try:
        return model(x).flatten(1), tokens[0]
    finally:
        handle.remove()


def pictures(parity: int, count: int) -> Tensor:
    """The first `count` of the ImageNet sample whose class is even, 0, or odd, 1: ``[n, 3, 224, 224]``, normalised."""
    from PIL import Image

    with np.load(asset("imagenet_sample_1000.npz")) as file:
        joined, bounds = file["jpeg"], file["offset"]
    chosen = range(parity, 2 * count, 2)
    files = [io.BytesIO(joined[bounds[i] : bounds[i + 1]].tobytes()) for i in chosen]
    arrays = [np.asarray(Image.open(file).convert("RGB"))[16:240, 16:240] for file in files]
    x = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2) / 255
    return (x - torch.tensor(IMAGENET_MEAN)[:, None, None]) / torch.tensor(IMAGENET_STD)[:, None, None]


def timed(rows: Rows, folder: Path, quick: bool) -> None:
    """Batch 1 on one thread: sentences of SST-2 that did not calibrate, and images of odd class."""
    inputs: dict[str, Sequence[Any]] = {"minilm": batches(sentences(400)[256:], 1), "vit": pictures(1, 20).split(1)}
    for name, make, methods, runs in (("minilm", encoder, MINILM, 300), ("vit", focus, VIT, 40)):
        models = {"dense": make()}
        for method in methods:
            for budget in TIMED:
                if f"{name}/{method}/{budget}" in rows and (folder / f"{name} {method}").exists():
                    found: Any = sc.load(folder / f"{name} {method}", model=make())
                    found.budget = budget
                    models[f"{method}/{budget}"] = found
        time_by_turns(rows, name, models, inputs[name], 6 if quick else runs)
