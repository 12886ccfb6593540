"""Keeps a site's worker process running, from a process without torch and without a model.

A worker ends with its supervisor's process, even inside a function in C that never returns.
"""

from __future__ import annotations

import contextlib
import json
import logging
import socket
import subprocess
import sys
import threading
import time
from typing import Any

from fedvlm.deploy.frames import Closed, Message, receive, send
from fedvlm.deploy.lifetime import from_lasting_thread

logger = logging.getLogger("fedvlm")

OPENING = 600.0  # seconds within which a worker must have loaded data and model
TRIES = 2  # number of workers that are asked during one call


class Supervisor:
    """Starts a worker process when one is needed, and another one when it has died.

    Args:
        own: the site's settings for the worker; see :class:`fedvlm.deploy.worker.Worker`.
        command: starts a worker. The socket's number and ``own`` are appended to it.
    """

    def __init__(self, own: dict[str, Any], command: list[str] | None = None):
        self.own = own
        self.command = command or [sys.executable, "-m", "fedvlm.deploy.worker"]
        self.restarts = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._sock: socket.socket | None = None
        self._opening: dict[str, Any] | None = None
        self._opens_until = 0.0  # not 0: a new worker is still opening the run
        self._number = 0
        self._over = False
        self._turn = threading.Lock()

    @property
    def pid(self) -> int | None:
        """The worker's process id, None without a worker."""
        return self._process.pid if self._process else None

    def call(self, header: dict[str, Any], blob: bytes = b"", limit: float = 60.0) -> Message:
        """Asks the worker and returns its answer. One call runs at a time.

        A worker that dies during the call is replaced once, and the new one is asked again. A
        worker that takes too long is ended. Its successor opens the run in the background. While
        it does, later calls may reach their limit too; they return an error and leave it alive.

        Args:
            header: ``do`` and its arguments. A new worker gets the last ``open`` again.
            blob: tensors, as a safetensors file.
            limit: seconds.
        """
        until = time.monotonic() + limit
        if not self._turn.acquire(timeout=limit):
            return {"error": "failed", "message": "the site is busy with another call"}, b""
        try:
            if header["do"] == "open":
                self._opening = header
            for attempt in range(TRIES):
                try:
                    return self._ask(header, blob, until)
                except Closed:
                    code = self._reap()
                    if self._over:
                        return {"error": "died", "message": "the run has ended"}, b""
                    self.restarts += 1
                    logger.warning(
                        "the worker died (exit code %s) during '%s'%s",
                        code,
                        header["do"],
                        "; starting another" if attempt + 1 < TRIES else "",
                    )
                except TimeoutError:
                    return {"error": "timeout", "message": self._late(header, limit)}, b""
            message = f"the site's worker died {TRIES} times during '{header['do']}'"
            return {"error": "died", "message": message}, b""
        finally:
            self._turn.release()

    def end(self) -> None:
        """Ends the worker for good: the call under way starts no other one."""
        self._over = True
        self.stop()

    def stop(self) -> None:
        """Ends the worker, if there is one. The next call starts another one."""
        if self._process:
            self._process.kill()
            self._reap()

    def _late(self, header: dict[str, Any], limit: float) -> str:
        """Ends a call that took too long, and returns the message about it."""
        if time.monotonic() < self._opens_until:
            logger.warning("no '%s': the new worker is still opening the run", header["do"])
            return f"the site's new worker was still opening the run after {limit:.0f} s"
        self.stop()
        logger.warning("'%s' took more than %.0f s: ended", header["do"], limit)
        if self._opening and header["do"] != "open" and not self._over:
            with contextlib.suppress(Closed):  # the next call notices, and starts another
                self._start()
        return f"'{header['do']}' took more than {limit:.0f} s at the site"

    def _ask(self, header: dict[str, Any], blob: bytes, until: float) -> Message:
        if self._process is None:
            self._start(opens=header["do"] != "open")
        if self._opens_until:
            assert self._sock is not None
            answer = receive(self._sock, max(0.1, min(until, self._opens_until) - time.monotonic()))
            self._opens_until = 0.0
            if "error" in answer[0]:
                self.stop()  # the next call tries again
                return answer
        return self._exchange(header, blob, until)

    def _exchange(self, header: dict[str, Any], blob: bytes, until: float) -> Message:
        assert self._sock is not None
        self._number += 1
        asked = {**header, "id": self._number}
        send(self._sock, asked, blob, max(0.1, until - time.monotonic()))
        return receive(self._sock, max(0.1, until - time.monotonic()))

    def _start(self, opens: bool = True) -> None:
        """Starts a worker. With ``opens``, it opens the run of an earlier worker."""
        ours, theirs = socket.socketpair()
        with theirs:
            number = str(theirs.fileno())
            command = [*self.command, number, json.dumps(self.own)]
            self._process = from_lasting_thread(
                lambda: subprocess.Popen(command, pass_fds=(theirs.fileno(),))
            )
        self._sock = ours
        if opens and self._opening:
            self._opens_until = time.monotonic() + OPENING
            send(self._sock, self._opening, b"", OPENING)

    def _reap(self) -> int | None:
        """Waits until the worker has ended, and returns its exit code, None if unknown."""
        process, sock = self._process, self._sock
        self._process = self._sock = None
        self._opens_until = 0.0
        if sock:
            sock.close()
        if process is None:
            return None
        for _ in range(2):
            try:
                return process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
        logger.warning("the worker %d does not end, even when killed", process.pid)
        return None
