"""One call between server and site, in pieces that are short.

Training takes as long as a round may, and an NVFlare call says nothing until it ends. So a site
answers within :data:`PATIENCE`, if only that it is at work, and is asked again: one that is gone is
known in seconds, whatever the deadline of a round.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import Any

from fedvlm.engines.nvflare.frames import Message

PATIENCE = 10.0  # seconds after which a site says that it is at work
GRACE = 10.0  # seconds more for the ways there and back

Exchange = Callable[[str, dict[str, Any], bytes, float], Message]
"""``(site, header, tensors, seconds) -> (header, tensors)``: one message, and its answer."""


class Late(Exception):
    """There was no answer in time."""


class Desk:
    """The site's end: it takes what the server asks, and answers in time.

    Args:
        call: does it: ``(header, tensors, seconds) -> (header, tensors)``.
    """

    def __init__(self, call: Callable[[dict[str, Any], bytes, float], Message]):
        self._call = call
        self._number = ""
        self._answer: Future[Message] = Future()

    def ask(self, header: dict[str, Any], blob: bytes) -> Message:
        """The answer, or ``at_work``; a ``ping`` is answered whatever is under way."""
        number = header.pop("number")
        if header["do"] == "ping":
            return {}, b""
        if header["do"] != "wait":
            limit = float(header.pop("limit"))
            self._answer = background(lambda: self._call(header, blob, limit))
            self._number = number
        elif number != self._number:
            return {"error": "failed", "message": "this site was asked something else since"}, b""
        answer = self._answer
        wait([answer], PATIENCE)
        return answer.result() if answer.done() else ({"at_work": True}, b"")


def asking(exchange: Exchange) -> Exchange:
    """The server's end: calls that may take long, of messages that may not.

    Args:
        exchange: sends one message and waits so many seconds for the answer to begin.

    Returns:
        The same, for calls; it raises :class:`Late` where the answer is not there ``seconds`` and
        :data:`GRACE` after it was asked, even if bytes still trickle in.
    """

    def call(site: str, header: dict[str, Any], blob: bytes, seconds: float) -> Message:
        until = time.monotonic() + seconds + GRACE
        number = uuid.uuid4().hex
        asked, sent = {**header, "limit": seconds}, blob
        while (left := until - time.monotonic()) > 0:
            said = {**asked, "number": number}
            limit = min(PATIENCE, seconds) + GRACE / 2
            one = background(lambda said=said, sent=sent, s=limit: exchange(site, said, sent, s))  # type: ignore[misc]
            wait([one], left)
            if not one.done():
                break
            answer = one.result()
            if not answer[0].get("at_work"):
                return answer
            asked, sent = {"do": "wait"}, b""
        raise Late(f"no answer within {seconds:.0f} s")

    return call


def background(function: Callable[[], Any]) -> Future[Any]:
    """What a function returns or raises, from a thread that keeps no process from ending."""
    future: Future[Any] = Future()

    def work() -> None:
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return future
