"""What every benchmark states beside its figures, and how it keeps its page."""

from __future__ import annotations

import datetime
import os
import platform
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = ROOT / "docs" / "benchmarks"


def asset(name: str) -> Path:
    """A real model or data file; ends the program with the remedy where it is absent."""
    folder = Path(os.environ.get("SECATEUR_ASSETS", ROOT.parent / "shared" / "assets"))
    if not (folder / name).exists():
        sys.exit(f"{name} is not in {folder}: set SECATEUR_ASSETS to the folder that holds it")
    return folder / name


def conditions(threads: int, seeds: str, seconds: float) -> str:
    """One paragraph: date, processor, load, threads, versions, seeds, duration, command."""
    import numpy
    import torch

    import secateur

    return (
        f"Conditions: {datetime.date.today().isoformat()}, {processor()}, {os.cpu_count()} logical cores, load "
        f"{os.getloadavg()[0]:.1f}, {threads} thread(s), float32, Python {platform.python_version()}, "
        f"torch {torch.__version__}, numpy {numpy.__version__}, secateur {secateur.__version__}; {seeds}; "
        f"{seconds / 60:.1f} minutes in all. Made by `python benchmarks/{Path(sys.argv[0]).name}`."
    )


def processor() -> str:
    """The name of the processor as the system gives it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table."""
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]


def keep(name: str, lines: Iterable[str], *, quick: bool) -> None:
    """Print the page and write it into docs/benchmarks; a quick run is only printed."""
    text = "\n".join(lines) + "\n"
    print(text)
    if quick:
        print("quick run: not kept")
        return
    PAGES.mkdir(parents=True, exist_ok=True)
    (PAGES / name).write_text(text, encoding="utf-8")
