"""The memory of a server's process after a run with secure aggregation holds no site's upload."""

from __future__ import annotations

import multiprocessing
import sys
import threading

import numpy as np
import pytest

from fedvlm.config import load
from fedvlm.store import files
from sites import deployed
from toysites import FIVE, Five, config

pytestmark = [
    pytest.mark.usefixtures("no_pictures"),
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/PID/mem"),
]


def serve(line, settings, folder):
    """The server's process: a run over sites in the other process; then it waits."""
    turn = threading.Lock()

    def call(site, header, blob, limit):
        with turn:
            line.send((site, header, blob))
            return line.recv()

    deployed(call, settings, folder, sites=FIVE, at_once=5)
    line.send(None)
    line.recv()  # until the other process has searched this one's memory


def memory(pid):
    """The memory that a process can write. Most of it is pages of zeros, which are left out."""
    with open(f"/proc/{pid}/maps") as maps, open(f"/proc/{pid}/mem", "rb", 0) as mem:
        for text in maps:
            place, rights, *_ = text.split()
            if rights.startswith("rw"):
                first, last = (int(number, 16) for number in place.split("-"))
                mem.seek(first)
                try:
                    pages = np.frombuffer(mem.read(last - first), np.uint64).reshape(-1, 512)
                except OSError:  # memory of a device
                    continue
                yield pages[pages.any(axis=1)].tobytes()


def found(tmp_path, settings, far):
    """The number of uploads, and of uploads that are in the memory of the server's process.

    Args:
        tmp_path: folder for the state.
        settings: the settings of the run.
        far: makes the uploads other numbers than those of other tests, which the server's process
            inherits from this one.
    """
    fork = multiprocessing.get_context("fork")
    line, other = fork.Pipe()
    sites = Five(tmp_path / "state")
    for worker in sites.workers.values():
        worker.far = far
    server = fork.Process(target=serve, args=(other, settings, tmp_path / "run"))
    server.start()
    try:
        while (asked := line.recv()) is not None:
            line.send(sites(*asked, 60.0))
        paths = (tmp_path / "state").glob("*/runs/run-1/rounds/00002/upload.safetensors")
        whole = [t.numpy().tobytes() for path in paths for t in files.load_tree(path).values()]
        uploads = [upload[16:32] for upload in whole]  # a freed block's begin is overwritten
        there = set()
        for piece in memory(server.pid):
            there |= {upload for upload in uploads if upload in piece}
    finally:
        server.kill()
        server.join()
    written = [p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()]
    assert not any(upload in text for upload in uploads for text in written)
    return len(uploads), len(there)


def test_the_servers_memory_and_files_hold_no_upload(tmp_path):
    assert found(tmp_path, config(), 1.37) == (10, 0)


def test_the_control_finds_uploads_that_were_sent_in_the_clear(tmp_path):
    settings = load(config(), "wire.secure=false", "eval.every=0")
    uploads, there = found(tmp_path, settings, 1.71)
    assert uploads == 10
    assert there >= 1
