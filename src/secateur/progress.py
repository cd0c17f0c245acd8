"""How long-running parts say how far they are. The library logs; the command line listens and draws a bar with ETA."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

T = TypeVar("T")
#: ``listener(what, done, total, note)``; total is None where nobody knows it. ``done == total`` closes the bar.
Listener = Callable[[str, int, "int | None", str], None]

log = logging.getLogger("secateur")
_LOG_EVERY_S = 5.0


class _Logger:
    """The listener in force where nobody listens: one log line every few seconds, none for what is over sooner."""

    def __init__(self) -> None:
        self._state: dict[str, tuple[float, float]] = {}

    def __call__(self, what: str, done: int, total: int | None, note: str) -> None:
        now = time.monotonic()
        start, last = self._state.get(what, (now, now))
        if done == 0 or (total is not None and done >= total):
            self._state.pop(what, None)
            if done == 0:
                self._state[what] = (now, now)
            return
        if now - last >= _LOG_EVERY_S:
            left = f", {(now - start) * (total - done) / done:.0f} s left" if total and done else ""
            log.info("%s: %s of %s%s %s", what, done, total if total is not None else "?", left, note)
            last = now
        self._state[what] = (start, last)


_listener: ContextVar[Listener] = ContextVar("listener", default=_Logger())


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Send all progress made inside the block to `listener`."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


def advance(what: str, done: int, total: int | None, note: str = "") -> None:
    """Say that `done` of `total` steps of `what` are over."""
    _listener.get()(what, done, total, note)


def track(items: Iterable[T], what: str, total: int | None = None) -> Iterator[T]:
    """Yield `items`, saying after each how far it is. `total` defaults to ``len(items)`` where that is known."""
    if total is None:
        total = _length(items)
    done = 0
    advance(what, 0, total)
    for item in items:
        yield item
        done += 1
        advance(what, done, max(total, done) if total is not None else None)
    advance(what, done, done)


def _length(items: Iterable[T]) -> int | None:
    try:
        return len(items)  # type: ignore[arg-type]
    except TypeError:  # a stream, or a wrapper around one
        return None
