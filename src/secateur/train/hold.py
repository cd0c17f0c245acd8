"""Masks that hold: removed weights stay exactly zero through every step of an optimizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import BoolTensor, Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import ASGD, LBFGS, SGD, Adadelta, Adagrad, Adam, Adamax, AdamW, NAdam, Optimizer, RAdam, RMSprop, Rprop

from secateur.errors import LayerError, TrainingError, did_you_mean
from secateur.sharded import local, spread_like
from secateur.types import INTEGERS, MaskSet

COMPILED = "_orig_mod."  # what torch.compile puts into the names of a module's parameters
#: Optimizers in which an entry's step depends on that entry alone, so that gradients of removed weights do no harm.
_ELEMENTWISE = {SGD, Adam, AdamW, RMSprop, Adagrad, Adadelta, Adamax, NAdam, RAdam, ASGD, Rprop}


def hold(optimizer: Optimizer, masks: Mapping[str, BoolTensor], model: nn.Module | None = None) -> Held:
    """Keep the removed weights at exactly 0.0 in every step of `optimizer`, until `Held.release`.

    Masks are keyed by parameter name and optimizers know only tensors, so the names come from the optimizer where it was
    built with ``model.named_parameters()``, and from `model` where it was built with ``model.parameters()``. `model` may be
    compiled, wrapped by DistributedDataParallel, or moved to another device later.

    Nothing is added to the model: hooks on the optimizer clear the removed weights after each step. Gradients are left
    whole, so that methods which let weights grow back can read them, except in optimizers that mix the entries of a tensor
    (LBFGS, Adafactor, Muon and all that torch does not ship): there they are masked before the step. The optimizer's state
    (momentum and the like) is cleared at removed weights whenever masks change and whenever it is saved, loaded or
    released, so that nothing leaks. Closures, gradient accumulation, gradient scalers, fused and foreach variants and
    parameter groups need nothing special. Averages of weights (EMA) stay zero where they were made after the masks; call
    ``masks.apply(ema.module)`` once where they were made before. Costs one copy of the masked weights in memory and one
    pass over them a step.

    Raises TrainingError where the optimizer does not own a masked parameter, cannot be asked for names, or is held already;
    LayerError where a mask has another shape than its parameter.

    Example::

        optimizer = torch.optim.AdamW(model.named_parameters(), lr=1e-3)
        with sc.hold(optimizer, result.masks):
            train(model, optimizer)
    """
    return Held(optimizer, masks, model)


@dataclass
class _Entry:
    """One masked parameter and its mask as integers as wide as the weights: all bits set where kept, none where removed.

    Their bitwise and is the fastest way to an exact +0.0 (a product gives -0.0, and NaN of NaN).
    """

    parameter: Tensor
    bits: Tensor

    def clear(self, tensor: Tensor) -> None:
        """Zero the removed entries of a tensor of the parameter's shape, in place."""
        tensor, width = local(tensor), INTEGERS[tensor.element_size()]
        if self.bits.device != tensor.device or self.bits.dtype != width:
            self.bits = self.bits.to(tensor.device, width)
        tensor.view(width).bitwise_and_(self.bits)


class Held:
    """Masks held on one optimizer; made by `hold`. A context manager that releases them at its end."""

    def __init__(self, optimizer: Optimizer, masks: Mapping[str, BoolTensor], model: nn.Module | None = None):
        optimizer = innermost(optimizer)
        hooks = getattr(optimizer, "_optimizer_step_post_hooks", {})
        if any(isinstance(getattr(hook, "__self__", None), Held) for hook in hooks.values()):
            raise TrainingError("this optimizer holds masks already: call .update(masks) or .release() on what hold() returned")
        self._optimizer = optimizer
        self._parameters = _named_parameters(optimizer, model)
        self._set(masks)
        self._handles = [
            optimizer.register_step_post_hook(self._after_step),
            optimizer.register_state_dict_pre_hook(lambda _: self._clear_state()),
            optimizer.register_load_state_dict_post_hook(lambda _: self._clear_state()),
        ]
        if self._acts_before_steps():
            self._handles.append(optimizer.register_step_pre_hook(self._before_step))

    @property
    def masks(self) -> MaskSet:
        """The masks in force."""
        return self._masks

    def update(self, masks: Mapping[str, BoolTensor]) -> None:
        """Hold other masks from now on. Weights that come back start from 0.0 and with no momentum."""
        self._clear_state()
        self._set(masks)

    def apply(self) -> None:
        """Zero the removed weights now, as every step does."""
        for entry in self._entries:
            entry.clear(entry.parameter)

    def mask_gradients(self) -> None:
        """Zero the gradients of removed weights. Call it before you clip by the norm of all gradients."""
        for entry in self._entries:
            if entry.parameter.grad is not None and not entry.parameter.grad.is_sparse:
                entry.clear(entry.parameter.grad)

    def release(self) -> None:
        """Stop holding: hooks are removed, weights stay as they are and have no momentum where they were removed."""
        self._clear_state()
        for handle in self._handles:
            handle.remove()

    def __enter__(self) -> Held:
        return self

    def __exit__(self, *exception: object) -> None:
        self.release()

    def _acts_before_steps(self) -> bool:
        return type(self._optimizer) not in _ELEMENTWISE

    def _set(self, masks: Mapping[str, BoolTensor]) -> None:
        entries = [self._entry(name, mask) for name, mask in masks.items()]
        self._refill({name: entry.parameter for name, entry in zip(masks, entries, strict=True)})
        self._entries = entries
        self._masks = masks if isinstance(masks, MaskSet) else MaskSet(masks)
        self.apply()
        self._clear_state()

    def _parameter(self, name: str) -> Tensor:
        """The optimizer's own parameter of that name, or a TrainingError."""
        parameter = self._parameters.get(name.replace(COMPILED, ""))
        if parameter is None:
            raise TrainingError(
                f"the optimizer does not own the masked parameter {name!r}{did_you_mean(name, self._parameters)} "
                "Give the optimizer that parameter, or leave its mask out."
            )
        return parameter

    def _refill(self, parameters: Mapping[str, Tensor]) -> None:
        """Called before masks change, for what brings removed weights back."""

    def _entry(self, name: str, mask: Tensor) -> _Entry:
        parameter = self._parameter(name)
        if parameter.shape != mask.shape:
            raise LayerError(f"parameter {name!r} is {tuple(parameter.shape)}, its mask {tuple(mask.shape)}")
        bits = local(spread_like(mask, parameter)).to(parameter.device, INTEGERS[parameter.element_size()]).neg_()
        return _Entry(parameter, bits)

    def _before_step(self, _: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.mask_gradients()
        if len(args) > 1 and callable(args[1]):  # args[0] is the optimizer itself
            return (args[0], self._masking(args[1]), *args[2:]), kwargs
        if callable(kwargs.get("closure")):
            return args, {**kwargs, "closure": self._masking(kwargs["closure"])}
        return None

    def _masking(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        """The closure, its gradients masked: optimizers call it within the step."""

        def masked() -> Any:
            loss = closure()
            self.mask_gradients()
            return loss

        return masked

    def _after_step(self, *_: object) -> None:
        self.apply()

    def _clear_state(self) -> None:
        """Zero the removed entries of all of the optimizer's state that has the shape of a masked parameter."""
        if isinstance(self._optimizer, LBFGS):
            return self._clear_history()
        for entry in self._entries:
            state = self._optimizer.state.get(entry.parameter, {})
            for value in state.values():
                if isinstance(value, Tensor) and value.shape == entry.parameter.shape:
                    entry.clear(value)
        return None

    def _clear_history(self) -> None:
        """Make LBFGS start anew where what it remembers would move a removed weight: curvature cannot be cut in pieces."""
        owned = [p for group in self._optimizer.param_groups for p in group["params"]]
        removed = {id(e.parameter): e.bits.reshape(-1) == 0 for e in self._entries}
        flat = torch.cat([removed.get(id(p), torch.zeros(p.numel(), dtype=torch.bool, device=p.device)) for p in owned])
        state = self._optimizer.state.get(owned[0], {})
        vectors = [v for value in state.values() for v in (value if isinstance(value, list) else [value])]
        if any(isinstance(v, Tensor) and v.shape == flat.shape and v[flat.to(v.device)].any() for v in vectors):
            self._optimizer.state.clear()


def unwrapped(model: nn.Module) -> nn.Module:
    """The user's own module inside what torch.compile and DistributedDataParallel make of it."""
    while isinstance(model, DistributedDataParallel) or hasattr(model, "_orig_mod"):
        model = model.module if isinstance(model, DistributedDataParallel) else model._orig_mod  # type: ignore[assignment]
    return model


def innermost(optimizer: Optimizer) -> Optimizer:
    """The optimizer that makes the steps, inside what Accelerate makes of it. Raises TrainingError where it is none."""
    while isinstance(getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = optimizer.optimizer  # type: ignore[attr-defined]
    if not isinstance(optimizer, Optimizer):
        raise TrainingError(f"hold needs a torch.optim.Optimizer, got {type(optimizer).__name__}")
    return optimizer


def _named_parameters(optimizer: Optimizer, model: nn.Module | None) -> dict[str, Tensor]:
    """The optimizer's parameters by name, without what compiling and wrapping put into names."""
    if model is not None:
        model = unwrapped(model)
        owned = {id(p) for group in optimizer.param_groups for p in group["params"]}
        named = [(n, p) for n, p in model.named_parameters(remove_duplicate=False) if id(p) in owned]
    elif all("param_names" in group for group in optimizer.param_groups):
        groups = optimizer.param_groups
        named = [pair for g in groups for pair in zip(g["param_names"], g["params"], strict=True)]
    else:
        raise TrainingError(
            "the optimizer does not know its parameters by name: build it with model.named_parameters() instead of "
            "model.parameters(), or call hold(optimizer, masks, model=model)"
        )
    return {name.replace(COMPILED, ""): parameter for name, parameter in named}
