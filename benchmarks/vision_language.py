"""One vision-language model pruned once and fine-tuned to two tasks, by MULTIFLOW and its baselines at 50, 63, 75 and 90%.

    python benchmarks/vision_language.py benchmarks/rows/vision_language.json
    python benchmarks/vision_language.py benchmarks/rows/vision_language.json --rows multiflow:0.75,omp:0.75 --minutes 60
    python benchmarks/vision_language.py ROWS --minutes 0 --out docs/benchmarks/vision_language.md

Every method prunes within modalities (``groups="modality"``), sees the same 64 samples of training data, has its BatchNorm
statistics re-estimated on them, and is fine-tuned alike, once to retrieval and once to questions: 48 steps of AdamW with 16
samples. The small layers that join the towers (8% of the weights) stay dense. Of iterative SNIP and CHITA++ there are 4
stages, where their papers have 100 and 16. Rows that are in the file are not measured again. The trained model is kept in the
temporary folder. Needs the packages of examples/minilm.py and examples/efficientnet_lite0.py, and the data that
SECATEUR_ASSETS names.
"""

from __future__ import annotations

import argparse
import copy
import io
import itertools
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
import vision_language_model as vl
from conditions import Rows, conditions, show, table
from safetensors.torch import load_file, save_file
from torch import nn

import secateur as sc
from secateur.data.batches import Batches
from secateur.job import prepare
from secateur.quadratic import output_error
from secateur.repair import reestimate_norms
from secateur.selection import choose
from secateur.stats import collect
from secateur.types import Need

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
IGNORE = ("image_projection", "text_projection", "match", "see", "read", "answer")  # the joints
ALONE = ("multiflow", "omp")  #: methods by which parts of the model are pruned alone, too
CALIBRATION, STEPS, SIZE, LR = 64, 48, 16, 1.5e-4
URGENT = [f"{m}:{s}" for s in (0.75, 0.9) for m in ("multiflow", "omp", "lamp", "snip")]  # the claim comes first
BASE = Path(tempfile.gettempdir()) / "secateur-vision-language.safetensors"
#: Part of the model -> patterns of what is left dense where that part alone is pruned.
PARTS: dict[str, Callable[[Any], tuple[str, ...]]] = {
    "text tower": lambda _: ("vision_tower*", "fusion*"),
    "vision tower": lambda _: ("text_tower*", "fusion*"),
    "all but depthwise": lambda model: tuple(n for n, p in model.named_parameters() if p.dim() == 4 and p.shape[1] == 1),
}
WHY = (
    "MULTIFLOW's choice gives the least output error in every modality (means over layers, squared, relative, with the dense "
    "model's inputs). It was made for transformers, and this vision tower is a convolution network with BatchNorm: the table "
    "before shows what each part loses by itself, and what the channels of depthwise convolutions that are left without a "
    "weight have to do with it. At 75% all methods are near chance before tuning, and 48 steps on some 600 images do not "
    "change that."
)
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
    known = ("vision_tower", "text_tower", "image_projection", "text_projection")
    new = [p for n, p in model.named_parameters() if not n.startswith(known)]
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
    model.learn_names(vl.imagenet()[1])
    heads(model, 240, 48)
    data = vl.data()
    captions, questions = data.captions.shuffled(12, 24, 1), data.questions.shuffled(12, 24, 2)
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


def pruned(method: str, sparsity: float, part: str = "") -> Row:
    """All of the model pruned, or that `part` of PARTS alone."""
    model, data = base(), vl.data()
    batches = data.calibration(CALIBRATION)
    started = time.process_time()
    result = sc.prune(
        model,
        sparsity=sparsity,
        groups="modality",
        ignore=(*IGNORE, *(PARTS[part](model) if part else ())),
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


def why() -> Row:
    """What pruning alone does at 50 and 75%, before tuning: the figures; by modality the mean relative output error of layers
    with what the dense model gives them; and the share of depthwise channels that have no weight left.
    """
    data = vl.data()
    batches = data.calibration(CALIBRATION)
    layers = prepared("omp", 0.5, base(), batches).layers
    known = collect(base(), layers, {Need.GRAM}, batches=Batches(batches)).layers
    row: Row = {}
    for sparsity, method in itertools.product((0.5, 0.75), ("multiflow", "omp", "lamp")):
        model = base()
        job = prepared(method, sparsity, model, batches)
        masks = choose(job.layers, job.statistics(model).layers, sparsity=sparsity, method=job.method)
        kept = {n: job.layers[n].canonical(masks[n]) for n in job.layers}
        errors = {n: output_error(k.need(Need.GRAM), k.weight, k.weight * kept[n]) for n, k in known.items()}
        dead = [1 - float(kept[n].flatten(1).any(1).float().mean()) for n, k in known.items() if k.weight.shape[1:2] == (1,)]
        masks.apply(model)
        reestimate_norms(model, Batches(batches))
        row[f"{method}:{sparsity}"] = {
            "errors": {group: mean(errors[n] for n in names) for group, names in job.groups.items()}, "dead": mean(dead),
            **vl.recalls(model, data.retrieval), **vl.answered(model, data.asked),
        }  # fmt: skip
    return row


def prepared(method: str, sparsity: float, model: nn.Module, batches: list[Any]) -> Any:
    """The job of a method, for its statistics and masks alone."""
    recipe = sc.Recipe.make(METHODS[method], sparsity=sparsity, groups="modality", ignore=IGNORE)
    return prepare(model, recipe, data=batches, loss=vl.loss_of)


def timing(repeats: int = 3) -> Row:
    """CPU-seconds of the calibration's forward passes alone, and of all that MULTIFLOW does: statistics, scores and choice."""
    model = base()
    row: Row = {}
    for samples in (CALIBRATION, 4 * CALIBRATION):
        batches = vl.data().calibration(samples)
        forward, whole = [], []
        for _ in range(repeats):
            started = time.process_time()
            with torch.no_grad():
                model(**batches[0])
            forward.append(time.process_time() - started)
            started = time.process_time()
            job = prepared("multiflow", 0.75, model, batches)
            choose(job.layers, job.statistics(model).layers, sparsity=job.sparsity, method=job.method)
            whole.append(time.process_time() - started)
        row[str(samples)] = [median(forward), median(whole)]
    return row


def page(rows: Mapping[str, Row], seconds: float) -> list[str]:
    """The table, the plot's name, and the conditions."""
    lines = [
        "# One vision-language model, pruned once, fine-tuned to two tasks",
        "",
        *(__doc__ or "").split("\n\n")[2].split("\n"),
        "",
        *(vl.__doc__ or "").split("\n\n")[1].split("\n"),
    ]
    lines += ["", "![Mean of the tasks over sparsity, by method](vision_language.svg)", "", *table(*cells(rows)), ""]
    missing = [f"{m} at {s:.0%}" for s in SPARSITIES for m in METHODS if f"{m}:{s}" not in rows]
    lines += [f"Not measured yet: {', '.join(missing)}.", ""] if missing else []
    return [*lines, *verdict(rows), "", conditions(1, "seeds 0 to 4", seconds)]


def cells(rows: Mapping[str, Row]) -> tuple[list[str], list[list[str]]]:
    head = ["method", "sparsity", "recall@1", "recall@5", "yes/no", "count", "mean", "CPU-seconds"]
    body = []
    for name, row in rows.items():
        if name in ("timing", "why") or name.count(":") > 1:
            continue
        method, _, sparsity = name.partition(":")
        seconds = f"{row['seconds']:.1f}" if "seconds" in row else ""
        body.append([method, sparsity, *(f"{row[f]:.1f}" for f in FIGURES), f"{score(row):.1f}", seconds])
    return head, body


def picture(rows: Mapping[str, Row]) -> str:
    """The mean of the tasks over sparsity, a line for each method."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    matplotlib.rcParams["svg.hashsalt"] = "secateur"
    figure, panel = pyplot.subplots(figsize=(6.4, 4.0))
    for method in METHODS:
        points = [(100 * s, score(rows[f"{method}:{s}"])) for s in SPARSITIES if f"{method}:{s}" in rows]
        if points:
            width = 2.4 if method == "multiflow" else 1.2
            panel.plot(*zip(*points, strict=True), marker="o", markersize=4, linewidth=width, label=method)
    if "dense" in rows:
        panel.axhline(score(rows["dense"]), color="grey", linestyle=":", label="dense")
    panel.set_xlabel("weights removed, %")
    panel.set_ylabel("mean of the two tasks")
    panel.legend(fontsize=8)
    figure.tight_layout()
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()


def verdict(rows: Mapping[str, Row]) -> list[str]:
    """Whether MULTIFLOW is above OMP, LAMP and SNIP at 75 and 90%, and what it takes."""
    lines = []
    for s in (0.75, 0.9):
        found = {m: score(rows[f"{m}:{s}"]) for m in ("multiflow", "omp", "lamp", "snip") if f"{m}:{s}" in rows}
        if len(found) == 4:
            above = [m for m in ("omp", "lamp", "snip") if found["multiflow"] > found[m]]
            figures = ", ".join(f"{m} {v:.1f}" for m, v in found.items())
            lines.append(f"At {s:.0%} MULTIFLOW is above {', '.join(above) or 'none'} of OMP, LAMP and SNIP ({figures}).")
    if "why" in rows and "dense" in rows:
        lines += ["", *parts(rows), *reasons(rows["why"], rows["dense"]), ""]
    for samples in (str(CALIBRATION), str(4 * CALIBRATION)):
        if "timing" in rows:
            one, whole = rows["timing"][samples]
            lines.append(
                f"MULTIFLOW on {samples} samples takes {whole:.2f} CPU-seconds, from statistics to masks: {whole / one:.2f} "
                f"times the forward passes alone ({one:.2f})."
            )
    return lines


def reasons(row: Row, dense: Row) -> list[str]:
    """What pruning does before tuning, and what follows from it."""
    found = {key: r for key, r in row.items() if ":" in key}
    groups = list(found["omp:0.5"]["errors"])
    head = ["before tuning", "sparsity", *(f"error, {g}" for g in groups), "dead depthwise channels", *FIGURES]
    body = [
        [*key.split(":"), *(f"{r['errors'][g]:.3f}" for g in groups), f"{r['dead']:.0%}", *(f"{r[f]:.1f}" for f in FIGURES)]
        for key, r in found.items()
    ]
    body.append(["dense", "", *("" for _ in groups), "", *(f"{dense['untuned'][f]:.1f}" for f in FIGURES)])
    return [*table(head, body), "", WHY]


def parts(rows: Mapping[str, Row]) -> list[str]:
    """The mean of the tasks where a part of the model alone is pruned by half and tuned."""
    found = {part: {m: rows[f"{m}:0.5:{part}"] for m in ALONE if f"{m}:0.5:{part}" in rows} for part in PARTS}
    body = [[part, *(f"{score(row):.1f}" for row in of.values())] for part, of in found.items() if len(of) == len(ALONE)]
    return [*table(["pruned by half, alone", *ALONE], body), ""] if body else []


def score(row: Row) -> float:
    """The mean of the two tasks: of the recalls, and of both kinds of questions."""
    return mean((mean((row["recall@1"], row["recall@5"])), mean((row["yes/no"], row["count"]))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cache", type=Path, help="JSON file of the rows")
    parser.add_argument("--rows", default="dense,timing,why", help="these first, as method:sparsity, separated by commas")
    parser.add_argument("--minutes", type=float, default=9.0, help="begin no further row after so long; 0 measures none")
    parser.add_argument("--out", type=Path, help="write the page here")
    given = parser.parse_args()
    torch.set_num_threads(1)
    makers: dict[str, Callable[[], Row]] = {"dense": dense, "timing": timing, "why": why}
    makers |= {f"{m}:{s}": partial(pruned, m, s) for s in SPARSITIES for m in METHODS}
    makers |= {f"{m}:0.5:{part}": partial(pruned, m, 0.5, part) for part in PARTS for m in ALONE}
    begun = time.monotonic()
    known = Rows(given.cache)
    for name in dict.fromkeys([*given.rows.split(","), *URGENT, *makers]):
        if name not in known and time.monotonic() - begun < 60 * given.minutes:
            started = time.process_time()
            known.keep(name, {**makers[name](), "all seconds": time.process_time() - started})
    rows = {n: known[n] for n in makers if n in known}
    show(page(rows, sum(r["all seconds"] for r in rows.values())), given.out)
    if given.out is not None:
        given.out.with_suffix(".svg").write_text(picture(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
