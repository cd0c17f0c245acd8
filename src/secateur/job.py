"""What a recipe means for one model and its data: every name looked up, every layer found, nothing computed yet."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import nn

from secateur.budgets.amount import Amount, parse_budget
from secateur.data.batches import Batch, Batches, Loss
from secateur.errors import RecipeError
from secateur.layers import Layer
from secateur.recipe import Recipe
from secateur.registry import name_of
from secateur.schedules import make_schedule
from secateur.selection import Method, Scores, prunable, resolve, target_sparsity
from secateur.solvers import error_curve
from secateur.stats import Calibration, collect
from secateur.stats.blocks import inputs_in_turn
from secateur.stats.gram import with_norms
from secateur.stats.reads import Reads, find_reads, is_multimodal
from secateur.stats.samples import layers_in_turn
from secateur.types import LayerStats, Need, Pattern, Schedule
from secateur.vision_language.groups import find_groups, within


@dataclass(frozen=True)
class Job:
    """A recipe resolved for one model. `train` is what to fine-tune on, `example` what to run the model on."""

    recipe: Recipe
    method: Method
    sparsity: float
    schedule: Schedule
    layers: dict[str, Layer]
    skipped: dict[str, str]
    batches: Batches | None
    train: Batches | None
    loss: Loss | None
    example: Batch | None
    train_loss: Loss | None = None  #: what fine-tuning minimises
    groups: Mapping[str, Sequence[str]] | None = None  #: layers that are compared among themselves only
    reads: Reads | None = None  #: what each weight reads of the first batch, where finding the groups told

    @property
    def pattern_name(self) -> str:
        """As users write it."""
        return self.method.pattern.name

    def statistics(self, model: nn.Module) -> Calibration:
        """What the method's criterion needs to know of `model`, of which `layers` must be."""
        return self._collected(model, self.method.needs)

    def before(self, model: nn.Module) -> Calibration:
        """Of that what is needed before the first layer is pruned."""
        return self._collected(model, self.method.before)

    def _collected(self, model: nn.Module, needs: Collection[Need]) -> Calibration:
        found = collect(
            model,
            self.layers,
            needs,
            batches=self.batches,
            loss=self.loss,
            seed=self.recipe.seed,
            example=self.example,
            reads=self.reads,
        )
        return replace(found, layers=self._with_curves(model, found.layers)) if self.method.curves else found

    def _with_curves(self, model: nn.Module, stats: dict[str, LayerStats]) -> dict[str, LayerStats]:
        """`stats` with the error curve of every layer, from Gram matrices of the model as it is."""
        assert self.batches is not None
        scores = Scores(self.layers, stats, self.method)
        curves: dict[str, LayerStats] = {}
        for part in inputs_in_turn(model, self.layers, self.batches, seed=self.recipe.seed):
            for name, gram in part.items():
                known = replace(stats[name], gram=gram)
                curve = error_curve(known.weight, scores[name].scores, self.method.pattern, known)
                curves[name] = replace(stats[name], curve=curve)
        return {name: curves[name] for name in stats}

    def known(
        self, model: nn.Module, stats: Mapping[str, LayerStats], done: Collection[str], notes: list[str]
    ) -> Iterator[dict[str, LayerStats]] | None:
        """`stats` with what the method wants in turn, a few layers at a time, without the layers `done`.

        What layers read comes by `inputs_in_turn`, sample gradients by `layers_in_turn`. None where nothing is wanted. What
        the report has to say is added to `notes`.
        """
        if self.batches is None or not self.method.in_turn:
            return None
        if Need.GRAD_SAMPLES in self.method.in_turn:
            return self._gradients(model, self.batches, stats, done)
        return self._inputs(model, self.batches, stats, done, notes)

    def _inputs(
        self, model: nn.Module, batches: Batches, stats: Mapping[str, LayerStats], done: Collection[str], notes: list[str]
    ) -> Iterator[dict[str, LayerStats]]:
        grams, norms = (need in self.method.in_turn for need in (Need.GRAM, Need.INPUT_NORM))
        need = Need.GRAM if grams else Need.INPUT_NORM
        for part in inputs_in_turn(model, self.layers, batches, need=need, seed=self.recipe.seed, done=done, notes=notes):
            known = {n: replace(stats[n], gram=x) if grams else replace(stats[n], input_norm=x) for n, x in part.items()}
            yield {n: with_norms(one) for n, one in known.items()} if grams and norms else known

    def _gradients(
        self, model: nn.Module, batches: Batches, stats: Mapping[str, LayerStats], done: Collection[str]
    ) -> Iterator[dict[str, LayerStats]]:
        for part in layers_in_turn(self.layers, batches, done):
            found = collect(model, part, {Need.GRAD_SAMPLES}, batches=batches, loss=self.loss, seed=self.recipe.seed).layers
            yield {
                name: replace(stats[name], grad_samples=one.grad_samples, row_samples=one.row_samples)
                for name, one in found.items()
            }


def prepare(
    model: nn.Module,
    recipe: Recipe,
    *,
    data: Iterable[Batch] | None = None,
    train: Iterable[Batch] | None = None,
    loss: Loss | None = None,
    example: Batch | None = None,
) -> Job:
    """Resolve `recipe` for `model`. Whatever is wrong with it is said here, before any work is done.

    Raises RecipeError, UnknownName, LayerError, NonFiniteError or DataError.
    """
    if recipe.repair != "none":
        raise RecipeError(
            f"repair {recipe.repair!r} is for patterns that cut units (channel, head, ...); pattern {recipe.pattern!r} masks "
            "single weights, which a solver repairs: solver='least-squares'."
        )
    for key, value in (("slimming", recipe.slimming), ("force", recipe.force)):
        if value:
            raise RecipeError(
                f"{key} is for patterns that cut units (channel, head, ...); pattern {recipe.pattern!r} masks weights"
            )
    method = resolve(
        criterion=recipe.criterion,
        pattern=recipe.pattern,
        allocation=recipe.allocation,
        reduction=recipe.reduction,
        solver=recipe.solver,
    )
    if recipe.budget is None:
        sparsity = target_sparsity(recipe.sparsity, method.pattern)
    else:
        check_budget(parse_budget(recipe.budget), method.pattern)
        sparsity = 0.0  # until the scores are there, by `budgets.masked.within_budget`
    layers, skipped = prunable(model, method.pattern, layers=recipe.layers, ignore=recipe.ignore)
    batches = None if data is None else Batches(data)
    training = batches if train is None else Batches(train)
    check_data(
        recipe,
        method.criterion_name,
        method.needs | method.in_turn | ({Need.GRAM} if method.curves else set()),
        batches,
        training,
    )
    reads = None
    if example is None and batches is not None:
        example = next(iter(batches))
        reads = find_reads(model, example, seed=recipe.seed) if recipe.groups is not None and is_multimodal(example) else None
    job = Job(recipe, method, sparsity, _schedule(recipe), layers, skipped, batches, training, loss, example, reads=reads)
    return job if recipe.groups is None else _grouped(job, model)


def _grouped(job: Job, model: nn.Module) -> Job:
    """The job whose allocation compares the layers of each of the recipe's groups among themselves."""
    assert job.recipe.groups is not None
    if job.method.pattern.sparsity is not None:
        raise RecipeError(
            f"pattern {job.method.pattern.name} removes the same from every layer, so groups have nothing to "
            "decide: leave them out"
        )
    groups = find_groups(model, job.layers, job.recipe.groups, job.example, seed=job.recipe.seed, reads=job.reads)
    return replace(job, groups=groups, method=replace(job.method, allocation=within(groups, job.method.allocation)))


def check_budget(amount: Amount, pattern: Pattern) -> None:
    """Raise RecipeError where masks of this pattern cannot keep to such a budget."""
    if pattern.sparsity is not None:
        raise RecipeError(
            f"pattern {pattern.name} removes exactly {pattern.sparsity:g} of the weights, so the budget {amount.text!r} has "
            "nothing to decide. Leave it out."
        )
    if amount.unit not in ("params", "MACs"):
        raise RecipeError(
            f"pattern {pattern.name!r} sets weights to zero, which take as much memory and time as others: the budget "
            f"{amount.text!r} is for patterns that cut units (channel, head, ...). Here params and MACs count what is not zero."
        )


def check_data(recipe: Recipe, criterion: str, needs: Collection[Need], batches: Batches | None, train: Batches | None) -> None:
    """Raise RecipeError where the recipe needs batches that were not given."""
    if Need.MOVEMENT in needs:
        raise RecipeError(f"criterion {criterion!r} follows the weights through a training: use sc.gradual in a training loop")
    if name_of(recipe.regrow) != "none":
        raise RecipeError(f"regrow {recipe.regrow!r} is for pruning during a training: use sc.gradual in a training loop")
    for key, training in (("finetune", recipe.finetune), ("slimming", recipe.slimming)):
        if training is not None and train is None:
            raise RecipeError(f"{key} needs batches to train on: pass train= (or data=)")
    if batches is not None:
        return
    if needed := sorted(n.value for n in needs if n.data):
        raise RecipeError(f"criterion {criterion!r} needs {', '.join(needed)}: pass data=, an iterable of batches")
    if recipe.repair != "none":
        raise RecipeError(f"repair {recipe.repair!r} needs calibration batches: pass data=")
    if recipe.reestimate_norms:
        raise RecipeError("reestimate_norms needs calibration batches: pass data=")


def _schedule(recipe: Recipe) -> Schedule:
    if name_of(recipe.schedule) == "one-shot" and recipe.steps > 1:
        raise RecipeError(
            f"schedule 'one-shot' has one step, steps={recipe.steps}. Use schedule='iterative', 'cubic' or 'exponential'."
        )
    return make_schedule(recipe.schedule)
