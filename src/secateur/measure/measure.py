"""Everything that is measured of one model, in one call."""

from __future__ import annotations

import logging

from torch import nn

from secateur.data.batches import Batch
from secateur.errors import ArtifactError
from secateur.export.artifact import weights_bytes
from secateur.measure.latency import latency as time_forward
from secateur.measure.macs import macs
from secateur.measure.quality import Evaluate, qualities
from secateur.measure.sizes import sizes
from secateur.types import Measurement

log = logging.getLogger("secateur")


def measure(
    model: nn.Module,
    example: Batch | None = None,
    *,
    evaluate: Evaluate | None = None,
    latency: bool = True,
    runs: int | None = None,
    warmup: int | None = None,
    threads: int | None = None,
) -> Measurement:
    """Parameters, nonzeros and bytes; with an `example` also multiply-adds and latency, with `evaluate` also quality.

    Args:
        model: any module; it is left as it was, in the mode it was in.
        example: a batch as the model takes it: a tensor, a tuple ``(inputs, labels)``, or a mapping of keyword arguments.
            Multiply-adds and milliseconds are for the entire batch.
        evaluate: ``evaluate(model) -> float`` or a mapping of floats.
        latency: False leaves the timing out, which takes about a second.
        runs: timed forward passes; as many as fit in a second by default, at least 3.
        warmup: passes before them that do not count.
        threads: torch threads for the timing; as they are by default.

    A multiply-add (MAC) is one multiplication with its addition: two FLOPs. See `secateur.measure.macs.macs` for what is
    counted. `bytes_disk` is exactly what `sc.save` would write for the weights, None (and logged) for tensors that
    cannot be saved.

    Raises ModelError where the model has no values or does not run on the example; DataError for an `evaluate` that
    returns no number.

    Example:
        >>> import torch
        >>> measure(nn.Linear(3, 2), torch.zeros(8, 3), latency=False).macs
        48
    """
    size = sizes(model)
    cost = macs(model, example) if example is not None else None
    if cost is not None and cost.uncounted:
        log.warning("the multiply-adds of these operations are unknown and not counted: %s", ", ".join(cost.uncounted))
    timed = example is not None and latency
    return Measurement(
        parameters=size.parameters,
        nonzeros=size.nonzeros,
        bytes_memory=size.bytes_memory,
        bytes_disk=_bytes_disk(model),
        macs=cost.dense if cost else None,
        macs_nonzero=cost.nonzero if cost else None,
        latency=time_forward(model, example, runs=runs, warmup=warmup, threads=threads) if timed else None,
        quality=qualities(evaluate, model) if evaluate is not None else {},
    )


def _bytes_disk(model: nn.Module) -> int | None:
    try:
        return weights_bytes(model)
    except ArtifactError as error:
        log.warning("bytes on disk are not known: %s", error)
        return None
