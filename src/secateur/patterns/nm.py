"""N:M sparsity: of every `of` consecutive inputs, `keep` stay."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import BoolTensor, Tensor

from secateur.errors import PatternError, RecipeError


@dataclass(frozen=True)
class NM:
    """`keep` of every `of` consecutive input features, at each kernel position: ``[n / of, of, 1]``."""

    keep: int | None  #: None: every layer has its own, as the allocation says
    of: int
    whole_outputs: bool = False

    @property
    def name(self) -> str:
        """``"2:4"`` for keep=2, of=4; ``"n:4"`` where `keep` is open."""
        return f"{'n' if self.keep is None else self.keep}:{self.of}"

    @property
    def sparsity(self) -> float | None:
        """The fraction removed, which this pattern fixes, or None where `keep` is open."""
        return None if self.keep is None else 1.0 - self.keep / self.of

    def refuses(self, shape: torch.Size) -> str | None:
        """The input features must be a multiple of `of`."""
        if shape[1] % self.of:
            return f"its {shape[1]} input features are no multiple of {self.of}, as {self.name} needs (shape {tuple(shape)})"
        return None

    def fold(self, weight: Tensor) -> Tensor:
        """``[out, in, *kernel]`` -> ``[out * kernel * in / of, of, 1]``, groups running along the inputs."""
        if reason := self.refuses(weight.shape):
            raise PatternError(f"a weight cannot have the pattern {self.name}: {reason}")
        return weight.movedim(1, -1).reshape(-1, self.of, 1)

    def unfold(self, keep: BoolTensor, shape: torch.Size) -> BoolTensor:
        """``[groups, of]`` -> `shape`."""
        moved = (shape[0], *shape[2:], shape[1])
        return keep.reshape(moved).movedim(-1, 1).contiguous()  # type: ignore[return-value]


def n_m(*, keep: int | None = 2, of: int = 4) -> NM:
    """Keep `keep` of every `of` consecutive input features; written "2:4". GPUs since Ampere compute 2:4 faster.

    ``"n:4"`` leaves `keep` to the allocation, layer by layer: with ``dynamic``, each has 4, 3, 2 or 1 of 4.
    """
    if keep is None and isinstance(of, int) and not isinstance(of, bool) and 2 <= of <= 128:
        return NM(None, of)
    if isinstance(keep, bool) or isinstance(of, bool) or not (isinstance(keep, int) and isinstance(of, int)):
        raise RecipeError(f"n:m needs whole numbers, got keep={keep!r}, of={of!r}")
    if not 1 <= keep <= of or of < 2 or of > 128:
        raise RecipeError(
            f"n:m keeps between 1 and `of` weights of every `of` (2 to 128), got keep={keep}, of={of}. '2:4' means keep 2 of 4."
        )
    return NM(keep, of)
