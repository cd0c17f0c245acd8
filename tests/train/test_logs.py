"""What is written down of a training, and training that ends early or goes back to its best epoch."""

from __future__ import annotations

import importlib.util
import json

import pytest
import torch
from train import resumable
from train.resumable import digits, digits_network

import secateur as sc
from secateur.errors import RecipeError
from secateur.train import loop
from secateur.train.logs import jsonl, tensorboard


def network():
    torch.manual_seed(0)
    return digits_network()


def scripted(values):
    """An evaluate that gives these numbers, and the states of the model that it saw."""
    states, left = [], list(values)

    def evaluate(model):
        states.append({k: v.clone() for k, v in model.state_dict().items()})
        return {"accuracy": left.pop(0)}

    return evaluate, states


def test_patience_ends_the_training_and_keep_best_goes_back():
    batches = digits()[0]
    for values, ends, best in (
        ([0.1, 0.3, 0.2, 0.3, 0.1, 0.9], 4, 1),  # an equal is not better
        ([0.1, 0.2, 0.3, 0.4, 0.5, 0.6], 6, 5),
        ([0.5, 0.4, 0.3, 0.9, 0.9, 0.9], 3, 0),
    ):
        model, (evaluate, states) = network(), scripted(values)
        history = sc.finetune(model, batches, epochs=6, evaluate=evaluate, patience=2, keep_best=True)
        assert len(history.epochs) == ends
        assert all(torch.equal(v, states[best][k]) for k, v in model.state_dict().items())
    model, (evaluate, states) = network(), scripted([0.1, 0.3, 0.2])
    sc.finetune(model, batches, epochs=3, evaluate=evaluate)
    assert all(torch.equal(v, states[2][k]) for k, v in model.state_dict().items())


def test_lower_is_better_where_the_name_says_so():
    batches, losses = digits()[0], [0.5, 0.2, 0.4, 0.6]
    history = sc.finetune(network(), batches, epochs=4, evaluate=lambda _: {"loss": losses.pop(0)}, patience=2)
    assert len(history.epochs) == 4
    losses = [0.5, 0.6, 0.7, 0.1]
    history = sc.finetune(network(), batches, epochs=4, evaluate=lambda _: {"loss": losses.pop(0)}, patience=2)
    assert len(history.epochs) == 3


def test_the_best_survives_a_stop(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "_SAVE_EVERY_S", 0.0)
    values = [0.1, 0.9, 0.2, 0.3]

    def run(path, stop_at=None):
        model, count, epoch = network(), 0, 0

        def loss(m, batch):
            nonlocal count
            if count == stop_at:
                raise SystemExit
            count += 1
            return torch.nn.functional.cross_entropy(m(batch[0]), batch[1])

        def judged(m):
            nonlocal epoch
            epoch += 1
            return values[epoch - 1]

        if path is not None and path.exists():
            epoch = 2
        sc.finetune(model, digits()[0], epochs=4, evaluate=judged, keep_best=True, loss=loss, checkpoint=path)
        return model.state_dict()

    whole = run(None)
    with pytest.raises(SystemExit):
        run(tmp_path / "state", stop_at=40)  # in the third epoch
    resumed = run(tmp_path / "state")
    assert all(torch.equal(v, resumed[k]) for k, v in whole.items())


def test_json_lines_are_those_of_an_undisturbed_run(tmp_path):
    path = tmp_path / "logs" / "run.jsonl"
    history = sc.finetune(network(), digits()[0], epochs=3, evaluate=lambda _: 0.5, on_epoch=jsonl(path))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2, 3]
    assert [line["loss"] for line in lines] == [e.loss for e in history.epochs]
    assert lines[0].keys() == {"epoch", "steps", "loss", "lr", "quality"}
    before = path.read_text()
    jsonl(path)(history.epochs[1])  # as after a kill between the log and the checkpoint
    assert path.read_text().splitlines() == before.splitlines()[:2]
    jsonl(path)(history.epochs[2])
    assert path.read_text() == before


def test_tensorboard_reads_what_was_written(tmp_path):
    if importlib.util.find_spec("tensorboard") is None:
        pytest.skip("tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    history = sc.finetune(
        network(), digits()[0], epochs=2, evaluate=lambda _: {"accuracy": 0.5}, on_epoch=[tensorboard(tmp_path)]
    )
    events = EventAccumulator(str(tmp_path)).Reload()
    assert set(events.Tags()["scalars"]) == {"loss", "lr", "accuracy"}
    assert [e.step for e in events.Scalars("loss")] == [15, 30]
    assert [e.value for e in events.Scalars("loss")] == pytest.approx([e.loss for e in history.epochs])


def test_what_cannot_be():
    for changes, words in (
        ({"patience": 2}, "need evaluate="),
        ({"keep_best": True}, "need evaluate="),
        ({"patience": 0, "evaluate": lambda _: 1.0}, "at least 1 epoch, got 0"),
    ):
        with pytest.raises(RecipeError, match=words):
            sc.finetune(network(), resumable.made_up(), **changes)
