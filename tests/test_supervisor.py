"""A site's worker process, and the one that keeps it running."""

import os
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from fedvlm.engines.nvflare.supervisor import Supervisor

ECHO = """
import json, os, socket, sys, time
from fedvlm.engines.nvflare import worker

class Echo:
    opened = 0
    def perform(self, asked, blob):
        if asked["do"] == "die":
            os.kill(os.getpid(), 9)
        if asked["do"] == "die once" and not os.path.exists(asked["mark"]):
            open(asked["mark"], "w").close()
            os.kill(os.getpid(), 9)
        if asked["do"] == "sleep":
            time.sleep(60)
        if asked["do"] == "open":
            self.opened += 1
        return {"pid": os.getpid(), "opened": self.opened}, blob[::-1]

worker.serve(socket.socket(fileno=int(sys.argv[1])), Echo())
"""


@pytest.fixture
def supervisor():
    found = Supervisor({}, [sys.executable, "-c", ECHO])
    yield found
    found.stop()


def test_a_worker_that_dies_is_replaced_and_asked_again(supervisor, tmp_path):
    first, blob = supervisor.call({"do": "open"}, bytes(range(256)) * 5000)
    assert blob == (bytes(range(256)) * 5000)[::-1]
    assert supervisor.call({"do": "x"})[0]["pid"] == first["pid"], "one process for all calls"
    after, _ = supervisor.call({"do": "die once", "mark": str(tmp_path / "mark")})
    assert after["pid"] != first["pid"]
    assert after["opened"] == 1, "the new worker has opened the run before it was asked"
    os.kill(supervisor.pid, signal.SIGKILL)
    assert "pid" in supervisor.call({"do": "x"})[0]


def test_a_worker_that_dies_again_and_one_that_hangs_are_reported(supervisor):
    died, _ = supervisor.call({"do": "die"})
    assert died["error"] == "died"
    began = time.monotonic()
    late, _ = supervisor.call({"do": "sleep"}, limit=3.0)
    assert late["error"] == "timeout"
    assert time.monotonic() - began < 10
    assert "pid" in supervisor.call({"do": "x"})[0]


def test_a_worker_that_is_ended_under_way_is_not_replaced(supervisor):
    supervisor.call({"do": "open"})
    with ThreadPoolExecutor(1) as pool:
        under_way = pool.submit(supervisor.call, {"do": "sleep"})
        time.sleep(0.5)
        supervisor.end()
        assert under_way.result(10)[0] == {"error": "died", "message": "the run has ended"}
    assert supervisor.pid is None
    assert supervisor.restarts == 0
