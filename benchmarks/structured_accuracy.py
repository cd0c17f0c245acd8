"""Accuracy of trained networks after units are cut out, beside Torch-Pruning at the same multiply-adds and criterion.

ResNet-56 and ResNet-20 on CIFAR-10, EfficientNet-Lite0 on ImageNet, MiniLM on STS-B; 20, 35 and 50% fewer multiply-adds; at once
with BatchNorm statistics re-estimated, with least-squares repair, and after a short fine-tuning that is the same for both.
Every row is kept in the JSON file as soon as it is known, and not measured again; `--minutes` stops after the row that passes
them. Writes docs/benchmarks/structured_accuracy.md and .svg from all rows in the file.

    python benchmarks/structured_accuracy.py rows.json [--task resnet56] [--criterion L1] [--minutes 9] [--quick]
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import os
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from conditions import PAGES, conditions, keep, table
from structured_tasks import TASKS, Task
from torch import nn

import secateur as sc
from secateur.graph import cut as cut_model

FEWER = (0.2, 0.35, 0.5)
#: Our criterion and reduction, and the peer's importance.
CRITERIA: dict[str, tuple[dict[str, Any], Callable[[Any], Any]]] = {
    "L1": ({"criterion": "magnitude"}, lambda tp: tp.importance.GroupMagnitudeImportance(p=1)),
    "L2": ({"criterion": "magnitude", "reduction": "l2"}, lambda tp: tp.importance.GroupMagnitudeImportance(p=2)),
    "Taylor": ({"criterion": "taylor"}, lambda tp: tp.importance.GroupTaylorImportance()),
    "random": ({"criterion": "random"}, lambda tp: tp.importance.RandomImportance()),
}
TUNED = ("L1", "Taylor")  # criteria whose cuts are fine-tuned as well


class Rows:
    """Figures by key, in a file: what is there is not measured again."""

    def __init__(self, path: Path):
        self.path = path
        self.found: dict[str, dict[str, float]] = json.loads(path.read_text()) if path.exists() else {}

    def keep(self, key: str, row: dict[str, float]) -> None:
        self.found[key] = row
        beside = self.path.with_suffix(".tmp")
        beside.write_text(json.dumps(self.found, indent=1))
        os.replace(beside, self.path)
        print(key, row, flush=True)


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

    sparsity = bisect(macs_at, task.macs(task.model) * (1 - fewer))
    yield "norms", cut(task, criterion, sparsity, reestimate_norms=True)
    repaired = cut(task, criterion, sparsity, repair="least-squares")
    yield "repair", repaired
    if criterion in TUNED:
        yield "tuned", tuned(task, repaired)


def cut(task: Task, criterion: str, sparsity: float, **how: Any) -> nn.Module:
    model = task.model
    for keys in task.cuts:
        keys = {**keys, **CRITERIA[criterion][0], **how}
        model = sc.prune(model, sparsity=sparsity, data=task.data, example=task.example, loss=task.loss, **keys).model
    return model


def peer(task: Task, criterion: str, fewer: float) -> Iterator[tuple[str, nn.Module]]:
    """Torch-Pruning's network by stage: norms re-estimated by our function, and fine-tuned."""
    import torch_pruning as tp

    dense = copy.deepcopy(task.model)
    dense.requires_grad_(True)
    gradients = _gradients(task, dense) if criterion == "Taylor" else {}

    @functools.cache
    def pruned(ratio: float) -> nn.Module:
        torch.manual_seed(0)
        model = copy.deepcopy(task.model).requires_grad_(True)
        for name, parameter in model.named_parameters():
            parameter.grad = gradients.get(name)
        importance = CRITERIA[criterion][1](tp)
        tp.pruner.BasePruner(model, task.example, importance, **task.peer(model, ratio)).step()
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


def measure(task: Task, rows: Rows, criteria: list[str], stop: float) -> None:
    """All rows of a task that are not known yet, until the time is up."""
    dense = task.macs(task.model)
    for stage in ("norms", "tuned"):
        if f"{task.name}/dense/{stage}" not in rows.found:
            started = time.process_time()
            model = task.model if stage == "norms" else tuned(task, task.model)
            seconds = time.process_time() - started
            rows.keep(f"{task.name}/dense/{stage}", {"quality": task.evaluate(model), "fewer": 0.0, "seconds": seconds})
    for criterion in criteria:
        for fewer in FEWER:
            for tool, make in TOOLS.items():
                stages = ["norms", *(["repair"] if make is ours else []), *(["tuned"] if criterion in TUNED else [])]
                if all(f"{task.name}/{tool}/{criterion}/{fewer}/{s}" in rows.found for s in stages):
                    continue
                started = time.process_time()
                for stage, model in make(task, criterion, fewer):
                    seconds = time.process_time() - started
                    row = {"quality": task.evaluate(model), "fewer": 1 - task.macs(model) / dense, "seconds": seconds}
                    rows.keep(f"{task.name}/{tool}/{criterion}/{fewer}/{stage}", row)
                    started = time.process_time()
                if time.monotonic() > stop:
                    return


def page(rows: Rows, options: argparse.Namespace, seconds: float) -> list[str]:
    return []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path, help="JSON file that keeps the rows")
    parser.add_argument("--task", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--criterion", nargs="+", default=list(CRITERIA), choices=list(CRITERIA))
    parser.add_argument("--tool", nargs="+", default=list(TOOLS), choices=list(TOOLS))
    parser.add_argument("--minutes", type=float, default=1e6, help="stop after the row that passes them")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="few images, one criterion, printed and not kept")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    started = time.monotonic()
    rows = Rows(options.rows)
    for tool in set(TOOLS) - set(options.tool):
        del TOOLS[tool]
    for name in options.task:
        measure(TASKS[name](options.quick), rows, options.criterion, started + 60 * options.minutes)


if __name__ == "__main__":
    main()
