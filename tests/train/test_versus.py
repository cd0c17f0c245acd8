"""Large and sparse against small and dense: equal nonzeros, equal training, and the picture."""

from __future__ import annotations

import json
from xml.etree import ElementTree

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from typer.testing import CliRunner

from secateur.cli.app import app
from secateur.data import accuracy
from secateur.errors import ModelError, RecipeError, TrainingError
from secateur.report.contest import contest_table, draw, means
from secateur.train.versus import versus

MODEL = """
from torch import nn
def make(width=24):
    return nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, 3))
def batches():
    import torch
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(256, 6, generator=draw)
    return [(x[i : i + 32], x[i : i + 32, :3].argmax(1)) for i in range(0, 256, 32)]
"""


def make(width):
    return nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, 3))


def batches():
    x = torch.randn(256, 6, generator=torch.Generator().manual_seed(0))
    return [(x[i : i + 32], x[i : i + 32, :3].argmax(1)) for i in range(0, 256, 32)]


@pytest.fixture(scope="module")
def rows():
    return versus(make, 24, batches(), accuracy(batches()), sparsities=[0.5, 0.8], epochs=8, lr=3e-2, seeds=2)


def test_nonzeros_are_equal_and_the_small_one_has_no_fewer(rows):
    assert [(r.size, r.sparsity, r.seed) for r in rows[:2]] == [(24, 0.0, 0), (24, 0.5, 0)]
    assert len(rows) == 2 * 5
    weights = 24 * 6 + 24 * 3
    for sparse, dense in ((rows[1], rows[2]), (rows[3], rows[4])):
        assert sparse.nonzeros == sparse.parameters - round(sparse.sparsity * weights)
        assert dense.sparsity == 0.0
        per = 6 + 1 + 3  # parameters that each hidden neuron brings
        assert 0 <= dense.parameters - sparse.nonzeros < per


def test_everything_learns_and_seeds_differ(rows):
    assert all(row.quality["accuracy"] > 0.7 for row in rows)
    assert rows[0].quality != rows[5].quality or rows[2].quality != rows[7].quality


def test_the_same_seed_gives_the_same_networks(rows):
    again = versus(make, 24, batches(), accuracy(batches()), sparsities=[0.5], epochs=8, lr=3e-2)
    assert again == rows[:3]


def test_the_global_random_state_and_the_first_networks_stay(rows):
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    versus(make, 12, batches(), accuracy(batches()), sparsities=[0.5], epochs=2)
    assert torch.equal(torch.rand(3), wanted)


def test_means_and_the_picture(rows, tmp_path):
    assert [len(values) for _, values in means(rows)] == [2] * 5
    path = draw(rows, tmp_path / "a", title="net <1>")
    text = "".join(ElementTree.parse(path).getroot().itertext())
    assert "large, pruned" in text
    assert "net <1>" in text
    assert [r["nonzeros"] for r in json.loads((tmp_path / "a" / "versus.json").read_text())] == [r.nonzeros for r in rows]
    assert contest_table(rows).row_count == 5


def test_what_cannot_be_is_refused():
    keys = {"batches": batches(), "evaluate": accuracy(batches())}
    with pytest.raises(RecipeError, match="above 0"):
        versus(make, 24, sparsities=[0.0], **keys)
    with pytest.raises(RecipeError, match="count from 1"):
        versus(make, 24, epochs=0, **keys)
    with pytest.raises(ModelError, match="no network smaller than size 1"):
        versus(lambda width: nn.Linear(6, 3), 1, sparsities=[0.5], **keys)
    with pytest.raises(TrainingError, match="nan at step 1"):
        versus(make, 24, sparsities=[0.5], loss=lambda m, b: F.cross_entropy(m(b[0]), b[1]) * float("nan"), **keys)


def test_the_command_compares_and_draws(tmp_path):
    file = tmp_path / "net.py"
    file.write_text(MODEL)
    options = ["--train", f"{file}:batches", "--test", f"{file}:batches", "-s", "0.8", "--epochs", "4", "--json"]
    done = CliRunner().invoke(app, ["versus", f"{file}:make?width=24", *options, "--out", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    assert [r["sparsity"] for r in json.loads(done.stdout)] == [0.0, 0.8, 0.0]
    assert (tmp_path / "out" / "versus.svg").stat().st_size > 1000
    refused = CliRunner().invoke(app, ["versus", f"{file}:make", *options])
    assert isinstance(refused.exception, ModelError)
    assert "?width=256" in str(refused.exception)
