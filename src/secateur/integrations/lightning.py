"""The Trainer of Lightning."""

from __future__ import annotations

from typing import Any

from secateur.errors import MissingExtra
from secateur.integrations.steps import When, pruning_steps
from secateur.models.torchvision_shim import prepare_torchvision
from secateur.train.gradual import gradual


def lightning_callback(*, begin: When = 0.1, end: When = 0.75, every: int = 100, **changes: Any) -> Any:
    """A callback with which a Lightning ``Trainer`` prunes as it trains: ``Trainer(callbacks=[callback])``.

    Args:
        begin: optimizer step, or share of the training, at which pruning begins.
        end: the same, at which the target is reached; the rest of the training mends.
        every: optimizer steps between two choices of masks.
        changes: a recipe's keys as in `sc.gradual`.

    Returns:
        A ``lightning.pytorch.Callback`` with ``pruner`` and ``masks``, for modules with one optimizer. Its state is part of
        Lightning's checkpoints.

    Raises:
        MissingExtra: lightning is not installed.
        RecipeError, LayerError: when the training begins; as `sc.gradual` does.

    Example::

        callback = lightning_callback(sparsity=0.8, every=50)
        Trainer(max_epochs=3, callbacks=[callback]).fit(module, loader)
    """
    prepare_torchvision()
    try:
        from lightning.pytorch import Callback
    except ImportError as error:
        raise MissingExtra("lightning", "lightning", "Lightning's callback") from error

    class PruningCallback(Callback):  # type: ignore[misc]
        pruner: Any = None
        _loaded: Any = None
        _seen = 0

        @property
        def masks(self) -> Any:
            return self.pruner.masks

        def on_train_start(self, trainer: Any, module: Any) -> None:
            steps = pruning_steps(begin, end, every, int(trainer.estimated_stepping_batches))
            self.pruner = gradual(module, trainer.optimizers[0], changes, **steps)
            if self._loaded is not None:
                self.pruner.load_state_dict(self._loaded)
            self._seen = trainer.global_step
            self.pruner.__enter__()

        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step > self._seen:  # with gradient accumulation not every batch is a step
                self._seen = trainer.global_step
                self.pruner.step()

        def on_train_end(self, trainer: Any, module: Any) -> None:
            self.pruner.__exit__(None)

        def state_dict(self) -> dict[str, Any]:
            return {} if self.pruner is None else self.pruner.state_dict()

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            self._loaded = state_dict or None

    return PruningCallback()
