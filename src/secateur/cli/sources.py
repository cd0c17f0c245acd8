"""From the options of a command to a model, batches and an evaluator."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from secateur.models import Loaded


@dataclass(frozen=True)
class Inputs:
    """What a command works on."""

    loaded: Loaded
    data: Any = None
    train: Any = None
    evaluate: Callable[[nn.Module], Any] | None = None
    test: Any = None  #: the batches that `evaluate` goes through, where they were named

    @property
    def example(self) -> Any:
        """A batch to run the model on: the first of the data, what the model's source offers, or the first to test on."""
        if self.data is not None:
            return next(iter(self.data))
        if self.loaded.example is None and self.test is not None:
            return next(iter(self.test))
        return self.loaded.example


def load_inputs(
    model: str,
    *,
    data: str | None = None,
    train: str | None = None,
    test: str | None = None,
    evaluate: str | None = None,
    batch_size: int = 32,
    limit: int | None = None,
    threads: int | None = None,
) -> Inputs:
    """Load everything that was named on the command line."""
    import torch

    from secateur.data import default_evaluator, load_data, load_evaluator
    from secateur.models import load_model

    if threads is not None:
        torch.set_num_threads(threads)
    loaded = load_model(model)

    def batches(source: str | None, at_most: int | None = None) -> Any:
        return None if source is None else load_data(source, batch_size=batch_size, loaded=loaded, limit=at_most)

    tests = batches(test)
    measure = None
    if evaluate is not None:
        measure = load_evaluator(evaluate)
    elif test is not None:
        measure = default_evaluator(loaded, tests)
    return Inputs(loaded, batches(data, limit), batches(train), measure, tests)
