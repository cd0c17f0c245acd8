"""``secateur methods``: every registered piece, with its source and options."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from secateur.cli import options as o
from secateur.cli.console import out, print_json

NEEDS_ARGUMENTS = False


def command(
    name: Annotated[
        str | None, typer.Argument(help="A kind (criterion, pattern, ...) or the name of a method.", show_default=False)
    ] = None,
    json: o.Json = False,
) -> None:
    """List the methods that can be named: criteria, patterns, allocations, schedules, regrowth, solvers, dynamic methods.

    Example: secateur methods taylor
    """
    from secateur.errors import UnknownName

    pieces = all_pieces()
    if name is not None:
        chosen = [p for p in pieces if name in (p["kind"], p["name"])]
        if not chosen:
            raise UnknownName("method", name, {p["name"] for p in pieces} | {p["kind"] for p in pieces})
        pieces = chosen
    if json:
        print_json(pieces)
        return
    for kind in dict.fromkeys(p["kind"] for p in pieces):
        out.print(_table(kind, [p for p in pieces if p["kind"] == kind]))


def all_pieces() -> list[dict[str, Any]]:
    """Kind, name, summary, source, options and needs of every registered piece."""
    from secateur.allocation import ALLOCATIONS
    from secateur.criteria import CRITERIA, UNIT_CRITERIA
    from secateur.dynamic import DYNAMIC
    from secateur.patterns import PATTERNS
    from secateur.schedules import SCHEDULES
    from secateur.solvers import SOLVERS
    from secateur.train.regrow import REGROW

    pieces = []
    for registry in (CRITERIA, UNIT_CRITERIA, PATTERNS, ALLOCATIONS, SCHEDULES, REGROW, SOLVERS, DYNAMIC):
        for entry in registry.values():
            needs = sorted(n.value for n in entry.facts.get("needs", ()))
            options = {k: v for k, v in entry.options.items() if isinstance(v, (int, float, str, bool, type(None)))}
            pieces.append(
                {
                    "kind": registry.kind,
                    "name": entry.name,
                    "summary": entry.summary,
                    "source": entry.source,
                    "options": options,
                    "needs": needs,
                }
            )
    return pieces


def _table(kind: str, pieces: list[dict[str, Any]]) -> Any:
    from rich.table import Table

    table = Table(title=kind, title_justify="left", show_lines=True)
    table.add_column("name", no_wrap=True, style="bold")
    table.add_column("what it does")
    table.add_column("source", style="dim")
    for piece in pieces:
        words = piece["summary"]
        if piece["options"]:
            words += " Options: " + ", ".join(f"{k}={v!r}" for k, v in piece["options"].items()) + "."
        extra = [n for n in piece["needs"] if n != "weight"]
        if extra:
            words += f" Needs: {', '.join(extra)}."
        table.add_row(piece["name"], words.replace("``", "").replace("[", r"\["), piece["source"])
    return table
