"""The server's gate: a connection needs a key that the operator has admitted.

The authority's signature alone is not enough, so that a certificate can be revoked before it ends.
NVFlare 2.9 has no list of revoked certificates. Every site and the operator connect to the server
by one kind of gRPC stream, so the gate stands before that stream. It reads the operator's list
again when the file changes, and closes open connections whose key is no longer in the list.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import logging
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
from nvflare.apis.fl_component import FLComponent
from nvflare.fuel.f3.drivers import grpc_driver
from nvflare.fuel.f3.drivers.net_utils import ssl_required

from fedvlm.deploy.nvflare import keys
from fedvlm.deploy.nvflare.presence import Presence
from fedvlm.deploy.nvflare.project import CLOSED, UNADMITTED
from fedvlm.errors import FedVLMError

logger = logging.getLogger("fedvlm.gate")

LOOKED = 1.0  # seconds between two looks at the operator's list


class Gate(FLComponent):  # type: ignore[misc]  # NVFlare has no types
    """Puts the gate before NVFlare's listeners. NVFlare creates it before it listens.

    Args:
        admitted: path of the operator's list.
    """

    def __init__(self, admitted: str):
        super().__init__()
        if list(inspect.signature(grpc_driver.Servicer.Stream).parameters) != [
            "self",
            "request_iterator",
            "context",
        ]:
            raise RuntimeError("this version of NVFlare has other streams: keys cannot be checked")
        keeper = Keeper(Path(admitted))
        presence = Presence(Path(admitted).parent / "server")
        grpc_driver.Servicer.Stream = guarded(grpc_driver.Servicer.Stream, keeper, presence)


def guarded(
    stream: Callable[..., Iterator[Any]], keeper: Keeper, presence: Presence
) -> Callable[..., Iterator[Any]]:
    """Returns NVFlare's handler of a stream with the gate before it."""

    def Stream(self: Any, request_iterator: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        if not ssl_required(self.server.connector.params):  # inside the server's machine
            yield from stream(self, request_iterator, context)
            return
        name, _ = identity(context)
        with keeper.watched(context), presence.connection(name, request_iterator) as requests:
            yield from stream(self, requests, context)

    return Stream


class Keeper:
    """Knows the admitted keys, and the open connections of each.

    Args:
        path: the operator's list. While it cannot be read, nobody is admitted.
    """

    def __init__(self, path: Path):
        self.path = path
        self._seen: tuple[int, ...] | None = None
        self._admitted: dict[str, str] = {}
        self._open: dict[int, tuple[grpc.ServicerContext, str, str]] = {}
        self._lock = threading.Lock()
        self._looks: threading.Thread | None = None

    def holder(self, mark: str) -> str | None:
        """The name with which a key is admitted: a site's, or the operator's, else ``None``."""
        with self._lock:
            self._read()
            return self._admitted.get(mark)

    @contextlib.contextmanager
    def watched(self, context: grpc.ServicerContext) -> Iterator[None]:
        """Refuses a connection without an admitted key, and closes it when that is revoked."""
        name, mark = identity(context)
        if self.holder(mark) != name:
            logger.warning("%s: '%s', %s", UNADMITTED, name, keys.grouped(mark) or "no certificate")
            context.abort(grpc.StatusCode.PERMISSION_DENIED, "this key is not admitted")
        with self._lock:
            self._open[id(context)] = context, name, mark
            if self._looks is None:
                self._looks = threading.Thread(target=self._look, name="gate", daemon=True)
                self._looks.start()
        try:
            yield
        finally:
            with self._lock:
                self._open.pop(id(context), None)

    def close_revoked(self) -> None:
        """Closes the connections of keys that are no longer admitted."""
        with self._lock:
            self._read()
            ended = [
                found for found in self._open.values() if self._admitted.get(found[2]) != found[1]
            ]
        for context, name, mark in ended:
            logger.warning("%s: '%s', %s", CLOSED, name, keys.grouped(mark))
            context.cancel()

    def _look(self) -> None:
        """Looks at the list while a connection is open."""
        pause = threading.Event()
        while not pause.wait(LOOKED):
            with self._lock:
                if not self._open:
                    self._looks = None
                    return
            try:
                self.close_revoked()
            except Exception:  # the next look must come
                logger.exception("a look at the operator's list has failed")

    def _read(self) -> None:
        """Reads the list again if the file has changed. The caller holds the lock."""
        try:
            about = self.path.stat()
            seen = about.st_ino, about.st_mtime_ns, about.st_size
            if seen == self._seen:
                return
            self._admitted = table(json.loads(self.path.read_text()))
            self._seen = seen
        except (OSError, ValueError, TypeError, AttributeError, LookupError) as error:
            if self._seen != ():
                logger.error("'%s' cannot be read, so nobody is admitted: %r", self.path, error)
            self._admitted, self._seen = {}, ()


def table(listed: dict[str, Any]) -> dict[str, str]:
    """Fingerprint -> the name in the certificate, from the operator's list."""
    revoked = set(listed["revoked"])
    found = {mark: site for site, marks in listed["sites"].items() for mark in marks}
    found[listed["admin"]] = listed["operator"]
    return {mark: name for mark, name in found.items() if mark and mark not in revoked}


def identity(context: grpc.ServicerContext) -> tuple[str, str]:
    """The name and the fingerprint in the certificate that a client has shown; empty if none."""
    for text in context.auth_context().get("x509_pem_cert", []):
        with contextlib.suppress(FedVLMError):
            found = keys.certificate(text, "the client's certificate")
            return keys.common_name(found), keys.fingerprint(found)
    return "", ""
