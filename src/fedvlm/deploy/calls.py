"""Long calls between server and site, made of short messages.

Training may take as long as a round's deadline, and an NVFlare call returns nothing until it ends.
Therefore a site answers every message within :data:`PATIENCE`, at least with ``at_work``, and the
server asks again. So the server notices within seconds that a site is gone, whatever the deadline.
Large tensors travel in separate messages: a site keeps the tensors of its answer until the server
fetches them. So the server decides how many it holds at a time.

The memory of a large message is freed as soon as it is sent (:func:`settle`, :func:`release`).
"""

from __future__ import annotations

import contextlib
import gc
import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import Any

from fedvlm.deploy.frames import Message

PATIENCE = 5.0  # seconds until a site that is still working answers ``at_work``
SILENCE = 20.0  # seconds without an answer until a site counts as gone; its machine may be busy
GRACE = 10.0  # seconds that a call may take beyond its limit, for the messages there and back
SMALL = 2**21  # bytes; tensors up to this size travel with the header
SENDS = 4  # number of large messages that are sent to sites at the same time
HELD = 2**23  # bytes of sent messages that may wait until their memory is freed
TURN = 30.0  # seconds until a large message that is still being sent lets the next one begin

Exchange = Callable[[str, dict[str, Any], bytes, float], Message]
"""``(site, header, tensors, seconds) -> (header, tensors)``: one message and its answer."""


class Late(Exception):
    """No answer arrived in time."""


class Desk:
    """The site's end: takes the server's requests and answers every message in time.

    Args:
        call: does the work of a request: ``(header, tensors, seconds) -> (header, tensors)``.
    """

    def __init__(self, call: Callable[[dict[str, Any], bytes, float], Message]):
        self._call = call
        self._number = ""
        self._answer: Future[Message] = Future()

    def ask(self, header: dict[str, Any], blob: bytes) -> Message:
        """Returns the answer to one message.

        The answer is ``at_work`` while the work is not finished. It is ``kept`` when its tensors
        are large: the server then fetches them. Two messages are answered at once, even during
        other work: a ``ping``, and a message with large tensors.
        """
        number, do = header.pop("number"), header["do"]
        if do == "ping":
            return {}, b""
        if do not in ("wait", "fetch"):
            limit = float(header.pop("limit"))
            self._answer = background(lambda: self._call(header, blob, limit))
            self._number = number
        elif number != self._number:
            return {"error": "failed", "message": "this site was asked something new since"}, b""
        release(len(blob))
        answer = self._answer
        wait([answer], 0 if len(blob) > SMALL else PATIENCE)
        if not answer.done():
            return {"at_work": True}, b""
        about, tensors = answer.result()
        kept = len(tensors) > SMALL and do != "fetch"
        return ({"kept": number}, b"") if kept else (about, tensors)


def asking(exchange: Exchange) -> Exchange:
    """The server's end: makes calls that may take long from messages that may not.

    Args:
        exchange: sends one message and waits up to ``seconds`` for the answer to begin.

    Returns:
        A function with the signature of ``exchange`` for whole calls. It raises :class:`Late` when
        the answer is not complete ``seconds`` + :data:`GRACE` after the request, even if bytes
        still arrive. An answer ``kept: N`` means: the call ``do: fetch, number: N`` returns the
        tensors.
    """
    sending = threading.BoundedSemaphore(SENDS)

    def call(site: str, header: dict[str, Any], blob: bytes, seconds: float) -> Message:
        number = header.get("number") or uuid.uuid4().hex
        limit = min(SILENCE, seconds + GRACE / 2)

        def message(asked: dict[str, Any], sent: bytes) -> Future[Message]:
            said = {**asked, "number": number}
            return background(lambda: exchange(site, said, sent, limit))

        with sending if len(blob) > SMALL else contextlib.nullcontext():
            until = time.monotonic() + seconds + GRACE
            one = message({**header, "limit": seconds}, blob)
            wait([one], min(TURN, seconds + GRACE))
        while (left := until - time.monotonic()) > 0:
            wait([one], left)
            if not one.done():
                break
            answer = one.result()
            if not answer[0].get("at_work"):
                release(len(blob) + len(answer[1]))
                return answer
            one = message({"do": "wait"}, b"")
        raise Late(f"no answer within {seconds:.0f} s")

    return call


def settle() -> None:
    """Makes :func:`release` take milliseconds. To be called once, when everything is loaded.

    Later garbage collections skip all objects that exist at this moment.
    """
    gc.collect()
    gc.freeze()


class _Held:
    """Bytes of messages since the last search for reference cycles."""

    size = 0
    lock = threading.Lock()


def release(size: int) -> None:
    """Frees the memory of sent messages, once these and earlier ones have :data:`HELD` bytes.

    NVFlare's send tasks hold references to themselves and to their message. Only Python's search
    for reference cycles frees them. It runs seldom in a process with many objects, as with torch.

    Args:
        size: bytes of the tensors of a message and of its answer.
    """
    with _Held.lock:
        _Held.size += size
        due = _Held.size >= HELD
        if due:
            _Held.size = 0
    if due:
        gc.collect()


def background(function: Callable[[], Any]) -> Future[Any]:
    """Runs a function in a daemon thread. The future gets its result or its exception."""
    future: Future[Any] = Future()

    def work() -> None:
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return future
