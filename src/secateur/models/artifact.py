"""A directory that `secateur.save` wrote, as a model source."""

from __future__ import annotations

from dataclasses import replace

from secateur.errors import ModelError
from secateur.models.loaded import Loaded
from secateur.models.registry import MODELS, noting
from secateur.sources import Source


@MODELS.register("artifact", source="secateur.export.artifact")
def from_artifact(source: Source) -> Loaded:
    """A directory with ``secateur.json``: the pruned model that was saved there, checked against its hashes."""
    folder = source.path("directory")
    if not (folder / "secateur.json").is_file():
        found = "a Hugging Face model: write hf:" + source.rest if (folder / "config.json").is_file() else "no artifact"
        raise ModelError(f"the directory {source.rest!r} has no secateur.json; it is {found}")
    from secateur.export.artifact import load

    with noting() as built:
        model = load(folder)
    known = next((b for b in built if b.model is model), Loaded(model))  # the source that it was first loaded from knows more
    return replace(known, source=f"artifact:{folder}", name=folder.name)
