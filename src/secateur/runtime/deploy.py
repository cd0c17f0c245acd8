"""A pruned model made fast: every layer runs in whichever way was measured to be the fastest on its real input."""

from __future__ import annotations

import copy
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace as changed
from typing import Any

import torch
from torch import Tensor, nn

from secateur.data.batches import Batch, device_of, forward, inputs_of, output_tensor, to_device
from secateur.errors import ModelError, RecipeError
from secateur.measure.latency import Comparison, compare_latency
from secateur.measure.modes import using_threads
from secateur.progress import track
from secateur.runtime import fold, pool
from secateur.runtime.modules import DepthwiseConv2d, SparseLayer
from secateur.runtime.runtimes import LEAST_SPARSITY, RUNTIMES, Runtime
from secateur.runtime.summary import LayerChoice, Summary

log = logging.getLogger("secateur")

_CANDIDATES = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_POOL = "sliced max-pool"
_GAIN = 1.05  #: a layer is replaced from this speedup on; less is within the noise
_TOLERANCE = 1e-3  #: relative difference of outputs above which something is broken
_CACHE = 32 << 20  #: bytes of weights from which on a model does not stay in the caches from one pass to the next
_FUSING = (SparseLayer, DepthwiseConv2d)  #: layers that can apply the activation behind them


def deploy(
    model: nn.Module,
    example: Batch,
    *,
    runtimes: Sequence[str] | None = None,
    threads: int | None = None,
    seconds: float = 0.2,
) -> nn.Module:
    """A copy of `model` for inference whose sparse layers run in the fastest way found on this machine.

    BatchNorm is folded into the layer before it. Then each linear and convolution layer is timed on the input it meets when
    the model runs `example`: dense, and in each of `runtimes` (names of `RUNTIMES`; by default all that keep the weights as
    they are) that does not refuse it, for about `seconds` each. The fastest stays; dense where nothing wins. If the whole comes
    out slower than the dense model, the dense model is what you get. ``result.summary`` (`Summary`, printable) tells what was
    chosen and why.

    The copy is in evaluation mode, needs no gradient, can be copied, compiled, exported and saved (`secateur.runtime.save`),
    and holds for the threads it was measured with: `threads`, or those torch uses now.

    Raises RecipeError for unknown runtimes, ModelError where the deployed model does not give the outputs of the model.

    Example:
        >>> fast = deploy(nn.Sequential(nn.Linear(64, 64), nn.ReLU()), torch.randn(8, 64), seconds=0.01)
        >>> fast.summary.layers[0].runtime
        'dense'
    """
    tried = {name: RUNTIMES[name].make() for name in (RUNTIMES if runtimes is None else runtimes)}
    if runtimes is None:
        tried = {name: runtime for name, runtime in tried.items() if runtime.exact}
    if not seconds > 0:
        raise RecipeError(f"seconds must be more than 0, got {seconds}")
    dense = copy.deepcopy(model).eval().requires_grad_(False)
    example = to_device(example, device_of(dense))
    with using_threads(threads) as used, torch.inference_mode(False), torch.no_grad():
        reference = output_tensor(forward(dense, example)).clone()
        folded = _fold(dense, example)
        fast = copy.deepcopy(dense)
        inputs, activations = _inputs(fast, example), _activations(fast, example)
        evict = _evictor(fast)
        choices = tuple(
            _choose(fast, name, module, inputs.get(module), activations.get(name), tried, seconds, evict)
            for name, module in track(_layers(fast), "timing layers")
        )
        choices = _take_out(fast, choices, activations)
        summary = Summary(choices, 0.0, 0.0, 1.0, 0.0, used, tuple(folded))
        return _finish(dense, fast, example, reference, summary, seconds, all(r.exact for r in tried.values()))


def _fold(model: nn.Module, example: Batch) -> list[tuple[str, str]]:
    args, kwargs = inputs_of(example)
    names = {module: name for name, module in model.named_modules()}
    folded = []
    pairs = fold.find_pairs(model, args, kwargs, fold.is_foldable)
    followers = Counter(pair.follower for pair in pairs)
    for pair in pairs:
        if followers[pair.follower] == 1 and fold.fold_checked(pair):
            fold.replace(model, pair.follower, nn.Identity())
            folded.append((names[pair.layer], names[pair.follower]))
    return folded


def _activations(model: nn.Module, example: Batch) -> dict[str, nn.Module]:
    """Activation modules that alone read a layer's output, by its name. One may serve several layers, but nothing else."""
    args, kwargs = inputs_of(example)
    pairs = fold.find_pairs(model, args, kwargs, lambda module: fold.activation_of(module) is not None)
    names = {module: name for name, module in model.named_modules()}
    return {names[pair.layer]: pair.follower for pair in pairs}


def _layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Weight layers, and max-poolings, which in a sparse network may take longer than the convolutions between them."""
    modules = model.named_modules()
    return [(n, m) for n, m in modules if isinstance(m, _CANDIDATES) or pool.refuses(m) is None]


def _inputs(model: nn.Module, example: Batch) -> dict[nn.Module, Tensor]:
    """The first input that each layer meets, kept as it lies in memory."""
    seen: dict[nn.Module, Tensor] = {}

    def met(module: nn.Module, args: tuple[Any, ...]) -> None:
        if module not in seen and args and isinstance(args[0], Tensor):
            seen[module] = args[0].detach().clone()

    handles = [module.register_forward_pre_hook(met) for _, module in _layers(model)]
    try:
        forward(model, example)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _choose(
    model: nn.Module,
    name: str,
    module: nn.Module,
    x: Tensor | None,
    activation: nn.Module | None,
    runtimes: dict[str, Runtime],
    seconds: float,
    evict: Tensor | None,
) -> LayerChoice:
    """Time one layer, together with the activation that could go into it, put the fastest into `model`, and say so."""
    if not isinstance(module, _CANDIDATES):
        return _choose_pool(model, name, module, x, seconds)
    weight: Tensor = module.weight  # type: ignore[assignment]
    sparsity = 1.0 - int(weight.count_nonzero()) / max(weight.numel(), 1)
    choice = LayerChoice(name, tuple(weight.shape), tuple(x.shape) if x is not None else None, sparsity, "dense")
    if x is None:
        return changed(choice, reason="the example does not call it as a module")
    if not fold.is_plain(module):
        return changed(choice, reason="it has hooks or parametrizations, which a replacement would lose")
    if sparsity < LEAST_SPARSITY:
        runtimes = {key: runtime for key, runtime in runtimes.items() if not runtime.needs_zeros}
    refusals = {key: runtime.refuses(module, x) for key, runtime in runtimes.items()}
    fits = {key: runtimes[key].convert(module) for key, reason in refusals.items() if reason is None}
    if not fits:
        few = sparsity < LEAST_SPARSITY
        return changed(choice, reason=f"only {sparsity:.0%} of its weights are zero" if few else _common(refusals))
    times = _compare(_with_activation({"dense": module, **fits}, activation), x, seconds, evict)
    best = max(fits, key=lambda key: times[key].speedup)
    choice = changed(
        choice, dense_ms=times["dense"].latency.median_ms, sparse_ms={key: times[key].latency.median_ms for key in fits}
    )
    if times[best].speedup < _GAIN:
        return changed(choice, reason=f"{best} gives {times[best].speedup:.2f}x")
    fold.replace(model, module, fits[best])
    return changed(choice, runtime=best)


def _take_out(model: nn.Module, choices: Sequence[LayerChoice], activations: dict[str, nn.Module]) -> tuple[LayerChoice, ...]:
    """Remove the activations that went into layers. One that also serves a layer that stays dense must stay for all."""
    served: dict[nn.Module, list[str]] = {}
    for layer, activation in activations.items():
        served.setdefault(activation, []).append(layer)
    fused: dict[str, str] = {}
    for activation, layers in served.items():
        takers = [taker for taker in map(model.get_submodule, layers) if isinstance(taker, _FUSING)]
        if len(takers) == len(layers):
            (where, *_) = fold.replace(model, activation, nn.Identity())
            fused |= dict.fromkeys(layers, where)
        else:
            for taker in takers:
                taker.activation = "none"
    return tuple(changed(choice, fused=fused.get(choice.name, "")) for choice in choices)


def _choose_pool(model: nn.Module, name: str, module: nn.Module, x: Tensor | None, seconds: float) -> LayerChoice:
    choice = LayerChoice(name, (), tuple(x.shape) if x is not None else None, 0.0, "dense")
    if x is None or x.device.type != "cpu" or not fold.is_plain(module):
        return changed(choice, reason="the example does not call it on the CPU, or it has hooks")
    times = _compare({"dense": module, _POOL: pool.SlicedMaxPool2d()}, x, seconds)
    choice = changed(choice, dense_ms=times["dense"].latency.median_ms, sparse_ms={_POOL: times[_POOL].latency.median_ms})
    if times[_POOL].speedup < _GAIN:
        return changed(choice, reason=f"{_POOL} gives {times[_POOL].speedup:.2f}x")
    fold.replace(model, module, pool.SlicedMaxPool2d())
    return changed(choice, runtime=_POOL)


def _with_activation(modules: dict[str, nn.Module], activation: nn.Module | None) -> dict[str, nn.Module]:
    """Each module with the activation behind it: inside where the kernel can, else as a module of its own."""
    if activation is None:
        return modules
    for module in modules.values():
        if isinstance(module, _FUSING):
            module.activation = fold.activation_of(activation) or "none"
    return {key: m if isinstance(m, _FUSING) else nn.Sequential(m, activation) for key, m in modules.items()}


def _common(refusals: dict[str, str | None]) -> str:
    """Distinct reasons, each with the runtimes that gave it."""
    by_reason: dict[str, list[str]] = {}
    for key, reason in refusals.items():
        by_reason.setdefault(reason or "", []).append(key)
    return "; ".join(f"{', '.join(keys)}: {reason}" for reason, keys in by_reason.items())


def _finish(
    dense: nn.Module, fast: nn.Module, example: Batch, reference: Tensor, summary: Summary, seconds: float, exact: bool
) -> nn.Module:
    """Check the outputs, time the whole, and give back whichever model is faster."""
    error = relative_error(output_tensor(forward(fast, example)), reference)
    if exact and not error <= _TOLERANCE:
        raise ModelError(
            f"the deployed model's output differs by {error:.1e} of its largest value from the model's own. "
            "Does the model give the same output twice? If so this is a defect: please report it."
        )
    times = _compare({"dense": dense, "fast": fast}, example, max(5 * seconds, 0.05))
    replaced = sum(layer.runtime != "dense" for layer in summary.layers)
    speedup = times["fast"].speedup
    notes: tuple[str, ...] = ()
    if replaced and speedup < 1.0:
        notes = (f"the dense model is returned: with {replaced} sparse layers the whole ran at {speedup:.2f}x",)
        layers = tuple(
            layer if layer.runtime == "dense" else changed(layer, runtime="dense", reason="the whole model was slower with it")
            for layer in summary.layers
        )
        summary, fast, speedup = changed(summary, layers=layers), dense, 1.0
        error = relative_error(output_tensor(forward(dense, example)), reference)
    dense_ms = times["dense"].latency.median_ms
    deployed_ms = dense_ms if fast is dense else times["fast"].latency.median_ms
    fast.summary = changed(  # type: ignore[assignment]
        summary, dense_ms=dense_ms, deployed_ms=deployed_ms, speedup=speedup, error=error, notes=notes
    )
    log.info("deployed %d of %d layers: %.2fx", replaced if fast is not dense else 0, len(summary.layers), speedup)
    return fast


def _evictor(model: nn.Module) -> Tensor | None:
    """What to read between runs of a layer so that its weights are as cold as in the whole model; None for small models."""
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    return torch.ones(2 * _CACHE // 4) if weights > _CACHE and device_of(model).type == "cpu" else None


def _compare(
    models: dict[str, nn.Module], example: Batch, seconds: float, evict: Tensor | None = None
) -> dict[str, Comparison]:
    """Times in turns. On one thread of a CPU its own time counts, so that a busy machine leads to the same choices."""
    alone = torch.get_num_threads() == 1 and all(device_of(model).type == "cpu" for model in models.values())
    return compare_latency(models, example, seconds=seconds, cpu_time=alone, evict=evict)


def relative_error(got: Tensor, expected: Tensor) -> float:
    """Largest absolute difference over the largest absolute expected value; nan where either holds NaN."""
    scale = expected.abs().max().clamp_min(torch.finfo(torch.float32).tiny) if expected.numel() else torch.tensor(1.0)
    return float((got - expected).abs().max() / scale) if expected.numel() else 0.0
