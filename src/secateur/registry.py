"""Named pieces: one registry for each kind, so that a method is found by its name and appears wherever methods are listed."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from secateur.errors import RecipeError, UnknownName, did_you_mean

T = TypeVar("T", bound=Callable[..., Any])


@dataclass(frozen=True)
class Entry(Generic[T]):
    """A registered piece: its name, the callable, the source it implements and whatever its registry records beside."""

    name: str
    make: T
    source: str
    facts: Mapping[str, Any]

    @property
    def summary(self) -> str:
        """First sentence of the docstring."""
        return (inspect.getdoc(self.make) or "").strip().split("\n\n")[0].replace("\n", " ")

    @property
    def options(self) -> dict[str, Any]:
        """Keyword-only options and their defaults: the ones a recipe may set."""
        parameters = inspect.signature(self.make).parameters.values()
        return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}

    def check_options(self, kind: str, options: Mapping[str, Any]) -> None:
        """Refuse an option that the piece does not have."""
        for key in options:
            if key not in self.options:
                known = ", ".join(self.options) or "none"
                raise RecipeError(
                    f"{kind} {self.name!r} has no option {key!r}{did_you_mean(key, self.options)} Its options: {known}."
                )


class Registry(Mapping[str, Entry[T]], Generic[T]):
    """Pieces of one kind by name. `Registry.register` is a decorator factory; lookups of unknown names suggest the nearest."""

    def __init__(self, kind: str):
        self.kind = kind
        self._entries: dict[str, Entry[T]] = {}

    def register(self, name: str, *, source: str, **facts: Any) -> Callable[[T], T]:
        """Decorator that files a callable under `name`. `source` is the paper, year and equation it implements."""

        def add(make: T) -> T:
            if name in self._entries:
                raise ValueError(f"{self.kind} {name!r} is registered twice")
            self._entries[name] = Entry(name, make, source, facts)
            return make

        return add

    def __getitem__(self, name: str) -> Entry[T]:
        try:
            return self._entries[name]
        except (KeyError, TypeError):
            raise UnknownName(self.kind, str(name), self._entries) from None

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


#: A registered name, or a mapping with the name and its options.
Named = str | Mapping[str, Any]


def name_of(spec: Named) -> str:
    """The name in a `Named`; empty where a mapping has none."""
    return spec if isinstance(spec, str) else str(spec.get("name", ""))


def bind(registry: Registry[T], spec: Named) -> tuple[str, Callable[..., Any]]:
    """Name and callable of a registered piece, its options checked and bound."""
    name = name_of(spec)
    options = {} if isinstance(spec, str) else {k: v for k, v in spec.items() if k != "name"}
    entry = registry[name]
    entry.check_options(registry.kind, options)
    return name, functools.partial(entry.make, **options) if options else entry.make
