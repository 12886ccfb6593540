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
from fedvlm.deploy.calls import Late, asking, settle
from fedvlm.deploy.remote import Gone, Limits, Remote, Unanswered
from fedvlm.errors import FedVLMError
from fedvlm.rounds import federate
from fedvlm.rounds.progress import Progress
from fedvlm.store.files import append_line
from fedvlm.store.run import Store
from fedvlm.tree import digest

SITES = "sites.json"
RENEW = "renew"
"""A file beside a job's events: the job ends with the round that is under way."""
PATIENCE = 60.0  # seconds for the process of an earlier job to end


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
            call = calling(proxies, collab.context.is_aborted)
            perform(self.job, call, sorted(proxies), tell)
            tell({"event": "done"})
        except Renewed:
            tell({"event": "renewed"})
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


class Renewed(Exception):
    """The job has ended with a round, for another one of all sites that are connected."""


def calling(proxies: dict[str, Any], aborted: Callable[[], bool]) -> Callable[..., Any]:
    """How a site is asked; once a job is aborted nobody is."""

    def exchange(
        site: str, header: dict[str, Any], blob: bytes, seconds: float
    ) -> tuple[dict[str, Any], bytes]:
        until = time.monotonic() + seconds
        try:
            answer = proxies[site](timeout=seconds).ask(json.dumps(header), blob)
        except CollabCallError as error:
            if aborted():
                raise Aborted from None
            if isinstance(error.cause, TimeoutError) and time.monotonic() < until - 1:
                raise Unanswered("its answer was broken off: too large, or cut short") from None
            raise Gone(f"no answer: {error.cause}") from None
        if not (isinstance(answer, list | tuple) and len(answer) == 2):
            raise Unanswered("its answer has another form")
        about, tensors = answer
        if not isinstance(about, str) or not isinstance(tensors, bytes | bytearray):
            raise Unanswered("its answer has another form")
        found = json.loads(about)
        if not isinstance(found, dict):
            raise Unanswered("its answer has another form")
        return found, bytes(tensors)

    patient = asking(exchange)

    def call(
        site: str, header: dict[str, Any], blob: bytes, limit: float
    ) -> tuple[dict[str, Any], bytes]:
        if site not in proxies:
            raise Gone("it was not connected when this job began")
        try:
            return patient(site, header, blob, limit)
        except Late as error:
            raise Unanswered(str(error)) from None

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
        settle()
        tell({"event": "begun", "sites": list(engine.sites)})
        told = Told(tell, Path(job["events"]).with_name(RENEW))
        federate.drive(config, engine, engine.weights, store, told)


class Told(Progress):
    """Progress as events; after a round the job may have to end.

    Args:
        tell: gets the events.
        renew: a file that says so.
    """

    def __init__(self, tell: Callable[..., None], renew: Path):
        self.tell, self.renew = tell, renew

    def round(self, line: dict[str, Any], seconds: float) -> None:
        for site, why in line.get("rejected", {}).items():
            self.tell({"event": "rejected", "site": site, "round": line["round"], "why": why})
        self.tell({"event": "round", "round": line["round"], "seconds": seconds})
        if self.renew.exists():
            raise Renewed
