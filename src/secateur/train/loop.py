"""The loop under `finetune`: every step is a function of the seed and its number, so a stopped run goes on to the same bits."""

from __future__ import annotations

import hashlib
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor, nn

from secateur.data.batches import Batch, Batches, Loss
from secateur.errors import DataError, Interrupted, TrainingError
from secateur.measure.quality import Evaluate, higher_is_better, qualities
from secateur.progress import advance
from secateur.train.checkpoint import load_state, save_state
from secateur.train.distill import Distillation
from secateur.train.hold import Held
from secateur.train.interrupt import Stop

log = logging.getLogger("secateur")
_SAVE_EVERY_S = 60.0  # besides once an epoch


@dataclass(frozen=True)
class Epoch:
    """One epoch of training: its number from 1, steps done since the start, mean loss, last learning rate, quality."""

    epoch: int
    steps: int
    loss: float
    lr: float
    quality: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Rate:
    """Learning rate of each of `steps` steps: a linear rise over the share `warmup`, then half a cosine to zero.

    >>> [round(Rate(1.0, 0.2, 10)(step), 3) for step in (0, 1, 2, 6)]
    [0.5, 1.0, 1.0, 0.5]
    """

    peak: float
    warmup: float
    steps: int

    def __call__(self, step: int) -> float:
        """The rate of step number `step`, from 0."""
        rising = round(self.warmup * self.steps)
        if step < rising:
            return self.peak * (step + 1) / rising
        return self.peak * 0.5 * (1.0 + math.cos(math.pi * (step - rising) / (self.steps - rising)))


@dataclass
class Loop:
    """Where a training run stands, and what takes it further. `settings` are what a checkpoint must have been made with."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    held: Held
    data: Batches
    length: int  #: batches in an epoch
    rate: Rate
    loss: Loss
    seed: int
    settings: Mapping[str, Any]
    clip: float | None = None
    evaluate: Evaluate | None = None
    on_epoch: Sequence[Callable[[Epoch], None]] = ()
    patience: int | None = None  #: epochs without a better quality after which the training ends
    keep_best: bool = False  #: whether the model ends as it was after the best epoch
    path: Path | None = None
    done: list[Epoch] = field(default_factory=list)
    step: int = 0  #: steps since the start
    position: int = 0  #: steps since the start of the epoch
    loss_sum: float = 0.0  #: over the epoch
    best: dict[str, Any] = field(default_factory=dict)  #: the model's state after the best epoch, where it is kept

    def run(self, stop: Stop) -> None:
        """Train to the end, from the checkpoint where there is one."""
        if self.path is not None and self.path.exists():
            self._load(self.path)
        self._good = self._snapshot()
        self._saved = time.monotonic()
        self._say()
        while self.step < self.rate.steps and not self._gave_up():
            self._run_epoch(stop)
            self._finish_epoch()
            self._check_stop(stop)
        if self.best:
            self.model.load_state_dict(self.best)

    def _run_epoch(self, stop: Stop) -> None:
        epoch = len(self.done)
        batches = self.data.shuffled(mixed(self.seed, "order", epoch))
        self._order = _state_of(batches)
        iterator = iter(batches)
        for index in range(self.length):
            seed_everything(mixed(self.seed, "batch", epoch, index))  # for what draws numbers in loading and in training it
            batch = next(iterator, None)
            if batch is None:
                raise DataError(
                    f"epoch {epoch + 1} of the training data ended after {index} batches; {self.length} were expected"
                )
            if index < self.position:
                continue
            self._train_step(batch)
            if self.step == self.rate.steps:
                return
            if self.position < self.length:
                self._check_stop(stop)
                self._save_if_due()

    def _train_step(self, batch: Batch) -> None:
        lr = self.rate(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad()
        if isinstance(self.loss, Distillation):
            self.loss.progress = self.step / self.rate.steps
        loss = self.loss(self.model, batch)
        value = self._value(loss)
        if not math.isfinite(value):
            raise self._diverged(f"the loss became {value}")
        loss.backward()
        if self.clip is not None:
            self.held.mask_gradients()
            nn.utils.clip_grad_norm_([p for g in self.optimizer.param_groups for p in g["params"]], self.clip)
        self.optimizer.step()
        self.step += 1
        self.position += 1
        self.loss_sum += value
        self._say()

    def _value(self, loss: Any) -> float:
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            what = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
            raise TrainingError(f"the loss must be a tensor with one number, got {what}. Take the mean over the batch.")
        if not loss.requires_grad:
            raise TrainingError(
                "the loss does not depend on any trainable parameter: it was detached or computed without gradients"
            )
        return loss.item()

    def _finish_epoch(self) -> None:
        for name, parameter in self.model.named_parameters():
            if not parameter.isfinite().all():
                raise self._diverged(f"the weight {name!r} holds NaN or infinite values")
        quality = {} if self.evaluate is None else qualities(self.evaluate, self.model)
        lr = self.optimizer.param_groups[0]["lr"]
        self.done.append(Epoch(len(self.done) + 1, self.step, self.loss_sum / self.position, lr, quality))
        self.position, self.loss_sum = 0, 0.0
        self._good = self._snapshot()
        if self.keep_best and self._best_epoch() == len(self.done):
            self.best = self._good
        self._order = _state_of(self.data)
        self._save()
        for tell in self.on_epoch:
            tell(self.done[-1])

    def _best_epoch(self) -> int:
        """Number of the epoch with the best quality, the first of equals; judged by the first number that evaluate gives."""
        name = next(iter(self.done[0].quality))
        sign = 1.0 if higher_is_better(name) else -1.0
        return max(self.done, key=lambda epoch: (sign * epoch.quality[name], -epoch.epoch)).epoch

    def _gave_up(self) -> bool:
        if self.patience is None or not self.done or len(self.done) - self._best_epoch() < self.patience:
            return False
        log.info("no better quality in %d epochs: the training ends after epoch %d", self.patience, len(self.done))
        return True

    def _say(self) -> None:
        note = ""
        if self.position:
            lr = self.optimizer.param_groups[0]["lr"]
            note = f"epoch {len(self.done) + 1}, loss {self.loss_sum / self.position:.4g}, lr {lr:.2g}"
        advance("fine-tune", self.step, self.rate.steps, note)

    def _snapshot(self) -> dict[str, Any]:
        return {k: v.detach().clone() if isinstance(v, Tensor) else v for k, v in self.model.state_dict().items()}

    def _diverged(self, what: str) -> TrainingError:
        """Put the model back to its last good state; the error to raise."""
        self.model.load_state_dict(self._good)
        lr = self.optimizer.param_groups[0]["lr"]
        where = f"step {self.step + 1} of {self.rate.steps} (epoch {len(self.done) + 1}, lr {lr:.3g})"
        if self.step == 0:
            return TrainingError(
                f"{what} at {where}, before anything was trained: look for NaN in the weights, the data or the loss"
            )
        back = f"after epoch {len(self.done)}" if self.done else "before the training"
        remedy = f"Lower the learning rate (lr={self.rate.peak / 10:.1g}), or limit the gradients with clip=1.0."
        return TrainingError(f"{what} at {where}. The model was put back to its state {back}. {remedy}")

    def _check_stop(self, stop: Stop) -> None:
        if not stop.asked or self.path is None or self.step == self.rate.steps:
            return
        self._save()
        raise Interrupted(
            f"stopped after step {self.step} of {self.rate.steps}; its state is in {self.path}. "
            "Run the same again with the same checkpoint to go on to the same result."
        )

    def _save_if_due(self) -> None:
        if time.monotonic() - self._saved >= _SAVE_EVERY_S:
            self._save()

    def _save(self) -> None:
        if self.path is None:
            return
        state = {
            "settings": dict(self.settings),
            "threads": torch.get_num_threads(),
            "model": dict(self.model.state_dict()),
            "optimizer": self.optimizer.state_dict(),
            "done": [asdict(epoch) for epoch in self.done],
            "step": self.step,
            "position": self.position,
            "loss_sum": self.loss_sum,
            "order": self._order,
            "best": self.best,
        }
        save_state(self.path, state)
        self._saved = time.monotonic()

    def _load(self, path: Path) -> None:
        state = load_state(path)
        then = state["settings"]
        changed = [f"{k} was {then.get(k)!r}, is {v!r}" for k, v in self.settings.items() if then.get(k) != v]
        if changed:
            raise TrainingError(
                f"the checkpoint {path} is of another run: {'; '.join(changed)}. "
                "Use its settings to go on, or delete it to start again."
            )
        if state["threads"] != torch.get_num_threads():
            log.warning("resumed with %s threads instead of %s: bits may differ", torch.get_num_threads(), state["threads"])
        try:
            self.model.load_state_dict(state["model"])
        except RuntimeError as error:
            raise TrainingError(f"the checkpoint {path} is of another model: {error}") from error
        self.optimizer.load_state_dict(state["optimizer"])
        self.held.apply()
        self.done = [Epoch(**epoch) for epoch in state["done"]]
        self.step, self.position, self.loss_sum = state["step"], state["position"], state["loss_sum"]
        self.best = dict(state["best"])
        generator = getattr(self.data.source, "generator", None)
        if isinstance(generator, Generator) and state["order"] is not None:
            generator.set_state(state["order"])


def mixed(*parts: int | str) -> int:
    """A seed made of several numbers and words, 63 bits, the same everywhere."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little") >> 1


def seed_everything(seed: int) -> None:
    """Seed torch's global generators, on all devices that are in use."""
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """The model in training mode; afterwards modes and the global random state are as before and gradients are gone."""
    modes = [(module, module.training) for module in model.modules()]
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    try:
        with torch.random.fork_rng(devices):
            model.train()
            yield
    finally:
        for module, training in modes:
            module.training = training
        model.zero_grad()


def _state_of(batches: Batches) -> Tensor | None:
    """State of the generator that a DataLoader was given for its order, before it draws the next epoch's."""
    generator = getattr(batches.source, "generator", None)
    return generator.get_state() if isinstance(generator, Generator) else None
