"""The server of the playground: one process on this machine, behind a token."""

from __future__ import annotations

import ipaddress
import logging
import os
import secrets
import signal
import socket
import sys
import tempfile
from collections.abc import Awaitable, Callable, MutableMapping
from http.cookies import CookieError, SimpleCookie
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

from fedvlm.after.asked import Asked
from fedvlm.errors import FedVLMError, shown

LARGEST = 64 * 2**20  # bytes of an uploaded file
CLOSED = b"Open the address that 'fedvlm app' has printed: it holds the token of this page.\n"
HEADERS = {
    # The browser fetches nothing from elsewhere, and no other page may frame this one.
    "content-security-policy": "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; "
    "frame-ancestors 'none'; form-action 'self'; base-uri 'self'",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "cache-control": "no-store",
}

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


def needs_gradio() -> None:
    """Refuses the playground where gradio is not installed."""
    if find_spec("gradio") is None:
        raise FedVLMError("this needs gradio: pip install 'fedvlm[app]'")


def is_loopback(host: str) -> bool:
    """Whether only programs on this machine reach an address."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def listen(host: str, port: int) -> socket.socket:
    """A socket at an address; port 0 takes a free port.

    Raises:
        FedVLMError: the address cannot be used.
    """
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        why = getattr(error, "strerror", None) or error
        raise FedVLMError(
            f"the page cannot be served at {shown(host)}, port {port}: {why}; choose another "
            "--port (0 takes a free one) or --host"
        ) from error


class Door:
    """Lets in browsers that have the token: from the address once, then from a cookie.

    Args:
        app: the page, an ASGI application.
        token: the token.
        port: the port of the page. Cookies do not know ports, so the cookie's name has it.
    """

    def __init__(self, app: Any, token: str, port: int):
        self._app, self._token, self._cookie = app, token, f"fedvlm-{port}"

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
        elif self._fits(_cookie(scope, self._cookie)):
            await self._app(scope, receive, _with_headers(send))
        elif self._fits(parse_qs(scope["query_string"].decode("latin-1")).get("token", [""])[0]):
            kept = f"{self._cookie}={self._token}; HttpOnly; SameSite=Strict; Path=/"
            await _reply(send, 303, b"", {"location": "/", "set-cookie": kept})
        else:
            await _reply(send, 401, CLOSED, {"content-type": "text/plain; charset=utf-8"})

    def _fits(self, given: str) -> bool:
        return secrets.compare_digest(given.encode(), self._token.encode())


def _cookie(scope: Message, name: str) -> str:
    sent = b"; ".join(value for key, value in scope["headers"] if key == b"cookie")
    try:
        found = SimpleCookie(sent.decode("latin-1")).get(name)
    except CookieError:
        return ""
    return found.value if found else ""


def _with_headers(send: Send) -> Send:
    async def sent(message: Message) -> None:
        if message["type"] == "http.response.start":
            own = [(k.encode(), v.encode()) for k, v in HEADERS.items()]
            names = {name for name, _ in own}
            kept = [(k, v) for k, v in message.get("headers", ()) if k.lower() not in names]
            message = {**message, "headers": [*kept, *own]}
        await send(message)

    return sent


async def _reply(send: Send, status: int, body: bytes, headers: dict[str, str]) -> None:
    own = [(k.encode(), v.encode("latin-1")) for k, v in headers.items()]
    start = {"type": "http.response.start", "status": status, "headers": own}
    await _with_headers(send)(start)
    await send({"type": "http.response.body", "body": body})


def serve(asked: Asked, listener: socket.socket, token: str, ready: Callable[[], None]) -> None:
    """Serves the page until a signal ends the process. Uploads are deleted at the end.

    Args:
        asked: the models.
        listener: the socket, see :func:`listen`.
        token: the token of the page.
        ready: called when the page can be opened.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so the folder is deleted then too
    with tempfile.TemporaryDirectory(prefix="fedvlm-app-") as folder:
        # Gradio reads both when it is imported.
        os.environ["GRADIO_TEMP_DIR"] = folder
        os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
        import gradio
        import uvicorn
        from fastapi import FastAPI

        from fedvlm.app import page

        blocks = page.page(asked, Path(folder))
        app = gradio.mount_gradio_app(
            FastAPI(docs_url=None, redoc_url=None, openapi_url=None),
            blocks.queue(max_size=100),
            "/",
            allowed_paths=[],
            css=page.CSS,
            enable_monitoring=False,
            footer_links=[],
            max_file_size=LARGEST,
            mcp_server=False,
            pwa=False,
            run_history=False,
            show_error=False,
            ssr_mode=False,
            theme=page.theme(),
        )
        blocks.has_launched = True  # without it, gradio takes files that nobody has uploaded
        door = Door(app, token, listener.getsockname()[1])
        config = uvicorn.Config(
            door,
            access_log=False,
            log_level="warning",
            server_header=False,
            timeout_graceful_shutdown=1,
            ws="none",
        )
        serving = uvicorn.Server(config)
        # Open pages keep a connection; that it is cut at the end is no error.
        logging.getLogger("uvicorn.error").addFilter(lambda record: not serving.should_exit)
        ready()
        serving.run(sockets=[listener])
