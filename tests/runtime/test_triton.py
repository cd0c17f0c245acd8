"""The Triton kernel against torch, by Triton's interpreter on the CPU."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from secateur.runtime import RUNTIMES


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_the_interpreted_kernel_equals_torch():
    cases = Path(__file__).with_name("triton_cases.py")
    done = subprocess.run(
        [sys.executable, str(cases)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "9 cases" in done.stdout


def test_it_is_for_gpus_only():
    reason = RUNTIMES["triton-bitmask"].make().refuses(nn.Linear(8, 8), torch.randn(1, 8))
    assert "CUDA" in reason
