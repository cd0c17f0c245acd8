"""How much memory there is to work with: the machine's, or what a container or a limit of the process leaves of it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

_UNKNOWN = 8 << 30  # where the system says nothing
_CGROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


def total_memory() -> int:
    """Bytes that the process may have at most: the least of the machine's memory, its container's and its own limit."""
    limits = [limit for limit, _ in _limits()]
    return min([_physical(), *limits])


def available_memory() -> int:
    """Bytes that can still be taken now, 0 where a limit is reached.

    Example:
        >>> 0 < available_memory() <= total_memory()
        True
    """
    left = [limit - used for limit, used in _limits()]
    return max(0, min([_free(), *left]))


def portions(items: Iterable[T], needed: Callable[[T], float], budget: float) -> Iterator[list[T]]:
    """The items in order, as many at a time as need no more than `budget` together, and at least one.

    Example:
        >>> list(portions([3, 4, 9, 1], lambda n: n, 8))
        [[3, 4], [9], [1]]
    """
    chosen: list[T] = []
    used = 0.0
    for item in items:
        more = needed(item)
        if chosen and used + more > budget:
            yield chosen
            chosen, used = [], 0.0
        chosen.append(item)
        used += more
    if chosen:
        yield chosen


def _physical() -> int:
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return _UNKNOWN


def _free() -> int:
    """What the system can hand out without swapping; half of the memory where it does not say."""
    for line in _read("/proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return _physical() // 2


def _limits() -> list[tuple[int, int]]:
    """Limit and use of the control group, and of this process's data segment, in bytes."""
    found = []
    for limit, used in _CGROUPS:
        text, now = _read(limit).strip(), _read(used).strip()
        if text.isdigit() and now.isdigit() and int(text) < 1 << 60:
            found.append((int(text), int(now)))
    return found + _own_limits()


def _own_limits() -> list[tuple[int, int]]:
    try:
        import resource
    except ImportError:  # no POSIX system
        return []
    fields = {line.split(":")[0]: line.split()[1] for line in _read("/proc/self/status").splitlines() if line.endswith("kB")}
    found = []
    for which, field in ((resource.RLIMIT_DATA, "VmData"), (resource.RLIMIT_AS, "VmSize")):
        limit, _ = resource.getrlimit(which)
        if limit != resource.RLIM_INFINITY and field in fields:
            found.append((limit, int(fields[field]) * 1024))
    return found


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="ascii")
    except OSError:
        return ""
