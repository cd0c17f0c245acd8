"""The packed file: bits come back, tensors are read by themselves, the first version loads, and hostile files are refused."""

from __future__ import annotations

import random
import resource
import struct
import time
import zlib
from pathlib import Path

import pytest
import torch
from packed_example import tensors
from packed_fuzz import mutants

from secateur.coding import packed
from secateur.coding.bits import ByteWriter
from secateur.coding.kernels import numpy_only
from secateur.coding.packed import PackedFile
from secateur.coding.tensor import Coded, Options, encode
from secateur.errors import ArtifactError
from secateur.export.encode import same_bits

GOLDEN = Path(__file__).parent / "golden" / "version1.packed"


@pytest.fixture
def path(tmp_path):
    packed.write(tmp_path / "model.packed", tensors())
    return tmp_path / "model.packed"


def check(path):
    with PackedFile.open(path) as file:
        assert list(file.entries) == [name for name, _, _ in tensors()]
        found = dict(file.tensors())
    for name, tensor, _ in tensors():
        assert same_bits(found[name], tensor), name


def test_every_tensor_comes_back(path):
    check(path)


def test_the_golden_file_of_version_1_loads_and_is_still_what_is_written(path):
    check(GOLDEN)
    with numpy_only():
        check(GOLDEN)
    assert GOLDEN.read_bytes() == path.read_bytes()


def test_one_tensor_is_read_without_the_others(path):
    with PackedFile.open(path) as file:
        entry = file.entries["conv.weight"]
    broken = bytearray(path.read_bytes())
    for at in range(24, file_end(path)):
        if not entry.begin <= at < entry.begin + entry.length:
            broken[at] ^= 255
    path.write_bytes(broken)
    with PackedFile.open(path) as file:
        assert same_bits(file.read("conv.weight"), tensors()[2][1])
        with pytest.raises(ArtifactError, match=r"'encoder\.weight' does not match its checksum"):
            file.read("encoder.weight")
        with pytest.raises(ArtifactError, match="has no tensor 'other'"):
            file.read("other")


def file_end(path):
    return struct.unpack("<Q", path.read_bytes()[8:16])[0]


@pytest.mark.parametrize("entropy", ["rans", "huffman", "auto"])
@pytest.mark.parametrize("where", ["gaps", "context", "auto"])
def test_every_option_gives_the_same_tensors(tmp_path, entropy, where):
    packed.write(tmp_path / "model.packed", tensors(), Options(entropy, where))
    check(tmp_path / "model.packed")


def test_sizes_are_near_their_entropies():
    torch.manual_seed(0)
    codes = torch.randint(-7, 8, (200, 300)).to(torch.int16) * (torch.rand(200, 300) < 0.1)
    coded = Coded(codes, torch.ones(200))
    data, bits = encode(coded.values(), coded)
    assert bits.kept == int(codes.count_nonzero())
    assert 8 * len(data) < 1.02 * (bits.positions_bound + bits.values_bound) + 200
    same, _ = encode(coded.values())  # without the codes the few values are found by themselves
    assert len(same) < 1.02 * len(data) + 100


def test_layers_of_zeros_are_padded_so_that_they_load(tmp_path):
    packed.write(tmp_path / "zeros", [("a", torch.zeros(5000, 5000), None)])
    assert (25_000_000 - packed.FREE_VALUES) / 2048 < (tmp_path / "zeros").stat().st_size < 6000
    with PackedFile.open(tmp_path / "zeros") as file:
        assert not file.read("a").any()


def test_a_dtype_that_cannot_be_stored_is_named(tmp_path):
    with pytest.raises(ArtifactError, match=r"'a' has the dtype torch\.complex64"):
        packed.write(tmp_path / "x", [("a", torch.zeros(2, dtype=torch.complex64), None)])


def forged(index: bytes, body: bytes = b"") -> bytes:
    """A file whose checksums are right, whatever its index says."""
    return struct.pack("<7sBQII", b"SECPACK", 1, 24 + len(body), len(index), zlib.crc32(index)) + body + index


def line(name: bytes, shape: list[int], length: int, crc: int = 0, shared: int = 0, dtype: int = 0) -> bytes:
    writer = ByteWriter()
    writer.varint(shared)
    writer.sized(name)
    writer.varint(dtype)
    writer.varint(len(shape))
    for size in shape:
        writer.varint(size)
    writer.varint(length)
    writer.raw(struct.pack("<I", crc))
    return writer.getvalue()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "does not begin"),
        (b"SECPACK", "does not begin"),
        (b"PK\x03\x04" + bytes(60), "does not begin"),
        (struct.pack("<7sBQII", b"SECPACK", 2, 24, 0, 0), "format version 2"),
        (struct.pack("<7sBQII", b"SECPACK", 1, 24, 4_000_000_000, 0), "index of 4000000000 bytes"),
        (struct.pack("<7sBQII", b"SECPACK", 1, 2**63, 8, 0), "truncated"),
        (struct.pack("<7sBQII", b"SECPACK", 1, 3, 21, 0), "changed"),
        (forged(b"\x01" + line(b"a", [2**30, 2**30], 0)), "impossible shape"),
        (forged(b"\x01" + line(b"a", [2**30], 0)), "too many for a file"),
        (forged(b"\x01" + line(b"a", [2], 50)), "ends at byte 74"),
        (forged(b"\x02" + line(b"a", [2], 0) + line(b"", [2], 0, shared=1)), "is there twice"),
        (forged(b"\x02" + line(b"a", [2], 0)), "in the middle of a number"),
        (forged(b"\x01" + line(b"\xff", [2], 0)), "not UTF-8"),
        (forged(b"\x01" + line(b"a", [2], 0, shared=3)), "out of range"),
        (forged(b"\x01" + line(b"a", [2], 0, dtype=99)), "out of range"),
        (forged(b"\x00rest"), "follow after the end"),
        (forged(b"\xff" * 9 + b"\x7f"), "out of range"),
    ],
)
def test_hostile_files_are_refused_before_anything_is_decoded(tmp_path, data, message):
    (tmp_path / "bad").write_bytes(data)
    with pytest.raises(ArtifactError, match=message):
        PackedFile.open(tmp_path / "bad")


def test_a_constant_tensor_of_many_values_from_a_few_bytes_is_bounded(tmp_path):
    body = b"\x02\x01" + b"\x00\x00" * 4 + b"\x00\x00"
    data = forged(b"\x01" + line(b"a", [packed.FREE_VALUES], len(body), zlib.crc32(body)), body)
    (tmp_path / "bad").write_bytes(data)
    began = time.process_time()
    with PackedFile.open(tmp_path / "bad") as file:
        assert file.read("a").numel() == packed.FREE_VALUES  # allowed, and cheap
    assert time.process_time() - began < 2


def test_500_fuzzed_files_raise_nothing_but_artifact_errors(tmp_path):
    good = [GOLDEN.read_bytes()]
    refused = 0
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for i, data in enumerate(mutants(good, random.Random(0), 500)):
        (tmp_path / "x").write_bytes(data)
        began = time.process_time()
        try:
            with PackedFile.open(tmp_path / "x") as file:
                for _ in file.tensors():
                    pass
        except ArtifactError:
            refused += 1
        assert time.process_time() - began < 2, i
    assert refused > 400
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 512 * 1024
