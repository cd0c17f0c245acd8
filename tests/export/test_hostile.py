"""Broken and hostile artifacts: a typed error, soon and with little memory, or a bit-identical load. Nothing else."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import resource
import shutil
import struct
import time

import numpy as np
import pytest
import torch
from torch import nn

from secateur.errors import ArtifactError
from secateur.export import manifest as manifests
from secateur.export.artifact import load, save
from secateur.export.container import HEADER_CAP, Container
from secateur.export.encode import same_bits
from secateur.export.masks import load_masks, save_masks
from secateur.export.reader import Artifact


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(24, 16)
        self.second = nn.Linear(16, 24)
        self.tied = nn.Linear(24, 16, bias=False)
        self.tied.weight = self.first.weight
        self.register_buffer("flags", torch.zeros(9, dtype=torch.bool))


def pruned() -> Net:
    model = Net()
    with torch.no_grad():
        for weight in (model.first.weight, model.second.weight):
            weight.masked_fill_(torch.rand(weight.shape) < 0.9, 0)
    return model


@pytest.fixture(params=["auto", "csr"])
def saved(tmp_path, request):
    model = pruned()
    return model, save(model, tmp_path / "a", format=request.param)


def sign(folder, change=lambda content: None) -> None:
    """Change secateur.json and make its checksum and all hashes right again, as an attacker would."""
    content = json.loads((folder / "secateur.json").read_text())
    content.pop("checksum")
    for name in content["files"]:
        if (folder / name).is_file():
            data = (folder / name).read_bytes()
            content["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    change(content)
    content["checksum"] = manifests._checksum(content)
    (folder / "secateur.json").write_text(json.dumps(content))


def header(folder):
    data = (folder / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), bytearray(data[8 + length :])


def rewrite(folder, table, data: bytes, change=lambda content: None) -> None:
    text = json.dumps(table).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(data))
    sign(folder, change)


def region(table, data, key, dtype):
    begin, end = table[key]["data_offsets"]
    return np.frombuffer(memoryview(data)[begin:end], dtype)


def refused(folder, match: str, seconds: float = 2.0) -> None:
    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ArtifactError, match=match):
        load(folder, model=Net())
    assert time.perf_counter() - start < seconds
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kB


def test_a_changed_byte_anywhere_in_the_weights_is_noticed(saved):
    _, folder = saved
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    refused(folder, "does not match its SHA-256")


@pytest.mark.parametrize("keep", [0, 4, 8, 100, -1])
def test_truncated_weights(saved, keep):
    _, folder = saved
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    refused(folder, "truncated")
    sign(folder)
    refused(folder, "truncated|header|ends at")


def test_huge_header_is_not_parsed(saved, tmp_path):
    _, folder = saved
    text = b'{"x":' + b"[" * 80_000_000
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)
    sign(folder)
    refused(folder, "announces a header of 80000005 bytes")
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 2**63) + b"{}")
    sign(folder)
    refused(folder, "announces a header")


@pytest.mark.parametrize(
    "text", [b"[" * 9_000_000, b"[" * 100_000, b'{"a":' * 100_000, b"[]", b"nonsense", b"\xff\xfe", b'{"a":1,"a":2}']
)
def test_headers_that_are_no_header(tmp_path, text):
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    start = time.perf_counter()
    with pytest.raises(ArtifactError), Container.open(path):
        pass
    assert time.perf_counter() - start < 2


@pytest.mark.parametrize(
    ("entry", "match"),
    [
        ({"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}, "hole"),
        ({"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 8]}, "impossible shape"),
        ({"dtype": "F32", "shape": [2**62, 0, 2**62], "data_offsets": [0, 0]}, "impossible shape"),
        ({"dtype": "F32", "shape": [1] * 1000 + [2], "data_offsets": [0, 8]}, "impossible shape"),
        ({"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}, "whole numbers"),
        ({"dtype": "F32", "shape": [2.0], "data_offsets": [0, 8]}, "whole numbers"),
        ({"dtype": "F32", "shape": [True, 2], "data_offsets": [0, 8]}, "whole numbers"),
        ({"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}, "has -8 bytes"),
        ({"dtype": "F32", "shape": [2], "data_offsets": [10**4000, 10**4000 + 8]}, "whole numbers"),
        ({"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}, "needs 12"),
        ({"dtype": "X99", "shape": [2], "data_offsets": [0, 8]}, "unknown dtype"),
        ({"dtype": ["F32"], "shape": [2], "data_offsets": [0, 8]}, "unknown dtype"),
        ({"dtype": "F32", "shape": [2]}, "exactly"),
        ("F32", "exactly"),
    ],
)
def test_entries_that_lie(tmp_path, entry, match):
    path = tmp_path / "x.safetensors"
    text = json.dumps({"w": entry}).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(8))
    with pytest.raises(ArtifactError, match=match), Container.open(path):
        pass


def test_overlapping_tensors_and_appended_bytes(tmp_path):
    path = tmp_path / "x.safetensors"
    one = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    text = json.dumps({"a": one, "b": one}).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(8))
    with pytest.raises(ArtifactError, match="overlaps"), Container.open(path):
        pass
    text = json.dumps({"a": one}).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(9))
    with pytest.raises(ArtifactError, match="appended"), Container.open(path):
        pass


def test_bitmask_with_the_wrong_count(tmp_path):
    folder = save(pruned(), tmp_path / "a")
    table, data = header(folder)
    bits = region(table, data, "first.weight::bits", np.uint8)
    bits[0] ^= 0xFF
    rewrite(folder, table, data)
    refused(folder, "'first.weight' is broken: the bitmask keeps")


@pytest.mark.parametrize(
    ("part", "spoil", "match"),
    [
        ("indices", lambda a: a.__setitem__(0, 99), r"in \[0, 24\)"),
        ("indices", lambda a: a.__setitem__(0, -1), r"in \[0, 24\)"),
        ("indices", lambda a: a.__setitem__(slice(None), a[::-1].copy()), "ascend"),
        ("indices", lambda a: a.__setitem__(slice(None), 3), "ascend"),
        ("indptr", lambda a: a.__setitem__(1, 10_000), "rise"),
        ("indptr", lambda a: a.__setitem__(3, -5), "rise"),
        ("indptr", lambda a: a.__setitem__(0, 1), "rise"),
        ("indptr", lambda a: a.__setitem__(-1, 2**31 - 1), "rise"),
    ],
)
def test_csr_out_of_order_or_range(tmp_path, part, spoil, match):
    folder = save(pruned(), tmp_path / "a", format="csr")
    table, data = header(folder)
    spoil(region(table, data, f"first.weight::{part}", np.int32))
    rewrite(folder, table, data)
    refused(folder, match)


def test_decoded_sizes_are_bounded(tmp_path):
    """A CSR tensor of a few bytes may claim 2^50 columns: nothing of that size is allocated."""
    folder = save(pruned(), tmp_path / "a", format="csr")
    table, data = header(folder)
    for part, dtype in (("indices", np.int64), ("indptr", np.int64)):
        old = region(table, data, f"first.weight::{part}", np.int32).astype(dtype).tobytes()
        begin = len(data)
        data += old
        table[f"first.weight::{part}"].update(dtype="I64", data_offsets=[begin, begin + len(old)])
    order = sorted(table, key=lambda k: table[k]["data_offsets"])
    out = bytearray()
    for key in order:
        begin, end = table[key]["data_offsets"]
        table[key]["data_offsets"] = [len(out), len(out) + end - begin]
        out += data[begin:end]

    def claim(content):
        content["tensors"]["first.weight"]["shape"] = [16, 2**50]

    rewrite(folder, table, out, claim)
    refused(folder, r"'first.weight' \[16, 1125899906842624\]")
    with pytest.raises(ArtifactError, match="of memory"), Artifact(folder) as artifact:
        list(artifact.tensors())


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda c: c.update(version=4), "format version 4"),
        (lambda c: c.update(version="1"), "format version"),
        (lambda c: c.update(version=True), "format version"),
        (lambda c: c.update(format="other"), "does not say"),
        (lambda c: c.update(surprise=1), "surprise"),
        (lambda c: c.pop("tensors"), "tensors"),
        (lambda c: c.update(tensors=[]), "tensors"),
        (lambda c: c["tensors"]["first.bias"].update(shape=[16.0]), "shape"),
        (lambda c: c["tensors"]["first.bias"].update(shape=[-16]), "impossible shape"),
        (lambda c: c["tensors"]["first.bias"].update(shape=[4, 4]), "needs"),
        (lambda c: c["tensors"]["first.bias"].update(shape=[2**62, 2**62]), "impossible shape"),
        (lambda c: c["tensors"]["first.bias"].update(dtype="float16"), "needs"),
        (lambda c: c["tensors"]["first.bias"].update(dtype="load"), "unknown dtype"),
        (lambda c: c["tensors"]["first.bias"].update(encoding="pickle"), "encoding"),
        (lambda c: c["tensors"]["first.bias"].update(encoding="bitmask"), "lacks"),
        (lambda c: c["tensors"].pop("first.bias"), "knows nothing"),
        (lambda c: c["tensors"].update(more=c["tensors"]["first.bias"]), "lacks 'more'"),
        (lambda c: c.update(aliases={"../../etc/passwd": "/etc/passwd"}), "alias"),
        (lambda c: c.update(aliases={"first.bias": "first.bias"}), "alias"),
        (lambda c: c.update(aliases={"a": "b", "b": "a"}), "alias"),
        (lambda c: c.update(masks={"nobody": "nonzero"}), "no such tensor"),
        (lambda c: c.update(masks={"first.bias": "stored"}), "lists no masks.safetensors"),
        (lambda c: c["files"].update({"../x": c["files"]["README.md"]}), "plain file name"),
        (lambda c: c["files"].update({"/etc/passwd": c["files"]["README.md"]}), "plain file name"),
        (lambda c: c["files"].update({"a\\..\\b": c["files"]["README.md"]}), "plain file name"),
        (lambda c: c["files"].pop("model.safetensors"), "lists no model.safetensors"),
        (lambda c: c["files"]["model.safetensors"].update(bytes=-1), "truncated|changed|has"),
        (lambda c: c["files"]["model.safetensors"].update(sha256="0"), "SHA-256"),
    ],
)
def test_manifests_that_lie(saved, change, match):
    _, folder = saved
    sign(folder, change)
    refused(folder, match)


def test_malformed_plan_is_an_artifact_error(tmp_path):
    folder = save(nn.Linear(3, 2), tmp_path / "a")
    for plan in ({"layers": 3}, {}, {"layers": [], "cuts": [{"tensor": "w"}], "skipped": {}}):
        sign(folder, lambda c, plan=plan: c.update(plan=plan))
        with pytest.raises(ArtifactError, match="plan is malformed"):
            load(folder, model=nn.Linear(3, 3))


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{}",
        b"null",
        b"[" * 1_000_000,
        b'{"a":' * 200_000,
        b"\x00" * 100,
        b"\xff\xfe{}",
        b'{"format": NaN}',
        b'{"format":"secateur"}',
    ],
)
def test_manifests_that_are_none(saved, text):
    _, folder = saved
    (folder / "secateur.json").write_bytes(text)
    refused(folder, "secateur.json")


def test_huge_manifest_is_not_read(saved):
    _, folder = saved
    with open(folder / "secateur.json", "wb") as file:
        file.truncate(manifests.SIZE_CAP + 1)
    refused(folder, "at most 32000000 are read")
    (folder / "secateur.json").write_bytes(b"[" + b"{}," * 5_000_000 + b"{}]")
    refused(folder, "lists and objects")


def test_an_edited_manifest_is_noticed(saved):
    _, folder = saved
    text = (folder / "secateur.json").read_text()
    (folder / "secateur.json").write_text(text.replace('"kind": "buffer"', '"kind": "transient"'))
    refused(folder, "its own checksum")


@pytest.mark.parametrize("name", ["model.safetensors", "secateur.json"])
def test_links_pipes_and_directories_are_not_followed(saved, tmp_path, name):
    _, folder = saved
    elsewhere = tmp_path / "elsewhere"
    shutil.move(folder / name, elsewhere)
    (folder / name).symlink_to(elsewhere)
    refused(folder, "symbolic link")
    (folder / name).unlink()
    os.mkfifo(folder / name)
    refused(folder, "not a regular file")
    (folder / name).unlink()
    (folder / name).mkdir()
    refused(folder, "not a regular file")
    (folder / name).rmdir()
    refused(folder, "is missing")


def test_bool_bytes_must_be_0_or_1(tmp_path):
    folder = save(pruned(), tmp_path / "a", format="dense")
    table, data = header(folder)
    region(table, data, "flags", np.uint8)[3] = 7
    rewrite(folder, table, data)
    refused(folder, "other than 0 and 1")


def test_hostile_mask_files(tmp_path):
    masks = {"w": torch.rand(7, 9) > 0.5}
    path = save_masks(masks, tmp_path / "m.safetensors")
    data = path.read_bytes()
    for spoiled in (data[:-1], data[:20], b"", data + b"x"):
        path.write_bytes(spoiled)
        with pytest.raises(ArtifactError):
            load_masks(path)
    at = data.index(struct.pack("<qq", 7, 9))
    for shape in ((7, 10), (-7, -9), (2**40, 2**40), (63, 2)):
        path.write_bytes(data[:at] + struct.pack("<qq", *shape) + data[at + 16 :])
        with pytest.raises(ArtifactError):
            load_masks(path)
    with pytest.raises(ArtifactError, match="not a file of masks"):
        load_masks(save(pruned(), tmp_path / "a") / "model.safetensors")


def mutate(rng: random.Random, data: bytes) -> bytes:
    """One to three random edits: flipped bits, bytes cut, doubled, zeroed, or tokens put in."""
    out = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(out) + 1)
        kind = rng.randrange(6)
        if kind == 0 and at < len(out):
            out[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del out[at : at + rng.choice((1, 2, 9, 200))]
        elif kind == 2:
            out[at:at] = out[at : at + rng.choice((1, 8, 64))]
        elif kind == 3:
            out[at : at + 8] = bytes(8)
        elif kind == 4:
            out[at:at] = rng.choice(
                (b"[", b"{", b'"', b"-1", b"1e999", b"null", b"\xff", b"99999999999999999999", b"\\ud800", b"../")
            )
        else:
            out[at : at + 1] = bytes([rng.randrange(256)])
    return bytes(out)


@pytest.mark.parametrize("signed", [False, True])
def test_fuzz(saved, tmp_path, signed):
    """Random damage, as it is and with all hashes made right again: an ArtifactError, or the very same model."""
    model, folder = saved
    rng = random.Random(f"{signed}-{folder}".replace(str(tmp_path), ""))
    originals = {p.name: p.read_bytes() for p in folder.iterdir()}
    want = {name: tensor.clone() for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    refusals = 0
    for _ in range(250):
        name = rng.choice(("secateur.json", "model.safetensors"))
        damaged = mutate(rng, originals[name])
        (folder / name).write_bytes(damaged)
        if signed:
            with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError, AttributeError):
                sign(folder)
        fresh = Net()
        try:
            load(folder, model=fresh)
        except ArtifactError:
            refusals += 1
        else:
            if not signed:
                found = dict((*fresh.named_parameters(), *fresh.named_buffers()))
                assert all(same_bits(found[n], want[n]) for n in want)
        for other, data in originals.items():
            (folder / other).write_bytes(data)
    assert refusals > 50
    assert HEADER_CAP == 10_000_000
