"""Guards around the loaders of other libraries: no pickle, no bots, no bars, no drawn numbers that change the user's."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from secateur.errors import ModelError

#: A longer safetensors header is an attack: 80 MB of one cost 11 s and 460 MB in the library's parser.
LONGEST_HEADER = 10_000_000

_ENVIRONMENT = {
    "TORCH_FORCE_WEIGHTS_ONLY_LOAD": "1",  # a torch.load deep inside another library runs no code from the file
    "DISABLE_SAFETENSORS_CONVERSION": "1",  # transformers would ask a bot on the hub to convert pickles in the user's name
}


@contextmanager
def no_pickle() -> Iterator[None]:
    """Inside the block no torch.load, however deep in another library, runs what a pickle says. Not for the user's own code."""
    before = {name: os.environ.get(name) for name in _ENVIRONMENT}
    os.environ.update(_ENVIRONMENT)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def seeded(seed: int = 0) -> Iterator[None]:
    """Inside the block torch draws from `seed`; after it the user's generator goes on where it was.

    So a network without pretrained weights is the same each time that its source is loaded.
    """
    with torch.random.fork_rng(devices=[]):
        reseed(seed)
        yield


def reseed(seed: int = 0) -> None:
    """Begin the draws of a `seeded` block again, once code that is run only the first time may have drawn from them."""
    torch.random.default_generator.manual_seed(seed)


def check_headers(folder: Path) -> None:
    """Raise ModelError for a safetensors file in `folder` whose header claims over `LONGEST_HEADER` or more than is there."""
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
        if length > min(LONGEST_HEADER, path.stat().st_size - 8):
            raise ModelError(f"{str(path)!r} is broken or hostile: its header claims {length} bytes of {path.stat().st_size}")
