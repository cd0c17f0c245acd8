"""A small fine-tuning loop: AdamW or SGD, warm-up and cosine, masks held, stopped and resumed to the same bits."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from secateur.data.batches import Batch, Batches, Loss, default_loss
from secateur.errors import RecipeError, TrainingError, UnknownName
from secateur.measure.quality import Evaluate
from secateur.progress import track
from secateur.train.hold import hold
from secateur.train.interrupt import polite_interrupt
from secateur.train.loop import Epoch, Loop, Rate, undisturbed
from secateur.train.slimming import slimming_penalty
from secateur.train.tie import tie
from secateur.types import MaskSet

OPTIMIZERS: Mapping[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": lambda named, lr, decay, _: torch.optim.AdamW(named, lr=lr, weight_decay=decay),
    "sgd": lambda named, lr, decay, momentum: torch.optim.SGD(
        named, lr=lr, weight_decay=decay, momentum=momentum, nesterov=momentum > 0
    ),
}


@dataclass(frozen=True)
class History:
    """How the training went, one `Epoch` after the other; the last may have been cut short by `steps`."""

    epochs: tuple[Epoch, ...]

    @property
    def loss(self) -> float:
        """Mean loss of the last epoch."""
        return self.epochs[-1].loss


def finetune(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    masks: MaskSet | None = None,
    shared: Collection[str] = (),
    epochs: int = 1,
    steps: int | None = None,
    optimizer: str = "adamw",
    lr: float = 1e-3,
    weight_decay: float = 0.0,
    momentum: float = 0.9,
    warmup: float = 0.0,
    clip: float | None = None,
    slimming: float = 0.0,
    loss: Loss | None = None,
    evaluate: Evaluate | None = None,
    on_epoch: Callable[[Epoch], None] | Sequence[Callable[[Epoch], None]] = (),
    patience: int | None = None,
    keep_best: bool = False,
    seed: int = 0,
    checkpoint: str | Path | None = None,
) -> History:
    """Train `model` in place on `batches`, keeping the weights that `masks` removed at zero.

    Args:
        model: its trainable parameters are trained; afterwards every module is in the mode it was in.
        batches: re-iterable batches. Their order is drawn anew for each epoch from `seed` where they have ``shuffled(seed)``.
        masks: what stays removed.
        shared: names of parameters whose equal weights stay equal and whose zeros stay zero: their values are trained by the
            gradients summed over the weights that share them (Deep Compression).
        epochs: passes over the data.
        steps: optimizer steps, instead of `epochs`.
        optimizer: ``"adamw"``, or ``"sgd"`` with Nesterov momentum.
        lr: highest learning rate; it falls to zero along half a cosine.
        weight_decay: decoupled for AdamW, L2 for SGD.
        momentum: of SGD.
        warmup: share of the steps during which the learning rate rises linearly.
        clip: highest l2 norm of all gradients together.
        slimming: strength of an L1 penalty on the scales of BatchNorm (Network Slimming), added to the loss.
        loss: ``loss(model, batch) -> scalar``; the model's own or cross-entropy by default.
        evaluate: ``evaluate(model) -> float`` or a dict of floats, run after each epoch and recorded.
        on_epoch: called with each finished epoch; one function or several, such as `secateur.train.logs.jsonl`.
        patience: end early, after so many epochs in which the first number of `evaluate` became no better.
        keep_best: leave the model as it was after the epoch in which that number was best. Judge by data that is held out
            for it and not by the test data, which would then no longer say how good the model is.
        seed: of dropout and of the batches' order. The user's own random state is as before afterwards.
        checkpoint: a file in which the state is saved after each epoch, every minute and on Ctrl-C. Where it exists
            already, training goes on from it, and ends in the same bits as if it had never stopped. It is left there.

    Raises:
        TrainingError: the loss or a weight is NaN or infinite (the model is put back to its last good state), an option is
            out of range, nothing can be trained, or the checkpoint was made with other settings.
        Interrupted: Ctrl-C, after the checkpoint was saved.

    Example::

        history = finetune(result.model, batches, masks=result.masks, epochs=3, lr=1e-3)
    """
    _check_numbers(epochs, steps, lr, weight_decay, momentum, warmup, clip, slimming)
    if evaluate is None and (patience is not None or keep_best):
        raise RecipeError("fine-tuning: patience and keep_best need evaluate=, by which an epoch is judged")
    if patience is not None and patience < 1:
        raise RecipeError(f"fine-tuning: patience must be at least 1 epoch, got {patience!r}")
    if optimizer not in OPTIMIZERS:
        raise UnknownName("optimizer", optimizer, OPTIMIZERS)
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    if not trained:
        raise TrainingError("no parameter of the model requires a gradient: there is nothing to train. Unfreeze some first.")
    data = batches if isinstance(batches, Batches) else Batches(batches)
    length = _count(data)
    rate = Rate(lr, warmup, epochs * length if steps is None else steps)
    masks = MaskSet({}) if masks is None else masks
    settings = {
        "optimizer": optimizer,
        "lr": lr,
        "weight_decay": weight_decay,
        "momentum": momentum,
        "warmup": warmup,
        "clip": clip,
        "slimming": slimming,
        "seed": seed,
        "steps": rate.steps,
        "batches": length,
        "masks": _digest(masks),
        **({"shared": sorted(shared)} if shared else {}),
        "patience": patience,
        "keep_best": keep_best,
    }
    made = OPTIMIZERS[optimizer](trained, lr, weight_decay, momentum)
    masks.apply(model)
    trainable = {id(p) for _, p in trained}
    owned = MaskSet({n: m for n, m in masks.items() if id(model.get_parameter(n)) in trainable})  # frozen ones stay as they are
    with (
        undisturbed(model),
        hold(made, owned, model) as held,
        tie(made, model, shared),
        polite_interrupt(checkpoint is not None) as stop,
    ):
        loop = Loop(
            model=model,
            optimizer=made,
            held=held,
            data=data,
            length=length,
            rate=rate,
            loss=_slimmed(loss or default_loss, slimming),
            seed=seed,
            settings=settings,
            clip=clip,
            evaluate=evaluate,
            on_epoch=[on_epoch] if callable(on_epoch) else list(on_epoch),
            patience=patience,
            keep_best=keep_best,
            path=None if checkpoint is None else Path(checkpoint),
        )
        loop.run(stop)
    return History(tuple(loop.done))


def _check_numbers(
    epochs: int,
    steps: int | None,
    lr: float,
    weight_decay: float,
    momentum: float,
    warmup: float,
    clip: float | None,
    slimming: float,
) -> None:
    ranges = {
        "epochs": (epochs, epochs >= 1, "at least 1"),
        "steps": (steps, steps is None or steps >= 1, "at least 1"),
        "lr": (lr, math.isfinite(lr) and lr > 0, "above 0"),
        "weight_decay": (weight_decay, math.isfinite(weight_decay) and weight_decay >= 0, "0 or more"),
        "momentum": (momentum, 0 <= momentum < 1, "in [0, 1)"),
        "warmup": (warmup, 0 <= warmup < 1, "a share of the steps in [0, 1)"),
        "clip": (clip, clip is None or clip > 0, "above 0, or None"),
        "slimming": (slimming, math.isfinite(slimming) and slimming >= 0, "0 or more"),
    }
    for name, (value, fits, allowed) in ranges.items():
        if not fits:
            raise RecipeError(f"fine-tuning: {name} must be {allowed}, got {value!r}")


def _slimmed(loss: Loss, strength: float) -> Loss:
    """`loss`, with the penalty on BatchNorm scales where there is one."""
    return (lambda model, batch: loss(model, batch) + slimming_penalty(model, strength)) if strength else loss


def _count(data: Batches) -> int:
    """Batches in an epoch, by going through the data once where it does not say. Raises DataError where there are none."""
    try:
        length = len(data)
    except TypeError:
        length = 0
    return length or sum(1 for _ in track(iter(data), "count batches"))


def _digest(masks: MaskSet) -> str:
    """A name for the masks, by which a checkpoint knows its own."""
    digest = hashlib.sha256()
    for name, mask in masks.items():
        digest.update(f"{name} {tuple(mask.shape)}".encode())
        digest.update(mask.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
