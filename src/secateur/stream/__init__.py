"""Pruning checkpoints that are larger than memory: weights come from sharded safetensors a block at a time."""

from __future__ import annotations

from secateur.stream.run import prune_checkpoint

__all__ = ["prune_checkpoint"]
