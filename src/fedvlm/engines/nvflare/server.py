"""The server's process for one run: the ordinary round loop, with clients at their sites."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nvflare.collab import collab
from nvflare.collab.api.exceptions import CollabCallError

from fedvlm import config as configs
from fedvlm import federate
from fedvlm.engines.remote import Limits, Remote, Unanswered
from fedvlm.errors import FedVLMError
from fedvlm.progress import Progress
from fedvlm.store import Store, append_line
from fedvlm.tree import digest

SITES = "sites.json"
PATIENCE = 60.0  # seconds for the process of an earlier job to end
GRACE = 20.0  # seconds more than the site has, so that the site tells what took too long


class Server:
    """What NVFlare runs at the server.

    Args:
        job: a JSON file: ``config``, ``limits``, ``events`` (a file), ``resume``.
    """

    def __init__(self, job: str):
        self.job = json.loads(Path(job).read_text())

    @collab.main
    def run(self) -> None:
        events = Path(self.job["events"])

        def tell(event: dict[str, Any]) -> None:
            append_line(events, {"time": round(time.time(), 3), **event})

        try:
            proxies = {client.name: client for client in collab.clients}
            call = asking(proxies, collab.context.is_aborted)
            perform(self.job, call, sorted(proxies), tell)
            tell({"event": "done"})
        except Aborted:
            tell({"event": "aborted"})
            raise
        except FedVLMError as error:
            tell({"event": "error", "why": str(error)})
            raise
        except Exception as error:
            tell({"event": "error", "why": f"{type(error).__name__}: {error}"})
            raise


class Aborted(Exception):
    """NVFlare has ended the job: a person did, or a site's process died."""


def asking(proxies: dict[str, Any], aborted: Callable[[], bool]) -> Callable[..., Any]:
    """How a site is asked; once a job is aborted nobody is."""

    def call(
        site: str, header: dict[str, Any], blob: bytes, limit: float
    ) -> tuple[dict[str, Any], bytes]:
        if site not in proxies:
            raise Unanswered("it was not connected when this job began")
        text = json.dumps({**header, "limit": limit})
        try:
            answer = proxies[site](timeout=limit + min(GRACE, limit)).ask(text, blob)
        except CollabCallError as error:
            if aborted():
                raise Aborted from None
            raise Unanswered(f"no answer: {error.cause}") from None
        if not (isinstance(answer, list | tuple) and len(answer) == 2):
            raise Unanswered("its answer has another form")
        about, tensors = answer
        if not isinstance(about, str) or not isinstance(tensors, bytes | bytearray):
            raise Unanswered("its answer has another form")
        found = json.loads(about)
        if not isinstance(found, dict):
            raise Unanswered("its answer has another form")
        return found, bytes(tensors)

    return call


def perform(
    job: dict[str, Any], call: Callable[..., Any], sites: list[str], tell: Callable[..., None]
) -> None:
    """A whole run, or what is left of it.

    Args:
        job: as :class:`Server` has it.
        call: asks a site.
        sites: those that are connected.
        tell: is told what happens.
    """
    config = configs.load(job["config"])
    store = Store(config.output)
    engine = Remote(call, sites, Limits(**job["limits"]), tell)
    with store.locked(PATIENCE):
        if job["resume"]:
            known = json.loads((store.folder / SITES).read_text())
            engine.open(known["run"], config, known=known["weights"])
            if digest(engine.adapter) != known["adapter"]:
                raise FedVLMError(
                    "the sites begin from another initial adapter than when the run began: the "
                    "model or the packages have changed; restore them, or start a new run"
                )
            federate.begin(config, store, {}, resume=True)
        else:
            run = uuid.uuid4().hex[:12]
            engine.open(run, config)
            about = {"run": run, "weights": engine.weights, "rows": engine.rows}
            text = json.dumps(about | {"adapter": digest(engine.adapter)}, indent=2) + "\n"
            federate.begin(config, store, {SITES: text}, resume=False)
        tell({"event": "begun", "sites": list(engine.sites)})
        federate.drive(config, engine, engine.weights, store, Told(tell))


class Told(Progress):
    """Progress as events."""

    def __init__(self, tell: Callable[..., None]):
        self.tell = tell

    def round(self, line: dict[str, Any], seconds: float) -> None:
        self.tell({"event": "round", "round": line["round"], "seconds": seconds})
