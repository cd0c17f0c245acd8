"""Masks hold under every optimizer and everything users do around one."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import secateur as sc
from secateur.errors import LayerError, TrainingError
from secateur.types import MaskSet

OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.05),
    "SGD momentum decay": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.1),
    "SGD nesterov": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True),
    "SGD fused": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, fused=True),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "Adam decay amsgrad": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1, amsgrad=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "AdamW foreach": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.002, momentum=0.9, centered=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.02, initial_accumulator_value=0.1),
    "Adadelta": lambda p: torch.optim.Adadelta(p, lr=1.0),
    "Adamax": lambda p: torch.optim.Adamax(p, lr=0.01),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=0.01),
    "RAdam": lambda p: torch.optim.RAdam(p, lr=0.01),
    "ASGD": lambda p: torch.optim.ASGD(p, lr=0.05),
    "Rprop": lambda p: torch.optim.Rprop(p, lr=0.001),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=0.02),
    "LBFGS": lambda p: torch.optim.LBFGS(p, lr=0.5, max_iter=4),
    "LBFGS wolfe": lambda p: torch.optim.LBFGS(p, max_iter=4, line_search_fn="strong_wolfe"),
}


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 4))


def masks_of(model, seed=1, density=0.3):
    draw = torch.Generator().manual_seed(seed)
    return MaskSet({n: torch.rand(p.shape, generator=draw) < density for n, p in model.named_parameters() if p.dim() == 2})


def data(seed=2):
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(32, 12, generator=draw)
    return x, (x[:, :4] * 2 + x[:, 4:8]).argmax(1)


def train(model, optimizer, steps=50, seed=2):
    x, y = data(seed)

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    return [optimizer.step(closure).item() for _ in range(steps)]


def assert_held(model, masks):
    for name, mask in masks.items():
        removed = model.get_parameter(name).detach()[~mask]
        assert removed.numel() > 0
        assert torch.equal(removed, torch.zeros_like(removed))
        assert not torch.signbit(removed).any(), f"{name} holds -0.0"


def assert_state_clear(model, optimizer, masks):
    for name, mask in masks.items():
        for key, value in optimizer.state.get(model.get_parameter(name), {}).items():
            if isinstance(value, torch.Tensor) and value.shape == mask.shape and key != "step_size":
                assert not value[~mask].any(), f"{name}: {key}"


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_masks_hold_and_training_goes_on(name):
    model = network()
    masks = masks_of(model)
    optimizer = OPTIMIZERS[name](model.named_parameters())
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with sc.hold(optimizer, masks):
        for _ in range(10):
            losses = train(model, optimizer, steps=5)
            assert_held(model, masks)
        optimizer.state_dict()
        assert_state_clear(model, optimizer, masks)
    assert losses[-1] < F.cross_entropy(masked(network(), masks)(data()[0]), data()[1]).item()
    for n, mask in masks.items():
        assert (model.get_parameter(n).detach()[mask] != before[n][mask]).float().mean() > 0.5, "kept weights did not move"


def test_muon_which_mixes_all_entries_of_a_matrix():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 16, bias=False), nn.ReLU(), nn.Linear(16, 4, bias=False))
    masks = masks_of(model)
    optimizer = torch.optim.Muon(model.named_parameters(), lr=0.02)
    with sc.hold(optimizer, masks):
        losses = train(model, optimizer)
        assert_held(model, masks)
        assert_state_clear(model, optimizer, masks)
    assert losses[-1] < losses[0]


def masked(model, masks):
    masks.apply(model)
    return model


def test_every_dense_optimizer_of_torch_is_tried():
    classes = {n for n, c in inspect.getmembers(torch.optim, inspect.isclass) if n not in ("Optimizer", "SparseAdam", "Muon")}
    assert classes <= {name.split()[0] for name in OPTIMIZERS}


@pytest.mark.parametrize("name", ["Adam decay amsgrad", "SGD nesterov", "RMSprop", "LBFGS wolfe"])
def test_kept_weights_train_as_if_the_mask_were_a_factor_in_the_network(name):
    """The reference: the same network, its weights multiplied by the masks in the forward pass."""
    model, reference = network(), network()
    masks = masks_of(model)
    masks.apply(reference)
    x, y = data()
    optimizer, other = OPTIMIZERS[name](model.named_parameters()), OPTIMIZERS[name](reference.parameters())

    def closure():
        other.zero_grad()
        parameters = {n: p * masks[n] if n in masks else p for n, p in reference.named_parameters()}
        loss = F.cross_entropy(torch.func.functional_call(reference, parameters, x), y)
        loss.backward()
        return loss

    with sc.hold(optimizer, masks):
        losses = train(model, optimizer, steps=15)
    assert losses == pytest.approx([other.step(closure).item() for _ in range(15)], rel=1e-4)
    for n, p in reference.named_parameters():
        torch.testing.assert_close(model.get_parameter(n), p, rtol=1e-3, atol=1e-5)


def test_nothing_is_left_in_the_model_or_the_optimizer():
    model = network()
    keys, optimizer = list(model.state_dict()), torch.optim.Adam(model.named_parameters())
    hooks = {k: len(v) for k, v in vars(optimizer).items() if k.endswith("_hooks")}
    held = sc.hold(optimizer, masks_of(model))
    train(model, optimizer, 2)
    assert list(model.state_dict()) == keys
    for module in model.modules():
        assert not any(v for k, v in vars(module).items() if k.endswith("_hooks"))
        assert not any(p._backward_hooks for p in module.parameters())
    held.release()
    assert {k: len(v) for k, v in vars(optimizer).items() if k.endswith("_hooks")} == hooks
    assert_state_clear(model, optimizer, held.masks)
    train(model, optimizer, 2)
    alive = (model[0].weight != 0).any(1)
    assert (model[0].weight[alive] != 0).float().mean() > 0.9, "released weights train again"


def test_momentum_from_before_does_not_leak_when_masks_come_and_change():
    model = network()
    optimizer = torch.optim.SGD(model.named_parameters(), lr=0.1, momentum=0.9)
    train(model, optimizer, 5)
    first = masks_of(model, 1)
    held = sc.hold(optimizer, first)
    assert_state_clear(model, optimizer, first)
    train(model, optimizer, 5)
    second = masks_of(model, 7)
    held.update(second)
    assert_held(model, second)
    grown = second["0.weight"] & ~first["0.weight"]
    assert grown.any()
    momentum = optimizer.state[model[0].weight]["momentum_buffer"]
    assert not momentum[grown].any()
    train(model, optimizer, 1)
    assert (model[0].weight.detach()[grown] != 0).any(), "weights that came back are trained"
    assert_held(model, second)


def test_lbfgs_keeps_its_history_unless_it_would_move_a_removed_weight():
    model = network()
    optimizer = OPTIMIZERS["LBFGS"](model.named_parameters())
    masks = masks_of(model)
    held = sc.hold(optimizer, masks)
    train(model, optimizer, 3)
    kept = optimizer.state[model[0].weight]["n_iter"]
    held.update(masks)
    assert optimizer.state[model[0].weight]["n_iter"] == kept
    held.update(masks_of(model, 7))
    assert not optimizer.state
    train(model, optimizer, 3)
    assert_held(model, held.masks)


def test_loaded_optimizer_state_is_cleared():
    dense = network()
    other = torch.optim.AdamW(dense.named_parameters())
    train(dense, other, 3)
    model = network()
    masks = masks_of(model)
    optimizer = torch.optim.AdamW(model.named_parameters())
    with sc.hold(optimizer, masks):
        optimizer.load_state_dict(other.state_dict())
        assert optimizer.state[model[0].weight]["exp_avg"].any()
        assert_state_clear(model, optimizer, masks)
        train(model, optimizer, 3)
        assert_held(model, masks)


def test_weights_written_by_the_user_are_cleared_by_the_next_step_or_by_apply():
    model = network()
    masks = masks_of(model)
    optimizer = torch.optim.SGD(model.named_parameters(), lr=0.1)
    with sc.hold(optimizer, masks) as held:
        model.load_state_dict(network(5).state_dict())
        held.apply()
        assert_held(model, masks)
        model.load_state_dict(network(6).state_dict())
        train(model, optimizer, 1)
        assert_held(model, masks)


def test_nan_and_minus_zero_at_removed_weights_become_plus_zero():
    model = network()
    masks = masks_of(model)
    with torch.no_grad():
        model[0].weight[~masks["0.weight"]] = float("nan")
        model[2].weight[~masks["2.weight"]] = -1.0
    optimizer = torch.optim.AdamW(model.named_parameters())
    with sc.hold(optimizer, masks):
        assert_held(model, masks)
        train(model, optimizer, 1)
        model[0].weight.grad[~masks["0.weight"]] = float("inf")
        optimizer.step()
        assert_held(model, masks)
        optimizer.state_dict()
        assert_state_clear(model, optimizer, masks)
        assert model[0].weight.isfinite().all()


def test_averages_of_weights_stay_zero():
    model = network()
    masks = masks_of(model)
    optimizer = torch.optim.AdamW(model.named_parameters(), lr=0.01)
    early = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    with sc.hold(optimizer, masks):
        masks.apply(early.module)
        late, mean = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9)), AveragedModel(model)
        for _ in range(10):
            train(model, optimizer, 1)
            for average in (early, late, mean):
                average.update_parameters(model)
        for average in (early, late, mean):
            assert_held(average.module, masks)
            assert not torch.equal(average.module[0].weight, model[0].weight)


def test_a_deep_copy_is_an_ordinary_pruned_model():
    model = network()
    masks = masks_of(model)
    with sc.hold(torch.optim.Adam(model.named_parameters()), masks) as held:
        twin = copy.deepcopy(model)
        assert_held(twin, masks)
        optimizer = torch.optim.Adam(twin.named_parameters())
        with sc.hold(optimizer, held.masks):
            train(twin, optimizer, 5)
        assert_held(twin, masks)


@pytest.mark.parametrize("names_from", ["optimizer", "model"])
def test_compiled_model(names_from):
    model = network()
    masks = masks_of(model)
    compiled = torch.compile(model, backend="eager")
    if names_from == "model":
        optimizer = torch.optim.AdamW(compiled.parameters(), lr=0.01)
        held = sc.hold(optimizer, masks, model=compiled)
    else:
        optimizer = torch.optim.AdamW(compiled.named_parameters(), lr=0.01)
        held = sc.hold(optimizer, masks)
    with held:
        losses = train(compiled, optimizer, 10)
    assert losses[-1] < losses[0]
    assert_held(model, masks)


def test_masks_made_from_a_compiled_model_fit_the_plain_one():
    model = network()
    masks = masks_of(torch.compile(model, backend="eager"))
    assert all(name.startswith("_orig_mod.") for name in masks)
    optimizer = torch.optim.AdamW(model.named_parameters(), lr=0.01)
    with sc.hold(optimizer, masks):
        train(model, optimizer, 3)
    assert_held(model, {n.removeprefix("_orig_mod."): m for n, m in masks.items()})


@pytest.mark.parametrize("fused", [False, True])
def test_gradient_scaler(fused):
    model = network()
    masks = masks_of(model)
    optimizer = torch.optim.AdamW(model.named_parameters(), lr=0.01, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    x, y = data()
    with sc.hold(optimizer, masks):
        for step in range(10):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = F.cross_entropy(model(x).float(), y)
            scaler.scale(loss).backward()
            if step == 4:
                model[0].weight.grad[0, 0] = float("inf")  # the scaler skips this step
            scaler.step(optimizer)
            scaler.update()
            assert_held(model, masks)
    assert scaler.get_scale() < 1024.0
    assert model[0].weight.isfinite().all()


def test_gradients_are_left_whole_for_methods_that_let_weights_grow_back():
    model = network()
    masks = masks_of(model)
    optimizer = torch.optim.AdamW(model.named_parameters())
    with sc.hold(optimizer, masks) as held:
        train(model, optimizer, 1)
        assert model[0].weight.grad[~masks["0.weight"]].any()
        held.mask_gradients()
        assert not model[0].weight.grad[~masks["0.weight"]].any()


def test_gradient_accumulation_and_clipping():
    model = network()
    masks = masks_of(model)
    optimizer = torch.optim.SGD(model.named_parameters(), lr=1.0)
    x, y = data()
    with sc.hold(optimizer, masks) as held:
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        for part in range(4):
            (F.cross_entropy(model(x[part::4]), y[part::4]) / 4).backward()
        held.mask_gradients()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        assert_held(model, masks)
        moved = torch.cat([(p.detach() - before[n]).flatten() for n, p in model.named_parameters()])
        assert moved.norm().item() == pytest.approx(0.1, rel=1e-3), "removed weights took part in the norm"


def test_parameter_groups_and_a_group_added_later():
    model = network()
    masks = masks_of(model)
    decay = [(n, p) for n, p in model.named_parameters() if p.dim() == 2]
    rest = [(n, p) for n, p in model.named_parameters() if p.dim() != 2]
    optimizer = torch.optim.AdamW([{"params": decay, "weight_decay": 0.1}], lr=0.01)
    with sc.hold(optimizer, masks):
        optimizer.add_param_group({"params": rest, "weight_decay": 0.0})
        train(model, optimizer, 5)
        assert_held(model, masks)


def test_low_precision_and_non_contiguous_weights():
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        model = network().to(dtype)
        model[0].weight = nn.Parameter(model[0].weight.detach().t().contiguous().t())
        assert not model[0].weight.is_contiguous()
        masks = masks_of(model)
        optimizer = torch.optim.SGD(model.named_parameters(), lr=0.05, momentum=0.9)
        with sc.hold(optimizer, masks):
            for _ in range(3):
                optimizer.zero_grad()
                model(data()[0].to(dtype)).square().mean().backward()
                optimizer.step()
        assert_held(model, masks)


def test_model_converted_while_held():
    model = network()
    masks = masks_of(model)
    optimizer = torch.optim.SGD(model.named_parameters(), lr=0.05)
    with sc.hold(optimizer, masks):
        model.double()
        model(data()[0].double()).square().mean().backward()
        optimizer.step()
    assert model[0].weight.dtype == torch.float64
    assert_held(model, masks)


def test_tied_weights_are_held_by_either_name():
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
    model[2].weight = model[0].weight
    mask = torch.eye(6, dtype=torch.bool)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with sc.hold(optimizer, {"2.weight": mask}, model=model):
        model(torch.randn(4, 6)).square().mean().backward()
        optimizer.step()
    assert_held(model, {"0.weight": mask})


def test_errors_say_what_to_do():
    model = network()
    masks = masks_of(model)
    with pytest.raises(TrainingError, match=r"named_parameters\(\).*model=model"):
        sc.hold(torch.optim.SGD(model.parameters(), lr=0.1), masks)
    with pytest.raises(TrainingError, match=r"does not own the masked parameter '2\.weight'"):
        sc.hold(torch.optim.SGD(model[0].parameters(), lr=0.1), masks, model=model)
    with pytest.raises(TrainingError, match=r"'3\.weight'. Did you mean '2\.weight'"):
        sc.hold(torch.optim.SGD(model.named_parameters(), lr=0.1), {"3.weight": masks["2.weight"]})
    with pytest.raises(LayerError, match=r"'0\.weight' is \(16, 12\), its mask \(12, 16\)"):
        sc.hold(torch.optim.SGD(model.named_parameters(), lr=0.1), {"0.weight": masks["0.weight"].t()})
    with pytest.raises(TypeError, match="bool"):
        sc.hold(torch.optim.SGD(model.named_parameters(), lr=0.1), {"0.weight": masks["0.weight"].float()})
    with pytest.raises(TrainingError, match=r"torch\.optim\.Optimizer, got Sequential"):
        sc.hold(model, masks)
    optimizer = torch.optim.SGD(model.named_parameters(), lr=0.1)
    held = sc.hold(optimizer, masks)
    with pytest.raises(TrainingError, match=r"holds masks already.*update"):
        sc.hold(optimizer, masks)
    held.release()
    sc.hold(optimizer, masks).release()


def test_a_refused_mask_changes_nothing():
    model = network()
    before = model[0].weight.detach().clone()
    masks = {"0.weight": torch.zeros(16, 12, dtype=torch.bool), "2.weight": torch.zeros(1, 1, dtype=torch.bool)}
    optimizer = torch.optim.SGD(model.named_parameters(), lr=0.1)
    with pytest.raises(LayerError):
        sc.hold(optimizer, masks)
    assert torch.equal(model[0].weight, before)
    assert not optimizer._optimizer_step_post_hooks
