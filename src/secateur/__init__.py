"""Secateur prunes trained neural networks, repairs them, and proves what was lost and what was won.

Importing this package opens no file and imports no torch: each public name is loaded when it is first used.

    import secateur as sc
    result = sc.prune(model, sparsity=0.9, data=batches, evaluate=accuracy, out="runs/first")
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

#: Public name -> the module that defines it.
_HOME = {
    "LayerStats": "secateur.types",
    "MaskSet": "secateur.types",
    "Need": "secateur.types",
    "Recipe": "secateur.recipe",
    "Report": "secateur.types",
    "Result": "secateur.types",
    "SecateurError": "secateur.errors",
    "compress": "secateur.coding.compress",
    "criterion": "secateur.criteria",
    "deploy": "secateur.runtime.deploy",
    "dynamic": "secateur.dynamic.module",
    "export": "secateur.export.targets",
    "finetune": "secateur.train.finetune",
    "gradual": "secateur.train.gradual",
    "hold": "secateur.train.hold",
    "load": "secateur.export.artifact",
    "load_data": "secateur.data",
    "load_model": "secateur.models",
    "measure": "secateur.measure.measure",
    "plan": "secateur.prune",
    "prune": "secateur.prune",
    "prune_checkpoint": "secateur.stream.run",
    "reestimate_norms": "secateur.repair",
    "save": "secateur.export.artifact",
    "scan": "secateur.measure.scan",
}

if TYPE_CHECKING:
    from secateur.coding.compress import compress as compress
    from secateur.criteria import criterion as criterion
    from secateur.data import load_data as load_data
    from secateur.dynamic.module import dynamic as dynamic
    from secateur.errors import SecateurError as SecateurError
    from secateur.export.artifact import load as load
    from secateur.export.artifact import save as save
    from secateur.export.targets import export as export
    from secateur.measure.measure import measure as measure
    from secateur.measure.scan import scan as scan
    from secateur.models import load_model as load_model
    from secateur.prune import plan as plan
    from secateur.prune import prune as prune
    from secateur.recipe import Recipe as Recipe
    from secateur.repair import reestimate_norms as reestimate_norms
    from secateur.runtime.deploy import deploy as deploy
    from secateur.stream.run import prune_checkpoint as prune_checkpoint
    from secateur.train.finetune import finetune as finetune
    from secateur.train.gradual import gradual as gradual
    from secateur.train.hold import hold as hold
    from secateur.types import LayerStats as LayerStats
    from secateur.types import MaskSet as MaskSet
    from secateur.types import Need as Need
    from secateur.types import Report as Report
    from secateur.types import Result as Result

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'secateur' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})


class _Package(ModuleType):
    """`sc.prune` is a function, ``secateur.prune`` the module it lives in: importing the module must not hide the function."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOME and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
