"""A site's worker process, and the supervisor that keeps it running."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, wait

import psutil
import pytest

from fedvlm.deploy.supervisor import Supervisor

pytestmark = pytest.mark.waits("site")

ECHO = """
import json, os, re, socket, sys, time
from fedvlm.deploy import worker

class Echo:
    opened = 0
    def perform(self, asked, blob):
        if asked["do"] == "die":
            os.kill(os.getpid(), 9)
        if asked["do"] == "die once" and not os.path.exists(asked["mark"]):
            open(asked["mark"], "w").close()
            os.kill(os.getpid(), 9)
        if asked["do"] == "sleep":
            time.sleep(20)
            open(asked["mark"], "w").close()
        if asked["do"] == "spin":
            open(asked["mark"], "w").close()
            re.match(r"((a|[ab])+)+c", "a" * 60)  # in C, and holds the interpreter for years
        if asked["do"] == "open":
            self.opened += 1
        return {"pid": os.getpid(), "opened": self.opened}, blob[::-1]

worker.serve(socket.socket(fileno=int(sys.argv[1])), Echo())
"""


SUPERVISED = """
import sys, threading
from fedvlm.deploy.supervisor import Supervisor

found = Supervisor({}, [sys.executable, "-c", sys.argv[1]])
opening = threading.Thread(target=found.call, args=({"do": "open"},))
opening.start()
opening.join()
print(found.pid, flush=True)
found.call({"do": "spin", "mark": sys.argv[2]}, limit=600.0)
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
    assert after["opened"] == 1, "the new worker has opened the run before the request"
    os.kill(supervisor.pid, signal.SIGKILL)
    assert "pid" in supervisor.call({"do": "x"})[0]


def test_a_worker_that_dies_again_and_one_that_hangs_are_reported(supervisor, tmp_path):
    died, _ = supervisor.call({"do": "die"})
    assert died["error"] == "died"
    late, _ = supervisor.call({"do": "sleep", "mark": str(tmp_path / "slept")}, limit=3.0)
    assert late["error"] == "timeout"
    assert not (tmp_path / "slept").exists(), "the call ended before the work did"
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


def test_a_worker_that_is_stopped_takes_no_message_and_is_replaced(supervisor):
    first, _ = supervisor.call({"do": "open"})
    stopped = supervisor.pid
    os.kill(stopped, signal.SIGSTOP)
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(supervisor.call, {"do": "x"}, bytes(2**24), limit=2.0)
        done, _ = wait([call], 60)
        if not done:
            os.kill(stopped, signal.SIGCONT)
    assert done, "a message larger than a socket's buffer does not block"
    assert call.result()[0]["error"] == "timeout"
    assert supervisor.call({"do": "x"})[0]["pid"] != first["pid"]


def test_a_run_that_opens_longer_than_a_call_may_take_is_opened_by_the_next_calls(tmp_path):
    slow = ECHO.replace("            self.opened += 1", "            self.opened += nap()")
    nap = f"def nap(): time.sleep(os.path.exists({str(tmp_path / 'nap')!r}) * 6); return 1\n"
    found = Supervisor({}, [sys.executable, "-c", nap + slow])
    try:
        found.call({"do": "open"})
        (tmp_path / "nap").touch()
        assert found.call({"do": "sleep"}, limit=1.0)[0]["error"] == "timeout"
        pid = found.pid
        late, _ = found.call({"do": "x"}, limit=1.0)
        assert "still opening the run" in late["message"]
        assert found.call({"do": "x"}, limit=60.0)[0] == {"id": 3, "pid": pid, "opened": 1}
    finally:
        found.stop()


def test_a_worker_outlives_the_thread_that_started_it(supervisor):
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(supervisor.call, {"do": "open"}).result()[0]
    for _ in range(3):
        assert supervisor.call({"do": "x"})[0]["pid"] == first["pid"]
    assert supervisor.restarts == 0


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux kills a process with its parent")
def test_a_worker_that_holds_its_interpreter_for_good_ends_with_its_supervisor(tmp_path):
    command = [sys.executable, "-c", SUPERVISED, ECHO, str(tmp_path / "mark")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as supervising:
        worker = psutil.Process(int(supervising.stdout.readline()))
        while not (tmp_path / "mark").exists():
            assert supervising.poll() is None
            time.sleep(0.1)
        supervising.kill()
    try:
        gone, _ = psutil.wait_procs([worker], timeout=60)  # seconds; it would spin for years
        assert gone or worker.status() == psutil.STATUS_ZOMBIE, "nobody may reap it here"
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            worker.kill()
