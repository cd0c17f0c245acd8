from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from resnet20 import images, trained
from torch import nn

from secateur.errors import ArtifactError, DataError, LayerError, RecipeError, UnknownName
from secateur.measure.cache import Cache, fingerprint
from secateur.measure.scan import scan
from secateur.progress import listening


def network() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 10), nn.ReLU(), nn.Linear(10, 4))


class Probe:
    """An evaluation that counts its calls and depends on every weight."""

    def __init__(self, stop_after: int | None = None):
        self.calls, self.stop_after = 0, stop_after
        self.x = torch.linspace(-1, 1, 12).reshape(2, 6)

    def __call__(self, model):
        self.calls += 1
        if self.stop_after is not None and self.calls > self.stop_after:
            raise KeyboardInterrupt
        return {"sum": float(model(self.x).detach().sum()), "nonzeros": sum(int(p.count_nonzero()) for p in model.parameters())}


def test_each_point_prunes_one_layer_and_nothing_else():
    model = network().train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    curves = scan(model, evaluate=lambda m: Probe()(m)["nonzeros"], sparsities=[0.5, 0.25])
    total = sum(p.numel() for p in model.parameters())
    assert [c.layer for c in curves] == ["0.weight", "2.weight", "4.weight"]
    assert {c.sparsity for c in curves} == {(0.0, 0.25, 0.5)}
    assert [c.quality for c in curves] == [(total, total - n // 4, total - n // 2) for n in (48, 80, 40)]
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert model.training


def test_the_smallest_weights_go_against_brute_force():
    model, probe = network(), Probe()
    curves = scan(model, evaluate=probe, sparsities=[0.3], layers=["2"])
    weight = model[2].weight.detach()
    smallest = weight.abs().flatten().argsort()[:24]
    with torch.no_grad():
        weight.view(-1)[smallest] = 0
    assert curves[0].quality[1] == probe(model)["sum"]


def test_criteria_that_need_data_collect_once():
    model, batches = network(), [(torch.randn(4, 6), torch.tensor([0, 1, 2, 3]))]
    passes = []

    class Data(list):
        def __iter__(self):
            passes.append(1)
            return super().__iter__()

    curves = scan(model, evaluate=Probe(), data=Data(batches), criterion="taylor", sparsities=(0.2, 0.4, 0.6))
    assert len(curves) == 3
    assert len(passes) == 1
    with pytest.raises(DataError, match="needs calibration data"):
        scan(model, evaluate=Probe(), criterion="taylor")


def test_a_pattern_that_fixes_its_sparsity_is_the_only_point():
    curves = scan(nn.Sequential(nn.Linear(8, 4)), evaluate=lambda m: float(m[0].weight.count_nonzero()), pattern="2:4")
    assert [(c.sparsity, c.quality) for c in curves] == [((0.0, 0.5), (32.0, 16.0))]


def test_tied_weights_are_one_layer_and_come_back():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight
    before = model[0].weight.detach().clone()
    curves = scan(model, evaluate=lambda m: float(m[1].weight.count_nonzero()), sparsities=[0.5])
    assert [c.quality for c in curves] == [(16.0, 8.0)]
    assert torch.equal(model[0].weight, before)
    assert model[1].weight is model[0].weight


def test_a_second_scan_takes_everything_from_the_cache(tmp_path):
    first, second = Probe(), Probe()
    curves = scan(network(), evaluate=first, cache=tmp_path)
    assert first.calls == 1 + 27
    assert scan(network(), evaluate=second, cache=tmp_path) == curves
    assert second.calls == 1
    more = Probe()
    wider = scan(network(), evaluate=more, cache=tmp_path, sparsities=[0.1, 0.5, 0.95])
    assert more.calls == 1 + 3
    assert wider[0].quality[2] == curves[0].quality[5]


@pytest.mark.parametrize("change", ["weight", "bias", "criterion", "pattern", "seed"])
def test_another_model_or_method_does_not_use_it(tmp_path, change):
    model, options = network(), {"sparsities": [0.5], "criterion": "random"}
    scan(model, evaluate=Probe(), cache=tmp_path, **options)
    with torch.no_grad():
        if change == "weight":
            model[4].weight[0, 0] += 1e-6
        if change == "bias":
            model[2].bias[1] += 1e-6
    options |= {"criterion": {"criterion": "magnitude"}, "pattern": {"pattern": "row"}, "seed": {"seed": 1}}.get(change, {})
    probe = Probe()
    assert scan(model, evaluate=probe, cache=tmp_path, **options) == scan(model, evaluate=Probe(), **options)
    assert probe.calls == 4


def test_other_data_does_not_use_it(tmp_path):
    def batches(shift):
        return [(torch.linspace(-1, 1, 24).reshape(4, 6) + shift, torch.tensor([0, 1, 2, 3]))]

    counts = []
    for shift in (0.0, 0.0, 0.5):
        probe = Probe()
        scan(network(), evaluate=probe, data=batches(shift), criterion="taylor", sparsities=[0.5], cache=tmp_path)
        counts.append(probe.calls)
    assert counts == [4, 1, 4]


def test_another_evaluation_does_not_use_it_and_says_so(tmp_path, caplog):
    scan(network(), evaluate=Probe(), sparsities=[0.5], cache=tmp_path)
    curves = scan(network(), evaluate=lambda m: {"sum": 1.0}, sparsities=[0.5], cache=tmp_path)
    assert "not reused" in caplog.text
    assert {c.quality for c in curves} == {(1.0, 1.0)}


def test_interrupted_it_keeps_what_is_done_and_says_how_to_go_on(tmp_path, caplog):
    model = network()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(KeyboardInterrupt):
        scan(model, evaluate=Probe(stop_after=6), cache=tmp_path)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert f"5 of 27 evaluations are kept in {tmp_path}" in caplog.text
    probe = Probe()
    assert scan(model, evaluate=probe, cache=tmp_path) == scan(network(), evaluate=Probe())
    assert probe.calls == 1 + 22
    with pytest.raises(KeyboardInterrupt):
        scan(model, evaluate=Probe(stop_after=1))
    assert "nothing is kept" in caplog.text


def test_a_torn_line_is_ignored_and_the_next_is_whole(tmp_path):
    scan(network(), evaluate=Probe(), sparsities=[0.5], cache=tmp_path)
    file = tmp_path / "scan.jsonl"
    whole = file.read_bytes()
    for cut in (1, 7, len(whole.splitlines()[-1])):
        file.write_bytes(whole[:-cut])
        probe = Probe()
        assert scan(network(), evaluate=probe, sparsities=[0.5], cache=tmp_path) == scan(
            network(), evaluate=Probe(), sparsities=[0.5]
        )
        assert probe.calls == (1 if cut == 1 else 2)  # without its newline alone, the record is still whole
        Cache(str(tmp_path)).put("more", {"q": 1.0})
        assert json.loads(file.read_bytes().splitlines()[-1])["key"] == "more"


CHILD = """
import sys, time, torch
sys.path.insert(0, {tests!r})
torch.set_num_threads(1)
from test_scan_child import network, Probe
from secateur.measure.scan import scan
class Slow(Probe):
    def __call__(self, model):
        time.sleep(0.03)
        return super().__call__(model)
scan(network(), evaluate=Slow(), cache=sys.argv[1])
"""


def test_killed_in_the_middle_it_resumes_and_ends_in_the_same(tmp_path):
    code = CHILD.format(tests=str(tmp_path))
    (tmp_path / "test_scan_child.py").write_text(Path(__file__).read_text().split("def test_each_point")[0])
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    store, kept = tmp_path / "cache", []
    for _ in range(2):
        child = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code), str(store)], env=environment)
        file, goal = store / "scan.jsonl", 6 + len(kept)
        while child.poll() is None and not (file.exists() and file.read_bytes().count(b"\n") >= goal):
            time.sleep(0.01)
        child.send_signal(signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL
        kept = file.read_bytes().splitlines()
        assert goal <= len(kept) < 28
    probe = Probe()
    assert scan(network(), evaluate=probe, cache=store) == scan(network(), evaluate=Probe())
    whole = [line for line in kept if line.endswith(b"}")]
    assert probe.calls == 1 + 28 - len(whole)


def test_progress_and_a_warning_before_long_work(tmp_path, monkeypatch, caplog):
    module = sys.modules[scan.__module__]
    seen = []
    clock = iter(range(0, 100000, 40))
    monkeypatch.setattr(module.time, "monotonic", lambda: next(clock))
    with listening(lambda *event: seen.append(event)), caplog.at_level(logging.INFO, "secateur"):
        scan(network(), evaluate=Probe(), sparsities=[0.5], cache=tmp_path)
    mine = [event for event in seen if event[0] == "scan"]
    assert mine[0] == ("scan", 0, 3, "")
    assert [event[1:3] for event in mine[1:]] == [(1, 3), (2, 3), (3, 3)]
    assert "3 layers at 1 sparsities, 3 evaluations of about 40.0 s: about 2 minutes" in caplog.text


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"sparsities": [0.5, 1.0]}, RecipeError, "remove every weight"),
        ({"sparsities": [1]}, RecipeError, "sparsity"),
        ({"sparsities": []}, RecipeError, "holds none"),
        ({"criterion": "magnitud"}, UnknownName, "Did you mean 'magnitude'"),
        ({"layers": ["9"]}, UnknownName, "unknown layer"),
        ({"ignore": ["*"]}, LayerError, "nothing to prune"),
        ({"layers": ["0"], "pattern": "2:4"}, LayerError, "0.weight"),
        (
            {"evaluate": lambda m: {"b" if (m[2].weight == 0).any() else "a": 1}},
            DataError,
            "gave 'a' .* '2.weight'",
        ),
        ({"evaluate": lambda m: float("nan") if (m[0].weight == 0).any() else 1.0}, DataError, "'0.weight' pruned to 0.1"),
    ],
)
def test_bad_input_is_named_and_leaves_the_model_as_it_was(options, error, words):
    model = network()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(error, match=words):
        scan(model, **{"evaluate": Probe(), **options})
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_cache_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match="cannot use"):
        scan(network(), evaluate=Probe(), cache=tmp_path / "file" / "deeper")


def test_fingerprints_tell_apart_what_differs():
    a, b = torch.arange(6.0), torch.arange(6.0).reshape(2, 3)
    distinct = [a, b, a.double(), a.to(torch.bfloat16), -a, a.to(torch.complex64), b.to_sparse_coo(), "a", 1, {"a": 1}, None]
    assert len({fingerprint(x) for x in distinct}) == len(distinct)
    assert fingerprint(b.t()) == fingerprint(b.t().contiguous())
    assert fingerprint("ab", "c") != fingerprint("a", "bc")
    model = nn.BatchNorm1d(2)
    before = fingerprint(model)
    model.running_var[0] = 2
    assert fingerprint(model) != before


def test_a_real_network():
    model = trained()
    x, labels = images("test", range(0, 10000, 100))

    def accuracy(m):
        return float((m(x).argmax(1) == labels).float().mean())

    curves = scan(model, evaluate=accuracy, sparsities=[0.5, 0.95], layers=["conv1", "layer2.1", "linear"])
    assert [c.layer for c in curves] == ["conv1.weight", "layer2.1.conv1.weight", "layer2.1.conv2.weight", "linear.weight"]
    dense = accuracy(model)
    assert [c.quality[0] for c in curves] == [dense] * 4
    assert curves[0].quality[2] < dense - 0.1  # the first convolution cannot lose 95% of its 432 weights
