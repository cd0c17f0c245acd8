from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from secateur.graph.labels import Labels, concatenate, refinement


def leaves_kept(labels: Labels, removed) -> np.ndarray:
    labels.close()
    return labels.kept(labels.find(np.asarray(removed, dtype=np.int64)))


@given(st.lists(st.tuples(st.integers(0, 29), st.integers(0, 29)), max_size=40))
def test_union_find_agrees_with_brute_force(pairs):
    labels = Labels()
    own = labels.fresh(30)
    sets = [{i} for i in range(30)]
    for a, b in pairs:
        labels.union(own[[a]], own[[b]])
        merged = sets[a] | sets[b]
        for i in merged:
            sets[i] = merged
    roots = labels.find(own)
    for i in range(30):
        for j in range(30):
            assert (roots[i] == roots[j]) == (j in sets[i])


def test_many_unions_at_once_chain_through_each_other():
    labels = Labels()
    own = labels.fresh(1000)
    labels.union(own[:-1], own[1:])
    assert len(np.unique(labels.find(own))) == 1


def test_an_index_of_a_split_dimension_goes_when_its_row_or_its_column_goes():
    labels = Labels()
    whole = labels.fresh(12)
    rows, columns = labels.split(whole, (3, 4))
    kept = leaves_kept(labels, [rows[1], columns[0]])
    assert kept[whole].reshape(3, 4).tolist() == [[False, True, True, True], [False] * 4, [False, True, True, True]]


def test_merge_undoes_split():
    labels = Labels()
    whole = labels.fresh(12)
    assert np.array_equal(labels.merge(labels.split(whole, (3, 4)), (3, 4)), whole)


def test_two_splits_of_one_dimension_share_their_factors():
    labels = Labels()
    a, b = labels.fresh(12), labels.fresh(12)
    first, second = labels.split(a, (3, 4)), labels.split(b, (3, 4))
    labels.union(a, b)
    labels.close()
    for x, y in zip(first, second, strict=True):
        assert np.array_equal(labels.find(x), labels.find(y))


def test_splits_of_different_sizes_meet_in_their_refinement():
    labels = Labels()
    whole = labels.fresh(24)
    other = labels.fresh(24)
    coarse, fine = labels.split(whole, (4, 6)), labels.split(other, (2, 12))
    labels.union(whole, other)
    kept = leaves_kept(labels, [])
    assert kept.all()
    roots = labels.find(np.arange(labels.count))
    inner = coarse[1]
    kept = labels.kept(roots[inner[:1]])
    assert kept[whole].reshape(4, 6)[:, 0].tolist() == [False] * 4
    assert np.array_equal(kept[fine[1]], kept[whole].reshape(2, 12)[0])


def test_splits_without_refinement_keep_their_longest_axis_only():
    labels = Labels()
    whole, other = labels.fresh(12), labels.fresh(12)
    first = labels.split(whole, (3, 4))
    labels.split(other, (4, 3))
    labels.union(whole, other)
    labels.close()
    frozen = {int(i) for own, _ in labels.frozen for i in labels.find(own)}
    assert {int(i) for i in labels.find(first[0])} <= frozen


def test_repeated_labels_come_back_whole():
    labels = Labels()
    channels = labels.fresh(5)
    flat = labels.merge([channels, None], (5, 9))
    assert np.array_equal(flat, np.repeat(channels, 9))
    back, space = labels.split(flat, (5, 9))
    assert np.array_equal(back, channels)
    assert space is None


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [((4, 6), (2, 12), (2, 2, 6)), ((12,), (3, 4), (3, 4)), ((6, 4), (4, 6), None), ((2, 3), (2, 3), (2, 3))],
)
def test_refinement(a, b, expected):
    assert refinement(a, b) == expected


def test_concatenate_lays_kept_labels_for_none():
    labels = Labels()
    own = labels.fresh(2)
    assert concatenate([(own, 2), (None, 3)]).tolist() == [*own.tolist(), 0, 0, 0]
    assert concatenate([(None, 2), (None, 3)]) is None
