"""Leaving a model exactly as it was found: modes, flags, buffers, random state, and the caller's autograd settings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from secateur.data.batches import Batch
from secateur.errors import LayerError, ModelError


@contextmanager
def untouched(model: nn.Module, differentiate: Sequence[nn.Parameter], seed: int) -> Iterator[None]:
    """Eval mode, gradients on for `differentiate`, the random state of `seed`; afterwards everything is as before, bit for bit.

    Modes are set module by module, not by ``model.eval()``, which some modules override to merge weights. It works inside
    ``no_grad`` and ``inference_mode``. No ``.grad`` is ever written: use ``torch.autograd.grad`` inside. Raises ModelError for
    parameters made under ``inference_mode``, which can have no gradient.
    """
    if any(p.is_inference() for p in differentiate):
        raise ModelError("parameters made under torch.inference_mode() can have no gradient: build the model outside of it")
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(_random_state(model, seed))
        stack.enter_context(_eval_mode(model))
        stack.enter_context(_buffers(model))
        stack.enter_context(_requires_grad(differentiate))
        stack.enter_context(_backend(model))
        yield


def ordinary(batch: Batch) -> Batch:
    """The batch without inference tensors, which autograd refuses."""

    def plain(tensor: Tensor) -> Tensor:
        return tensor.clone() if tensor.is_inference() else tensor

    if hasattr(batch, "keys"):
        return {k: plain(v) if isinstance(v, Tensor) else v for k, v in batch.items()}
    return pytree.tree_map_only(Tensor, plain, batch)


def check_reached(missing: Sequence[str], what: str) -> None:
    """Raise LayerError naming the layers of which `what` is true, as in "the loss does not reach"."""
    if missing:
        raise LayerError(
            f"{what} {len(missing)} of the layers: {listed(missing)}. "
            "Leave them out with ignore=, take another criterion, or give data and a loss that use them."
        )


def listed(names: Sequence[str]) -> str:
    """The first names of a list, and how many more there are."""
    return ", ".join(repr(n) for n in names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


@contextmanager
def _random_state(model: nn.Module, seed: int) -> Iterator[None]:
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices):
        torch.default_generator.manual_seed(seed)
        for device in devices:
            torch.cuda.default_generators[device].manual_seed(seed)
        yield


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in modes:
            module.training = False
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def _buffers(model: nn.Module) -> Iterator[None]:
    saved = [(module, dict(module._buffers)) for module in model.modules() if module._buffers]
    tensors = {id(b): b for _, buffers in saved for b in buffers.values() if b is not None and not b.is_inference()}
    copies = {key: (b._version, b.detach().clone()) for key, b in tensors.items()}
    try:
        yield
    finally:
        for module, buffers in saved:
            module._buffers.clear()
            module._buffers.update(buffers)
        with torch.no_grad():
            for key, (version, copy) in copies.items():
                if tensors[key]._version != version:
                    tensors[key].copy_(copy)


@contextmanager
def _requires_grad(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    flags = [(p, p.requires_grad) for p in parameters]
    try:
        for parameter, _ in flags:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


@contextmanager
def _backend(model: nn.Module) -> Iterator[None]:
    """Off: fused attention, which calls no submodule, and cuDNN where modules are recurrent: it has no backward in eval."""
    fast = torch.backends.mha.get_fastpath_enabled()
    recurrent = any(isinstance(m, nn.RNNBase) and next(m.parameters()).is_cuda for m in model.modules())
    with ExitStack() as stack:
        if recurrent:
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        try:
            torch.backends.mha.set_fastpath_enabled(False)
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)


def leaves_and_spec(batch: Batch) -> tuple[list[Any], Any]:
    """The leaves of a batch and the pytree that holds them; a Hugging Face encoding counts as a plain dict."""
    return pytree.tree_flatten(dict(batch) if hasattr(batch, "keys") else batch)
