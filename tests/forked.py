"""Commands of fedvlm for tests that interrupt or kill them, without the seconds that imports take.

One process imports everything. Every command is a fork of it: a process with its own id, signals
and exit code.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

SERVER = """
import json, os, sys
import datasets, peft, torch
import transformers.models.idefics3.modeling_idefics3
import fedvlm.cli.live, fedvlm.cli.tables, fedvlm.engines.cohort, fedvlm.figures.plots
from fedvlm.cli.app import main

torch.set_num_threads(1)
for line in sys.stdin:
    words, *files = json.loads(line)
    if command := os.fork():
        print(command, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(command, 0)[1]), flush=True)
    else:
        for number, file in enumerate(files, 1):
            os.dup2(os.open(file, os.O_CREAT | os.O_WRONLY | os.O_TRUNC), number)
        sys.argv = ["fedvlm", *words]
        sys.exit(main())
"""


class Commands:
    """Runs one command at a time, like ``fedvlm`` in a terminal.

    Args:
        folder: folder for the output of the commands.
    """

    def __init__(self, folder: Path):
        self.out, self.err = folder / "out", folder / "err"
        self._server = subprocess.Popen(
            [sys.executable, "-c", SERVER],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            # A shell that runs the tests in the background makes all processes ignore Ctrl-C.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    def start(self, *words: str) -> None:
        """Starts a command."""
        for file in (self.out, self.err):
            file.unlink(missing_ok=True)
        self._server.stdin.write(json.dumps([words, str(self.out), str(self.err)]) + "\n")
        self._server.stdin.flush()
        self._pid = int(self._server.stdout.readline())

    def running(self) -> bool:
        """Whether the command has not ended yet."""
        return psutil.pid_exists(self._pid)

    def send(self, number: signal.Signals) -> None:
        """Sends a signal to the command, unless it has ended."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._pid, number)

    def lines(self) -> list[str]:
        """The lines that the command has printed so far."""
        text = self.out.read_text() if self.out.exists() else ""
        return text.splitlines()[: text.count("\n")]

    def code(self, seconds: float = 120) -> int:
        """Waits for the command to end. Returns its exit code, negative after a signal."""
        end = time.monotonic() + seconds
        while self.running():
            assert time.monotonic() < end, f"it has not ended after {seconds} s"
            time.sleep(0.01)
        return int(self._server.stdout.readline())

    def close(self) -> None:
        """Ends the process with the imports."""
        self._server.stdin.close()
        self._server.wait(10)
