"""Every dynamic method for images in an example of less than 40 lines, which runs and keeps its accuracy."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
#: The accuracy that its last line has to reach, at the least budget; each is some points under what it was when written.
ACCURACY = {"runtime_pruning": 0.80, "early_exit": 0.94, "layer_skipping": 0.75, "token_pruning": 0.75}


@pytest.mark.parametrize("name", ACCURACY)
def test_the_example_is_short_and_computes_less(name, capsys, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(EXAMPLES), *sys.path])
    path = EXAMPLES / f"{name}.py"
    assert len(path.read_text().splitlines()) < 40
    runpy.run_path(str(path), run_name="__main__")
    printed = capsys.readouterr().out
    assert float(re.findall(r"accuracy ([\d.]+)", printed)[-1]) >= ACCURACY[name]
    shares = [
        float(share) for share in re.findall(r"([\d.]+)% computed|computed ([\d.]+)%", printed) for share in share if share
    ]
    assert shares[0] == 100
    assert shares == sorted(shares, reverse=True)
    assert shares[-1] <= 60
