"""Accuracy of trained networks after units are cut out, beside Torch-Pruning at the same multiply-adds and criterion.

ResNet-56 and ResNet-20 on CIFAR-10, EfficientNet-Lite0 on ImageNet, MiniLM on STS-B; 20, 35 and 50% fewer multiply-adds; at
once with BatchNorm statistics re-estimated, with least-squares repair, and after a short fine-tuning that is the same for both.
Every row is kept in the JSON file as soon as it is known, and not measured again; `--minutes` stops after the row that passes
them. Writes docs/benchmarks/structured_accuracy.md and .svg from all rows in the file.

    python benchmarks/structured_accuracy.py rows.json [--task resnet56] [--criterion L1] [--minutes 9] [--quick]
"""

from __future__ import annotations

import argparse
import copy
import functools
import io
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from conditions import PAGES, Rows, conditions, keep, table
from structured_tasks import TASKS, Task
from torch import nn

import secateur as sc
from secateur.graph import cut as cut_model

FEWER = (0.2, 0.35, 0.5)
THIRD = 0.3333  #: 1.5 times fewer, as papers have it, by --fewer
Importance = Callable[[Any], Any]


def _l1(tp: Any) -> Any:
    return tp.importance.GroupMagnitudeImportance(p=1)


def _taylor(tp: Any) -> Any:
    return tp.importance.GroupTaylorImportance()


#: Scores of a group are divided by their mean, as Torch-Pruning does by default.
GLOBAL = {"allocation": "global", "pattern": {"name": "channel", "normalize": "mean"}}
#: Keys of our recipe, and the peer's importance. A global allocation is a global ranking in both.
CRITERIA: dict[str, tuple[dict[str, Any], Importance]] = {
    "L1": ({"criterion": "magnitude"}, _l1),
    "Taylor": ({"criterion": "taylor"}, _taylor),
    "L1, global": ({"criterion": "magnitude", **GLOBAL}, _l1),
    "Taylor, global": ({"criterion": "taylor", **GLOBAL}, _taylor),
    "L2": ({"criterion": "magnitude", "reduction": "l2"}, lambda tp: tp.importance.GroupMagnitudeImportance(p=2)),
    "FPGM": ({"criterion": "fpgm"}, lambda tp: tp.importance.FPGMImportance()),
    "BatchNorm scale": ({"criterion": "bn_scale"}, lambda tp: tp.importance.BNScaleImportance()),
    "random": ({"criterion": "random"}, lambda tp: tp.importance.RandomImportance()),
}
TUNED = ("L1", "Taylor")  # criteria whose cuts are fine-tuned as well


def bisect(macs_at: Callable[[float], float], target: float) -> float:
    """The sparsity at which the multiply-adds are nearest to `target`; they fall as it grows."""
    low, high = 0.0, 0.95
    for _ in range(7):
        middle = (low + high) / 2
        low, high = (middle, high) if macs_at(middle) > target else (low, middle)
    return min((low, high), key=lambda s: abs(macs_at(s) - target))


def ours(task: Task, criterion: str, fewer: float) -> Iterator[tuple[str, nn.Module]]:
    """The cut network by stage: norms re-estimated, repaired, and fine-tuned after the repair."""

    @functools.cache
    def macs_at(sparsity: float) -> float:  # under a local ranking widths are the same for every criterion
        model = task.model
        for keys in task.cuts:
            model = cut_model(model, sc.plan(model, sparsity=sparsity, example=task.example, **keys))
        return task.macs(model)

    how: dict[str, Any] = {"budget": f"{100 * (1 - fewer):g}% MACs"}
    if "allocation" not in CRITERIA[criterion][0]:
        how = {"sparsity": bisect(macs_at, task.macs(task.model) * (1 - fewer))}
    yield "norms", cut(task, criterion, reestimate_norms=True, **how)
    repaired = cut(task, criterion, repair="least-squares", **how)
    yield "repair", repaired
    if criterion in TUNED:
        yield "tuned", tuned(task, repaired)


def cut(task: Task, criterion: str, **how: Any) -> nn.Module:
    model = task.model
    for keys in task.cuts:
        keys = {**keys, **CRITERIA[criterion][0], **how}
        model = sc.prune(model, data=task.data, example=task.example, loss=task.loss, **keys).model
    return model


def peer(task: Task, criterion: str, fewer: float) -> Iterator[tuple[str, nn.Module]]:
    """Torch-Pruning's network by stage: norms re-estimated by our function, and fine-tuned."""
    import torch_pruning as tp

    dense = copy.deepcopy(task.model)
    dense.requires_grad_(True)
    gradients = _gradients(task, dense) if "Taylor" in criterion else {}

    @functools.cache
    def pruned(ratio: float) -> nn.Module:
        torch.manual_seed(0)
        model = copy.deepcopy(task.model).requires_grad_(True)
        for name, parameter in model.named_parameters():
            parameter.grad = gradients.get(name)
        importance = CRITERIA[criterion][1](tp)
        tp.pruner.BasePruner(
            model, task.example, importance, global_pruning="global" in criterion, **task.peer(model, ratio)
        ).step()
        model.zero_grad(set_to_none=True)
        return model

    ratio = bisect(lambda s: task.macs(pruned(s)), task.macs(task.model) * (1 - fewer))
    model = pruned(ratio)
    sc.reestimate_norms(model, task.data)
    yield "norms", model
    if criterion in TUNED:
        yield "tuned", tuned(task, model)


def _gradients(task: Task, model: nn.Module) -> dict[str, torch.Tensor]:
    """Of the mean loss over the calibration data, in eval mode, by parameter."""
    model.eval()
    for batch in task.data:
        (task.loss(model, batch) / len(task.data)).backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def tuned(task: Task, model: nn.Module) -> nn.Module:
    model = copy.deepcopy(model)
    sc.finetune(model, task.train, loss=task.loss, **task.finetune)
    return model


TOOLS = {"Secateur": ours, "Torch-Pruning": peer}


def measure(task: Task, rows: Rows, criteria: list[str], levels: list[float], stop: float) -> None:
    """All rows of a task that are not known yet, until the time is up."""
    dense = task.macs(task.model)
    notes = rows.get("notes", {}) | {task.name: {"title": task.title, "text": task.notes}}
    if notes != rows.get("notes"):
        rows.keep("notes", notes)
    for stage in ("norms", "tuned"):
        if f"{task.name}/dense/{stage}" not in rows:
            started = time.process_time()
            model = task.model if stage == "norms" else tuned(task, task.model)
            seconds = time.process_time() - started
            rows.keep(f"{task.name}/dense/{stage}", {"quality": task.evaluate(model), "fewer": 0.0, "seconds": seconds})
    for criterion in criteria:
        for fewer in levels:
            for tool, make in TOOLS.items():
                stages = ["norms", *(["repair"] if make is ours else []), *(["tuned"] if criterion in TUNED else [])]
                if all(f"{task.name}/{tool}/{criterion}/{fewer}/{s}" in rows for s in stages):
                    continue
                started = time.process_time()
                for stage, model in make(task, criterion, fewer):
                    seconds = time.process_time() - started
                    row = {"quality": task.evaluate(model), "fewer": 1 - task.macs(model) / dense, "seconds": seconds}
                    rows.keep(f"{task.name}/{tool}/{criterion}/{fewer}/{stage}", row)
                    started = time.process_time()
                if time.monotonic() > stop:
                    return


CELLS = (
    ("Torch-Pruning", "norms"),
    ("Secateur", "norms"),
    ("Secateur", "repair"),
    ("Torch-Pruning", "tuned"),
    ("Secateur", "tuned"),
)
HEAD = (
    *("criterion", "MACs fewer", "Torch-Pruning, norms", "Secateur, norms", "Secateur, repaired"),
    *("Torch-Pruning, tuned", "Secateur, tuned", "achieved, theirs and ours"),
)


def lines_of(task: str, rows: Rows) -> list[list[str]]:
    """One line for each criterion and level of which a tool has a figure; a dash where one is missing."""
    lines = []
    for criterion in CRITERIA:
        for fewer in sorted((*FEWER, THIRD)):
            cells = [rows.get(f"{task}/{tool}/{criterion}/{fewer}/{stage}") for tool, stage in CELLS]
            if not any(cells):
                continue
            shown = ["-" if c is None else f"{c['quality']:.1f}" for c in cells]
            achieved = ", ".join("-" if c is None else f"{100 * c['fewer']:.1f}%" for c in (cells[0], cells[2]))
            lines.append([criterion, f"{fewer:.0%}", *shown, achieved])
    return lines


def missing(rows: Rows) -> str:
    """What has not been measured, in words."""
    absent = [name for name in TASKS if not lines_of(name, rows)]
    seen = {key.split("/")[2] for key in rows if "/Secateur/" in key}
    criteria = [c for c in CRITERIA if c not in seen]
    return (
        f"Not measured yet: of networks {', '.join(absent) or 'none'}; of criteria {'; '.join(criteria) or 'none'}; and what "
        "has a dash or no line below. The script goes on from the rows it has."
    )


def tally(rows: Rows) -> str:
    """How often ours is better, the same, or worse, of all pairs of one criterion and level."""
    sentences = []
    for stage, mine, what in (("norms", "repair", "at once"), ("tuned", "tuned", "after fine-tuning")):
        differences = [
            row["quality"] - theirs["quality"]
            for key, theirs in rows.items()
            if "/Torch-Pruning/" in key and key.endswith(stage)
            for row in [rows.get(key.replace("Torch-Pruning", "Secateur").replace(stage, mine))]
            if row is not None
        ]
        if differences:
            better = sum(d > 0 for d in differences)
            sentences.append(
                f"{what} it is above Torch-Pruning in {better} of {len(differences)} pairs, by {min(differences):+.1f} to "
                f"{max(differences):+.1f} points"
            )
    return "Repaired, " + "; ".join(sentences) + "."


def page(rows: Rows, threads: int) -> list[str]:
    """The whole page, from the rows there are."""
    lines = [
        "# Accuracy after units are cut out, beside Torch-Pruning",
        "",
        "The same units, criterion, calibration data and multiply-adds. The ranking is local, the same fraction of every "
        "layer, unless the line says global. *norms*: BatchNorm statistics re-estimated by one function for both (MiniLM has "
        'none: cut, and nothing else). *repaired*: `repair="least-squares"` instead, from the same data, without labels. '
        "*tuned*: then fine-tuned, theirs from *norms* and ours from *repaired*, by one loop with the same settings. "
        f"Torch-Pruning {version('torch-pruning')}: `BasePruner` with its importance of the criterion, defaults kept.",
        "",
        tally(rows),
        "",
        missing(rows),
        "",
        "![Accuracy over multiply-adds, by network](structured_accuracy.svg)",
    ]
    for task, notes in rows.get("notes", {}).items():
        table_lines = lines_of(task, rows)
        dense = rows[f"{task}/dense/norms"]["quality"]
        tuned_dense = rows.get(f"{task}/dense/tuned", {}).get("quality")
        also = "" if tuned_dense is None else f", fine-tuned alike {tuned_dense:.1f}"
        lines += ["", f"## {notes['title']}", "", f"Dense {dense:.1f}{also}.", "", *table(HEAD, table_lines), "", notes["text"]]
        lines += ["", cost(task, rows)] if table_lines else []
    return [*lines, "", conditions(threads, "seed 0", sum(r.get("seconds", 0.0) for r in rows.values()))]


def cost(task: str, rows: Rows) -> str:
    """CPU time of the stages, in words."""

    def median(end: str) -> float | None:
        own = sorted(
            r["seconds"] for k, r in rows.items() if k.startswith(f"{task}/") and k.endswith(end) and "/dense/" not in k
        )
        return own[len(own) // 2] if own else None

    parts = [(median("/repair"), "cutting and repairing"), (median("/tuned"), "fine-tuning")]
    return "CPU time, median: " + ", ".join(f"{what} {value:.0f} s" for value, what in parts if value is not None) + "."


def picture(rows: Rows) -> str:
    """Quality over multiply-adds for the criterion L1, one panel for each network, as SVG."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    names = [t for t in rows.get("notes", {}) if lines_of(t, rows)]
    figure, panels = pyplot.subplots(1, len(names), figsize=(3.4 * max(len(names), 2), 3.8), squeeze=False)
    for panel, task in zip(panels[0], names, strict=True):
        dense = rows[f"{task}/dense/norms"]["quality"]
        panel.axhline(dense, color="0.7", linewidth=1)
        panel.annotate("dense", (54, dense), color="0.4", fontsize=8, va="bottom", ha="right")
        panel.set_xlim(15, 55)
        for (tool, stage), colour in zip(CELLS, ("#c0392b", "#7fb38a", "#1e7a3c", "#c0392b", "#1e7a3c"), strict=True):
            found = [rows.get(f"{task}/{tool}/L1/{fewer}/{stage}") for fewer in FEWER]
            points = [(100 * r["fewer"], r["quality"]) for r in found if r is not None]
            if points:
                label = f"{tool}, {'repaired' if stage == 'repair' else stage}"
                style = "--" if stage == "tuned" else "-"
                panel.plot(*zip(*points, strict=True), style, marker="o", markersize=4, color=colour, label=label)
        panel.set_title(rows["notes"][task]["title"], fontsize=10)
        panel.set_xlabel("MACs removed, percent")
        panel.spines[["top", "right"]].set_visible(False)
    panels[0][0].set_ylabel("accuracy, percent")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=3, frameon=False, fontsize=9)
    figure.tight_layout(rect=(0, 0.14, 1, 1))
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path, nargs="+", help="JSON files that keep the rows; new ones go into the first")
    parser.add_argument("--task", nargs="*", default=list(TASKS), choices=list(TASKS), help="none: only write the page")
    parser.add_argument("--criterion", nargs="+", default=list(CRITERIA), choices=list(CRITERIA))
    parser.add_argument("--fewer", nargs="+", type=float, default=list(FEWER), choices=(*FEWER, THIRD))
    parser.add_argument("--minutes", type=float, default=1e6, help="stop after the row that passes them")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="few images, printed and not kept")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    stop = time.monotonic() + 60 * options.minutes
    rows = Rows(options.rows[0])
    for name in options.task:
        measure(TASKS[name](options.quick), rows, options.criterion, options.fewer, stop)
    for other in options.rows[1:]:
        more = Rows(other)
        rows |= {**more, "notes": {**rows.get("notes", {}), **more.get("notes", {})}}
    keep("structured_accuracy.md", page(rows, options.threads), quick=options.quick)
    if not options.quick and any(lines_of(task, rows) for task in rows["notes"]):
        (PAGES / "structured_accuracy.svg").write_text(picture(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
