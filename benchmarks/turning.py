"""Several models on real inputs in turn, timed by turns."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from conditions import Rows
from torch import nn

from secateur.data.batches import Batch, forward
from secateur.measure.latency import compare_latency


class Turning(nn.Module):
    """A model that runs on another input at every call, and remembers how long it took."""

    def __init__(self, model: nn.Module, inputs: Sequence[Batch]):
        super().__init__()
        self.model, self.inputs, self.seconds = model, inputs, list[float]()

    def forward(self, _: Any) -> Any:  # noqa: D102
        chosen = self.inputs[len(self.seconds) % len(self.inputs)]
        started = time.perf_counter()
        out = forward(self.model, chosen)
        self.seconds.append(time.perf_counter() - started)
        return out


@torch.inference_mode()
def time_by_turns(rows: Rows, name: str, models: Mapping[str, nn.Module], inputs: Sequence[Batch], runs: int) -> None:
    """One row ``{name}/time/{model}`` for each of the models, the first being the reference. One thread, batches as given."""
    turning = {what: Turning(model.eval(), inputs) for what, model in models.items()}
    found = compare_latency(turning, torch.zeros(1), runs=runs, warmup=min(20, runs), threads=1)
    for what, figure in found.items():
        row = {"ms": figure.latency.median_ms, "speedup": figure.speedup, "low": figure.low, "high": figure.high}
        row["mean_ms"] = 1e3 * sum(turning[what].seconds) / len(turning[what].seconds)
        rows.keep(f"{name}/time/{what}", row)
