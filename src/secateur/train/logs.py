"""What a training writes down after each epoch: a file of JSON lines, or TensorBoard's event files."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from secateur.errors import MissingExtra
from secateur.train.loop import Epoch

Log = Callable[[Epoch], None]


def jsonl(path: str | Path) -> Log:
    """Writes one JSON object a line: epoch, steps, loss, lr and quality. For ``finetune(on_epoch=jsonl("log.jsonl"))``.

    Where the file has that epoch already, its line and the ones after are replaced: a run that was killed and resumed leaves
    the log that an undisturbed one would.
    """
    file = Path(path)

    def tell(epoch: Epoch) -> None:
        before = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
        lines = [*before[: epoch.epoch - 1], json.dumps(asdict(epoch))]
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("\n".join(lines) + "\n", encoding="utf-8")

    return tell


def tensorboard(folder: str | Path) -> Log:
    """Writes event files for TensorBoard, by optimizer step: ``loss``, ``lr`` and each quality. Raises MissingExtra."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise MissingExtra("tensorboard", "tensorboard", "a log for TensorBoard") from error

    writer = SummaryWriter(str(folder))

    def tell(epoch: Epoch) -> None:
        for name, value in {"loss": epoch.loss, "lr": epoch.lr, **epoch.quality}.items():
            writer.add_scalar(name, value, epoch.steps)
        writer.flush()

    return tell
