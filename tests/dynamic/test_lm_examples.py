"""The examples of TEAL and DejaVu are short, run, and lose little."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
#: How many times the first loss (dense) the last (half of the multiply-adds left out) may be; each is some over what it was.
LOSS = {"teal": 1.15, "dejavu": 1.3}


@pytest.mark.parametrize("name", LOSS)
def test_the_example_is_short_and_loses_little(name, capsys):
    pytest.importorskip("transformers")
    path = EXAMPLES / f"{name}.py"
    assert len(path.read_text().splitlines()) < 40
    runpy.run_path(str(path), run_name="__main__")
    found = [float(x) for x in re.findall(r"loss ([\d.]+)", capsys.readouterr().out)]
    assert len(found) == 4
    assert found[0] < 3
    assert found[-1] / found[0] < LOSS[name]
