"""Recipe: what the user asked for. Typed, versioned, read from TOML or JSON; unknown keys and wrong types are refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from secateur.budgets.amount import parse_budget
from secateur.errors import RecipeError, did_you_mean
from secateur.sparsity import check_sparsity

#: A registered name, or a table with the name and its options: ``{name = "exponential", initial = 0.3}``.
Piece = str | dict[str, Any]


def _sparsity(value: Any) -> Any:
    return None if value is None else check_sparsity(value)


def _budget(value: Any) -> Any:
    return None if value is None else parse_budget(value).text


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)


def _weight(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


#: At least 0; or a pair, at the begin and at the end of the training.
_Share = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Weight = Annotated[_Share | tuple[_Share, _Share], BeforeValidator(_weight)]


class Distill(_Strict):
    """The unpruned model as the teacher: what the pruned one is asked to repeat, each part with a weight."""

    logits: Weight = 0.0
    """Of the divergence from the teacher's softened outputs."""
    output: Weight = 0.0
    """Of the relative squared difference of the outputs."""
    hidden: Weight = 0.0
    """Of the relative squared difference of the outputs of all blocks."""
    attention: Weight = 0.0
    """Of the divergence from the teacher's attention maps."""
    task: Weight = 0.0
    """Of the task's own loss."""
    temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 2.0
    """By which logits are divided."""


class FineTune(_Strict):
    """Training after each pruning step, with the masks held."""

    epochs: Annotated[int, Field(ge=1)] = 1
    """Epochs after each pruning step."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """AdamW, or SGD with Nesterov momentum."""
    lr: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1e-3
    """Highest learning rate; it falls to zero along a half cosine."""
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """Weight decay: decoupled for AdamW, L2 for SGD."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Momentum of SGD."""
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the steps during which the learning rate rises linearly."""
    distill: Distill | None = None
    """Learn from the unpruned model, instead of from labels or beside them."""


class Compress(_Strict):
    """Deep Compression after pruning: weights share a few values, or are rounded, and the artifact is entropy-coded."""

    bits: Annotated[float, Field(ge=1, le=12)] | None = None
    """Of each weight; 5 where no budget is given."""
    budget: Annotated[int, Field(ge=1)] | None = None
    """Bytes for all weights together, instead: bits are chosen layer by layer."""
    scheme: Literal["kmeans", "integer", "entropy"] = "kmeans"
    """A codebook for each layer; whole numbers with a scale for each output; the same without a largest number."""
    vector_bits: Annotated[float, Field(ge=1, le=16)] | None = 16
    """Of biases, norms and statistics."""
    fold_norms: bool = False
    """Put BatchNorms into the weights before them; needs calibration data."""


class Slimming(_Strict):
    """Training before the cut with an L1 penalty on the scales of BatchNorm (Liu et al. 2017), for the criterion bn_scale."""

    strength: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1e-4
    """Weight of the sum of the absolute scales in the loss."""
    epochs: Annotated[int, Field(ge=1)] = 1
    """Epochs."""
    optimizer: Literal["adamw", "sgd"] = "sgd"
    """SGD with Nesterov momentum, as in the paper, or AdamW, which rescales the penalty."""
    lr: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1e-2
    """Highest learning rate; it falls to zero along a half cosine."""
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """Weight decay: decoupled for AdamW, L2 for SGD."""


class Recipe(_Strict):
    """Everything that decides what is pruned and how. Two runs of one recipe on one model and data give the same bits.

    Example:
        >>> Recipe.make({"sparsity": 0.9, "criterion": "taylor"}).allocation is None
        True
    """

    version: Literal[1] = 1
    """Version of this format."""
    sparsity: Annotated[float | None, BeforeValidator(_sparsity)] = None
    """Fraction of the weights to remove, in [0, 1). n:m patterns fix it themselves."""
    budget: Annotated[str | None, BeforeValidator(_budget)] = None
    """What the model may cost at most, instead of a sparsity: "50% MACs", "2M params", "10 MB", or "5 ms" measured here."""
    criterion: Piece = "magnitude"
    """How much each weight matters."""
    reduction: str | None = None
    """How the scores of a unit's weights become one: sum, mean, l2, max or abs_sum. By default the criterion's own."""
    pattern: Piece = "element"
    """What is removed together: element, row, neuron, n:m ("2:4" keeps 2 of 4), block ("4x1"); channel, ffn, head, head_dim,
    width and layer are cut out for real."""
    allocation: Piece | None = None
    """How much each layer loses. By default global, and uniform for n:m. Of units cut out: uniform (the default), global,
    or isomorphic, by which those of groups that do the same in different blocks compete; sensitivity, by the curves of a
    scan; and of a budget gain (the default of milliseconds), which loses the least score for what it saves."""
    groups: Literal["modality"] | dict[str, tuple[str, ...]] | None = None
    """Layers that are compared among themselves only, each group losing the whole sparsity: "modality" finds those that read
    pixels, tokens and both; or names of parameters or modules, by group: {vision = ["vision_model"], text = ["text_model"]}."""
    schedule: Piece = "one-shot"
    """How the sparsity grows over the steps."""
    regrow: Piece = "none"
    """Of gradual pruning: whether removed weights may come back (splice, rigl, set, frozen)."""
    steps: Annotated[int, Field(ge=1, le=10_000)] = 1
    """Pruning steps. After each one statistics are taken anew, and the model is fine-tuned where that is asked for."""
    solver: Piece = "keep"
    """Who chooses the mask and repairs the surviving weights."""
    layers: tuple[str, ...] | None = None
    """Only these: names of parameters or modules, or shell patterns of them."""
    ignore: tuple[str, ...] = ()
    """Not these: names of parameters or modules, or shell patterns of them."""
    force: tuple[str, ...] = ()
    """Of patterns that cut units: what has to go, within the sparsity. Blocks by name for the pattern layer, other units by the
    outputs of a layer, as in ``layer1.0.conv1[3,5]``."""
    repair: Literal["none", "bias", "least-squares"] = "none"
    """Of patterns that cut units: how the layers whose inputs were cut make up for them, on the calibration data."""
    reestimate_norms: bool = False
    """Re-estimate BatchNorm statistics on the calibration data after pruning."""
    slimming: Slimming | None = None
    """Of patterns that cut units: training with sparse BatchNorm scales before the cut."""
    finetune: FineTune | None = None
    """Training after each pruning step."""
    compress: Compress | None = None
    """Few bits for each weight, and an entropy-coded artifact."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seed of everything random."""

    @model_validator(mode="after")
    def _one_target(self) -> Recipe:
        if self.sparsity is not None and self.budget is not None:
            raise ValueError(
                f"got sparsity={self.sparsity!r} and budget={self.budget!r}: give one of them, a budget chooses the sparsity."
            )
        return self

    @classmethod
    def make(cls, source: Recipe | Mapping[str, Any] | str | Path | None = None, **changes: Any) -> Recipe:
        """A recipe from a recipe, a mapping, a file (``.toml`` or ``.json``) or nothing, with `changes` laid over it.

        Raises:
            RecipeError: names the key, what was given, what is allowed, and the nearest key where one was misspelt.
        """
        if isinstance(source, Recipe):
            data: dict[str, Any] = source.model_dump(exclude_unset=True)
        elif isinstance(source, Mapping):
            data = dict(source)
        else:
            data = {} if source is None else _read(Path(source))
        data.update({k: v for k, v in changes.items() if v is not None})
        for key in ("layers", "ignore", "force"):
            if isinstance(data.get(key), list):
                data[key] = tuple(data[key])
        if isinstance(data.get("groups"), Mapping):
            data["groups"] = {k: tuple(v) if isinstance(v, list) else v for k, v in data["groups"].items()}
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise RecipeError(_explain(error, cls)) from None

    def to_toml(self) -> str:
        """The recipe as TOML: every key that differs from its default, and the version."""
        data = self.model_dump(exclude_defaults=True, exclude_none=True)
        lines = ["version = 1"]
        tables = {k: v for k, v in data.items() if isinstance(v, dict)}
        lines += [f"{k} = {_toml(v)}" for k, v in data.items() if k not in tables and k != "version"]
        for key, table in tables.items():
            lines += ["", f"[{key}]", *(f"{k} = {_toml(v)}" for k, v in table.items())]
        return "\n".join(lines) + "\n"

    @classmethod
    def json_schema(cls) -> dict[str, Any]:
        """JSON schema of the file format, which editors use to complete and check a recipe."""
        return {"$schema": "https://json-schema.org/draft/2020-12/schema", **cls.model_json_schema()}


def _read(path: Path) -> dict[str, Any]:
    if path.suffix not in (".toml", ".json"):
        raise RecipeError(f"a recipe is a .toml or .json file, got {str(path)!r}")
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise RecipeError(f"the recipe {str(path)!r} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise RecipeError(f"the recipe {str(path)!r} is not UTF-8 text: {error.reason}") from None
    try:
        data = json.loads(text) if path.suffix == ".json" else _toml_loads(text)
    except (ValueError, RecursionError) as error:
        raise RecipeError(f"the recipe {str(path)!r} is not valid {path.suffix[1:].upper()}: {error}") from None
    if not isinstance(data, dict):
        raise RecipeError(f"the recipe {str(path)!r} holds a {type(data).__name__}; expected a table of keys")
    data.pop("$schema", None)
    return data


def _toml_loads(text: str) -> dict[str, Any]:
    try:
        import tomllib
    except ImportError:
        import tomli as tomllib  # type: ignore[no-redef]
    return tomllib.loads(text)


def _toml(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_toml(v) for v in value) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k} = {_toml(v)}" for k, v in value.items()) + "}"
    # Strings, numbers and booleans are written alike in JSON and TOML, but for DEL, which TOML wants escaped.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _explain(error: ValidationError, model: type[BaseModel]) -> str:
    seen = {}
    for item in error.errors(include_url=False):
        keys = [str(p) for p in item["loc"] if not _is_branch(p)]
        where = ".".join(keys)
        if item["type"] == "extra_forbidden":
            known = _fields(model, keys[:-1])
            seen[where] = f"unknown key {where!r}{did_you_mean(keys[-1], known)} Known keys: {', '.join(known)}."
        elif where not in seen:
            given = item["input"]
            message = item["msg"].removeprefix("Value error, ")
            seen[where] = message if "got" in message else f"{where} = {given!r} ({type(given).__name__}): {message}"
    return "the recipe is not right: " + " ".join(seen.values())


def _is_branch(part: int | str) -> bool:
    """Whether a piece of pydantic's location names a branch of a union and not a key."""
    return isinstance(part, str) and (part in ("str", "int", "float") or part.startswith(("dict[", "function-", "tuple[")))


def _fields(model: type[BaseModel], path: list[str]) -> list[str]:
    known: dict[tuple[str, ...], type[BaseModel]] = {
        ("finetune",): FineTune,
        ("finetune", "distill"): Distill,
        ("compress",): Compress,
        ("slimming",): Slimming,
    }
    return list(known.get(tuple(path), model).model_fields)
