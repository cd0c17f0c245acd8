"""Run by test_triton.py in a process of its own, since Triton must know from its import on that it is interpreted."""

from __future__ import annotations

import sys

import pytest
import torch
import torch.nn.functional as F

from secateur.errors import LayerError
from secateur.runtime import RUNTIMES
from secateur.runtime.triton_matvec import CHUNK, TritonLinear, matvec, pack

CASES = [
    (1, 8, 64, 0.5), (1, 5, CHUNK, 0.3), (2, 7, CHUNK + 1, 0.2), (3, 4, 2 * CHUNK - 5, 0.9), (16, 9, 40, 1.0), (5, 1, 1, 1.0),
    (4, 6, 1030, 0.0), (1, 0, 16, 1.0), (0, 3, 16, 0.5),
]  # fmt: skip


def main() -> None:
    g = torch.Generator().manual_seed(0)
    for vectors, rows, columns, density in CASES:
        for dtype, close in ((torch.float32, 1e-5), (torch.float16, 2e-3)):
            w = torch.randn(rows, columns, generator=g) * (torch.rand(rows, columns, generator=g) < density)
            x, bias = torch.randn(vectors, columns, generator=g).to(dtype), torch.randn(rows, generator=g).to(dtype)
            w = w.to(dtype)
            for b in (None, bias):
                expected = F.linear(x.double(), w.double(), None if b is None else b.double())
                got = matvec(x, pack(w), b)
                assert got.dtype == dtype
                assert got.shape == expected.shape
                assert torch.allclose(got.double(), expected, rtol=close, atol=close * 40), (vectors, rows, columns, dtype)
    w = torch.randn(6, 70) * (torch.rand(6, 70) < 0.5)
    layer = TritonLinear(w, torch.ones(6))
    x = torch.randn(2, 3, 70)
    assert torch.allclose(layer(x), F.linear(x, w, torch.ones(6)), atol=1e-4)
    assert torch.allclose(layer(x.transpose(0, 1)), F.linear(x.transpose(0, 1), w, torch.ones(6)), atol=1e-4)
    for bad, words in (
        (torch.randn(17, 70), "at most 16"),
        (torch.randn(1, 70).half(), "do not go with"),
        (torch.randn(1, 700), "chunks"),
    ):
        with pytest.raises(LayerError, match=words):
            layer(bad)
    runtime = RUNTIMES["triton-bitmask"].make()
    assert runtime.refuses(torch.nn.Linear(70, 6), torch.randn(1, 70)).startswith("the Triton kernel needs a CUDA device")
    sys.stdout.write(f"{len(CASES)} cases\n")


if __name__ == "__main__":
    main()
