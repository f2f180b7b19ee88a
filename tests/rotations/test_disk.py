# SPDX-License-Identifier: Apache-2.0
"""Disks that are full or read-only, writers at once and writers that are killed: the user's file stays whole."""

import contextlib
import errno
import multiprocessing
import os
import signal
import subprocess
from pathlib import Path

import pytest
import torch

from vllm_kvcompress.cli import main
from vllm_kvcompress.errors import RotationError
from vllm_kvcompress.rotations import file as module
from vllm_kvcompress.rotations import read_rotation, write_rotation


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 64 KiB."""
    with mounted(tmp_path / "disk", "size=64k") as folder:
        yield folder


@contextlib.contextmanager
def mounted(folder: Path, options: str):
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_leaves_the_old_file(make_set, small_disk):
    path = small_disk / "r.safetensors"
    old = make_set(model="old")
    write_rotation(path, old)
    (small_disk / "other").write_bytes(bytes(64 * 1024 - 2 * 16 * 1024))
    with pytest.raises(RotationError, match=r"cannot write .*No space left on device.*--out"):
        for _ in range(64):  # each of a few KiB
            write_rotation(
                path, make_set(model="new", layer_ids=list(range(32)), sensitivity=[], k_channels=[], v_channels=[])
            )
            (small_disk / os.urandom(8).hex()).write_bytes(bytes(4096))
    assert read_rotation(path).metadata.model in ("old", "new")
    assert not list(small_disk.glob(".r.safetensors.*")), "what was begun is taken away, it fills the disk"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_write_that_fails_half_way_leaves_the_old_file(make_set, tmp_path, monkeypatch, number):
    path = tmp_path / "r.safetensors"
    write_rotation(path, make_set(model="old"))

    def fsync(handle):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(module.os, "fsync", fsync)
    with pytest.raises(RotationError, match=rf"cannot write .*{os.strerror(number)}"):
        write_rotation(path, make_set(model="new"))
    assert read_rotation(path).metadata.model == "old" and os.listdir(tmp_path) == [path.name]


def test_a_place_that_cannot_be_written_is_told_before_the_model_is_read(tmp_path, monkeypatch, capsys):
    from vllm_kvcompress.calibration import command

    model = tmp_path / "model"
    model.mkdir()
    monkeypatch.setattr(command, "model_fingerprint", lambda folder: "ab" * 16)
    with mounted(tmp_path / "cache", "size=64k,ro") as cache:
        for out, words in ((cache / "r.safetensors", "Read-only file system"), (model, "it is a folder")):
            assert main(["calibrate", str(model), "--out", str(out)]) == 2
            assert f"cannot write {out}: {words}. Choose another place with --out" in capsys.readouterr().err


def write_forever(path, sets, ready):
    ready.set()
    while True:
        for one in sets:
            write_rotation(path, one)


def test_readers_see_whole_files_whoever_writes_and_dies(make_set, tmp_path):
    """Two processes that write different files under one name, one of which is killed somewhere in it, many times."""
    path = tmp_path / "r.safetensors"
    sets = [make_set(model=f"of writer {number}") for number in range(2)]
    write_rotation(path, sets[0])
    context = multiprocessing.get_context("fork")
    seen = set()
    for _ in range(6):
        writers, events = [], []
        for one in sets:
            events.append(context.Event())
            writers.append(context.Process(target=write_forever, args=(path, [one], events[-1]), daemon=True))
            writers[-1].start()
        try:
            assert all(event.wait(60) for event in events)
            for _ in range(40):
                found = read_rotation(path)
                number = int(found.metadata.model[-1])
                seen.add(number)
                assert torch.equal(found.layers[0].k_rotation, sets[number].layers[0].k_rotation)
        finally:
            for writer in writers:
                os.kill(writer.pid, signal.SIGKILL)
                writer.join()
        read_rotation(path)
    write_rotation(path, sets[1])
    assert seen and read_rotation(path).metadata.model == "of writer 1"


def test_what_was_read_stays_as_it_was(make_set, tmp_path):
    """Another program writes into the file, or cuts it off, while an engine serves from it."""
    path, rotation = tmp_path / "r.safetensors", make_set()
    write_rotation(path, rotation)
    found = read_rotation(path)
    with path.open("r+b") as file:
        file.seek(0)
        file.write(bytes(path.stat().st_size))
        file.truncate(0)
    for layer_id, layer in rotation.layers.items():
        assert torch.equal(found.layers[layer_id].k_rotation, layer.k_rotation)
        assert torch.equal(found.layers[layer_id].v_rotation, layer.v_rotation)
