"""Runs a calibrated pruning run in forked children that are killed at random moments, and resumes what they leave.

    python killed_again_and_again.py FOLDER KILLS SEED [stream]

A fork starts in milliseconds where a fresh interpreter takes seconds, so many moments can be tried. Prints as JSON how many
children were killed, how many runs found state to go on from, and the digests of what the finished runs wrote.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import itertools
import json
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from test_solve_resume import network

import secateur as sc
from secateur.models.torchvision_shim import prepare_torchvision


def run(out: Path) -> None:
    """A calibrated run in two steps, without what takes time and leaves no state: the page and the timing."""
    prune = importlib.import_module("secateur.prune")  # sc.prune is the function
    prune.render = lambda report: ""
    prune._timed_side_by_side = lambda model, pruned, example, before, after: (before, after)
    data = [torch.randn(20, 6, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    more = {"schedule": "cubic", "steps": 2, "pattern": "element", "criterion": "wanda", "solver": "sparsegpt"}
    sc.prune(network(), sparsity=0.6, data=data, out=out, overwrite=True, **more)


def streamed(checkpoint: Path, out: Path) -> None:
    """The same of a checkpoint that is read a block at a time."""
    data = [{"input_ids": torch.randint(32, (2, 9), generator=torch.Generator().manual_seed(i))} for i in range(2)]
    sc.prune_checkpoint(checkpoint, out=out, data=data, sparsity=0.5, solver="sparsegpt", overwrite=True)


def small_llama(folder: Path) -> Path:
    """A checkpoint in several shards."""
    prepare_torchvision()
    transformers = importlib.import_module("transformers")
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "checkpoint", max_shard_size="6KB")
    return folder / "checkpoint"


def forked(work: Callable[[], None], *, seconds: float | None = None, files: int | None = None) -> bool:
    """Whether `work` was killed in a child of its own: `seconds` after it began, or as it put `files` files in their places."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            if files is not None:
                dies_after(files)
            work()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        raise SystemExit("a run failed by itself")
    return os.WIFSIGNALED(status)


def dies_after(files: int) -> None:
    """This process is killed at the end of its `files`-th os.replace, by which every file of state comes to its place."""
    replace, left = os.replace, itertools.count(files - 1, -1)

    def last(*args: Any, **kwargs: Any) -> None:
        replace(*args, **kwargs)
        if next(left) == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    os.replace = last


def digest(out: Path) -> str:
    """Of everything that the run wrote but the report, which holds times."""
    files = [p for p in sorted(out.rglob("*.safetensors")) if p.is_file()]
    assert files
    return hashlib.sha256(b"".join(p.name.encode() + p.read_bytes() for p in files)).hexdigest()


def repeat(folder: Path, kills: int, seed: int, work: Callable[[Path], None]) -> dict[str, object]:
    """Kill and resume until `kills` children died, each finished run in a place of its own.

    Every other child is killed at a moment drawn from the time of a whole run, the others by the count of their files: on a
    busy machine, where times say little, there is state to go on from all the same.
    """
    rng = random.Random(seed)
    work(folder / "warm")  # here, so that no child has to import anything
    started = time.monotonic()
    forked(lambda: work(folder / "whole"))
    whole = time.monotonic() - started
    killed = resumed = 0
    digests = [digest(folder / "whole")]
    while killed < kills:
        out = folder / f"run{len(digests)}"
        while True:
            state = list(folder.glob(f".{out.name}.*/**/*.safetensors"))
            resumed += bool(state)
            end = {"files": rng.randint(1, 3)} if killed % 2 else {"seconds": rng.uniform(0, 1.1 * whole)}
            if not forked(lambda out=out: work(out), **(end if killed < kills else {})):
                break
            killed += 1
        digests.append(digest(out))
    left = sorted(p.name for p in folder.iterdir() if p.name.startswith("."))
    return {"killed": killed, "resumed": resumed, "digests": digests, "left": left}


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.manual_seed(0)
    place = Path(sys.argv[1])
    work = functools.partial(streamed, small_llama(place)) if "stream" in sys.argv else run
    print(json.dumps(repeat(place, int(sys.argv[2]), int(sys.argv[3]), work)))
