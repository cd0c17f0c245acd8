"""One-shot pruning of real models with calibration data: MiniLM on STS-B and SmolLM2 on WikiText-2, by solver and sparsity.

    python benchmarks/calibrated.py minilm
    python benchmarks/calibrated.py smollm2 --solvers keep sparsegpt alps --settings 0.5 2:4

Needs the packages of examples/minilm.py and examples/smollm2.py, and the data that SECATEUR_ASSETS names. Calibration takes
validation text only, figures test data only. Every row is printed as soon as it is known; the first is the dense model.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import secateur as sc

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import stsb

#: What users compare: criterion and pattern of the mask where the solver does not choose, and the solver.
METHODS = {
    "magnitude": {"criterion": "magnitude", "solver": "keep"},
    "wanda": {"criterion": "wanda", "solver": "keep"},
    "sparsegpt": {"criterion": "magnitude", "solver": "sparsegpt"},
    "admm": {"criterion": "magnitude", "solver": "admm"},
    "alps": {"criterion": "magnitude", "solver": "alps"},
}
SETTINGS = ("0.5", "0.6", "0.7", "0.8", "2:4", "4:8")


def text(split: str) -> str:
    return (stsb.ASSETS / "wikitext2" / f"{split}.txt").read_text(encoding="utf-8")


def windows(tokenizer: Any, split: str, length: int, count: int) -> list[torch.Tensor]:
    """The first `count` windows of `length` tokens each."""
    tokens = tokenizer(text(split), return_tensors="pt").input_ids[0]
    return [tokens[i * length : (i + 1) * length][None] for i in range(min(count, len(tokens) // length))]


def perplexity(batches: list[torch.Tensor]) -> Callable[[nn.Module], dict[str, float]]:
    """Of the next token, over all windows."""

    def evaluate(model: nn.Module) -> dict[str, float]:
        with torch.no_grad():
            losses = [model(input_ids=ids, labels=ids).loss for ids in batches]
        return {"perplexity": float(torch.stack(losses).mean().exp())}

    return evaluate


def minilm(samples: int) -> tuple[nn.Module, list[Any], Any, tuple[str, ...]]:
    import minilm as example

    loaded = example.make()
    lines = [line.strip() for line in text("valid").split("\n") if len(line.split()) > 8][:samples]
    tokenizer = stsb.tokenizer()
    batches = [
        dict(tokenizer(lines[i : i + 32], padding=True, truncation=True, max_length=128, return_tensors="pt"))
        for i in range(0, len(lines), 32)
    ]
    return loaded.model, batches, stsb.spearman, ("pooler",)


def smollm2(samples: int) -> tuple[nn.Module, list[Any], Any, tuple[str, ...]]:
    import smollm2 as example

    loaded = example.make()
    chosen = windows(loaded.tokenizer, "valid", 512, samples)
    batches = [{"input_ids": torch.cat(chosen[i : i + 4])} for i in range(0, len(chosen), 4)]
    return loaded.model.float(), batches, perplexity(windows(loaded.tokenizer, "test", 512, 40)), ()


def row(
    model: nn.Module, method: str, setting: str, data: list[Any], evaluate: Any, ignore: tuple[str, ...], dense: Any
) -> Any:
    """Prune and print one line: per-layer sparsity, so that solvers are compared and not allocations."""
    fixed = ":" in setting
    pattern = setting if fixed else "row" if method == "wanda" else "element"
    options: dict[str, Any] = {"pattern": pattern} | ({} if fixed else {"sparsity": float(setting), "allocation": "uniform"})
    started, busy = time.monotonic(), time.process_time()
    result = sc.prune(model, data=data, evaluate=evaluate, before=dense, ignore=ignore, **METHODS[method], **options)
    errors = [layer.error for layer in result.report.layers if layer.error is not None]
    error = f"{sum(errors) / len(errors):.4f}" if errors else "-"
    quality = next(iter(result.report.after.quality.values()))
    wall, cpu = time.monotonic() - started, time.process_time() - busy
    print(
        f"| {method} | {setting} | {result.masks.sparsity():.4f} | {quality:.4f} | {error} | {wall:.0f} | {cpu:.0f} |",
        flush=True,
    )
    return result.report.before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", choices=("minilm", "smollm2"))
    parser.add_argument("--solvers", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=SETTINGS)
    parser.add_argument("--samples", type=int, default=128, help="calibration sequences")
    given = parser.parse_args()
    model, data, evaluate, ignore = {"minilm": minilm, "smollm2": smollm2}[given.model](given.samples)
    found = evaluate(model)
    print(f"dense: {found}; {given.samples} calibration sequences; {torch.get_num_threads()} threads")
    print("| method | setting | sparsity | quality | mean relative output error | seconds | CPU seconds |")
    print("|---|---|---|---|---|---|---|", flush=True)
    dense = None
    for setting in given.settings:
        for method in given.solvers:
            dense = row(model, method, setting, data, evaluate, ignore, dense)


if __name__ == "__main__":
    main()
