"""Options that mean the same in every command have the same name, type and help: they are defined here, once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

METHOD, DATA, RUN = "What to remove", "Model and data", "Running"

Model = Annotated[
    str,
    typer.Argument(
        help="hf:NAME_OR_DIR, timm:NAME, torchvision:NAME, module:callable, file.py:callable, or a directory that Secateur"
        " wrote. Options follow a '?': timm:resnet18?pretrained=true",
        show_default=False,
    ),
]
Data = Annotated[
    str | None,
    typer.Option(
        "--data",
        help="Calibration batches: folder:DIR, npz:FILE, text:FILE, module:callable or file.py:callable. A slice takes part of"
        " it: npz:FILE[0::2]",
        show_default=False,
        rich_help_panel=DATA,
    ),
]
Train = Annotated[
    str | None,
    typer.Option("--train", help="Batches to fine-tune on; --data by default.", show_default=False, rich_help_panel=DATA),
]
Test = Annotated[
    str | None,
    typer.Option(
        "--test", help="Batches on which quality is measured, before and after.", show_default=False, rich_help_panel=DATA
    ),
]
Evaluate = Annotated[
    str | None,
    typer.Option(
        "--evaluate",
        help="Your own measure of quality: module:callable or file.py:callable, called with the model, returning a number or a"
        " dict of numbers.",
        show_default=False,
        rich_help_panel=DATA,
    ),
]
BatchSize = Annotated[int, typer.Option("--batch-size", min=1, help="Samples in a batch.", rich_help_panel=DATA)]
Limit = Annotated[
    int | None,
    typer.Option("--limit", min=1, help="Use at most so many calibration samples.", show_default=False, rich_help_panel=DATA),
]
RecipeFile = Annotated[
    Path | None,
    typer.Option(
        "--recipe",
        help="A recipe in TOML or JSON; the options below are laid over it.",
        show_default=False,
        rich_help_panel=METHOD,
    ),
]
Sparsity = Annotated[
    str | None,
    typer.Option(
        "--sparsity", "-s", help="Fraction of the weights to remove, such as 0.5. Several, 0.3,0.5,0.7, are compared.",
        show_default=False, rich_help_panel=METHOD,
    ),
]  # fmt: skip
OneSparsity = Annotated[
    float | None,
    typer.Option(
        "--sparsity", "-s", help="Fraction of the weights to remove, such as 0.5.", show_default=False, rich_help_panel=METHOD
    ),
]
Budget = Annotated[
    str | None,
    typer.Option(
        "--budget",
        help="What the model may cost at most, instead of a sparsity: '50% MACs', '2M params', '10 MB' or, measured on this"
        " machine, '5 ms'. Several, separated by commas, are compared.",
        show_default=False,
        rich_help_panel=METHOD,
    ),
]
Criteria = Annotated[
    str | None,
    typer.Option(
        "--criterion", "-c", help="How much each weight matters: magnitude by default. Several, a,b, are compared.",
        show_default=False, rich_help_panel=METHOD,
    ),
]  # fmt: skip
OneCriterion = Annotated[
    str | None,
    typer.Option(
        "--criterion",
        "-c",
        help="How much each weight matters: magnitude by default.",
        show_default=False,
        rich_help_panel=METHOD,
    ),
]
Pattern = Annotated[
    str | None,
    typer.Option(
        "--pattern",
        "-p",
        help="What goes together: element (default), row, neuron, 2:4, 4x1; cut out channel, ffn, head, head_dim, width, layer."
        " Options follow a '?': 'channel?round_to=8&combine=first&normalize=mean'.",
        show_default=False,
        rich_help_panel=METHOD,
    ),
]
Allocation = Annotated[
    str | None,
    typer.Option(
        "--allocation",
        "-a",
        help="How much each layer loses: global (default), uniform, erk, lamp. Of units cut out: uniform (default), isomorphic,"
        " global, sensitivity (by the curves of a scan), gain (of a budget; the default of ms).",
        show_default=False,
        rich_help_panel=METHOD,
    ),
]
Reduction = Annotated[
    str | None,
    typer.Option(
        "--reduction",
        help="How a unit's scores become one: sum, mean, l2, max, abs_sum.",
        show_default=False,
        rich_help_panel=METHOD,
    ),
]
Schedule = Annotated[
    str | None,
    typer.Option(
        "--schedule",
        help="How the sparsity grows over the steps: one-shot (default), iterative, cubic, exponential.",
        show_default=False,
        rich_help_panel=METHOD,
    ),
]
Steps = Annotated[int | None, typer.Option("--steps", min=1, help="Pruning steps.", show_default=False, rich_help_panel=METHOD)]
Layers = Annotated[
    list[str] | None,
    typer.Option(
        "--layers",
        help="Only these layers: a name, a module, or a pattern such as 'blocks.*'. May be repeated.",
        show_default=False,
        rich_help_panel=METHOD,
    ),
]
Ignore = Annotated[
    list[str] | None,
    typer.Option("--ignore", help="Not these layers. May be repeated.", show_default=False, rich_help_panel=METHOD),
]
Force = Annotated[
    list[str] | None,
    typer.Option(
        "--force",
        help="Of units that are cut out: what has to go, a block's name or a layer's outputs, 'conv1[3,5]'. May be repeated.",
        show_default=False,
        rich_help_panel=METHOD,
    ),
]
Seed = Annotated[
    int | None, typer.Option("--seed", min=0, help="Seed of everything random.", show_default=False, rich_help_panel=METHOD)
]
ReestimateNorms = Annotated[
    bool,
    typer.Option(
        "--reestimate-norms", help="Re-estimate BatchNorm statistics on --data after pruning.", rich_help_panel=METHOD
    ),
]
Solver = Annotated[
    str | None,
    typer.Option(
        "--solver",
        help="What chooses or repairs the weights that stay, on --data: keep (default), least-squares, sparsegpt, obc, admm,"
        " alps, woodfisher, chita; with options as alps?damp=0.1.",
        show_default=False,
        rich_help_panel=METHOD,
    ),
]
Repair = Annotated[
    str | None,
    typer.Option(
        "--repair",
        help="Of channels and other units cut out, how the layers after them make up for it on --data: none (default), bias,"
        " least-squares.",
        show_default=False,
        rich_help_panel=METHOD,
    ),
]
SlimmingEpochs = Annotated[
    int | None,
    typer.Option(
        "--slimming",
        min=1,
        help="Of units that are cut out: first train for so many epochs with sparse BatchNorm scales (-c bn_scale -a global).",
        show_default=False,
        rich_help_panel=METHOD,
    ),
]
SlimmingStrength = Annotated[
    float | None,
    typer.Option(
        "--slimming-strength",
        min=0.0,
        help="Weight of the sum of the absolute scales in the loss (default 0.0001).",
        show_default=False,
        rich_help_panel=METHOD,
    ),
]
FineTuneEpochs = Annotated[
    int | None,
    typer.Option(
        "--finetune",
        min=1,
        help="Fine-tune for so many epochs after each step, masks held.",
        show_default=False,
        rich_help_panel=METHOD,
    ),
]
LearningRate = Annotated[
    float | None,
    typer.Option(
        "--lr",
        min=0.0,
        help="Highest learning rate of the fine-tuning (default 0.001).",
        show_default=False,
        rich_help_panel=METHOD,
    ),
]
Optimizer = Annotated[
    str | None,
    typer.Option("--optimizer", help="adamw (default) or sgd.", show_default=False, rich_help_panel=METHOD),
]
Compress = Annotated[
    float | None,
    typer.Option(
        "--compress", min=1, max=12, help="Deep Compression: weights share values of so many bits, and the artifact is"
        " entropy-coded. A recipe's [compress] says more.", show_default=False, rich_help_panel=METHOD,
    ),
]  # fmt: skip
Scan = Annotated[
    bool,
    typer.Option(
        "--scan", help="Also measure how much each layer bears, and show the curves in the report.", rich_help_panel=RUN
    ),
]
Stream = Annotated[
    bool,
    typer.Option(
        "--stream",
        help="Prune the checkpoint hf:DIR a block at a time, with no more in memory: it may be larger. Takes --data and --out.",
        rich_help_panel=RUN,
    ),
]
Out = Annotated[
    Path | None,
    typer.Option("--out", "-o", help="Directory to write: weights, recipe, report.", show_default=False, rich_help_panel=RUN),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is there.", rich_help_panel=RUN)]
Threads = Annotated[
    int | None,
    typer.Option(
        "--threads",
        min=1,
        help="CPU threads. Results repeat bit for bit at one number of threads.",
        show_default=False,
        rich_help_panel=RUN,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON and nothing else.", rich_help_panel=RUN)]
Full = Annotated[bool, typer.Option("--full", help="Show all of it, with nothing summed up.", rich_help_panel=RUN)]
