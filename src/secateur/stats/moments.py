"""First and second moments of the inputs of layers: the Gram matrix with an input that is always 1."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from secateur.data.batches import Batches, forward
from secateur.layers import Layer
from secateur.progress import track
from secateur.stats import nonfinite
from secateur.stats.blocks import portions
from secateur.stats.gram import Grams
from secateur.stats.guard import check_reached, ordinary, untouched


def input_moments(
    model: nn.Module, layers: Mapping[str, Layer], batches: Batches, *, seed: int = 0
) -> Iterator[dict[str, Tensor]]:
    """``[groups, d + 1, d + 1]`` float64 by layer, in as many passes as memory asks for: see `Grams` with its constant input.

    The model is left as it was. Raises LayerError for a layer that is not reached or whose inputs cannot be read, and
    NonFiniteError for NaN or infinite activations.
    """
    for some in portions(layers):
        watcher = Grams(model, some, constant=True)
        with untouched(model, [], seed), torch.no_grad():
            for index, batch in enumerate(track(batches, "moments of the inputs")):
                batch = ordinary(batch)
                with watcher.recording(batch):
                    forward(model, batch)
                if not watcher.finite():
                    nonfinite.explain(model, lambda batch=batch: forward(model, batch), index)  # type: ignore[misc]
        check_reached([name for name in some if name not in watcher.seen], "no call was seen of the modules of")
        yield watcher.take()
