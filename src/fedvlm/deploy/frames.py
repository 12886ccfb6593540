"""Messages between a site's two processes: a JSON header, and bytes (a safetensors file)."""

from __future__ import annotations

import json
import socket
import struct
import time
from typing import Any

HEADER = 2**24
BLOB = 2**31
_SIZES = struct.Struct(">IQ")

Message = tuple[dict[str, Any], bytes]


class Closed(Exception):
    """The other end is gone."""


def send(
    sock: socket.socket, header: dict[str, Any], blob: bytes = b"", limit: float | None = None
) -> None:
    """Sends one message; the other end has to take it within ``limit`` seconds.

    Raises:
        Closed: nobody receives it.
        TimeoutError: it took too long.
    """
    text = json.dumps(header).encode()
    if len(text) > HEADER or len(blob) > BLOB:
        raise ValueError(f"a message of {len(text)} and {len(blob)} bytes is too large")
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
        Closed: the other end has ended.
        TimeoutError: it took too long.
    """
    until = None if limit is None else time.monotonic() + limit
    sizes = _SIZES.unpack(_exactly(sock, _SIZES.size, until))
    if sizes[0] > HEADER or sizes[1] > BLOB:
        raise Closed("what came is no message")
    header = json.loads(_exactly(sock, sizes[0], until))
    return header, _exactly(sock, sizes[1], until)


def _exactly(sock: socket.socket, size: int, until: float | None) -> bytes:
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
            raise Closed("the other end has closed")
        done += count
    return bytes(whole)
