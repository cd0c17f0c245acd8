"""The Trainer of Hugging Face transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from secateur.errors import MissingExtra, TrainingError
from secateur.integrations.steps import When, pruning_steps
from secateur.models.torchvision_shim import prepare_torchvision
from secateur.train.checkpoint import load_state, save_state
from secateur.train.gradual import gradual

_FILE = "secateur-gradual.safetensors"  # beside the Trainer's own in each of its checkpoints


def trainer_callback(*, begin: When = 0.1, end: When = 0.75, every: int = 100, **changes: Any) -> Any:
    """A callback with which a transformers ``Trainer`` prunes as it trains: ``Trainer(..., callbacks=[callback])``.

    Args:
        begin: optimizer step, or share of the training, at which pruning begins.
        end: the same, at which the target is reached; the rest of the training mends.
        every: optimizer steps between two choices of masks.
        changes: a recipe's keys as in `sc.gradual`: ``sparsity=0.9, criterion="movement", regrow="frozen", ...``.

    Returns:
        A ``TrainerCallback``. Its ``pruner`` is the `Gradual` of the training, its ``masks`` are those in force. Gradient
        accumulation, mixed precision and several processes need nothing special. The state goes into the Trainer's
        checkpoints, and ``trainer.train(resume_from_checkpoint=...)`` goes on from it.

    Raises:
        MissingExtra: transformers is not installed.
        RecipeError, LayerError: when the training begins; as `sc.gradual` does.
        TrainingError: a resumed checkpoint has no state of pruning.

    Example::

        callback = trainer_callback(sparsity=0.8, every=50)
        Trainer(model, args, train_dataset=data, callbacks=[callback]).train()
        callback.masks.sparsity()
    """
    prepare_torchvision()
    try:
        from transformers import TrainerCallback
    except ImportError as error:
        raise MissingExtra("transformers", "hf", "the Trainer's callback") from error

    class PruningCallback(TrainerCallback):  # type: ignore[misc]
        pruner: Any = None

        @property
        def masks(self) -> Any:
            return self.pruner.masks

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            steps = pruning_steps(begin, end, every, state.max_steps)
            self.pruner = gradual(kwargs["model"], kwargs["optimizer"], changes, **steps)
            if state.global_step:
                self.pruner.load_state_dict(load_state(_saved(args, state)))
            self.pruner.__enter__()

        def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.pruner.step()

        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            pruning = self.pruner.state_dict()  # on every process: sharded weights are gathered by all of them
            if state.is_world_process_zero:
                save_state(Path(args.output_dir) / f"checkpoint-{state.global_step}" / _FILE, pruning)

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.pruner.__exit__(None)

    return PruningCallback()


def _saved(args: Any, state: Any) -> Path:
    """The state in the checkpoint that the Trainer goes on from: the one it was told of, or its own at this step."""
    folders = [Path(args.output_dir) / f"checkpoint-{state.global_step}"]
    if isinstance(args.resume_from_checkpoint, str):
        folders.insert(0, Path(args.resume_from_checkpoint))
    for folder in folders:
        if (folder / _FILE).exists():
            return folder / _FILE
    raise TrainingError(
        f"the Trainer goes on at step {state.global_step}, and its checkpoint has no {_FILE}: it was made without this "
        "callback. Begin a new training from its weights."
    )
