"""Gradual pruning in other libraries' loops: real trainers, real checkpoints, resumed to the same bits."""

from __future__ import annotations

import copy
import importlib.util

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import secateur as sc
from secateur.errors import RecipeError, TrainingError
from secateur.integrations import lightning_callback, trainer_callback
from secateur.integrations.steps import in_steps, pruning_steps


def data(count=96):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, 12, generator=generator)
    return x, (x[:, 0] * x[:, 1] > 0).long()


class Classifier(nn.Module):
    """As the Trainer wants one: keywords in, a mapping with the loss out."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 2))

    def forward(self, x, labels=None):
        logits = self.body(x)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def fit(folder, callback, *, epochs=4, stop=None, resume=None):
    transformers = pytest.importorskip("transformers")

    class Stop(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == stop

    x, labels = data()
    model = Classifier()
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), num_train_epochs=epochs, per_device_train_batch_size=8, gradient_accumulation_steps=2,
        learning_rate=0.01, save_strategy="steps", save_steps=5, report_to=[], disable_tqdm=True, use_cpu=True, seed=0,
    )  # fmt: skip
    rows = [{"x": a, "labels": b} for a, b in zip(x, labels, strict=True)]
    callbacks = [callback, Stop()] if stop else [callback]
    trainer = transformers.Trainer(model, arguments, train_dataset=rows, callbacks=callbacks)
    trainer.train(resume_from_checkpoint=resume)
    return model


@pytest.mark.parametrize("regrow", ["none", "splice"])
def test_the_trainer_prunes_and_a_resumed_run_ends_in_the_same_bits(tmp_path, regrow):
    settings = {"sparsity": 0.9, "begin": 2, "end": 0.75, "every": 3, "regrow": regrow}
    whole = trainer_callback(**settings)
    model = fit(tmp_path / "whole", whole)  # 4 epochs of 6 steps
    total = 12 * 32 + 64
    assert whole.masks.kept() == total - int(0.9 * total + 0.5)
    assert whole.pruner._step == 24
    assert whole.pruner._end == 18
    for name, mask in whole.masks.items():
        assert not model.get_parameter(name).detach()[~mask].any()
    fit(tmp_path / "parts", trainer_callback(**settings), stop=10)
    again = trainer_callback(**settings)
    resumed = fit(tmp_path / "parts", again, resume=str(tmp_path / "parts" / "checkpoint-10"))
    assert again.masks.diff(whole.masks) == {}
    for name, value in model.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_a_checkpoint_without_pruning_is_named(tmp_path):
    fit(tmp_path, trainer_callback(sparsity=0.5), stop=10)
    (tmp_path / "checkpoint-10" / "secateur-gradual.safetensors").unlink()
    with pytest.raises(TrainingError, match=r"goes on at step 10.*made without this callback"):
        fit(tmp_path, trainer_callback(sparsity=0.5), resume=str(tmp_path / "checkpoint-10"))


def test_lightning_prunes_and_goes_on_from_its_checkpoint(tmp_path):
    if importlib.util.find_spec("lightning") is None:
        pytest.skip("lightning is not installed")
    settings = {"sparsity": 0.9, "begin": 2, "end": 0.75, "every": 3}
    callback = lightning_callback(**settings)
    from lightning.pytorch import Callback, LightningModule, Trainer

    class Module(LightningModule):
        def __init__(self):
            super().__init__()
            self.inner = Classifier()

        def training_step(self, batch, _):
            return self.inner(*batch)["loss"]

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=0.01)

    x, labels = data()
    batches = [(x[i : i + 8], labels[i : i + 8]) for i in range(0, 96, 8)]
    options = {
        "accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False, "enable_model_summary": False,
        "default_root_dir": tmp_path, "accumulate_grad_batches": 2, "enable_checkpointing": False,
    }  # fmt: skip

    class Stop(Callback):
        def __init__(self, epochs):
            self.epochs = epochs

        def on_train_epoch_end(self, trainer, module):
            trainer.should_stop = trainer.current_epoch + 1 >= self.epochs

    def run(callback, epochs, path=None):
        module = Module()
        trainer = Trainer(max_epochs=4, callbacks=[callback, Stop(epochs)], **options)
        trainer.fit(module, torch.utils.data.DataLoader(batches, batch_size=None), ckpt_path=path)
        return module, trainer

    module, _ = run(callback, 4)
    total = 12 * 32 + 64
    assert callback.masks.kept() == total - int(0.9 * total + 0.5)
    assert callback.pruner._step == 24
    for name, mask in callback.masks.items():
        assert not module.get_parameter(name).detach()[~mask].any()
    first = lightning_callback(**settings)
    _, trainer = run(first, 2)
    assert first.pruner._step == 12
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    second = lightning_callback(**settings)
    resumed, _ = run(second, 4, str(tmp_path / "half.ckpt"))
    assert second.masks.diff(callback.masks) == {}
    for name, value in module.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_accelerate_wraps_model_and_optimizer():
    accelerate = pytest.importorskip("accelerate")
    x, labels = data()
    plain = Classifier()
    wrapped = copy.deepcopy(plain)
    results = []
    for model, accelerator in ((plain, None), (wrapped, accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2))):
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        inner = model
        if accelerator is not None:
            model, optimizer = accelerator.prepare(model, optimizer)
        with sc.gradual(model, optimizer, sparsity=0.9, begin=1, end=6, every=2) as pruner:
            for step in range(8):
                halves = [slice(step * 12, step * 12 + 6), slice(step * 12 + 6, step * 12 + 12)]
                if accelerator is None:
                    optimizer.zero_grad()
                    sum(model(x[h], labels[h])["loss"] for h in halves).div(2).backward()
                    optimizer.step()
                else:
                    for h in halves:
                        with accelerator.accumulate(model):
                            accelerator.backward(model(x[h], labels[h])["loss"])
                            optimizer.step()
                            optimizer.zero_grad()
                pruner.step()
        for name, mask in pruner.masks.items():
            assert not inner.get_parameter(name).detach()[~mask].any()
        results.append((pruner.masks, inner.state_dict()))
    assert results[0][0].diff(results[1][0]) == {}
    for name, value in results[0][1].items():
        torch.testing.assert_close(value, results[1][1][name])


def test_when():
    assert [in_steps("end", w, 200) for w in (0, 7, 0.5, 1.0, 200)] == [0, 7, 100, 200, 200]
    assert pruning_steps(0.1, 0.75, 50, 200) == {"begin": 20, "end": 150, "every": 50}
    assert pruning_steps(5, 9, 100, 200) == {"begin": 5, "end": 9, "every": 4}
    for bad, words in ((201, "ends after 200"), (1.5, "share above 1"), (-1, "got -1"), (True, "got True"), ("5", "got '5'")):
        with pytest.raises(RecipeError, match=words):
            in_steps("end", bad, 200)
