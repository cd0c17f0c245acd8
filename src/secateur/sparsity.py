"""What counts as a sparsity, wherever one is given."""

from __future__ import annotations

import numbers

from secateur.errors import RecipeError


def check_sparsity(sparsity: object) -> float:
    """`sparsity` as a float in [0, 1), or a RecipeError that says what is wrong with it."""
    if isinstance(sparsity, (bool, numbers.Integral)) or not isinstance(sparsity, numbers.Real):
        raise RecipeError(
            f"sparsity is the fraction of weights to remove, a float in [0, 1); got {type(sparsity).__name__} {sparsity!r}. "
            "A whole number could mean a count or a fraction, so it is refused."
        )
    value = float(sparsity)
    if not 0.0 <= value < 1.0:
        why = "that would remove every weight" if value == 1.0 else "it is out of range"
        raise RecipeError(f"sparsity must be a float in [0, 1), got {value!r}: {why}.")
    return value
