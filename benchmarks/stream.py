"""A checkpoint larger than a cap on memory, pruned: peak memory, time, and that a kill loses little.

    python benchmarks/stream.py /big/disk --gigabytes 20 --cap 6

Writes a synthetic Llama of bfloat16 blocks in shards below the folder that is given, prunes it in a process whose data segment
may not grow beyond the cap, kills that process once on its way, goes on, and removes everything. It takes twice the size of the
checkpoint and some on the disk.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from conditions import conditions, show, table

HIDDEN, INTERMEDIATE, HEADS, VOCABULARY = 4096, 11008, 32, 32000
SHARD = 2 << 30


def block_shapes(index: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of one Llama block."""
    prefix, square = f"model.layers.{index}.", (HIDDEN, HIDDEN)
    shapes: dict[str, tuple[int, ...]] = {f"{prefix}self_attn.{n}_proj.weight": square for n in "qkvo"}
    shapes |= {f"{prefix}mlp.{n}_proj.weight": (INTERMEDIATE, HIDDEN) for n in ("gate", "up")}
    shapes[f"{prefix}mlp.down_proj.weight"] = (HIDDEN, INTERMEDIATE)
    return shapes | {f"{prefix}{n}_layernorm.weight": (HIDDEN,) for n in ("input", "post_attention")}


def make(folder: Path, gigabytes: float) -> float:
    """Write the checkpoint; its size in GB."""
    from secateur.export.container import Part, write
    from secateur.models.torchvision_shim import prepare_torchvision

    prepare_torchvision()
    import transformers

    ends = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN), "lm_head.weight": (VOCABULARY, HIDDEN)}
    ends["model.norm.weight"] = (HIDDEN,)
    size = {n: 2 * math.prod(s) for n, s in block_shapes(0).items()}
    blocks = round((gigabytes * 1e9 - sum(2 * math.prod(s) for s in ends.values())) / sum(size.values()))
    shapes: dict[str, tuple[int, ...]] = dict(ends)
    for i in range(blocks):
        shapes |= block_shapes(i)
    noise = torch.randn(VOCABULARY * HIDDEN, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()

    def part(name: str, shape: tuple[int, ...]) -> Part:
        if len(shape) == 1:
            return Part(name, torch.bfloat16, shape, lambda: torch.ones(shape, dtype=torch.bfloat16))
        return Part(name, torch.bfloat16, shape, lambda: noise[: math.prod(shape)].view(shape))

    folder.mkdir(parents=True)
    shards: list[list[str]] = [[]]
    for name in shapes:
        if sum(2 * math.prod(shapes[n]) for n in shards[-1]) > SHARD:
            shards.append([])
        shards[-1].append(name)
    total = 0
    for i, names in enumerate(shards, 1):
        path = folder / f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        write(path, [part(n, shapes[n]) for n in names], metadata={"format": "pt"})
        total += path.stat().st_size
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=INTERMEDIATE, num_hidden_layers=blocks,
        num_attention_heads=HEADS, architectures=["LlamaForCausalLM"], dtype="bfloat16", tie_word_embeddings=False,
    )  # fmt: skip
    config.save_pretrained(folder)
    return total / 1e9


def child(folder: Path, cap: float, criterion: str, tokens: int) -> None:
    """Prune under the cap; print the peak."""
    limit = int(cap * 1e9)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    import secateur as sc

    ids = torch.randint(VOCABULARY, (2, tokens), generator=torch.Generator().manual_seed(0))
    data = None if criterion == "magnitude" else [{"input_ids": ids}]
    sc.prune_checkpoint(folder / "dense", out=folder / "pruned", criterion=criterion, pattern="2:4", data=data)
    print(json.dumps({"peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, "cpu": time.process_time()}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gigabytes", type=float, default=20)
    parser.add_argument("--cap", type=float, default=6, help="GB of data segment that the process may have")
    parser.add_argument("--criterion", default="wanda")
    parser.add_argument("--tokens", type=int, default=64, help="of each of two calibration sequences")
    parser.add_argument("--kill-after", type=float, default=60, help="seconds after which the first process is killed")
    parser.add_argument("--out", type=Path, help="write the page there")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    place = given.folder / "secateur-stream"
    if given.child:
        child(place, given.cap, given.criterion, given.tokens)
        return
    started = time.monotonic()
    try:
        size = make(place / "dense", given.gigabytes)
        line = [sys.executable, __file__, *sys.argv[1:], "--child"]
        first = subprocess.Popen(line, stdout=subprocess.DEVNULL)
        try:
            first.wait(given.kill_after)
        except subprocess.TimeoutExpired:
            first.send_signal(signal.SIGKILL)
            first.wait()
        kept = len(list((place / ".pruned.progress").glob("*.json")))
        begun = time.monotonic()
        done = subprocess.run(line, stdout=subprocess.PIPE, text=True, check=True)
        found = json.loads(done.stdout.splitlines()[-1])
        head = ("checkpoint GB", "cap GB", "peak GB", "blocks done at the kill", "seconds after it", "CPU seconds")
        row = (f"{size:.1f}", f"{given.cap:g}", f"{found['peak']:.2f}", str(kept), f"{time.monotonic() - begun:.0f}")
        figures = table(head, [(*row, f"{found['cpu']:.0f}")])
        page = ["# A checkpoint larger than memory", "", " ".join((__doc__ or "").split("\n\n")[2].split()), ""]
        data = "no data" if given.criterion == "magnitude" else f"two sequences of {given.tokens} tokens"
        page += [f"Criterion {given.criterion}, pattern 2:4, {data}.", "", *figures, ""]
        show([*page, conditions(torch.get_num_threads(), "seed 0", time.monotonic() - started)], given.out)
    finally:
        shutil.rmtree(place, ignore_errors=True)


if __name__ == "__main__":
    main()
