"""``hf:NAME_OR_DIR``: models of the Transformers library, from a directory or the hub."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from secateur.errors import MissingExtra, ModelError
from secateur.models.loaded import ImageInput, Loaded, Task
from secateur.models.registry import MODELS
from secateur.models.safety import check_headers, no_pickle
from secateur.models.torchvision_shim import prepare_torchvision
from secateur.sources import Source, blaming, existing_path

log = logging.getLogger("secateur")

_HUB_NAME = re.compile(r"(?:[A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]{0,95}")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_EXAMPLE_TEXT = "Pruning removes what a network does not need."


@MODELS.register("hf", source="Wolf et al. 2020, Transformers: State-of-the-Art Natural Language Processing", dtype=True)
def from_huggingface(
    source: Source, *, gguf_file: str | None = None, revision: str | None = None, dtype: torch.dtype | None = None
) -> Loaded:
    """``hf:NAME_OR_DIR?gguf_file=x.gguf&revision=main``: the class that the checkpoint's config names.

    Weights are read from safetensors or gguf; pickled ones are refused, and code of the hub is never run.
    """
    transformers = _import_transformers()
    place, folder = _place(source)
    if folder is not None:
        _check_folder(folder, gguf_file)
    given: dict[str, Any] = {"trust_remote_code": False, "revision": revision or "main"}
    files: dict[str, Any] = {"gguf_file": gguf_file} if gguf_file else {}
    with no_pickle(), _quiet(transformers), _explained(source.rest):
        config = transformers.AutoConfig.from_pretrained(place, **given, **files)
        make = _class_of(transformers, config, causal=gguf_file is not None)
        safe = files or {"use_safetensors": True}
        model, info = make.from_pretrained(place, dtype=dtype or "auto", output_loading_info=True, **given, **safe)
        tokenizer = _tokenizer(transformers, place, folder, {**given, **files})
    if missing := sorted(info["missing_keys"]):
        log.warning("hf:%s: the checkpoint has no values for %s; they are drawn at random", source.rest, ", ".join(missing[:5]))
    name = Path(gguf_file or place).name.removesuffix(".gguf")
    image = _image(transformers, place, model)
    task = _task(model, image)
    return Loaded(model, str(_canonical(source, folder)), name, task, _example(model, tokenizer, image), tokenizer, image)


def skeleton(folder: Path) -> Loaded:
    """The model and tokenizer of a directory with its config.json, without reading any weights: they are drawn at random.

    Raises ModelError for a directory that is no Hugging Face model.
    """
    transformers = _import_transformers()
    _check_folder(folder, None)
    given = {"trust_remote_code": False}
    with no_pickle(), _quiet(transformers), _explained(str(folder)):
        config = transformers.AutoConfig.from_pretrained(str(folder), **given)
        model = _class_of(transformers, config, causal=False)(config).eval()
        tokenizer = _tokenizer(transformers, str(folder), folder, given)
    image = _image(transformers, str(folder), model)
    return Loaded(model, f"hf:{folder}", folder.name, _task(model, image), None, tokenizer, image)


def _import_transformers() -> Any:
    prepare_torchvision()
    try:
        import transformers
    except ModuleNotFoundError as error:
        raise MissingExtra(error.name or "transformers", "hf", "an hf: model") from error
    return transformers


def _place(source: Source) -> tuple[str, Path | None]:
    """What from_pretrained is given, and the folder where it is one."""
    if os.path.isdir(os.path.expanduser(source.rest)):
        folder = Path(source.rest).expanduser().resolve()
        return str(folder), folder
    if not _HUB_NAME.fullmatch(source.rest) or ".." in source.rest or "--" in source.rest:
        existing_path(source.rest, "model directory", ModelError)
        raise ModelError(f"{source.rest!r} is neither a directory nor a hub's name such as 'organisation/model'")
    return source.rest, None


def _canonical(source: Source, folder: Path | None) -> Source:
    return source if folder is None else Source(source.kind, str(folder), source.options)


def _check_folder(folder: Path, gguf_file: str | None) -> None:
    if gguf_file is not None:
        if Path(gguf_file).name != gguf_file:
            raise ModelError(f"gguf_file {gguf_file!r} must be the name of a file in {str(folder)!r}, not a path")
        existing_path(str(folder / gguf_file), "gguf file", ModelError)
        return
    if not (folder / "config.json").is_file():
        ggufs = sorted(p.name for p in folder.glob("*.gguf"))
        more = f" It holds {ggufs[0]}: write ?gguf_file={ggufs[0]}" if ggufs else ""
        raise ModelError(f"the directory {str(folder)!r} has no config.json, so it is no Hugging Face model.{more}")
    check_headers(folder)
    if not any(folder.glob("*.safetensors")):
        pickles = sorted(p.name for pattern in _PICKLES for p in folder.glob(pattern))
        if pickles:
            raise ModelError(
                f"the weights in {str(folder)!r} are pickled ({pickles[0]}), which can run code: refused. Convert them with "
                "model.save_pretrained(dir), which writes safetensors, where you trust their origin."
            )
        raise ModelError(f"the directory {str(folder)!r} has a config.json and no .safetensors weights")


def _class_of(transformers: Any, config: Any, *, causal: bool) -> Any:
    """The model class that the config's `architectures` names; where it names none, the bare model or the causal one."""
    names = config.architectures or []
    if not names:
        return transformers.AutoModelForCausalLM if causal else transformers.AutoModel
    found = getattr(transformers, str(names[0]), None)
    if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
        raise ModelError(
            f"the config names the architecture {names[0]!r}, which transformers {transformers.__version__} does not have. "
            "Code that ships with a checkpoint is never run: import its class yourself and use file.py:callable."
        )
    return found


def _tokenizer(transformers: Any, place: str, folder: Path | None, given: dict[str, Any]) -> Any:
    """The tokenizer beside the weights, or None where a folder has none."""
    known = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json", "tokenizer.model")
    if folder is not None and "gguf_file" not in given and not any((folder / name).is_file() for name in known):
        return None
    try:
        return transformers.AutoTokenizer.from_pretrained(place, **given)
    except (OSError, ValueError, KeyError) as error:
        log.warning("hf:%s: no tokenizer could be loaded: %s", place, str(error).partition("\n")[0])
        return None


def _image(transformers: Any, place: str, model: Any) -> ImageInput | None:
    """Preprocessing by preprocessor_config.json, else by the config, for networks that take pixels alone."""
    if model.main_input_name != "pixel_values" or getattr(model.config, "text_config", None) is not None:
        return None
    try:
        facts, _ = transformers.ImageProcessingMixin.get_image_processor_dict(place)
    except OSError:
        facts = {}
    size = _size(facts.get("crop_size") or facts.get("size") or getattr(model.config, "image_size", None))
    if size is None:
        return None
    short = (facts.get("size") or {}).get("shortest_edge") if isinstance(facts.get("size"), dict) else None
    channels = int(getattr(model.config, "num_channels", 3))
    mean, std = tuple(facts.get("image_mean") or (0.5,)), tuple(facts.get("image_std") or (0.5,))
    interpolation = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}.get(facts.get("resample", 2), "bilinear")
    return ImageInput(size, channels, mean, std, short, interpolation)


def _size(value: Any) -> tuple[int, int] | None:
    if isinstance(value, dict):
        side = value.get("shortest_edge")
        value = (value.get("height", side), value.get("width", side))
    if isinstance(value, int):
        value = (value, value)
    if not isinstance(value, (tuple, list)) or len(value) != 2 or not all(isinstance(v, int) for v in value):
        return None
    return int(value[0]), int(value[1])


def _task(model: Any, image: ImageInput | None) -> Task:
    if image is not None:
        return "image"
    if model.main_input_name != "input_ids" or model.config.is_encoder_decoder:
        return "other"
    causal = type(model).__name__.endswith(("ForCausalLM", "LMHeadModel"))
    return "text-lm" if causal else "text-encoder"


def _example(model: Any, tokenizer: Any, image: ImageInput | None) -> Any:
    if image is not None:
        return torch.zeros(1, image.channels, *image.size)
    if model.main_input_name != "input_ids" or model.config.is_encoder_decoder:
        return None
    if tokenizer is not None:
        encoded = tokenizer(_EXAMPLE_TEXT, return_tensors="pt")
        return {"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"]}
    ids = torch.arange(8).remainder(model.config.vocab_size)[None]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@contextmanager
def _explained(name: str) -> Iterator[None]:
    """Turn the ways in which a hub or a file can fail into one sentence each."""
    try:
        with blaming(f"transformers, loading {name!r},", ModelError):
            yield
    except ModelError as error:
        said = str(error.__cause__)
        if "couldn't connect" in said or "offline mode" in said.lower():
            raise ModelError(f"the hub cannot be reached and {name!r} is not in its local cache") from error.__cause__
        if "is not a valid model identifier" in said or "is not a local folder" in said:
            raise ModelError(
                f"there is no directory {name!r} and the hub has no such model, or it is private"
            ) from error.__cause__
        if "does not appear to have a file named" in said and "safetensors" in said:
            raise ModelError(f"{name!r} offers pickled weights only, which can run code: refused") from error.__cause__
        raise


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """No progress bars of the library's own inside the block: bars are the command line's business."""
    logging_ = transformers.utils.logging
    shown = logging_.is_progress_bar_enabled()
    logging_.disable_progress_bar()
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # the bar of gguf's conversion heeds no setting
            yield
    finally:
        if shown:
            logging_.enable_progress_bar()
