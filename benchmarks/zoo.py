"""Prune half of the channels, neurons and heads of many architectures (of transformers also half of the width).

    python benchmarks/zoo.py torchvision timm hf detectors --out docs/zoo.md

Every architecture is built with random weights, cut, run, and compared with the original in which the same units are masked:
``pass`` means that the output has the same shape and differs by at most 1e-4 of its largest value.
"""

from __future__ import annotations

import argparse
import datetime
import logging
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from conditions import Rows
from torch import nn
from zoo_detectors import DETECTORS
from zoo_hf import FAMILIES, build

from secateur.graph import choose_groups, cut, difference, make_plan, select, trace, unit_scores
from secateur.graph.trace import arguments, tensors_in
from secateur.models.torchvision_shim import prepare_torchvision

HEADER = """`python benchmarks/zoo.py torchvision timm hf detectors --json rows.json --out docs/zoo.md`

Prune half of the channels, neurons and heads of many architectures (of transformers also half of the width).
Random weights; L1 norms; float32 on one CPU thread; torch 2.13.0, torchvision 0.29.2, timm 1.0.31 (of every family up to
six models of at most 120 million parameters), transformers 5.23.0 (small configurations), detectors as
benchmarks/zoo_detectors.py writes them. `pass`: the cut model runs, its output has the same shape and differs from that of the
masked original by at most 1e-4 of its largest value. *units* is how many there are to cut from, half of which go; *left* is the
share of parameters, *error* that difference, *seconds* tracing, choosing and cutting on a machine with other work, *run* when
the row was measured.
"""

KINDS = {
    "torchvision": ("channel", "neuron", "head"),
    "timm": ("channel", "neuron", "head"),
    "hf": ("channel", "neuron", "head", "width"),
    "detectors": ("channel", "neuron", "head"),
}


def torchvision_models() -> Iterator[tuple[str, Callable[[], tuple[nn.Module, Any]]]]:
    """Classification, segmentation and video architectures of torchvision."""
    prepare_torchvision()
    import torchvision
    from torchvision import models

    video, quantised = models.video, models.quantization
    for name in torchvision.models.list_models():
        builder = torchvision.models.get_model_builder(name)
        module = builder.__module__
        if "detection" in module or "optical_flow" in module or "quantization" in module or quantised is None:
            continue
        if name in ("vit_h_14", "regnet_y_128gf"):  # two gigabytes and more of random weights
            continue
        size = {"inception_v3": 299}.get(name, 224)
        shape = (1, 3, 16, 112, 112) if video.__name__ in module else (1, 3, size, size)
        if "mvit" in name or "swin3d" in name or name == "s3d":
            shape = (1, 3, 16, 224, 224)
        options: dict[str, Any] = {"weights": None}
        if "segmentation" in module:
            options["weights_backbone"] = None
        if name in ("googlenet", "inception_v3"):
            options["init_weights"] = False
        yield name, lambda b=builder, s=shape, o=options: (b(**o), torch.randn(s))


def timm_models() -> Iterator[tuple[str, Callable[[], tuple[nn.Module, Any]]]]:
    """Up to six architectures of every family of timm, none of more than 120 million parameters."""
    prepare_torchvision()
    import timm

    def make(name: str) -> tuple[nn.Module, Any]:
        with torch.device("meta"):
            size = sum(p.numel() for p in timm.create_model(name, pretrained=False).parameters())
        if size > 120e6:
            raise MemoryError(f"left out: {size:,} parameters")
        model = timm.create_model(name, pretrained=False)
        return model, torch.randn(1, *model.default_cfg["input_size"])

    families: dict[str, list[str]] = {}
    for name in timm.list_models():
        families.setdefault(timm.models._registry._model_to_module[name], []).append(name)
    big = (
        "giant",
        "huge",
        "xlarge",
        "_xl",
        "so400m",
        "so150m",
        "large",
        "_g",
        "enormous",
        "1b",
        "2b",
        "3b",
        "7b",
        "_h_",
        "_l_",
    )
    for names in families.values():
        small = [n for n in names if not any(b in n for b in big)] or names[:1]
        for name in small[:: -(-len(small) // 6)]:
            yield name, lambda n=name: make(n)


def hf_models() -> Iterator[tuple[str, Callable[[], tuple[nn.Module, Any]]]]:
    """Families of transformers in small configurations."""
    prepare_torchvision()
    for name in FAMILIES:
        yield name, lambda n=name: build(n)


def detectors() -> Iterator[tuple[str, Callable[[], tuple[nn.Module, Any]]]]:
    """YOLO-style detectors, and the backbones and heads of torchvision's."""
    prepare_torchvision()
    yield from DETECTORS.items()


def judge(make: Callable[[], tuple[nn.Module, Any]], kinds: tuple[str, ...], sparsity: float = 0.5) -> dict[str, Any]:
    """One row of the table."""
    torch.manual_seed(0)
    model, example = make()
    model.eval()
    start = time.perf_counter()
    graph = trace(model, example)
    row: dict[str, Any] = {
        "date": datetime.datetime.now().isoformat(" ", "minutes"),
        "unknown": sorted(graph.unknown),
        "notes": list(graph.notes),
    }
    groups = choose_groups(graph, kinds)
    removed = select(graph, groups, unit_scores(model, groups, "l1"), sparsity)
    row["units"] = {k: sum(g.units for g in groups if g.kind == k) for k in kinds}
    plan = make_plan(graph, model, removed)
    smaller = cut(model, plan)
    row["seconds"] = time.perf_counter() - start
    row["parameters"] = sum(p.numel() for p in model.parameters())
    row["left"] = sum(p.numel() for p in smaller.parameters())
    row["error"] = difference(model, smaller, graph, graph.flags(removed), example)
    ok = row["error"] <= 1e-4
    row["result"] = ("pass" if plan.cuts else "nothing to cut") if ok else f"differs by {row['error']:.1e}"
    if not ok and _random(model, example):
        row["reason"] = "the original's own output is random"
    if not plan.cuts:
        row["reason"] = next(iter(plan.skipped.values()), "")
    return row


@torch.no_grad()
def _random(model: nn.Module, example: Any) -> bool:
    args, kwargs = arguments(example)
    first, second = (tensors_in(model(*args, **kwargs)) for _ in range(2))
    return not all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def table(rows: dict[str, dict[str, Any]]) -> str:
    """The rows as Markdown, with the counts above."""
    passed = {p: [r["result"] == "pass" for n, r in rows.items() if n.startswith(p)] for p in KINDS}
    summary = ", ".join(f"{p} {sum(ok)} of {len(ok)}" for p, ok in passed.items() if ok)
    columns = ("model", "result", "units", "parameters", "left", "error", "seconds", "run", "remarks")
    lines = [f"Pass: {summary}.", "", "| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for name, r in rows.items():
        remarks = "; ".join([*r.get("notes", []), *(f"no rule: {u}" for u in r.get("unknown", [])), r.get("reason", "")])
        share = f"{r['left'] / r['parameters']:.0%}" if r.get("left") else "-"
        error = f"{r['error']:.0e}" if "error" in r else "-"
        units = ", ".join(f"{n} {kind}" for kind, n in r.get("units", {}).items() if n)
        cells = [
            name,
            r["result"],
            units,
            f"{r.get('parameters', 0):,}",
            share,
            error,
            f"{r.get('seconds', 0):.1f}",
            r.get("date", "-"),
            remarks.strip("; ")[:160],
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run the parts named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=tuple(KINDS))
    parser.add_argument("--only", default="", help="only names that contain this")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--json", type=Path, help="rows are kept here, and rows found here are not computed again")
    parser.add_argument("--seconds", type=float, default=1e9, help="stop after this time")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    sources = {"torchvision": torchvision_models, "timm": timm_models, "hf": hf_models, "detectors": detectors}
    rows = Rows(options.json)
    start = time.monotonic()
    for part in options.parts:
        for name, make in sources[part]():
            key = f"{part}/{name}"
            if options.only not in key or key in rows or time.monotonic() - start > options.seconds:
                continue
            try:
                row = judge(make, KINDS[part])
            except MemoryError:
                continue
            except Exception as error:  # the table says what failed and why
                said = str(error).splitlines()[0][:200] if str(error) else ""
                row = {"result": f"{type(error).__name__}: {said}".replace("|", "/")}
            rows.keep(key, row)
    if options.out:
        options.out.write_text(f"# The zoo\n\n{HEADER}\n{table(rows)}", encoding="utf-8")


if __name__ == "__main__":
    main()
