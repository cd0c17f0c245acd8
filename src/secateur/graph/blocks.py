"""Whole blocks: finding the ones a network could do without, and taking them out.

A block is a member of a `ModuleList` or `Sequential` whose output has the shape of its input, as the residual blocks of ResNets
and transformers have. Without it, its input goes straight to the next.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from secateur.data.batches import token_mask
from secateur.errors import LayerError, ModelError, UnknownName
from secateur.graph.graph import Graph
from secateur.graph.trace import ModuleCall, arguments, tensors_in, untouched
from secateur.graph.verify import worst
from secateur.stats.watch import Call
from secateur.types import Plan


@dataclass(frozen=True)
class Residual:
    """A block that can be taken out: its name, the shape that passes through it, and its parameters."""

    name: str
    shape: tuple[int, ...]
    parameters: int


def removable_blocks(model: nn.Module, graph: Graph) -> list[Residual]:
    """Blocks of `model` that can be taken out, in order.

    Of blocks inside of others the outer ones count, but where the inner ones follow each other in a `Sequential`: then the
    outer one is a stage.
    """
    calls: dict[str, list[ModuleCall]] = {}
    for made in graph.recording.calls:
        calls.setdefault(made.module, []).append(made)
    found: dict[str, Residual] = {}
    chained: set[str] = set()
    for path, container in model.named_modules():
        if not isinstance(container, (nn.ModuleList, nn.Sequential)):
            continue
        names = [f"{path}.{key}" if path else key for key in container._modules]
        blocks = []
        for name in names:
            own = calls.get(name, [])
            call = own[0] if len(own) == 1 else None
            parameters = sum(p.numel() for p in model.get_submodule(name).parameters())
            if call and parameters and call.inputs and call.outputs and call.inputs[0].shape == call.outputs[0].shape:
                blocks.append((Residual(name, call.inputs[0].shape, parameters), call))
        own_blocks = {b.name: b for b, call in blocks if len(names) > 1 and _adds_its_input(graph, call)}
        found |= own_blocks
        chained |= set(own_blocks) if isinstance(container, nn.Sequential) else set()
    stages = {name for name in found if any(inner.startswith(f"{name}.") for inner in chained)}
    outer = [f"{name}." for name in found if name not in stages]
    wanted = {name for name in found if name not in stages and not any(name.startswith(o) for o in outer)}
    return [found[name] for name, _ in model.named_modules() if name in wanted]


def _adds_its_input(graph: Graph, call: ModuleCall) -> bool:
    """Whether a sum in the block has one of its sides straight from the block's input: a shortcut around everything else."""
    passed = {id(v) for v in call.inputs}
    for node in graph.recording.nodes[call.first : call.last]:
        tensors = node.tensors
        if node.name == "add" and len(tensors) == 2 and any(id(t) in passed for t in tensors):
            return True
        if node.name in _PASSING and tensors and id(tensors[0]) in passed:
            passed |= {id(v) for v in node.outputs}
    return False


_PASSING = frozenset({
    "view", "_unsafe_view", "permute", "transpose", "clone", "detach", "alias",
    "contiguous", "_to_copy", "dropout", "roll", "constant_pad_nd", "slice",
})  # fmt: skip


@torch.no_grad()
def block_importance(model: nn.Module, blocks: Sequence[Residual], batches: Iterable[Any]) -> dict[str, float]:
    """``1 - cosine(input, output)`` of every block, mean over all positions of all batches (ShortGPT, Men et al. 2024).

    Low means that the block changes little. `batches` are examples as `trace` takes them; positions that their
    ``attention_mask`` calls padding are left out.
    """
    sums = dict.fromkeys((b.name for b in blocks), 0.0)
    counts = dict.fromkeys(sums, 0)
    handles = []
    mask: Tensor | None = None
    with untouched(model):
        for name in sums:

            def measure(module: nn.Module, args: Any, kwargs: Any, output: Any, name: str = name) -> None:
                x, y = tensors_in((args, kwargs))[0], tensors_in(output)[0]
                dim = 1 if x.ndim == 4 else -1
                cosine = torch.cosine_similarity(x.float(), y.float(), dim=dim)
                seen = Call(module, args, kwargs, mask).rows(cosine.unsqueeze(-1))
                sums[name] += float((1 - seen).sum())
                counts[name] += len(seen)

            handles.append(model.get_submodule(name).register_forward_hook(measure, with_kwargs=True))
        for batch in batches:
            args, kwargs = arguments(batch)
            mask = token_mask(kwargs)
            model(*args, **kwargs)
        for handle in handles:
            handle.remove()
    return {name: sums[name] / max(counts[name], 1) for name in sums}


def plan_without(graph: Graph, model: nn.Module, names: Iterable[str]) -> Plan:
    """The plan that takes the named blocks out. Raises UnknownName where one of them is no removable block."""
    known = {b.name: b for b in removable_blocks(model, graph)}
    chosen = list(dict.fromkeys(names))
    for name in chosen:
        if name not in known:
            raise UnknownName("block", name, known)
    if len(chosen) == len(known):
        raise LayerError(f"all {len(known)} blocks of the model would go. Keep at least one.")
    return replace(Plan(), dropped=tuple(chosen))


def bypass_difference(model: nn.Module, smaller: nn.Module, plan: Plan, example: Any) -> float:
    """Largest difference of `smaller`'s outputs from those of `model` with the plan's blocks bypassed, relative to the largest.

    Raises ModelError where the smaller model does not run or gives other shapes.
    """
    args, kwargs = arguments(example)
    wanted = bypassed_output(model, plan.dropped, example)
    try:
        with torch.no_grad(), untouched(smaller):
            found = tensors_in(smaller(*args, **kwargs))
    except Exception as error:
        raise ModelError(f"the model does not run without {', '.join(plan.dropped)}: {error}") from error
    if [t.shape for t in found] != [t.shape for t in wanted]:
        raise ModelError(f"without {', '.join(plan.dropped)} the output's shape is another")
    return worst(found, wanted)


def drop(model: nn.Module, names: Iterable[str]) -> None:
    """Take blocks out of the containers that hold them, in place, and keep counts of layers in line."""
    gone: dict[str, list[str]] = {}
    for name in names:
        parent, _, key = name.rpartition(".")
        gone.setdefault(parent, []).append(key)
    for path, keys in gone.items():
        container = model.get_submodule(path)
        if not isinstance(container, (nn.ModuleList, nn.Sequential)) or not set(keys) <= set(container._modules):
            raise ModelError(f"{path!r} of this model does not hold the blocks {keys}. The plan was made for another model.")
        before = list(container._modules)
        kept = [(k, m) for k, m in container._modules.items() if k not in keys]
        container._modules.clear()
        for i, (key, module) in enumerate(kept):
            container._modules[str(i) if all(k.isdigit() for k in before) else key] = module
        for i, (_, module) in enumerate(kept):
            for inner in module.modules():
                if isinstance(vars(inner).get("layer_idx"), int):
                    inner.layer_idx = i  # type: ignore[assignment]
        _update_configs(model, len(before), [i for i, k in enumerate(before) if k not in keys])


def _update_configs(model: nn.Module, before: int, kept: list[int]) -> None:
    """Counts of layers, and lists with an entry for each, in the configurations of transformers."""
    seen: set[int] = set()
    for module in model.modules():
        config = vars(module).get("config")
        if config is None or id(config) in seen or not hasattr(config, "__dict__"):
            continue
        seen.add(id(config))
        for key, value in list(vars(config).items()):
            if key in ("num_hidden_layers", "n_layer", "num_layers", "n_layers") and value == before:
                setattr(config, key, len(kept))
            elif key in ("layer_types", "mlp_layer_types") and isinstance(value, list) and len(value) == before:
                setattr(config, key, [value[i] for i in kept])


def passed_on(args: Any, kwargs: Any, output: Any) -> Any:
    """What a block gives that hands its first tensor on unchanged, in the form of its `output`.

    Raises ModelError where that has not the shape of the output's first tensor.
    """
    given, made = (next(iter(tensors_in(tree)), None) for tree in ((args, kwargs), output))
    if given is None or made is None or given.shape != made.shape:
        raise ModelError("the block's output has not the shape of its input")
    if isinstance(output, Tensor):
        return given
    return [given, *output[1:]] if isinstance(output, list) else (given, *output[1:])


@contextmanager
def bypassing(model: nn.Module, names: Iterable[str]) -> Iterator[None]:
    """Inside, the named blocks of `model` give back what they were given, by hooks that are gone afterwards."""

    def bypass(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        return passed_on(args, kwargs, output)

    handles = [model.get_submodule(n).register_forward_hook(bypass, with_kwargs=True) for n in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def bypassed_output(model: nn.Module, names: Iterable[str], example: Any) -> list[Tensor]:
    """Output tensors of `model` with the named blocks giving back what they were given: the oracle for `drop`."""
    args, kwargs = arguments(example)
    with untouched(model), bypassing(model, names):
        return tensors_in(model(*args, **kwargs))
