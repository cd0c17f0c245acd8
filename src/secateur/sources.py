"""How models, data and evaluators are named in one line: ``kind:rest[slice]?key=value&key=value``, and callables of the user's.

Examples::

    hf:gpt2                               a kind that a registry knows, and what it shall find
    npz:digits.npz[0::2]?split=train      every second sample, one option
    mypackage.nets:make?width=64          a callable of an importable module
    examples/nets.py:make                 a callable of a Python file
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.util
import inspect
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import quote, unquote

from secateur.errors import SecateurError, did_you_mean

#: The kind of a source that names a callable.
CALLABLE = "callable"

_SLICE = re.compile(r"\[(?P<inside>[^\[\]]*)\]$")
_FILE_CALLABLE = re.compile(r"(?P<file>.+\.py):(?P<name>[^:/\\]*)$")
_MODULE_CALLABLE = re.compile(r"(?P<module>[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*):(?P<name>[^:/\\]*)$")
_LONGEST = 4096
_WORDS = {"true": True, "false": False, "none": None}


@dataclass(frozen=True)
class Source:
    """One parsed source. `error` is the class of what is raised about it: ModelError, DataError or a relative."""

    kind: str
    rest: str
    options: Mapping[str, Any] = field(default_factory=dict)
    select: slice | None = None
    error: type[SecateurError] = SecateurError

    def __str__(self) -> str:
        """The canonical text: parsed again, it gives the same source."""
        head = self.rest if self.kind == CALLABLE else f"{self.kind}:{self.rest}"
        options = "&".join(f"{key}={_text(value)}" for key, value in sorted(self.options.items()))
        return head + _slice_text(self.select) + (f"?{options}" if options else "")

    def path(self, what: str = "file") -> Path:
        """`rest` as an existing path. Raises `error` naming the nearest neighbour where there is none."""
        return existing_path(self.rest, what, self.error)


def parse_source(text: str, kinds: Iterable[str], error: type[SecateurError]) -> Source:
    """Take a source apart. `kinds` are the kinds that are known, `error` is raised about everything that is malformed.

    Option values are Python literals where they read as one (``7``, ``0.5``, ``true``, ``0.1,0.2,0.3``), else text;
    ``%26`` stands for ``&``. Raises `error` for an unknown kind, a bad slice and a malformed or repeated option.
    """
    if not isinstance(text, (str, os.PathLike)):
        raise error(f"a source is text such as 'kind:what?key=value', got {type(text).__name__}")
    text = os.fspath(text).strip()
    if not text:
        raise error(f"a source is empty. Write kind:what; kinds: {', '.join(sorted(kinds))}.")
    if len(text) > _LONGEST or not text.isprintable():
        why = f"is longer than {_LONGEST} characters" if len(text) > _LONGEST else "has characters that cannot be printed"
        raise error(f"the source {text[:60]!r} {why}")
    head, mark, tail = text.partition("?")
    options = parse_options(tail, text, error) if mark else {}
    head, select = _select(head, text, error)
    kind, rest = _kind(head, text, sorted(kinds), error)
    return Source(kind, rest, options, select, error)


def load_callable(text: str, error: type[SecateurError]) -> tuple[Callable[..., Any], Source]:
    """The callable that ``module:name?key=value`` or ``file.py:name?key=value`` names, and its source, path made absolute.

    Options are not yet bound: `call` does that. Raises `error` where the file, the module or the name is not there (with
    the nearest name that is), where importing it fails (with the cause chained), and where it is not callable.
    """
    source = parse_source(text, (), error)
    if source.select is not None:
        raise error(f"{text!r} names a callable, which has no samples to slice")
    return find_callable(source)


def find_callable(source: Source) -> tuple[Callable[..., Any], Source]:
    """As `load_callable`, for a source that is parsed already."""
    error = source.error
    if match := _FILE_CALLABLE.fullmatch(source.rest):
        path = existing_path(match["file"], "Python file", error)
        module = _import_file(path, error)
        source = replace(source, rest=f"{path}:{match['name']}")
    else:
        match = _MODULE_CALLABLE.fullmatch(source.rest)
        if match is None:
            raise error(f"{source.rest!r} is no 'module:callable' and no 'file.py:callable'")
        module = _import_module(match["module"], error)
    found: Any = module
    for part in match["name"].split("."):
        if not hasattr(found, part):
            names = _callables(found)
            raise error(
                f"{source.rest!r}: no {part!r} in there{did_you_mean(part, names)} Callable: {', '.join(names) or 'none'}."
            )
        found = getattr(found, part)
    if not callable(found):
        raise error(f"{source.rest!r} is a {type(found).__name__}, which cannot be called")
    return found, source


def call(function: Callable[..., Any], source: Source, *args: Any, **extra: Any) -> Any:
    """``function(*args, **extra, **options)``, with what it raises turned into the source's error, the cause chained.

    Of `extra`, the arguments that the function does not name are left out.
    """
    accepted = _parameters(function)
    given = {**{k: v for k, v in extra.items() if k in accepted}, **source.options}
    try:
        inspect.signature(function).bind(*args, **given)
    except TypeError as error:
        known = ", ".join(accepted) or "none"
        raise source.error(f"{source.rest!r} cannot be called with its options: {error}. Its arguments: {known}.") from error
    except ValueError:  # a builtin without a signature: calling it will tell
        pass
    with blaming(repr(source.rest), source.error):
        return function(*args, **given)


@contextmanager
def blaming(what: str, error: type[SecateurError]) -> Iterator[None]:
    """Turn whatever code of others raises inside the block into `error`, saying where it arose, the cause chained."""
    try:
        yield
    except SecateurError:
        raise
    except (Exception, SystemExit) as cause:
        last = traceback.extract_tb(cause.__traceback__)[-1]
        where = f"{Path(last.filename).name}, line {last.lineno}"
        raise error(f"{what} raised {type(cause).__name__}: {_first_lines(cause)} ({where})") from cause


def existing_path(text: str, what: str, error: type[SecateurError]) -> Path:
    """`text` as an absolute path that exists; else `error`, which names the nearest neighbour in the same folder."""
    if os.path.exists(os.path.expanduser(text)):
        return Path(os.path.expanduser(text)).resolve()
    path = Path(os.path.expanduser(text))
    parent, text = path.parent, text if len(text) <= 200 else text[:200] + "..."
    if not os.path.isdir(parent):
        raise error(f"{what} {text!r} does not exist, nor does its folder {str(parent)!r}")
    names = os.listdir(parent) if os.access(parent, os.R_OK) else []
    near = did_you_mean(path.name, names)
    raise error(f"{what} {text!r} does not exist{near if near != '.' else f'. Working directory: {os.getcwd()}'}")


def parse_options(tail: str, text: str, error: type[SecateurError]) -> dict[str, Any]:
    """What stands behind the question mark of `text`, ``key=value&key=value``; `error` is raised where it is malformed."""
    options: dict[str, Any] = {}
    for item in tail.split("&"):
        key, equals, value = item.partition("=")
        if not equals or not key.isidentifier():
            raise error(f"{text!r}: {item!r} is no key=value. Options are written ?key=value&key=value.")
        if key in options:
            raise error(f"{text!r} gives the option {key!r} twice")
        if _SLICE.search(value) and ":" in value:
            raise error(f"{text!r}: the slice belongs before the '?'")
        options[key] = _literal(unquote(value))
    return options


def _literal(text: str) -> Any:
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    if len(text) > 200:  # deep nesting exhausts the parser; no number is that long
        return text
    try:
        value = ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return text
    if isinstance(value, (tuple, list)) and all(isinstance(v, (int, float, str)) for v in value):
        return tuple(value)
    return value if isinstance(value, (bool, int, float, str)) else text


def _text(value: Any) -> str:
    if isinstance(value, tuple):
        inside = ",".join(_text(v) if not isinstance(v, str) else repr(v) for v in value)
        return inside + "," if len(value) == 1 else inside
    if isinstance(value, str):
        return quote(repr(value) if _literal(value) != value else value, safe="/,.:+-_ ~'\"")
    return str(value).lower() if value is None or isinstance(value, bool) else repr(value)


def _select(head: str, text: str, error: type[SecateurError]) -> tuple[str, slice | None]:
    match = _SLICE.search(head)
    if match is None or os.path.exists(head.partition(":")[2]):
        return head, None
    parts = match["inside"].split(":")
    if len(parts) == 1 or len(parts) > 3 or not all(re.fullmatch(r"\s*(-?\d+)?\s*", p) for p in parts):
        raise error(f"the source {text!r}: {match[0]!r} is no slice. Write [start:stop] or [start:stop:step].")
    numbers = [int(p) if p.strip() else None for p in parts]
    if len(numbers) == 3 and numbers[2] == 0:
        raise error(f"the source {text!r}: a slice's step cannot be 0")
    return head[: match.start()], slice(*numbers)


def _slice_text(select: slice | None) -> str:
    if select is None:
        return ""
    start, stop, step = ("" if v is None else str(v) for v in (select.start, select.stop, select.step))
    return f"[{start}:{stop}:{step}]" if step else f"[{start}:{stop}]"


def _kind(head: str, text: str, kinds: list[str], error: type[SecateurError]) -> tuple[str, str]:
    kind, colon, rest = head.partition(":")
    if colon and kind in kinds and kind != CALLABLE:
        if not rest.strip():
            raise error(f"the source {text!r} names nothing after {kind + ':'!r}")
        return kind, rest
    if _FILE_CALLABLE.fullmatch(head):
        return CALLABLE, head
    if not kinds and not colon:
        raise error(f"the source {text!r} names no callable. Write module:callable or file.py:callable.")
    module = _MODULE_CALLABLE.fullmatch(head)
    if module and (not kinds or _importable(module["module"])):
        return CALLABLE, head
    known = ", ".join(f"{k}:" for k in kinds if k != CALLABLE)
    ways = f"Known: {known}{', ' if known else ''}module:callable, file.py:callable."
    if not colon:
        raise error(f"the source {text!r} has no kind. Write kind:what. {ways}")
    more = " and no module of that name can be imported" if module else ""
    raise error(f"unknown kind {kind!r} in the source {text!r}{more}{did_you_mean(kind, kinds)} {ways}")


def _importable(module: str) -> bool:
    with _on_path(os.getcwd()):
        try:
            return importlib.util.find_spec(module.partition(".")[0]) is not None
        except (ImportError, ValueError, AttributeError):
            return False


def _import_module(name: str, error: type[SecateurError]) -> ModuleType:
    with _on_path(os.getcwd()), blaming(f"importing {name!r}", error):
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as cause:
            if cause.name is None or not (name == cause.name or name.startswith(cause.name + ".")):
                raise
            raise error(f"no module {cause.name!r} can be imported from here; for a file write path/to/file.py:name") from cause


def _import_file(path: Path, error: type[SecateurError]) -> ModuleType:
    """Run a Python file as a module, once for each state of the file: classes stay the same from one load to the next."""
    if not path.is_file():
        raise error(f"{str(path)!r} is not a file")
    key = hashlib.sha256(f"{path}:{path.stat().st_mtime_ns}".encode()).hexdigest()[:12]
    name = f"secateur_user_{path.stem}_{key}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise error(f"{str(path)!r} cannot be imported as Python")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        with _on_path(str(path.parent)), blaming(f"importing {path.name!r}", error):
            spec.loader.exec_module(module)
    except SecateurError:
        del sys.modules[name]
        raise
    return module


def _callables(owner: Any) -> list[str]:
    """Public names of callables that a module or class defines itself; imported ones where it defines none."""
    names = [n for n in vars(owner) if not n.startswith("_") and callable(getattr(owner, n))]
    own = [n for n in names if getattr(getattr(owner, n), "__module__", None) == getattr(owner, "__name__", None)]
    return (own or names)[:20]


@contextmanager
def _on_path(folder: str) -> Iterator[None]:
    """`folder` in front of the import path inside the block, as Python does for a script."""
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)


def _parameters(function: Callable[..., Any]) -> list[str]:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return []
    return [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]


def _first_lines(cause: BaseException) -> str:
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    return " ".join(lines[:3])[:500] or "no message"
