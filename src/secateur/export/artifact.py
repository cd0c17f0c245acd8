"""`save` and `load`: a pruned model as a directory that is small, complete, checked, and never half-written.

::

    model.safetensors   every tensor, in the encoding that secateur.json names; or model.packed, entropy-coded
    secateur.json       format and library version, encoding of each tensor, aliases, plan, SHA-256 of every file
    masks.safetensors   only masks that the zeros of the weights do not already show
    recipe.toml         what was asked for
    report.json         what it cost and won
    README.md           how to load it, and how to read it without Secateur
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from secateur.coding import packed
from secateur.coding.tensor import Coded
from secateur.errors import ArtifactError, ModelError, did_you_mean
from secateur.export import container, manifest
from secateur.export.atomic import check_replaceable, replacing, write_synced
from secateur.export.encode import FORMATS, Encoder, Format, plain, same_bits
from secateur.export.manifest import FileEntry, Manifest
from secateur.export.masks import mask_parts
from secateur.export.pretrained import config_of
from secateur.export.reader import Artifact
from secateur.export.readme import readme
from secateur.export.state import Filler, ShapeMismatch, State, state_of, unwrapped
from secateur.progress import track
from secateur.types import Plan, Report

log = logging.getLogger("secateur")
_PLACEHOLDER = FileEntry(bytes=2**50, sha256="0" * 64)  # to know the size of secateur.json before the hashes
#: Artifact directories whose source is being built right now: one that names itself is refused.
_loading: ContextVar[frozenset[str]] = ContextVar("loading", default=frozenset())


def save(
    model: nn.Module,
    directory: str | os.PathLike[str],
    *,
    masks: Mapping[str, Tensor] | None = None,
    report: Report | None = None,
    recipe: str | None = None,
    plan: Plan | None = None,
    source: str | None = None,
    format: Format = "auto",
    coded: Mapping[str, Coded] | None = None,
    extra_files: Mapping[str, str | bytes] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write `model` as an artifact directory and return its path.

    Parameters and buffers, non-persistent ones too, come back bit by bit; tied ones are stored once and come back tied.
    `format` says how: "auto" and "bitmask" store a tensor as bitmask and values, "csr" as compressed sparse rows, in each
    case only where that is smaller than dense; "dense" leaves all dense, for other safetensors readers; "packed" writes one
    entropy-coded file, in which shared weights take a few bits each. `coded` has the tensors that are whole numbers times
    scales, as `secateur.coding.compress` makes them; packed, they are stored as such. `masks` are kept
    beside the weights and must agree with their zeros; `source` is the string from which `load` rebuilds the
    architecture ("hf:...", "timm:...", "module:callable"); `extra_files` go into the same directory in the same step.

    Where a plan cut a transformers model and its configuration builds the very model that is left, that goes along as
    ``config.json`` and "auto" leaves all tensors dense, so that `from_pretrained` loads the directory too.

    The files are written to a hidden sibling, synced, read back and compared with the model; then the sibling takes the
    directory's place. Killed at any moment, the directory is the old one or the new one. With ``overwrite=True`` an
    existing artifact is replaced; a directory that holds anything Secateur did not write is not.

    Raises ArtifactError for a target that exists, is in use or is not ours, for a full disk (nothing is lost), and for
    tensors that cannot be stored (lazy, meta, quantised, sparse).

    >>> save(model, "runs/first", source="timm:resnet18")            # doctest: +SKIP
    >>> load("runs/first")                                           # doctest: +SKIP
    """
    if format not in FORMATS:
        raise ArtifactError(f"unknown format {format!r}{did_you_mean(str(format), FORMATS)} Known: {', '.join(FORMATS)}.")
    state, gates = state_of(model), _gates_of(model)
    readable = plan is not None and plan.structural and format in ("auto", "dense") and gates is None
    config = config_of(model) if readable else None
    pretrained = {} if config is None else {"config.json": config}
    weights = _weight_parts(state, "dense" if pretrained and format == "auto" else format)
    mask_table, stored_masks = mask_parts(masks or {}, state)
    texts = _texts(state, weights, report, recipe, {**(extra_files or {}), **pretrained})
    parts = {} if format == "packed" else {manifest.WEIGHTS: [part for encoder in weights.values() for part in encoder.parts()]}
    if stored_masks:
        parts[manifest.MASKS] = stored_masks
    sizes = [container.file_bytes(p) for p in parts.values()] + [len(t) for t in texts.values()]
    packed_files = [manifest.PACKED] if format == "packed" else []
    announced = Manifest(
        version=3 if gates else 2 if packed_files else 1,
        source=_first_source(source),
        tensors={name: encoder.entry for name, encoder in weights.items()},
        aliases=dict(state.aliases),
        masks=mask_table,
        plan=None if plan is None else json.loads(json.dumps(plan.to_json())),
        dynamic=gates,
        files=dict.fromkeys([*packed_files, *parts, *texts], _PLACEHOLDER),
    )
    sizes.append(len(manifest.dump(announced)))
    with replacing(directory, overwrite=overwrite, sizes=sizes, foreign=_foreign) as folder:
        files = {name: _entry(folder / name, _write_packed(folder / name, state, coded or {})) for name in packed_files}
        files |= {name: _entry(folder / name, container.write(folder / name, p)) for name, p in parts.items()}
        for name, data in texts.items():
            write_synced(folder / name, data)
            files[name] = _entry(folder / name, hashlib.sha256(data).hexdigest())
        write_synced(folder / manifest.NAME, manifest.dump(announced.model_copy(update={"files": files})))
        _verify(folder, state)
    return Path(directory)


def check_target(directory: str | os.PathLike[str], *, overwrite: bool = False) -> None:
    """Raise now the ArtifactError that `save` would raise later: before hours of work, not after them."""
    check_replaceable(directory, overwrite=overwrite, foreign=_foreign)


def load(directory: str | os.PathLike[str], *, model: nn.Module | None = None) -> nn.Module:
    """The model saved in `directory`, checked against its hashes.

    With `model`, its parameters and buffers are filled and it is returned: names and shapes must be exactly those that
    were saved, dtypes become the saved ones, devices stay; a model on the meta device is made on the CPU. It is filled
    in place, tensor by tensor, after all that the file's headers tell was checked.

    Without `model`, the architecture is built from the source that was recorded by `save` and then filled. A source of
    the form "module:callable" or "file.py:callable" runs that code, as it did when the model was saved.

    What `dynamic` made comes back with its gates and its budget; `model` is then the model without gates, and takes them.

    Raises ArtifactError for a directory that is missing, damaged or hostile, for a model that does not fit, and where no
    source was recorded.
    """
    with Artifact(directory) as artifact:
        artifact.weights()  # refuse what is damaged before a model is built
        target = model if model is not None else _built(artifact)
        filler = _filler(artifact, target)
        for name, tensor in track(artifact.tensors(), "loading", len(artifact.manifest.tensors)):
            filler.fill(name, tensor)
        if artifact.manifest.dynamic is not None:
            target = filler.model
            target.budget = target.budget  # thresholds and the like follow from tensors that are here only now
    return target


def weights_bytes(model: nn.Module, *, format: Format = "auto") -> int:
    """Exact size in bytes of the ``model.safetensors`` that `save` would write. Writes nothing."""
    weights = _weight_parts(state_of(model), format)
    return container.file_bytes([part for encoder in weights.values() for part in encoder.parts()])


def _weight_parts(state: State, format: Format) -> dict[str, Encoder]:
    weights = {name: Encoder(name, kind, tensor, format) for name, (kind, tensor) in state.tensors.items()}
    keys: dict[str, str] = {}
    for name, encoder in weights.items():
        for part in encoder.parts():
            if part.key in keys:
                raise ArtifactError(
                    f"the tensors {keys[part.key]!r} and {name!r} would both be stored as {part.key!r}; rename one"
                )
            keys[part.key] = name
    _mention_negative_zeros(weights)
    return weights


def _mention_negative_zeros(weights: Mapping[str, Encoder]) -> None:
    """Say why a pruned model is larger than its sparsity promises."""
    for name, encoder in weights.items():
        worth = encoder.negative_zeros > 0.01 * encoder.tensor.numel()
        if worth and encoder.kind == "parameter" and encoder.encoding != "dense":
            log.warning(
                "%s holds %d negative zeros (-0.0), as weight * mask makes them. They are stored as values, so that every "
                "bit comes back; weight.masked_fill_(~mask, 0) instead makes the file smaller.",
                name,
                encoder.negative_zeros,
            )


def _texts(
    state: State, weights: Mapping[str, Encoder], report: Report | None, recipe: str | None, extra: Mapping[str, str | bytes]
) -> dict[str, bytes]:
    """The files other than tensors, by name."""
    texts = {manifest.README: readme(state, weights).encode()}
    if recipe is not None:
        texts[manifest.RECIPE] = recipe.encode()
    if report is not None:
        texts[manifest.REPORT] = json.dumps(report.to_json(), indent=1).encode()
    for name, data in extra.items():
        manifest.check_file_name(name)
        if name in manifest.OWN_FILES:
            raise ArtifactError(f"extra_files: {name!r} is written by save itself; choose another name")
        texts[name] = data.encode() if isinstance(data, str) else bytes(data)
    return texts


def _entry(path: Path, sha256: str) -> FileEntry:
    return FileEntry(bytes=path.stat().st_size, sha256=sha256)


def _write_packed(path: Path, state: State, coded: Mapping[str, Coded]) -> str:
    """Write the packed file, one tensor at a time; returns its SHA-256."""
    total = len(state.tensors)
    tensors = track(((name, plain(t), coded.get(name)) for name, (_, t) in state.tensors.items()), "saving", total)
    packed.write(path, tensors)
    with open(path, "rb") as file:
        return container.hash_file(file)


def _verify(folder: Path, state: State) -> None:
    """Read everything back and compare it with the model, before anything old is replaced."""
    with Artifact(folder) as artifact:
        artifact.check_files()
        for name, tensor in artifact.tensors():
            if not same_bits(tensor, state.tensors[name][1].cpu()):
                raise ArtifactError(
                    f"the tensor {name!r} did not come back as it was written: it changed during the save, or the disk or "
                    "memory is at fault. Nothing was replaced."
                )


def _foreign(directory: Path) -> str | None:
    """The reason why an existing directory must not be replaced, or None where it holds only what `save` wrote."""
    if not (directory / manifest.NAME).is_file():
        return f"it holds no {manifest.NAME}, so Secateur did not write it"
    known = {*manifest.OWN_FILES, "report.html"}
    try:
        with Artifact(directory) as artifact:
            known.update(artifact.manifest.files)
    except ArtifactError:
        pass  # a damaged artifact may be replaced too, as long as nothing else is there
    others = sorted(set(os.listdir(directory)) - known)
    return f"it also holds {others[0]!r}, which Secateur did not write there; move it away" if others else None


def _first_source(source: str | None) -> str | None:
    """`source`, or where it is an artifact without cuts, the source of that: so chains of artifacts do not grow."""
    directory = Path((source or "").removeprefix("artifact:"))
    if source is None or not (directory / manifest.NAME).is_file():
        return source
    with Artifact(directory) as artifact:
        plan = artifact.plan
        return source if plan is not None and plan.structural else artifact.manifest.source


def _built(artifact: Artifact) -> nn.Module:
    """The architecture from the recorded source."""
    source, here = artifact.manifest.source, os.path.realpath(artifact.path)
    if source is None:
        raise ArtifactError(
            f"{artifact.path} records no source of its architecture. Build the model yourself and pass it: "
            "sc.load(directory, model=fresh). To record one, save with source='timm:...', 'hf:...' or 'module:callable'."
        )
    file = os.path.realpath(source.partition("?")[0].rpartition(":")[0])
    if file.startswith(here + os.sep):
        raise ArtifactError(f"{artifact.path} names code inside itself ({source!r}) as its source; it is not run. Pass model=.")
    if here in _loading.get():
        raise ArtifactError(f"{artifact.path} names itself as its source ({source!r}). Pass model= instead.")
    from secateur.models import load_model

    with _marked(here):
        return load_model(source).model


@contextmanager
def _marked(here: str) -> Iterator[None]:
    token = _loading.set(_loading.get() | {here})
    try:
        yield
    finally:
        _loading.reset(token)


def _filler(artifact: Artifact, model: nn.Module) -> Filler:
    entries, aliases, plan = artifact.manifest.tensors, artifact.manifest.aliases, artifact.plan
    cut = plan is not None and plan.structural
    spare = copy.deepcopy(model) if cut and artifact.manifest.dynamic else model  # what was given gates cannot be cut
    try:
        return Filler(_gated(artifact, spare), entries, aliases)
    except ShapeMismatch as error:
        if plan is None or not cut:
            raise
        return Filler(_gated(artifact, _recut(artifact, model, plan, error)), entries, aliases)


def _gates_of(model: nn.Module) -> dict[str, Any] | None:
    """What secateur.json keeps of a `secateur.dynamic` model beside its tensors; None for any other."""
    from secateur.dynamic import Dynamic

    model = unwrapped(model)
    return json.loads(json.dumps(model.facts)) if isinstance(model, Dynamic) else None


def _gated(artifact: Artifact, model: nn.Module) -> nn.Module:
    """`model` with the gates that the artifact tells of."""
    from secateur.dynamic import rebuild

    facts = artifact.manifest.dynamic
    return model if facts is None else rebuild(model, facts)


def _recut(artifact: Artifact, model: nn.Module, plan: Plan, mismatch: ShapeMismatch) -> nn.Module:
    """The one place where the cuts of a plan are applied to a model that is still whole, in place."""
    from secateur.graph import recut

    try:
        return recut(model, plan)
    except (ModelError, AttributeError, TypeError, IndexError, ValueError, RuntimeError) as error:
        raise ArtifactError(
            f"{artifact.path} holds a model from which {len(plan.cuts)} slices and {len(plan.dropped)} blocks were cut, and "
            "the cuts do not fit this one: "
            f"{mismatch} {error}"
        ) from error
