"""The application: all commands, and how errors and Ctrl-C end it."""

from __future__ import annotations

import logging
import sys
from typing import Annotated

import typer

import secateur
from secateur.cli import demo, deploy, doctor, export, inspect, measure, methods, plan, prune, report, scan, versus
from secateur.errors import Interrupted, SecateurError

HELP = """Make trained neural networks smaller and faster, and prove what that cost.

Start with [bold]secateur demo[/bold]: it needs no data and no network and takes under a minute.
"""

app = typer.Typer(
    name="secateur",
    help=HELP,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    epilog="Every command has --help with examples, and --json for scripts.",
)
for module in (demo, plan, prune, scan, measure, deploy, export, inspect, methods, doctor, report, versus):
    app.command(module.__name__.rpartition(".")[2], no_args_is_help=module.NEEDS_ARGUMENTS)(module.command)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"secateur {secateur.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    """Options before the command."""


def run() -> None:
    """Run the command line and leave with its status: 0 done, 1 the input's fault, 2 bad usage, 130 interrupted."""
    remarks = logging.StreamHandler(sys.stderr)
    remarks.setFormatter(logging.Formatter("secateur: %(message)s"))
    logging.getLogger("secateur").addHandler(remarks)
    try:
        app()
    except Interrupted as error:
        typer.secho(f"secateur: {error} The same command goes on from there.", err=True, fg="yellow")
        raise SystemExit(130) from None
    except SecateurError as error:
        typer.secho(f"secateur: {error}", err=True, fg="red")
        raise SystemExit(1) from None
    except BrokenPipeError:
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        typer.secho("secateur: interrupted; nothing half-written is left behind", err=True, fg="yellow")
        raise SystemExit(130) from None
