"""Shapes, strides and types worked out without torch are those that torch works out."""

import itertools

import pytest
import torch
from torch import Tensor

from secateur.graph.shapes import SHAPES

A = torch.ops.aten


def of(*shape, dtype=torch.float32):
    return torch.empty(*shape, dtype=dtype, device="meta")


def odd(*shape, dtype=torch.float32):
    """Not packed: the last two dimensions stored the other way round."""
    return of(*shape[:-2], shape[-1], shape[-2], dtype=dtype).transpose(-1, -2)


PAIRS = [
    (of(2, 3, 4), of(2, 3, 4)),
    (of(2, 3, 4), of(4)),
    (of(2, 3, 4), of(3, 1)),
    (of(3, 1), of(2, 3, 4)),
    (of(2, 3, 4), odd(2, 3, 4)),
    (odd(2, 3, 4), odd(2, 3, 4)),
    (odd(2, 3, 4), of(4)),
    (of(2, 3, 4), 2.0),
    (of(2, 3, dtype=torch.int64), 2.0),
    (of(2, 3, dtype=torch.int64), of(2, 3, dtype=torch.int64)),
    (of(2, 3), of(2, 3, dtype=torch.float64)),
    (of(2, 3, dtype=torch.bfloat16), of(2, 3)),
    (of(2, 3, dtype=torch.bfloat16), of(())),
]
ONE = [(of(2, 3, 4),), (odd(2, 3, 4),), (of(5),), (of(2, 3, dtype=torch.float16),), (of(3, 4, dtype=torch.int64),)]
CALLS = [
    *itertools.product([A.add.Tensor, A.sub.Tensor, A.mul.Tensor, A.div.Tensor], PAIRS),
    *itertools.product([A.relu.default, A.silu.default, A.gelu.default, A.sigmoid.default, A.tanh.default], ONE[:4]),
    *itertools.product([A.rsqrt.default, A.neg.default], ONE),
    *((A.hardswish.default, x) for x in ONE[:4]),
    *((A.pow.Tensor_Scalar, (*x, p)) for x in ONE for p in (2, 0.5)),
    *((A._softmax.default, (*x, -1, False)) for x in ONE[:3]),
    (A._softmax.default, (of(2, 3, dtype=torch.float16), -1, False)),
    *((A.masked_fill.Scalar, (x, of(*s, dtype=torch.bool), -1.0)) for x in ONE[0] + ONE[1] for s in [(3, 4), (2, 3, 4)]),
    (A.masked_fill.Scalar, (of(3, 4), of(2, 3, 4, dtype=torch.bool), 0)),
    *((A.mm.default, (a, b)) for a in (of(3, 4), odd(3, 4)) for b in (of(4, 5), odd(4, 5))),
    *((A.addmm.default, (bias, of(3, 4), odd(4, 5))) for bias in (of(5), of(3, 5), of(3, 1), odd(3, 5))),
    *((A.bmm.default, (a, b)) for a in (of(2, 3, 4), odd(2, 3, 4)) for b in (of(2, 4, 5), odd(2, 4, 5))),
    *((A.mean.dim, (x, over, keep)) for x in ONE[0] + ONE[1] for over in ([-1], [0, 1], [-1, -2]) for keep in (True, False)),
    *((A.cat.default, (list(parts), dim)) for parts in ((of(2, 3), of(2, 3)), (of(2, 3), odd(2, 3))) for dim in (0, -1)),
    (A.cat.default, ([of(2, 3), of(2, 3, dtype=torch.float64)], 0)),
    (A.cat.default, ([of(2, 3), of(4, 3)],)),
    *((A.roll.default, (x, [1], [0])) for x in ONE for x in x),
    *((A.clone.default, x) for x in ONE),
    *((A.view.default, (of(2, 3, 4), s)) for s in ([6, 4], [-1, 4], [24], [2, -1, 1, 2])),
    *((A._unsafe_view.default, (of(2, 3, 4), s)) for s in ([6, 4], [-1])),
    *((A.expand.default, (of(2, 1, 4), s)) for s in ([2, 3, 4], [-1, 3, -1], [5, 2, 1, 4])),
    *((A.permute.default, (x, [2, 0, -2])) for x in (of(2, 3, 4), odd(2, 3, 4))),
    *((A.transpose.int, (x, -1, 0)) for x in (of(2, 3, 4), odd(2, 3, 4))),
    *((A.t.default, (x,)) for x in (of(3, 4), odd(3, 4), of(3))),
    *((A.native_layer_norm.default, (x, [4], of(4), of(4), 1e-5)) for x in (of(2, 3, 4), odd(2, 3, 4))),
    (A.native_batch_norm.default, (of(2, 3, 4, 4), *[of(3)] * 4, True, 0.1, 1e-5)),
    *(
        (A.convolution.default, (of(2, 4, 9, 8), of(*w), None, [s], [1], [d], t, [e], g))
        for w, t, g in (((6, 4, 3, 3), False, 1), ((6, 2, 3, 3), False, 2), ((4, 3, 3, 3), True, 2))
        for s, d, e in ((1, 1, 0), (2, 2, 0), (2, 1, 1))
        if t or not e
    ),
]  # fmt: skip


@pytest.mark.parametrize("i", range(len(CALLS)))
def test_as_torch_has_it(i):
    op, args = CALLS[i]
    ours = SHAPES[op](*args)
    if ours is None:  # torch is asked
        return
    made = op(*args)
    made = made if isinstance(made, tuple) else (made,)
    assert [(tuple(s), t) for s, _, t in ours] == [(tuple(m.shape), m.dtype) for m in made]
    for (shape, strides, _), m in zip(ours, made, strict=True):
        real = [d for d, n in enumerate(shape) if n > 1]  # strides of single indices mean nothing
        assert [strides[d] for d in real] == [m.stride(d) for d in real]


def test_every_rule_is_tried_and_most_calls_are_answered():
    assert {op for op, _ in CALLS} == set(SHAPES) - {A.empty.memory_format}
    answered = {op for op, args in CALLS if SHAPES[op](*args) is not None}
    assert answered == {op for op, _ in CALLS}


def test_wrong_shapes_are_left_to_torch():
    for op, args in [
        (A.mm.default, (of(3, 4), of(5, 6))),
        (A.bmm.default, (of(2, 3, 4), of(3, 4, 5))),
        (A.addmm.default, (of(7), of(3, 4), of(4, 5))),
        (A.view.default, (of(2, 3), [4, -1])),
        (A.expand.default, (of(2, 3), [2, 4])),
        (A.cat.default, ([of(2, 3), of(2, 4)], 0)),
        (A.add.Tensor, (of(2, 3), of(2, 4))),
    ]:
        assert SHAPES[op](*args) is None
        with pytest.raises(RuntimeError):
            op(*args)


@pytest.mark.parametrize("more", [{}, {"dtype": torch.uint8}, {"memory_format": torch.channels_last}])
def test_empty_tensors(more):
    ours, made = SHAPES[A.empty.memory_format]([2, 3, 4, 5], **more), torch.empty([2, 3, 4, 5], device="meta", **more)
    assert ours is None or ours == [((2, 3, 4, 5), made.stride(), made.dtype)]
    assert (ours is None) == ("memory_format" in more)


def test_complex_scalars_are_left_to_torch():
    x = of(2, 3)
    assert SHAPES[A.mul.Tensor](x, 2j) is None
    assert isinstance(A.mul.Tensor(x, 2j), Tensor)
