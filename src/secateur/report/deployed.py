"""What `secateur.deploy` measured, as one page: the time of each layer, dense and sparse, and what was chosen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from secateur.report import charts
from secateur.report import format as fmt
from secateur.report.build import environment
from secateur.report.html import NARROW, WIDE, empty_context, inline_svg, page

if TYPE_CHECKING:
    from secateur.runtime.summary import Summary


@dataclass(frozen=True)
class LayerTime:
    """One layer of a deployed model as the page shows it."""

    name: str
    shape: str  #: of the weight
    sparsity: float
    runtime: str
    dense_ms: float | None
    sparse_ms: float | None  #: the best of the runtimes that were tried
    remark: str  #: why it stays dense, or which activation went into it

    @property
    def replaced(self) -> bool:
        """Whether a sparse runtime was chosen."""
        return self.runtime != "dense"


def layer_times(summary: Summary) -> tuple[LayerTime, ...]:
    """A row for each layer, in the order of the model."""
    return tuple(
        LayerTime(
            layer.name or "the model itself",
            fmt.shape(layer.shape) if layer.shape else "",
            layer.sparsity,
            layer.runtime,
            layer.dense_ms,
            min(layer.sparse_ms.values(), default=None),
            layer.reason or (f"with {layer.fused}" if layer.fused else ""),
        )
        for layer in summary.layers
    )


def render_deployed(summary: Summary, title: str) -> str:
    """The page, self-contained as `secateur.report.html.render`'s.

    Example::

        Path("deployed.html").write_text(render_deployed(fast.summary, "resnet18"), encoding="utf-8")
    """
    layers = layer_times(summary)
    timed = [layer for layer in layers if layer.dense_ms is not None and layer.sparse_ms is not None]
    replaced = [layer for layer in layers if layer.replaced]
    passes = f"{fmt.milliseconds(summary.dense_ms)} dense, {fmt.milliseconds(summary.deployed_ms)} deployed"
    threads = fmt.plural(summary.threads, "thread")
    context = empty_context() | {
        "title": title,
        "verdict": f"One forward pass takes {passes}: {summary.speedup:.2f} times as fast on {threads}.",
        "tiles": (
            {"label": "Speedup", "value": f"{summary.speedup:.2f}x", "detail": passes},
            {"label": "Layers replaced", "value": str(len(replaced)), "detail": f"of {len(layers)}"},
            {"label": "Outputs differ by", "value": f"{summary.error:.0e}", "detail": "of the largest output"},
            {"label": "BatchNorms folded", "value": str(len(summary.folded)), "detail": "into the layers before them"},
        ),
        "timings": _timings(layers, timed),
        "notes": summary.notes,
        "environment": environment(),
    }
    return page(context)


def _timings(layers: tuple[LayerTime, ...], timed: list[LayerTime]) -> dict[str, Any]:
    few = len(timed) <= charts.MOST_BARS
    draw = charts.time_bars if few else charts.time_skyline
    label = f"Milliseconds of each of {fmt.plural(len(timed), 'layer')}, dense and sparse. The table below has the figures."
    widths = {"wide": WIDE, "narrow": NARROW}
    drawn = {key: inline_svg(draw(timed, width), f"timings-{key}", label) if timed else "" for key, width in widths.items()}
    return {**drawn, "table": layers, "open": len(layers) <= charts.MOST_BARS}
