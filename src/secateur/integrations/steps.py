"""When pruning happens, in steps or in shares of a training whose length the other library knows."""

from __future__ import annotations

from secateur.errors import RecipeError

#: A number of optimizer steps, or a share of all of them in [0, 1].
When = int | float


def pruning_steps(begin: When, end: When, every: int, total: int) -> dict[str, int]:
    """The arguments ``begin``, ``end`` and ``every`` of `sc.gradual` in a training of `total` optimizer steps.

    >>> pruning_steps(0.1, 0.75, 500, 200)
    {'begin': 20, 'end': 150, 'every': 130}
    """
    first, last = in_steps("begin", begin, total), in_steps("end", end, total)
    return {"begin": first, "end": last, "every": min(every, max(last - first, 1))}


def in_steps(name: str, when: When, total: int) -> int:
    """`when` as a number of optimizer steps of a training of `total`.

    >>> in_steps("end", 0.75, 200)
    150
    """
    if isinstance(when, bool) or not isinstance(when, (int, float)) or when < 0:
        raise RecipeError(f"{name} is a number of optimizer steps or a share of all of them, got {when!r}")
    if isinstance(when, int):
        steps = when
    elif when <= 1.0:
        steps = round(when * total)
    else:
        raise RecipeError(f"{name} = {when!r} is a share above 1: give a whole number for steps")
    if steps > total:
        raise RecipeError(f"{name} is step {steps}, and the training ends after {total}: the target would not be reached")
    return steps
