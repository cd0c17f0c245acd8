"""Running a block of a model on some members of the batch only."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from secateur.errors import ModelError


def first_tensor(tree: Any) -> Tensor:
    """What a block passes on: the first tensor of its arguments or of its output. ModelError where there is none."""
    for leaf in pytree.tree_leaves(tree):
        if isinstance(leaf, Tensor):
            return leaf
    raise ModelError("a block was called without a tensor, or gave none back")


def pick_rows(tree: Any, rows: Tensor, size: int) -> Any:
    """The tensors of a tree of arguments, those that belong to the batch of `size` cut to its members ``rows [k]``.

    A tensor belongs to the batch where its first dimension is as long. ModelError where that could be by chance: a matrix,
    such as rotary positions, in a batch of as many members as there are positions.
    """
    positions = first_tensor(tree).shape[1:2]

    def pick(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not leaf.dim() or len(leaf) != size:
            return leaf
        if leaf.dim() == 2 and leaf is not first_tensor(tree) and (size,) == tuple(positions) == tuple(leaf.shape[1:]):
            raise ModelError(
                f"a block is called with a matrix of shape {tuple(leaf.shape)} in a batch of {size} members of {size} "
                "positions: whether its rows are members cannot be told. Use another batch size."
            )
        return leaf.index_select(0, rows)

    return pytree.tree_map(pick, tree)


def put_rows(rows: Tensor, part: Any, size: int, behind: Any = None) -> Any:
    """The tree of outputs of a whole batch: `part` at ``rows [k]``; elsewhere the first tensor is `behind`, and zero else."""
    first = first_tensor(part)

    def put(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not leaf.dim() or len(leaf) != len(rows):
            return leaf
        if leaf is first and isinstance(behind, Tensor):
            return behind.index_copy(0, rows, leaf)
        return leaf.new_zeros(size, *leaf.shape[1:]).index_copy(0, rows, leaf)

    return pytree.tree_map(put, part)
