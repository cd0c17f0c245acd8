"""Every registered pattern that makes masks, at its default options, against the promises that selection relies on."""

from __future__ import annotations

import pytest
import torch

from secateur.patterns import PATTERNS, Units, make_pattern
from secateur.select import top

SHAPES = [(8, 8), (8, 16), (16, 8, 3, 3), (8, 4, 5), (4, 8, 1, 1, 1)]
MASKING = [name for name in PATTERNS if not isinstance(make_pattern({"name": name}), Units)]


@pytest.mark.parametrize("name", MASKING)
@pytest.mark.parametrize("shape", SHAPES)
def test_contract(name, shape):
    pattern, size = make_pattern({"name": name}), torch.Size(shape)
    assert pattern.refuses(size) is None
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    before = weight.clone()
    folded = pattern.fold(weight)
    assert folded.dim() == 3
    assert folded.numel() == weight.numel()
    assert torch.equal(weight, before)
    scores = folded.abs().sum(2)
    groups, units = scores.shape
    keep = torch.full((groups,), units // 2)
    mask = pattern.unfold(top(scores, keep), size)
    assert mask.shape == size
    assert int(mask.sum()) == groups * (units // 2) * folded.shape[2], "the count survives the way back"
    assert torch.equal(pattern.fold(mask).any(2), top(scores, keep)), "a unit is kept or removed as a whole"
    assert torch.equal(pattern.fold(mask).all(2), top(scores, keep))


@pytest.mark.parametrize("name", MASKING)
def test_non_contiguous_weights_fold_alike(name):
    pattern = make_pattern({"name": name})
    weight = torch.randn(16, 8, generator=torch.Generator().manual_seed(1)).t()
    assert torch.equal(pattern.fold(weight), pattern.fold(weight.contiguous()))


def test_there_are_patterns_to_check():
    assert {"element", "row", "neuron", "n:m", "block"} <= set(MASKING)
