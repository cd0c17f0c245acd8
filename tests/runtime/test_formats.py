from __future__ import annotations

import time

import numpy as np
import pytest
import scipy.sparse
import torch
from hypothesis import given
from hypothesis import strategies as st

from secateur.runtime.formats import bitmask, csr

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)
OTHERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool, torch.complex64)
SHAPES = ((), (0,), (1,), (7,), (8,), (9,), (3, 5), (0, 4), (4, 0), (16, 16), (2, 3, 3, 3), (1, 1, 1))


def sample(shape, dtype, density=0.4) -> torch.Tensor:
    values = torch.randint(-100, 100, shape) + (1j if dtype.is_complex else 0)
    return (values * (torch.rand(shape) < density)).to(dtype)


def bits_of(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


@pytest.mark.parametrize("dtype", FLOATS + OTHERS)
@pytest.mark.parametrize("shape", SHAPES)
def test_both_formats_give_every_bit_back(shape, dtype):
    dense = sample(shape, dtype)
    bits, values = bitmask.pack(dense)
    assert values.dtype == dtype
    back = bitmask.unpack(bits, values, shape)
    assert (back.shape, back.dtype, bits_of(back)) == (dense.shape, dtype, bits_of(dense))
    assert bits.nbytes + values.nbytes == bitmask.nbytes(dense.numel(), bitmask.count_kept(dense), dtype.itemsize)
    packed = csr.to_csr(dense)
    back = csr.from_csr(packed)
    assert (back.shape, back.dtype, bits_of(back)) == (dense.shape, dtype, bits_of(dense))
    assert sum(t.nbytes for t in packed[:3]) == csr.nbytes(shape, len(packed.values), dtype.itemsize)


def test_the_bit_order_is_least_significant_first():
    dense = torch.zeros(3, 4)
    dense[0, 0], dense[0, 1], dense[2, 3] = 1.0, 2.0, 3.0
    bits, values = bitmask.pack(dense)
    assert bits.tolist() == [0b11, 0b1000]
    assert values.tolist() == [1.0, 2.0, 3.0]
    packed = csr.to_csr(dense)
    assert packed.indptr.tolist() == [0, 2, 2, 3]
    assert packed.indices.tolist() == [0, 1, 3]


@given(st.binary(max_size=400), st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64]))
def test_any_bit_pattern_survives(raw, dtype):
    """NaN payloads, signed zeros, denormals."""
    usable = len(raw) - len(raw) % dtype.itemsize
    dense = torch.tensor(list(raw[:usable]), dtype=torch.uint8).view(dtype)
    assert bits_of(bitmask.unpack(*bitmask.pack(dense), dense.shape)) == raw[:usable]
    assert bits_of(csr.from_csr(csr.to_csr(dense))) == raw[:usable]


@pytest.mark.parametrize("dtype", FLOATS)
def test_negative_zero_is_a_value(dtype):
    dense = torch.tensor([0.0, -0.0, 1.0]).to(dtype)
    assert bitmask.count_kept(dense) == 2
    assert bitmask.count_negative_zeros(dense) == 1
    assert len(bitmask.pack(dense)[1]) == 2
    assert bitmask.count_negative_zeros(torch.tensor([-128, 0], dtype=torch.int8)) == 0


def test_tensors_longer_than_a_chunk(monkeypatch):
    monkeypatch.setattr(bitmask, "_CHUNK", 64)
    monkeypatch.setattr(csr, "_CHUNK", 64)
    for shape in ((1000,), (7, 150), (150, 7), (64, 2), (1, 129)):
        dense = sample(shape, torch.float32)
        assert torch.equal(bitmask.unpack(*bitmask.pack(dense), shape), dense)
        assert torch.equal(csr.from_csr(csr.to_csr(dense)), dense)
        assert bitmask.count_kept(dense) == int(dense.count_nonzero())


def test_views_are_read_in_their_own_order():
    dense = sample((12, 10), torch.float32)
    for view in (dense.t(), dense[::2, 1::3], dense.reshape(3, 4, 10).permute(2, 0, 1), dense[:1].expand(5, 10)):
        assert torch.equal(bitmask.unpack(*bitmask.pack(view), view.shape), view)
        assert torch.equal(csr.from_csr(csr.to_csr(view)), view)


@given(st.lists(st.booleans(), max_size=70))
def test_masks(flags):
    mask = torch.tensor(flags, dtype=torch.bool)
    bits = bitmask.pack_mask(mask)
    assert bits.numel() == -(-len(flags) // 8)
    assert torch.equal(bitmask.unpack_mask(bits, mask.shape), mask)


def test_scipy_and_torch_agree_with_the_dense_product():
    dense, x = sample((6, 4, 3), torch.float32), torch.randn(12)
    packed = csr.to_csr(dense)
    want = dense.flatten(1) @ x
    matrix = csr.to_scipy(packed)
    assert isinstance(matrix, scipy.sparse.csr_array)
    assert torch.allclose(torch.from_numpy(matrix @ x.numpy()), want)
    assert matrix.has_sorted_indices
    assert matrix.indices.dtype == np.int32
    assert torch.allclose(csr.to_torch(packed) @ x, want)
    assert torch.equal(csr.to_torch(packed).to_dense(), dense.flatten(1))
    with pytest.raises(TypeError, match="bfloat16"):
        csr.to_scipy(csr.to_csr(dense.to(torch.bfloat16)))
    assert torch.equal(csr.to_torch(csr.to_csr(dense.bfloat16())).to_dense(), dense.flatten(1).bfloat16())


def test_large_indices_are_64_bit():
    assert csr.index_dtypes((4, 2**31), 3) == (torch.int64, torch.int64)
    assert csr.index_dtypes((4, 2**31 - 1), 3) == (torch.int32, torch.int32)
    assert csr.index_dtypes((4, 4), 2**31) == (torch.int64, torch.int64)


@pytest.mark.parametrize(
    ("bits", "values", "shape", "match"),
    [
        ([0b11], [1.0], (8,), "more elements than the 1"),
        ([0b1], [1.0, 2.0], (8,), "keeps 1 elements, but 2"),
        ([0b1, 0], [1.0], (8,), "need a bitmask"),
        ([0b10000], [1.0], (4,), "unused bits"),
        ([], [], (1,), "need a bitmask"),
    ],
)
def test_bitmasks_that_do_not_fit(bits, values, shape, match):
    with pytest.raises(ValueError, match=match):
        bitmask.unpack(torch.tensor(bits, dtype=torch.uint8), torch.tensor(values), shape)


def test_sixteen_byte_elements_are_refused():
    with pytest.raises(TypeError, match="view_as_real"):
        bitmask.pack(torch.zeros(2, dtype=torch.complex128))


def test_a_hundred_megabytes_take_about_a_second():
    """The figure is one second; ten are allowed, for machines that do other things meanwhile."""
    dense = torch.randn(5000, 5000)
    dense.masked_fill_(dense < 0, 0)
    start = time.process_time()
    back = bitmask.unpack(*bitmask.pack(dense), dense.shape)
    assert time.process_time() - start < 10
    assert torch.equal(back, dense)
