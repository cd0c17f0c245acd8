"""Taylor over units: what the loss would change by, to first order, if a gate on all of a unit were closed."""

from __future__ import annotations

from torch import Tensor

from secateur.criteria.registry import unit_criterion
from secateur.types import UnitNeed, UnitStats


@unit_criterion(
    "taylor_activation",
    on="inputs",
    needs={UnitNeed.GATE_ABS},
    source="Molchanov et al. 2017, Pruning CNNs for Resource Efficient Inference, eq. 8",
)
def taylor_activation(units: UnitStats) -> Tensor:
    """``E |sum over positions of dL/da * a|``, a being the unit's activations where the next layer reads them.

    The mean is over samples, each with the gradient of its own loss. Where several layers read the unit, each counts with the
    gradient that comes back through it alone. The paper divides by the number of positions and scales layers to equal norms;
    the sum as it is is the change of the loss, which layers can be compared by.
    """
    return units.need(UnitNeed.GATE_ABS)


@unit_criterion(
    "taylor_gate",
    on="norms",
    needs={UnitNeed.GATE_SQ},
    source="Molchanov et al. 2019, Importance Estimation for Neural Network Pruning, eq. 8 at gates after batch norm",
)
def taylor_gate(units: UnitStats) -> Tensor:
    """``E (g_gamma * gamma + g_beta * beta)^2``: the squared gradient of a gate after the normalisation, averaged over samples.

    ``g`` are the gradients of one sample's own loss in the scale and the shift of the normalisation that the unit goes through
    (the paper takes those of mini-batches). Their sum is the derivative of the loss by a factor on all the channel.
    """
    return units.need(UnitNeed.GATE_SQ)
