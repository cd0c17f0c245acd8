"""Fine-tuning: recovery after pruning, order and rates, what stops it, and resuming to the same bits."""

from __future__ import annotations

import copy
import doctest
import math
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from torch import nn
from train.resumable import digits, digits_network, run

from secateur.data.batches import Batches
from secateur.errors import ArtifactError, DataError, Interrupted, RecipeError, TrainingError, UnknownName
from secateur.progress import listening
from secateur.train import loop
from secateur.train.finetune import finetune
from secateur.types import MaskSet


@pytest.fixture(scope="module")
def trained():
    """A perceptron trained on half of the digits, and the other half."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    train, test = digits()
    model = digits_network()
    finetune(model, train, epochs=20, lr=0.01, seed=0)
    return model, train, test


def accuracy(model, batches):
    with torch.no_grad():
        right = [(model.eval()(x).argmax(1) == y).float() for x, y in batches]
    return torch.cat(right).mean().item()


def magnitude_masks(model, sparsity):
    weights = {n: p.detach().abs() for n, p in model.named_parameters() if p.dim() == 2}
    cut = torch.cat([w.flatten() for w in weights.values()]).quantile(sparsity)
    return MaskSet({n: w > cut for n, w in weights.items()})


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.mark.parametrize(("optimizer", "lr"), [("adamw", 0.01), ("sgd", 0.1)])
def test_fine_tuning_recovers_what_magnitude_pruning_lost(trained, optimizer, lr):
    dense, train, test = trained
    assert accuracy(dense, test) > 0.93
    model = copy.deepcopy(dense)
    masks = magnitude_masks(model, 0.9)
    masks.apply(model)
    pruned = accuracy(model, test)
    history = finetune(model, train, masks=masks, epochs=12, optimizer=optimizer, lr=lr, warmup=0.1, weight_decay=0.01)
    repaired = accuracy(model, test)
    assert pruned < accuracy(dense, test) - 0.15
    assert repaired > pruned + 0.15
    assert repaired > accuracy(dense, test) - 0.04
    assert len(history.epochs) == 12
    assert history.loss < history.epochs[0].loss
    for name, mask in masks.items():
        assert not model.get_parameter(name).detach()[~mask].any()


def test_same_seed_same_bits_and_the_users_random_state_untouched(trained):
    dense, train, _ = trained
    models = [copy.deepcopy(dense) for _ in range(3)]
    state = torch.get_rng_state()
    for model, seed in zip(models, (1, 1, 2), strict=True):
        finetune(model, train, steps=7, seed=seed)
    assert torch.equal(torch.get_rng_state(), state)
    assert same(models[0], models[1])
    assert not same(models[0], models[2]), "dropout follows the seed"


def test_modes_and_gradients_are_as_before(trained):
    model = copy.deepcopy(trained[0])
    model.eval()
    model[1].train()
    finetune(model, trained[1], steps=2, evaluate=lambda m: float(m.training))
    assert [m.training for m in model] == [False, True, False, False]
    assert all(p.grad is None for p in model.parameters())


def test_frozen_parameters_stay_and_frozen_masks_are_applied(trained):
    model = copy.deepcopy(trained[0])
    model[0].weight.requires_grad_(False)
    masks = magnitude_masks(model, 0.5)
    before = model[0].weight.detach().clone()
    finetune(model, trained[1], masks=masks, steps=3)
    assert torch.equal(model[0].weight, before * masks["0.weight"])
    assert not torch.equal(model[3].weight, trained[0][3].weight)


def test_history_evaluation_progress_and_callback(trained):
    seen, said = [], []
    with listening(lambda *word: said.append(word)):
        history = finetune(
            copy.deepcopy(trained[0]), trained[1], epochs=2, lr=0.001, on_epoch=seen.append, evaluate=lambda m: {"acc": 0.5}
        )
    assert tuple(seen) == history.epochs
    assert [(e.epoch, e.steps, e.quality) for e in seen] == [(1, 15, {"acc": 0.5}), (2, 30, {"acc": 0.5})]
    assert [word[:3] for word in said] == [("fine-tune", k, 30) for k in range(31)]
    assert said[20][3].startswith("epoch 2, loss ")
    assert "lr " in said[20][3]


def test_learning_rate_rises_and_falls_as_half_a_cosine():
    rate = loop.Rate(0.1, 0.25, 40)
    rates = [rate(step) for step in range(40)]
    assert rates[:10] == pytest.approx([0.01 * (k + 1) for k in range(10)])
    assert rates[10:] == pytest.approx([0.05 * (1 + math.cos(math.pi * k / 30)) for k in range(30)])
    assert doctest.testmod(loop).failed == 0


def test_the_rate_reaches_the_optimizer_and_clip_bounds_the_step():
    model = nn.Linear(4, 1, bias=False)
    before = model.weight.detach().clone()
    batch = (torch.full((8, 4), 1e3), torch.zeros(8))
    finetune(
        model,
        [batch],
        steps=1,
        optimizer="sgd",
        momentum=0.0,
        lr=0.5,
        clip=0.2,
        loss=lambda m, b: (m(b[0]) - 7).square().mean(),
    )
    assert (model.weight - before).norm().item() == pytest.approx(0.5 * 0.2, rel=1e-4)


def test_removed_weights_take_no_part_in_the_clipped_norm():
    model = nn.Linear(4, 1, bias=False)
    mask = torch.tensor([[True, False, False, False]])
    batch = (torch.full((8, 4), 1e3), torch.zeros(8))
    before = model.weight.detach()[0, 0].item()
    finetune(
        model, [batch], masks=MaskSet({"weight": mask}), steps=1, optimizer="sgd", momentum=0.0, lr=0.5, clip=0.2,
        loss=lambda m, b: (m(b[0]) - 7).square().mean(),
    )  # fmt: skip
    assert abs(model.weight[0, 0].item() - before) == pytest.approx(0.5 * 0.2, rel=1e-4)


class Source:
    """Batches whose order follows a seed."""

    def __init__(self, order=(0, 1, 2, 3)):
        self.order = order

    def __iter__(self):
        return iter([(torch.full((2, 3), float(i)), torch.zeros(2, dtype=torch.long)) for i in self.order])

    def __len__(self):
        return 4

    def shuffled(self, seed):
        return Source(torch.randperm(4, generator=torch.Generator().manual_seed(seed)).tolist())


@pytest.mark.parametrize("wrap", [lambda s: s, Batches])
def test_order_is_drawn_anew_for_each_epoch_from_the_seed(wrap):
    def orders(seed):
        seen = []
        model = nn.Linear(3, 2)

        def loss(m, batch):
            seen.append(int(batch[0][0, 0]))
            return m(batch[0]).square().mean()

        finetune(model, wrap(Source()), epochs=6, loss=loss, seed=seed)
        return [seen[i : i + 4] for i in range(0, 24, 4)]

    first = orders(0)
    assert all(sorted(order) == [0, 1, 2, 3] for order in first)
    assert len({tuple(order) for order in first}) > 1
    assert orders(0) == first
    assert orders(1) != first


def test_batches_without_a_length_are_counted():
    class Endless:
        def __iter__(self):
            return iter([torch.ones(2, 3)] * 5)

    history = finetune(nn.Linear(3, 2), Endless(), epochs=2, loss=lambda m, b: m(b).square().mean())
    assert [e.steps for e in history.epochs] == [5, 10]
    generator = (torch.ones(2, 3) for _ in range(3))
    assert finetune(nn.Linear(3, 2), generator, epochs=2, loss=lambda m, b: m(b).square().mean()).epochs[-1].steps == 6


def test_data_that_ends_early_is_refused():
    class Liar:
        def __len__(self):
            return 9

        def __iter__(self):
            return iter([torch.ones(2, 3)] * 4)

    with pytest.raises(DataError, match="epoch 1 of the training data ended after 4 batches; 9 were expected"):
        finetune(nn.Linear(3, 2), Liar(), loss=lambda m, b: m(b).square().mean())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_puts_the_last_good_state_back(trained, bad):
    model, clean = copy.deepcopy(trained[0]), copy.deepcopy(trained[0])
    masks = magnitude_masks(model, 0.9)
    calls = []

    def loss(m, batch):
        calls.append(1)
        value = nn.functional.cross_entropy(m(batch[0]), batch[1])
        return value * bad if len(calls) == 38 else value

    with pytest.raises(TrainingError, match=r"step 38 of 60 \(epoch 3, lr .*after epoch 2.*lr=0\.0003.*clip"):
        finetune(model, trained[1], masks=masks, epochs=4, lr=3e-3, loss=loss)
    with pytest.raises(StopIteration):
        finetune(clean, trained[1], masks=masks, epochs=4, lr=3e-3, on_epoch=stop_after_two)
    assert same(model, clean)


def stop_after_two(epoch):
    if epoch.epoch == 2:
        raise StopIteration


def test_weights_that_break_in_the_last_step_are_noticed(trained):
    model = copy.deepcopy(trained[0])

    def loss(m, batch):
        m[0].weight.register_hook(lambda g: g * float("nan"))
        return nn.functional.cross_entropy(m(batch[0]), batch[1])

    with pytest.raises(TrainingError, match=r"weight '0\.weight' holds NaN.*before the training"):
        finetune(model, trained[1], steps=1, loss=loss)
    assert same(model, trained[0])


def test_nan_before_any_training_says_so(trained):
    with pytest.raises(TrainingError, match="before anything was trained"):
        finetune(copy.deepcopy(trained[0]), trained[1], loss=lambda m, b: m(b[0]).mean() * float("nan"))


def test_bad_arguments(trained):
    model, train, _ = trained
    for name, value in {
        "epochs": 0,
        "steps": 0,
        "lr": 0.0,
        "momentum": 1.0,
        "warmup": 1.5,
        "clip": 0.0,
        "weight_decay": -1,
    }.items():
        with pytest.raises(RecipeError, match=f"{name} must be"):
            finetune(model, train, **{name: value})
    with pytest.raises(UnknownName, match="Did you mean 'adamw'"):
        finetune(model, train, optimizer="adam")
    with pytest.raises(TrainingError, match="one number, got a tensor of shape"):
        finetune(copy.deepcopy(model), train, loss=lambda m, b: m(b[0]))
    with pytest.raises(TrainingError, match="got a float"):
        finetune(copy.deepcopy(model), train, loss=lambda m, b: 0.5)
    with pytest.raises(TrainingError, match="does not depend"):
        finetune(copy.deepcopy(model), train, loss=lambda m, b: m(b[0]).detach().mean())
    frozen = copy.deepcopy(model).requires_grad_(False)
    with pytest.raises(TrainingError, match="Unfreeze"):
        finetune(frozen, train)
    with pytest.raises(DataError):
        finetune(model, [])


# Stopping and resuming -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    torch.set_num_threads(1)
    return run(tmp_path_factory.mktemp("whole") / "state.safetensors")


def finished(path):
    """What a run that starts from `path` ends with."""
    return run(path)


def assert_same_run(ours, theirs):
    model, history = ours
    assert same(model, theirs[0])
    assert history == theirs[1]


def test_a_checkpoint_changes_nothing_and_a_finished_run_is_not_run_again(uninterrupted, tmp_path):
    assert_same_run(run(None), uninterrupted)
    path = tmp_path / "state.safetensors"
    run(path)
    assert [p.name for p in tmp_path.iterdir()] == ["state.safetensors"]
    assert_same_run(run(path, loss=None_called), uninterrupted)


def None_called(model, batch):
    raise AssertionError("a finished run trains no more")


@pytest.mark.parametrize("kill_at", [1, 7, 15, 16, 29, 44])
def test_stopped_at_any_step_it_ends_in_the_same_bits(uninterrupted, tmp_path, monkeypatch, kill_at):
    """An exception out of step `kill_at` stands for the kill; every step is saved."""
    monkeypatch.setattr(loop, "_SAVE_EVERY_S", 0.0)
    path = tmp_path / "state.safetensors"
    with pytest.raises(SystemExit):
        run(path, stop_at=kill_at)
    assert_same_run(finished(path), uninterrupted)


def child(path, *, every_s="0", pause_at=0):
    pipe, script = subprocess.PIPE, str(Path(__file__).parent / "resumable.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, script, str(path), every_s, str(pause_at)]
    return subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, stderr=pipe, text=True)


def wait_for_steps(process, steps):
    for line in process.stdout:
        if line.strip() == f"step {steps}":
            return
    raise AssertionError(process.stderr.read())


@pytest.mark.parametrize("steps", [3, 20, 33])
def test_killed_process_resumes_to_the_same_bits(uninterrupted, tmp_path, steps):
    path = tmp_path / "state.safetensors"
    process = child(path)
    wait_for_steps(process, steps)
    time.sleep(steps % 7 / 1000)  # somewhere in a step, or in the middle of a save
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert path.exists()
    assert_same_run(finished(path), uninterrupted)


def test_ctrl_c_saves_and_says_how_to_go_on(uninterrupted, tmp_path):
    path = tmp_path / "state.safetensors"
    process = child(path, every_s="1000", pause_at=9)
    wait_for_steps(process, 9)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate("go on\n", timeout=60)
    assert process.returncode == 130, errors
    assert "stopped after step 9 of 45" in errors
    assert str(path) in errors
    assert_same_run(finished(path), uninterrupted)


def test_ctrl_c_in_this_process_restores_the_handler(tmp_path, trained):
    path = tmp_path / "state.safetensors"
    model = copy.deepcopy(trained[0]).eval()

    def loss(m, batch):
        signal.raise_signal(signal.SIGINT)
        return nn.functional.cross_entropy(m(batch[0]), batch[1])

    with pytest.raises(Interrupted, match="stopped after step 1 of 15"):
        finetune(model, trained[1], loss=loss, checkpoint=path)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert not model.training
    with pytest.raises(KeyboardInterrupt) as without:
        finetune(model, trained[1], loss=loss)
    assert not isinstance(without.value, Interrupted), "without a checkpoint Ctrl-C is the usual one"


def test_a_second_ctrl_c_stops_at_once(tmp_path, trained):
    def loss(m, batch):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt) as stopped:
        finetune(copy.deepcopy(trained[0]), trained[1], loss=loss, checkpoint=tmp_path / "s")
    assert not isinstance(stopped.value, Interrupted)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_handlers_of_the_users_and_other_threads_are_left_alone(tmp_path, trained):
    mine = signal.signal(signal.SIGINT, lambda *_: None)
    try:
        handler = signal.getsignal(signal.SIGINT)
        seen = []
        finetune(
            copy.deepcopy(trained[0]),
            trained[1],
            checkpoint=tmp_path / "a",
            on_epoch=lambda _: seen.append(signal.getsignal(signal.SIGINT)),
        )
        assert seen == [handler]
    finally:
        signal.signal(signal.SIGINT, mine)
    errors = []

    def work():
        try:
            finetune(copy.deepcopy(trained[0]), trained[1], steps=2, checkpoint=tmp_path / "b")
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not errors


def test_a_loader_with_its_own_generator_resumes_in_its_own_order(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "_SAVE_EVERY_S", 0.0)

    def go(path, stop_at=None):
        loader = torch.utils.data.DataLoader(
            torch.utils.data.TensorDataset(torch.arange(32.0).view(16, 2)),
            batch_size=4,
            shuffle=True,
            generator=torch.Generator().manual_seed(5),
        )
        torch.manual_seed(0)
        model, seen = nn.Linear(2, 1), []

        def loss(m, batch):
            if len(seen) == stop_at:
                raise SystemExit
            seen.append(batch[0].flatten().tolist())
            return m(batch[0]).square().mean()

        finetune(model, loader, epochs=3, loss=loss, checkpoint=path)
        return model, seen

    whole, order = go(None)
    for stop_at in (2, 6, 8):
        path = tmp_path / f"{stop_at}"
        with pytest.raises(SystemExit):
            go(path, stop_at)
        model, rest = go(path)
        assert rest == order[stop_at:]
        assert same(model, whole)


def test_a_checkpoint_of_another_run_is_refused(tmp_path, trained):
    path = tmp_path / "state.safetensors"
    finetune(copy.deepcopy(trained[0]), trained[1], steps=3, checkpoint=path)
    for change in ({"lr": 0.5}, {"seed": 1}, {"masks": magnitude_masks(trained[0], 0.5)}, {"steps": 4}):
        with pytest.raises(TrainingError, match=f"another run: {next(iter(change))} was"):
            finetune(copy.deepcopy(trained[0]), trained[1], checkpoint=path, **{"steps": 3, **change})
    with pytest.raises(TrainingError, match="another model"):
        finetune(nn.Sequential(nn.Linear(64, 10)), trained[1], steps=3, checkpoint=path)


def test_another_thread_count_is_said(tmp_path, trained, caplog):
    path = tmp_path / "state.safetensors"
    finetune(copy.deepcopy(trained[0]), trained[1], steps=3, checkpoint=path)
    torch.set_num_threads(2)
    finetune(copy.deepcopy(trained[0]), trained[1], steps=3, checkpoint=path)
    assert "resumed with 2 threads instead of 1" in caplog.text


@pytest.mark.parametrize("content", [b"", b"hello", b"\xff" * 8 + b"{}", None])
def test_a_broken_checkpoint_is_refused(tmp_path, trained, content):
    path = tmp_path / "state.safetensors"
    finetune(copy.deepcopy(trained[0]), trained[1], steps=3, checkpoint=path)
    path.write_bytes(path.read_bytes()[:-100] if content is None else content)
    with pytest.raises(ArtifactError, match="checkpoint"):
        finetune(copy.deepcopy(trained[0]), trained[1], steps=3, checkpoint=path)
