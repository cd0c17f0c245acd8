"""Runs of several steps that were stopped: their state lies beside the output directory until the run is finished."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

from torch import nn

from secateur.export.atomic import write_synced
from secateur.measure.cache import fingerprint
from secateur.train.checkpoint import load_state, save_state
from secateur.types import MaskSet, Point

log = logging.getLogger("secateur")


class Progress:
    """The finished steps of one run. A run is known by its recipe and the bits of the model it started from.

    Data is not part of it: a run that is resumed must be given the same data, as far as results shall be the same.
    """

    def __init__(self, out: str | Path, recipe: str, model: nn.Module):
        self._folder = beside(out)
        claim(self._folder, fingerprint(recipe, model))

    @property
    def slimming(self) -> Path:
        """Checkpoint of the training before the cut."""
        return self._folder / "slimming.safetensors"

    def training(self, step: int) -> Path:
        """Checkpoint of the fine-tuning in a step. Each has its own name: one that a kill left behind is no other step's."""
        return self._folder / f"training-{step}.safetensors"

    def solving(self, step: int) -> Path:
        """Folder of the layers solved so far in a step."""
        return self._folder / f"solving-{step}"

    def restore(self, model: nn.Module) -> tuple[int, MaskSet | None, list[Point]]:
        """Steps done, masks and points so far; the weights go into `model`. Nothing done where there is nothing to resume."""
        file = self._folder / "step.safetensors"
        if not file.exists():
            return 0, None, []
        state = load_state(file)
        model.load_state_dict(state["model"])
        log.warning("resuming after step %d", state["step"])
        return state["step"], MaskSet(state["masks"]), [Point(**p) for p in state["points"]]

    def save(self, step: int, model: nn.Module, masks: MaskSet, points: list[Point]) -> None:
        """Keep the state after `step` steps, and let go of what led to it."""
        state = {"step": step, "model": dict(model.state_dict()), "masks": dict(masks), "points": [vars(p) for p in points]}
        save_state(self._folder / "step.safetensors", state)
        self.training(step - 1).unlink(missing_ok=True)
        shutil.rmtree(self.solving(step - 1), ignore_errors=True)

    def clear(self) -> None:
        """The run is finished: remove its state."""
        give_up(self._folder)


def beside(out: str | Path) -> Path:
    """The folder for the state of a run that writes to `out`."""
    path = Path(out).absolute()
    return path.with_name(f".{path.name}.progress")


def claim(folder: Path, key: str) -> None:
    """Make `folder` that of the run `key`. The state of another run in it is removed."""
    file = folder / "run"
    if folder.exists() and not (file.exists() and file.read_text() == key):
        log.warning("%s is of another model or recipe: starting anew", folder)
        give_up(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if not file.exists():
        write_synced(file, key.encode())


def give_up(folder: Path) -> None:
    """Remove the state in `folder`, first of all what says whose it is, so that a kill leaves nobody's."""
    (folder / "run").unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
