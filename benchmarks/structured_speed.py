"""Trace, couple and cut beside Torch-Pruning 1.6.1, in one run: seconds for half of all channels, L1 norms.

    python benchmarks/structured_speed.py [name ...]

Both get the same model, example and sparsity, and are timed from the model to the smaller model; verification is not timed. The
peer is given what it needs to run at all: the classifier to ignore, and for attention the number of heads.
"""

from __future__ import annotations

import argparse
import copy
import logging
import resource
import signal
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from secateur.graph import choose_groups, cut, make_plan, select, trace, unit_scores
from secateur.models.torchvision_shim import prepare_torchvision


def llama() -> tuple[nn.Module, Any]:
    """Twelve layers with grouped-query attention."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=8000,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=12,
        num_key_value_heads=4,
        use_cache=False,
    )
    return transformers.LlamaForCausalLM(config), {"input_ids": torch.randint(0, 8000, (1, 32))}


def vision(name: str) -> tuple[nn.Module, Any]:
    """An architecture of torchvision or timm."""
    import timm
    import torchvision

    image = torch.randn(1, 3, 224, 224)
    return (timm.create_model(name) if "patch" in name else torchvision.models.get_model(name)), image


MODELS: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    "resnet50": lambda: vision("resnet50"),
    "vit_base_patch16_224": lambda: vision("vit_base_patch16_224"),
    "swin_t": lambda: vision("swin_t"),
    "convnext_tiny": lambda: vision("convnext_tiny"),
    "densenet121": lambda: vision("densenet121"),
    "llama_12_layers": llama,
}


def ours(model: nn.Module, example: Any) -> tuple[float, float, nn.Module]:
    """Seconds to trace and couple, seconds to choose and cut, and the result."""
    start = time.perf_counter()
    graph = trace(model, example)
    built = time.perf_counter()
    groups = choose_groups(graph, ("channel", "neuron", "head", "width"))
    removed = select(graph, groups, unit_scores(model, groups, "l1"), 0.5)
    smaller = cut(model, make_plan(graph, model, removed), inplace=True)
    return built - start, time.perf_counter() - built, smaller


def peer(model: nn.Module, example: Any) -> tuple[float, float, nn.Module]:
    """The same of Torch-Pruning."""
    import torch_pruning as tp

    ignored = [m for n, m in model.named_modules() if n in ("fc", "head", "classifier", "classifier.2", "lm_head")]
    heads = {m.qkv: m.num_heads for m in model.modules() if hasattr(m, "qkv") and hasattr(m, "num_heads")}
    extra: dict[str, Any] = {"num_heads": heads, "prune_num_heads": True, "head_pruning_ratio": 0.5} if heads else {}
    if hasattr(model, "lm_head"):
        heads = {layer.self_attn.q_proj: 12 for layer in model.model.layers}
        heads |= {p: 4 for layer in model.model.layers for p in (layer.self_attn.k_proj, layer.self_attn.v_proj)}
        extra = {"num_heads": heads, "prune_num_heads": True, "head_pruning_ratio": 0.5}
    start = time.perf_counter()
    pruner = tp.pruner.BasePruner(
        model,
        example,
        importance=tp.importance.GroupMagnitudeImportance(p=1),
        pruning_ratio=0.5,
        ignored_layers=ignored,
        **extra,
    )
    built = time.perf_counter()
    pruner.step()
    return built - start, time.perf_counter() - built, model


def best(
    run: Callable[..., tuple[float, float, nn.Module]], model: nn.Module, example: Any, repeats: int
) -> tuple[float, float, int]:
    """The fastest of some runs, and the parameters left."""
    results = [run(copy.deepcopy(model), example) for _ in range(repeats)]
    build, chop, smaller = min(results, key=lambda r: r[0] + r[1])
    return build, chop, sum(p.numel() for p in smaller.parameters())


def _too_long(*_: Any) -> None:
    raise TimeoutError("not done in the time given")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=list(MODELS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--patience", type=float, default=120, help="seconds that the peer has for a model")
    options = parser.parse_args()
    signal.signal(signal.SIGALRM, _too_long)
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore")
    prepare_torchvision()
    torch.set_num_threads(1)
    out = sys.stdout
    out.write(f"torch {torch.__version__}, float32, cpu, 1 thread, fastest of {options.repeats}\n\n")
    out.write("| model | ours: build + cut (s) | left | Torch-Pruning: build + cut (s) | left | times faster |\n")
    out.write("|---|---|---|---|---|---|\n")
    for name in options.names:
        torch.manual_seed(0)
        model, example = MODELS[name]()
        model.eval()
        total = sum(p.numel() for p in model.parameters())
        a, b, left = best(ours, model, example, options.repeats)
        signal.setitimer(signal.ITIMER_REAL, options.patience)
        try:
            c, d, other = best(peer, model, example, options.repeats)
            theirs, ratio = f"{c:.2f} + {d:.2f} | {other / total:.0%}", f"{(c + d) / (a + b):.1f}"
        except Exception as error:  # the peer's failures belong in the table
            theirs, ratio = f"fails: {type(error).__name__} {str(error).splitlines()[0][:60] if str(error) else ''} | -", "-"
        signal.setitimer(signal.ITIMER_REAL, 0)
        out.write(f"| {name} | {a:.2f} + {b:.2f} | {left / total:.0%} | {theirs} | {ratio} |\n")
        out.flush()
    out.write(f"\npeak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB\n")


if __name__ == "__main__":
    main()
