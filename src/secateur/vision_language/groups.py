"""Layers by modality: found from what they read or named by the user, compared among themselves only, watched for collapse."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

from torch import IntTensor, nn

from secateur.data.batches import Batch, inputs_of
from secateur.errors import RecipeError, UnknownName
from secateur.layers import matches
from secateur.stats.reads import Reads, check_called, find_reads, inputs_by_modality, is_multimodal
from secateur.types import Allocation, LayerPlan, UnitScores

#: The recipe's word for groups that are found.
FOUND = "modality"
#: A layer or a group has collapsed that keeps less than this share of what the model keeps on average.
COLLAPSED = 0.1


def find_groups(
    model: nn.Module,
    names: Collection[str],
    wanted: str | Mapping[str, Sequence[str]],
    batch: Batch | None,
    *,
    seed: int = 0,
    reads: Reads | None = None,
) -> dict[str, tuple[str, ...]]:
    """The layers `names` by group: by modality where `wanted` is ``"modality"``, else as its patterns of names say.

    Layers that no pattern names are a group of their own, ``other``. `reads` is what is known of `batch` already.

    Raises RecipeError where no batch is there to follow, where all layers are of one modality, and for a layer of two groups;
    UnknownName for a pattern that matches nothing; DataError where an input is missing.
    """
    if isinstance(wanted, str):
        if batch is None:
            raise RecipeError("groups='modality' follows a batch through the model: pass data= or example=, or name the groups")
        return modality_groups(model, names, batch, seed=seed, reads=reads)
    owner: dict[str, str] = {}
    for group, patterns in wanted.items():
        for pattern in patterns:
            found = [n for n in names if matches(pattern, n)]
            if not found:
                raise UnknownName(f"layer in group {group!r}", pattern, _above(names))
            for name in found:
                if owner.setdefault(name, group) != group:
                    raise RecipeError(f"layer {name!r} is named in two groups, {owner[name]!r} and {group!r}: leave it to one")
    return _gathered(names, owner)


def modality_groups(
    model: nn.Module, names: Collection[str], batch: Batch, *, seed: int = 0, reads: Reads | None = None
) -> dict[str, tuple[str, ...]]:
    """The layers `names` by what they read in `batch`: ``vision``, ``text``, ``fusion`` where both, ``other`` where neither.

    A block (a member of a module list) that reads several modalities is of ``fusion`` as a whole, so that the queries of a
    cross-attention are not compared with other layers than its keys. Raises DataError where the batch lacks an input, and
    RecipeError where there is one modality only.
    """
    reads = find_reads(model, batch, seed=seed) if reads is None else reads
    if not is_multimodal(batch):
        check_called(model, names, reads, batch)
        what = ", ".join(inputs_by_modality(batch)) or "no modality that is known by name or type"
        given = ", ".join(inputs_of(batch)[1]) or "one tensor"
        raise RecipeError(
            f"groups='modality': the batch ({given}) feeds the model {what}, so there is nothing to keep apart. Leave groups "
            "out, or name them: groups={'vision': ['vision_model'], 'text': ['text_model']}."
        )
    blocks: dict[str, set[str]] = {}
    for name in names:
        blocks.setdefault(_block(model, name), set()).update(reads.modalities.get(name, ()))
    return _gathered(names, {name: _named(blocks[_block(model, name)], reads, name) for name in names})


def within(groups: Mapping[str, Sequence[str]], allocation: Allocation) -> Allocation:
    """The allocation by which the layers of each group are compared among themselves: each loses the whole sparsity."""

    def allocate(layers: Mapping[str, UnitScores], sparsity: float) -> dict[str, IntTensor]:
        counts: dict[str, IntTensor] = {}
        for names in groups.values():
            counts.update(allocation({n: layers[n] for n in names}, sparsity))
        return counts

    return allocate


def collapse_notes(layers: Iterable[LayerPlan], groups: Mapping[str, Sequence[str]] | None) -> list[str]:
    """What the report says of layers and groups of which next to nothing is left: less than a tenth of the model's density."""
    planned = {layer.name: layer for layer in layers}
    total, kept = _sums(planned.values())
    least = COLLAPSED * kept / total if total else 0.0
    notes = []
    for group, names in (groups or {}).items():
        weights, left = _sums(planned[n] for n in names if n in planned)
        if weights and left / weights < least:
            notes.append(
                f"{group} has collapsed: {left:,} of its {weights:,} weights are left ({left / weights:.2%}, the model keeps "
                f"{kept / total:.2%}). groups='modality' prunes each modality by itself."
            )
    thin = [f"{n} ({la.kept / la.parameters:.2%})" for n, la in planned.items() if 0 < la.kept < least * la.parameters]
    if thin:
        more = f" and {len(thin) - 5} more" if len(thin) > 5 else ""
        notes.append(
            f"next to nothing is left of these layers, while the model keeps {kept / total:.2%}: {', '.join(thin[:5])}{more}"
        )
    return notes


def _sums(layers: Iterable[LayerPlan]) -> tuple[int, int]:
    found = list(layers)
    return sum(layer.parameters for layer in found), sum(layer.kept for layer in found)


def _block(model: nn.Module, name: str) -> str:
    """The innermost member of a module list that holds the parameter; its own name where there is none."""
    parts = name.split(".")
    for end in range(len(parts) - 1, 0, -1):
        if isinstance(model.get_submodule(".".join(parts[: end - 1])), nn.ModuleList):
            return ".".join(parts[:end])
    return name


def _named(block: Collection[str], reads: Reads, name: str) -> str:
    found = reads.modalities.get(name, frozenset())
    if not found:
        return "other"
    return next(iter(block)) if len(block) == 1 else "fusion"


def _gathered(names: Collection[str], owner: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(owner.get(name, "other"), []).append(name)
    return {group: tuple(found) for group, found in groups.items()}


def _above(names: Iterable[str]) -> set[str]:
    """The names and those of all modules above them."""
    return {".".join(n.split(".")[:i]) for n in names for i in range(1, n.count(".") + 2)}
