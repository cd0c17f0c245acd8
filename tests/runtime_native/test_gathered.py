"""Products of chosen rows against torch, on every instruction set, with what must be refused."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.errors import LayerError
from secateur.runtime import native

pytestmark = pytest.mark.skipif(not native.gathers(), reason="the compiled kernels are missing or from before these")
ACTIVATE = [lambda y: y, F.relu, F.gelu, F.silu, F.relu6]
SIZES = st.sampled_from([1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 64, 65, 130, 257])


@settings(max_examples=150)
@given(
    rows=SIZES, columns=SIZES, count=st.integers(0, 40), threshold=st.floats(0, 3), biased=st.booleans(), act=st.integers(0, 4),
    isa=st.sampled_from(native.instruction_sets() or ("none",)), threads=st.integers(1, 4), seed=st.integers(0, 1000),
)  # fmt: skip
def test_chosen_rows_equal_torch(rows, columns, count, threshold, biased, act, isa, threads, seed):
    g = torch.Generator().manual_seed(seed)
    weight, x, z = (torch.randn(*shape, generator=g) for shape in ((rows, columns), (columns,), (rows,)))
    index = torch.randint(rows, (count,), generator=g).int()
    factor = torch.randn(count, generator=g)
    of_columns, of_rows = (torch.randn(columns, generator=g), torch.randn(rows, generator=g)) if biased else (None, None)
    zero_or = (lambda b: 0 if b is None else b) if biased else (lambda b: 0)
    torch.set_num_threads(threads)
    y, kept = native.thin(z, weight, threshold, of_columns, isa=isa)
    large = z.abs() > torch.tensor(threshold)
    assert kept == int(large.sum())
    torch.testing.assert_close(y, (z * large) @ weight + zero_or(of_columns), rtol=1e-4, atol=1e-4)
    centre, scale = torch.randn(rows, generator=g), torch.rand(rows, generator=g)
    y, kept = native.thin(z, weight, threshold, of_columns, (centre, scale), isa)
    large = (z - centre).abs() * scale > torch.tensor(threshold)
    assert kept == int(large.sum())
    torch.testing.assert_close(y, ((z - centre) * large) @ weight + zero_or(of_columns), rtol=1e-4, atol=1e-4)
    summed = native.combine(weight, index, factor, of_columns, isa)
    torch.testing.assert_close(summed, factor @ weight[index.long()] + zero_or(of_columns), rtol=1e-4, atol=1e-4)
    dots = native.gather(x, weight, index, of_rows, act, isa)
    wanted = weight[index.long()] @ x + (of_rows[index.long()] if biased else 0)
    torch.testing.assert_close(dots, ACTIVATE[act](wanted), rtol=1e-4, atol=1e-4)


def test_nothing_chosen_is_the_bias_and_nan_is_never_small():
    weight, bias = torch.randn(5, 20), torch.randn(20)
    y, kept = native.thin(torch.ones(5), weight, 2.0, bias)
    assert kept == 0
    assert torch.equal(y, bias)
    y, kept = native.thin(torch.tensor([0.0, float("nan"), 0, 0, 0]), weight, 2.0)
    assert kept == 1
    assert bool(y.isnan().all())


@pytest.mark.parametrize("index", [[-1], [5], [0, 2**31 - 1]])
def test_rows_that_are_not_there_are_refused(index):
    rows = torch.tensor(index, dtype=torch.int32)
    with pytest.raises(LayerError, match="outside"):
        native.gather(torch.ones(3), torch.ones(5, 3), rows)
    with pytest.raises(LayerError, match="outside"):
        native.combine(torch.ones(5, 3), rows, torch.ones(len(rows)))


def test_what_does_not_fit_is_refused():
    weight, index = torch.ones(5, 3), torch.zeros(2, dtype=torch.int32)
    with pytest.raises(LayerError, match="one contiguous vector"):
        native.thin(torch.ones(2, 5), weight, 0.0)
    with pytest.raises(LayerError, match="one contiguous vector"):
        native.gather(torch.ones(5), weight, index)
    with pytest.raises(LayerError, match="int32"):
        native.gather(torch.ones(3), weight, index.long())
    with pytest.raises(LayerError, match="factors"):
        native.combine(weight, index, torch.ones(3))
    with pytest.raises(LayerError, match="contiguous float32 matrix"):
        native.thin(torch.ones(3), weight.t(), 0.0)
    with pytest.raises(LayerError, match="float32 activations"):
        native.thin(torch.ones(5).double(), weight, 0.0)
    with pytest.raises(LayerError, match="bias"):
        native.thin(torch.ones(5), weight, 0.0, torch.ones(5))
    with pytest.raises(LayerError, match="centre and scale"):
        native.thin(torch.ones(5), weight, 0.0, around=(torch.ones(5), torch.ones(3)))
