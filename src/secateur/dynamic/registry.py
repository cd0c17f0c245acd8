"""The registry of methods whose execution depends on the input, and what each of them is."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from torch import nn

from secateur.data.batches import Batches
from secateur.registry import Registry


class Method(Protocol):
    """One way to let the input decide. Registered is a class whose constructor takes the options, all by keyword."""

    def attach(self, model: nn.Module) -> nn.Module:
        """Put gates that know nothing yet into `model`, in place, and return it (or what takes its place).

        The structure of the model and the options decide alone where gates go and what shapes their buffers have: this runs
        again when a saved model is loaded. Raises ModelError where the model has nothing that the method could gate.
        """
        ...

    def calibrate(self, model: nn.Module, data: Batches) -> None:
        """Fill the gates' buffers. `model` is what `attach` returned, in evaluation mode; all else in it stays as it is,
        unless the method is one that trains the model and says so."""
        ...


@runtime_checkable
class Preparing(Protocol):
    """A method some of whose options follow from the model as it runs: the size of a feature, the number of classes."""

    def prepare(self, model: nn.Module, data: Batches) -> dict[str, Any]:
        """Those options, as plain JSON; they are saved with the user's, so that `attach` has them again without data.

        `model` has no gates yet and is in evaluation mode, without gradients.
        """
        ...


#: Name -> class of a `Method`.
DYNAMIC: Registry[Any] = Registry("dynamic method")
