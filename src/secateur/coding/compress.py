"""`compress`: share or round the weights of a model and write it entropy-coded. Deep Compression's last two stages."""

from __future__ import annotations

import copy
import logging
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from secateur.coding import budget as knapsack
from secateur.coding import packed
from secateur.coding.importance import coarseness, output_importance
from secateur.coding.integers import effective_bits, quantised
from secateur.coding.kmeans import INITS, Init
from secateur.coding.norms import fold_norm
from secateur.coding.norms import fold_norms as fold
from secateur.coding.share import rounded_book, rounded_vector, shared
from secateur.coding.tensor import Bits, Coded, encode
from secateur.data.batches import Batch, Batches, Loss
from secateur.errors import RecipeError, did_you_mean
from secateur.export.artifact import check_target, save
from secateur.export.encode import plain
from secateur.export.state import state_of
from secateur.layers import Layer, find_layers, matches
from secateur.progress import track
from secateur.quadratic import output_error
from secateur.repair import reestimate_norms as reestimate
from secateur.stats.blocks import inputs_in_turn
from secateur.train.finetune import finetune as train_on
from secateur.types import Report

log = logging.getLogger("secateur")
Scheme = Literal["kmeans", "integer", "entropy"]
SCHEMES: tuple[Scheme, ...] = ("kmeans", "integer", "entropy")
#: What a budget chooses from, for each scheme.
CHOICES: Mapping[Scheme, tuple[float, ...]] = {
    "kmeans": (2, 3, 4, 5, 6, 7, 8),
    "integer": (3, 3.5, 4, 4.5, 5, 5.5, 6, 7, 8),
    "entropy": (2, 2.5, 3, 3.5, 4, 4.5, 5, 6, 7),
}
_HALVINGS = 16  # of the range in which the common factor of all steps is looked for: to a 500th of a bit
_TRIALS, _MARGIN = 4, 0.998  # to meet a budget with rounding errors made up for


@dataclass(frozen=True)
class LayerBits:
    """One compressed tensor: how many bits its values were given, and what they take."""

    name: str
    shape: tuple[int, ...]
    bits: float | None  #: None where its values were kept, or only rounded to float16
    error: float | None  #: relative output error on the data where that was given, else that of the weight; squared
    coded: Bits  #: where its bits went, and the entropies that bound them

    @property
    def bytes(self) -> int:
        """Bytes in the packed file, without its line of the index."""
        return -(-(self.coded.positions + self.coded.values) // 8)


@dataclass(frozen=True)
class Compressed:
    """What `compress` returns."""

    model: nn.Module
    layers: tuple[LayerBits, ...]
    bytes: int  #: of the packed file, index and all
    bytes_before: int  #: of all parameters and buffers of the model that was given, in their own dtypes
    path: Path | None  #: the artifact, where one was written
    coded: Mapping[str, Coded]  #: the tensors that are whole numbers times scales

    @property
    def ratio(self) -> float:
        """How many times smaller."""
        return self.bytes_before / self.bytes


@torch.no_grad()
def compress(
    model: nn.Module,
    out: str | Path | None = None,
    *,
    bits: float | Mapping[str, float] | None = None,
    budget: int | None = None,
    scheme: Scheme = "kmeans",
    init: Init = "linear",
    vector_bits: float | None = 16,
    ignore: Sequence[str] = (),
    data: Iterable[Batch] | None = None,
    fold_norms: bool = False,
    reestimate_norms: bool = False,
    train: Iterable[Batch] | None = None,
    finetune: Mapping[str, Any] | None = None,
    loss: Loss | None = None,
    seed: int = 0,
    inplace: bool = False,
    source: str | None = None,
    report: Report | None = None,
    recipe: str | None = None,
    extra_files: Mapping[str, str | bytes] | None = None,
    overwrite: bool = False,
) -> Compressed:
    """Give every weight a few bits, keep removed weights at zero, and write the model entropy-coded.

    Args:
        model: pruned or not; left untouched unless `inplace`.
        out: directory for the artifact; `sc.load` reads it back. None: only the size is found out.
        bits: of each weight, 5 by default: one number, or numbers by layer name or shell pattern, the first that matches.
        budget: instead, bytes for all weights together: bits are chosen layer by layer so that the sum of relative errors is
            least, by dynamic programming. For scheme "entropy" with `data`, in networks of linear and convolution layers,
            the steps of every single output are, so that the network's own output changes least.
        scheme: "kmeans": each layer has a codebook of 2^bits values (Deep Compression). "integer": whole numbers times a scale
            for each output, which exporters can keep; with `data`, rounding errors are made up for layer by layer (GPTQ).
            "entropy": the same without a largest number, where `bits` is what a weight takes after coding: the smallest.
        init: where k-means begins: "linear" (default), "density" or "random".
        vector_bits: 16 rounds biases, norms and statistics to float16 where that changes nothing by more than a thousandth;
            fewer share their values; None keeps them.
        ignore: parameters or modules whose weights keep every bit, or shell patterns.
        data: calibration batches. Errors are then those of outputs.
        fold_norms: put BatchNorms that follow a layer into its weights, which leaves a shift for each channel to be stored.
            Needs `data`.
        reestimate_norms: re-estimate BatchNorm statistics on `data` afterwards; folded ones are folded again, but for
            scheme "kmeans", whose codebooks have no scales to take them.
        train, finetune, loss: batches, settings and loss of `sc.finetune`, to train shared values by gradients summed over
            the weights that share them. For scheme "kmeans".
        seed: of random initialisation and of training.
        source, report, recipe, extra_files, overwrite: as in `sc.save`.

    Returns:
        Compressed, with `model`, `bytes`, `ratio` and a line for each tensor.

    Raises:
        RecipeError, DataError, LayerError, ArtifactError: what, where and what to do. Nothing is written then.

    Source: Han, Mao and Dally 2016, Deep Compression. Here values are rounded to bfloat16 in the codebook, codes are range
    ANS coded, and positions cell by cell where that is shorter.

    Example:
        >>> import torch, secateur as sc
        >>> sc.compress(torch.nn.Linear(64, 64), bits=4).ratio > 6
        True
    """
    _check(bits, budget, scheme, init, data, fold_norms or reestimate_norms, finetune, train)
    if out is not None:
        check_target(out, overwrite=overwrite)
    state = state_of(model)
    before = sum(t.numel() * t.dtype.itemsize for _, t in state.tensors.values())
    made = model if inplace else copy.deepcopy(model)
    batches = None if data is None else Batches(data)
    folded = fold(made, next(iter(batches))) if fold_norms and batches is not None else []
    work = _Work(made, scheme, init, seed, ignore, batches)
    work.run(_bits(work, bits, budget))
    shared_vectors = _round_vectors(made, work, vector_bits, init, seed)
    if finetune is not None and train is not None:
        names = [*work.bits, *shared_vectors]
        with torch.enable_grad():
            train_on(made, train, shared=names, loss=loss, **{"seed": seed, **finetune})
        _round_books(made, names)
    if reestimate_norms and batches is not None:
        reestimate(made, batches)
        work.fold_again(folded)
        _round_vectors(made, work, 16 if vector_bits else None, init, seed)
    layers, size = _measured(made, work)
    path = None
    if out is not None:
        path = save(
            made, out, format="packed", coded=work.coded, source=source, report=report, recipe=recipe, extra_files=extra_files,
            overwrite=overwrite,
        )  # fmt: skip
        size = (path / "model.packed").stat().st_size
    return Compressed(made, layers, size, before, path, work.coded)


class _Work:
    """The weights of a model while they are given bits."""

    def __init__(self, model: nn.Module, scheme: Scheme, init: Init, seed: int, ignore: Sequence[str], batches: Batches | None):
        self.model, self.batches = model, batches
        self._scheme, self._init, self._seed = scheme, init, seed
        tensors = state_of(model).tensors
        self.weights: dict[str, nn.Parameter] = {
            name: tensor  # type: ignore[misc]
            for name, (kind, tensor) in tensors.items()
            if kind == "parameter" and tensor.dim() >= 2 and tensor.is_floating_point() and tensor.numel()
            and not any(matches(pattern, name) for pattern in ignore)
        }  # fmt: skip
        found = find_layers(model)[0]
        self._layers = {name: layer for name, layer in found.items() if name in self.weights and _has_gram(layer)}
        self.bits: dict[str, float] = {}
        self.errors: dict[str, float] = {}
        self.coded: dict[str, Coded] = {}

    def run(self, bits: Mapping[str, float | Tensor]) -> None:
        """Give every weight its bits: those whose inputs are known first, in the order of the model, then the others."""
        for name, gram in self._in_turn("coding"):
            self._give(name, bits[name], gram)

    @torch.no_grad()
    def steps(self, budget: int) -> dict[str, float | Tensor] | None:
        """Steps of every output that cost the network's output least within the budget; None where that is not known."""
        layers = {name: layer for name, layer in self._layers.items() if not layer.swap}
        if self._scheme != "entropy" or self.batches is None or layers.keys() != self.weights.keys():
            return None
        importance = output_importance(self.model, layers, self.batches, seed=self._seed)
        if importance.keys() != layers.keys():
            return None
        base: dict[str, Tensor] = {}
        for name, gram in self._in_turn("weighing outputs"):
            assert gram is not None
            base[name] = coarseness(self.weights[name], gram, importance[name], name)
        target = float(budget)
        for _ in range(_TRIALS):
            factor, made_up = self._factor(base, target), 0
            for name, gram in self._in_turn("rounding on trial"):
                values, coded = self._coded(name, base[name] * factor, gram)
                made_up += len(encode(values, coded)[0])
            if made_up <= budget:
                break
            target *= _MARGIN * budget / made_up  # errors that are made up for spread the codes a little
        return {name: steps * factor for name, steps in base.items()}

    def _factor(self, base: Mapping[str, Tensor], budget: float) -> float:
        """The common factor of all steps at which the weights, each rounded by itself, take the budget."""
        low, high = -60.0, 60.0  # log2
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            low, high = (low, middle) if self._bytes(base, 2.0**middle) <= budget else (middle, high)
        if (least := self._bytes(base, 2.0**high)) > budget:
            raise RecipeError(f"{budget:.0f} bytes are too few: the coarsest steps need {least}")
        return 2.0**high

    def _bytes(self, base: Mapping[str, Tensor], factor: float) -> int:
        """What all weights take, rounded to these steps."""
        total = 0
        for name, steps in base.items():
            values, coded = self._coded(name, steps * factor, None)
            total += len(encode(values, coded)[0])
        return total

    def fold_again(self, pairs: Sequence[tuple[nn.Module, nn.Module]]) -> None:
        """Statistics estimated anew go where the old ones went: into scales, which leaves the codes as they are."""
        names = {id(weight): name for name, weight in self.weights.items()}
        for layer, norm in pairs:
            name = names.get(id(layer.weight))
            if name in self.coded and (factor := fold_norm(layer, norm)) is not None:
                scales = (self.coded[name].scales.double() * factor.cpu()).float().half().float()
                self.coded[name] = replace(self.coded[name], scales=scales)
                self.weights[name].data.copy_(self.coded[name].values())

    def options(self, choices: Sequence[float]) -> dict[str, list[tuple[int, float]]]:
        """For each weight, bytes and loss under each number of bits, by itself."""
        found: dict[str, list[tuple[int, float]]] = {name: [] for name in self.weights}
        for name, gram in self._in_turn("trying bits"):
            for bits in choices:
                values, coded = self._coded(name, bits, None)
                found[name].append((len(encode(values, coded)[0]), self._error(name, self.weights[name], values, gram)))
        return found

    def _in_turn(self, doing: str) -> Iterator[tuple[str, Tensor | None]]:
        """Every weight with the Gram matrix of its inputs, a few of them in memory at a time; then those without."""
        done: set[str] = set()
        if self.batches is not None:
            for part in inputs_in_turn(self.model, self._layers, self.batches, seed=self._seed):
                yield from part.items()
                done.update(part)
        for name in track([n for n in self.weights if n not in done], doing):
            yield name, None

    def _give(self, name: str, bits: float | Tensor, gram: Tensor | None) -> None:
        weight = self.weights[name]
        values, coded = self._coded(name, bits, gram)
        self.bits[name] = effective_bits(weight, bits) if isinstance(bits, Tensor) else bits
        self.errors[name] = self._error(name, weight, values, gram)
        if coded is not None:
            self.coded[name] = coded
        weight.data.copy_(values)

    def _coded(self, name: str, bits: float | Tensor, gram: Tensor | None) -> tuple[Tensor, Coded | None]:
        weight = self.weights[name].detach()
        if not isinstance(bits, Tensor) and self._scheme == "kmeans":
            return shared(weight, bits, self._init, self._seed), None
        layer = self._layers.get(name)
        if layer is None or gram is None or layer.swap:
            gram = None
        coded = quantised(weight, bits, gram=gram, name=name, clipped=self._scheme == "integer")
        return coded.values(), coded

    def _error(self, name: str, before: Tensor, after: Tensor, gram: Tensor | None) -> float:
        layer = self._layers.get(name)
        if gram is not None and layer is not None:
            return output_error(gram, layer.canonical(before.detach()), layer.canonical(after))
        change, whole = (after - before).float().square().sum(), before.float().square().sum()
        return float(change / whole) if float(whole) else 0.0


def _has_gram(layer: Layer) -> bool:
    """Whether the inputs of a layer can be watched: of linear and convolution layers."""
    return isinstance(layer.module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)) or layer.swap


def _bits(work: _Work, bits: float | Mapping[str, float] | None, budget: int | None) -> dict[str, float | Tensor]:
    """Bits by weight, as given or as a budget wants them; steps of its outputs where those can be chosen."""
    if budget is not None:
        if (steps := work.steps(budget)) is not None:
            return steps
        choices = CHOICES[work._scheme]
        picked = knapsack.choose(work.options(choices), budget)
        return {name: choices[index] for name, index in picked.items()}
    table = bits if isinstance(bits, Mapping) else {"*": 5 if bits is None else bits}
    found: dict[str, float | Tensor] = {}
    for name in work.weights:
        chosen = next((value for pattern, value in table.items() if matches(pattern, name)), None)
        if chosen is None:
            raise RecipeError(f"bits says nothing of {name!r}: add it, or a last entry '*' for all others")
        found[name] = float(chosen)
    return found


def _round_vectors(model: nn.Module, work: _Work, vector_bits: float | None, init: Init, seed: int) -> list[str]:
    """Biases, norms and statistics in fewer bits. Returns the names of parameters whose values are shared now."""
    if vector_bits is None:
        return []
    sharing = []
    for name, (kind, tensor) in state_of(model).tensors.items():
        if name in work.weights or tensor.dim() >= 2 or not tensor.is_floating_point():
            continue
        if vector_bits < 16 and kind == "parameter" and tensor.numel() > 2:
            tensor.data.copy_(shared(tensor, vector_bits, init, seed))
            sharing.append(name)
        else:
            tensor.data.copy_(rounded_vector(tensor))
    return sharing


def _round_books(model: nn.Module, names: Iterable[str]) -> None:
    """Trained centroids to bfloat16, as `shared` made them."""
    parameters = dict(model.named_parameters())
    for name in names:
        values = parameters[name].data
        values.copy_(rounded_book(values))


def _measured(model: nn.Module, work: _Work) -> tuple[tuple[LayerBits, ...], int]:
    """What every tensor takes, and the size of the packed file, found by writing it."""
    tensors = state_of(model).tensors
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.packed"
        found = packed.write(path, ((name, plain(t), work.coded.get(name)) for name, (_, t) in tensors.items()))
        size = path.stat().st_size
    layers = tuple(
        LayerBits(name, tuple(tensors[name][1].shape), work.bits.get(name), work.errors.get(name), coded)
        for name, coded in found.items()
    )
    return layers, size


def _check(bits: Any, budget: int | None, scheme: str, init: str, data: Any, norms: bool, finetune: Any, train: Any) -> None:
    for what, value, known in (("scheme", scheme, SCHEMES), ("init", init, INITS)):
        if value not in known:
            raise RecipeError(f"unknown {what} {value!r}{did_you_mean(str(value), known)} Known: {', '.join(known)}.")
    if bits is not None and budget is not None:
        raise RecipeError("bits and budget both say how many bits each weight gets: give one of them")
    for value in bits.values() if isinstance(bits, Mapping) else [bits]:
        if value is not None and not (isinstance(value, (int, float)) and 1 <= value <= 12):
            raise RecipeError(f"a weight takes 1 to 12 bits, got {value!r}")
    if norms and data is None:
        raise RecipeError("fold_norms and reestimate_norms need calibration batches: pass data=")
    if finetune is not None and (train is None or scheme != "kmeans"):
        raise RecipeError("finetune trains the values of codebooks: pass train= batches, and scheme='kmeans'")
