"""``secateur.json``: what an artifact directory holds, and how each tensor is encoded. Read as if an enemy wrote it."""

from __future__ import annotations

import hashlib
import json
import re
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

import secateur
from secateur.errors import ArtifactError
from secateur.export.container import DTYPES, elements, parse_json
from secateur.types import Plan

NAME = "secateur.json"
WEIGHTS = "model.safetensors"
PACKED = "model.packed"  #: instead of the former, where weights are entropy-coded
MASKS = "masks.safetensors"
RECIPE = "recipe.toml"
REPORT = "report.json"
README = "README.md"
#: Files that `sc.save` writes itself; `extra_files` must have other names.
OWN_FILES = (NAME, WEIGHTS, PACKED, MASKS, RECIPE, REPORT, README)

#: Of the format. A reader refuses later ones. 1 is written unless weights are packed, which came with 2, or the model has
#: gates (`secateur.dynamic`), which came with 3.
VERSION = 3
SIZE_CAP = 32_000_000  #: bytes of secateur.json that are read at most
_PLAIN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,199}")
_STRICT = ConfigDict(strict=True, extra="forbid", frozen=True)

#: torch dtypes by the names that secateur.json uses: what the file can hold, and complex numbers as pairs of it.
TORCH_DTYPES = {
    str(dtype).removeprefix("torch."): dtype for dtype in (*DTYPES.values(), torch.complex32, torch.complex64, torch.complex128)
}

Encoding = Literal["dense", "bitmask", "csr", "packed"]
#: "transient" is a buffer that the module itself would not put in its state dict (persistent=False).
Kind = Literal["parameter", "buffer", "transient"]


class TensorEntry(BaseModel):
    """One tensor: what it is in the model, and how it is encoded in the weights file."""

    model_config = _STRICT
    kind: Kind
    encoding: Encoding
    dtype: str
    shape: list[int]


class FileEntry(BaseModel):
    """One file of the directory."""

    model_config = _STRICT
    bytes: int
    sha256: str


class Manifest(BaseModel):
    """All of ``secateur.json`` but its checksum."""

    model_config = _STRICT
    format: Literal["secateur"] = "secateur"
    version: int = 1
    secateur: str = secateur.__version__  #: version of the library that wrote it
    source: str | None = None  #: where the architecture comes from, as `secateur.models.load_model` reads it
    tensors: dict[str, TensorEntry]
    aliases: dict[str, str] = Field(default_factory=dict)  #: further name of a tied tensor -> name it is stored under
    masks: dict[str, Literal["nonzero", "stored"]] = Field(default_factory=dict)  #: "nonzero": true where the weight is not 0
    plan: dict[str, Any] | None = None
    dynamic: dict[str, Any] | None = None  #: method, options and budget of the gates; not written where there are none
    files: dict[str, FileEntry]

    @property
    def weights(self) -> str:
        """Name of the file that holds the weights."""
        return PACKED if PACKED in self.files else WEIGHTS

    def parsed_plan(self) -> Plan | None:
        """The plan that was carried out. Raises ArtifactError where it is malformed."""
        try:
            return None if self.plan is None else Plan.from_json(self.plan)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ArtifactError(f"{NAME}: the plan is malformed ({type(error).__name__}: {str(error)[:200]})") from None


def dump(manifest: Manifest) -> bytes:
    """The text of ``secateur.json``, with a checksum of itself as the last entry."""
    content = manifest.model_dump(exclude={"dynamic"} if manifest.dynamic is None else None)
    text = _pretty({**content, "checksum": _checksum(content)}).encode()
    if len(text) > SIZE_CAP:
        raise ArtifactError(f"{NAME} would have {len(text)} bytes; only {SIZE_CAP} are read back. The plan is too large.")
    return text


def parse(text: bytes) -> Manifest:
    """What `dump` wrote, checked. Raises ArtifactError for anything else."""
    content = parse_json(text, NAME, containers=SIZE_CAP // 20)
    if not isinstance(content, dict) or content.get("format") != "secateur":
        raise ArtifactError(f'{NAME} does not say that it is a Secateur artifact ("format": "secateur")')
    version = content.get("version")
    if type(version) is not int or version < 1:
        raise ArtifactError(f"{NAME} has the format version {str(version)[:40]!r}; expected a whole number from 1 to {VERSION}")
    if version > VERSION:
        raise ArtifactError(
            f"{NAME} has format version {version}, this Secateur reads up to {VERSION}: update Secateur to load it"
        )
    checksum = content.pop("checksum", None)
    if checksum != _checksum(content):
        raise ArtifactError(f"{NAME} does not match its own checksum: it was damaged or edited. Save the model again.")
    try:
        manifest = Manifest.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(x)[:100] for x in first["loc"])
        raise ArtifactError(f"{NAME}: {where}: {first['msg']}") from None
    _check(manifest)
    return manifest


def check_file_name(name: str) -> None:
    """Refuse file names that could lead out of the directory or hide in it."""
    if not _PLAIN.fullmatch(name):
        raise ArtifactError(f"{name[:200]!r} is no plain file name (letters, digits, '.', '_', '-'; no folders, not hidden)")


def _pretty(content: dict[str, Any]) -> str:
    """JSON with one line for each tensor, file and alias, and none for each number."""
    lines = []
    for key, value in content.items():
        if isinstance(value, dict) and value:
            inner = ",\n".join(f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in value.items())
            lines.append(f' "{key}": {{\n{inner}\n }}')
        else:
            lines.append(f' "{key}": {json.dumps(value)}')
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _checksum(content: dict[str, Any]) -> str:
    try:
        text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    except RecursionError:
        raise ArtifactError(f"{NAME} is nested too deeply") from None
    return hashlib.sha256(text.encode()).hexdigest()


def _check(manifest: Manifest) -> None:
    """What types alone do not say."""
    for name in manifest.files:
        check_file_name(name)
    if (WEIGHTS in manifest.files) == (PACKED in manifest.files):
        raise ArtifactError(f"{NAME} lists no {WEIGHTS} and no {PACKED}, or both of them")
    for name, entry in manifest.tensors.items():
        if entry.dtype not in TORCH_DTYPES:
            raise ArtifactError(f"{NAME}: the tensor {name[:200]!r} has the unknown dtype {entry.dtype[:40]!r}")
        if any(d < 0 for d in entry.shape) or elements(entry.shape) is None:
            raise ArtifactError(f"{NAME}: the tensor {name[:200]!r} has an impossible shape: {str(entry.shape)[:200]}")
        if (entry.encoding == "packed") != (PACKED in manifest.files):
            raise ArtifactError(f"{NAME}: the tensor {name[:200]!r} is {entry.encoding}, which {manifest.weights} cannot hold")
    for alias, name in manifest.aliases.items():
        if alias in manifest.tensors or name not in manifest.tensors:
            raise ArtifactError(f"{NAME}: the alias {alias[:200]!r} of {name[:200]!r} does not name one stored tensor")
    for name in manifest.masks:
        if name not in manifest.tensors and name not in manifest.aliases:
            raise ArtifactError(f"{NAME}: there is a mask for {name[:200]!r}, but no such tensor")
    if "stored" in manifest.masks.values() and MASKS not in manifest.files:
        raise ArtifactError(f"{NAME} speaks of stored masks but lists no {MASKS}")
