"""A person at the site accepts every run, where the site's policy has ``approval: true``.

The first ``open`` of a run writes a request and is refused. A person reads the request, and
approves or refuses it. The next ``open`` of the same configuration then passes. An approval is for:

- one configuration: the digest of what the server sent,
- the site's own settings: if they change what would run, the request waits again,
- one run: the first run number that opens with it. The same run may be opened again, as after a
  crash, but another run with the same configuration waits again.

A request is a sealed file in ``STATE/requests``.
"""

from __future__ import annotations

import getpass
import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from fedvlm.deploy import balance
from fedvlm.deploy.auditlog import NAME, AuditLog
from fedvlm.deploy.digests import digest_of
from fedvlm.deploy.outline import outline
from fedvlm.deploy.policy import Policy, Refused
from fedvlm.deploy.recorded import at_site
from fedvlm.deploy.signature import signer
from fedvlm.errors import FedVLMError, cut, shown
from fedvlm.settings.sections import Config
from fedvlm.store import sealed
from fedvlm.store.files import only_one

logger = logging.getLogger("fedvlm")

FOLDER = "requests"
WAITING = 20  # most requests that may wait at a time
DIGITS = 12  # hexadecimal digits of a request's number
PATIENCE = 10.0  # seconds to wait for another process that reads or writes requests
REASON = 300  # characters of the longest reason

Decision = Literal["waiting", "approved", "refused"]


@dataclass(frozen=True)
class Request:
    """A run that a server has asked for.

    Attributes:
        number: the number that a person types: the beginning of the digest, and perhaps ``-2``.
        digest: the digest of the configuration as it was sent.
        run: the number of the run that asked last, or that is bound to the approval.
        signed_by: the operator who has signed it; empty without a check of signatures.
        asked: time of the first request, UTC.
        here: the configuration that would run at this site, without the folder of the run.
        sent: what would be sent, in words; empty if it is not known.
        stays: what would stay, in words.
        privacy: the site's limit on differential privacy and what was spent, in words; empty for a
            run without it.
        unknown: why the words are not known; empty if they are.
        decision: ``waiting``, ``approved`` or ``refused``.
        decided: time and person of the decision; empty while it waits.
        because: the reason of a refusal, which the server is told.
        bound: whether ``run`` has been opened with the approval.
    """

    number: str
    digest: str
    run: str
    signed_by: str
    asked: str
    here: dict[str, Any]
    sent: tuple[str, ...] = ()
    stays: tuple[str, ...] = ()
    privacy: tuple[str, ...] = ()
    unknown: str = ""
    decision: Decision = "waiting"
    decided: str = ""
    because: str = ""
    bound: bool = False


class Requests:
    """The requests of a site, on its disk.

    Args:
        state: the folder of the site's state.
    """

    def __init__(self, state: str | Path):
        self.folder = Path(state) / FOLDER

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps other processes from reading and writing requests."""
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with only_one(self.folder, "another process decides on requests: try again", PATIENCE):
            yield

    def all(self) -> list[Request]:
        """All requests, the oldest first.

        Raises:
            FedVLMError: a file is damaged.
        """
        found = [_read(path) for path in self.folder.glob("*.json")]
        return sorted(found, key=lambda request: (request.asked, request.number))

    def write(self, request: Request) -> None:
        """Adds or replaces a request."""
        sealed.write(self.folder / f"{request.number}.json", asdict(request))

    def find(self, name: str) -> Request:
        """The request with a number, with the beginning of one, or of a run.

        Raises:
            FedVLMError: there is none, or more than one.
        """
        known = self.all()
        same = [r for r in known if r.number == name]
        same = same or [r for r in known if name and (r.number.startswith(name) or r.run == name)]
        if len(same) != 1:
            listed = ", ".join(r.number for r in same or known) or "none"
            what = "several requests are" if same else "there is no request"
            raise FedVLMError(f"{what} {shown(name)} at this site; there are: {listed}")
        return same[0]

    def decide(self, name: str, decision: Decision, because: str = "") -> Request:
        """Writes a person's decision. A later one replaces an earlier one.

        Args:
            name: as for :meth:`find`.
            decision: ``approved`` or ``refused``.
            because: the reason; the server gets it.

        Raises:
            FedVLMError: there is no such request.
        """
        with self.locked():
            found = self.find(name)
            by = f"{_now()} by {_person()}"
            because = cut(because, REASON, newlines=False)
            found = replace(found, decision=decision, decided=by, because=because)
            self.write(found)
        return found


def admit(
    own: Mapping[str, Any], policy: Policy, run: str, asked: Mapping[str, Any], config: Config
) -> None:
    """Lets a run pass that is signed and approved, as far as the site demands that.

    Args:
        own: the site's ``name``, ``data``, ``state``, and ``root``: path of the certificate of the
            federation's authority. Without ``root``, signatures are not checked.
        policy: the site's policy, which allows the run.
        run: the number of the run.
        asked: the header of ``open``.
        config: its configuration, checked.

    Raises:
        Refused: the run is not signed, not approved yet, or a person has refused it.
    """
    digest, by = digest_of(asked["config"]), ""
    if own.get("root"):
        by = signer(run, digest, asked.get("operator"), Path(own["root"]).read_bytes())
    if not policy.approval:
        return
    here = policy.localized(config, own["data"], Path(own["state"]) / "runs" / run)
    try:
        _pass(_noted(own, policy, here, (run, digest, by)))
    except Refused:
        raise
    except FedVLMError as error:  # its message may have a path of this site
        logger.error("%s", error)
        raise Refused("the site cannot read or write its requests; see the site's log") from error


def _noted(
    own: Mapping[str, Any], policy: Policy, here: Config, asks: tuple[str, str, str]
) -> Request:
    """The request that decides on a run, as it is on the disk now. It may be a new one.

    Args:
        own: as for :func:`admit`.
        policy: the site's policy.
        here: the run's settings at this site.
        asks: the number of the run, the digest of its configuration, and who has signed it.
    """
    run, digest, by = asks
    requests = Requests(own["state"])
    with requests.locked():
        found = _current(requests.all(), run, digest)
        tree = _without_folder(here)
        if found is None or found.here != tree:
            found = _asked(requests.all(), found, run, digest, by, tree)
            requests.write(_described(found, here, own, policy))
            at_site(own).note("asked for approval", request=found.number, run=run, config=digest)
        elif found.decision == "approved" and not found.bound:
            requests.write(replace(found, run=run, signed_by=by, bound=True))
        elif found.run != run:
            requests.write(replace(found, run=run, signed_by=by))
    return found


def _current(known: list[Request], run: str, digest: str) -> Request | None:
    """The request that decides on a run; None: a new one has to be made.

    Raises:
        Refused: the run was opened with another configuration.
    """
    for request in known:
        if request.bound and request.run == run and request.digest != digest:
            raise Refused(
                f"run '{run}' was approved with another configuration (SHA-256 {request.digest}); "
                f"this one ({digest}) is another run: begin it as one"
            )
    same = [r for r in known if r.digest == digest and (not r.bound or r.run == run)]
    own = [r for r in same if r.bound]
    return next(iter(own or same), None)


def _asked(
    known: list[Request],
    before: Request | None,
    run: str,
    digest: str,
    by: str,
    here: dict[str, Any],
) -> Request:
    """A request that waits: a new one, or an earlier one whose settings at the site changed."""
    if before:
        return replace(before, run=run, signed_by=by, here=here, decision="waiting", decided="")
    if sum(request.decision == "waiting" for request in known) >= WAITING:
        raise Refused(
            f"{WAITING} requests wait for a person at this site already, and no more are taken: "
            "the site decides on them with 'fedvlm site requests'"
        )
    taken = {request.number for request in known}
    numbers = (digest[:DIGITS] + (f"-{k}" if k else "") for k in (0, *range(2, len(taken) + 3)))
    number = next(one for one in numbers if one not in taken)
    return Request(number, digest, run, by, _now(), here)


def _described(request: Request, here: Config, own: Mapping[str, Any], policy: Policy) -> Request:
    """The request with its words. A person may decide without them, so they stop nothing."""
    none = replace(request, sent=(), stays=(), privacy=(), unknown="")
    try:
        found = outline(here, own["name"], policy.tell_rows)
        private = here.privacy.local
        words = (balance.limit(policy), balance.most(own["state"], policy)) if private else ()
    except Exception as error:  # of a model's folder, of an algorithm, or of a damaged ledger
        return replace(none, unknown=f"{type(error).__name__}: {error}"[:600])
    return replace(none, sent=found.sent, stays=found.stays, privacy=words)


def _pass(request: Request) -> None:
    if request.decision == "refused":
        because = f": {request.because}" if request.because else ""
        raise Refused(
            f"a person at the site has refused this run (request {request.number}){because}"
        )
    if request.decision == "waiting":
        raise Refused(
            f"this run waits for a person's approval at the site: fedvlm site requests (request "
            f"{request.number}). When it is approved, give the same command again"
        )


def decided(state: str | Path, name: str, decision: Decision, because: str = "") -> Request:
    """Writes a person's decision, also to the audit log.

    Args:
        state: the folder of the site's state.
        name: number of the request, or of its run.
        decision: ``approved`` or ``refused``.
        because: the reason; the server gets it.

    Raises:
        FedVLMError: there is no such request, or the log cannot be written.
    """
    requests = Requests(state)
    found = requests.find(name)
    AuditLog(Path(state) / NAME).note(
        decision, request=found.number, config=found.digest, by=_person()
    )
    return requests.decide(found.number, decision, because)


def _without_folder(config: Config) -> dict[str, Any]:
    """The settings as JSON has them, without the folder of the run."""
    tree = json.loads(json.dumps(config.model_dump()))
    tree.pop("output")
    return tree


def _read(path: Path) -> Request:
    tree = sealed.read(path)
    lists = {name: tuple(tree.get(name, ())) for name in ("sent", "stays", "privacy")}
    return Request(**tree | lists)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _person() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a user without a name
        return "unknown"
