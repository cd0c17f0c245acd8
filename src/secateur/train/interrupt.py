"""Ctrl-C that waits for the end of the step in hand, so that what is saved is whole."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

log = logging.getLogger("secateur")


@dataclass
class Stop:
    """Whether the user has asked to stop."""

    asked: bool = False


@contextmanager
def polite_interrupt(enabled: bool = True) -> Iterator[Stop]:
    """Inside the block the first Ctrl-C only sets `Stop.asked`, and the second interrupts as usual.

    Where a program has a handler of its own, or the block runs in another thread than the main one, nothing is changed.
    """
    stop = Stop()
    main = threading.current_thread() is threading.main_thread()
    if not (enabled and main and signal.getsignal(signal.SIGINT) is signal.default_int_handler):
        yield stop
        return

    def handler(number: int, frame: FrameType | None) -> None:
        if stop.asked:
            signal.default_int_handler(number, frame)
        stop.asked = True
        log.warning("stopping after this step; press Ctrl-C again to stop at once")

    signal.signal(signal.SIGINT, handler)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
