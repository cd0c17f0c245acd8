"""One calibration pass: whatever the criteria need, for all layers at once."""

from __future__ import annotations

import hashlib
import itertools
import logging
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from secateur.data.batches import Batch, Batches, Loss, default_loss, forward, size_of
from secateur.errors import DataError, RecipeError
from secateur.layers import Layer, check_finite
from secateur.progress import track
from secateur.stats import nonfinite
from secateur.stats.gradients import SquaredGradients, Sums, gradients, hessian_gradient, scalar
from secateur.stats.gram import Grams
from secateur.stats.guard import check_reached, ordinary, untouched
from secateur.stats.inputs import InputNorms
from secateur.stats.notes import say, unmasked_notes, zero_notes
from secateur.stats.reads import Reads, check_modalities, inputs_by_modality, reads_of
from secateur.stats.samples import SampleGradients
from secateur.stats.synflow import synflow_gradient
from secateur.types import LayerStats, Need

log = logging.getLogger("secateur")
_DIFFERENTIATED = {Need.GRAD, Need.GRAD_ONE, Need.GRAD_SQ, Need.GRAD_SAMPLES, Need.HESSIAN_GRAD}
_SUPPORTED = _DIFFERENTIATED | {Need.WEIGHT, Need.SYNFLOW_GRAD, Need.INPUT_NORM, Need.GRAM}


@dataclass(frozen=True)
class Calibration:
    """What one calibration pass found."""

    layers: dict[str, LayerStats]
    notes: tuple[str, ...]  #: what the report has to say: slow ways taken, padding that could not be told apart
    samples: int  #: how many samples were seen; 0 where none were needed


def collect(
    model: nn.Module,
    layers: Mapping[str, Layer],
    needs: Collection[Need],
    *,
    batches: Batches | None = None,
    loss: Loss | None = None,
    seed: int = 0,
    example: Batch | None = None,
    reads: Reads | None = None,
) -> Calibration:
    """The statistics `needs` of `layers`, from one loop over `batches`; HESSIAN_GRAD takes a second.

    The model runs in eval mode: BatchNorm uses its running statistics, dropout is off. Afterwards its modes, flags, buffers,
    ``.grad`` fields, hooks and the random state are as before, even when the pass is interrupted. `loss` is the mean over a
    batch's samples, by default the model's own or cross-entropy; gradients are means over samples, so that for such a loss
    nothing depends on how samples are batched. A loss that is a mean over tokens weights tokens by batch. Padding
    (``attention_mask``) is left out of input norms and Gram matrices, wherever tokens stand among image positions. `example`
    serves SYNFLOW_GRAD where there are no batches. `reads` is `reads_of` the model and batches, where that is known.

    ``weight`` of the result is a view of the parameter (a float32 copy of other types), so it follows later changes.

    Raises RecipeError for a statistic that is not collected here; DataError for missing data; NonFiniteError, naming
    the weight or module, for NaN or infinite weights, activations or gradients; LayerError, naming the layers, for those that
    the data or loss do not reach or whose inputs no hook can see.

        layers, _ = find_layers(model)
        found = collect(model, layers, {Need.GRAD}, batches=Batches([(x, y)]))
        found.layers["fc.weight"].grad          # [out, in]
    """
    wanted = frozenset(needs)
    _check_request(wanted, batches, example)
    check_finite(layers.values())
    parameters = [layer.parameter for layer in layers.values()] if wanted & _DIFFERENTIATED else []
    notes: list[str] = []
    found: dict[Need, dict[str, Tensor]] = {}
    samples, row_samples = 0, None
    with untouched(model, parameters, seed):
        if layers and any(need.data for need in wanted):
            assert batches is not None
            sizes = [size_of(batch) for batch in batches] if Need.GRAD_SAMPLES in wanted else []
            if reads is None and wanted & {Need.INPUT_NORM, Need.GRAM}:
                reads = reads_of(model, batches, seed)
            one_pass = _Pass(model, layers, wanted, loss or default_loss, sizes, reads)
            samples = one_pass.run(batches)
            found |= one_pass.results(batches)
            say(one_pass.notes, notes)
            row_samples = one_pass.row_samples
        if layers and Need.SYNFLOW_GRAD in wanted:
            sample = ordinary(next(iter(batches)) if example is None and batches is not None else example)
            found[Need.SYNFLOW_GRAD], note = synflow_gradient(model, sample, list(layers.values()))
            say([note] if note else [], notes)
    say((note for need, tensors in found.items() for note in zero_notes(need, tensors)), notes)
    stats = {
        name: LayerStats(
            name=name,
            weight=layer.canonical(layer.parameter.detach()).float(),
            samples=samples,
            seed=layer_seed(seed, name),
            row_samples=row_samples,
            groups=layer.groups,
            **{need.value: tensors[name] for need, tensors in found.items()},  # type: ignore[arg-type]
        )
        for name, layer in layers.items()
    }
    return Calibration(stats, tuple(notes), samples)


class _Pass:
    """The state of one pass over the batches."""

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, Layer],
        wanted: frozenset[Need],
        loss: Loss,
        sizes: list[int],
        reads: Reads | None,
    ):
        self.model, self.loss, self.wanted = model, loss, wanted
        self.layers = list(layers.values())
        self.differentiate = bool(wanted & _DIFFERENTIATED)
        self.norms = InputNorms(model, layers, reads) if Need.INPUT_NORM in wanted else None
        self.grams = Grams(model, layers, reads) if Need.GRAM in wanted else None
        self.watchers = [w for w in (self.norms, self.grams) if w is not None]
        self.mean = Sums(self.layers) if wanted & {Need.GRAD, Need.HESSIAN_GRAD} else None
        self.first = Sums(self.layers) if Need.GRAD_ONE in wanted else None
        self.squared = SquaredGradients(model, loss, self.layers) if Need.GRAD_SQ in wanted else None
        self.apart = SampleGradients(model, loss, self.layers, sizes) if Need.GRAD_SAMPLES in wanted else None
        self.row_samples: Tensor | None = None
        self.reached = [False] * len(self.layers)
        self.samples = 0

    @property
    def notes(self) -> list[str]:
        """What went another way than the best."""
        notes = [self.squared.note] if self.squared is not None and self.squared.note else []
        return notes + unmasked_notes({name for watcher in self.watchers for name in watcher.unmasked})

    def run(self, batches: Batches) -> int:
        """Go through the batches once, or through the first where no more is needed; the number of samples seen."""
        first_only = not self.wanted & (_DIFFERENTIATED - {Need.GRAD_ONE} | {Need.INPUT_NORM, Need.GRAM})
        modalities: set[str] = set()
        for index, batch in enumerate(_tracked(batches, "calibrate", limit=1 if first_only else None)):
            modalities = modalities or set(inputs_by_modality(batch))
            check_modalities(batch, index, modalities)
            self._add(index, ordinary(batch))
        return self.samples

    def _add(self, index: int, batch: Batch) -> None:
        size = size_of(batch)
        self.samples += size
        grads = self._forward(index, batch)
        if self.mean is not None:
            self.mean.add(grads, weight=size)
        if self.first is not None and index == 0:
            self.first.add(grads)
        if self.squared is not None:
            self.squared.add(batch)
        if self.apart is not None:
            self.apart.add(batch)

    def _forward(self, index: int, batch: Batch) -> list[Tensor | None]:
        """One forward pass with the hooks on, and one backward pass with them off where anything asks for gradients."""
        wants_gradient = self.mean is not None or (self.first is not None and index == 0)
        wants_gradient |= self.differentiate and not all(self.reached)
        if not wants_gradient and not self.watchers:
            return []
        with ExitStack() as stack:
            stack.enter_context(torch.set_grad_enabled(wants_gradient))
            for watcher in self.watchers:
                stack.enter_context(watcher.recording(batch))
            value = scalar(self.loss(self.model, batch)) if wants_gradient else forward(self.model, batch)
        if (wants_gradient and not torch.isfinite(value)) or not all(w.finite() for w in self.watchers):
            nonfinite.explain(self.model, lambda: (self.loss if wants_gradient else forward)(self.model, batch), index)
        if not wants_gradient:
            return []
        grads = gradients(value, self.layers)
        self.reached = [seen or g is not None for seen, g in zip(self.reached, grads, strict=True)]
        return grads

    def results(self, batches: Batches) -> dict[Need, dict[str, Tensor]]:
        """The statistics in canonical orientation, checked: every layer reached, every value finite."""
        if self.differentiate:
            check_reached(
                [la.name for la, seen in zip(self.layers, self.reached, strict=True) if not seen], "the loss does not reach"
            )
        found: dict[Need, dict[str, Tensor]] = {}
        for watcher in self.watchers:
            check_reached([la.name for la in self.layers if la.name not in watcher.seen], "no call was seen of the modules of")
        if self.grams is not None:
            found[Need.GRAM] = self.grams.take()
        if self.norms is not None:
            found[Need.INPUT_NORM] = self.norms.take()
        if self.first is not None:
            found[Need.GRAD_ONE] = self.first.mean(1)
        if self.squared is not None:
            found[Need.GRAD_SQ] = self.squared.sums.mean(self.samples)
        if self.apart is not None:
            found[Need.GRAD_SAMPLES], self.row_samples = self.apart.take()
        if self.mean is not None:
            gradient = self.mean.mean(self.samples)
            if Need.HESSIAN_GRAD in self.wanted:
                nonfinite.check_gradients(gradient)
                found[Need.HESSIAN_GRAD] = self._hessian_gradient(batches)
            if Need.GRAD in self.wanted:
                found[Need.GRAD] = gradient
        for tensors in found.values():
            nonfinite.check_gradients(tensors)
        return found

    def _hessian_gradient(self, batches: Batches) -> dict[str, Tensor]:
        assert self.mean is not None
        sums, samples = Sums(self.layers), 0
        for batch in _tracked(batches, "calibrate: second order"):
            batch, size = ordinary(batch), size_of(batch)
            sums.add(hessian_gradient(self.model, self.loss, batch, self.layers, self.mean.tensors), weight=size)
            samples += size
        return sums.mean(samples)


def _check_request(wanted: frozenset[Need], batches: Batches | None, example: Batch | None) -> None:
    for need in sorted(wanted - _SUPPORTED, key=lambda n: n.value):
        known = ", ".join(sorted(n.value for n in _SUPPORTED))
        raise RecipeError(f"the statistic {need.value!r} is not collected by the calibration pass. Collected are: {known}.")
    for need in sorted(wanted, key=lambda n: n.value):
        if need.data and batches is None:
            raise DataError(f"the statistic {need.value!r} needs calibration data: give data=, an iterable of batches")
    if Need.SYNFLOW_GRAD in wanted and batches is None and example is None:
        raise DataError("the statistic 'synflow_grad' needs the shape of an input: give example= or data=")


def _tracked(batches: Batches, what: str, limit: int | None = None) -> Iterator[Any]:
    try:
        total: int | None = len(batches)
    except TypeError:  # a source without a length
        total = None
    return track(itertools.islice(batches, limit), what, total if limit is None else limit)


def layer_seed(seed: int, name: str) -> int:
    """A seed for one layer: depends on `seed` and the layer's name, not on which other layers there are."""
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=7).digest()
    return int.from_bytes(digest, "big")
