"""The calibration pass against explicit sums, and the model that must come out of it untouched."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from contract.criteria_checks import assert_same, snapshot
from torch import nn

from secateur.data.batches import Batches, default_loss, samples_of
from secateur.errors import DataError, LayerError, ModelError, NonFiniteError, RecipeError
from secateur.layers import find_layers
from secateur.progress import listening
from secateur.stats import collect
from secateur.types import Need

ALL = {Need.GRAD, Need.GRAD_SQ, Need.GRAD_ONE, Need.INPUT_NORM, Need.HESSIAN_GRAD, Need.SYNFLOW_GRAD}


def small_cnn() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6), nn.Tanh(), nn.Conv2d(6, 6, 3, groups=3, stride=2),
        nn.Dropout(0.5), nn.Flatten(), nn.Linear(24, 3),
    )  # fmt: skip


def images(n: int = 11) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(n, 2, 6, 6), torch.randint(0, 3, (n,))


def split(x, y, size: int) -> list:
    return [(x[i : i + size], y[i : i + size]) for i in range(0, len(x), size)]


def run(model, data, needs, **keywords):
    return collect(model, find_layers(model)[0], needs, batches=Batches(data), **keywords)


def per_sample(model, data) -> list[dict[str, torch.Tensor]]:
    """Every sample's own gradient, by plain backward passes on a copy in eval mode."""
    model = copy.deepcopy(model).eval()
    found = []
    for batch in data:
        for sample in samples_of(batch):
            model.zero_grad()
            default_loss(model, sample).backward()
            found.append({n: layer.canonical(layer.parameter.grad.clone()) for n, layer in find_layers(model)[0].items()})
    return found


def relative(a, b) -> float:
    return ((a - b).norm() / b.norm()).item()


def test_first_order_statistics_are_the_explicit_sums():
    model, (x, y) = small_cnn(), images()
    data = split(x, y, 4)
    found = run(model, data, ALL - {Need.HESSIAN_GRAD})
    single = per_sample(model, data)
    assert found.samples == 11
    assert found.notes == ()
    for name, stats in found.layers.items():
        gradients = torch.stack([s[name] for s in single]).double()
        assert relative(stats.grad, gradients.mean(0)) < 1e-5
        assert relative(stats.grad_sq, gradients.square().mean(0)) < 1e-5
        assert relative(stats.grad_one, gradients[:4].mean(0)) < 1e-5
        assert stats.samples == 11


@pytest.mark.parametrize("size", [1, 3, 7])
def test_batching_changes_nothing(size):
    model, (x, y) = small_cnn(), images()
    needs = ALL - {Need.GRAD_ONE}
    whole, parts = run(model, [(x, y)], needs), run(model, split(x, y, size), needs)
    for name, a in whole.layers.items():
        b = parts.layers[name]
        for need in needs:
            assert relative(b.need(need), a.need(need)) < 1e-5, (name, need)


def test_hessian_gradient_is_the_explicit_product():
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    x, y = torch.randn(5, 3), torch.randint(0, 2, (5,))
    names = list(find_layers(model)[0])

    def value(*weights):
        return F.cross_entropy(torch.func.functional_call(model, dict(zip(names, weights, strict=True)), (x,)), y)

    weights = tuple(model.get_parameter(n).detach() for n in names)
    gradient = torch.cat([g.flatten() for g in torch.func.grad(value, (0, 1))(*weights)])
    blocks = torch.autograd.functional.hessian(value, weights)
    rows = [torch.cat([b.reshape(w.numel(), -1) for b in row], 1) for w, row in zip(weights, blocks, strict=True)]
    expected = torch.cat(rows) @ gradient
    found = run(model, [(x[:2], y[:2]), (x[2:], y[2:])], {Need.HESSIAN_GRAD})
    got = torch.cat([s.hessian_grad.flatten() for s in found.layers.values()])
    assert relative(got, expected) < 1e-5
    assert all(s.grad is None for s in found.layers.values())


def test_a_loss_linear_in_the_weights_has_no_curvature():
    found = run(nn.Linear(3, 2, bias=False), [torch.randn(4, 3)], {Need.HESSIAN_GRAD}, loss=lambda m, b: m(b).mean())
    assert found.layers["weight"].hessian_grad.count_nonzero() == 0


def test_attention_can_be_differentiated_twice():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    found = run(layer, [torch.randn(2, 3, 8)], {Need.HESSIAN_GRAD}, loss=lambda m, b: m(b).square().mean())
    assert all(s.hessian_grad.count_nonzero() for s in found.layers.values())


def test_vectorised_and_looped_squares_agree(monkeypatch):
    model, (x, y) = small_cnn(), images()
    fast = run(model, [(x, y)], {Need.GRAD_SQ})
    monkeypatch.setattr("secateur.stats.gradients.CHUNK_BYTES", 1)
    slow = run(model, [(x, y)], {Need.GRAD_SQ})
    monkeypatch.setattr("secateur.stats.gradients.CHUNK_BYTES", 4 * 3 * sum(p.numel() for p in model.parameters()))
    chunks = run(model, [(x, y)], {Need.GRAD_SQ})
    for name in fast.layers:
        assert relative(fast.layers[name].grad_sq, slow.layers[name].grad_sq) < 1e-5
        assert relative(chunks.layers[name].grad_sq, slow.layers[name].grad_sq) < 1e-5


def test_what_cannot_be_vectorised_is_looped_and_noted():
    class Branching(nn.Linear):
        def forward(self, x):
            return super().forward(x) if x.sum() > 0 else super().forward(2 * x)

    torch.manual_seed(3)
    model, (x, y) = nn.Sequential(Branching(4, 3)), (torch.randn(6, 4), torch.randint(0, 3, (6,)))
    found = run(model, [(x, y), (x, y)], {Need.GRAD_SQ})
    expected = torch.stack([s["0.weight"] for s in per_sample(model, [(x, y)])]).square().mean(0)
    assert relative(found.layers["0.weight"].grad_sq, expected) < 1e-5
    assert len(found.notes) == 1
    assert "one sample at a time" in found.notes[0]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_as_it_was(mode, training):
    model, (x, y) = small_cnn().train(training), images()
    for i, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(i % 2 == 0)
    model[0].bias.grad = torch.randn(6)
    model[1].eval()
    with mode():
        before = snapshot(model)
        found = run(model, split(x.clone(), y, 4), ALL)
        assert_same(before, snapshot(model))
    assert all(s.need(n) is not None for s in found.layers.values() for n in ALL)
    expected = run(model, split(x, y, 4), ALL)
    for name, stats in found.layers.items():
        assert all(torch.equal(stats.need(n), expected.layers[name].need(n)) for n in ALL)


def test_a_frozen_model_under_no_grad():
    model, (x, y) = small_cnn().requires_grad_(False), images()
    found = run(model, [(x, y)], {Need.GRAD})
    assert all(s.grad.count_nonzero() for s in found.layers.values())
    assert not any(p.requires_grad for p in model.parameters())


def test_parameters_made_in_inference_mode_are_refused():
    with torch.inference_mode():
        model = nn.Linear(3, 2)
    with pytest.raises(ModelError, match="inference_mode"):
        run(model, [(torch.randn(2, 3), torch.tensor([0, 1]))], {Need.GRAD})


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("where", ["forward", "data", "loss"])
def test_an_interrupted_pass_leaves_no_trace(error, where):
    calls = []

    class Raises(nn.Module):
        def forward(self, x):
            calls.append(1)
            if where == "forward" and len(calls) == 2:
                raise error
            return x

    def loss(model, batch):
        value = default_loss(model, batch)
        if where == "loss":
            raise error
        return value

    class Data:
        def __iter__(self):
            yield images(3)
            if where == "data":
                raise error
            yield images(3)

    model = nn.Sequential(small_cnn(), Raises())
    before = snapshot(model)
    with pytest.raises(error):
        run(model, Data(), {Need.GRAD, Need.INPUT_NORM}, loss=loss)
    assert_same(before, snapshot(model))


def test_buffers_that_the_forward_pass_writes_are_restored():
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))
            self.register_buffer("last", torch.zeros(()))
            self.fc = nn.Linear(3, 2)

        def forward(self, x):
            self.calls += 1
            self.last = x.sum()
            return self.fc(x)

    model = Counts()
    data = [(torch.randn(2, 3), torch.tensor([0, 1]))]
    before = snapshot(model)
    run(model, data, ALL)
    assert_same(before, snapshot(model))


def test_modules_see_eval_mode_but_not_the_call_of_eval():
    class Merges(nn.Linear):
        def train(self, mode=True):
            raise AssertionError("mode switched by method")

        def forward(self, x):
            assert not self.training
            return super().forward(x)

    run(nn.Sequential(Merges(3, 2)), [(torch.randn(2, 3), torch.tensor([0, 1]))], {Need.GRAD})


def test_layers_the_loss_does_not_reach_are_named():
    class TwoHeads(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.spare = nn.Linear(3, 2), nn.Linear(3, 2)

        def forward(self, x):
            return self.used(x)

    model, data = TwoHeads(), [(torch.randn(2, 3), torch.tensor([0, 1]))]
    for need in (Need.GRAD, Need.GRAD_ONE, Need.GRAD_SQ, Need.HESSIAN_GRAD, Need.INPUT_NORM, Need.SYNFLOW_GRAD):
        with pytest.raises(LayerError, match=r"'spare.weight'.*ignore="):
            run(model, data, {need})
    found = collect(model, find_layers(model, ignore=["spare"])[0], ALL, batches=Batches(data))
    assert list(found.layers) == ["used.weight"]


def test_a_layer_reached_by_some_batches_counts_zero_in_the_others():
    class Expert(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 2), nn.Linear(3, 2)

        def forward(self, x):
            return self.a(x) if x[0, 0] > 0 else self.b(x)

    model, y = Expert(), torch.tensor([0])
    up, down = torch.tensor([[1.0, 2, 3]]), torch.tensor([[-1.0, 2, 3]])
    found = run(model, [(up, y), (down, y)], {Need.GRAD, Need.GRAD_SQ}).layers
    alone = run(model.a, [(up, y)], {Need.GRAD, Need.GRAD_SQ}).layers["weight"]
    assert torch.allclose(found["a.weight"].grad, alone.grad / 2)
    assert torch.allclose(found["a.weight"].grad_sq, alone.grad_sq / 2)


def test_tied_and_shared_weights_count_every_use():
    first = nn.Linear(3, 3, bias=False)
    tied = nn.Linear(3, 3, bias=False)
    tied.weight = first.weight
    model, x, y = nn.Sequential(first, nn.Tanh(), tied, nn.Tanh(), first), torch.randn(5, 3), torch.tensor([0, 1, 2, 0, 1])
    before = snapshot(model)
    found = run(model, [(x, y)], ALL).layers
    assert_same(before, snapshot(model))
    assert model[0].weight is model[2].weight
    assert isinstance(model[0].weight, nn.Parameter)
    assert list(found) == ["0.weight"]
    inputs = [x, model[:2](x), model[:4](x)]
    expected = sum(i.square().sum(0) for i in inputs).sqrt()[None]
    torch.testing.assert_close(found["0.weight"].input_norm, expected)
    single = per_sample(model, [(x, y)])
    assert relative(found["0.weight"].grad_sq, torch.stack([s["0.weight"] for s in single]).square().mean(0)) < 1e-5


def test_non_contiguous_parameters():
    model = nn.Linear(4, 3)
    model.weight = nn.Parameter(torch.randn(4, 3).t())
    x, y = torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1])
    found = run(model, [(x, y)], ALL).layers["weight"]
    model.weight = nn.Parameter(model.weight.detach().contiguous())
    expected = run(model, [(x, y)], ALL).layers["weight"]
    for need in ALL:
        assert relative(found.need(need), expected.need(need)) < 1e-6


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 0.02), (torch.bfloat16, 0.08)], ids=str)
def test_half_precision_is_summed_in_float32(dtype, tolerance):
    model, (x, y) = small_cnn().to(dtype), images()
    found = run(model, split(x.to(dtype), y, 4), ALL)
    exact = run(copy.deepcopy(model).float(), split(x.to(dtype).float(), y, 4), ALL)
    for name, stats in found.layers.items():
        for need in ALL - {Need.HESSIAN_GRAD}:
            assert stats.need(need).dtype == torch.float32
            assert relative(stats.need(need), exact.layers[name].need(need)) < tolerance, (name, need)


def test_float32_weights_are_not_copied():
    model, (x, y) = small_cnn(), images()
    layers, _ = find_layers(model)
    found = collect(model, layers, {Need.GRAD}, batches=Batches([(x, y)])).layers
    for name, layer in layers.items():
        assert found[name].weight.data_ptr() == layer.parameter.data_ptr()
        assert not found[name].weight.requires_grad


def test_seeds_differ_by_layer_and_seed_but_not_by_the_other_layers():
    model = small_cnn()
    layers, _ = find_layers(model)
    seeds = {n: s.seed for n, s in collect(model, layers, (), seed=1).layers.items()}
    assert len(set(seeds.values())) == len(seeds)
    one = {"6.weight": layers["6.weight"]}
    assert collect(model, one, (), seed=1).layers["6.weight"].seed == seeds["6.weight"]
    assert collect(model, one, (), seed=2).layers["6.weight"].seed != seeds["6.weight"]


def test_snip_alone_reads_one_batch_only():
    read = []

    class Data:
        def __iter__(self):
            for i in range(4):
                read.append(i)
                yield images(3)

    heard = []
    with listening(lambda what, done, total, note: heard.append((done, total))):
        assert run(small_cnn(), Data(), {Need.GRAD_ONE}).samples == 3
    assert read == [0]
    assert heard[-1] == (1, 1)


def test_one_sample_of_one_batch():
    x, y = images(1)
    found = run(small_cnn(), [(x, y)], ALL)
    assert found.samples == 1
    for stats in found.layers.values():
        torch.testing.assert_close(stats.grad_sq, stats.grad.square(), rtol=1e-4, atol=1e-10)


def test_data_is_asked_for():
    model = small_cnn()
    layers, _ = find_layers(model)
    with pytest.raises(DataError, match=r"'grad'.*data="):
        collect(model, layers, {Need.GRAD})
    with pytest.raises(DataError, match="example="):
        collect(model, layers, {Need.SYNFLOW_GRAD})
    with pytest.raises(DataError, match="no batches"):
        collect(model, layers, {Need.GRAD}, batches=Batches([]))
    with pytest.raises(DataError, match="labels"):
        collect(model, layers, {Need.GRAD}, batches=Batches([images()[0]]))
    with pytest.raises(DataError, match="one floating-point number"):
        collect(model, layers, {Need.GRAD}, batches=Batches([images()]), loss=lambda m, b: m(b[0]))


@pytest.mark.parametrize("need", [Need.GRAM, Need.OUTPUT, Need.NORM_SCALE])
def test_a_statistic_that_is_not_collected_is_refused(need):
    with pytest.raises(RecipeError, match=need.value):
        run(small_cnn(), [images()], {need})


def test_no_layers_need_no_data():
    assert collect(nn.ReLU(), {}, ALL, batches=Batches([images()])).layers == {}


class Overflows(nn.Module):
    def forward(self, x):
        return x / (x - x)


@pytest.mark.parametrize("need", [Need.GRAD, Need.INPUT_NORM])
def test_non_finite_activations_are_traced_to_their_module(need):
    model = nn.Sequential(nn.Linear(3, 3), nn.Sequential(Overflows()), nn.Linear(3, 2))
    data = [(torch.randn(2, 3), torch.tensor([0, 1]))]
    before = snapshot(model)
    with pytest.raises(
        NonFiniteError, match=r"batch 0: the output of module '1.0' \(Overflows\), shape \(2, 3\), has 0 NaN and 6"
    ):
        run(model, data, {need})
    assert_same(before, snapshot(model))


def test_non_finite_gradients_losses_and_weights_are_named():
    data = [(torch.zeros(2, 3), torch.tensor([0, 1]))]
    model = nn.Sequential(nn.Linear(3, 2, bias=False))
    with pytest.raises(NonFiniteError, match=r"gradients of layer '0.weight'"):  # the square root of zero has no slope
        run(model, [(data[0][0] + 1, data[0][1])], {Need.GRAD}, loss=lambda m, b: (m(b[0]) * 0).sqrt().sum())
    with pytest.raises(NonFiniteError, match="loss is not finite"):
        run(model, data, {Need.GRAD}, loss=lambda m, b: m(b[0]).sum() + float("nan"))
    with torch.no_grad():
        model[0].weight[0, 0] = float("inf")
    with pytest.raises(NonFiniteError, match=r"'0.weight'.*0 NaN and 1 infinite"):
        run(model, data, {Need.GRAD})


def test_dict_batches_and_models_with_their_own_loss():
    class OwnLoss(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3, 2)

        def forward(self, x, labels):
            logits = self.fc(x)
            return {"logits": logits} if labels is None else Output(F.cross_entropy(logits, labels), logits)

    class Output:
        def __init__(self, loss, logits):
            self.loss, self.logits = loss, logits

    model, x, y = OwnLoss(), torch.randn(4, 3), torch.tensor([0, 1, 1, 0])
    found = run(model, [{"x": x, "labels": y}], {Need.GRAD, Need.GRAD_SQ, Need.INPUT_NORM})
    plain = run(model.fc, [(x, y)], {Need.GRAD, Need.GRAD_SQ, Need.INPUT_NORM}).layers["weight"]
    for need in (Need.GRAD, Need.GRAD_SQ, Need.INPUT_NORM):
        torch.testing.assert_close(found.layers["fc.weight"].need(need), plain.need(need))
    assert found.notes == ()


def test_progress_is_reported():
    heard = []
    with listening(lambda what, done, total, note: heard.append((what, done, total))):
        run(small_cnn(), split(*images(), 4), {Need.GRAD})
    assert heard[0] == ("calibrate", 0, 3)
    assert heard[-1] == ("calibrate", 3, 3)


def test_no_warnings_and_the_same_bits_twice():
    model, (x, y) = small_cnn(), images()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first, second = run(model, [(x, y)], ALL), run(model, [(x, y)], ALL)
    for name, stats in first.layers.items():
        assert all(torch.equal(stats.need(n), second.layers[name].need(n)) for n in ALL)


def test_recurrent_modules_keep_their_weights():
    class Last(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm, self.fc = nn.LSTM(3, 4, batch_first=True), nn.Linear(4, 2)

        def forward(self, x):
            return self.fc(self.lstm(x)[0][:, -1])

    model, data = Last(), [(torch.randn(3, 5, 3), torch.tensor([0, 1, 1]))]
    before = snapshot(model)
    found = run(model, data, ALL - {Need.INPUT_NORM, Need.SYNFLOW_GRAD}).layers
    single = per_sample(model, data)
    for name, stats in found.items():
        assert relative(stats.grad_sq, torch.stack([s[name] for s in single]).square().mean(0)) < 1e-5
    run(model, data, {Need.SYNFLOW_GRAD})
    assert_same(before, snapshot(model))
    assert all(a is b for a, b in zip(model.lstm._flat_weights, model.lstm.parameters(), strict=True))


def test_a_statistic_that_is_zero_throughout_a_layer_is_noted():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU6(), nn.Linear(4, 2))
    with torch.no_grad():
        model[0].bias.fill_(1e6)  # saturated: no gradient passes
    found = run(model, [(torch.randn(4, 3), torch.tensor([0, 1, 1, 0]))], {Need.GRAD, Need.GRAD_SQ})
    assert [("'0.weight'" in n, "'2.weight'" in n) for n in found.notes] == [(True, False)] * 2
