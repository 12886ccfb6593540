"""Commands for tests, without the seconds of processor time that imports take.

One process imports everything, for all workers of the tests. Every command is a fork of it: a
process with its own id, signals and exit code.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
from filelock import FileLock

import warm


class Warm:
    """A ``python`` whose imports are done, shared by all workers of the tests.

    Attributes:
        python: an executable that takes the words of ``python -m MODULE`` or ``python FILE``.
        fedvlm: an executable that takes the words of ``fedvlm``.
        env: the environment that both need, with one thread.
    """

    def __init__(self, folder: Path, name: str):
        address = Path(tempfile.gettempdir()) / f"fedvlm-{name}"
        self.address = str(address)
        self.env = {**os.environ, "WARM_PYTHON": self.address, "OMP_NUM_THREADS": "1"}
        self.python = self._script(folder / "python", "")
        self.fedvlm = self._script(folder / "fedvlm", " -m fedvlm")
        with FileLock(f"{address}.lock"):
            self._lease = self._leased() or self._started(folder / "warm.log")

    def _script(self, path: Path, words: str) -> Path:
        command = shlex.join([sys.executable, "-ISs", warm.__file__])
        path.write_text(f'#!/bin/sh\nexec {command}{words} "$@"\n')
        path.chmod(0o755)
        return path

    def _leased(self) -> socket.socket | None:
        """The process that listens ends when the last lease is closed, or its holder ends."""
        line = socket.socket(socket.AF_UNIX)
        with contextlib.suppress(OSError):
            line.connect(self.address)
            line.sendall(bytes(8))
            if line.recv(8):
                return line
        return None

    def _started(self, log: Path) -> socket.socket:
        Path(self.address).unlink(missing_ok=True)
        lease, other = socket.socketpair()
        with log.open("w") as said, other:
            subprocess.Popen(
                [sys.executable, warm.__file__, "serve", self.address, str(other.fileno())],
                env=self.env,
                pass_fds=[other.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=said,
                start_new_session=True,
            )
        assert lease.recv(8), log.read_text()
        return lease

    def start(self, words: list[str], out: Path, err: Path) -> socket.socket:
        """Starts a command. The answer has its process id in one line and its end in another."""
        flags = os.O_CREAT | os.O_WRONLY | os.O_TRUNC
        files = [os.open(os.devnull, os.O_RDONLY), os.open(out, flags), os.open(err, flags)]
        try:
            return warm.ask(self.address, words, self.env, files)
        finally:
            for file in files:
                os.close(file)

    def close(self) -> None:
        """Gives the lease back."""
        self._lease.close()


class Commands:
    """Runs one command of ``fedvlm`` at a time, as in a terminal.

    Args:
        warm: the process to fork.
        folder: folder for the output of the commands.
    """

    def __init__(self, warm: Warm, folder: Path):
        self.out, self.err, self._warm = folder / "out", folder / "err", warm

    def start(self, *words: str) -> None:
        """Starts a command."""
        for file in (self.out, self.err):
            file.unlink(missing_ok=True)
        line = self._warm.start(["-m", "fedvlm", *words], self.out, self.err)
        self._answer = line.makefile("r")
        self._pid = int(self._answer.readline())

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
        return int(self._answer.readline())
