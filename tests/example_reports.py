"""Believable reports for the tests of page and terminal: `python tests/example_reports.py FOLDER` writes them as HTML."""

from __future__ import annotations

import dataclasses
import functools
import math
import sys
from pathlib import Path

import torch

from secateur.report import build
from secateur.types import Latency, LayerReport, Measurement, Point, Report, Sensitivity

RECIPE = """version = 1
sparsity = 0.9
criterion = "magnitude"
pattern = "element"
allocation = "global"
schedule = "one-shot"
seed = 0
ignore = ["conv1", "fc"]
"""
ENVIRONMENT = {
    "Secateur": "0.1.0",
    "PyTorch": "2.13.0+cpu",
    "Python": "3.11.2",
    "Processor": "AMD EPYC 7B13",
    "Cores": "2",
    "Threads": "1",
    "System": "Debian GNU/Linux 12 (bookworm) (x86_64)",
    "Seed": "0",
    "Date": "2026-05-04 09:12 UTC",
}


def layer(index: int, of: int, generator: torch.Generator, name: str, shape: tuple[int, ...]) -> LayerReport:
    """A layer whose sparsity grows with depth, unstructured or 2:4, with histogram and picture of a real mask."""
    weight = torch.randn(shape, generator=generator) * math.sqrt(2 / math.prod(shape[1:]))
    sparsity = min(0.97, 0.62 + 0.36 * index / of + 0.06 * float(torch.rand(1, generator=generator)))
    if index % 5 == 4 and math.prod(shape) % 4 == 0:
        groups = weight.abs().reshape(-1, 4)
        mask = torch.zeros_like(groups, dtype=torch.bool).scatter_(1, groups.topk(2, dim=1).indices, True).reshape(shape)
        return build.layer_report(name, weight, mask, "2:4", error=0.08 + 0.002 * index)
    rows = 0.6 + 0.8 * torch.rand(shape[0], generator=generator).reshape(-1, *[1] * (len(shape) - 1))
    score = weight.abs() * rows
    mask = score > score.flatten().kthvalue(max(1, int(sparsity * score.numel()))).values
    return build.layer_report(name, weight, mask, "element", error=0.02 + 0.003 * index)


def sensitivity(names: list[str], generator: torch.Generator) -> tuple[Sensitivity, ...]:
    steps = (0.0, 0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
    curves = []
    for i, name in enumerate(names):
        frailty = 0.02 + 0.5 * math.exp(-i / 3) * float(torch.rand(1, generator=generator))
        curves.append(Sensitivity(name, steps, tuple(round(0.9719 - frailty * s**6, 4) for s in steps)))
    return tuple(curves)


def points() -> tuple[Point, ...]:
    found = []
    methods = (("magnitude, global", 0.030, 0.0), ("LAMP", 0.022, 0.0), ("Taylor, channels", 0.11, 1.0), ("2:4", 0.02, 0.0))
    for label, cost, macs in methods:
        for s in (0.5,) if label == "2:4" else (0.3, 0.5, 0.7, 0.8, 0.9, 0.95):
            dense = int(40_560_000 * (1 - macs * s))
            found.append(
                Point(
                    label,
                    s,
                    round(0.9719 - cost * s**5 * 3, 4),
                    int(272_474 * (1 - macs * s)),
                    dense,
                    int(1_102_000 * (1 - s) * 1.2),
                    round(1.2 + 3.1 * dense / 40_560_000, 3),
                )
            )
    return tuple(found)


@functools.cache
def small(n: int = 20) -> Report:
    """A residual network of `n` layers, pruned to about 90%."""
    generator = torch.Generator().manual_seed(n)
    names = [f"layer{1 + i * 3 // n}.{i // 2}.conv{1 + i % 2}.weight" for i in range(n)]
    width = [16 * 2 ** (max(i - 1, 0) * 3 // n) for i in range(n + 1)]
    layers = tuple(layer(i, n, generator, name, (width[i + 1], width[i], 3, 3)) for i, name in enumerate(names))
    total, kept = sum(x.parameters for x in layers), sum(x.kept for x in layers)
    return Report(
        title="ResNet-20 on handwritten digits, 90% global magnitude",
        before=Measurement(
            total + 4_890, total + 4_890, 4 * total + 19_560, 4 * total + 31_200, 40_560_000, 40_560_000,
            Latency(4.31, 4.22, 4.47, 50, 1, 1, "torch.float32", "cpu"), {"accuracy": 0.9719, "loss": 0.0913},
        ),
        after=Measurement(
            total + 4_890, kept + 4_890, 4 * total + 19_560, (4 * total + 31_200) * 10 // 34, 40_560_000, 6_120_000,
            Latency(4.28, 4.2, 4.5, 50, 1, 1, "torch.float32", "cpu"), {"accuracy": 0.9689, "loss": 0.1022},
        ),
        metric="accuracy",
        layers=layers,
        skipped={"conv1.weight": "ignored as asked", "fc.weight": "ignored as asked"},
        notes=(
            "BatchNorm statistics were estimated again on 1,024 calibration samples.",
            "Layer layer3.4.conv1.weight: the Cholesky factorisation failed and was repeated with damping 0.1.",
        ),
        sensitivity=sensitivity(names, generator),
        points=points(),
        recipe=RECIPE,
        environment=ENVIRONMENT,
        seconds=83.4,
    )  # fmt: skip


@functools.cache
def large(n: int = 300) -> Report:
    """A language model of `n` layers: perplexity, no latency, some layers left alone, most pictures left out."""
    generator = torch.Generator().manual_seed(n)
    kinds = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
    names = [f"model.layers.{i // 6}.{kinds[i % 6]}.weight" for i in range(n)]
    layers = tuple(layer(i, n, generator, name, (96, 96 if i % 6 < 4 else 128)) for i, name in enumerate(names))
    total, kept = sum(x.parameters for x in layers), sum(x.kept for x in layers)
    curves = tuple(
        Sensitivity(s.layer, s.sparsity, tuple(round(27.66 + 60 * (0.9719 - q), 3) for q in s.quality))
        for s in sensitivity(names, generator)
    )
    return Report(
        title="A language model of 300 layers, 50% SparseGPT",
        before=Measurement(total + 38_400, total + 38_400, 2 * total, None, None, None, None, {"perplexity": 27.656}),
        after=Measurement(total + 38_400, kept + 38_400, 2 * total, None, None, None, None, {"perplexity": 36.85}),
        metric="perplexity",
        layers=layers,
        skipped={f"model.layers.{i}.input_layernorm.weight": "not a weight by which inputs are multiplied" for i in range(12)},
        notes=("MACs: no example input was given.", "Latency was switched off in the recipe."),
        sensitivity=curves,
        recipe=RECIPE,
        environment=ENVIRONMENT,
        seconds=7_512.0,
    )


def minimal() -> Report:
    """Only what a report must have."""
    return Report("Smallest", Measurement(10, 10, 40), Measurement(10, 4, 40))


EVIL = "<script>document.title='pwned'</script>\"'><img src=x onerror=alert(1)>{{ 7*7 }}$\\frac$[bold]\x00\u202e\ud800"


def hostile() -> Report:
    """Markup, template syntax, control characters and NaN wherever a report has text or figures."""
    shape, picture = (2, 2), ((1.0, 0.0), (0.0, 1.0))
    edges = (-1.0, 0.0, 1.0)
    slow = Latency(2.0, 1.9, 2.1, 5, 1, 1, EVIL, EVIL)
    quick = dataclasses.replace(slow, median_ms=1.0, low_ms=0.9, high_ms=1.1)
    return Report(
        title=EVIL,
        before=Measurement(10, 10, 40, 40, 100, 100, quick, {EVIL: 0.5, "accuracy": 0.9}),
        after=Measurement(10, 4, 40, 50, 100, 40, slow, {EVIL: math.nan, "accuracy": 0.8}),
        metric=EVIL,
        layers=(LayerReport(EVIL, shape, 4, 2, EVIL, math.nan, (edges, (2, 2)), (edges, (1, 1)), picture),) * 2,
        skipped={EVIL: EVIL},
        notes=(EVIL, "</style></pre>" + EVIL),
        sensitivity=(Sensitivity(EVIL, (0.0, 0.5), (0.5, math.nan)), Sensitivity("empty", (), ())),
        points=(Point(EVIL, 0.5, math.nan), Point(EVIL, 0.6, 0.4), Point("x", 0.7, math.inf)),
        recipe="</pre>" + EVIL,
        environment={EVIL: EVIL},
        seconds=1.0,
    )


if __name__ == "__main__":
    from secateur.report.html import render, render_comparison

    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    pages = {"small": small(), "large": large(), "minimal": minimal(), "hostile": hostile()}
    for name, report in pages.items():
        (folder / f"{name}.html").write_text(render(report), encoding="utf-8")
    (folder / "compare.html").write_text(render_comparison([small(), small(12), small(5)]), encoding="utf-8")
