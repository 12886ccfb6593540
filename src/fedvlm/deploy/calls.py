"""One call between server and site, in pieces that are short.

Training takes as long as a round may, and an NVFlare call says nothing until it ends. So a site
answers within :data:`PATIENCE`, if only that it is at work, and is asked again: one that is gone is
known in seconds, whatever the deadline of a round. Large tensors have messages of their own: a site
keeps those of its answer until they are fetched, so the server says how many it holds at a time.

Where messages are large their memory is freed at once (:func:`settle`, :func:`release`).
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

PATIENCE = 5.0  # seconds after which a site says that it is at work
SILENCE = 20.0  # seconds after which a site that says nothing is gone: it may have a busy machine
GRACE = 10.0  # seconds more for the ways there and back
SMALL = 2**21  # bytes of tensors that are no reason for messages of their own
SENDS = 4  # large messages on their way to sites at a time
TURN = 30.0  # seconds after which a message that is still on its way keeps no other one waiting

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
        """The answer; ``at_work`` before it is there, ``kept`` where its tensors are to be fetched.

        A ``ping`` is answered whatever is under way, and who sends much is not kept waiting.
        """
        number, do = header.pop("number"), header["do"]
        if do == "ping":
            return {}, b""
        if do not in ("wait", "fetch"):
            limit = float(header.pop("limit"))
            self._answer = background(lambda: self._call(header, blob, limit))
            self._number = number
        elif number != self._number:
            return {"error": "failed", "message": "this site was asked something else since"}, b""
        release()
        answer = self._answer
        wait([answer], 0 if len(blob) > SMALL else PATIENCE)
        if not answer.done():
            return {"at_work": True}, b""
        about, tensors = answer.result()
        kept = len(tensors) > SMALL and do != "fetch"
        return ({"kept": number}, b"") if kept else (about, tensors)


def asking(exchange: Exchange) -> Exchange:
    """The server's end: calls that may take long, of messages that may not.

    Args:
        exchange: sends one message and waits so many seconds for the answer to begin.

    Returns:
        The same, for calls; it raises :class:`Late` where the answer is not there ``seconds`` and
        :data:`GRACE` after it was asked, even if bytes still trickle in. An answer ``kept: N`` has
        tensors, which are those of the call ``do: fetch, number: N``.
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
                if blob or answer[1]:
                    release()
                return answer
            one = message({"do": "wait"}, b"")
        raise Late(f"no answer within {seconds:.0f} s")

    return call


def settle() -> None:
    """To be called once, when all is loaded: from then on :func:`release` takes milliseconds.

    What there is by now is left out of later searches for garbage.
    """
    gc.collect()
    gc.freeze()


def release() -> None:
    """Frees the messages that have gone.

    NVFlare's tasks that send refer to themselves and to what they sent, so that it is only freed
    when Python next looks for such circles: seldom where there are many objects, as with torch.
    """
    gc.collect()


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
