"""What gates around one linear layer share."""

from __future__ import annotations

from torch import Tensor, nn

from secateur.dynamic.gate import Gate


class LinearGate(Gate):
    """A gate around a linear layer, of which it shows weight and bias as the layer has them."""

    def __init__(self, linear: nn.Module, *, swap: bool = False):
        """`swap` says that the weight of `linear` is stored ``[in, out]``, as GPT-2 has it."""
        super().__init__()
        self.linear, self.swap = linear, swap

    @property
    def weight(self) -> nn.Parameter:
        """Of the layer inside, as that stores it."""
        return self.linear.weight  # type: ignore[return-value]

    @property
    def bias(self) -> nn.Parameter | None:
        """Of the layer inside."""
        return self.linear.bias  # type: ignore[return-value]

    @property
    def by_input(self) -> Tensor:
        """The weight as ``[in, out]``."""
        return self.weight if self.swap else self.weight.t()

    @property
    def by_output(self) -> Tensor:
        """The weight as ``[out, in]``."""
        return self.weight.t() if self.swap else self.weight

    @property
    def macs(self) -> int:
        """Dense multiply-adds for one position."""
        return self.weight.numel()
