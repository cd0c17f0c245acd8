"""``secateur report``: write the page of one run again, or a page that compares several."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from secateur.cli import options as o
from secateur.cli.console import err, out, print_json

NEEDS_ARGUMENTS = True


def command(
    runs: Annotated[
        list[Path], typer.Argument(help="Directories that Secateur wrote, or report.json files.", show_default=False)
    ],
    to: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            help="The page to write; report.html in the directory by default.",
            show_default=False,
            rich_help_panel=o.RUN,
        ),
    ] = None,
    json: o.Json = False,
) -> None:
    """Write the report page of a run, or one page that compares several runs, and print the table.

    Example: secateur report runs/first runs/second --out comparison.html
    """
    from secateur.cli.recipes import read_report
    from secateur.report.html import render, render_comparison
    from secateur.report.terminal import before_after, comparison

    reports = [read_report(run) for run in runs]
    page = to or (runs[0] / "report.html" if runs[0].is_dir() else runs[0].with_suffix(".html"))
    if len(reports) > 1 and to is None:
        page = Path("comparison.html")
    html = render(reports[0]) if len(reports) == 1 else render_comparison(reports)
    write_page(page, html)
    if json:
        print_json(reports[0] if len(reports) == 1 else reports)
        return
    out.print(before_after(reports[0]) if len(reports) == 1 else comparison(reports))
    err.print(f"wrote {page}")


def write_page(page: Path, html: str) -> None:
    """Write a page whole or not at all."""
    from secateur.errors import ArtifactError
    from secateur.export.atomic import write_synced

    temporary = page.with_name(f".{page.name}.tmp")
    try:
        write_synced(temporary, html.encode("utf-8"))
        temporary.replace(page)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise ArtifactError(f"the page {str(page)!r} cannot be written: {error.strerror}") from None
