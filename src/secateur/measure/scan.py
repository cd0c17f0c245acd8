"""How sensitive each layer is: the quality of the model when that layer alone is pruned."""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from secateur.data.batches import Batch, Batches, Loss
from secateur.errors import DataError, RecipeError
from secateur.layers import Layer
from secateur.measure.cache import Cache, fingerprint
from secateur.measure.quality import Evaluate, qualities
from secateur.patterns import Units, make_pattern
from secateur.progress import advance
from secateur.selection import Method, Named, choose, prunable, resolve, target_sparsity
from secateur.sparsity import check_sparsity
from secateur.stats import collect
from secateur.types import LayerStats, Pattern, Sensitivity

log = logging.getLogger("secateur")
_SPARSITIES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
_LONG_S = 60.0


def scan(
    model: nn.Module,
    *,
    evaluate: Evaluate,
    data: Iterable[Batch] | None = None,
    sparsities: Sequence[float] | None = None,
    criterion: Named = "magnitude",
    pattern: Named | Pattern = "element",
    reduction: str | None = None,
    layers: Sequence[str] | None = None,
    ignore: Sequence[str] = (),
    loss: Loss | None = None,
    example: Batch | None = None,
    seed: int = 0,
    cache: str | os.PathLike[str] | None = None,
) -> tuple[Sensitivity, ...]:
    """Prune one layer after the other to each sparsity, evaluate, and put the weights back.

    Of patterns that cut units (channel, head, ...) it is one group of coupled units after the other, cut out of a copy; a
    group has the name of the first tensor it cuts. Of pattern ``layer`` it is one block after the other, which goes as a whole:
    what the model loses without it. `sc.prune` takes the curves as ``sensitivity=``, and with
    ``allocation="sensitivity"`` every layer loses as much as makes the same damage by them.

    Args:
        model: any module; afterwards it is as before, bit by bit.
        evaluate: ``evaluate(model) -> float`` or a mapping of floats, of which the first is the curve.
        data: calibration batches, for criteria that need them. Statistics are collected once, on the dense model.
        sparsities: fractions removed; 0.1 to 0.9 by default, or the one that the pattern fixes.
        criterion, pattern, reduction, layers, ignore, loss, seed: as for `sc.prune`.
        example: a batch that patterns of units are followed by; the first of `data` by default.
        cache: a directory that keeps each result as it comes. The same call later uses what is there, so that a scan that
            was killed goes on and ends in the same result. Results belong to the weights, the statistics and the settings;
            `evaluate` cannot be compared, but where it rates the dense model otherwise than before, nothing is reused.

    Returns:
        A Sensitivity for each layer, in the model's order. Its first point is the dense model, at sparsity 0.

    Raises what `sc.prune` raises for a wrong recipe, layer or data; DataError, naming layer and sparsity, where `evaluate`
    returns no number. A scan of more than a minute says beforehand in the log how long it will take.

    Example:
        >>> import torch
        >>> curve, = scan(nn.Linear(8, 8), evaluate=lambda m: float(m.weight.count_nonzero()), sparsities=[0.5])
        >>> curve.sparsity, curve.quality
        ((0.0, 0.5), (64.0, 32.0))
    """
    made = make_pattern(pattern)
    batches = None if data is None else Batches(data)
    keys: dict[str, Any] = {"criterion": criterion, "reduction": reduction, "layers": layers, "ignore": ignore, "seed": seed}
    if isinstance(made, Units):
        from secateur.measure.scan_units import units_to_scan  # which stands on budgets, and they on measures

        wanted = _sparsities(sparsities, None) if made.sparsity is None else _whole(sparsities, made)
        subjects = units_to_scan(model, made, batches=batches, loss=loss, example=example, **keys)
        settings = {"criterion": criterion, "pattern": repr(made), "reduction": reduction, "seed": seed}
    else:
        method = resolve(criterion=criterion, pattern=made, reduction=reduction)
        wanted = _sparsities(sparsities, method.pattern)
        found = _layers_to_scan(model, method.pattern, layers, ignore)
        stats = collect(model, found, method.needs, batches=batches, loss=loss, seed=seed).layers
        subjects = {n: _masked(model, layer, stats[n], method) for n, layer in found.items()}
        settings = {"criterion": criterion, "pattern": method.pattern.name, "reduction": method.reduction, "seed": seed}
    where = None if cache is None else os.fspath(cache)
    return _Scan(model, evaluate, subjects, Cache(where), fingerprint(model, settings), where).run(wanted)


def _masked(model: nn.Module, layer: Layer, stats: LayerStats, method: Method) -> Subject:
    """One layer to be pruned in place for as long as it is looked at."""

    @contextmanager
    def pruned(sparsity: float) -> Iterator[nn.Module]:
        masks = choose({layer.name: layer}, {layer.name: stats}, sparsity=sparsity, method=method)
        with _put_back(layer.parameter):
            masks.apply(model)
            yield model

    values = [(f.name, getattr(stats, f.name)) for f in dataclasses.fields(stats)]
    return Subject(pruned, fingerprint(*(x for pair in values if pair[0] != "weight" for x in pair)))


@dataclasses.dataclass(frozen=True)
class Subject:
    """What a scan prunes at a time: the model with it pruned to a sparsity, and a digest of what that depends on."""

    pruned: Callable[[float], AbstractContextManager[nn.Module]]
    depends: str


@dataclasses.dataclass
class _Scan:
    """One scan: what it works on, and where its results are kept."""

    model: nn.Module
    evaluate: Evaluate
    layers: Mapping[str, Subject]
    cache: Cache
    base: str  #: fingerprint of the weights and settings
    kept_where: str | None

    def run(self, sparsities: Sequence[float]) -> tuple[Sensitivity, ...]:
        """The curves, from the cache where it has them."""
        started = time.monotonic()
        dense = qualities(self.evaluate, self.model)
        metric = next(iter(dense))
        each_s = time.monotonic() - started
        self._compare(dense)
        keys = {(n, s): key for n in self.layers for s, key in zip(sparsities, self._keys(n, sparsities, dense), strict=True)}
        missing = [point for point, key in keys.items() if key not in self.cache]
        self._announce(len(sparsities), len(missing), each_s)
        advance("scan", 0, len(missing))
        try:
            for done, (name, sparsity) in enumerate(missing, 1):
                quality = self._point(name, sparsity)
                if metric not in quality:
                    raise DataError(
                        f"evaluate gave {metric!r} of the dense model, but not with {name!r} pruned to {sparsity:g}"
                    )
                self.cache.put(keys[name, sparsity], quality, layer=name, sparsity=sparsity)
                advance("scan", done, len(missing), name)
        except KeyboardInterrupt:
            self._say_how_to_resume(sum(key in self.cache for key in keys.values()), len(keys))
            raise
        return tuple(
            Sensitivity(name, (0.0, *sparsities), (dense[metric], *(self.cache[keys[name, s]][metric] for s in sparsities)))
            for name in self.layers
        )

    def _compare(self, dense: Mapping[str, float]) -> None:
        """Say it where the cache has results of these weights and settings that another evaluation gave."""
        key = fingerprint(self.base, "dense")
        if key in self.cache and _rounded(self.cache[key]) != _rounded(dense):
            log.warning(
                "scan: evaluate rates the dense model %s, and %s when the results in %s were made: they are not reused",
                dict(dense),
                self.cache[key],
                self.kept_where,
            )
        if key not in self.cache or self.cache[key] != dense:
            self.cache.put(key, dense, layer=None, sparsity=0.0)

    def _keys(self, name: str, sparsities: Sequence[float], dense: Mapping[str, float]) -> list[str]:
        """Keys of the layer's points: they change with all that the mask and its quality depend on."""
        return [fingerprint(self.base, name, self.layers[name].depends, _rounded(dense), s) for s in sparsities]

    def _announce(self, sparsities: int, missing: int, each_s: float) -> None:
        total = sparsities * len(self.layers)
        if missing < total:
            log.info("scan: %d of %d evaluations are in %s", total - missing, total, self.kept_where)
        if missing * each_s > _LONG_S:
            log.info(
                "scan: %d layers at %d sparsities, %d evaluations of about %.1f s: about %.0f minutes. %s",
                len(self.layers),
                sparsities,
                missing,
                each_s,
                math.ceil(missing * each_s / 60),
                f"Results are kept in {self.kept_where}." if self.kept_where else "With cache= it could be resumed.",
            )

    def _say_how_to_resume(self, kept: int, total: int) -> None:
        if self.kept_where is None:
            log.warning("scan: interrupted; nothing is kept. With cache=DIR the same call would go on where it was.")
        else:
            log.warning(
                "scan: interrupted; %d of %d evaluations are kept in %s. The same call goes on from there.",
                kept,
                total,
                self.kept_where,
            )

    def _point(self, name: str, sparsity: float) -> dict[str, float]:
        """Qualities with this one layer pruned."""
        with self.layers[name].pruned(sparsity) as model:
            try:
                return qualities(self.evaluate, model)
            except DataError as error:
                raise DataError(f"with {name!r} pruned to {sparsity:g}, {error}") from error


@contextmanager
def _put_back(parameter: Tensor) -> Iterator[None]:
    """Whatever happens to the parameter inside the block, its values are afterwards those from before."""
    before = parameter.detach().clone()
    try:
        yield
    finally:
        with torch.no_grad():
            parameter.copy_(before)


def _rounded(quality: Mapping[str, float]) -> dict[str, str]:
    """Equal for evaluations that differ by no more than the order of their sums."""
    return {name: f"{value:.6g}" for name, value in quality.items()}


def _sparsities(asked: Sequence[float] | None, pattern: Pattern | None) -> list[float]:
    """In ascending order, each once, without the dense point."""
    if asked is None and pattern is not None and pattern.sparsity is not None:
        return [pattern.sparsity]
    chosen = _SPARSITIES if asked is None else asked
    values = sorted({check_sparsity(s) if pattern is None else target_sparsity(s, pattern) for s in chosen} - {0.0})
    if not values:
        raise RecipeError("sparsities holds none above 0: give the fractions to try, such as sparsities=(0.5, 0.9)")
    return values


def _whole(asked: Sequence[float] | None, units: Units) -> list[float]:
    """All of it, the only thing that can go of a unit which fixes its own sparsity."""
    if asked is not None:
        raise RecipeError(f"pattern {units.name!r} takes out all of a block or nothing: leave sparsities out")
    assert units.sparsity is not None
    return [units.sparsity]


def _layers_to_scan(
    model: nn.Module, pattern: Pattern, layers: Sequence[str] | None, ignore: Sequence[str]
) -> dict[str, Layer]:
    fit, skipped = prunable(model, pattern, layers=layers, ignore=ignore)
    for name, reason in skipped.items():
        log.info("scan: %s is left out: %s", name, reason)
    return fit
