"""From the options of a command to a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from secateur.errors import RecipeError

if TYPE_CHECKING:
    from secateur.recipe import Recipe


def recipe_of(
    file: Path | None,
    *,
    finetune: int | None = None,
    lr: float | None = None,
    optimizer: str | None = None,
    compress: float | None = None,
    slimming: int | None = None,
    slimming_strength: float | None = None,
    **changes: Any,
) -> Recipe:
    """The recipe in `file`, if any, with the options that were given laid over it."""
    from secateur.recipe import Recipe

    base = Recipe.make(file)
    given = {k: piece(v) for k, v in changes.items() if v not in (None, [], False)}
    tuning = {k: v for k, v in (("epochs", finetune), ("lr", lr), ("optimizer", optimizer)) if v is not None}
    if tuning:
        if finetune is None and base.finetune is None:
            raise RecipeError("--lr and --optimizer are for fine-tuning: give --finetune EPOCHS too")
        given["finetune"] = _over(base.finetune, tuning)
    if compress is not None:
        given["compress"] = _over(base.compress, {"bits": compress})
    slim = {k: v for k, v in (("epochs", slimming), ("strength", slimming_strength)) if v is not None}
    if slim:
        given["slimming"] = _over(base.slimming, slim)
    return Recipe.make(base, **given)


def _over(section: Any, changes: dict[str, Any]) -> dict[str, Any]:
    """What a section of a recipe says, if it is there, with `changes` laid over it."""
    return {**(section.model_dump(exclude_unset=True) if section else {}), **changes}


def piece(value: Any) -> Any:
    """``"channel?round_to=8"`` -> ``{"name": "channel", "round_to": 8}``; all else as it is."""
    if not isinstance(value, str) or "?" not in value:
        return value
    from secateur.sources import parse_options

    name, _, options = value.partition("?")
    return {"name": name, **parse_options(options, value, RecipeError)}


def scanned(pattern: Any, usual: tuple[float, ...]) -> tuple[float, ...] | None:
    """The sparsities of a scan that names none: the usual ones, or None where the pattern fixes its own (2:4, layer)."""
    from secateur.patterns import make_pattern

    return usual if make_pattern(pattern).sparsity is None else None


def listed(text: str | None) -> list[str]:
    """``"a,b"`` -> ``["a", "b"]``; nothing for None."""
    return [part.strip() for part in text.split(",") if part.strip()] if text else []


def numbers(text: str | None, option: str) -> list[float]:
    """``"0.3,0.5"`` -> ``[0.3, 0.5]``. Raises RecipeError naming the option and what is no number."""
    values = []
    for part in listed(text):
        try:
            values.append(float(part))
        except ValueError:
            raise RecipeError(f"{option} takes a number or several separated by commas, got {part!r}") from None
        if part.lstrip("+-").isdigit():
            raise RecipeError(f"{option} is a fraction of the weights; {part!r} is a whole number. Write {part}.0 or 0.{part}.")
    return values


def read_report(path: Path) -> Any:
    """The report of a run: `path` is its directory or its report.json. Raises ArtifactError where it is none."""
    import json

    from secateur.errors import ArtifactError
    from secateur.types import Report

    file = path / "report.json" if path.is_dir() else path
    try:
        return Report.from_json(json.loads(file.read_text(encoding="utf-8")))
    except OSError as error:
        raise ArtifactError(f"no report at {str(file)!r}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ArtifactError(f"{str(file)!r} is no report of Secateur: {type(error).__name__}: {error}") from None
