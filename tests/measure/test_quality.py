from __future__ import annotations

import pytest
import torch
from torch import nn

from secateur.errors import DataError
from secateur.measure.quality import higher_is_better, qualities


@pytest.mark.parametrize("value", [0.5, torch.tensor(0.5), torch.tensor([0.5]), torch.tensor(0.5).numpy()])
def test_a_bare_number_has_a_name(value):
    assert qualities(lambda model: value, nn.Identity()) == {"quality": 0.5}


def test_a_mapping_keeps_its_order_and_becomes_floats():
    got = qualities(lambda model: {"top1": torch.tensor(1), "loss": 2}, nn.Identity())
    assert list(got.items()) == [("top1", 1.0), ("loss", 2.0)]
    assert all(type(v) is float for v in got.values())


@pytest.mark.parametrize(
    "value", [float("nan"), torch.tensor(float("nan")), None, "0.5", {}, {"a": "x"}, {"a": torch.ones(2)}, [0.5]]
)
def test_what_is_no_number_is_refused(value):
    with pytest.raises(DataError, match="evaluate returned"):
        qualities(lambda model: value, nn.Identity())


def test_evaluation_mode_without_gradients_and_restored():
    model = nn.Sequential(nn.Dropout(), nn.Linear(1, 1)).train()
    model[0].eval()
    saw = []
    qualities(lambda m: saw.append((m.training, torch.is_grad_enabled())) or 1.0, model)
    assert saw == [(False, False)]
    assert [m.training for m in model.modules()] == [True, False, True]
    assert torch.is_grad_enabled()


def test_which_way_is_better():
    assert all(higher_is_better(n) for n in ("quality", "accuracy", "top5", "f1"))
    assert not any(higher_is_better(n) for n in ("loss", "val_Loss", "perplexity", "error", "top1_error"))


def test_a_diverged_model_has_an_infinite_perplexity():
    assert qualities(lambda model: {"perplexity": float("inf")}, nn.Identity())["perplexity"] == float("inf")
