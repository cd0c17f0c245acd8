"""Networks pruned while they train, beside published figures and beside networks trained alike without pruning.

LeNet-300-100 and LeNet-5 on MNIST (mnist_nets.py), ResNet-20 on CIFAR-10, a large sparse language model of characters against
a small dense one (`secateur.train.versus`), and MiniLM: 80% of its weights removed step by step, and half of its feed-forward
neurons and heads by HomoDistil, taught by itself without labels. Each row is kept in the JSON file as soon as it is known.

    python benchmarks/training.py rows.json --rows lenet_300_100:0,lenet_5:0,versus:lstm:0,minilm:gradual,minilm:homodistil
    python benchmarks/training.py rows.json --out docs/benchmarks/training.md
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from conditions import ROOT, Rows, asset, conditions, show, table

sys.path.insert(0, str(ROOT / "examples"))
Row = dict[str, Any]
#: What is to be beaten, the goal, and how the network is pruned: keys of mnist_nets.pruned.
LENETS: Mapping[str, tuple[str, str]] = {
    "lenet_300_100": ("56x at 1.99% (DNS), 68x at 1.92% (variational dropout)", "80x at 1.8%"),
    "lenet_5": ("108x at .91% (DNS), 280x at .75% (variational dropout)", "300x at .85%"),
}
LENET_300_100 = {"epochs": 60, "lr": 3e-3, "share": 0.5, "temperature": 2.0, "end": 0.4}
LENET_5 = {"epochs": 40, "lr": 2e-3, "batch": 64, "share": 0.5, "temperature": 2.0, "end": 0.6, "strength": 0.2, "every": 50}
RESNET_EPOCHS, RESNET_LR = 4, 0.05


def lenet(name: str, seed: int, factor: float, holdout: bool) -> tuple[Any, Any, Any]:
    """The images, the dense network, and that with a `factor`-th of the parameters; for `kept_lenet` they are kept."""
    import mnist_nets as nets

    data = nets.images(holdout)
    small = name == "lenet_300_100"
    dense = nets.dense(name, seed, data, 12 if small else 8, 0.7 if small else 0.4)
    convolutions = ("conv1", "conv2")
    rounds = [(), ()] if small else [(), convolutions, convolutions]
    start = nets.halved(dense, data, dense, rounds, epochs=4 if small else 2, seed=seed)
    total, biases = sum(p.numel() for p in dense.parameters()), 110 if small else 85
    settings = LENET_300_100 if small else LENET_5
    pruned = nets.pruned(start, dense if small else start, data, int(total / factor) - biases, seed=seed, **settings)
    nets.write(_lenet_file(name, seed, factor, holdout), dense, pruned)
    return data, dense, pruned


def kept_lenet(name: str, seed: int, factor: float, holdout: bool) -> tuple[Any, Any, Any]:
    """What `lenet` gave last for these arguments, where it did: from the temporary folder."""
    import mnist_nets as nets

    file = _lenet_file(name, seed, factor, holdout)
    return (nets.images(holdout), *nets.read(file, name)) if file.exists() else lenet(name, seed, factor, holdout)


def _lenet_file(name: str, seed: int, factor: float, holdout: bool) -> Path:
    return Path(tempfile.gettempdir()) / f"secateur-{name}-{seed}-{factor:g}{'-holdout' * holdout}.safetensors"


def _lenet(name: str, seed: str, options: argparse.Namespace) -> Row:
    import mnist_nets as nets

    began, factor = time.process_time(), options.factor or float(LENETS[name][1].split("x")[0])
    data, dense, pruned = lenet(name, int(seed), factor, options.holdout)
    total = sum(p.numel() for p in dense.parameters())
    return {
        "dense": data.error(dense), "error": data.error(pruned), "nonzeros": nets.nonzeros(pruned), "total": total,
        "factor": total / nets.nonzeros(pruned), "seconds": time.process_time() - began,
    }  # fmt: skip


def resnet20(seed: str, options: argparse.Namespace) -> Row:
    """ResNet-20 on CIFAR-10 retrained, and retrained as long while 90% of its weights go, taught by the first."""
    from cifar_resnet import make
    from dynamic_data import Augmented
    from mnist_nets import taught as lesson
    from structured_tasks import batched, cifar, correct

    began = time.process_time()
    test = batched(*cifar("test", 10_000), 250)
    data = Augmented(*cifar("train", 40_960), seed=int(seed))
    given = correct(make(20).model, test)
    dense = _retrained(make(20).model, data, None, {})
    between = time.process_time()
    settings = {"criterion": "obd", "sparsity": 0.9, "allocation": "global", "every": 40, "end": 0.5, "seed": int(seed)}
    pruned = _retrained(make(20).model, data, lesson(dense, 0.9, 4.0), settings)
    return {
        "given": given, "dense": correct(dense, test), "pruned": correct(pruned, test), "epochs": RESNET_EPOCHS,
        "nonzeros": sum(int(p.count_nonzero()) for p in pruned.parameters()), "images": len(data.x),
        "total": sum(p.numel() for p in dense.parameters()), "dense seconds": between - began,
        "seconds": time.process_time() - began,
    }  # fmt: skip


def _retrained(model: Any, data: Any, loss: Any, pruning: Mapping[str, Any]) -> Any:
    """SGD with momentum, the rate falling along half a cosine; products in bfloat16."""
    import torch
    import torch.nn.functional as F

    import secateur as sc
    from secateur.train.loop import Rate

    total = RESNET_EPOCHS * len(data)
    optimizer = torch.optim.SGD(model.named_parameters(), lr=RESNET_LR, momentum=0.9, nesterov=True, weight_decay=5e-4)
    batches = chain.from_iterable(data.shuffled(1000 * data.seed + epoch) for epoch in range(RESNET_EPOCHS))

    def cost(batch: Any) -> Any:
        x, y = batch
        made = model(x)
        return F.cross_entropy(made, y) if loss is None else loss(made, x, y)

    schedule = {"begin": 1, **pruning, "end": int(pruning["end"] * total)} if pruning else {}
    with sc.gradual(model.train(), optimizer, **schedule) if pruning else nullcontext() as pruner:
        _learn(optimizer, batches, Rate(RESNET_LR, 0.05, total), cost, pruner)
    return model.eval()


def _learn(
    optimizer: Any, batches: Iterable[Any], rate: Callable[[int], float], cost: Callable[[Any], Any], pruner: Any
) -> None:
    """One step a batch, products in bfloat16, and the pruner's step after it where there is one."""
    import torch

    for step, batch in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = rate(step)
        with torch.autocast("cpu", torch.bfloat16):
            found = cost(batch)
        optimizer.zero_grad()
        found.backward()
        optimizer.step()
        if pruner is not None:
            pruner.step()


def versus(detail: str, options: argparse.Namespace) -> Row:
    """A language model of characters: WikiText-2's validation text to train on, its test text to judge."""
    import characters

    from secateur.data import load_data, perplexity
    from secateur.train.versus import versus as contest

    began = time.process_time()
    kind, _, seed = detail.partition(":")
    width, make, step = {"lstm": (128, characters.lstm, 1), "transformer": (48, characters.transformer, 4)}[kind]
    loaded, text = make(width), asset("wikitext2")
    train = load_data(f"text:{text / 'valid.txt'}?seqlen=64", loaded=loaded, batch_size=32, limit=options.blocks)
    test = load_data(f"text:{text / 'test.txt'}?seqlen=64", loaded=loaded, batch_size=64, limit=1000)
    rows = contest(
        lambda at: make(at).model, width, train, perplexity(list(test)), sparsities=[0.8, 0.9], epochs=options.epochs or 1,
        lr=5e-3, step=step, seeds=[int(seed or 0)],
    )  # fmt: skip
    return {"rows": [asdict(r) for r in rows], "seconds": time.process_time() - began, "blocks": train.size}


def sentences(tokenizer: Any, count: int, size: int, seed: int) -> list[dict[str, Any]]:
    """Batches of sentences without labels, in an order from `seed`: of SST-2's training set, and of every other STS-B pair.

    No sentence that is in one of the other pairs is among them, so that these tell whether anything was learnt by heart.
    """
    import random

    from stsb import FIRST, SECOND

    draw = random.Random(seed)
    sst = [line.split("\t")[0] for line in (asset("sst2") / "train.tsv").read_text(encoding="utf-8").splitlines()[1:]]
    sst = [line for line in sst if len(line.split()) >= 5]
    draw.shuffle(sst)
    pairs = [line.split("\t") for line in (asset("stsb") / "sts-test.csv").read_text(encoding="utf-8").splitlines()]
    seen, unseen = ({row[c] for row in pairs[half::2] for c in (FIRST, SECOND)} for half in (0, 1))
    few, half = sorted(seen - unseen), size // 2
    sts: list[str] = []
    while len(sts) < count * half:
        sts += draw.sample(few, len(few))
    settings = {"padding": True, "truncation": True, "max_length": 40, "return_tensors": "pt"}
    return [
        dict(tokenizer(sts[i : i + half] + sst[i : i + half], **settings)) for i in range(0, count * half, half)
    ]  # fmt: skip


def probe(model: Any, tokenizer: Any) -> float:
    """Accuracy on SST-2's development sentences of a logistic regression on 3000 training sentences' vectors, in percent."""
    import stsb
    import torch
    from sklearn.linear_model import LogisticRegression

    def read(name: str, count: int) -> tuple[list[str], list[int]]:
        rows = [line.split("\t") for line in (asset("sst2") / name).read_text(encoding="utf-8").splitlines()[1:]]
        return [r[0] for r in rows][-count:], [int(r[1]) for r in rows][-count:]

    with torch.no_grad():
        model.eval()
        (x, y), (x_test, y_test) = (
            (stsb.embed(model, texts).numpy(), labels) for texts, labels in (read("train.tsv", 3000), read("dev.tsv", 872))
        )
    return 100 * float(LogisticRegression(C=10.0, max_iter=2000).fit(x, y).score(x_test, y_test))


def minilm(detail: str, options: argparse.Namespace) -> Row:
    """`gradual`: 80% of the weights; `alps`: the same by ALPS first; `homodistil`: half of neurons and heads as it goes;
    `at-once`: as many first; `small`: as many drawn by lot; `scratch`: a student of that shape whose blocks begin anew."""
    import minilm as example
    import stsb
    import torch

    import secateur as sc

    began, steps = time.process_time(), options.steps
    kind, _, seed = detail.partition(":")
    teacher = example.make().model
    torch.manual_seed(int(seed or 0))  # of dropout, and of blocks that begin anew
    batches = sentences(stsb.tokenizer(), steps, 32, int(seed or 0))
    student = copy.deepcopy(teacher)
    units = {"pattern": "ffn_head", "sparsity": 0.5, "allocation": "uniform", "ignore": ["pooler*"], "example": batches[0]}
    pruning: Mapping[str, Any] = {"criterion": "obd", "end": 0.3, **units}
    if kind in ("at-once", "small", "scratch"):
        worth = {"criterion": "taylor", "data": batches[:8]} if kind == "at-once" else {"criterion": "random"}
        student = sc.prune(student, loss=partial(alike, teacher), **worth, **units).model
        pruning = {}
    if kind == "scratch":
        student.encoder.apply(student._init_weights)
    elif kind in ("gradual", "alps"):
        pruning = {"criterion": "obd", "end": 0.6, "sparsity": 0.8, "allocation": "uniform", "ignore": ["pooler*"]}
    masks = None
    if kind == "alps":
        few = {"data": batches[-32:], "example": batches[0]}
        found = sc.prune(student, solver="alps", sparsity=0.8, allocation="uniform", ignore=["pooler*"], **few)
        student, masks, pruning = found.model, found.masks, {}
    small = taught(student, teacher, batches, pruning, masks)
    return {
        "spearman": stsb.spearman(small)["spearman"],
        "unseen": stsb.spearman(small, odd=True)["spearman"], "probe": probe(small, stsb.tokenizer()), "steps": steps,
        "nonzeros": sum(int(p.count_nonzero()) for p in small.parameters()),
        "total": sum(p.numel() for p in teacher.parameters()), "seconds": time.process_time() - began,
    }  # fmt: skip


def alike(teacher: Any, student: Any, batch: Mapping[str, Any]) -> Any:
    """How far vectors are from the teacher's: 1 minus cosine, and 5 times the squared difference of their similarities."""
    import torch
    from stsb import vectors

    made = vectors(student, batch)
    with torch.no_grad():
        wanted = vectors(teacher, batch)
    off = (made @ made.t() - wanted @ wanted.t()).square().sum() / (len(made) * (len(made) - 1))
    return (1 - (made * wanted).sum(1)).mean() + 5 * off


def taught(student: Any, teacher: Any, batches: list[Any], pruning: Mapping[str, Any], masks: Any, lr: float = 4e-4) -> Any:
    """Learn the teacher's vectors, one batch a step; pruned along a cubic, or masks held. Products in bfloat16."""
    import torch

    import secateur as sc
    from secateur.train.loop import Rate

    total = len(batches)
    optimizer = torch.optim.AdamW(student.named_parameters(), lr=lr, weight_decay=0.0)
    units = pruning.get("pattern") == "ffn_head"
    schedule = {**pruning, "begin": 2, "end": int(pruning["end"] * total), "every": 4} if pruning else {}
    teacher.eval()
    if masks is not None:
        sc.hold(optimizer, masks)
    with sc.gradual(student.train(), optimizer, **schedule) if pruning else nullcontext() as pruner:
        _learn(optimizer, batches, Rate(lr, 0.1, total), partial(alike, teacher, student), pruner)
        return pruner.cut()[0].eval() if units else student.eval()


MAKERS: dict[str, Callable[[str, argparse.Namespace], Row]] = {
    **{name: lambda seed, options, name=name: _lenet(name, seed, options) for name in LENETS},  # type: ignore[misc]
    "resnet20": resnet20,
    "versus": versus,
    "minilm": minilm,
}


def run(key: str, options: argparse.Namespace) -> Row:
    name, _, detail = key.partition(":")
    row = MAKERS[name](detail or "0", options)
    return {**row, "conditions": conditions(options.threads, "seed as named, else 0", row["seconds"])}


def lenet_lines(rows: Mapping[str, Row]) -> Iterator[list[str]]:
    """A line for each network: means over the seeds that were run, least and most."""
    for name, (beside, goal) in LENETS.items():
        found = [row for key, row in rows.items() if key.startswith(f"{name}:")]
        if found:
            errors = [r["error"] for r in found]
            yield [
                name, str(len(found)), f"{statistics.fmean(r['dense'] for r in found):.2f}",
                f"{statistics.fmean(r['factor'] for r in found):.1f}x ({found[0]['nonzeros']:,} of {found[0]['total']:,})",
                spread(errors), goal, beside,
                f"{statistics.fmean(r['seconds'] for r in found):.0f} s",
            ]  # fmt: skip


def page(rows: Mapping[str, Row]) -> list[str]:
    lines = ["# Pruning while training", ""]
    if lines_found := list(lenet_lines(rows)):
        head = ["network", "seeds", "dense error", "smaller by", "error", "goal", "published", "CPU time a seed"]
        lines += [
            "## LeNets on MNIST", "", "Errors in percent on the 10,000 test images, of the last weights. All parameters are",
            "counted against all that are not zero, biases too.", "", *table(head, lines_found), "", LENET_TEXT, "",
        ]  # fmt: skip
    if found := [row for k, row in rows.items() if k.startswith("resnet20:")]:
        lines += resnet_lines(found)
    for kind, networks in contests(rows).items():
        lines += versus_lines(kind, networks, [r for k, r in rows.items() if k.startswith(f"versus:{kind}:")])
    if any(key.startswith("minilm:") for key in rows):
        head = ["MiniLM", "seeds", "Spearman, STS-B", "of pairs with unseen sentences", "SST-2 probe"]
        head += ["nonzeros", "steps", "CPU time a seed"]
        lines += ["## MiniLM taught by itself", "", *table(head, list(minilm_lines(rows))), "", MINILM_TEXT, ""]
    return [*lines, *(f"- {key}: {row['conditions']}" for key, row in rows.items())]


LENET_TEXT = (
    "How: `benchmarks/mnist_nets.py`. Dense by AdamW with the images turned and shifted a little; then pruned by Optimal Brain "
    "Damage, on the gradients of the training itself, along a cubic while it learns half from the labels and half from the "
    "dense network. Before, half of the channels and neurons are cut out, and half again (of LeNet-5's fully connected layer "
    "twice more): that makes the long part cheap, and fewer biases are left to count. Settings were compared on 10,000 "
    "training images held out."
)
MINILM = {
    "gradual": "80% of the weights, gradually",
    "alps": "80% of the weights by ALPS at the start, then taught alike",
    "homodistil": "half of feed-forward and heads, gradually (HomoDistil)",
    "at-once": "as many units cut at the start, then taught alike",
    "small": "as many units drawn by lot, taught alike",
    "scratch": "a student of that shape, its blocks new, taught alike without pruning",
}
FIGURES = {"spearman": 4, "unseen": 4, "probe": 1}  #: what is judged of MiniLM, and with how many digits
MINILM_TEXT = (
    "The teacher is the dense model (Spearman .8205; .8313 on the pairs with unseen sentences); the loss asks for its sentence "
    "vectors and for their similarities within a batch. Batches of 32 sentences without labels, half of SST-2's training set, "
    "half of every other STS-B pair; the pairs between, without sentences that are in both, are the unseen ones. Products in "
    "bfloat16. The probe is a logistic regression on 3000 training sentences, judged on the 872 development sentences. "
    "What is pruned gradually goes by Optimal Brain Damage on the gradients of the steps (HomoDistil's own sensitivity, weight "
    "times gradient, has a mean near zero while the student is still the teacher), along a cubic over 60% of the steps, units "
    "over 30%. One-shot at 80%: magnitude .6402, SparseGPT .7394, ALPS .7697 (calibrated.md)."
)


def minilm_lines(rows: Mapping[str, Row]) -> Iterator[list[str]]:
    """A line for each way of pruning: means over seeds, with the least and the most."""
    for kind, title in MINILM.items():
        found = [row for key, row in rows.items() if key.split(":")[:2] == ["minilm", kind]]
        if found:
            figures = [spread([r[what] for r in found], digits) for what, digits in FIGURES.items()]
            seconds = statistics.fmean(r["seconds"] for r in found)
            nonzeros, steps = f"{found[0]['nonzeros'] / 1e6:.2f} M", str(found[0]["steps"])
            yield [title, str(len(found)), *figures, nonzeros, steps, f"{seconds:.0f} s"]


def spread(values: list[float], digits: int = 2) -> str:
    """The mean, and where there are several the least and the most."""
    between = f" ({min(values):.{digits}f} to {max(values):.{digits}f})" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{between}"


def resnet_lines(rows: list[Row]) -> list[str]:
    """Means over seeds, with the least and the most."""
    first, lost = rows[0], [r["dense"] - r["pruned"] for r in rows]
    dense, pruned = ([r[what] for r in rows] for what in ("dense", "pruned"))
    seconds = [r["dense seconds"] for r in rows]
    more = [r["seconds"] - s for r, s in zip(rows, seconds, strict=True)]
    body = [
        ["as it comes", f"{first['given']:.2f}", f"{first['total']:,}", ""],
        ["dense, retrained", spread(dense), f"{first['total']:,}", f"{statistics.fmean(seconds):.0f}"],
        ["90% pruned, retrained as long", spread(pruned), f"{first['nonzeros']:,}", f"{statistics.fmean(more):.0f}"],
    ]
    return [
        "## ResNet-20 on CIFAR-10, 90% of the weights", "",
        *table(["network", "top-1 %", "nonzeros", "CPU seconds"], body), "",
        f"Lost: {spread(lost)} points; goal: at most 1.5. {len(rows)} seed(s), {first['epochs']} epochs of {first['images']:,} "
        "JPEG training images shifted and flipped, judged on 10,000 test images. SGD, products in bfloat16. Pruned by Optimal "
        "Brain Damage along a cubic over the first half; taught by the retrained dense network and, for a tenth, labels.", "",
    ]  # fmt: skip


def contests(rows: Mapping[str, Row]) -> dict[str, list[Any]]:
    """All networks of each kind, of all seeds."""
    from secateur.train.versus import Trained

    found: dict[str, list[Any]] = {}
    for key in [k for k in rows if k.startswith("versus:")]:
        found.setdefault(key.split(":")[1], []).extend(Trained(**r) for r in rows[key]["rows"])
    return found


def versus_lines(kind: str, networks: list[Any], rows: list[Row]) -> list[str]:
    """The table of one contest, and its picture."""
    from secateur.report.contest import means

    head = ["network", "nonzeros", "perplexity of a character, mean", "over seeds"]
    body = [
        [
            f"width {r.size}, " + (f"{r.sparsity:.0%} pruned" if r.sparsity else "dense"), f"{r.nonzeros:,}",
            f"{statistics.fmean(values):.2f}", f"{min(values):.2f} to {max(values):.2f}",
        ]
        for r, values in means(networks)
    ]  # fmt: skip
    return [
        f"## {kind}: large and sparse, or small and dense", "", *table(head, body), "",
        f"Trained alike on {rows[0]['blocks']:,} blocks of 64 characters of WikiText-2's validation text, once through; judged "
        f"on 1000 blocks of its test text. {len(rows)} seed(s), {statistics.fmean(r['seconds'] for r in rows):.0f} s of CPU "
        "time each.", "",
        f"![Perplexity over nonzeros](training_{kind}.svg)", "",
    ]  # fmt: skip


def draw(rows: Mapping[str, Row], folder: Path) -> None:
    """The pictures of the contests."""
    from secateur.report.contest import picture

    for kind, networks in contests(rows).items():
        (folder / f"training_{kind}.svg").write_text(picture({kind: networks}), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cache", type=Path, help="JSON file of the rows measured so far")
    parser.add_argument("--rows", default="", help=f"what to measure: {', '.join(MAKERS)}, with :seed or :kind")
    parser.add_argument("--out", type=Path, help="write the page there")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--factor", type=float, help="LeNets: how many times fewer parameters")
    parser.add_argument("--holdout", action="store_true", help="LeNets: judge by training images held out")
    parser.add_argument("--blocks", type=int, default=3000, help="blocks of text of the contests")
    parser.add_argument("--epochs", type=int, help="of the contests")
    parser.add_argument("--steps", type=int, default=600, help="of MiniLM")
    options = parser.parse_args()
    import torch

    torch.set_num_threads(options.threads)
    rows = Rows(options.cache)
    for key in filter(None, options.rows.split(",")):
        rows.measured(key, partial(run, key, options))
    show(page(rows), options.out)
    if options.out:
        draw(rows, options.out.parent)


if __name__ == "__main__":
    main()
