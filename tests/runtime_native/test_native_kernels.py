"""The kernels against torch, on every instruction set this machine has, over random shapes and the awkward ones."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.errors import LayerError
from secateur.runtime import native
from secateur.runtime.native import Geometry

ACTIVATE = [lambda y: y, F.relu, F.gelu, F.silu, F.relu6]
SIZES = st.sampled_from([1, 2, 3, 4, 7, 15, 16, 17, 31, 33, 64, 65, 127, 128, 130, 257])
isas = st.sampled_from(native.instruction_sets() or ("none",))


def sparse(*shape: int, density: float = 0.3, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g) * (torch.rand(*shape, generator=g) < density)


def assert_close(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=2e-5)


@settings(max_examples=150)
@given(
    m=SIZES, out=SIZES, columns=SIZES, density=st.floats(0, 1), isa=isas, act=st.integers(0, 4), biased=st.booleans(),
    block=st.sampled_from(native.BLOCKS), wide=st.one_of(st.none(), st.integers(1, 300)), tall=st.integers(1, 64),
    threads=st.integers(1, 5), seed=st.integers(0, 1000),
)  # fmt: skip
def test_linear_and_matvec_equal_torch(m, out, columns, density, isa, act, biased, block, wide, tall, threads, seed):
    out, columns = out * block[0], columns * block[1]
    w, x = sparse(out, columns, density=density, seed=seed), torch.randn(m, columns)
    bias = torch.randn(out) if biased else None
    expected = ACTIVATE[act](F.linear(x, w, bias))
    program, bits = native.pack(w, block=block, columns=wide, rows=tall), native.pack_bits(w)
    assert torch.equal(native.unpack(program, w.shape), w)
    assert torch.equal(native.unpack_bits(bits, w.shape), w)
    torch.set_num_threads(threads)
    assert_close(native.linear(x, program, bias, (out, columns), act, isa), expected)
    assert_close(native.matvec(x, bits, bias, (out, columns), act, isa), expected)


pairs = st.tuples
small = st.integers(1, 3)


@settings(max_examples=150)
@given(
    batch=st.integers(1, 3), groups=st.sampled_from([1, 1, 2, 3]), inside=st.integers(1, 5), outside=st.integers(1, 20),
    kernel=pairs(st.integers(1, 5), st.integers(1, 5)), stride=pairs(small, small), dilation=pairs(small, small),
    padding=pairs(st.integers(0, 4), st.integers(0, 4)), extra=pairs(st.integers(0, 20), st.integers(0, 50)), isa=isas,
    density=st.floats(0, 1), threads=st.integers(1, 4),
)  # fmt: skip
def test_convolution_equals_torch(
    batch, groups, inside, outside, kernel, stride, dilation, padding, extra, isa, density, threads
):
    least = [max(1, d * (k - 1) + 1 - 2 * p) for d, k, p in zip(dilation, kernel, padding, strict=True)]
    x = torch.randn(batch, groups * inside, least[0] + extra[0], least[1] + extra[1])
    w, bias = sparse(groups * outside, inside, *kernel, density=density), torch.randn(groups * outside)
    expected = F.conv2d(x, w, bias, stride, padding, dilation, groups)
    program = native.pack(w.flatten(1), groups=groups)
    torch.set_num_threads(threads)
    got = native.conv2d(x, program, bias, (w.shape[0], x.shape[1]), Geometry(kernel, stride, padding, dilation), 0, isa)
    assert_close(got, expected)


@settings(max_examples=100)
@given(
    batch=st.integers(1, 3), channels=st.integers(1, 20), kernel=pairs(st.integers(1, 5), st.integers(1, 5)),
    stride=pairs(small, small), dilation=pairs(small, small), start=pairs(small, small), end=pairs(small, small),
    extra=pairs(st.integers(0, 20), st.integers(0, 50)), isa=isas, act=st.integers(0, 4), threads=st.integers(1, 4),
)  # fmt: skip
def test_depthwise_equals_torch(batch, channels, kernel, stride, dilation, start, end, extra, isa, act, threads):
    sizes = zip(dilation, kernel, start, end, strict=True)
    least = [max(1, d * (k - 1) + 1 - p - e) for d, k, p, e in sizes]
    x = torch.randn(batch, channels, least[0] + extra[0], least[1] + extra[1])
    w, bias = torch.randn(channels, 1, *kernel), torch.randn(channels)
    padded = F.pad(x, (start[1], end[1], start[0], end[0]))
    expected = ACTIVATE[act](F.conv2d(padded, w, bias, stride, 0, dilation, channels))
    geometry = Geometry(kernel, stride, start, dilation, end)
    torch.set_num_threads(threads)
    assert_close(native.depthwise(x, w, bias, geometry, act, isa), expected)
    program = native.pack(w.flatten(1), groups=channels)
    assert_close(native.conv2d(x, program, bias, (channels, channels), geometry, act, isa), expected)


@pytest.mark.parametrize("isa", native.instruction_sets())
@pytest.mark.parametrize("dtype", native.VALUE_TYPES)
@pytest.mark.parametrize("density", [0.05, 0.2, 0.3, 0.6])
def test_crowded_mask_words_spill_and_come_back(dtype, density, isa):
    w = sparse(9, 500, density=density)
    w[::2, 64:128] = torch.randn(5, 64)  # far more than a word is given room for at low densities
    bits = native.pack_bits(w, dtype)
    stored = native.unpack_bits(bits, w.shape)
    assert torch.equal(native.unpack_bits(native.pack_bits(stored, dtype), w.shape), stored)
    torch.testing.assert_close(stored, w, rtol=1e-2, atol=2e-2 if dtype == torch.int8 else 0)
    x = torch.randn(7, 500)
    assert_close(native.matvec(x, bits, None, (9, 500), 0, isa), F.linear(x, stored))


@pytest.mark.parametrize("isa", native.instruction_sets())
@pytest.mark.parametrize("shape", [(0, 8, 8), (3, 0, 8), (3, 8, 0), (0, 0, 0), (1, 1, 1)])
def test_empty_matrices(shape, isa):
    m, out, columns = shape
    w, x, bias = torch.ones(out, columns), torch.randn(m, columns), torch.randn(out)
    expected = F.linear(x, w, bias)
    assert_close(native.linear(x, native.pack(w), bias, (out, columns), 0, isa), expected)
    assert_close(native.matvec(x, native.pack_bits(w), bias, (out, columns), 0, isa), expected)


def test_rows_of_zeros_give_the_bias():
    w, bias = sparse(40, 200, density=0.05), torch.randn(40)
    w[::2] = 0
    y = native.linear(torch.randn(33, 200), native.pack(w, columns=32), bias, (40, 200))
    assert torch.equal(y[:, ::2], bias[::2].expand(33, 20))


def test_inputs_in_any_layout():
    w = sparse(48, 40)
    program = native.pack(w)
    for x in (torch.randn(40, 19).T, torch.randn(19, 80)[:, ::2], torch.randn(19, 60)[:, 3:43], torch.randn(40).expand(19, 40)):
        assert not x.is_contiguous()
        assert_close(native.linear(x, program, None, (48, 40)), F.linear(x, w))
    deep = torch.randn(2, 3, 5, 40)
    assert_close(native.linear(deep, program, None, (48, 40)), F.linear(deep, w))
    image = torch.randn(2, 40, 6, 7).to(memory_format=torch.channels_last)
    geometry = Geometry((1, 1), (1, 1), (0, 0), (1, 1))
    assert_close(native.conv2d(image, program, None, (48, 40), geometry), F.conv2d(image, w[:, :, None, None]))


def test_nan_and_infinite_weights_and_inputs_reach_the_output():
    w = torch.zeros(4, 8)
    w[0, 0], w[1, 1], w[2, 2] = float("nan"), float("inf"), 2.0
    y = native.linear(torch.ones(3, 8), native.pack(w), None, (4, 8))
    assert torch.isnan(y[:, 0]).all()
    assert torch.isinf(y[:, 1]).all()
    assert torch.equal(y[:, 2:], torch.tensor([2.0, 0.0]).expand(3, 2))
    x = torch.ones(3, 8)
    x[1, 2] = float("nan")
    y = native.linear(x, native.pack(w), None, (4, 8), native.ACTIVATIONS.index("relu"))
    assert torch.isnan(y[1, 2])
    assert y[0, 2] == 2


def test_results_do_not_depend_on_the_number_of_threads():
    w, x = sparse(600, 300, density=0.2), torch.randn(200, 300)
    program, seen = native.pack(w, rows=64), []
    for threads in (1, 2, 7):
        torch.set_num_threads(threads)
        seen.append(native.linear(x, program, None, (600, 300)))
    assert torch.equal(seen[0], seen[1])
    assert torch.equal(seen[0], seen[2])


@pytest.mark.parametrize(("dtype", "error"), [(torch.bfloat16, 2**-8), (torch.int8, 0.5 / 127)])
def test_rounded_values_err_by_half_a_step(dtype, error):
    w = sparse(50, 130, density=0.5)
    back = native.unpack_bits(native.pack_bits(w, dtype), w.shape)
    scale = w.abs() if dtype == torch.bfloat16 else w.abs().amax(dim=1, keepdim=True).expand_as(w)
    assert ((back - w).abs() <= scale * error * 1.001).all()
    assert ((back == 0) | (w != 0)).all()
    x, bits = torch.randn(5, 130), native.pack_bits(w, dtype)
    for isa in native.instruction_sets():
        assert_close(native.matvec(x, bits, None, (50, 130), 0, isa), F.linear(x, back))


def test_bfloat16_values_round_as_torch_does():
    w = torch.randn(7, 99)
    assert torch.equal(native.unpack_bits(native.pack_bits(w, torch.bfloat16), w.shape), w.bfloat16().float())


def test_what_does_not_fit_is_refused_with_a_reason():
    w = sparse(8, 16)
    program, shape = native.pack(w), (8, 16)
    for x, words in [
        (torch.randn(3, 15), r"\[..., 16\]"),
        (torch.randn(3, 16).double(), "float32"),
        (torch.randn(3, 16).bfloat16(), "float32"),
        (torch.randn(3, 16, requires_grad=True), "inference_mode"),
    ]:
        with pytest.raises(LayerError, match=words):
            native.linear(x, program, None, shape)
    with pytest.raises(LayerError, match="bias"):
        native.linear(torch.randn(3, 16), program, torch.randn(9), shape)
    with pytest.raises(LayerError, match="does not divide"):
        native.pack(sparse(6, 16), block=(4, 1))
    with pytest.raises(LayerError, match="groups"):
        native.pack(w, groups=3)
    with pytest.raises(LayerError, match="not finite"):
        native.pack_bits(torch.full((2, 2), float("nan")), torch.int8)
    with pytest.raises(ValueError, match="asked for as"):
        native.linear(torch.randn(3, 16), program, None, (9, 16))
    with pytest.raises(ValueError, match="no packed weight"):
        native.linear(torch.randn(3, 16), torch.zeros(4096, dtype=torch.uint8), None, shape)
    with pytest.raises(ValueError, match="no packed weight"):
        native.linear(torch.randn(3, 16), program[:-1], None, shape)
    with pytest.raises(ValueError, match="cannot run"):
        native.linear(torch.randn(3, 16), program, None, shape, 0, "sse9")
    with pytest.raises(LayerError, match="depthwise weight"):
        native.depthwise(torch.randn(1, 4, 5, 5), torch.randn(4, 2, 3, 3), None, Geometry((3, 3), (1, 1), (1, 1), (1, 1)))
    with pytest.raises(LayerError, match="smaller than"):
        native.conv2d(torch.randn(1, 16, 2, 2), program, None, (8, 16), Geometry((5, 5), (1, 1), (0, 0), (1, 1)))


def test_a_hundred_million_weights_convert_in_seconds():
    import time

    w = sparse(4096, 2048, density=0.2)  # 8.4 million: a twelfth, to keep the suite quick
    start = time.process_time()
    native.pack(w)
    assert time.process_time() - start < 2.5  # five seconds for 100 million is 0.42 here; the margin is for busy machines
