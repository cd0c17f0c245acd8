"""Parameters of which each process holds a part (FSDP2's distributed tensors), and plain ones, handled alike."""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor


def whole(tensor: Tensor) -> Tensor:
    """All of it, on every process. Where it is sharded all processes have to ask."""
    return tensor.full_tensor() if _is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def local(tensor: Tensor) -> Tensor:
    """This process's part, sharing its memory; no gradients flow through."""
    tensor = tensor.detach()
    return tensor.to_local() if _is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def spread_like(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor that every process has, in parts as `like` is; the tensor itself where `like` is whole."""
    if not _is_sharded(like):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    sharded: Any = like
    return distribute_tensor(tensor.to(like.device), sharded.device_mesh, sharded.placements, src_data_rank=None)


def _is_sharded(tensor: Tensor) -> bool:
    module = sys.modules.get("torch.distributed.tensor")  # whoever made such a tensor has imported it
    return module is not None and isinstance(tensor, module.DTensor)
