"""Replace a directory by another so that whoever looks, whenever, sees the old one or the new one, complete.

The new directory is written as a hidden sibling, synced, and exchanged with the old one in one step (``renameat2`` with
RENAME_EXCHANGE, Linux 3.15). Where the system has no such call the old one is renamed aside first; whoever then finds no
target takes the one aside (`settled`), and the next writer puts it back. A lock on a sibling file keeps writers apart, so
that a hidden sibling found by the holder of the lock is always a dead writer's.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import logging
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from secateur.errors import ArtifactError

log = logging.getLogger("secateur")
_EXCHANGE = 2  # RENAME_EXCHANGE of linux/fs.h
_AT_FDCWD = -100
_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_BLOCK = 4096


@contextmanager
def replacing(
    directory: str | os.PathLike[str], *, overwrite: bool, sizes: list[int], foreign: Callable[[Path], str | None]
) -> Iterator[Path]:
    """Yield an empty directory to write into; on leaving the block without an error it becomes `directory`.

    `sizes` are the bytes of the files to come. An existing directory that is not empty is replaced only with
    `overwrite`, and only where ``foreign(directory)`` gives no reason against it. Raises ArtifactError for a directory
    that exists, is locked or is not ours, and for a full disk or any other failure to write; the old one is then as it was.
    """
    target = Path(os.path.realpath(directory))
    needed = sum(-(-size // _BLOCK) * _BLOCK for size in sizes) + 2 * _BLOCK
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(target):
            _clean(target)
            _check_target(target, overwrite, foreign)
            _check_space(target, needed)
            fresh = _sibling(target, "new")
            os.mkdir(fresh)
            try:
                yield fresh
                _sync(fresh)
                _publish(fresh, target)
                _sync(target.parent)
            finally:
                shutil.rmtree(fresh, ignore_errors=True)  # what is there now: the old directory, or a failed new one
    except OSError as error:
        raise _explained(error, target, needed) from error


@contextmanager
def replacing_file(path: str | os.PathLike[str], *, overwrite: bool) -> Iterator[Path]:
    """Yield the path of a new file to write; on leaving the block without an error it is synced and becomes `path`.

    The new file has the name of `path` in an empty directory of its own. What else is written there (weights beside a file
    that names them) takes its place beside `path` first. Raises ArtifactError where `path` or one of these exists and may not
    be overwritten, and where writing fails; what was there stays.
    """
    target = Path(os.path.realpath(path))
    _check_file(target, overwrite)
    fresh = _sibling(target, str(os.getpid()))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(fresh, ignore_errors=True)  # of a writer that was killed
        fresh.mkdir()
        yield fresh / target.name
        parts = sorted(fresh.iterdir(), key=lambda part: part.name == target.name)
        for part in parts:
            _check_file(target.with_name(part.name), overwrite)
            _sync(part, os.O_RDONLY)
        for part in parts:
            os.replace(part, target.with_name(part.name))
        _sync(target.parent)
    except OSError as error:
        raise _explained(error, target, 0) from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def check_replaceable(directory: str | os.PathLike[str], *, overwrite: bool, foreign: Callable[[Path], str | None]) -> None:
    """Raise the ArtifactError with which `replacing` would begin, and leave everything as it is."""
    target = Path(os.path.realpath(directory))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(target):
            _check_target(target, overwrite, foreign)
    except OSError as error:
        raise _explained(error, target, 0) from error


def write_synced(path: Path, data: bytes) -> None:
    """Write a new file and make sure that it is on the disk."""
    with open(path, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def settled(directory: str | os.PathLike[str]) -> Path:
    """Where the directory's content is: `directory`, or the old one set aside by a writer killed between two renames."""
    target = Path(os.path.realpath(directory))
    aside = _sibling(target, "old")
    if not target.exists() and aside.is_dir():
        log.warning("%s is missing; reading %s, which an interrupted save set aside", target, aside)
        return aside
    return target


def _sibling(target: Path, what: str) -> Path:
    return target.with_name(f".{target.name}.secateur-{what}")


@contextmanager
def _locked(target: Path) -> Iterator[None]:
    """Hold the lock of `target`. The lock file goes with the lock; a lock on a file already gone is taken again."""
    path = _sibling(target, "lock")
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _same_file(handle, path):
                break
            os.close(handle)
        except BlockingIOError:
            owner = os.pread(handle, 20, 0).decode("ascii", "replace") or "?"
            os.close(handle)
            raise ArtifactError(f"{target} is in use by pid {owner}, which is writing it. Wait for it, or stop it.") from None
        except BaseException:
            os.close(handle)
            raise
    try:
        os.ftruncate(handle, 0)
        os.pwrite(handle, str(os.getpid()).encode(), 0)
        yield
    finally:
        path.unlink(missing_ok=True)
        fcntl.flock(handle, fcntl.LOCK_UN)  # a forked child may still hold the descriptor
        os.close(handle)


def _same_file(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), os.lstat(path))
    except FileNotFoundError:
        return False


def _clean(target: Path) -> None:
    """Undo what a killed writer left: put back what it set aside, remove what it did not finish."""
    new, old = _sibling(target, "new"), _sibling(target, "old")
    if old.is_dir() and not target.exists():
        os.rename(old, target)
    for left in (new, old):
        if left.is_dir():
            log.info("removing %s, left by an interrupted save", left)
            shutil.rmtree(left)


def _check_file(target: Path, overwrite: bool) -> None:
    if target.is_dir() or (target.exists() and not overwrite):
        raise ArtifactError(f"{target} exists" + ("; give another name" if target.is_dir() else "; pass overwrite=True"))


def _check_target(target: Path, overwrite: bool, foreign: Callable[[Path], str | None]) -> None:
    try:
        mode = os.lstat(target).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISDIR(mode):
        raise ArtifactError(f"{target} exists and is not a directory; choose another name")
    if not os.listdir(target):
        return
    if not overwrite:
        raise ArtifactError(f"{target} exists and is not empty. Choose another directory, or pass overwrite=True.")
    if reason := foreign(target):
        raise ArtifactError(f"{target} will not be overwritten: {reason}")


def _check_space(target: Path, needed: int) -> None:
    free = shutil.disk_usage(target.parent).free
    if needed > free:
        raise ArtifactError(
            f"not enough space for {target}: {needed} bytes are needed, {free} are free. Nothing was written. "
            "A directory that is overwritten needs room beside it."
        )


def _publish(fresh: Path, target: Path) -> None:
    """Make `fresh` the target in one step, or in two with the recovery rule of this module."""
    if not target.exists() or not os.listdir(target):
        os.rename(fresh, target)
    elif not _exchange(fresh, target):
        aside = _sibling(target, "old")
        os.rename(target, aside)
        try:
            os.rename(fresh, target)
        except OSError:
            os.rename(aside, target)
            raise
        _sync(target.parent)
        shutil.rmtree(aside)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two names atomically. False where the system or the file system cannot."""
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is None:
        return False
    if call(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EPERM):
        return False
    raise OSError(code, os.strerror(code), str(one), None, str(other))


def _sync(path: Path, flags: int = os.O_RDONLY | os.O_DIRECTORY) -> None:
    handle = os.open(path, flags)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _explained(error: OSError, target: Path, needed: int) -> ArtifactError:
    if error.errno not in _NO_SPACE:
        return ArtifactError(f"{target} cannot be written: {error.strerror or error} ({error.filename or target})")
    free = shutil.disk_usage(target.parent).free
    why = "a file may not grow so large here" if error.errno == errno.EFBIG else f"{free} are free"
    return ArtifactError(f"no space left for {target}: {needed} bytes are needed, {why}. Nothing was lost or left behind.")
