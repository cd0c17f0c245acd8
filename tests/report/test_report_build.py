from __future__ import annotations

import doctest
import getpass
import json
import socket

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from secateur.errors import LayerError
from secateur.report import build, metric, pareto


def test_histogram_counts_like_numpy_and_loses_nothing():
    weight = torch.randn(50, 40)
    weight[:10] = 0
    edges, counts = build.histogram(weight)
    values = weight[weight != 0].numpy()
    assert len(edges) == 41
    assert edges[0] == pytest.approx(-edges[-1])
    assert sum(counts) == values.size == 1600
    assert list(counts) == np.histogram(values, np.array(edges, dtype=np.float32))[0].tolist()


def test_histogram_on_given_edges_counts_outliers_at_the_ends():
    weight = torch.tensor([-9.0, -0.5, 0.0, 0.25, 0.5, 9.0, float("nan"), float("inf")])
    assert build.histogram(weight, edges=(-1.0, 0.0, 1.0)) == ((-1.0, 0.0, 1.0), (2, 3))


def test_histogram_of_one_outlier_still_shows_the_rest():
    weight = torch.cat([torch.randn(10_000), torch.tensor([1e4])])
    edges, counts = build.histogram(weight)
    assert edges[-1] < 1e4
    assert sum(counts) == 10_001


@pytest.mark.parametrize("weight", [torch.zeros(3, 3), torch.zeros(0, 3), torch.full((2,), float("nan"))])
def test_histogram_of_nothing(weight):
    edges, counts = build.histogram(weight, bins=4)
    assert edges == (-1.0, -0.5, 0.0, 0.5, 1.0)
    assert counts == (0, 0, 0, 0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_histogram_of_other_floats(dtype):
    assert sum(build.histogram(torch.ones(4, 4, dtype=dtype).t())[1]) == 16


@pytest.mark.parametrize("edges", [(), (1.0,), (1.0, 0.0)])
def test_histogram_refuses_edges_that_do_not_rise(edges):
    with pytest.raises(LayerError, match="rising"):
        build.histogram(torch.ones(2), edges=edges)


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 9), st.integers(0, 2**31))
def test_picture_is_the_exact_area_mean(rows, columns, cells, seed):
    mask = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) < 0.4
    found = np.array(build.picture(mask, cells))
    high, wide = min(rows, cells), min(columns, cells)
    assert found.shape == (high, wide)
    repeated = np.kron(mask.numpy(), np.ones((high, wide)))  # a multiple of both grids: plain block means are exact there
    expected = repeated.reshape(high, rows, wide, columns).mean(axis=(1, 3))
    assert np.abs(found - expected).max() <= 5.1e-4
    assert found.mean() == pytest.approx(mask.float().mean().item(), abs=1e-3)


def test_picture_shows_small_masks_as_they_are():
    mask = torch.rand(5, 2, 3, 1) < 0.5
    assert np.array_equal(np.array(build.picture(mask)), mask.reshape(5, 6).numpy().astype(float))
    assert build.picture(torch.tensor([True, False])) == ((1.0, 0.0),)
    assert build.picture(torch.tensor(True)) == ((1.0,),)
    assert build.picture(torch.zeros(0, 3, dtype=torch.bool)) == ()
    with pytest.raises(LayerError):
        build.picture(mask, cells=0)


def test_picture_of_many_rows_does_not_depend_on_how_they_are_split():
    mask = torch.zeros(1000, 130, dtype=torch.bool)
    mask[500:, :65] = True
    found = np.array(build.picture(mask, cells=2))
    assert np.array_equal(found, [[0, 0], [1, 0]])


def test_layer_report():
    weight = torch.tensor([[1.0, -2.0], [3.0, -4.0]])
    mask = torch.tensor([[False, True], [True, True]])
    found = build.layer_report("fc.weight", weight, mask, "element", error=0.1)
    assert (found.shape, found.parameters, found.kept, found.pattern, found.error) == ((2, 2), 4, 3, "element", 0.1)
    assert found.sparsity == 0.25
    assert found.histogram_before[0] == found.histogram_after[0]
    assert (sum(found.histogram_before[1]), sum(found.histogram_after[1])) == (4, 3)
    assert found.picture == ((0.0, 1.0), (1.0, 1.0))
    repaired = build.layer_report("fc.weight", weight, mask, "element", weight_after=weight / 2)
    assert repaired.histogram_before == found.histogram_before
    assert repaired.histogram_after == build.histogram(weight / 2 * mask, edges=found.histogram_before[0])
    with pytest.raises(LayerError, match=r"'fc.weight'.*\(2,\)"):
        build.layer_report("fc.weight", weight, mask[0], "element")


def test_environment_has_what_figures_depend_on_and_names_nobody():
    found = build.environment(seed=7)
    assert {"Secateur", "PyTorch", "Python", "Processor", "Cores", "Threads", "System", "Seed", "Date"} <= set(found)
    assert found["PyTorch"] == torch.__version__
    assert found["Seed"] == "7"
    assert found["Date"].endswith(" UTC")
    assert build.environment()["Seed"] == "not set"
    words = json.dumps(found).replace("/", " ").split()
    assert socket.gethostname() not in words
    assert getpass.getuser() not in words
    assert "/" not in found["System"].replace("GNU/Linux", "")


@pytest.mark.parametrize("module", [build, metric, pareto])
def test_docstring_examples(module):
    result = doctest.testmod(module)
    assert (result.failed, result.attempted > 0) == (0, True)
