"""The procedure: recipe + model + data -> Result. It calls the pieces in order and does no arithmetic of its own."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from secateur.budgets.masked import within_budget
from secateur.coding.compress import Compressed, compress
from secateur.data.batches import Batch, Loss
from secateur.errors import RecipeError
from secateur.export.artifact import check_target, save
from secateur.job import Job, prepare
from secateur.layers import find_layers
from secateur.measure.latency import compare_latency
from secateur.measure.measure import measure
from secateur.measure.quality import Evaluate, qualities
from secateur.patterns import Units, make_pattern
from secateur.progress import advance
from secateur.recipe import Recipe
from secateur.registry import name_of
from secateur.repair import reestimate_norms
from secateur.report.build import environment, layer_report
from secateur.report.html import render
from secateur.resume import Progress
from secateur.selection import choose, solve
from secateur.solved import SolvedSoFar
from secateur.stats.reads import is_multimodal
from secateur.structured import UnitJob, choose_units, cut_units, prepare_units
from secateur.train.distill import Distillation
from secateur.train.finetune import finetune
from secateur.types import Budget, LayerPlan, MaskSet, Measurement, Plan, Point, Report, Result, Sensitivity, Solved
from secateur.vision_language.groups import collapse_notes, modality_groups

log = logging.getLogger("secateur")
RecipeLike = Recipe | Mapping[str, Any] | str | Path | None


def prune(
    model: nn.Module,
    recipe: RecipeLike = None,
    *,
    data: Iterable[Batch] | None = None,
    train: Iterable[Batch] | None = None,
    loss: Loss | None = None,
    evaluate: Evaluate | None = None,
    example: Batch | None = None,
    out: str | Path | None = None,
    overwrite: bool = False,
    inplace: bool = False,
    source: str | None = None,
    before: Measurement | None = None,
    sensitivity: Sequence[Sensitivity] = (),
    **changes: Any,
) -> Result:
    """Prune a trained model, repair it, and measure what that cost and won.

    Args:
        model: any module. It is left untouched unless `inplace`.
        recipe: a `Recipe`, a mapping, or the path of a TOML or JSON file.
        data: calibration batches, needed by criteria that look at gradients or activations and to re-estimate norms.
        train: batches to fine-tune on, where the recipe asks for it; `data` by default.
        loss: ``loss(model, batch) -> scalar``; the model's own or cross-entropy by default.
        evaluate: ``evaluate(model) -> float`` or a dict of floats, run before and after.
        example: a batch to count multiply-adds and to time; the first of `data` by default.
        out: directory for the artifact: weights, masks, recipe and report.
        overwrite: replace `out` where it exists.
        source: where the model came from, recorded in the artifact so that `sc.load` can rebuild it.
        before: the measurement of the dense model, where it was made already (``report.before`` of another run).
        sensitivity: what `scan` found of this model: shown in the report, and what ``allocation="sensitivity"`` goes by.
        changes: any key of the recipe, laid over it: ``sparsity=0.9, criterion="taylor", pattern="2:4", ...``.

    Returns:
        Result with `model`, `masks`, `plan` and `report`.

    Raises:
        RecipeError, DataError, LayerError, NonFiniteError, ArtifactError: each says what, where and what to do. Nothing is
            written and the model is as before.

    Example:
        >>> import torch, secateur as sc
        >>> result = sc.prune(torch.nn.Linear(8, 8), sparsity=0.5)
        >>> result.masks.sparsity()
        0.5
    """
    started = time.monotonic()
    wanted = Recipe.make(recipe, **changes)
    units = make_pattern(wanted.pattern)
    if isinstance(units, Units):
        job: Job | UnitJob = prepare_units(
            model, wanted, units, data=data, train=train, loss=loss, example=example, sensitivity=sensitivity
        )
    else:
        job = prepare(model, wanted, data=data, train=train, loss=loss, example=example)
    job = replace(job, train_loss=_train_loss(model, wanted, loss, inplace))
    if out is not None:
        check_target(out, overwrite=overwrite)
    if before is None:
        before = measure(model, job.example, evaluate=evaluate, latency=inplace)
    original = {n: p.detach().clone() if inplace else p.detach() for n, p in model.named_parameters()}
    progress = Progress(out, wanted.to_toml(), model) if out is not None and _is_long(job) else None
    budget = None
    if isinstance(job, Job):
        job, budget = within_budget(job, model)
    outcome = _carry_out(job, model, evaluate, before, progress, inplace)
    outcome, compressed = _compressed(outcome, wanted, job)
    after = measure(outcome.model, job.example, evaluate=evaluate, latency=inplace)
    if compressed is not None:
        after = replace(after, bytes_disk=compressed.bytes)
    if not inplace:
        before, after = _timed_side_by_side(model, outcome.model, job.example, before, after)
    report = _report(job, outcome, original, before, after, time.monotonic() - started)
    budget = _achieved(budget or outcome.plan.budget, after, masked=isinstance(job, Job))
    report = replace(report, sensitivity=tuple(sensitivity), budget=budget, notes=(*report.notes, *_budget_note(budget)))
    result = Result(outcome.model, outcome.masks, outcome.plan, report)
    if out is not None:
        _save(result, wanted, out, overwrite, source, compressed)
    if progress is not None:
        progress.clear()
    return result


def plan(
    model: nn.Module,
    recipe: RecipeLike = None,
    *,
    data: Iterable[Batch] | None = None,
    loss: Loss | None = None,
    example: Batch | None = None,
    sensitivity: Sequence[Sensitivity] = (),
    **changes: Any,
) -> Plan:
    """Dry run: how much every layer would lose, and which layers are left alone and why. The model is not touched.

    Of a recipe with several steps this is the first choice at the final sparsity.

    Example:
        >>> import torch, secateur as sc
        >>> sc.plan(torch.nn.Linear(8, 8), sparsity=0.5).layers[0].kept
        32
    """
    wanted = Recipe.make(recipe, **changes)
    units = make_pattern(wanted.pattern)
    if isinstance(units, Units):
        job = prepare_units(model, wanted, units, data=data, train=data, loss=loss, example=example, sensitivity=sensitivity)
        return choose_units(model, job).plan
    masked, budget = within_budget(prepare(model, wanted, data=data, train=data, loss=loss, example=example), model)
    masks = choose(masked.layers, masked.statistics(model).layers, sparsity=masked.sparsity, method=masked.method)
    return replace(_plan(masked, masks), budget=budget)


@dataclass(frozen=True)
class _Outcome:
    """The pruned model and what was done to it."""

    model: nn.Module
    masks: MaskSet
    plan: Plan
    points: list[Point]
    notes: list[str]
    errors: Mapping[str, float] = field(default_factory=dict)  #: relative output error by layer


def _is_long(job: Job | UnitJob) -> bool:
    """Whether a run that is stopped would lose enough to be worth its state on disk."""
    solves = isinstance(job, Job) and bool(job.method.in_turn)
    trains = job.recipe.finetune is not None or job.recipe.slimming is not None
    return trains or (job.batches is not None and (job.recipe.steps > 1 or solves))


def _carry_out(
    job: Job | UnitJob,
    model: nn.Module,
    evaluate: Evaluate | None,
    before: Measurement,
    progress: Progress | None,
    inplace: bool,
) -> _Outcome:
    points = [_point(job, 0.0, before.quality)] if before.quality else []
    if isinstance(job, UnitJob):
        if job.recipe.slimming is not None and job.train is not None:
            model, inplace = model if inplace else copy.deepcopy(model), True
            _slim(job, model, progress)
        cut = cut_units(model, job, inplace=inplace)
        _repair(job, cut.model, 0, None, progress)
        return _Outcome(cut.model, cut.masks, cut.plan, points, list(cut.notes))
    pruned = model if inplace else copy.deepcopy(model)
    job = replace(job, layers=find_layers(pruned, layers=list(job.layers))[0])
    solved, points = _steps(job, pruned, evaluate, points, progress)
    return _Outcome(pruned, solved.masks, _plan(job, solved.masks), points, list(solved.notes), solved.errors)


def _slim(job: UnitJob, model: nn.Module, progress: Progress | None) -> None:
    """Network Slimming's training, on `model` in place."""
    assert job.recipe.slimming is not None
    assert job.train is not None
    settings = job.recipe.slimming.model_dump()
    settings["slimming"] = settings.pop("strength")
    checkpoint = None if progress is None else progress.slimming
    finetune(model, job.train, loss=job.loss, seed=job.recipe.seed, checkpoint=checkpoint, **settings)


def _train_loss(teacher: nn.Module, recipe: Recipe, loss: Loss | None, inplace: bool) -> Loss | None:
    """What fine-tuning minimises: the distance to the unpruned model where the recipe distils, else `loss`."""
    distil = None if recipe.finetune is None else recipe.finetune.distill
    if distil is None:
        return loss
    if inplace:
        raise RecipeError("finetune.distill learns from the unpruned model, which inplace=True does not keep: leave it out")
    return Distillation(teacher, loss=loss, **distil.model_dump())


def _steps(
    job: Job, model: nn.Module, evaluate: Evaluate | None, points: list[Point], progress: Progress | None
) -> tuple[Solved, list[Point]]:
    """All pruning steps on `model` in place, going on where a run that was stopped left off; errors are those of the last."""
    done, masks, earlier = (0, None, []) if progress is None else progress.restore(model)
    solved, points = Solved(masks or MaskSet({})), earlier or points
    notes: list[str] = []
    steps = job.recipe.steps
    for step in range(done, steps):
        advance("prune", step, steps)
        solved = _step(job, model, step, solved.masks or None, progress)
        notes += [n for n in solved.notes if n not in notes]
        if evaluate is not None and job.recipe.finetune is not None and step + 1 < steps:
            points.append(_point(job, solved.masks.sparsity(), qualities(evaluate, model)))
        if progress is not None:
            progress.save(step + 1, model, solved.masks, points)
    advance("prune", steps, steps)
    return replace(solved, notes=tuple(notes)), points


def _step(job: Job, model: nn.Module, step: int, masks: MaskSet | None, progress: Progress | None) -> Solved:
    """One pruning step: statistics, masks and weights, repair, training."""
    target = job.schedule((step + 1) / job.recipe.steps, job.sparsity)
    calibration = job.before(model)
    so_far = SolvedSoFar(progress.solving(step) if progress is not None and job.method.in_turn else None)
    notes = list(calibration.notes)
    solved = solve(
        job.layers,
        calibration.layers,
        sparsity=target,
        method=job.method,
        previous=masks,
        known=job.known(model, calibration.layers, so_far.masks, notes),
        so_far=so_far,
    )
    _repair(job, model, step, solved.masks, progress)
    return replace(solved, notes=(*notes, *solved.notes))


def _repair(job: Job | UnitJob, model: nn.Module, step: int, masks: MaskSet | None, progress: Progress | None) -> None:
    """What the recipe asks for after each step: norm statistics, then training."""
    if job.recipe.reestimate_norms and job.batches is not None:
        reestimate_norms(model, job.batches)
    if job.recipe.finetune is not None and job.train is not None:
        settings = job.recipe.finetune.model_dump(exclude={"distill"})
        checkpoint = None if progress is None else progress.training(step)
        finetune(
            model, job.train, masks=masks, loss=job.train_loss, seed=job.recipe.seed + step, checkpoint=checkpoint, **settings
        )


def _compressed(outcome: _Outcome, recipe: Recipe, job: Job | UnitJob) -> tuple[_Outcome, Compressed | None]:
    """The pruned model with few bits for each weight, where the recipe asks for it. What rounds to zero is removed too."""
    if recipe.compress is None:
        return outcome, None
    settings = recipe.compress.model_dump()
    found = compress(outcome.model, inplace=True, data=job.batches, seed=recipe.seed, **settings)
    left = dict(found.model.named_parameters(remove_duplicate=False))
    masks = {n: m & (left[n] != 0) if n in left and left[n].shape == m.shape else m for n, m in outcome.masks.items()}
    return replace(outcome, model=found.model, masks=MaskSet(masks)), found


def _point(job: Job | UnitJob, sparsity: float, quality: Mapping[str, float]) -> Point:
    return Point(_title(job, with_share=False), sparsity, next(iter(quality.values())))


def _plan(job: Job, masks: MaskSet) -> Plan:
    layers = tuple(
        LayerPlan(n, tuple(m.shape), m.numel(), int(m.count_nonzero()), job.method.pattern.name)
        for n, m in masks.items()
        if n in job.layers
    )
    return Plan(layers, (), job.skipped)


def _timed_side_by_side(
    model: nn.Module, pruned: nn.Module, example: Batch | None, before: Measurement, after: Measurement
) -> tuple[Measurement, Measurement]:
    """Latency of both, taking turns run by run: what disturbs the machine disturbs both alike."""
    if example is None:
        return before, after
    found = compare_latency({"before": model, "after": pruned}, example)
    return replace(before, latency=found["before"].latency), replace(after, latency=found["after"].latency)


def _report(
    job: Job | UnitJob,
    outcome: _Outcome,
    original: Mapping[str, torch.Tensor],
    before: Measurement,
    after: Measurement,
    seconds: float,
) -> Report:
    masks, plan = outcome.masks, outcome.plan
    left = {} if plan.structural else dict(outcome.model.named_parameters())
    layers = tuple(
        layer_report(
            p.name, original[p.name], masks[p.name], p.pattern, outcome.errors.get(p.name), weight_after=left.get(p.name)
        )
        for p in plan.layers
    )
    notes, points = list(outcome.notes), list(outcome.points)
    if collapsed := [layer.name for layer in layers if layer.kept == 0 and not plan.dropped]:
        notes.append(f"these layers lost every weight and pass nothing on: {', '.join(collapsed)}")
        log.warning("%s", notes[-1])
    for note in collapse_notes(plan.layers, _groups(job, outcome.model)):
        notes.append(note)
        log.warning("%s", note)
    metric = next(iter(after.quality), None)
    if metric is not None:
        points.append(_point(job, plan.sparsity, after.quality))
    return Report(
        title=_title(job),
        before=before,
        after=after,
        metric=metric,
        layers=layers,
        skipped=plan.skipped,
        notes=tuple(notes),
        points=tuple(points),
        recipe=job.recipe.to_toml(),
        environment=environment(seed=job.recipe.seed),
        seconds=seconds,
    )


def _groups(job: Job | UnitJob, model: nn.Module) -> Mapping[str, Sequence[str]] | None:
    """Layers by modality, of a model that reads more than one: the recipe's groups, or those that are found."""
    if isinstance(job, Job):
        if job.groups is not None:
            return job.groups
        if job.example is not None and is_multimodal(job.example):
            return modality_groups(model, job.layers, job.example, seed=job.recipe.seed)
    return None


def _achieved(budget: Budget | None, after: Measurement, *, masked: bool) -> Budget | None:
    """The budget with what the pruned model was found to cost; of milliseconds that was found while it was chosen."""
    if budget is None or budget.unit == "ms":
        return budget
    params = after.nonzeros if masked else after.parameters
    multiply_adds = after.macs_nonzero if masked else after.macs
    return replace(budget, achieved={"params": params, "MACs": multiply_adds, "bytes": after.bytes_memory}[budget.unit])


def _budget_note(budget: Budget | None) -> tuple[str, ...]:
    """What was promised and what was kept, in a sentence."""
    if budget is None:
        return ()
    number = "{:.3f}" if budget.unit == "ms" else "{:,.0f}"
    figures = {k: number.format(v) for k, v in asdict(budget).items() if isinstance(v, (int, float))}
    spread = " (quartiles {low} to {high})".format(**figures) if budget.low is not None else ""
    found = "achieved {achieved}".format(**figures) if budget.achieved is not None else "not measured"
    text = "budget {asked}: at most {limit} of {dense} {unit}; promised {promised}, {found}{spread}"
    return (text.format(**{**figures, "asked": budget.asked, "unit": budget.unit, "found": found, "spread": spread}),)


def _title(job: Job | UnitJob, with_share: bool = True) -> str:
    """``magnitude 90% element``, ``magnitude 50% MACs channel``, or ``magnitude 2:4`` where the pattern says how much."""
    share = "" if job.sparsity is None else f" {100 * job.sparsity:.4g}%"
    share = f" {job.recipe.budget}" if job.recipe.budget is not None else share
    share = share if with_share and ":" not in job.pattern_name else ""
    return f"{name_of(job.recipe.criterion)}{share} {job.pattern_name}"


def _save(
    result: Result, recipe: Recipe, out: str | Path, overwrite: bool, source: str | None, compressed: Compressed | None
) -> None:
    save(
        result.model,
        out,
        masks=None if result.plan.structural else result.masks,  # a cut model's masks have other shapes; its plan says as much
        plan=result.plan,
        report=result.report,
        recipe=recipe.to_toml(),
        source=source,
        overwrite=overwrite,
        extra_files={"report.html": render(result.report)},
        format="auto" if compressed is None else "packed",
        coded=None if compressed is None else compressed.coded,
    )
