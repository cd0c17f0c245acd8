"""The only top-k in the project: exact counts, ties broken by index (the lower index is kept), streamed when large.

Scores are ordered by their value, float32 or float64, so two scores tie exactly when they are equal. A threshold that
would remove all of a tie, or none of it, is never used alone: what is equal to it is counted out by index. What lies on the
CPU is compared by numpy, which takes a tenth of torch's time for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import BoolTensor, IntTensor, Tensor

from secateur.types import INTEGERS, bits_of

#: Gives the same float32 or float64 tensors, in the same order, each time it is called.
Parts = Callable[[], Iterable[Tensor]]

_CHUNK = 1 << 17  # elements handled at a time: half a megabyte stays in cache and bounds the extra memory
_SMALL_UNITS = 16  # up to here ranks within a group come from pairwise comparison, which beats sorting by far
_SMALL_TOTAL = 1 << 12  # up to here a sort is faster than a guess and a pass to check it
_BITS = 16  # of the ordered key that one counting pass resolves
_STEP = 256  # one in so many values is looked at to guess between which two scores the threshold lies
_FEW = 1 << 16  # so few scores may always be left undecided by the guess
_PLACES = 4  # rows of so many different counts are ordered at these places only, which takes a tenth of sorting them
_MARGIN = 6.0  # standard deviations of the sampled rank by which the guess is widened
_MOST_INSIDE = 1 / 16  # a guess that leaves more than this share of the scores undecided is dropped for counting


def removed_count(units: int, sparsity: float) -> int:
    """How many of `units` go at `sparsity`: the nearest whole number, halves up."""
    return int(sparsity * units + 0.5)


def spread(total: int, groups: int) -> IntTensor:
    """`total` dealt out to `groups` as evenly as whole numbers allow, the first groups getting one more. Shape ``[groups]``."""
    counts = torch.full((groups,), total // groups if groups else 0, dtype=torch.int64)
    if groups:
        counts[: total % groups] += 1
    return counts  # type: ignore[return-value]


def top(scores: Tensor, keep: Tensor) -> BoolTensor:
    """Mask of the ``keep[g]`` highest scores in each group ``g``.

    Args:
        scores: float32 or float64 ``[groups, units]`` without NaN; -inf is allowed.
        keep: integer ``[groups]``, each between 0 and ``units``.

    Returns:
        Bool ``[groups, units]`` with exactly ``keep[g]`` True in row ``g``; among equal scores the lower index is kept.

    Example:
        >>> top(torch.tensor([[1.0, 3.0, 3.0, 2.0]]), torch.tensor([1])).tolist()
        [[False, True, False, False]]
    """
    groups, units = scores.shape
    keep = keep.to(device=scores.device, dtype=torch.int64)
    if keep.shape != (groups,) or (groups and (int(keep.min()) < 0 or int(keep.max()) > units)):
        raise ValueError(f"keep must be {groups} counts between 0 and {units}, got {keep.tolist()[:8]}")
    if units <= _SMALL_UNITS:
        mask = _by_rank(scores, keep)
    elif groups == 1:
        mask = _one_group(scores[0], int(keep[0]))[None]
    else:
        mask = _by_row(scores, keep)
    if int(mask.count_nonzero()) != int(keep.sum()):
        raise AssertionError("selection kept another number of units than asked: the scores hold NaN")
    return mask  # type: ignore[return-value]


def split_counts(parts: Parts, keep: int) -> list[int]:
    """How many of the `keep` highest scores of all `parts` together lie in each part.

    `parts` gives the same tensors, in the same order, each time it is called: they need not exist at once. Ties are
    broken by the order of parts, then by index. The counts sum to `keep`.
    """
    _, above, equal = _threshold(parts, keep)
    left = keep - sum(above)
    kept = []
    for more, same in zip(above, equal, strict=True):
        taken = min(same, left)
        left -= taken
        kept.append(more + taken)
    return kept


def kth_largest(parts: Parts, k: int) -> float:
    """The k-th largest of all values in `parts` (k from 1), exactly; +inf for k = 0."""
    return _threshold(parts, k)[0]


def _threshold(parts: Parts, k: int) -> tuple[float, list[int], list[int]]:
    """The k-th largest value, and how many values of each part are above it and equal to it."""
    if k == 0:
        none = [0 for _ in parts()]
        return float("inf"), none, none
    low, high = _bracket(parts, k)
    found = _between(parts, low, high)
    at_least_high = sum(f.above + f.at_high for f in found)
    between = sum(f.inside for f in found)
    gathered = sum(f.between.numel() for f in found)
    if sum(f.above for f in found) < k <= at_least_high:
        return high, [f.above for f in found], [f.at_high for f in found]
    if at_least_high < k <= at_least_high + between and gathered == between:
        undecided = torch.cat([f.between for f in found])
        value = float(undecided.kthvalue(between - (k - at_least_high) + 1).values)
        more = [f.above + f.at_high + int((f.between > value).count_nonzero()) for f in found]
        return value, more, [int((f.between == value).count_nonzero()) for f in found]
    if at_least_high + between < k <= at_least_high + between + sum(f.at_low for f in found):
        return low, [f.above + f.at_high + f.inside for f in found], [f.at_low for f in found]
    value = _by_counting(parts, k)  # the guess was wrong, or left too much undecided
    more = [sum(_count(c > value) for c in _chunks(part)) for part in parts()]
    same = [sum(_count(c == value) for c in _chunks(part)) for part in parts()]
    return value, more, same


def _bracket(parts: Parts, k: int) -> tuple[float, float]:
    """Two values between which the k-th largest probably lies, guessed from an evenly spaced sample."""
    total, samples = 0, []
    for part in parts():
        total += part.numel()
        samples.append(part.reshape(-1)[::_STEP].clone())
        del part  # or two layers' scores would be alive while the next is computed
    if k > total:
        raise ValueError(f"asked for the {k}-th largest of {total} scores")
    sample = torch.cat(samples).sort(descending=True).values
    share = k / total
    margin = 2 + _MARGIN * (len(sample) * share * (1 - share)) ** 0.5
    first, last = int(share * len(sample) - margin), int(share * len(sample) + margin)
    high = float(sample[first]) if first >= 0 else float("inf")
    low = float(sample[last]) if last < len(sample) else -float("inf")
    return low, high


@dataclass
class _Found:
    """How one part lies around a bracket: counts above it, at its ends and inside, and the values inside, if not too many."""

    above: int
    at_high: int
    inside: int
    at_low: int
    between: Tensor


def _between(parts: Parts, low: float, high: float) -> list[_Found]:
    """One pass over all parts. It gathers nothing more once too much lies inside the bracket for the guess to pay."""
    found: list[_Found] = []
    total = undecided = 0
    for part in parts():
        here, inside = _Found(0, 0, 0, 0, part.new_empty(0)), []
        for chunk in _chunks(part):
            below, above_low, size = chunk < high, chunk > low, len(chunk)
            under, over = _count(below), _count(above_low)
            above = _count(chunk > high)
            here.above += above
            here.at_high += size - above - under
            if low != high:
                here.at_low += _count(chunk >= low) - over
                here.inside += over - (size - under)
            if undecided <= max(_FEW, _MOST_INSIDE * total):
                inside.append(torch.as_tensor(chunk[below & above_low]))
                undecided += inside[-1].numel()
            total += size
        here.between = torch.cat([here.between, *inside])
        found.append(here)
        del part, chunk
    return found


def _by_counting(parts: Parts, k: int) -> float:
    """The k-th largest value in passes over the ordered bits, 16 a pass from the highest on: 2 for float32, 4 for float64."""
    dtype = next(iter(parts())).dtype
    highest = 8 * dtype.itemsize - _BITS
    prefix = 0  # the bits found so far
    for shift in range(highest, -1, -_BITS):
        offset = 1 << (_BITS - 1) if shift == highest else 0  # the highest bits are signed
        counts = torch.zeros(1 << _BITS, dtype=torch.int64)
        for key in (_key(chunk) for part in parts() for chunk in part.reshape(-1).split(_CHUNK)):
            if shift < highest:
                key = key[(key >> (shift + _BITS)) == prefix] & ((1 << (shift + _BITS)) - 1)
            counts += torch.bincount((key >> shift) + offset, minlength=1 << _BITS).cpu()
        bin_, k = _find(counts, k)
        prefix = (prefix << _BITS) + bin_ - offset
    return _value(prefix, dtype)


def _chunks(part: Tensor) -> Sequence[Any]:
    return [_values(chunk) for chunk in part.reshape(-1).split(_CHUNK)]


def _values(tensor: Tensor) -> Any:
    """The same memory as a numpy array where it is on the CPU, else the tensor."""
    return tensor.detach().numpy() if tensor.device.type == "cpu" else tensor.detach()


def _places(mask: Any) -> Tensor:
    return torch.from_numpy(np.flatnonzero(mask)) if isinstance(mask, np.ndarray) else mask.nonzero().flatten()


def _count(mask: Any) -> int:
    return int(np.count_nonzero(mask)) if isinstance(mask, np.ndarray) else int(mask.count_nonzero())


def _key(values: Tensor) -> Tensor:
    """Integer keys, as wide as the values and in their order; -0.0 and 0.0 share one."""
    bits = bits_of(values + 0.0)
    width = 8 * bits.element_size()
    return bits ^ ((bits >> (width - 1)) & ((1 << (width - 1)) - 1))


def _value(key: int, dtype: torch.dtype) -> float:
    """The inverse of `_key`."""
    width = 8 * dtype.itemsize
    bits = key ^ ((1 << (width - 1)) - 1) if key < 0 else key
    return float(torch.tensor(bits, dtype=INTEGERS[dtype.itemsize]).view(dtype))


def _find(counts: Tensor, k: int) -> tuple[int, int]:
    """The bin in which the k-th largest lies, and its rank within that bin."""
    from_top = counts.flip(0).cumsum(0)
    position = int(torch.searchsorted(from_top, k))
    bin_ = len(counts) - 1 - position
    return bin_, k - int(from_top[position] - counts[bin_])


def _one_group(scores: Tensor, keep: int) -> Tensor:
    if scores.numel() <= _SMALL_TOTAL:
        return _by_row(scores[None], torch.tensor([keep], device=scores.device))[0]
    value = kth_largest(lambda: [scores], keep)
    values = _values(scores)
    mask = torch.as_tensor(values > value)
    if missing := keep - int(mask.count_nonzero()):
        mask[_places(values == value)[:missing]] = True
    return mask


def _by_row(scores: Tensor, keep: Tensor) -> Tensor:
    threshold = torch.where(keep == 0, torch.inf, _kth_of_rows(scores, keep))[:, None]
    values, least = _values(scores), _values(threshold)
    mask, ties = torch.as_tensor(values > least), torch.as_tensor(values == least) & (keep[:, None] > 0)
    missing = keep - mask.sum(1)
    if torch.equal(ties.sum(1), missing):
        return mask | ties
    return mask | (ties & (ties.cumsum(1) <= missing[:, None]))


def _kth_of_rows(scores: Tensor, keep: Tensor) -> Tensor:
    """Of each row ``g`` the ``keep[g]``-th largest score, shape ``[groups]``; any where ``keep[g]`` is 0."""
    place = scores.shape[1] - keep.clamp(min=1)
    wanted = place.unique().tolist()
    if scores.device.type == "cpu" and 0 < len(wanted) <= _PLACES:
        ordered = torch.from_numpy(np.partition(_values(scores), wanted, axis=1))
    else:
        ordered = scores.sort(dim=1).values
    return ordered.gather(1, place[:, None])[:, 0]


def _by_rank(scores: Tensor, keep: Tensor) -> Tensor:
    units = scores.shape[1]
    columns = [scores[:, i] for i in range(units)]
    rank = torch.zeros((units, scores.shape[0]), dtype=torch.int8, device=scores.device)
    for i in range(units):
        for j in range(i + 1, units):
            first = columns[i] >= columns[j]
            rank[j] += first
            rank[i] += ~first
    return (rank < keep.to(torch.int8)).t().contiguous() if units else scores.bool()
