"""Gradual pruning inside the training loops of other libraries. Each is imported only when its function is called."""

from __future__ import annotations

from secateur.integrations.lightning import lightning_callback
from secateur.integrations.trainer import trainer_callback

__all__ = ["lightning_callback", "trainer_callback"]
