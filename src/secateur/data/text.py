"""``text:FILE``: blocks of tokens for language models, lines or columns of a table for encoders."""

from __future__ import annotations

import csv
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur.data.batches import Batch
from secateur.data.registry import DATA, Samples
from secateur.errors import DataError, did_you_mean
from secateur.models.loaded import Loaded
from secateur.sources import Source, existing_path

_BLOCK = 512


@dataclass(frozen=True)
class TokenBlocks:
    """Consecutive blocks of tokens of one long text; the ragged rest is left out. ``tokens [blocks, seqlen]``."""

    tokens: Tensor
    classes: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    def batch(self, indices: Sequence[int]) -> Batch:
        """``input_ids``, an ``attention_mask`` of ones and ``labels`` equal to the tokens: the model itself shifts them."""
        ids = self.tokens[torch.as_tensor(indices)]
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


@dataclass(frozen=True)
class TextLines:
    """Texts or pairs of texts, tokenised and padded when they are asked for."""

    texts: tuple[tuple[str, ...], ...]
    labels: tuple[float, ...] | None
    tokenizer: Any
    seqlen: int | None
    classes: tuple[str, ...] | None = None
    apart: bool = False  #: whether the texts of a pair are encoded each for itself

    def __len__(self) -> int:
        return len(self.texts)

    def batch(self, indices: Sequence[int]) -> Batch:
        """The tokenizer's encoding, padded to the longest text of the batch, with ``labels`` where there are some."""
        columns = [list(column) for column in zip(*(self.texts[i] for i in indices), strict=True)]
        pad = self.tokenizer.pad_token is not None
        if not pad and len(indices) > 1:
            raise DataError(
                "the tokenizer has no padding token, so lines cannot form a batch: use batch size 1 or blocks (seqlen=)"
            )
        settings = {"padding": pad, "truncation": True, "max_length": self.seqlen, "return_tensors": "pt"}
        if self.apart:
            batch: Batch = {
                side: dict(self.tokenizer(c, **settings)) for side, c in zip(("first", "second"), columns, strict=True)
            }
        else:
            batch = dict(self.tokenizer(*columns, **settings))
        if self.labels is not None:
            batch["labels"] = self._labels[torch.as_tensor(indices)]
        return batch

    @cached_property
    def _labels(self) -> Tensor:
        values = torch.tensor(self.labels, dtype=torch.float64)
        return values.long() if bool((values == values.round()).all()) else values.float()


@DATA.register("text", source="the user's files")
def from_text(
    source: Source,
    loaded: Loaded | None,
    *,
    seqlen: int | None = None,
    lines: bool | None = None,
    columns: Any = None,
    label: Any = None,
    apart: bool = False,
) -> Samples:
    """``text:FILE`` or ``text:FILE,FILE``: tokenised by the loaded model's tokenizer.

    For a language model the text is cut into blocks of `seqlen` tokens (512, or what the model can take), without special
    tokens. For an encoder, or with ``?lines=true``, every line that is not empty is a sample, cut at `seqlen` tokens.
    ``?columns=sentence&label=label`` or ``?columns=5,6&label=4`` reads a table instead (tabs or commas; names need a header
    line, numbers count from 0): one column of text or two for a pair, and one of labels. ``&apart=true`` encodes the texts of a
    pair each for itself, for models that are judged by the similarity of their embeddings.
    """
    tokenizer = loaded.tokenizer if loaded is not None else None
    if tokenizer is None or loaded is None:
        raise DataError("text data needs the tokenizer of the model: load one with hf:, or return a Loaded with a tokenizer")
    if seqlen is not None and (isinstance(seqlen, bool) or not isinstance(seqlen, int) or seqlen < 2):
        raise DataError(f"seqlen must be a whole number of tokens, at least 2, got {seqlen!r}")
    paths = _paths(source)
    length = _length(loaded, seqlen)
    if label is not None and columns is None:
        raise DataError(f"label={label!r} names a column: say with columns= which ones are text")
    if columns is not None:
        texts, labels = _table(paths, columns if isinstance(columns, tuple) else (columns,), label)
        if apart and len(texts[0]) != 2:
            raise DataError(f"apart=true needs two columns of text, got columns={columns!r}")
        return TextLines(texts, labels, tokenizer, length, apart=apart)
    if apart:
        raise DataError("apart=true is for pairs: say with columns= which two columns are text")
    if lines if lines is not None else loaded.task != "text-lm":
        found = [line for path in paths for line in _read(path).splitlines()]
        kept = tuple((line.strip(),) for line in found if line.strip())
        if not kept:
            raise DataError(f"{source.rest!r} has no line of text")
        return TextLines(kept, None, tokenizer, length)
    return _blocks("".join(_read(path) for path in paths), tokenizer, length or _BLOCK, source.rest)


def _blocks(text: str, tokenizer: Any, seqlen: int, name: str) -> TokenBlocks:
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.long)
    if len(ids) < seqlen:
        raise DataError(f"{name!r} has {len(ids)} tokens, fewer than one block of {seqlen}: give more text or ?seqlen=")
    return TokenBlocks(ids[: len(ids) // seqlen * seqlen].view(-1, seqlen))


def _paths(source: Source) -> list[Path]:
    parts = [source.rest] if os.path.exists(source.rest) else [p.strip() for p in source.rest.split(",") if p.strip()]
    paths = [existing_path(part, "text file", DataError) for part in parts]
    for path in paths:
        if not path.is_file():
            raise DataError(f"{str(path)!r} is not a file")
    return paths


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{str(path)!r} is not UTF-8 text: {error.reason} at byte {error.start}") from error
    except OSError as error:
        raise DataError(f"{str(path)!r} cannot be read: {error.strerror}") from error


def _length(loaded: Loaded, seqlen: int | None) -> int | None:
    """Tokens a sample may have: what was asked for, which the model must be able to take; else the smaller of that and 512."""
    positions = getattr(getattr(loaded.model, "config", None), "max_position_embeddings", None)
    if seqlen is not None and positions is not None and seqlen > positions:
        raise DataError(f"seqlen {seqlen} is more than the {positions} positions of {loaded.name or 'the model'}")
    return seqlen or min(_BLOCK, positions or _BLOCK)


def _table(
    paths: list[Path], columns: tuple[Any, ...], label: Any
) -> tuple[tuple[tuple[str, ...], ...], tuple[float, ...] | None]:
    if len(columns) > 2:
        raise DataError(f"columns= takes one column of text or two, got {columns}")
    texts: list[tuple[str, ...]] = []
    labels: list[float] = []
    for path in paths:
        rows = _rows(path)
        wanted, first = _indices(rows, (*columns, *(() if label is None else (label,))), path)
        for number, row in enumerate(rows[first:], first + 1):
            if len(row) <= max(wanted):
                raise DataError(f"{path.name}, row {number} has {len(row)} columns; column {max(wanted)} was asked for")
            texts.append(tuple(row[i] for i in wanted[: len(columns)]))
            if label is not None:
                labels.append(_number(row[wanted[-1]], path, number))
    if not texts:
        raise DataError(f"{', '.join(p.name for p in paths)}: the table has no rows")
    return tuple(texts), tuple(labels) if label is not None else None


def _rows(path: Path) -> list[list[str]]:
    """Rows of a table: separated by tabs, unquoted, where the first line has one; else by commas, quoted as CSV is."""
    lines = _read(path).splitlines()
    if lines and "\t" in lines[0]:
        return [line.split("\t") for line in lines if line]
    return [row for row in csv.reader(lines) if row]


def _indices(rows: list[list[str]], columns: tuple[Any, ...], path: Path) -> tuple[list[int], int]:
    """Positions of the columns, and the row where the data begins."""
    if all(isinstance(c, int) and not isinstance(c, bool) for c in columns):
        if min(columns) < 0:
            raise DataError(f"columns count from 0, got {min(columns)}")
        return list(columns), 0
    header = rows[0] if rows else []
    for column in columns:
        if column not in header:
            raise DataError(
                f"{path.name} has no column {column!r}{did_you_mean(str(column), header)} It has {', '.join(header)}."
            )
    return [header.index(c) for c in columns], 1


def _number(text: str, path: Path, row: int) -> float:
    try:
        return float(text)
    except ValueError:
        raise DataError(f"{path.name}, row {row}: the label {text!r} is not a number") from None
