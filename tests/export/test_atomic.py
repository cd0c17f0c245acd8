"""Saves that are killed, crowded out, refused or starved of space lose nothing."""

from __future__ import annotations

import fcntl
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from torch import nn

from secateur.errors import ArtifactError
from secateur.export import atomic
from secateur.export.artifact import load, save
from secateur.export.reader import Artifact

SIZE = 96


def model(value: float) -> nn.Module:
    """A model that is wholly determined by one number."""
    net = nn.Sequential(nn.Linear(SIZE, SIZE), nn.Linear(SIZE, SIZE))
    with torch.no_grad():
        for i, parameter in enumerate(net.parameters()):
            parameter.copy_(torch.arange(parameter.numel()).remainder(7).eq(0).reshape(parameter.shape) * (value + i))
    return net


def value_of(folder: Path) -> float:
    """The number of the model saved there, after every value was compared."""
    net = load(folder, model=model(-1))
    value = float(net[0].weight.detach().max())
    for got, want in zip(net.parameters(), model(value).parameters(), strict=True):
        assert torch.equal(got, want)
    return value


def only(folder: Path) -> bool:
    """Whether nothing lies beside `folder`."""
    return [p.name for p in folder.parent.iterdir()] == [folder.name]


def fork(child) -> int:
    """Run `child` in a forked process that never returns into pytest; its pid."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        child()
        code = 0
    finally:
        os._exit(code)


@pytest.mark.parametrize("exchange", [True, False])
def test_killed_at_any_moment_it_is_the_old_or_the_new_one(tmp_path, monkeypatch, exchange):
    if not exchange:
        monkeypatch.setattr(atomic, "_exchange", lambda one, other: False)
    folder = tmp_path / "a"
    save(model(1), folder)
    start = time.perf_counter()
    save(model(1), folder, overwrite=True)
    one_save, rng, current = time.perf_counter() - start, random.Random(0), 1.0

    def keep_saving(done):
        value = current
        while True:
            value += 1
            save(model(value), folder, overwrite=True)
            os.write(done, b".")

    for kill in range(25):
        reader, writer = os.pipe()
        pid = fork(lambda writer=writer: keep_saving(writer))
        os.close(writer)
        for _ in range(kill % 3):
            assert os.read(reader, 1) == b"."
        time.sleep(rng.uniform(0, 2 * one_save))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(reader)
        found = value_of(folder)
        assert found >= current + kill % 3, "a save that had returned is lost"
        current = found
    save(model(0), folder, overwrite=True)
    assert value_of(folder) == 0
    assert only(folder)


def test_a_kill_at_every_step_of_the_two_renames(tmp_path, monkeypatch):
    """Without an exchange in one step, stop before each call in turn, as a kill would, and look."""
    monkeypatch.setattr(atomic, "_exchange", lambda one, other: False)
    folder = tmp_path / "a"
    save(model(1), folder)
    for step in range(4):

        def stop_before(name, step=step):
            real, count = getattr(os, name), [0]

            def call(*args, **kwargs):
                if count[0] == step:
                    os.kill(os.getpid(), signal.SIGKILL)
                count[0] += 1
                return real(*args, **kwargs)

            return call

        def child():
            os.rename = stop_before("rename")
            save(model(5), folder, overwrite=True)

        os.waitpid(fork(child), 0)
        assert value_of(folder) in (1, 5)
        if step == 1:  # one rename was done: the old one lies aside, and both readers and writers find it
            assert not folder.exists()
            assert value_of(folder) == 1
            with pytest.raises(ArtifactError, match="overwrite=True"):
                save(model(7), folder)
            assert folder.exists()
        save(model(1), folder, overwrite=True)
        assert only(folder)


def test_readers_never_see_a_mixture(tmp_path):
    folder = tmp_path / "a"
    save(model(1), folder)
    pid = fork(lambda: [save(model(v), folder, overwrite=True) for v in range(2, 40)])
    try:
        values = []
        while os.waitpid(pid, os.WNOHANG)[0] == 0:
            values.append(value_of(folder))
        assert values == sorted(values)
        assert len(values) > 2
    except BaseException:
        os.kill(pid, signal.SIGKILL)
        raise
    assert value_of(folder) == 39


def test_without_overwrite_nothing_is_replaced(tmp_path):
    folder = save(model(1), tmp_path / "a")
    with pytest.raises(ArtifactError, match="pass overwrite=True"):
        save(model(2), folder)
    assert value_of(folder) == 1
    empty = tmp_path / "b"
    empty.mkdir()
    assert value_of(save(model(3), empty)) == 3


def test_what_is_not_ours_is_never_replaced(tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.tex").write_text("years")
    with pytest.raises(ArtifactError, match="Secateur did not write it"):
        save(model(1), home, overwrite=True)
    folder = save(model(1), tmp_path / "a", extra_files={"report.html": "x", "more.txt": "y"})
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(ArtifactError, match=r"notes\.txt"):
        save(model(2), folder, overwrite=True)
    assert value_of(folder) == 1
    (folder / "notes.txt").unlink()
    assert value_of(save(model(2), folder, overwrite=True)) == 2
    (folder / "model.safetensors").write_bytes(b"damaged")
    assert value_of(save(model(3), folder, overwrite=True)) == 3
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(ArtifactError, match="not a directory"):
        save(model(1), file, overwrite=True)


def test_a_link_to_a_directory_is_followed(tmp_path):
    real = save(model(1), tmp_path / "real")
    link = tmp_path / "link"
    link.symlink_to(real)
    save(model(2), link, overwrite=True)
    assert link.is_symlink()
    assert value_of(real) == 2


def test_a_second_writer_is_told_who_is_first(tmp_path):
    folder = save(model(1), tmp_path / "a")
    with atomic._locked(Path(os.path.realpath(folder))):
        with pytest.raises(ArtifactError, match=f"in use by pid {os.getpid()}"):
            save(model(2), folder, overwrite=True)
        assert value_of(folder) == 1
    save(model(2), folder, overwrite=True)


def test_a_lock_of_a_dead_process_is_no_lock(tmp_path):
    folder = save(model(1), tmp_path / "a")

    def hold():
        with atomic._locked(Path(os.path.realpath(folder))):
            os.kill(os.getpid(), signal.SIGKILL)

    os.waitpid(fork(hold), 0)
    assert not only(folder)
    save(model(2), folder, overwrite=True)
    assert value_of(folder) == 2
    assert only(folder)


def test_many_writers_at_once(tmp_path):
    """Of writers in threads each succeeds or is told that the directory is in use; what is there is one of theirs."""
    folder, told = tmp_path / "a", []

    def write(value):
        try:
            save(model(value), folder, overwrite=True)
        except ArtifactError as error:
            told.append(str(error))

    threads = [threading.Thread(target=write, args=(v,)) for v in range(1, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all("in use by pid" in message for message in told)
    assert 1 <= value_of(folder) <= 8
    assert only(folder)


def test_left_overs_of_killed_writers_are_removed(tmp_path):
    folder = save(model(1), tmp_path / "a")
    left = tmp_path / ".a.secateur-new"
    left.mkdir()
    (left / "model.safetensors").write_bytes(b"half")
    save(model(2), folder, overwrite=True)
    assert only(folder)


def test_a_model_that_changes_meanwhile_is_noticed(tmp_path, monkeypatch):
    folder = save(model(1), tmp_path / "a")
    net = model(2)
    real = Artifact.check_files

    def change(self):
        if "secateur-new" in str(self.path):
            net[0].weight.data += 1
        return real(self)

    monkeypatch.setattr(Artifact, "check_files", change)
    with pytest.raises(ArtifactError, match=r"'0\.weight' did not come back"):
        save(net, folder, overwrite=True)
    assert value_of(folder) == 1
    assert only(folder)


def test_space_is_checked_before_anything_is_written(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    folder = save(model(1), tmp_path / "a")
    monkeypatch.setattr(atomic.shutil, "disk_usage", lambda path: usage(10, 0, 1000))
    with pytest.raises(ArtifactError, match=r"\d+ bytes are needed, 1000 are free"):
        save(model(2), folder, overwrite=True)
    assert value_of(folder) == 1
    assert only(folder)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 256 kB. Skips where nobody may mount one."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(place)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk_loses_nothing(small_disk, monkeypatch):
    folder = save(model(1), small_disk / "a")
    big = nn.Linear(400, 400)
    with pytest.raises(ArtifactError, match=r"not enough space .* bytes are needed, \d+ are free"):
        save(big, folder, overwrite=True)
    monkeypatch.setattr(atomic, "_check_space", lambda target, needed: None)  # another program filled it meanwhile
    with pytest.raises(ArtifactError, match=r"no space left .* bytes are needed, \d+ are free"):
        save(big, folder, overwrite=True)
    with pytest.raises(ArtifactError, match="no space left"):
        save(big, small_disk / "b")
    assert value_of(folder) == 1
    assert only(folder)


def test_a_limit_on_file_size_loses_nothing(tmp_path):
    folder = save(model(1), tmp_path / "a")

    def child():
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
        try:
            save(nn.Linear(400, 400), folder, overwrite=True)
        except ArtifactError as error:
            os._exit(7 if "may not grow so large" in str(error) else 8)

    _, status = os.waitpid(fork(child), 0)
    assert os.waitstatus_to_exitcode(status) == 7
    assert value_of(folder) == 1
    assert only(folder)


def test_a_place_where_nobody_can_write(tmp_path):
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(ArtifactError, match="cannot be written"):
        save(model(1), file / "below" / "a")
    with pytest.raises(ArtifactError, match="cannot be written"):
        save(model(1), tmp_path / ("x" * 250))


def test_exchange_swaps_two_directories(tmp_path):
    if sys.platform != "linux":
        pytest.skip("renameat2 is Linux's")
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / f"was_{name}").touch()
    assert atomic._exchange(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "a" / "was_b").exists()
    assert (tmp_path / "b" / "was_a").exists()
    with pytest.raises(FileNotFoundError):
        atomic._exchange(tmp_path / "a", tmp_path / "nowhere")


def test_the_lock_is_not_inherited_by_children_that_outlive_the_save(tmp_path):
    folder = tmp_path / "a"
    target = Path(os.path.realpath(folder))
    with atomic._locked(target):
        pid = fork(lambda: time.sleep(30))
    try:
        with atomic._locked(target):
            handle = os.open(target.with_name(".a.secateur-lock"), os.O_RDWR)
            with pytest.raises(BlockingIOError):
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.close(handle)
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
