"""A calibrated run that SIGKILL ends at fifty random moments ends in the same bytes as one that nothing stopped."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path


def test_fifty_random_moments(tmp_path):
    line = [sys.executable, str(Path(__file__).parent / "killed_again_and_again.py"), str(tmp_path), "50", "1"]
    done = subprocess.run(line, capture_output=True, text=True, timeout=400, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["killed"] == 50
    assert found["resumed"] >= 10, "state was there to go on from"
    assert len(set(found["digests"])) == 1
    assert found["left"] == [], "the state of a finished run is gone"
