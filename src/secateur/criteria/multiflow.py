"""MULTIFLOW: a weight as a connection between two neurons, as important as what flows through both."""

from __future__ import annotations

from torch import Tensor

from secateur.criteria.registry import criterion
from secateur.types import LayerStats, Need


@criterion("multiflow", needs={Need.INPUT_NORM}, source="Farina et al. 2024, MULTIFLOW, eq. 4 to 6")
def multiflow(layer: LayerStats) -> Tensor:
    """``|w_ij|`` times the mean flow ``|w_ij| a_j`` out of input neuron j and the mean flow into output neuron i.

    ``a_j`` is the norm of the input feature over all samples and positions but padding. For convolutions an input neuron is
    one position of the kernel in one input channel; in a grouped convolution it reaches the outputs of its group only.
    Scores are comparable within a layer. The paper takes the number of weights of each layer from a global ranking by
    magnitude within each modality: ``allocation = "magnitude"`` and ``groups = "modality"``.
    """
    magnitude = layer.weight.abs()
    outputs = magnitude.shape[0]
    flow = (magnitude * layer.need(Need.INPUT_NORM)).reshape(layer.groups, outputs // layer.groups, -1).contiguous()
    received, emitted = flow.mean(2, keepdim=True), flow.mean(1, keepdim=True)
    return magnitude * (_unit(received) * _unit(emitted)).reshape(magnitude.shape)


def _unit(flow: Tensor) -> Tensor:
    """Scaled to a largest value of one: a factor of the whole layer, which changes no order and keeps the product finite."""
    largest = flow.max()
    return flow / largest if largest > 0 else flow
