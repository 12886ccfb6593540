"""The server's process for one run: the ordinary round loop over clients at remote sites."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nvflare.collab import collab
from nvflare.collab.api.exceptions import CollabCallError

from fedvlm import config as configs
from fedvlm.deploy.auditlog import NAME, AuditLog
from fedvlm.deploy.calls import Late, asking, settle
from fedvlm.deploy.frames import NoMessage, parsed
from fedvlm.deploy.nvflare.processes import MARK
from fedvlm.deploy.nvflare.signing import Signer
from fedvlm.deploy.recorded import audited_calls
from fedvlm.deploy.remote import Limits, Remote
from fedvlm.deploy.unanswered import Gone, Unanswered
from fedvlm.errors import FedVLMError
from fedvlm.rounds import federate
from fedvlm.rounds.progress import Progress
from fedvlm.rounds.trackers import tracked
from fedvlm.store.files import append_line
from fedvlm.store.run import SITES, Store
from fedvlm.tree import digest

RENEW = "renew"
"""Name of a file beside a job's events. When the file exists, the job ends after the round."""
MALFORMED = "its answer is not a JSON object with bytes"
PATIENCE = 60.0  # seconds to wait until the process of an earlier job has ended


class Server:
    """The object that NVFlare runs at the server.

    Args:
        job: path of a JSON file with ``config``, ``limits``, ``events`` (path of a file),
            ``resume``, ``run`` (its number) and ``operator`` (the signature of the run).
    """

    def __init__(self, job: str):
        self.job = json.loads(Path(job).read_text())

    @collab.main
    def run(self) -> None:
        events = Path(self.job["events"])

        at = 0

        def tell(event: dict[str, Any]) -> None:
            nonlocal at
            at = event.get("round", at)
            about = {"time": round(time.time(), 3), "run": self.job["run"], "round": at}
            append_line(events, {**about, **event})

        try:
            proxies = {client.name: client for client in collab.clients}
            startup = Path(os.environ[MARK]) / "startup"
            signer = Signer(startup, str(collab.fl_ctx.get_job_id()))
            call = calling(proxies, collab.context.is_aborted, signer.sign)
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
    """The job was ended: by a person, or by NVFlare because a site's process died."""


class Renewed(Exception):
    """The job has ended after a round. Another job follows, with all connected sites."""


def calling(
    proxies: dict[str, Any],
    aborted: Callable[[], bool],
    sign: Callable[[dict[str, Any], bytes, str], str],
) -> Callable[..., Any]:
    """Returns the function that asks a site. It raises :class:`Aborted` once the job is aborted.

    Args:
        proxies: site -> NVFlare's stand-in for it.
        aborted: whether the job is aborted.
        sign: see :meth:`fedvlm.deploy.nvflare.signing.Signer.sign`.
    """

    def exchange(
        site: str, header: dict[str, Any], blob: bytes, seconds: float
    ) -> tuple[dict[str, Any], bytes]:
        until = time.monotonic() + seconds
        try:
            answer = proxies[site](timeout=seconds).ask(sign(header, blob, site), blob)
        except CollabCallError as error:
            if aborted():
                raise Aborted from None
            if isinstance(error.cause, TimeoutError) and time.monotonic() < until - 1:
                raise Unanswered("its answer was broken off: too large, or cut short") from None
            raise Gone(f"no answer: {error.cause}") from None
        if not (isinstance(answer, list | tuple) and len(answer) == 2):
            raise Unanswered(MALFORMED)
        about, tensors = answer
        if not isinstance(about, str) or not isinstance(tensors, bytes | bytearray):
            raise Unanswered(MALFORMED)
        try:
            return parsed(about), bytes(tensors)
        except NoMessage as error:
            raise Unanswered(str(error)) from None

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
    """Does a whole run, or the rest of one.

    Args:
        job: the contents of the file of :class:`Server`.
        call: asks a site.
        sites: the connected sites.
        tell: receives the events.
    """
    config = configs.load(job["config"])
    store = Store(config.output)
    log = AuditLog(store.folder / NAME, server="fedvlm")
    call = audited_calls(log, signed(job["operator"], call))
    engine = Remote(call, sites, Limits(**job["limits"]), tell)
    with store.locked(PATIENCE):
        if job["resume"]:
            known = json.loads((store.folder / SITES).read_text())
            engine.open(known["run"], config, known=known["claimed"])
            if digest(engine.adapter) != known["adapter"]:
                raise FedVLMError(
                    "the initial adapter of the sites is not the one that the run began with: the "
                    "model or the packages have changed. Restore them, or start a new run"
                )
            federate.begin(config, store, {}, resume=True)
        else:
            run = job["run"]
            engine.open(run, config)
            about = {"run": run, "claimed": engine.claimed, "rows": engine.rows}
            about["weights"] = engine.weights
            text = json.dumps(about | {"adapter": digest(engine.adapter)}, indent=2) + "\n"
            federate.begin(config, store, {SITES: text}, resume=False)
        settle()
        tell({"event": "begun", "sites": list(engine.sites)})
        told = Told(tell, Path(job["events"]).with_name(RENEW))
        progress = tracked(config, told)
        with progress.started(config):
            federate.drive(config, engine, engine.weights, store, progress)


def signed(operator: dict[str, str], call: Callable[..., Any]) -> Callable[..., Any]:
    """The function that asks a site, with the operator's signature in every ``open``."""

    def asked(site: str, header: dict[str, Any], blob: bytes, limit: float) -> Any:
        header = {**header, "operator": operator} if header["do"] == "open" else header
        return call(site, header, blob, limit)

    return asked


class Told(Progress):
    """Reports progress as events, and ends the job after a round when that is asked for.

    Args:
        tell: receives the events.
        renew: path of the file that asks for the end of the job; see :data:`RENEW`.
    """

    def __init__(self, tell: Callable[..., None], renew: Path):
        self.tell, self.renew = tell, renew

    def round(self, line: dict[str, Any], seconds: float) -> None:
        for site, why in line.get("rejected", {}).items():
            self.tell({"event": "rejected", "site": site, "round": line["round"], "why": why})
        for site, how in line.get("bounded", {}).items():
            self.tell({"event": "bounded", "site": site, "round": line["round"], **how})
        scored = bool((line["evaluation"] or {}).get("global"))
        event = {"event": "round", "round": line["round"], "seconds": seconds, "scored": scored}
        told = ("bytes_up", "bytes_down", "epsilon", "missing")
        self.tell(event | {name: line[name] for name in told if name in line})
        if self.renew.exists():
            raise Renewed
