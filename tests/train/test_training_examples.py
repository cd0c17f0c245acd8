"""Every method of training in an example of less than 40 lines, which runs and learns."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
#: The accuracy on the test digits that its last line has to reach; each is some points under what it was when written.
ACCURACY = {
    "distillation": 0.93,
    "homodistil": 0.95,
    "layerdrop": 0.85,
    "lottery": 0.70,
    "movement": 0.88,
    "rigl": 0.92,
    "surgery": 0.90,
    "variational": 0.90,
}


@pytest.mark.parametrize("name", ACCURACY)
def test_the_example_is_short_and_learns(name, capsys):
    path = EXAMPLES / f"{name}.py"
    assert len(path.read_text().splitlines()) < 40
    runpy.run_path(str(path), run_name="__main__")
    found = re.findall(r"test accuracy ([\d.]+)", capsys.readouterr().out)
    assert float(found[-1]) >= ACCURACY[name]
