from __future__ import annotations

import time

import pytest
import torch
from torch import nn

from secateur.errors import ModelError, RecipeError
from secateur.measure.latency import compare_latency, latency, module_shares


class Sleeper(nn.Module):
    def __init__(self, seconds: float):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.seconds, self.calls, self.saw = seconds, 0, None

    def forward(self, x):
        self.calls += 1
        self.saw = (self.training, torch.is_inference_mode_enabled(), torch.get_num_threads())
        time.sleep(self.seconds)
        return x


def test_the_time_of_a_sleep_and_its_conditions():
    model = Sleeper(0.01).train()
    got = latency(model, torch.zeros(3, 2), runs=5, warmup=2, threads=2)
    assert 10 <= got.low_ms <= got.median_ms <= got.high_ms < 60
    assert (got.runs, got.batch, got.threads, got.dtype, got.device) == (5, 3, 2, "float32", "cpu")
    assert model.calls == 7
    assert model.saw == (False, True, 2)
    assert model.training
    assert torch.get_num_threads() == 1


def test_what_a_model_caches_can_still_be_trained_with():
    class Caching(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.cache = nn.Parameter(torch.ones(2)), None

        def forward(self, x):
            self.cache = torch.ones(2) if self.cache is None else self.cache
            return x * self.weight * self.cache

    model = Caching()
    latency(model, torch.ones(1, 2), runs=2, warmup=1)
    model(torch.ones(1, 2)).sum().backward()
    assert model.weight.grad.tolist() == [1, 1]


def test_as_many_runs_as_fit():
    start = time.perf_counter()
    got = latency(Sleeper(0.005), torch.zeros(1), seconds=0.2)
    assert 3 <= got.runs <= 40
    assert time.perf_counter() - start < 2
    assert latency(Sleeper(0.05), torch.zeros(1), seconds=0.01).runs == 3
    assert latency(nn.Identity(), torch.zeros(1), seconds=0.5).runs <= 1000


def test_models_take_turns():
    order = []

    class Traced(nn.Module):
        def __init__(self, name):
            super().__init__()
            self.name = name

        def forward(self, x):
            order.append(self.name)
            return x

    compare_latency({"a": Traced("a"), "b": Traced("b"), "c": Traced("c")}, torch.zeros(1), runs=3, warmup=1)
    assert order == list("abc" + "abc" + "bca" + "cab")


def test_ratios_within_rounds():
    got = compare_latency({"slow": Sleeper(0.02), "fast": Sleeper(0.005)}, torch.zeros(1), runs=7)
    assert got["slow"].speedup == got["slow"].low == got["slow"].high == 1
    assert 1.5 < got["fast"].low <= got["fast"].speedup <= got["fast"].high
    assert got["fast"].speedup < 6
    assert got["fast"].latency.median_ms < got["slow"].latency.median_ms


def test_a_failing_model_leaves_modes_and_threads_as_they_were():
    model = nn.Linear(3, 2).train()
    with pytest.raises(RuntimeError):
        latency(model, torch.zeros(1, 4), threads=2)
    assert model.training
    assert torch.get_num_threads() == 1


@pytest.mark.parametrize("wrong", [{"runs": 0}, {"warmup": -1}, {"threads": 0}, {"seconds": 0}])
def test_wrong_counts(wrong):
    with pytest.raises(RecipeError, match="must be"):
        latency(nn.Identity(), torch.zeros(1), **wrong)


def test_a_model_without_values():
    with pytest.raises(ModelError, match="meta device"):
        latency(nn.Linear(2, 2, device="meta"), torch.zeros(1, 2))


def test_the_shares_of_modules_are_those_of_their_time():
    model = nn.Sequential(Sleeper(0.006), nn.Sequential(Sleeper(0.002), Sleeper(0.004)), nn.Identity()).train()
    shares = module_shares(model, torch.zeros(1, 2), ["0", "1", "1.1", "2"], runs=5)
    assert shares["0"] == pytest.approx(0.5, abs=0.1)
    assert shares["1"] == pytest.approx(0.5, abs=0.1)
    assert shares["1.1"] == pytest.approx(0.33, abs=0.1)
    assert shares["2"] < 0.1
    assert model.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
