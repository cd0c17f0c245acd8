"""The example runs and says what it did."""

from __future__ import annotations

import runpy
from pathlib import Path

EXAMPLE = Path(__file__).parents[2] / "examples" / "vision_language.py"


def test_the_example_prunes_both_towers_alike(capsys):
    found = runpy.run_path(str(EXAMPLE))["result"]
    said = capsys.readouterr().out
    assert "vision_model 24." in said
    assert "text_model 24." in said
    assert found.report.notes == ()
    assert len(EXAMPLE.read_text(encoding="utf-8").splitlines()) < 40
