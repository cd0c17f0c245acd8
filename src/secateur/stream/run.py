"""`prune_checkpoint`: a Hugging Face directory in, a pruned one out, with one block of weights in memory at a time."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur.data.batches import Batch, Batches
from secateur.data.load import load_data
from secateur.errors import ModelError, RecipeError
from secateur.export.atomic import check_replaceable, replacing, write_synced
from secateur.layers import Layer, check_finite, find_layers
from secateur.measure.cache import fingerprint
from secateur.models.huggingface import skeleton
from secateur.patterns import Units, make_pattern
from secateur.progress import advance
from secateur.recipe import Recipe
from secateur.registry import name_of
from secateur.report.build import environment
from secateur.resume import beside
from secateur.selection import Method, Scores, resolve, solve_layer, target_sparsity
from secateur.stats.blocks import find_blocks, inputs_in_turn, within
from secateur.stats.collect import layer_seed
from secateur.stats.gram import with_norms
from secateur.stream.checkpoint import Checkpoint
from secateur.stream.hollow import Hollow, without_memory
from secateur.stream.store import Store
from secateur.types import LayerReport, LayerStats, Measurement, Need, Report

_GIVEN = {Need.WEIGHT, Need.INPUT_NORM, Need.GRAM}
_OURS = {"recipe.toml", "report.json"}


def prune_checkpoint(
    directory: str | os.PathLike[str],
    recipe: Recipe | Mapping[str, Any] | str | Path | None = None,
    *,
    out: str | Path,
    data: Iterable[Batch] | str | None = None,
    overwrite: bool = False,
    **changes: Any,
) -> Report:
    """Prune a Hugging Face checkpoint that may be larger than memory; `out` gets the same files with pruned weights.

    Weights come from the safetensors shards a block at a time and go back shard by shard. In memory are one block, its Gram
    matrices and the hidden states of `data`, which spill to a file. A run that is stopped, at whatever moment, goes on where
    it was when it is called again, and ends in the same bytes. The result is a Hugging Face directory too, with recipe.toml
    and report.json beside it: ``from_pretrained(out)``, ``sc.load_model("hf:out")``.

    Args:
        directory: config.json and ``*.safetensors``.
        recipe: criteria that need nothing, input norms or Gram matrices; any pattern of single weights; any solver; the
            allocation is uniform, since others compare all layers. Layers outside the repeated blocks are left alone.
        data: calibration batches, or a source such as ``"text:FILE?seqlen=256"``; needed where the criterion or solver is.
        out: directory to write, ``out/../.NAME.progress`` holds the state until it is finished.
        overwrite: replace what an earlier run wrote at `out`.
        changes: any key of the recipe, laid over it.

    Raises ModelError, RecipeError, DataError, LayerError, NonFiniteError, and ArtifactError for a full disk.

    Example::

        sc.prune_checkpoint("big-model", out="big-model-2of4", criterion="wanda", pattern="2:4", data="text:wiki.txt")
    """
    started = time.monotonic()
    wanted = Recipe.make(recipe, **changes)
    method, sparsity = _method(wanted)
    target = Path(out).absolute()
    check_replaceable(target, overwrite=overwrite, foreign=_foreign)
    checkpoint = Checkpoint(directory)
    with without_memory():
        loaded = skeleton(Path(directory))
    batches = _batches(data, loaded, method)
    key = fingerprint(wanted.to_toml(), checkpoint.identity())
    store = Store(beside(target), key, checkpoint)
    hollow = Hollow(loaded.model, checkpoint, store.read)
    work = _Work(wanted, method, sparsity, hollow, store, batches, target.parent)
    work.run()
    report = _report(work, checkpoint, time.monotonic() - started)
    _publish(checkpoint, store, target, wanted, report, overwrite)
    store.clear()
    return report


@dataclass
class _Work:
    """One run: what is to be done, and with what."""

    recipe: Recipe
    method: Method
    sparsity: float
    hollow: Hollow
    store: Store
    batches: Batches | None
    spill_to: Path

    def __post_init__(self) -> None:
        model = self.hollow.model
        found, self.skipped = find_layers(model, layers=self.recipe.layers, ignore=self.recipe.ignore)
        self.blocks = [block for blocks in find_blocks(model, found) for block in blocks]
        self.layers: dict[str, Layer] = {}
        for name, layer in found.items():
            reason = self.method.pattern.refuses(layer.shape)
            if not any(name in within(block, found) for block in self.blocks):
                reason = "outside the repeated blocks, which are what is streamed"
            if reason is None:
                self.layers[name] = layer
            else:
                self.skipped[name] = reason
        if not self.layers:
            raise ModelError("the model has no repeated blocks with weights to prune: load it whole and use sc.prune")

    def run(self) -> None:
        """Solve what is not solved yet, and write every shard."""
        names = self.hollow.names
        done = {n for n in self.layers if names[n] in self.store.solved}
        prunable = [names[n] for n in self.layers]
        self.store.write_shards(prunable)
        if len(done) < len(self.layers):
            for part in self._parts(done):
                self._solve(part)
                self.store.write_shards(prunable)
        self.hollow.close()

    def _parts(self, done: set[str]) -> Iterator[Mapping[str, Tensor | None]]:
        """Layers with their Gram matrices where the method needs data, each part with its weights held."""
        model, holding = self.hollow.model, self.hollow.holding
        if self.batches is not None:
            grams = inputs_in_turn(
                model, self.layers, self.batches, seed=self.recipe.seed, done=done, holding=holding, spill_to=self.spill_to
            )
            yield from grams
            return
        for i, block in enumerate(self.blocks):
            advance("blocks", i, len(self.blocks))
            left = [n for n in within(block, self.layers) if n not in done]
            if left:
                with holding(model.get_submodule(block)):
                    yield dict.fromkeys(left)
        advance("blocks", len(self.blocks), len(self.blocks))

    @torch.no_grad()
    def _solve(self, part: Mapping[str, Tensor | None]) -> None:
        tensors: dict[str, Tensor] = {}
        facts: dict[str, dict[str, Any]] = {}
        notes: list[str] = []
        check_finite(self.layers[name] for name in part)
        for name, gram in part.items():
            layer, stored = self.layers[name], self.hollow.names[name]
            before = int(layer.parameter.count_nonzero())
            stats = _stats(layer, gram, self.recipe.seed)
            units = Scores({name: layer}, {name: stats}, self.method)[name]
            keep = self.method.allocation({name: units}, self.sparsity)[name]
            mask, error, said = solve_layer(layer, stats, units, keep, self.method)
            tensors[stored] = layer.parameter.detach()
            facts[stored] = {
                "name": name,
                "kept": int(mask.count_nonzero()),
                "gone": before - int(layer.parameter.count_nonzero()),
                "error": error,
            }
            notes += said
        self.store.add(tensors, facts, notes)


def _stats(layer: Layer, gram: Tensor | None, seed: int) -> LayerStats:
    """What is known of a layer."""
    weight = layer.canonical(layer.parameter.detach()).float()
    stats = LayerStats(layer.name, weight, gram=gram, groups=layer.groups, seed=layer_seed(seed, layer.name))
    return stats if gram is None else with_norms(stats)


def _method(recipe: Recipe) -> tuple[Method, float]:
    """The method and the sparsity; RecipeError for what a stream cannot do."""
    if isinstance(make_pattern(recipe.pattern), Units):
        raise RecipeError(f"pattern {recipe.pattern!r} cuts units, which needs the whole model: a stream masks weights")
    if recipe.steps > 1 or recipe.finetune is not None or recipe.reestimate_norms:
        raise RecipeError("a streamed checkpoint is pruned once, without training: leave out steps, finetune, reestimate_norms")
    if recipe.groups is not None:
        raise RecipeError("a stream prunes every layer by itself, so groups have nothing to decide: leave them out")
    if recipe.allocation not in (None, "uniform"):
        raise RecipeError(
            f"allocation {recipe.allocation!r} compares all layers before the first is pruned: a stream has 'uniform'"
        )
    method = resolve(
        criterion=recipe.criterion,
        pattern=recipe.pattern,
        allocation="uniform",
        reduction=recipe.reduction,
        solver=recipe.solver,
    )
    if method.pattern.whole_outputs:
        raise RecipeError(f"pattern {method.pattern.name!r} removes biases too, which a stream does not: take element or n:m")
    if lacking := method.needs - _GIVEN:
        what = ", ".join(sorted(n.value for n in lacking))
        raise RecipeError(
            f"criterion {name_of(recipe.criterion)!r} needs {what}: a stream has input norms and Gram matrices only"
        )
    return method, target_sparsity(recipe.sparsity, method.pattern)


def _batches(data: Iterable[Batch] | str | None, loaded: Any, method: Method) -> Batches | None:
    if all(need is Need.WEIGHT for need in method.needs | method.in_turn):
        return None
    if data is None:
        raise RecipeError(f"criterion {method.criterion_name!r} or the solver needs calibration batches: pass data=")
    return Batches(load_data(data, batch_size=4, loaded=loaded) if isinstance(data, str) else data)


def _foreign(folder: Path) -> str | None:
    missing = _OURS - set(os.listdir(folder))
    return f"it has no {min(missing)}, so no streamed run wrote it" if missing else None


def _report(work: _Work, checkpoint: Checkpoint, seconds: float) -> Report:
    solved, names, pattern = work.store.solved, work.hollow.names, work.method.pattern.name
    layers = tuple(
        LayerReport(n, tuple(la.shape), la.parameter.numel(), solved[names[n]]["kept"], pattern, solved[names[n]]["error"])
        for n, la in work.layers.items()
    )
    total = sum(torch.Size(checkpoint.entry(n).shape).numel() for n in checkpoint)
    after = sum(work.store.nonzeros.values())
    gone = sum(solved[names[n]]["gone"] for n in work.layers)
    bytes_ = checkpoint.bytes
    return Report(
        title=f"{name_of(work.recipe.criterion)} {pattern}, streamed",
        before=Measurement(total, after + gone, bytes_, bytes_),
        after=Measurement(total, after, bytes_, bytes_),
        layers=layers,
        skipped=work.skipped,
        notes=tuple(work.store.notes),
        recipe=work.recipe.to_toml(),
        environment=environment(seed=work.recipe.seed),
        seconds=seconds,
    )


def _publish(checkpoint: Checkpoint, store: Store, target: Path, recipe: Recipe, report: Report, overwrite: bool) -> None:
    """The finished shards and the other files of the checkpoint, put in place of `target` in one step."""
    others = [
        p for p in sorted(checkpoint.folder.iterdir()) if p.is_file() and p.suffix in (".json", ".txt", ".model", ".jinja")
    ]
    texts = {"recipe.toml": recipe.to_toml().encode(), "report.json": json.dumps(report.to_json(), indent=1).encode()}
    sizes = [p.stat().st_size for p in others] + [len(text) for text in texts.values()]
    with replacing(target, overwrite=overwrite, sizes=sizes, foreign=_foreign) as folder:
        for path in others:
            if path.name not in texts:
                shutil.copyfile(path, folder / path.name)
        for name, text in texts.items():
            write_synced(folder / name, text)
        for shard in checkpoint.shards:
            os.link(store.shards / shard, folder / shard)  # they stay where they are until the run is finished
    checkpoint.close()
