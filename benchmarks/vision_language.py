"""One vision-language model pruned once and fine-tuned to two tasks, by MULTIFLOW and its baselines at 50, 63, 75 and 90%.

    python benchmarks/vision_language.py benchmarks/rows/vision_language.json
    python benchmarks/vision_language.py benchmarks/rows/vision_language.json --rows multiflow:0.75,omp:0.75
    python benchmarks/vision_language.py benchmarks/rows/vision_language.json --out docs/benchmarks/vision_language.md

Every method prunes within modalities (``groups="modality"``), sees the same 64 samples of training data, has its BatchNorm
statistics re-estimated on them, and is fine-tuned alike, once to retrieval and once to questions. Rows that are in the file
are not measured again. The trained model is kept in the temporary folder. Needs the packages of examples/minilm.py and
examples/efficientnet_lite0.py, and the data that SECATEUR_ASSETS names.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
import vision_language_model as vl
from conditions import conditions, table
from safetensors.torch import load_file, save_file
from torch import nn

import secateur as sc
from secateur.job import prepare
from secateur.selection import choose

Row = dict[str, Any]
SPARSITIES = (0.5, 0.63, 0.75, 0.9)
CHITA = {"name": "chita", "iterations": 5}
METHODS: dict[str, dict[str, Any]] = {
    "multiflow": {"criterion": "multiflow", "allocation": "magnitude"},
    "omp": {"criterion": "magnitude"},
    "lamp": {"criterion": "magnitude", "allocation": "lamp"},
    "snip": {"criterion": "snip"},
    "iterative snip": {"criterion": "snip", "schedule": "exponential", "steps": 4},
    "chita": {"solver": CHITA},
    "chita++": {"solver": CHITA, "schedule": {"name": "cubic", "initial": 0.3}, "steps": 4},
}
IGNORE = ("image_projection", "text_projection")  # of the contrastive loss alone, which single samples do not have
CALIBRATION, STEPS, SIZE, LR = 64, 8, 24, 5e-4
BASE = Path(tempfile.gettempdir()) / "secateur-vision-language.safetensors"
FIGURES = ("recall@1", "recall@5", "yes/no", "count")


def train(
    model: nn.Module, batches: list[vl.Batch], lr: float, masks: Mapping[str, Any] | None = None, decay: float = 0.01
) -> nn.Module:
    """AdamW over the batches, the learning rate falling to zero along a line; norms and dropout as in evaluation mode."""
    model.eval()
    optimizer = torch.optim.AdamW(model.named_parameters(), lr=lr, weight_decay=decay)
    held = None if masks is None else sc.hold(optimizer, masks)
    for step, batch in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = lr * (1 - step / len(batches))
        optimizer.zero_grad()
        vl.loss_of(model, batch).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    if held is not None:
        held.release()
    return model


def heads(model: Any, steps: int, size: int) -> None:
    """What is not from pretrained towers, trained on what the frozen towers give for all training images and texts."""
    data = vl.data()
    where, positions = vl.seen(model, data.captions.pixels, (*data.captions.image, *data.questions.image))
    texts = list(dict.fromkeys((*data.captions.text, *data.questions.text)))
    words = vl.tokenizer()(texts, padding=True, return_tensors="pt")
    batches = zip(words["input_ids"].split(64), words["attention_mask"].split(64), strict=True)
    with torch.no_grad():
        parts = [model.read_texts(ids, mask) for ids, mask in batches]
    read, place = torch.cat(parts), {t: i for i, t in enumerate(texts)}
    new = [p for n, p in model.named_parameters() if not n.startswith(("vision_tower", "text_tower"))]
    optimizer = torch.optim.AdamW(new, lr=1e-3, weight_decay=0.1)
    generator = torch.Generator().manual_seed(0)
    for step in range(steps):
        samples = data.captions if step % 2 else data.questions
        chosen = torch.randperm(len(samples), generator=generator)[:size].tolist()
        seen = positions[[where[samples.image[i]] for i in chosen]]
        which = [place[samples.text[i]] for i in chosen]
        optimizer.zero_grad()
        tokens, mask = read[which], words["attention_mask"][which]
        longest = int(mask.sum(1).max())
        answers = torch.tensor([samples.answer[i] for i in chosen]) if samples.answer else None
        loss = model.from_features(seen, tokens[:, :longest], mask[:, :longest], answers)["loss"]
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1.0, 2 * (1 - step / steps))
        optimizer.step()


def base() -> Any:
    """The trained dense model: from the temporary folder where it is there."""
    torch.manual_seed(0)
    model = vl.VisionLanguage().eval()
    if BASE.exists():
        model.load_state_dict(load_file(BASE))
        return model
    heads(model, 240, 48)
    data = vl.data()
    captions, questions = data.captions.shuffled(12, SIZE, 1), data.questions.shuffled(12, SIZE, 2)
    train(model, [b for pair in zip(captions, questions, strict=True) for b in pair], 1e-4)
    save_file({n: t.contiguous() for n, t in model.state_dict().items()}, BASE)
    return model


def tuned(model: nn.Module, masks: Mapping[str, Any] | None) -> dict[str, float]:
    """The four figures, two of the model fine-tuned to retrieval and two of it fine-tuned to questions."""
    data = vl.data()
    retrieval = train(copy.deepcopy(model), data.captions.shuffled(STEPS, SIZE, 3), LR, masks)
    found = vl.recalls(retrieval, data.retrieval)
    asked = train(copy.deepcopy(model), data.questions.shuffled(STEPS, SIZE, 4), LR, masks)
    return {**found, **vl.answered(asked, data.asked)}


def dense() -> Row:
    model, data = base(), vl.data()
    untuned = {**vl.recalls(model, data.retrieval), **vl.answered(model, data.asked)}
    return {**tuned(model, None), "untuned": untuned, "parameters": sum(p.numel() for p in model.parameters())}


def pruned(method: str, sparsity: float) -> Row:
    model, data = base(), vl.data()
    batches = data.calibration(CALIBRATION)
    started = time.process_time()
    result = sc.prune(
        model,
        sparsity=sparsity,
        groups="modality",
        ignore=IGNORE,
        data=batches,
        loss=vl.loss_of,
        reestimate_norms=True,
        inplace=True,
        example=data.captions.batch([0]),
        before=sc.measure(model, latency=False),
        **METHODS[method],
    )
    seconds = time.process_time() - started
    return {**tuned(model, result.masks), "seconds": seconds, "density": result.masks.density(), "notes": result.report.notes}


def timing(repeats: int = 3) -> Row:
    """CPU-seconds of the calibration's forward passes alone, and of all that MULTIFLOW does: statistics, scores and choice."""
    model, batches = base(), vl.data().calibration(CALIBRATION)
    recipe = sc.Recipe.make(METHODS["multiflow"], sparsity=0.75, groups="modality", ignore=IGNORE)
    forward, whole = [], []
    for _ in range(repeats):
        started = time.process_time()
        with torch.no_grad():
            model(**batches[0])
        forward.append(time.process_time() - started)
        started = time.process_time()
        job = prepare(model, recipe, data=batches, loss=vl.loss_of)
        choose(job.layers, job.statistics(model).layers, sparsity=job.sparsity, method=job.method)
        whole.append(time.process_time() - started)
    return {"forward": median(forward), "multiflow": median(whole)}


def page(rows: Mapping[str, Row], seconds: float) -> list[str]:
    """The table, the plot's name, and the conditions."""
    lines = [
        "# One vision-language model, pruned once, fine-tuned to two tasks",
        "",
        *(__doc__ or "").split("\n\n")[2].split("\n"),
        "",
        *(vl.__doc__ or "").split("\n\n")[1].split("\n"),
    ]
    return [*lines, "", *table(*cells(rows)), "", conditions(1, "seeds 0 to 4", seconds)]


def cells(rows: Mapping[str, Row]) -> tuple[list[str], list[list[str]]]:
    head = ["method", "sparsity", "recall@1", "recall@5", "yes/no", "count", "mean", "CPU-seconds"]
    body = []
    for name, row in rows.items():
        if name == "timing":
            continue
        method, _, sparsity = name.partition(":")
        seconds = f"{row['seconds']:.1f}" if "seconds" in row else ""
        body.append([method, sparsity, *(f"{row[f]:.1f}" for f in FIGURES), f"{score(row):.1f}", seconds])
    return head, body


def score(row: Row) -> float:
    """The mean of the two tasks: of the recalls, and of both kinds of questions."""
    return mean((mean((row["recall@1"], row["recall@5"])), mean((row["yes/no"], row["count"]))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cache", type=Path, help="JSON file of the rows")
    parser.add_argument("--rows", help="only these, as method:sparsity, separated by commas")
    parser.add_argument("--out", type=Path, help="write the page here")
    given = parser.parse_args()
    torch.set_num_threads(1)
    makers: dict[str, Callable[[], Row]] = {"dense": dense, "timing": timing}
    makers |= {f"{m}:{s}": partial(pruned, m, s) for s in SPARSITIES for m in METHODS}
    rows: dict[str, Row] = json.loads(given.cache.read_text()) if given.cache.exists() else {}
    for name in given.rows.split(",") if given.rows else makers:
        if name not in rows:
            started = time.process_time()
            rows[name] = makers[name]()
            rows[name]["all seconds"] = time.process_time() - started
            given.cache.write_text(json.dumps(rows, indent=1) + "\n")
            print(name, {f: round(v, 1) for f, v in rows[name].items() if isinstance(v, float)}, flush=True)
    rows = {n: rows[n] for n in makers if n in rows}
    lines = page(rows, sum(r["all seconds"] for r in rows.values()))
    print("\n".join(lines))
    if given.out is not None:
        given.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
