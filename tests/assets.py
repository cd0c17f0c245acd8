"""Where tests find real models and data; they are never copied into the project."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


def asset(name: str) -> Path:
    """Path of a real model or data file; skips the test, with the reason, where it is absent."""
    folder = Path(os.environ.get("SECATEUR_ASSETS", Path(__file__).parents[2] / "shared" / "assets"))
    path = folder / name
    if not path.exists():
        pytest.skip(f"real asset {name!r} is not at hand: set SECATEUR_ASSETS to the folder that holds it")
    return path
