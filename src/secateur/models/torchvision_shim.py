"""Makes torchvision importable beside a CPU torch that its compiled operators were not built for.

A torchvision wheel whose extension does not load (a CPU torch beside a CUDA torchvision is the usual case) still tries to
give ``torchvision::nms`` and ``torchvision::qnms`` a fake implementation and fails at import with ``operator torchvision::nms
does not exist``, although its models, transforms and datasets need neither. Declaring the two operators, without an
implementation, lets the import go on; calling one still fails, as it should. timm and transformers import torchvision too.
"""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType

import torch

from secateur.errors import MissingExtra, ModelError

_SCHEMAS = {
    "nms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}


def import_torchvision(purpose: str) -> ModuleType:
    """The torchvision package, with the missing operators declared where its import fails for want of them.

    Raises MissingExtra where it is not installed and ModelError where it is and cannot be imported for another reason.
    `purpose` completes "... needs the package torchvision".
    """
    try:
        return importlib.import_module("torchvision")
    except ModuleNotFoundError as error:
        raise MissingExtra(error.name or "torchvision", "vision", purpose) from error
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise ModelError(f"torchvision is installed but cannot be imported: {error}") from error
    _declare_missing_operators()
    try:
        return importlib.import_module("torchvision")
    except RuntimeError as error:
        raise ModelError(f"torchvision is installed but cannot be imported: {error}") from error


def prepare_torchvision() -> None:
    """Import torchvision where it is installed, for packages that import it themselves; do nothing where it is not."""
    if importlib.util.find_spec("torchvision") is not None:
        import_torchvision("this model")


def _declare_missing_operators() -> None:
    for name, schema in _SCHEMAS.items():
        if not hasattr(torch.ops.torchvision, name):
            torch.library.define(f"torchvision::{name}", schema)
