"""Serves the page of a run to browsers on this machine, while the run goes on."""

from __future__ import annotations

import hmac
import logging
import secrets
import sys
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from fedvlm.errors import FedVLMError
from fedvlm.report import live
from fedvlm.report.live import Events
from fedvlm.report.write import html

logger = logging.getLogger("fedvlm")

HOST = "127.0.0.1"
HEADERS = {
    "Content-Type": "text/html; charset=utf-8",
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}


class Watch(ThreadingHTTPServer):
    """A server on the loopback address. Its page has an address that nobody can guess.

    Args:
        folder: the folder of the run.
        events: gives the events of a deployed run.
        port: the port; 0: any free port.

    Raises:
        FedVLMError: the port is taken.
    """

    daemon_threads = True

    def __init__(self, folder: Path, events: Callable[[], Events] = tuple, port: int = 0):
        self.folder, self.events, self.token = folder, events, secrets.token_urlsafe(18)
        self._done = b""  # the page of the finished run
        try:
            super().__init__((HOST, port), Handler)
        except OSError as error:
            raise FedVLMError(
                f"port {port} of {HOST} cannot be used ({error.strerror}); choose another one with "
                "--port, or leave it out"
            ) from error

    @property
    def address(self) -> str:
        """The address of the page."""
        return f"http://{HOST}:{self.server_port}/{self.token}/"

    def content(self) -> bytes:
        """The page now. The page of a finished run is made once."""
        if self._done:
            return self._done
        page = live.page(self.folder, self.events())
        text = html(page).encode()
        if not page.refresh:
            self._done = text
        return text

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that goes away is no error; any other error is one line."""
        error = sys.exc_info()[1]
        if not isinstance(error, ConnectionError):
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            logger.warning("the page cannot be made (%.300s)", reason)


class Handler(BaseHTTPRequestHandler):
    """Answers ``GET`` for the one page, to whoever knows its address."""

    server: Watch
    server_version, sys_version = "fedvlm", ""

    def do_GET(self) -> None:
        if not self._allowed():
            return self.send_error(HTTPStatus.NOT_FOUND)
        content = self.server.content()
        self.send_response(HTTPStatus.OK)
        for name, value in HEADERS.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)
        return None

    def _allowed(self) -> bool:
        """Whether the request names this server and the page.

        A page of another site can make a browser ask, under a name of its own that leads here.
        """
        hosts = [f"{name}:{self.server.server_port}" for name in (HOST, "localhost")]
        asked, page = self.path.encode(), f"/{self.server.token}/".encode()
        return self.headers.get("Host") in hosts and hmac.compare_digest(asked, page)

    def log_message(self, format: str, *args: Any) -> None:
        """Requests are not logged: the address is a secret."""
