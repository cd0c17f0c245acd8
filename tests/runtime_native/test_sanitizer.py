"""The kernels' own fuzzer under AddressSanitizer and UndefinedBehaviorSanitizer: no read or write outside any buffer.

Building takes about half a minute, so it runs only where SECATEUR_SANITIZE says how many cases to try.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

NATIVE = Path(__file__).parents[2] / "native"
CASES = os.environ.get("SECATEUR_SANITIZE")


@pytest.mark.skipif(not CASES, reason="set SECATEUR_SANITIZE=10000 to build and run the fuzzer")
@pytest.mark.skipif(not shutil.which("cmake"), reason="CMake is not installed")
def test_ten_thousand_random_cases_under_the_sanitizers(tmp_path):
    configure = ["cmake", "-S", NATIVE, "-B", tmp_path, "-DCMAKE_BUILD_TYPE=RelWithDebInfo", "-DSECATEUR_SANITIZE=ON"]
    for command in (configure, ["cmake", "--build", tmp_path], [tmp_path / "fuzz", CASES]):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    assert f"{CASES} cases" in done.stdout
