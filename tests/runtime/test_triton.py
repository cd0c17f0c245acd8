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


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from secateur.runtime.triton_matvec import _kernel
pointers = {"x": "*fp16", "mask": "*i32", "starts": "*i32", "values": "*fp16", "bias": "*fp16", "y": "*fp16"}
sizes = dict.fromkeys(("rows", "columns", "chunks", "vectors"), "i32")
constants = {"ROWS": 4, "WORDS": 16, "VECTORS": 2, "BIASED": True}
source = ASTSource(_kernel(), pointers | sizes | dict.fromkeys(constants, "constexpr"), constants)
print(len(triton.compile(source, target=GPUTarget("cuda", 80, 32)).asm["cubin"]))
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_the_kernel_compiles_for_a_gpu_that_is_not_there():
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 1000


def test_triton_layers_are_not_saved(tmp_path):
    from secateur.errors import ArtifactError
    from secateur.runtime import save
    from secateur.runtime.triton_matvec import TritonLinear

    with pytest.raises(ArtifactError, match="Triton"):
        save(nn.Sequential(TritonLinear(torch.eye(4), None)), tmp_path / "model.safetensors")


def test_it_is_for_gpus_only():
    reason = RUNTIMES["triton-bitmask"].make().refuses(nn.Linear(8, 8), torch.randn(1, 8))
    assert "CUDA" in reason
