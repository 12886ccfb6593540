"""NVFlare's processes at a server or a site: all of them end with the command."""

import os
import subprocess
import sys

import pytest

from fedvlm.deploy.nvflare.processes import MARK, _end_all

PARENT = "import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
CHILD = "print('ready', flush=True); import time; time.sleep(600)"


@pytest.fixture
def start():
    started = []

    def start(mark: str, code: str) -> subprocess.Popen:
        command, environment = [sys.executable, "-c", code], {**os.environ, MARK: mark}
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        started.append(process)
        assert process.stdout.readline() == "ready\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


def test_all_processes_of_a_command_end_and_no_others(start, tmp_path, monkeypatch):
    ours, others = str(tmp_path / "größe a"), str(tmp_path / "größe a" / "b")
    monkeypatch.setenv(MARK, ours)
    tree = start(ours, PARENT.format(child=CHILD))
    alone, other = start(ours, CHILD), start(others, CHILD)
    _end_all(ours)
    assert [tree.wait(10), alone.wait(10)] == [-9, -9]
    assert tree.stdout.read() == "", "the child holds the pipe no longer"
    assert other.poll() is None
