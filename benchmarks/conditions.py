"""What every benchmark states beside its figures, and how it keeps its rows and its page."""

from __future__ import annotations

import datetime
import json
import os
import platform
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

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


class Rows(dict[str, Any]):
    """Finished rows by key, in a JSON file that is written after each; without a file they last as long as the process."""

    def __init__(self, path: Path | None):
        self.path = path
        super().__init__(self._written())

    def measured(self, key: str, make: Callable[[], Any]) -> Any:
        """The row that is known by `key`, or else what `make` gives, which is kept."""
        if key not in self:
            self.keep(key, make())
        return self[key]

    def keep(self, key: str, row: Any) -> None:
        """Print a new row and write the file anew, with what another process wrote into it meanwhile."""
        self.update(self._written())
        self[key] = row
        print(f"{key}: {json.dumps(row)[:1000]}", file=sys.stderr, flush=True)
        if self.path is not None:
            beside = self.path.with_suffix(".tmp")
            beside.write_text(json.dumps(self, indent=1), encoding="utf-8")
            os.replace(beside, self.path)

    def _written(self) -> dict[str, Any]:
        return json.loads(self.path.read_text(encoding="utf-8")) if self.path is not None and self.path.exists() else {}


def show(lines: Iterable[str], out: Path | None) -> None:
    """Print the page, and write it into `out`."""
    text = "\n".join(lines) + "\n"
    print(text)
    if out is not None:
        out.write_text(text, encoding="utf-8")


def keep(name: str, lines: Iterable[str], *, quick: bool) -> None:
    """Print the page and write it into docs/benchmarks; a quick run is only printed."""
    PAGES.mkdir(parents=True, exist_ok=True)
    show(lines, None if quick else PAGES / name)
    if quick:
        print("quick run: not kept")
