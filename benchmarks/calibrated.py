"""One-shot pruning of real models with calibration data: MiniLM on STS-B and SmolLM2 on WikiText-2, by solver and sparsity.

    python benchmarks/calibrated.py minilm
    python benchmarks/calibrated.py minilm --sentences --samples 2048 --cache rows.json
    python benchmarks/calibrated.py smollm2 --solvers magnitude sparsegpt alps --settings 0.5 2:4

Needs the packages of examples/minilm.py and examples/smollm2.py, and the data that SECATEUR_ASSETS names. Calibration takes
validation text only, figures test data only. Every row is printed as soon as it is known, and kept in the file that
``--cache`` names: a run that is stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from conditions import Rows
from torch import nn

import secateur as sc
from secateur.types import Measurement

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
#: What stands for the dense model's measurement, which is known: STS-B .8205, perplexity 25.61.
NOTHING = Measurement(parameters=0, nonzeros=0, bytes_memory=0)
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


def minilm(samples: int, sentences: bool) -> tuple[nn.Module, list[Any], Any, tuple[str, ...]]:
    """`samples` lines from the start of the text, a paragraph each; with `sentences`, single ones from all over it."""
    import minilm as example

    loaded = example.make()
    lines = [line.strip() for line in text("valid").split("\n") if len(line.split()) > 8]
    if sentences:
        single = [f"{s.strip()} ." for line in lines for s in re.split(r" [.;] ", line) if 5 <= len(s.split()) <= 40]
        lines = sorted(single[:: max(1, len(single) // samples)][:samples], key=len)
    lines = lines[:samples]
    tokenizer = stsb.tokenizer()
    batches = [
        dict(tokenizer(lines[i : i + 32], padding=True, truncation=True, max_length=128, return_tensors="pt"))
        for i in range(0, len(lines), 32)
    ]
    return loaded.model, batches, stsb.spearman, ("pooler",)


def smollm2(samples: int, sentences: bool) -> tuple[nn.Module, list[Any], Any, tuple[str, ...]]:
    import smollm2 as example

    loaded = example.make()
    chosen = windows(loaded.tokenizer, "valid", 512, samples)
    batches = [{"input_ids": torch.cat(chosen[i : i + 4])} for i in range(0, len(chosen), 4)]
    return loaded.model.float(), batches, perplexity(windows(loaded.tokenizer, "test", 512, 40)), ()


def row(model: nn.Module, method: str, setting: str, data: list[Any], evaluate: Any, ignore: tuple[str, ...]) -> list[str]:
    """Method, setting, sparsity, quality, mean relative output error, CPU seconds."""
    fixed = ":" in setting
    name, _, allocation = method.partition("+")
    pattern = setting if fixed else "row" if name == "wanda" else "element"
    options: dict[str, Any] = {"pattern": pattern}
    if not fixed:
        options |= {"sparsity": float(setting), "allocation": allocation or "uniform"}
    busy = time.process_time()
    result = sc.prune(model, data=data, evaluate=evaluate, before=NOTHING, ignore=ignore, **METHODS[name], **options)
    busy = time.process_time() - busy
    errors = [layer.error for layer in result.report.layers if layer.error is not None]
    error = f"{sum(errors) / len(errors):.4f}" if errors else "-"
    quality = next(iter(result.report.after.quality.values()))
    return [method, setting, f"{result.masks.sparsity():.4f}", f"{quality:.4f}", error, f"{busy:.0f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", choices=("minilm", "smollm2"))
    parser.add_argument("--solvers", nargs="+", default=list(METHODS), help="of " + ", ".join(METHODS) + "; alps+ALLOCATION")
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=SETTINGS)
    parser.add_argument("--samples", type=int, default=128, help="calibration sequences")
    parser.add_argument("--sentences", action="store_true", help="MiniLM: single sentences instead of paragraphs")
    parser.add_argument("--cache", type=Path, help="JSON file of rows that are known")
    given = parser.parse_args()
    known = Rows(given.cache)
    model, data, evaluate, ignore = {"minilm": minilm, "smollm2": smollm2}[given.model](given.samples, given.sentences)
    what = f"{given.samples} {'sentences' if given.sentences else 'sequences'}"
    print(f"{given.model}, {what} of calibration, {torch.get_num_threads()} threads")
    print("| method | setting | sparsity | quality | mean relative output error | CPU seconds |")
    print("|---|---|---|---|---|---|", flush=True)
    for setting in given.settings:
        for method in given.solvers:
            key = f"{given.model}, {what}, {method}, {setting}"
            cells = known.measured(key, partial(row, model, method, setting, data, evaluate, ignore))
            print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
