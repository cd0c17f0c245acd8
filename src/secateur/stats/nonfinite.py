"""Saying where NaN and infinite values come from. The passes only check sums; the search below runs once one is bad."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from secateur.errors import NonFiniteError


def explain(model: nn.Module, run: Callable[[], Any], batch: int) -> NoReturn:
    """Run once more with a hook on every module and raise NonFiniteError naming the first whose output is not finite."""

    def hook(name: str) -> Callable[..., None]:
        def look(module: nn.Module, args: Any, output: Any) -> None:
            leaves = pytree.tree_leaves(dict(output) if isinstance(output, Mapping) else output)
            for leaf in leaves:
                if isinstance(leaf, Tensor) and leaf.is_floating_point() and not bool(leaf.isfinite().all()):
                    nan, inf = int(leaf.isnan().sum()), int(leaf.isinf().sum())
                    raise NonFiniteError(
                        f"batch {batch}: the output of module {name!r} ({type(module).__name__}), shape {tuple(leaf.shape)}, "
                        f"has {nan} NaN and {inf} infinite values. Check the data there, or run the model in float32."
                    )

        return look

    handles = [module.register_forward_hook(hook(name)) for name, module in model.named_modules()]
    try:
        with torch.no_grad():
            run()
    finally:
        for handle in handles:
            handle.remove()
    raise NonFiniteError(f"batch {batch}: the loss is not finite though every module's output is: check labels and loss=")


def check_gradients(tensors: Mapping[str, Tensor]) -> None:
    """Raise NonFiniteError naming the first layer whose statistic is not finite, and how many values."""
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor.sum())) and not bool(tensor.isfinite().all()):
            bad = int((~tensor.isfinite()).sum())
            raise NonFiniteError(
                f"the gradients of layer {name!r}, shape {tuple(tensor.shape)}, have {bad} NaN or infinite values. "
                "Run the model in float32, or check the loss."
            )
