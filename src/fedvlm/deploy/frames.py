"""Messages between the two processes of a site: a JSON header and bytes (a safetensors file)."""

from __future__ import annotations

import json
import socket
import struct
import time
from typing import Any

HEADER = 2**21  # bytes of the largest header; a run's settings take a few thousand
BLOB = 2**31  # bytes of the largest body
_SIZES = struct.Struct(">IQ")

Message = tuple[dict[str, Any], bytes]


class NoMessage(ValueError):
    """A text is no header of a message."""


class Closed(Exception):
    """The other end has closed the connection."""


def parsed(text: str | bytes | bytearray) -> dict[str, Any]:
    """The header of a received message. The sender may lie.

    Parsed JSON can take 32 times its bytes in memory (measured). So a long text is refused before
    it is parsed.

    Raises:
        NoMessage: the text is longer than :data:`HEADER`, or is no JSON mapping.
    """
    if len(text) > HEADER:
        raise NoMessage(f"its header has {len(text)} bytes, and {HEADER} are the most")
    try:
        # NaN passes: a site's loss may be one, and the run names the site that sends it.
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise NoMessage(f"its header is no JSON: {error}") from None
    if not isinstance(header, dict):
        raise NoMessage("its header is no mapping")
    return header


def send(
    sock: socket.socket, header: dict[str, Any], blob: bytes = b"", limit: float | None = None
) -> None:
    """Sends one message. The other end must take it within ``limit`` seconds.

    Raises:
        Closed: the other end is gone.
        TimeoutError: the message was not taken in time.
    """
    text = json.dumps(header).encode()
    if len(text) > HEADER or len(blob) > BLOB:
        raise ValueError(
            f"a header of {len(text)} bytes and a body of {len(blob)} bytes are too large: at most "
            f"{HEADER} and {BLOB} bytes are allowed"
        )
    try:
        sock.settimeout(limit)
        sock.sendall(_SIZES.pack(len(text), len(blob)) + text)
        sock.sendall(blob)
    except TimeoutError:
        raise
    except OSError as error:
        raise Closed(str(error)) from error


def receive(sock: socket.socket, limit: float | None = None) -> Message:
    """Waits for one message, at most ``limit`` seconds.

    Raises:
        Closed: the other end is gone, or it sent no message: too large, or no JSON mapping.
        TimeoutError: no whole message arrived in time.
    """
    until = None if limit is None else time.monotonic() + limit
    sizes = _SIZES.unpack(_exactly(sock, _SIZES.size, until))
    if sizes[0] > HEADER or sizes[1] > BLOB:
        raise Closed(f"announced sizes of {sizes[0]} and {sizes[1]} bytes: this is no message")
    try:
        header = parsed(_exactly(sock, sizes[0], until))
    except NoMessage as error:
        raise Closed(f"this is no message: {error}") from None
    return header, _exactly(sock, sizes[1], until)


def _exactly(sock: socket.socket, size: int, until: float | None) -> bytes:
    """Receives ``size`` bytes. ``until`` is a time of the monotonic clock."""
    whole = bytearray(size)
    view, done = memoryview(whole), 0
    while done < size:
        if until is not None:
            left = until - time.monotonic()
            if left <= 0:
                raise TimeoutError
            sock.settimeout(left)
        else:
            sock.settimeout(None)
        try:
            count = sock.recv_into(view[done:])
        except TimeoutError:
            raise
        except OSError as error:
            raise Closed(str(error)) from error
        if not count:
            raise Closed("the other end has closed the connection")
        done += count
    return bytes(whole)
