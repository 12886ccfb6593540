"""Logs of a site: JSON lines that stay one line, and files that several processes write."""

import json
import logging
import subprocess
import sys
from collections import deque

import pytest

from fedvlm.deploy import logs


@pytest.fixture
def log(tmp_path, monkeypatch):
    """The package's logger, which writes to a file as a worker's does."""
    logger = logging.getLogger("fedvlm")
    before = logger.handlers[:], logger.level, logger.propagate
    monkeypatch.setattr(logs, "ABOUT", {"run": None, "round": None})
    path = tmp_path / "site.log"
    logs.log_to(str(path))
    yield logger, path
    logger.handlers[-1].close()
    logger.handlers[:], logger.level, logger.propagate = before


def test_a_message_is_one_line_with_its_run_and_round(log):
    logger, path = log
    logs.about({"run": "r1", "round": 3})
    logs.about({"run": ["x"], "round": "4"})  # of a server that does not keep to the protocol
    logger.warning('two\nlines "and" a %s', "text")
    (line,) = path.read_text().splitlines()
    found = json.loads(line)
    assert (found["run"], found["round"], found["level"]) == ("r1", 3, "WARNING")
    assert found["message"] == 'two\nlines "and" a text'
    assert logs.readable(line).endswith("WARNING " + found["message"])
    assert logs.readable("no JSON") == "no JSON"


def test_a_full_log_is_moved_aside_under_its_writers_and_its_reader(log, monkeypatch):
    logger, path = log
    monkeypatch.setattr(logs, "LARGEST", 200)
    told = []
    with logs.tail(path) as lines:
        for number in range(20):
            logger.info("line %d", number)
            logs.rotate(path)
            told += [json.loads(line)["message"] for line in lines()]
    assert told == [f"line {number}" for number in range(20)]
    names = {file.name for file in path.parent.iterdir()}
    assert {f"site.log.{k}" for k in range(1, 1 + logs.KEPT)} <= names
    assert f"site.log.{logs.KEPT + 1}" not in names
    assert "line 19" in (path.parent / "site.log.1").read_text()


def test_what_a_process_says_goes_to_a_file_that_is_rotated(tmp_path, monkeypatch):
    monkeypatch.setattr(logs, "LARGEST", 1000)
    code = "import sys; [print(f'100% {k}' + 'x' * 50) for k in range(60)]"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    lines = deque()
    logs.pipe(process.stdout, tmp_path / "n.log", lines)
    assert process.wait(60) == 0
    while len(lines) < 60:
        pass
    assert lines[59].startswith("100% 59x")
    kept = sorted(tmp_path.glob("n.log*"))
    assert len(kept) == 4, "60 lines of 58 bytes"
    assert all(file.stat().st_size <= 1000 for file in kept)
