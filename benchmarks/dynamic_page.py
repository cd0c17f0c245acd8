"""The page and the picture of benchmarks/dynamic_vision.py, from its rows."""

from __future__ import annotations

import io
from typing import Any

from conditions import conditions, table

Found = dict[str, Any]
NAMES = {
    "resnet20": "ResNet-20 on CIFAR-10",
    "resnet56": "ResNet-56 on CIFAR-10",
    "minilm": "all-MiniLM-L6-v2 on STS-B",
    "vit": "ViT-S/14, its maps",
    "vit_token": "ViT-S/14, its first token",
}
METHODS = {"rnp": "RNP", "early_exit": "early exit", "skip": "layer skipping", "tokens": "token pruning"}
COLOURS = {"rnp": "#1e7a3c", "early_exit": "#2c6fbb", "skip": "#b8860b", "tokens": "#7d3c98"}


def points(found: Found, name: str, method: str) -> list[tuple[float, dict[str, Any]]]:
    """Rows of a dial by budget, the largest first."""
    prefix = f"{name}/{method}/"
    rows = {key.removeprefix(prefix): row for key, row in found.items() if key.startswith(prefix) and "macs" in row}
    return sorted(((float(budget), row) for budget, row in rows.items()), reverse=True)


def page(found: Found, threads: int) -> list[str]:
    """The whole page."""
    lines = [
        "# Execution that depends on the input: images and sentences",
        "",
        "Accuracy, mean multiply-adds and time at batch 1, along the dial of each method of docs/dynamic.md, beside the "
        "dense network and channels cut for good. *MACs* are those of the whole network with the deciding, mean over the "
        "test inputs, as a share of the dense network's; *spread* is what the 5th and the 95th of a hundred inputs cost. "
        "*ms* is the median of single images in turn, and *times faster* is taken round by round against the dense network "
        "as it comes, with quartiles.",
        "",
        "![Quality over mean multiply-adds, by network](dynamic_vision.svg)",
    ]
    lines += ["", missing(found)]
    for name, title in NAMES.items():
        own = network(found, name)
        if own:
            lines += [
                "",
                f"## {title}",
                "",
                *table(HEAD, own),
                *verdict(found, name),
                *one_norm(found, name),
                *choosing(found, name),
                "",
                NOTES[name],
            ]
    return [*lines, "", conditions(threads, "seed 0", sum(row.get("seconds", 0.0) for row in found.values()))]


def missing(found: Found) -> str:
    """What has not been measured, in words."""
    wanted = {
        "resnet20": ("dense tuned", "static 0.7", "static 0.5", "rnp/0.5", "early_exit/0.5", "skip/0.8", "time/dense"),
        "resnet56": ("dense tuned", "static 0.7", "static 0.5", "rnp/0.5", "early_exit/0.5", "skip/0.8", "time/dense"),
        "minilm": ("dense", "tokens/0.8", "skip/0.8", "time/dense"),
        "vit": ("dense", "tokens/0.8", "skip/0.8", "time/dense"),
    }
    absent = [f"{name}: {what}" for name, rows in wanted.items() for what in rows if f"{name}/{what}" not in found]
    return (
        f"Not measured yet: {'; '.join(absent)}. The script goes on from the rows it has." if absent else "All rows are there."
    )


HEAD = ("what", "budget", "quality", "MACs", "spread", "ms", "times faster")
#: Said where the rows of RNP do not say that they are of networks with a norm for each number of groups.
ONE_NORM = (
    "RNP's rows are of a network with one norm behind the second convolutions for every number of groups; now there is one "
    "for each, and they are to be measured again."
)
NOTES = {
    "minilm": "Spearman's correlation times 100 on the 1,379 test pairs. Calibrated on 256 sentences of SST-2, nothing "
    "trained. Token pruning ranks by the mean attention received, since token vectors are averaged. Budgets are shares of "
    "the gated layers; the sentences of STS-B are short, about a dozen tokens, which leaves little to drop. Times are of "
    "single sentences of SST-2.",
    "vit": "What the model is for: a map of how much each pixel matters, made of all patches. Quality is the correlation of "
    "a map with the dense network's, times 100, the mean over 64 images of odd ImageNet class; calibrated on images of even "
    "class (16 for tokens, 48 for layers), nothing trained. Tokens that left come back at the end as they were, and the "
    "decoder reads them.",
    "vit_token": "The same networks judged by what a classifier or a search would read: the cosine of the first token behind "
    "the last norm with the dense network's, times 100, the mean over the same images. The times are those above.",
    **dict.fromkeys(
        ("resnet20", "resnet56"),
        "Test: 5,000 test images, the first of the shuffled split. "
        "*Trained alike*: four epochs of the first 20,480 training images of the shuffled split, "
        "shifted and flipped, batches of 128, SGD with Nesterov momentum 0.9, weight decay 0.0005; the cut networks and the "
        "dense one with learning rate 0.03 along one cosine, RNP the same four epochs, with a rate that starts anew, lower, "
        "after each time its decider learns. Cut for good: the inner channels of every block by magnitude, the same share of "
        "each, then repaired by least squares on 1,280 images and trained. Early exit and skipping leave the network as it "
        "comes, untrained on these images, and are calibrated on 5,120 and 512 training images; compare them with the first "
        "line. The images were compressed as JPEG after the networks were trained, which training also makes up for.",
    ),
}


def network(found: Found, name: str) -> list[list[str]]:
    """Lines of one network's table."""
    lines = []
    for what, shown in (("dense", "dense, as it comes"), ("dense tuned", "dense, trained alike")):
        if f"{name}/{what}" in found:
            lines.append([shown, "", *figures(found, name, found[f"{name}/{what}"], what)])
    for key, row in found.items():
        if key.startswith(f"{name}/static "):
            budget = key.rpartition(" ")[2]
            on = f", on {row['images']:,} test images" if "images" in row else ""
            lines.append([f"cut for good, trained alike{on}", budget, *figures(found, name, row, f"static {budget}")])
    for method, shown in METHODS.items():
        lines += [
            [shown, f"{budget:g}", *figures(found, name, row, f"{method}/{budget}")]
            for budget, row in points(found, name, method)
        ]
    return lines


def figures(found: Found, name: str, row: dict[str, Any], what: str) -> list[str]:
    """Quality, cost, spread and times of one row."""
    timed = found.get(f"{name}/time/{what}")
    spread = f"{row['spread'][0]:.0%} to {row['spread'][-1]:.0%}" if "spread" in row else ""
    ms = f"{timed['ms']:.2f}" if timed else ""
    faster = f"{timed['speedup']:.2f} ({timed['low']:.2f} to {timed['high']:.2f})" if timed else ""
    return [f"{row['quality']:.2f}", f"{row['macs']:.1%}", spread, ms, faster]


def verdict(found: Found, name: str) -> list[str]:
    """What RNP reached at half the multiply-adds, in words."""
    half, cut, tuned = (found.get(f"{name}/{what}") for what in ("rnp/0.5", "static 0.5", "dense tuned"))
    if half is None:
        return []
    dense = found[f"{name}/dense"]["quality"]
    alike = "" if tuned is None else f", {half['quality'] - tuned['quality']:+.2f} against the dense network trained alike"
    beside = "channels cut for good are not measured yet"
    if cut is not None:
        beside = f"{half['quality'] - cut['quality']:+.2f} against channels cut for good to {cut['macs']:.1%}"
    start = f"RNP at {half['macs']:.1%} of the multiply-adds: {half['quality'] - dense:+.2f} points against the dense network"
    return ["", f"{start} as it comes{alike}; {beside}. The aim is at most 1 point, and more than channels cut for good."]


def one_norm(found: Found, name: str) -> list[str]:
    """The remark on rows from before norms were apart."""
    half = found.get(f"{name}/rnp/0.5")
    return ["", ONE_NORM] if half is not None and not half.get("norms") else []


def choosing(found: Found, name: str) -> list[str]:
    """What the choices of RNP are worth on the very network it trained."""
    rows = {key.rpartition("/")[2]: row for key, row in found.items() if key.startswith(f"{name}/choices/")}
    if not rows:
        return []
    lines = [[what, f"{row['share']:.1%}", f"{row['quality']:.1f}"] for what, row in rows.items()]
    said = "The same trained network at budget 0.5, on 1,000 test images, with other choices than its decider's:"
    return ["", said, "", *table(("choices", "gated MACs", "accuracy"), lines)]


def picture(found: Found) -> str:
    """Quality over mean multiply-adds, one panel for each network, as SVG."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    names = [name for name in NAMES if f"{name}/dense" in found and any(points(found, name, method) for method in METHODS)]
    figure, panels = pyplot.subplots(1, len(names), figsize=(4.2 * len(names), 3.9), squeeze=False)
    for panel, name in zip(panels[0], names, strict=True):
        dense = found[f"{name}/dense"]["quality"]
        panel.axhline(dense, color="0.75", linewidth=1)
        panel.annotate("dense, as it comes", (34, dense), color="0.4", fontsize=8, va="bottom")
        if f"{name}/dense tuned" in found:
            tuned = found[f"{name}/dense tuned"]["quality"]
            panel.axhline(tuned, color="0.75", linewidth=1, linestyle="--")
            panel.annotate("dense, trained alike", (34, tuned), color="0.4", fontsize=8, va="bottom")
        static = [(100 * r["macs"], r["quality"]) for k, r in found.items() if k.startswith(f"{name}/static ")]
        if static:
            panel.plot(
                *zip(*static, strict=True), "s", color="#c0392b", markersize=6, label="channels cut for good, trained alike"
            )
        for method, label in METHODS.items():
            curve = [(100 * row["macs"], row["quality"]) for _, row in points(found, name, method)]
            if curve:
                panel.plot(*zip(*curve, strict=True), "-o", markersize=4, color=COLOURS[method], label=label)
        panel.set_xlim(30, 103)
        panel.set_ylim(max(40.0, min(y for line in panel.lines for y in line.get_ydata()) - 2), None)
        panel.set_title(NAMES[name], fontsize=10)
        panel.set_xlabel("mean multiply-adds, percent of dense")
        panel.spines[["top", "right"]].set_visible(False)
    panels[0][0].set_ylabel("quality: accuracy in percent, correlation or cosine times 100", fontsize=8)
    shown = {label: handle for panel in panels[0] for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)}
    figure.legend(shown.values(), shown.keys(), loc="lower center", ncols=5, frameon=False, fontsize=9)
    figure.tight_layout(rect=(0, 0.09, 1, 1))
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()
