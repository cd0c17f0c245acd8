"""Sums over the processes of a torch.distributed group: each calibrates on its own share of the data."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor


def active() -> bool:
    """Whether there are other processes to sum with."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def summed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each tensor summed over all processes, which hold the same names and shapes. In place; as it is in one process."""
    if active():
        for name in sorted(tensors):
            dist.all_reduce(tensors[name])
    return dict(tensors)


def agree(text: str, device: torch.device) -> bool:
    """Whether all processes give the same `text`."""
    if not active():
        return True
    digest = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "big")
    low, high = (torch.tensor(sign * digest, dtype=torch.int64, device=device) for sign in (1, -1))
    dist.all_reduce(low, op=dist.ReduceOp.MIN)
    dist.all_reduce(high, op=dist.ReduceOp.MIN)
    return int(low) == digest and int(high) == -digest
