"""Wall-clock time of a forward pass: of one model, or of several side by side."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import chain

import torch
from torch import Tensor, nn

from secateur.data.batches import Batch, device_of, inputs_of, size_of, to_device
from secateur.errors import ModelError, RecipeError
from secateur.measure.modes import evaluating, using_threads
from secateur.types import Latency

_FEWEST, _MOST = 3, 1000


@dataclass(frozen=True)
class Comparison:
    """One model beside the reference: `speedup` is the median over rounds of reference time / own time, more is faster."""

    speedup: float
    low: float  #: 25th percentile of the ratios
    high: float  #: 75th percentile
    latency: Latency


def latency(
    model: nn.Module,
    example: Batch,
    *,
    runs: int | None = None,
    warmup: int | None = None,
    seconds: float = 1.0,
    threads: int | None = None,
) -> Latency:
    """Median wall-clock milliseconds of one forward pass of `example`, with its quartiles.

    The model runs in evaluation and inference mode and is left in the mode it was in. Without `runs` there are as many as
    fit in `seconds`, 3 to 1000; without `warmup`, at least one run and a fifth of `seconds` come first and do not count.
    `threads` limits torch for the time of the measurement. Accelerators are synchronised around each run.

    >>> latency(nn.Linear(3, 2), torch.zeros(8, 3), runs=5).batch
    8
    """
    return compare_latency({"": model}, example, runs=runs, warmup=warmup, seconds=seconds, threads=threads)[""].latency


def compare_latency(
    models: Mapping[str, nn.Module],
    example: Batch,
    *,
    runs: int | None = None,
    warmup: int | None = None,
    seconds: float = 1.0,
    threads: int | None = None,
    cpu_time: bool = False,
    evict: Tensor | None = None,
) -> dict[str, Comparison]:
    """Time several models on the same example, the first being the reference of the others.

    Models take turns run by run, each round beginning with another one, so that what disturbs the machine disturbs all of
    them alike; ratios are taken within a round, and their median is given. `seconds` is for each model; the rest is as
    for `latency`. With `cpu_time` the processor's time of the calling thread counts instead of the clock on the wall, which
    other programs do not disturb, but which is the whole only on one thread without an accelerator. `evict`, larger than the
    caches, is read before every run, so that weights come from memory as they do for a layer of a large model.
    """
    if not models:
        raise RecipeError("there is no model to time")
    _check_counts(runs, warmup, seconds, threads)
    with ExitStack() as stack:
        used = stack.enter_context(using_threads(threads))
        for model in models.values():
            stack.enter_context(evaluating(model))
        clock = time.thread_time if cpu_time else time.perf_counter
        timers = {name: _Timer(model, example, clock, evict) for name, model in models.items()}
        rounds = _rounds(list(timers.values()), runs, warmup, seconds)
    reference = rounds[0]
    return {
        name: _comparison(reference, times, _conditions(model, example, used))
        for (name, model), times in zip(models.items(), rounds, strict=True)
    }


def module_shares(
    model: nn.Module, example: Batch, names: Sequence[str], *, seconds: float = 1.0, runs: int | None = None
) -> dict[str, float]:
    """What share of the time of a forward pass is spent in each of the named modules: medians, by name.

    Conditions are those of `latency`. Accelerators are synchronised around each module, so shares are those of a run that
    waits there.
    """
    _check_counts(runs, None, seconds, None)
    spent: dict[str, float] = {}
    began: dict[str, float] = {}
    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        timer = _Timer(model, example)

        def begin(_: nn.Module, __: object, name: str) -> None:
            timer.wait()
            began[name] = time.perf_counter()

        def end(_: nn.Module, __: object, ___: object, name: str) -> None:
            timer.wait()
            spent[name] = spent.get(name, 0.0) + time.perf_counter() - began[name]

        for name in names:
            module = model.get_submodule(name)
            stack.callback(module.register_forward_pre_hook(partial(begin, name=name)).remove)
            stack.callback(module.register_forward_hook(partial(end, name=name)).remove)
        with torch.no_grad():
            _warm_up([timer], None, seconds)
        shares: dict[str, list[float]] = {name: [] for name in names}
        start, done = time.perf_counter(), 0
        with torch.inference_mode():
            while done < runs if runs is not None else _goes_on(done, time.perf_counter() - start, seconds):
                spent.clear()
                whole = max(timer(), 1e-9)
                for name in names:
                    shares[name].append(spent.get(name, 0.0) / whole)
                done += 1
    return {name: statistics.median(found) for name, found in shares.items()}


class _Timer:
    """Calls one model on the example and tells the seconds it took."""

    def __init__(
        self,
        model: nn.Module,
        example: Batch,
        clock: Callable[[], float] = time.perf_counter,
        evict: Tensor | None = None,
    ):
        self._model, self._device, self._clock, self._evict = model, device_of(model), clock, evict
        if self._device.type == "meta":
            raise ModelError("the model is on the meta device and cannot run. Load its weights first.")
        self._args, self._kwargs = inputs_of(to_device(example, self._device))

    def __call__(self) -> float:
        if self._evict is not None:
            self._evict.sum()
        self.wait()
        start = self._clock()
        self._model(*self._args, **self._kwargs)
        self.wait()
        return self._clock() - start

    def wait(self) -> None:
        """Until an accelerator has done what it was given."""
        if self._device.type != "cpu":
            torch.accelerator.synchronize(self._device)


def _rounds(timers: Sequence[_Timer], runs: int | None, warmup: int | None, seconds: float) -> list[list[float]]:
    """Seconds of every run, for each timer."""
    with (
        torch.no_grad()
    ):  # what a model caches in its first pass must not become an inference tensor: training could not use it
        _warm_up(timers, warmup, seconds)
    times: list[list[float]] = [[] for _ in timers]
    start, done = time.perf_counter(), 0
    with torch.inference_mode():
        while done < runs if runs is not None else _goes_on(done, time.perf_counter() - start, seconds * len(timers)):
            for turn in range(len(timers)):
                which = (turn + done) % len(timers)
                times[which].append(timers[which]())
            done += 1
    return times


def _warm_up(timers: Sequence[_Timer], warmup: int | None, seconds: float) -> None:
    start, done = time.perf_counter(), 0
    while done < warmup if warmup is not None else done < 1 or time.perf_counter() - start < seconds * len(timers) / 5:
        for timer in timers:
            timer()
        done += 1


def _goes_on(done: int, spent: float, seconds: float) -> bool:
    return done < _FEWEST or (spent < seconds and done < _MOST)


def _comparison(reference: Sequence[float], times: Sequence[float], conditions: dict[str, int | str]) -> Comparison:
    low, median, high = _quartiles([r / max(t, 1e-9) for r, t in zip(reference, times, strict=True)])
    fast, middle, slow = _quartiles([1e3 * t for t in times])
    return Comparison(median, low, high, Latency(middle, fast, slow, len(times), **conditions))  # type: ignore[arg-type]


def _quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """25th percentile, median and 75th percentile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, median, high


def _conditions(model: nn.Module, example: Batch, threads: int) -> dict[str, int | str]:
    tensors = chain(model.parameters(), model.buffers())
    dtype = next((t.dtype for t in tensors if t.is_floating_point()), torch.get_default_dtype())
    return {
        "batch": size_of(example),
        "threads": threads,
        "dtype": str(dtype).removeprefix("torch."),
        "device": str(device_of(model)),
    }


def _check_counts(runs: int | None, warmup: int | None, seconds: float, threads: int | None) -> None:
    for what, value, least in (("runs", runs, 1), ("warmup", warmup, 0), ("threads", threads, 1)):
        if value is not None and value < least:
            raise RecipeError(f"{what} must be at least {least}, got {value}")
    if not seconds > 0:
        raise RecipeError(f"seconds must be more than 0, got {seconds}")
