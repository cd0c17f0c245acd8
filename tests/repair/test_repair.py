from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from resnet20 import images, trained, untrained
from torch import nn

from secateur.errors import DataError, NonFiniteError
from secateur.repair import reestimate_norms


def state_of(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


def unchanged(model, before):
    return all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@given(sizes=st.lists(st.integers(2, 9), min_size=1, max_size=5), shift=st.sampled_from([0.0, 1e3]))
def test_the_first_layer_is_exact_whatever_the_batches(sizes, shift):
    torch.manual_seed(1)
    data = torch.randn(sum(sizes), 3, 4, 5) * torch.tensor([0.1, 1.0, 5.0])[:, None, None] + shift
    model = nn.BatchNorm2d(3)
    assert reestimate_norms(model, data.split(sizes)) == 1
    want = data.double()
    torch.testing.assert_close(model.running_mean, want.mean((0, 2, 3)).float())
    torch.testing.assert_close(
        model.running_var, want.var((0, 2, 3), correction=1).float(), rtol=2e-3 if shift else 1e-5, atol=0
    )
    assert model.num_batches_tracked == len(sizes)


@pytest.mark.parametrize(
    ("norm", "shape"),
    [(nn.BatchNorm1d, (6, 3)), (nn.BatchNorm1d, (6, 3, 4)), (nn.BatchNorm3d, (6, 3, 2, 2, 2)), (nn.SyncBatchNorm, (6, 3, 4))],
)
def test_every_kind_of_layer_and_input(norm, shape):
    x, model = torch.randn(shape), norm(3)
    assert reestimate_norms(model, [x]) == 1
    dims = [d for d in range(x.dim()) if d != 1]
    torch.testing.assert_close(model.running_mean, x.mean(dims))
    torch.testing.assert_close(model.running_var, x.var(dims))


def test_one_batch_gives_what_a_training_pass_with_momentum_one_gives():
    torch.manual_seed(0)
    model, x = untrained(), torch.randn(8, 3, 32, 32)
    peer = copy.deepcopy(model).train()
    for module in peer.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    peer(x)
    assert reestimate_norms(model, [x]) == 19
    for (name, got), want in zip(model.named_buffers(), peer.buffers(), strict=True):
        torch.testing.assert_close(got, want, msg=lambda text, name=name: f"{name}: {text}", rtol=1e-4, atol=1e-5)


def test_a_layer_used_twice_pools_both_uses():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(2)

        def forward(self, x):
            self.norm(3 * x)
            return self.norm(x)

    x, model = torch.randn(5, 2), Twice()
    reestimate_norms(model, [x])
    torch.testing.assert_close(model.norm.running_var, torch.cat([3 * x, x]).var(0))


def test_left_alone_and_left_as_it_was(caplog):
    model = nn.Sequential(
        nn.Dropout(0.5), nn.BatchNorm1d(4), nn.BatchNorm1d(4, track_running_stats=False), nn.BatchNorm1d(4, momentum=0.3)
    ).train()
    model.spare = nn.BatchNorm1d(4)
    model.__class__ = type("Skips", (nn.Sequential,), {"forward": lambda self, x: self[3](self[2](self[1](self[0](x))))})
    model[1].weight.requires_grad_(False)
    model[1].eval()
    before, modes = state_of(model), [m.training for m in model.modules()]
    x = torch.randn(64, 4) + 2
    assert reestimate_norms(model, [x]) == 1
    assert "spare" in caplog.text
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {"3.running_mean", "3.running_var", "3.num_batches_tracked"}
    assert [m.training for m in model.modules()] == modes
    assert (model[3].momentum, model[3].track_running_stats, model[2].track_running_stats) == (0.3, True, False)
    # with dropout off and a fresh BN in evaluation mode in front, the input of the last layer is known
    seen = nn.functional.batch_norm(model[1](x), None, None, training=True)
    torch.testing.assert_close(model[3].running_mean, seen.mean(0), atol=1e-5, rtol=1e-4)
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_a_model_frozen_as_a_whole_is_merely_not_training():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).requires_grad_(False)
    assert reestimate_norms(model, [torch.randn(8, 3)]) == 1


def test_limit_and_no_layers():
    model, batches = nn.BatchNorm1d(2), [torch.zeros(4, 2), torch.ones(4, 2)]
    reestimate_norms(model, batches, limit=1)
    assert model.running_mean.tolist() == [0, 0]
    assert reestimate_norms(nn.Linear(2, 2), batches) == 0


@pytest.mark.parametrize(
    ("norm", "bad", "error", "words"),
    [
        (nn.BatchNorm1d(2), torch.randn(1, 2), DataError, "one value per channel"),
        (nn.BatchNorm2d(2), torch.randn(1, 2, 1, 1), DataError, r"shape \(1, 2, 1, 1\)"),
        (nn.BatchNorm1d(2), torch.full((4, 2), 3e38), NonFiniteError, "BatchNorm layer '1'"),
    ],
)
def test_bad_batches_leave_the_model_as_it_was(norm, bad, error, words):
    model = nn.Sequential(nn.Identity(), norm).train()
    before = state_of(model)
    with pytest.raises(error, match=words):
        reestimate_norms(model, [torch.randn(4, *bad.shape[1:]), bad])
    assert unchanged(model, before)
    assert model.training
    assert norm.track_running_stats
    assert not norm._forward_pre_hooks


def test_one_sample_with_positions_is_enough():
    model = nn.BatchNorm2d(2)
    assert reestimate_norms(model, [torch.randn(1, 2, 3, 3)]) == 1


def test_no_data():
    with pytest.raises(DataError, match="gave no batches"):
        reestimate_norms(nn.BatchNorm1d(2), [])


def test_a_pruned_resnet_gets_its_accuracy_back():
    model = trained()
    order = torch.randperm(10000, generator=torch.Generator().manual_seed(0)).tolist()
    calibration, _ = images("train", [5 * i for i in order[:128]])
    x, labels = images("test", order[:250])

    def accuracy():
        with torch.inference_mode():
            return float((model(x).argmax(1) == labels).float().mean())

    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                threshold = module.weight.abs().flatten().kthvalue(int(0.8 * module.weight.numel())).values
                module.weight.mul_(module.weight.abs() > threshold)
    before = accuracy()
    assert reestimate_norms(model, calibration.split(32)) == 19
    assert accuracy() > before + 0.15
