"""The benchmarks say what they do and how to run them, without any data or model at hand."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.parametrize("name", ["chita", "efficientnet", "lenet", "mlpnet", "structured_accuracy"])
def test_help_names_the_page_it_writes_and_the_quick_run(name):
    done = subprocess.run(
        [sys.executable, BENCHMARKS / f"{name}.py", "--help"], capture_output=True, text=True, check=True, cwd=BENCHMARKS.parent
    )
    assert "--quick" in done.stdout
    assert f"docs/benchmarks/{name}" in done.stdout
