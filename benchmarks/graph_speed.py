"""Trace, couple and cut beside Torch-Pruning 1.6.1, in one process: half of all channels (and heads), L1 norms.

    python benchmarks/graph_speed.py --json rows.json --out docs/benchmarks/graph_speed.md

Both get the same model, example and sparsity, and go from the model to the smaller model; verification is not timed. They take
turns. Times are CPU seconds of one thread, so that other programs on the machine count for little; the ratio is that of the
medians, its range the smallest and largest over the turns. Memory is what the process needs at its peak beyond what it held
before (the model included), as a share of the model's own bytes; both cut in place, since a copy costs what is kept of the
model in any case. The peer is given what it needs to run at all: the classifier to ignore, and for attention the number of
heads. On heads of grouped-query attention it raises; where Llama "keeps its heads", both leave its attention projections alone.
Of our seconds those of *weights* are spent summing the magnitudes of all weights along both dimensions and slicing them, which
the memory of one core bounds.
"""

from __future__ import annotations

import argparse
import copy
import functools
import gc
import json
import logging
import signal
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from conditions import Rows, conditions, show, table
from torch import nn

from secateur.graph import choose_groups, cut, make_plan, select, trace, unit_scores
from secateur.models.torchvision_shim import prepare_torchvision


def llama(words: int, width: int, inner: int, layers: int, heads: int, groups: int) -> tuple[nn.Module, Any]:
    """A Llama with grouped-query attention."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=words,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        use_cache=False,
    )
    return transformers.LlamaForCausalLM(config), {"input_ids": torch.randint(0, words, (1, 32))}


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
    "llama_12_layers": lambda: llama(8000, 768, 2048, 12, 12, 4),
    "llama_12_layers, keeps its heads": lambda: llama(8000, 768, 2048, 12, 12, 4),
    "densenet121": lambda: vision("densenet121"),
    "llama_1b, keeps its heads": lambda: llama(32000, 2048, 5632, 22, 32, 4),
}


def ours(model: nn.Module, example: Any, heads: bool = True, weights: list[float] | None = None) -> nn.Module:
    """The smaller model, by Secateur. `weights` is given the seconds in which weights are summed and sliced."""
    graph = trace(model, example)
    groups = choose_groups(graph, ("channel", "neuron", "head", "width") if heads else ("neuron", "width"))
    times = [time.process_time()]
    scores = unit_scores(model, groups, "l1")
    times.append(time.process_time())
    plan = make_plan(graph, model, select(graph, groups, scores, 0.5))
    times.append(time.process_time())
    smaller = cut(model, plan, inplace=True)
    if weights is not None:
        weights.append(times[1] - times[0] + time.process_time() - times[2])
    return smaller


def peer(model: nn.Module, example: Any, cut_heads: bool = True) -> nn.Module:
    """The smaller model, by Torch-Pruning."""
    import torch_pruning as tp

    ignored = [m for n, m in model.named_modules() if n in ("fc", "head", "classifier", "classifier.2", "lm_head")]
    heads = {m.qkv: m.num_heads for m in model.modules() if hasattr(m, "qkv") and hasattr(m, "num_heads")}
    projections = [m for n, m in model.named_modules() if n.endswith(("q_proj", "k_proj", "v_proj"))]
    if projections and cut_heads:
        of: Any = model.config
        heads = {m: m.out_features * of.num_attention_heads // of.hidden_size for m in projections}
    else:
        ignored += projections
    extra: dict[str, Any] = {"num_heads": heads, "prune_num_heads": True, "head_pruning_ratio": 0.5} if heads else {}
    pruner = tp.pruner.BasePruner(
        model,
        example,
        importance=tp.importance.GroupMagnitudeImportance(p=1),
        pruning_ratio=0.5,
        ignored_layers=ignored,
        **extra,
    )
    pruner.step()
    return model


def run(prune: Callable[[nn.Module, Any], nn.Module], model: nn.Module, example: Any) -> tuple[float, float, int, str]:
    """CPU seconds, peak memory beyond what was held, as a share of the model, parameters left, and whether the result runs.

    The model is used up.
    """
    size = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    held, start = _status("VmRSS"), time.process_time()
    smaller = prune(model, example)
    seconds, peak = time.process_time() - start, _status("VmHWM")
    try:
        with torch.no_grad():
            smaller.eval()(**example) if isinstance(example, dict) else smaller.eval()(example)
        runs = "runs"
    except Exception as error:  # the peer's results that do not run belong in the table
        runs = f"fails afterwards: {type(error).__name__}"
    return seconds, (peak - held) / size, sum(p.numel() for p in smaller.parameters()), runs


def _status(key: str) -> int:
    """A figure of the process in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def row(name: str, repeats: int, patience: float) -> dict[str, Any]:
    """Both on one model, taking turns. A peer that does not end in time is not tried again."""
    torch.manual_seed(0)
    model, example = MODELS[name]()
    model.eval()
    found: dict[str, Any] = {"parameters": sum(p.numel() for p in model.parameters()), "ours": [], "peer": []}
    large = found["parameters"] > 5e8  # then there is one at a time
    if large:
        del model

    def one() -> nn.Module:
        return MODELS[name]()[0].eval() if large else copy.deepcopy(model)

    cut_heads = "keeps its heads" not in name
    found["weights"] = []
    both = functools.partial(ours, heads=cut_heads, weights=found["weights"]), functools.partial(peer, cut_heads=cut_heads)
    run(both[0], one(), example)  # imports and caches that a first call fills are nobody's
    found["weights"].clear()
    for _ in range(repeats):
        found["ours"].append(run(both[0], one(), example))
        if "refused" in found:
            continue
        given = one()
        signal.setitimer(signal.ITIMER_REAL, patience)
        try:
            found["peer"].append(run(both[1], given, example))
        except Exception as error:  # the peer's failures belong in the table
            found["refused"] = f"{type(error).__name__}: {str(error).splitlines()[0][:90] if str(error) else ''}"
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    return found


def large() -> dict[str, float]:
    """CPU seconds to trace and plan half of an 8B Llama on the meta device, and the most the process held, in GiB."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        use_cache=False,
    )
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    Path("/proc/self/clear_refs").write_text("5")
    start = time.process_time()
    graph = trace(model, {"input_ids": torch.zeros(1, 32, dtype=torch.long)})
    groups = choose_groups(graph, ("neuron", "head", "width"))
    smaller = cut(model, make_plan(graph, model, {g.id: range(g.units // 2) for g in groups}))
    seconds = time.process_time() - start
    return {"seconds": seconds, "gib": _status("VmHWM") / 2**30, "left": sum(p.numel() for p in smaller.parameters())}


def _too_long(patience: float, *_: Any) -> None:
    raise TimeoutError(f"not done in {patience:g} s")


def verdict(rows: dict[str, Any]) -> str:
    """Which of the goals, 5 times and 10%, were met."""
    times = {n: _median(r["peer"]) / _median(r["ours"]) for n, r in rows.items() if r["peer"]}
    slow = [f"{n} ({t:.1f})" for n, t in times.items() if t < 5]
    fat = [n for n, r in rows.items() if max(x[1] for x in r["ours"]) > 0.1]
    speed = f"5 times is missed on {', '.join(slow)}" if slow else "5 times is met wherever the peer comes to an end"
    return f"Of the goals, {speed}; 10% memory is {'missed on ' + ', '.join(fat) if fat else 'met everywhere'}."


def _median(turns: list[Any]) -> float:
    return statistics.median(x[0] for x in turns)


def cells(name: str, r: dict[str, Any]) -> list[str]:
    """One line of the table."""
    a = [x[0] for x in r["ours"]]
    mine = f"{statistics.median(a):.3f} ({min(a):.3f}-{max(a):.3f})"
    reading = f"{statistics.median(r['weights']):.3f}" if "weights" in r else ""
    left, memory = r["ours"][0][2] / r["parameters"], max(x[1] for x in r["ours"])
    if not r["peer"]:
        return [name, mine, reading, f"{left:.0%}", f"{memory:+.0%}", f"fails: {r['refused']}", "-", "-", "-"]
    b = [x[0] for x in r["peer"]]
    theirs = f"{statistics.median(b):.3f} ({min(b):.3f}-{max(b):.3f})"
    ratios = [y / x for x, y in zip(a, b, strict=False)]
    other, fat, ok = r["peer"][0][2] / r["parameters"], max(x[1] for x in r["peer"]), r["peer"][0][3]
    share = f"{other:.0%}" + ("" if ok == "runs" else f", {ok}")
    times = f"{_median(r['peer']) / _median(r['ours']):.1f} ({min(ratios):.1f}-{max(ratios):.1f})"
    return [name, mine, reading, f"{left:.0%}", f"{memory:+.0%}", theirs, share, f"{fat:+.0%}", times]


def main() -> None:
    """Measure what is not yet in the JSON, and print or write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=list(MODELS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--patience", type=float, default=120, help="seconds that the peer has for one run")
    parser.add_argument("--json", type=Path, help="rows are kept here, and rows found here are not measured again")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--large", action="store_true", help="only the 8B Llama, as JSON")
    options = parser.parse_args()
    prepare_torchvision()
    if options.large:
        print(json.dumps(large()))
        return
    signal.signal(signal.SIGALRM, functools.partial(_too_long, options.patience))
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    start = time.monotonic()
    rows = Rows(options.json)
    for name in options.names:
        rows.measured(name, functools.partial(row, name, options.repeats, options.patience))
    rows.measured("large", lambda: json.loads(subprocess.check_output([sys.executable, __file__, "--large"])))
    turns = " or ".join(str(n) for n in sorted({len(rows[name]["ours"]) for name in options.names if name in rows}))
    head = ["model", "ours, CPU s", "weights", "left", "memory", "Torch-Pruning 1.6.1, CPU s", "left", "memory", "times faster"]
    lines = [
        "# Trace, couple and cut beside Torch-Pruning",
        "",
        *(__doc__ or "").split("\n\n", 2)[2].strip().splitlines(),
        "",
        *table(head, [cells(name, rows[name]) for name in options.names if name in rows]),
        "",
        f"An 8B Llama (32 layers, 32 heads over 8, on the meta device) is traced, planned and cut to {rows['large']['left']:,} "
        f"parameters in {rows['large']['seconds']:.1f} CPU seconds; the process held {rows['large']['gib']:.1f} GiB at most.",
        "",
        verdict({name: rows[name] for name in options.names if name in rows}),
        "",
        conditions(1, f"{turns} turns, random weights of seed 0", time.monotonic() - start),
    ]
    show(lines, options.out)


if __name__ == "__main__":
    main()
