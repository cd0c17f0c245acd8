"""The traced program that most formats are made from: torch.export, with a batch of any size."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from secateur.errors import ExportError
from secateur.export.parity import Example
from secateur.measure.modes import evaluating

MOST = 1024  #: samples in a batch


def traced(model: nn.Module, example: Example, *, most: int = MOST) -> Any:
    """``torch.export.ExportedProgram`` of the model in evaluation mode: batches up to `most`, token sequences of any length.

    Tokens are integers ``[batch, positions]``. Raises ExportError where the model's Python cannot be followed.
    """
    two = example.resized(2)  # 1 would be taken for a constant
    batch = Dim("batch", min=1, max=most)

    def free(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return None
        sequence = value.dim() == 2 and not value.is_floating_point() and bool(example.kwargs)
        return {0: batch, 1: Dim.DYNAMIC} if sequence else {0: batch}  # as long as the model says

    shapes: Any = {k: free(v) for k, v in two.kwargs.items()} if two.kwargs else tuple(free(v) for v in two.args)
    try:
        with evaluating(model), torch.no_grad(), quiet():
            return torch.export.export(model, two.args, two.kwargs, dynamic_shapes=shapes, strict=False)
    except Exception as error:  # the tracer runs the model's own code and raises what that happens to raise
        reason = str(error).strip().split("\n")[0][:300]
        raise ExportError(
            f"torch.export cannot follow {type(model).__name__} with a batch of any size ({type(error).__name__}: {reason}). "
            "Control flow must not depend on values or on the batch size."
        ) from error


@contextmanager
def quiet() -> Iterator[None]:
    """Exporters warn of their own matters; what concerns the user is an error or in the result."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "torch.export", "executorch", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
