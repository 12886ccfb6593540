"""Keeps a site's worker process running, from a process that has neither torch nor a model."""

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

logger = logging.getLogger("fedvlm")

OPENING = 600.0  # seconds in which a worker has to have loaded data and model
TRIES = 2


class Supervisor:
    """A worker process, started when it is needed, and again when it has died.

    Args:
        own: what the worker has to know of its site; see :class:`.worker.Worker`.
        command: how it is started, before the socket's number and ``own``.
    """

    def __init__(self, own: dict[str, Any], command: list[str] | None = None):
        self.own = own
        self.command = command or [sys.executable, "-m", "fedvlm.deploy.worker"]
        self.restarts = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._sock: socket.socket | None = None
        self._opening: dict[str, Any] | None = None
        self._opens_until = 0.0  # a new worker opens the run, and has not said that it has
        self._number = 0
        self._over = False
        self._turn = threading.Lock()

    @property
    def pid(self) -> int | None:
        """The worker's, None while there is none."""
        return self._process.pid if self._process else None

    def call(self, header: dict[str, Any], blob: bytes = b"", limit: float = 60.0) -> Message:
        """The worker's answer; one call at a time. A worker that dies is replaced, once a call.

        Args:
            header: ``do``, and what it needs; the last ``open`` is repeated to a new worker.
            blob: tensors.
            limit: seconds; a worker that takes longer is ended, and the next one opens the run
                meanwhile. That may take longer than a call, which then finds it at that.
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
        """Ends the worker for good."""
        self._over = True
        self.stop()

    def stop(self) -> None:
        """Ends the worker, if there is one; the next call starts another."""
        if self._process:
            self._process.kill()
            self._reap()

    def _late(self, header: dict[str, Any], limit: float) -> str:
        """What became of a call that took too long."""
        if time.monotonic() < self._opens_until:
            logger.warning("no '%s': the new worker is still opening the run", header["do"])
            return f"the site's new worker was still opening the run after {limit:.0f} s"
        self.stop()
        logger.warning("'%s' took more than %.0f s: ended", header["do"], limit)
        if self._opening and header["do"] != "open" and not self._over:
            with contextlib.suppress(Closed):  # the next call finds out, and starts another
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
        """A new worker, which opens the run that the one before had, if there was one."""
        ours, theirs = socket.socketpair()
        with theirs:
            number = str(theirs.fileno())
            self._process = subprocess.Popen(
                [*self.command, number, json.dumps(self.own)], pass_fds=(theirs.fileno(),)
            )
        self._sock = ours
        if opens and self._opening:
            self._opens_until = time.monotonic() + OPENING
            send(self._sock, self._opening, b"", OPENING)

    def _reap(self) -> int | None:
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
        logger.warning("the worker %d does not end: the system holds it", process.pid)
        return None
